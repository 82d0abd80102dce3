"""The page: one photo, a head pose and a sentence in; a portrait out. Two public endpoints, no model code.

The page's own events are private and answer in HTML (`page.views`). Programs have `/preview` and `/generate`,
whose signatures do not move when the page does. Both go through the same `page.studio.Studio`.
"""

import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from facesnap.images import InputError
from facesnap.templates import TEMPLATES
from page import views
from page.studio import (
    LIMITS,
    MAX_PROMPT,
    MAX_SEED,
    NO_CONSENT,
    NO_REFERENCE,
    OWN_POSE,
    PHOTO_POSE,
    Order,
    Step,
    Studio,
    sentence,
)

ROOT = Path(__file__).parent
ASSETS = ROOT / "assets"

THEME = gr.themes.Base(
    primary_hue=gr.themes.Color(
        "#eef5f4", "#d8e8e6", "#b3d1ce", "#86b5b1", "#5b9691", "#3d7a76",
        "#2c6360", "#245150", "#1e4241", "#193636", "#0f2524",
    ),
    neutral_hue=gr.themes.Color(
        "#faf8f5", "#f3f0eb", "#e6e1d9", "#d2cbc0", "#a39b8f", "#716a60",
        "#5a544c", "#423e38", "#2f2d29", "#1f1e1b", "#151412",
    ),
    radius_size="lg",
    # Fonts of the system: a page that works offline cannot ask for others.
    font=["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"],
    font_mono=["ui-monospace", "Menlo", "Consolas", "monospace"],
).set(
    input_background_fill="*neutral_100",
    input_background_fill_dark="#181715",
    input_border_color_dark="*neutral_800",
    button_secondary_background_fill_dark="*neutral_800",
    button_secondary_background_fill_hover_dark="*neutral_700",
    checkbox_background_color_dark="*neutral_800",
    block_background_fill_dark="*neutral_900",
    block_border_color_dark="*neutral_800",
)  # fmt: skip

SCROLL_TO_RESULT = """() => setTimeout(() => {
  const begun = document.querySelector("#status progress[value='0']");
  if (begun && innerWidth < 721) document.querySelector("#result").scrollIntoView({behavior: "smooth"});
}, 60)"""


def build(pipeline: Any) -> gr.Blocks:
    """The whole page over a loaded `FaceSnapPipeline`."""
    studio = Studio(pipeline)
    shelf = examples(ASSETS / "examples")
    with gr.Blocks(title="FaceSnap", analytics_enabled=False, delete_cache=(300, 3000)) as demo:
        lay_out(studio, shelf)
        add_endpoints(studio)
    return demo


def lay_out(studio: Studio, shelf: list[dict[str, str]]) -> None:
    """Inputs left, result right, and the events between them."""
    settings = studio.pipeline.settings
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    sources = ["upload", "webcam", "clipboard"]

    gr.HTML(views.HEAD)
    with gr.Row(equal_height=False, elem_id="columns"):
        with gr.Column(scale=6, min_width=320):
            with gr.Column(elem_classes="fs-card"):
                gr.HTML(views.heading("A photo", "one person, face large and well lit", 1))
                with gr.Row(elem_id="photo-row"):
                    reference = photo_input(
                        label="Photo of the person",
                        show_label=False,
                        placeholder="Drop a photo here\nor click to choose",
                        sources=sources,
                        height=232,
                        elem_id="reference",
                    )
                    seen = gr.HTML(views.PREVIEW_EMPTY, elem_id="seen")
            with gr.Column(elem_classes="fs-card"):
                gr.HTML(views.heading("A head pose", "", 2))
                pose = gr.Radio(
                    [
                        ("As in the photo", OWN_POSE),
                        *((template.title, template.name) for template in TEMPLATES),
                        ("Another photo", PHOTO_POSE),
                    ],
                    value=OWN_POSE,
                    label="Head pose",
                    show_label=False,
                    container=False,
                    elem_id="pose",
                )
                pose_photo = photo_input(
                    label="Photo of the pose",
                    placeholder="A photo of anybody in the wanted pose\n(who it is does not show)",
                    sources=sources,
                    height=190,
                    visible=False,
                    elem_id="pose-photo",
                )
            with gr.Column(elem_classes="fs-card"):
                gr.HTML(views.heading("A prompt", "clothes, place, light, style; glasses or a hat", 3))
                prompt = gr.Textbox(
                    "",
                    label="Prompt",
                    show_label=False,
                    container=False,
                    lines=2,
                    max_lines=6,
                    max_length=MAX_PROMPT,
                    placeholder=shelf[0]["prompt"] if shelf else "a portrait in a red jacket, by the sea",
                    elem_id="prompt",
                )
                if "hint" in settings.about:  # what a checkpoint wants its prompts to be like
                    gr.HTML(views.notes([settings.about["hint"]]))
                consent = gr.Checkbox(
                    label="The people in my photos are me, or they agreed to this.", elem_id="consent"
                )
                go = gr.Button("Generate", variant="primary", size="lg", elem_id="generate")
                stop = gr.Button("Stop", variant="secondary", size="lg", visible=False, elem_id="stop")
                with gr.Accordion("Advanced", open=False, elem_id="advanced"):
                    negative = gr.Textbox(
                        "",
                        label="Negative prompt",
                        info="What should not be in the portrait.",
                        max_length=MAX_PROMPT,
                    )
                    with gr.Row():
                        steps = gr.Slider(*LIMITS["steps"], value=settings.steps, step=1, label="Steps")
                        guidance = gr.Slider(*LIMITS["guidance"], value=settings.guidance, step=0.1, label="Guidance")
                    with gr.Row():
                        identity = gr.Slider(
                            *LIMITS["identity_strength"], value=1, step=0.05, label="Identity strength"
                        )
                        landmark = gr.Slider(
                            *LIMITS["landmark_strength"], value=1, step=0.05, label="Landmark strength"
                        )
                    with gr.Row():
                        seed_box = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED)
                        new_seed = gr.Checkbox(True, label="New seed each time", elem_id="new-seed")
        with gr.Column(scale=5, min_width=320, elem_id="result"):
            with gr.Column(elem_classes="fs-card"):
                status = gr.HTML(visible=False, elem_id="status")
                stage = gr.HTML(views.STAGE_EMPTY, elem_id="stage")
                portrait = gr.Image(
                    type="filepath",
                    format="png",
                    label="Portrait",
                    show_label=False,
                    container=False,
                    interactive=False,
                    visible=False,
                    buttons=["download", "fullscreen"],
                    alt_text="The portrait",
                    elem_id="portrait",
                )
                summary = gr.HTML(visible=False, elem_id="summary")
            if shelf:
                with gr.Column(elem_classes="fs-card"):
                    gr.HTML(views.heading("Examples", "rendered people, nobody’s photo"))
                    gallery = gr.Gallery(
                        [(row["reference"], row["prompt"]) for row in shelf],
                        label="Examples",
                        show_label=False,
                        container=False,
                        columns=3,
                        allow_preview=False,
                        interactive=False,
                        buttons=[],
                        elem_id="examples",
                    )
    gr.HTML(views.FOOT)

    def show_preview(reference: str | None, pose: str, pose_photo: str | None) -> str:
        if reference is None:
            return views.PREVIEW_EMPTY
        if pose == PHOTO_POSE and pose_photo is None:
            return views.PREVIEW_WAITS
        try:
            return views.preview(studio.preview(reference, pose, pose_photo))
        except Exception as error:
            return views.note(sentence(error), error=True)

    def busy(is_busy: bool) -> dict[Any, Any]:
        return {go: gr.Button(visible=not is_busy), stop: gr.Button(visible=is_busy)}

    def say(text: str) -> dict[Any, Any]:
        return {status: gr.HTML(text, visible=bool(text))}

    def show_portrait(
        reference: str | None,
        prompt: str,
        consent: bool,
        pose: str,
        negative: str,
        steps: int,
        guidance: float,
        identity: float,
        landmark: float,
        seed: int | None,
        pose_photo: str | None,
        new_seed: bool,
    ) -> Iterator[dict[Any, Any]]:
        number = -1 if new_seed or seed is None else seed
        strengths = (guidance, identity, landmark)
        order = Order(reference, prompt, consent, pose, negative, steps, *strengths, number, pose_photo)
        started = time.perf_counter()
        yield {**say(views.working(Step(0, steps), started)), **busy(True)}
        try:
            for event in studio.make(order):
                if isinstance(event, Step):
                    yield say(views.working(event, started))
                else:
                    yield {
                        stage: gr.HTML(visible=False),
                        portrait: gr.Image(event.path, visible=True),
                        summary: gr.HTML(views.summary(event.report), visible=True),
                        seed_box: event.report["seed"],
                        **say(""),
                        **busy(False),
                    }
        except Exception as error:
            yield {**say(views.note(sentence(error), error=True)), **busy(False)}

    gr.on(
        [reference.change, pose.change, pose_photo.change],
        show_preview,
        [reference, pose, pose_photo],
        seen,
        trigger_mode="always_last",
        concurrency_id="preview",
        concurrency_limit=2,
        **quiet,
    )
    pose.change(lambda chosen: gr.Image(visible=chosen == PHOTO_POSE), pose, pose_photo, queue=False, **quiet)
    strengths = [steps, guidance, identity, landmark]
    running = gr.on(
        [go.click, prompt.submit],
        show_portrait,
        [reference, prompt, consent, pose, negative, *strengths, seed_box, pose_photo, new_seed],
        [status, stage, portrait, summary, seed_box, go, stop],
        validator=validate,
        concurrency_id="portrait",
        concurrency_limit=1,
        **quiet,
    )
    stop.click(
        lambda: {**say(views.note("Stopped.")), **busy(False)},
        outputs=[status, go, stop],
        cancels=running,
        queue=False,
        **quiet,
    )
    # On a phone the result lies below the button: go there when the work begins, and only then.
    status.change(None, js=SCROLL_TO_RESULT, **quiet)
    if shelf:

        def take(event: gr.SelectData) -> tuple[Image.Image, str, str]:
            row = shelf[event.index]
            # As pixels: Gradio gives out files of the working directory only, wherever the page was started.
            return Image.open(row["reference"]), row["pose"], row["prompt"]

        gallery.select(take, outputs=[reference, pose, prompt], **quiet)


def add_endpoints(studio: Studio) -> None:
    """/preview and /generate, on components that are never shown: the page can change and they do not."""

    def preview(reference: str | None, pose: str, pose_photo: str | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        """The 72 landmarks that a portrait would follow. Takes a fraction of a second.

        Parameters:
            reference: A photo of the person: JPEG, PNG or WebP, at most 10 MB and 25 megapixels.
            pose: "as in the photo", "another photo", or a template's name: "front", "quarter-left" and so on.
            pose_photo: A photo of anybody in the wanted pose; used where pose is "another photo".
        Returns:
            picture: The landmarks as the model sees them.
            report: The landmarks in pixels of that picture; the face's box in the photo; the faces seen.
        """
        try:
            result = studio.preview(reference, pose, pose_photo).result
        except Exception as error:
            raise gr.Error(sentence(error), print_exception=False) from None
        face = result.reference_faces[0]
        return result.drawing, {
            "size": list(result.drawing.shape[:2]),
            "landmarks": np.round(result.landmarks, 2).tolist(),
            "face_box": np.round(face.box, 1).tolist(),
            "faces_in_photo": face.count,
            "notes": list(result.notes),
        }

    def generate(
        reference: str | None,
        prompt: str,
        consent: bool,
        pose: str,
        negative_prompt: str,
        steps: int,
        guidance: float,
        identity_strength: float,
        landmark_strength: float,
        seed: int,
        pose_photo: str | None = None,
    ) -> Iterator[tuple[str | None, dict[str, Any]]]:
        """A portrait of the person in the photo. Answers once a step; the last answer is the portrait.

        Parameters:
            reference: A photo of the person: JPEG, PNG or WebP, at most 10 MB and 25 megapixels.
            prompt: What the portrait shows: clothes, place, light, style, glasses or a hat.
            consent: Must be true: the people in the photos are you, or they agreed to this.
            pose: "as in the photo", "another photo", or a template's name: "front", "quarter-left" and so on.
            negative_prompt: What should not be in the portrait.
            steps: Denoising steps, 1 to 50.
            guidance: How strictly the prompt is followed (classifier-free guidance), 1 to 10.
            identity_strength: How strongly the face is that of the photo, 0 to 2; 1 as trained.
            landmark_strength: How strongly the landmarks are followed, 0 to 2; 1 as trained.
            seed: The same seed and inputs give the same portrait; -1 takes a new one.
            pose_photo: A photo of anybody in the wanted pose; used where pose is "another photo".
        Returns:
            picture: The portrait, a PNG file that says how it was made.
            report: Seed, identity score, landmarks, settings and seconds; before that, {"step": k, "of": n}.
        """
        strengths = (guidance, identity_strength, landmark_strength)
        order = Order(reference, prompt, consent, pose, negative_prompt, steps, *strengths, seed, pose_photo)
        try:
            for event in studio.make(order):
                if isinstance(event, Step):
                    yield None, {"step": event.done, "of": event.of}
                else:
                    yield event.path, event.report
        except Exception as error:
            raise gr.Error(sentence(error), print_exception=False) from None

    settings = studio.pipeline.settings
    with gr.Row(visible=False):
        reference, pose_photo = photo_input(label="reference"), photo_input(label="pose_photo")
        # Plain boxes without bounds: what is out of range is refused by `Order.check`, in a sentence.
        pose = gr.Textbox(OWN_POSE, label="pose")
        prompt, negative = gr.Textbox("", label="prompt"), gr.Textbox("", label="negative_prompt")
        steps = gr.Number(settings.steps, precision=0, label="steps")
        guidance = gr.Number(settings.guidance, label="guidance")
        identity = gr.Number(1, label="identity_strength")
        landmark = gr.Number(1, label="landmark_strength")
        seed = gr.Number(-1, precision=0, label="seed")
        consent = gr.Checkbox(False, label="consent")
        picture, report = gr.Image(type="filepath", format="png", label="picture"), gr.JSON(label="report")
        trigger = gr.Button()
    strengths = [steps, guidance, identity, landmark]
    trigger.click(
        preview,
        [reference, pose, pose_photo],
        [picture, report],
        api_name="preview",
        concurrency_id="preview",
    )
    trigger.click(
        generate,
        [reference, prompt, consent, pose, negative, *strengths, seed, pose_photo],
        [picture, report],
        api_name="generate",
        concurrency_id="portrait",
        validator=validate,
    )


def validate(reference: str | None, prompt: str, consent: bool, *others: Any) -> list[dict[str, Any]]:
    """Before the queue: a missing photo or consent is said at its field. `Order.check` says it once more."""
    fine = gr.validate(True, "")
    return [
        gr.validate(reference is not None, NO_REFERENCE),
        fine,
        gr.validate(consent, NO_CONSENT),
        *(fine for _ in others),
    ]


def photo_input(**options: Any) -> gr.Image:
    """An image input that hands over the path of the upload and does not open it.

    What Gradio's own preprocessing raises for a text file or a decompression bomb reaches nobody as a
    sentence; `facesnap.images.open_image` reads the header first and says what is wrong.
    """
    image = gr.Image(type="filepath", format="png", image_mode=None, **options)
    image.preprocess = lambda payload: payload.path if payload else None  # type: ignore[method-assign]
    return image


def examples(folder: Path) -> list[dict[str, str]]:
    """examples.json lists {"reference": file, "pose": one of POSES, "prompt": text}, all rendered people."""
    index = folder / "examples.json"
    if not index.exists():
        return []
    rows = json.loads(index.read_text(encoding="utf-8"))
    return [{**row, "reference": str(folder / row["reference"])} for row in rows]


def launch(demo: gr.Blocks, **options: Any) -> Any:
    """Limits and looks. Nothing is kept, no server text is shown, nothing is asked of the network."""
    return demo.queue(api_open=False, max_size=20).launch(
        theme=THEME,
        css=(ROOT / "page" / "page.css").read_text(encoding="utf-8") + views.pose_tiles(ASSETS / "templates"),
        max_file_size="10mb",
        show_error=False,
        run_history=False,
        footer_links=["api"],
        ssr_mode=False,
        **options,
    )


def main() -> None:
    """Serves the checkpoint that FACESNAP_MODEL names (a folder or a Hub id), else the mini."""
    from facesnap.pipeline import FaceSnapPipeline

    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    try:
        pipeline = FaceSnapPipeline.from_pretrained(os.environ.get("FACESNAP_MODEL", ASSETS / "mini"))
    except InputError as error:
        sys.exit(f"{error}\nThe environment variable FACESNAP_MODEL names the checkpoint to serve.")
    launch(build(pipeline))


if __name__ == "__main__":
    main()

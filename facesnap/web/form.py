"""What the page consists of: inputs left, the result right, a bar with the button that stays in view.

`Form.inputs` holds the inputs under the names of `PortraitRequest`'s fields, with some of the page's own: references
(a list), aspect and size, which become width and height, new_seed, and a slider for every expression that the head
model has a name for.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from facesnap.speed import PRESETS
from facesnap.templates import TEMPLATES
from facesnap.web import views
from facesnap.web.request import (
    ASPECTS,
    MAX_PROMPT,
    MAX_SEED,
    NO_STYLE,
    OWN_POSE,
    OWN_SCHEDULER,
    PHOTO_POSE,
    SPECS,
    styles,
)
from facesnap.web.uploads import MorePhotos, Photo, Photos

MOST_SLIDERS = 8  # of expressions: head models of a hundred coefficients name none that a visitor would know
ROW = {"min_width": 130}  # two sliders stand side by side on the narrowest phone


class Form:
    """All components of the page, in the order in which they are seen."""

    def __init__(self, pipeline: Any, assets: Path) -> None:
        self.pipeline, self.settings = pipeline, pipeline.settings
        self.shelf = examples(assets / "examples")
        self.inputs: dict[str, Any] = {}
        gr.HTML(views.HEAD)
        with gr.Row(equal_height=False, elem_id="columns"):
            with gr.Column(scale=6, min_width=0, elem_id="left"):
                self._photo_card()
                self._pose_card()
                self._prompt_card()
                self._bar()
            with gr.Column(scale=5, min_width=0, elem_id="right"):
                with gr.Column(elem_classes="fs-card", elem_id="card-preview"):
                    gr.HTML(views.heading("Preview", "follows every change"))
                    self.preview = gr.HTML(views.PREVIEW_EMPTY, elem_id="preview")
                self._result_card()
        self._session_card()
        if self.shelf:
            self._example_card()
        code = f"https://huggingface.co/spaces/{space}/tree/main" if (space := os.environ.get("SPACE_ID")) else None
        gr.HTML(views.foot(self.settings.about.get("license", "that of their source"), code))

    @property
    def grid(self) -> int:
        """Sides are multiples of this: what the VAE asks for, and 64 where portraits are large."""
        return 64 if self.settings.size >= 512 else self.pipeline.vae_scale_factor

    @property
    def expressions(self) -> tuple[str, ...]:
        """The head model's own names that have a slider."""
        names = self.pipeline.head_model.expression_names
        return names if len(names) <= MOST_SLIDERS else ()

    # -------------------------------------------------------------- inputs

    def _photo_card(self) -> None:
        with gr.Column(elem_classes="fs-card", elem_id="card-photos"):
            gr.HTML(views.heading("Photos", "one to four of one person", 1))
            with gr.Row(elem_id="photo-row"):
                self.inputs["references"] = Photos(
                    format="png",
                    label="Photos of the person",
                    show_label=False,
                    container=False,
                    interactive=True,
                    sources=["upload", "webcam"],
                    file_types=["image"],
                    columns=2,
                    height=190,
                    object_fit="cover",
                    allow_preview=False,
                    buttons=[],
                    elem_id="references",
                )
                self.seen = gr.HTML(views.SEEN_EMPTY, elem_id="seen")
            # The tip keeps the button's place, so that what is below does not move under a visitor's finger.
            with gr.Row(elem_id="photo-foot"):
                gr.HTML(views.TIP)
                self.more = MorePhotos(
                    "Add another photo",
                    file_count="multiple",
                    file_types=["image"],
                    visible=False,
                    size="sm",
                    elem_id="more",
                )

    def _pose_card(self) -> None:
        inputs = self.inputs
        templates = [(template.title, template.name) for template in TEMPLATES]
        with gr.Column(elem_classes="fs-card", elem_id="card-pose"):
            gr.HTML(views.heading("A head pose", "", 2))
            choices = [("As in the photo", OWN_POSE), *templates, ("Another photo", PHOTO_POSE)]
            inputs["pose"] = bare_radio(choices, OWN_POSE, "Head pose", "pose")
            inputs["pose_photo"] = Photo(
                type="filepath",
                format="png",
                image_mode=None,
                label="Photo of the pose",
                placeholder="A photo of anybody in the wanted pose\n(who it is does not show)",
                sources=["upload", "webcam", "clipboard"],
                height=190,
                visible=False,
                elem_id="pose-photo",
            )
            with gr.Accordion("Turn the head, change the expression", open=False, elem_id="turn"):
                with gr.Row():
                    self._slider("yaw", 0)
                    self._slider("pitch", 0)
                with gr.Row():
                    self._slider("roll", 0)
                    self._slider("head_size", 1)
                with gr.Row():
                    inputs["expression"] = gr.Radio(
                        [("From the pose", "pose"), ("As in the photo", "reference"), ("Neutral", "neutral")],
                        value="pose",
                        label="Expression",
                        elem_classes="fs-pills",
                        elem_id="expression",
                        **ROW,
                    )
                    self._slider("expression_strength", 1)
                self._expression_sliders()

    def _expression_sliders(self) -> None:
        if self.expressions:
            gr.HTML(views.notes(["Added to the expression; below 0 takes away from it."]))
        for first in range(0, len(self.expressions), 2):
            with gr.Row():
                for name in self.expressions[first : first + 2]:
                    label = name.replace("_", " ").capitalize()
                    self.inputs[f"expressions.{name}"] = gr.Slider(-1, 1, value=0, step=0.05, label=label, **ROW)

    def _prompt_card(self) -> None:
        inputs, settings = self.inputs, self.settings
        example = self.shelf[0]["prompt"] if self.shelf else "in a red jacket, by the sea"
        with gr.Column(elem_classes="fs-card", elem_id="card-prompt"):
            gr.HTML(views.heading("A prompt", "clothes, place, light; glasses or a hat", 3))
            inputs["prompt"] = gr.Textbox(
                "",
                label="Prompt",
                show_label=False,
                container=False,
                lines=2,
                max_lines=6,
                max_length=MAX_PROMPT,
                placeholder=f"For example: {example}",
                elem_id="prompt",
            )
            self.unknown = gr.HTML(visible=False, elem_id="unknown")
            names = [style.name for style in styles(settings)]
            own = next(name for name in ("photo", NO_STYLE) if name in names)
            inputs["style"] = bare_radio([(name.capitalize(), name) for name in names], own, "Style", "style")
            if "hint" in settings.about:  # what a checkpoint wants its prompts to be like
                gr.HTML(views.more("What this model knows", settings.about["hint"]))
            with gr.Accordion("Advanced", open=False, elem_id="advanced"):
                self._advanced()

    def _advanced(self) -> None:
        inputs, settings = self.inputs, self.settings
        inputs["negative_prompt"] = gr.Textbox(
            "", label="Negative prompt", info="What should not be in the portrait.", max_length=MAX_PROMPT
        )
        with gr.Row():
            self._slider("steps", settings.steps)
            self._slider("guidance", settings.guidance)
        with gr.Row():
            self._slider("identity_strength", 1)
            self._slider("landmark_strength", 1)
        with gr.Row():
            inputs["aspect"] = gr.Radio(
                list(ASPECTS), value="1:1", label="Aspect", elem_classes="fs-pills", elem_id="aspect", **ROW
            )
            inputs["size"] = gr.Slider(
                self.grid * round(settings.size / 2 / self.grid),
                self.grid * int(1.2 * settings.size / self.grid),
                value=settings.size,
                step=self.grid,
                label="Size",
                info="pixels of a side; other aspects keep the area",
                **ROW,
            )
        with gr.Row():
            self._slider("count", 1)
            inputs["scheduler"] = gr.Dropdown(
                [("As the model was made", OWN_SCHEDULER), *SPECS["scheduler"].choices[1:]],
                value=OWN_SCHEDULER,
                label="Sampler",
                info="another way from noise to picture",
                elem_id="scheduler",
                **ROW,
            )
        with gr.Row():
            inputs["seed"] = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED, elem_id="seed", **ROW)
            inputs["new_seed"] = gr.Checkbox(True, label="New seed each time", elem_id="new-seed", **ROW)

    def _bar(self) -> None:
        """Consent, the button and, beside it, what becomes of pressing it."""
        with gr.Column(elem_classes="fs-card", elem_id="bar"):
            self.inputs["consent"] = gr.Checkbox(
                label="The people in my photos are me, or they agreed to this.", container=False, elem_id="consent"
            )
            with gr.Row(elem_id="go"):
                presets = [(name.capitalize(), name) for name in PRESETS]
                self.inputs["preset"] = bare_radio(presets, "best", "Best or fast", "preset")
                self.go = gr.Button("Generate", variant="primary", size="lg", elem_id="generate")
                self.stop = gr.Button("Stop", variant="secondary", size="lg", visible=False, elem_id="stop")
            self.status = gr.HTML(visible=False, elem_id="status")

    def _slider(self, name: str, value: float) -> None:
        spec = SPECS[name]
        self.inputs[name] = gr.Slider(
            spec.low, spec.high, value=value, step=spec.step, label=spec.label, info=spec.info or None, elem_id=name,
            **ROW,
        )  # fmt: skip

    # -------------------------------------------------------------- results

    def _result_card(self) -> None:
        with gr.Column(elem_classes="fs-card", elem_id="result"):
            self.stage = gr.HTML(views.STAGE_EMPTY, elem_id="stage")
            self.pictures = gr.Gallery(
                format="png",
                label="Portraits",
                show_label=False,
                container=False,
                interactive=False,
                visible=False,
                columns=1,
                object_fit="contain",
                allow_preview=False,  # a click enlarges, by page.js
                buttons=[],
                elem_id="pictures",
            )
            self.summary = gr.HTML(visible=False, elem_id="summary")
            with gr.Row(elem_id="after"):
                self.download = gr.DownloadButton("Download PNG", visible=False, elem_id="download")
                self.again = gr.Button("Use this seed again", visible=False, elem_id="again")
            # Kept by the browser, unlike gr.State: the server may forget a session at any time.
            self.seeds, self.chosen = gr.JSON([], visible=False), gr.Number(0, visible=False, precision=0)
            self.made = gr.JSON([], visible=False)  # the settings of each portrait of the last request

    def _session_card(self) -> None:
        """The portraits of this tab, as the browser has them: the server keeps none."""
        with gr.Column(elem_classes="fs-card", elem_id="card-session"):
            gr.HTML(views.heading("Your portraits so far", "kept by this tab alone, gone with it"))
            self.session = gr.Gallery(
                label="Your portraits so far",
                show_label=False,
                container=False,
                interactive=False,
                columns=8,
                allow_preview=False,
                buttons=[],
                elem_id="session",
            )
            self.back = gr.Button("Back to these settings", visible=False, size="sm", elem_id="back")
            self.kept, self.kept_chosen = gr.JSON([], visible=False), gr.Number(0, visible=False, precision=0)

    def _example_card(self) -> None:
        with gr.Column(elem_classes="fs-card", elem_id="card-examples"):
            gr.HTML(views.heading("Examples", "rendered people, nobody’s photo"))
            self.gallery = gr.Gallery(
                [(row["reference"], f"{row['style']}, {row['prompt']}".capitalize()) for row in self.shelf],
                label="Examples",
                show_label=False,
                container=False,
                columns=6,
                allow_preview=False,
                interactive=False,
                buttons=[],
                elem_id="examples",
            )


def bare_radio(choices: Sequence[tuple[str, str]], value: str, label: str, elem_id: str) -> gr.Radio:
    """A radio group that page.css shows as tiles or words in a row."""
    return gr.Radio(
        choices, value=value, label=label, show_label=False, container=False, elem_id=elem_id,
        elem_classes="" if elem_id == "pose" else "fs-pills",
    )  # fmt: skip


def examples(folder: Path) -> list[dict[str, str]]:
    """examples.json lists {"reference": file, "pose": one of POSES, "prompt", "style"}, all rendered people."""
    index = folder / "examples.json"
    if not index.exists():
        return []
    rows = json.loads(index.read_text(encoding="utf-8"))
    return [{**row, "reference": str(folder / row["reference"])} for row in rows]

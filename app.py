"""The page: photos, a head pose and a sentence in; a portrait out. Two public endpoints, no model code.

The page's own events are private and answer in HTML (`page.views`). Programs have `/preview` and `/generate`,
whose signatures do not move when the page does. Both go through the same `page.studio.Studio`.
"""

try:  # on ZeroGPU it must come before torch; elsewhere it does nothing
    import spaces
except ImportError:
    spaces = None

import argparse
import ctypes
import html
import importlib.util
import json
import logging
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Generator
from contextlib import closing
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from gradio_client.utils import is_http_url_like
from PIL import Image

from facesnap.errors import InputError
from facesnap.preview import MAX_REFERENCES
from facesnap.request import SCHEDULERS
from facesnap.speed import PRESETS
from facesnap.templates import TEMPLATES
from page import safety, views
from page.order import (
    ASPECTS,
    LIMITS,
    MAX_COUNT,
    MAX_PROMPT,
    MAX_SEED,
    NO_CONSENT,
    NO_REFERENCE,
    NO_STYLE,
    OWN_POSE,
    OWN_SCHEDULER,
    PHOTO_POSE,
    Order,
    Sitting,
    frame,
    preset,
    styles,
)
from page.studio import MOST_WAITING, Look, Portrait, Reading, Step, Studio, Waiting, gpu_seconds, role, sentence

ROOT = Path(__file__).parent
ASSETS = ROOT / "assets"
MINI = ASSETS / "mini"
NO_URLS = "Addresses are not fetched here: upload the picture itself."
EXAMPLE_SEED = 7

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
    input_placeholder_color="*neutral_500",
    input_placeholder_color_dark="*neutral_400",
    button_secondary_background_fill_dark="*neutral_800",
    button_secondary_background_fill_hover_dark="*neutral_700",
    checkbox_background_color_dark="*neutral_900",
    checkbox_border_color="*neutral_400",
    checkbox_border_color_dark="*neutral_500",
    block_background_fill_dark="*neutral_900",
    block_border_color_dark="*neutral_800",
)  # fmt: skip

SCROLL_TO_RESULT = """() => setTimeout(() => {
  const begun = document.querySelector("#status progress[value='0']");
  if (begun && innerWidth < 721) document.querySelector("#result").scrollIntoView({behavior: "smooth"});
}, 60)"""


MOST_SESSIONS = 128  # whose copy of the page's configuration, 0.2 MB each, the server keeps; every API call opens one
MOST_AT_ONCE = 16  # orders that Gradio hands over at a time; of these the studio makes one and lines up the others


def build(
    pipeline: Any, *, allowed: Callable[[Image.Image], None] = lambda picture: None, most_waiting: int = MOST_WAITING
) -> gr.Blocks:
    """The whole page over a loaded `FaceSnapPipeline`; allowed and most_waiting as in `Studio`."""
    on_gpu = spaces.GPU(duration=gpu_seconds) if spaces else (lambda generator: generator)
    studio = Studio(pipeline, on_gpu=on_gpu, allowed=allowed, most_waiting=most_waiting)
    with gr.Blocks(title="FaceSnap", analytics_enabled=False, delete_cache=(300, 3000)) as demo:
        Page(studio, ASSETS)
        add_endpoints(studio)
    return demo


class Page:
    """Inputs left, preview and result right, and the events between them.

    `form` holds the inputs under the names of `Order`'s fields, with three of the page's own: aspect and size,
    which become width and height, and new_seed.
    """

    QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    SOURCES = ["upload", "webcam", "clipboard"]

    def __init__(self, studio: Studio, assets: Path) -> None:
        self.studio, self.settings = studio, studio.pipeline.settings
        self.shelf, self.templates = examples(assets / "examples"), assets / "templates"
        self.form: dict[str, Any] = {}
        # Sliders ask for a preview many times a second: what a visitor's photos say is remembered until they leave.
        self.faces = gr.Cache(max_size=64, per_session=True)
        # What the examples show, once made: updates of the page, the PNG file's bytes and the report.
        self.shown: dict[int, tuple[dict[Any, str], bytes, dict[str, Any]]] = {}

        gr.HTML(views.HEAD)
        with gr.Row(equal_height=False, elem_id="columns"):
            with gr.Column(scale=6, min_width=320):
                self._photo_card()
                self._pose_card()
                self._prompt_card()
            with gr.Column(scale=5, min_width=320, elem_id="right"):
                with gr.Column(elem_classes="fs-card", elem_id="card-preview"):
                    gr.HTML(views.heading("Preview", "follows every change"))
                    self.preview = gr.HTML(views.PREVIEW_EMPTY, elem_id="preview")
                self._result_card()
                if self.shelf:
                    self._example_card()
        gr.HTML(views.foot(self.settings.about.get("license", "that of their source")))
        self._wire()

    # -------------------------------------------------------------- what there is

    def _photo_card(self) -> None:
        with gr.Column(elem_classes="fs-card", elem_id="card-photos"):
            gr.HTML(views.heading("Photos", "one to four of one person", 1))
            with gr.Row(elem_id="photo-row"):
                self.form["references"] = Photos(
                    format="png",
                    label="Photos of the person",
                    show_label=False,
                    container=False,
                    interactive=True,
                    sources=["upload", "clipboard"],
                    columns=2,
                    height=232,
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
        form = self.form
        with gr.Column(elem_classes="fs-card", elem_id="card-pose"):
            gr.HTML(views.heading("A head pose", "", 2))
            form["pose"] = gr.Radio(
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
            form["pose_photo"] = Photo(
                type="filepath",
                format="png",
                image_mode=None,
                label="Photo of the pose",
                placeholder="A photo of anybody in the wanted pose\n(who it is does not show)",
                sources=self.SOURCES,
                height=190,
                visible=False,
                elem_id="pose-photo",
            )
            with gr.Accordion("Turn the head, change the expression", open=False, elem_id="turn"):
                with gr.Row():
                    form["yaw"] = slider("yaw", 0, 1, "Turn (yaw)", "degrees; + to the picture’s right")
                    form["pitch"] = slider("pitch", 0, 1, "Nod (pitch)", "degrees; + looks down")
                with gr.Row():
                    form["roll"] = slider("roll", 0, 1, "Tilt (roll)", "degrees; + counter-clockwise")
                    form["head_size"] = slider("head_size", 1, 0.02, "Head size", "times that of the pose")
                with gr.Row():
                    form["expression"] = gr.Radio(
                        [("From the pose", "pose"), ("As in the photo", "reference"), ("Neutral", "neutral")],
                        value="pose",
                        label="Expression",
                        elem_classes="fs-pills",
                    )
                    form["expression_strength"] = slider("expression_strength", 1, 0.05, "Expression strength")

    def _prompt_card(self) -> None:
        form, settings = self.form, self.settings
        with gr.Column(elem_classes="fs-card", elem_id="card-prompt"):
            gr.HTML(views.heading("A prompt", "clothes, place, light; glasses or a hat", 3))
            form["prompt"] = gr.Textbox(
                "",
                label="Prompt",
                show_label=False,
                container=False,
                lines=2,
                max_lines=6,
                max_length=MAX_PROMPT,
                placeholder=f"For example: {self.shelf[0]['prompt'] if self.shelf else 'in a red jacket, by the sea'}",
                elem_id="prompt",
            )
            names = [style.name for style in styles(settings)]
            form["style"] = gr.Radio(
                [(name.capitalize(), name) for name in names],
                value=next(name for name in ("photo", NO_STYLE) if name in names),
                label="Style",
                show_label=False,
                container=False,
                elem_id="style",
                elem_classes="fs-pills",
            )
            if "hint" in settings.about:  # what a checkpoint wants its prompts to be like
                gr.HTML(views.notes([settings.about["hint"]]))
            form["consent"] = gr.Checkbox(
                label="The people in my photos are me, or they agreed to this.", elem_id="consent"
            )
            with gr.Row(elem_id="go"):
                form["preset"] = gr.Radio(
                    [(name.capitalize(), name) for name in PRESETS],
                    value="best",
                    label="Best or fast",
                    show_label=False,
                    container=False,
                    elem_id="preset",
                    elem_classes="fs-pills",
                )
                self.go = gr.Button("Generate", variant="primary", size="lg", elem_id="generate")
                self.stop = gr.Button("Stop", variant="secondary", size="lg", visible=False, elem_id="stop")
            with gr.Accordion("Advanced", open=False, elem_id="advanced"):
                form["negative_prompt"] = gr.Textbox(
                    "", label="Negative prompt", info="What should not be in the portrait.", max_length=MAX_PROMPT
                )
                with gr.Row():
                    form["steps"] = slider("steps", settings.steps, 1, "Steps")
                    form["guidance"] = slider("guidance", settings.guidance, 0.1, "Guidance")
                with gr.Row():
                    form["identity_strength"] = slider("identity_strength", 1, 0.05, "Identity strength")
                    form["landmark_strength"] = slider("landmark_strength", 1, 0.05, "Landmark strength")
                with gr.Row():
                    form["aspect"] = gr.Radio(list(ASPECTS), value="1:1", label="Aspect", elem_classes="fs-pills")
                    form["size"] = gr.Slider(
                        self._grid * round(settings.size / 2 / self._grid),
                        self._grid * int(1.2 * settings.size / self._grid),
                        value=settings.size,
                        step=self._grid,
                        label="Size",
                        info="pixels of a side; other aspects keep the area",
                    )
                with gr.Row():
                    form["count"] = gr.Slider(1, MAX_COUNT, value=1, step=1, label="Pictures")
                    form["scheduler"] = gr.Dropdown(
                        [("As the model was made", OWN_SCHEDULER), *SCHEDULERS], value=OWN_SCHEDULER, label="Sampler"
                    )
                with gr.Row():
                    form["seed"] = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED)
                    form["new_seed"] = gr.Checkbox(True, label="New seed each time", elem_id="new-seed")

    def _result_card(self) -> None:
        with gr.Column(elem_classes="fs-card", elem_id="result"):
            self.status = gr.HTML(visible=False, elem_id="status")
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
                buttons=["fullscreen"],
                elem_id="pictures",
            )
            self.summary = gr.HTML(visible=False, elem_id="summary")
            with gr.Row(elem_id="after"):
                self.download = gr.DownloadButton("Download PNG", visible=False, elem_id="download")
                self.again = gr.Button("Use this seed again", visible=False, elem_id="again")
            # Kept by the browser, unlike gr.State: the server may forget a session at any time.
            self.seeds, self.chosen = gr.JSON([], visible=False), gr.Number(0, visible=False, precision=0)

    def _example_card(self) -> None:
        with gr.Column(elem_classes="fs-card", elem_id="card-examples"):
            gr.HTML(views.heading("Examples", "rendered people, nobody’s photo"))
            self.gallery = gr.Gallery(
                [(row["reference"], f"{row['style']}, {row['prompt']}".capitalize()) for row in self.shelf],
                label="Examples",
                show_label=False,
                container=False,
                columns=3,
                allow_preview=False,
                interactive=False,
                buttons=[],
                elem_id="examples",
            )

    @property
    def _grid(self) -> int:
        """Sides are multiples of this: what the VAE asks for, and 64 where portraits are large."""
        return 64 if self.settings.size >= 512 else self.studio.pipeline.vae_scale_factor

    # -------------------------------------------------------------- what happens

    def _wire(self) -> None:
        form = self.form
        self.results = [
            self.status, self.stage, self.pictures, self.summary, self.download, self.again, self.seeds, self.chosen,
            self.go, self.stop, form["seed"],
        ]  # fmt: skip
        sitting = {name: form[name] for name in form if name in Sitting.__dataclass_fields__} | {
            name: form[name] for name in ("aspect", "size")
        }
        look: dict[str, Any] = {
            "fn": lambda *values: self.show_preview(dict(zip(sitting, values, strict=True))),
            "inputs": list(sitting.values()),
            "outputs": [self.seen, self.preview],
            "concurrency_id": "preview",
            "concurrency_limit": 2,
            **self.QUIET,
        }
        gr.on([component.change for component in sitting.values()], trigger_mode="always_last", **look)
        form["pose"].change(
            lambda pose: gr.Image(visible=pose == PHOTO_POSE), form["pose"], form["pose_photo"], queue=False,
            **self.QUIET,
        )  # fmt: skip
        photos = form["references"]
        room: dict[str, Any] = {
            "fn": lambda paths: gr.UploadButton(visible=bool(paths) and len(paths) < MAX_REFERENCES),
            "inputs": photos,
            "outputs": self.more,
            "queue": False,
            **self.QUIET,
        }
        photos.change(**room)
        # A gallery that is filled from here need not say that it changed: what follows from it is asked for.
        added = self.more.upload(
            lambda more, paths: [*(paths or []), *more], [self.more, photos], photos, **self.QUIET
        )  # fmt: skip
        added.then(**room)
        added.then(**look)
        form["preset"].input(self.show_preset, form["preset"], [form["steps"], form["guidance"]], **self.QUIET)
        running = [
            gr.on(
                [self.go.click, form["prompt"].submit],
                self.show_portrait,
                list(form.values()),
                self.results,
                validator=validate(list(form)),
                concurrency_id="portrait",
                concurrency_limit=MOST_AT_ONCE,
                **self.QUIET,
            )
        ]
        if self.shelf:
            example = self.gallery.select(
                self.show_example,
                outputs=[
                    *self.results,
                    *(form[name] for name in ("references", "pose", "prompt", "style")),
                    *(self.seen, self.preview),
                ],
                concurrency_id="portrait",
                concurrency_limit=MOST_AT_ONCE,
                **self.QUIET,
            )
            running.append(example)
            example.then(**room)
            example.then(**look)
        stopped = {"fn": self.show_stopped, "outputs": [self.status, self.stage, self.go, self.stop], "queue": False}
        # Twice, because a step that was on its way when Stop was pressed may arrive after the first.
        self.stop.click(**stopped, cancels=running, **self.QUIET).then(**stopped, **self.QUIET)
        # On a phone the result lies below the button: go there when the work begins, and only then.
        self.status.change(None, js=SCROLL_TO_RESULT, **self.QUIET)
        self.pictures.select(
            self.choose, [self.pictures, self.seeds], [self.chosen, self.download, self.again], queue=False,
            **self.QUIET,
        )  # fmt: skip
        self.again.click(
            self.use_again,
            [self.seeds, self.chosen],
            [form["seed"], form["new_seed"], self.status],
            queue=False,
            **self.QUIET,
        )

    def read(self, path: str, role: str) -> Reading:
        """The face of an upload, from memory where this visitor's page has asked before."""
        if hit := self.faces.get(path):
            return hit["reading"]
        reading = self.studio.read(path, role)
        self.faces.set(path, reading=reading)
        return reading

    def _values(self, form: dict[str, Any]) -> dict[str, Any]:
        """What the form says, as fields of a Sitting or an Order."""
        values = dict(form)
        width, height = frame(values.pop("aspect"), values.pop("size"), self._grid)
        return values | {"references": tuple(values["references"] or ()), "width": width, "height": height}

    def show_preview(self, form: dict[str, Any]) -> tuple[str, str]:
        """How each photo was read, and the landmarks."""
        values = self._values(form)
        paths = values["references"]
        if not paths:
            return views.SEEN_EMPTY, views.PREVIEW_EMPTY
        readings: list[Reading | str] = []
        for number, path in enumerate(paths[:5]):  # a fifth is one too many, which is said below
            try:
                readings.append(self.read(path, role(number, len(paths))))
            except Exception as error:
                readings.append(words(error))
        seen = views.seen(readings[:4])
        if any(isinstance(reading, str) for reading in readings[:4]):
            return seen, views.PREVIEW_BLOCKED
        if values["pose"] == PHOTO_POSE and values["pose_photo"] is None:
            return seen, views.PREVIEW_WAITS
        try:
            look = self.studio.look(Sitting(**values), self.read)
            return seen, views.preview(look, values["pose"], self.templates)
        except Exception as error:
            return seen, views.note(words(error), error=True)

    def show_preset(self, name: str) -> tuple[int, float]:
        options = preset(name, self.settings)
        return options["num_inference_steps"], options["guidance_scale"]

    def show_portrait(self, *values: Any) -> Generator[dict[Any, Any]]:
        """The work from the button to the last picture, as updates of the result card."""
        yield {**self._say(views.working("Reading the photos…")), **self._busy(True)}
        try:
            form = self._values(dict(zip(self.form, values, strict=True)))
            if form.pop("new_seed") or form["seed"] is None:
                form["seed"] = -1
            for update, _ in self._made(Order(**form)):
                yield update
        except Exception as error:
            yield self._failed(error)

    def show_example(self, event: gr.SelectData) -> Generator[dict[Any, Any]]:
        """Fills the form with an example and shows its portrait, which is made for the first visitor who asks."""
        row, form = self.shelf[event.index], self.form
        filled = {
            # As pixels: Gradio gives out files of the working directory only, wherever the page was started.
            form["references"]: [Image.open(row["reference"])],
            **{form[name]: row[name] for name in ("pose", "prompt", "style")},
        }
        if event.index in self.shown:
            looks, png, report = self.shown[event.index]
            with closing(self.studio.keep(png, report)) as kept:
                for portrait in kept:
                    yield filled | looks | self._done([portrait.path], portrait.report, last=True)
            return
        yield {**filled, **self._say(views.working("Reading the photo…")), **self._busy(True)}
        order = Order(
            references=(row["reference"],), pose=row["pose"], prompt=row["prompt"], style=row["style"],
            consent=True, seed=EXAMPLE_SEED,
        )  # fmt: skip
        looks = {}
        try:
            for update, made in self._made(order):
                if isinstance(made, Look):
                    looks[self.seen] = views.seen(made.references)
                    looks[self.preview] = views.preview(made, row["pose"], self.templates)
                    update |= looks
                elif isinstance(made, Portrait):
                    self.shown[event.index] = looks, Path(made.path).read_bytes(), made.report
                yield update
        except Exception as error:
            yield self._failed(error)

    def show_stopped(self) -> dict[Any, Any]:
        return {**self._say(views.note("Stopped.")), **self._busy(False), self.stage: views.STAGE_EMPTY}

    def _made(self, order: Order) -> Generator[tuple[dict[Any, Any], Look | Waiting | Step | Portrait]]:
        """What happens while an order is made, each with the updates of the page that show it."""
        paths: list[str] = []
        began = time.perf_counter()
        with closing(self.studio.make(order, self.read)) as events:
            for event in events:
                if isinstance(event, Step):  # the clock runs from before the first step
                    a_step = (time.perf_counter() - began) / event.done
                    yield self._say(views.steps(event.done, event.of, event.number, order.count, a_step)), event
                    continue
                if isinstance(event, Look):
                    drawing = {self.stage: views.stage_working(event.result.drawing)}
                    yield self._say(views.working("Starting…")) | drawing, event
                elif isinstance(event, Waiting):
                    yield self._say(views.waiting(event.ahead)), event
                else:
                    paths.append(event.path)
                    yield self._done(paths, event.report, last=len(paths) == order.count), event
                began = time.perf_counter()

    def _say(self, text: str) -> dict[Any, Any]:
        return {self.status: gr.HTML(text, visible=bool(text))}

    def _busy(self, is_busy: bool) -> dict[Any, Any]:
        return {self.go: gr.Button(visible=not is_busy), self.stop: gr.Button(visible=is_busy)}

    def _failed(self, error: Exception) -> dict[Any, Any]:
        note = views.note(words(error), error=True)
        return {**self._say(note), **self._busy(False), self.stage: views.STAGE_FAILED}

    def _done(self, paths: list[str], report: dict[str, Any], *, last: bool) -> dict[Any, Any]:
        seeds = [made["seed"] for made in report["pictures"]]
        update = {
            self.stage: gr.HTML(views.STAGE_EMPTY, visible=False),
            # The captions are not shown: they are the alternative texts.
            self.pictures: gr.Gallery(
                [(path, f"Portrait with seed {seed}") for path, seed in zip(paths, seeds, strict=True)],
                columns=1 if len(paths) == 1 else 2,
                visible=True,
            ),
            self.summary: gr.HTML(views.summary(report), visible=True),
            self.download: gr.DownloadButton(value=paths[0], visible=True),
            self.again: gr.Button(f"Use seed {seeds[0]} again", visible=True),
            self.seeds: seeds,
            self.chosen: 0,
            self.form["seed"]: seeds[0],
        }
        return update | ({**self._say(""), **self._busy(False)} if last else {})

    def choose(self, event: gr.SelectData, pictures: list[Any], seeds: list[int]) -> tuple[int, Any, Any]:
        """The picture that was clicked is the one to download and the one whose seed is used again."""
        return (
            event.index,
            gr.DownloadButton(value=pictures[event.index][0]),
            gr.Button(f"Use seed {seeds[event.index]} again"),
        )

    @staticmethod
    def use_again(seeds: list[int], chosen: int) -> tuple[int, bool, Any]:
        """The chosen picture's seed is put into the form, and a note says so: the form's own fields are folded away."""
        kept = f"The next portrait uses seed {seeds[chosen]} until “New seed each time” under Advanced is ticked again."
        return seeds[chosen], False, gr.HTML(views.note(kept), visible=True)


def add_endpoints(studio: Studio) -> None:
    """/preview and /generate, on components that are never shown: the page can change and they do not."""
    # Photos are single inputs and no list: agents can hand over files only so.
    photos = ("reference", "reference_2", "reference_3", "reference_4")

    def fields(kind: Any, given: dict[str, Any]) -> dict[str, Any]:
        """Arguments of an endpoint → those of a Sitting or an Order."""
        paths = tuple(given[name] for name in photos if given[name] is not None)
        return {name: given[name] for name in kind.__dataclass_fields__ if name in given} | {"references": paths}

    def preview(
        reference: str | None = None,
        pose: str = OWN_POSE,
        pose_photo: str | None = None,
        reference_2: str | None = None,
        reference_3: str | None = None,
        reference_4: str | None = None,
        expression: str = "pose",
        expression_strength: float = 1.0,
        yaw: float = 0.0,
        pitch: float = 0.0,
        roll: float = 0.0,
        head_size: float = 1.0,
        width: int | None = None,
        height: int | None = None,
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """The 72 landmarks that a portrait would follow. Takes a fraction of a second.

        Parameters:
            reference: A photo of the person: JPEG, PNG or WebP, at most 10 MB and 25 megapixels.
            pose: "as in the photo", "another photo", or a template's name: "front", "quarter-left" and so on.
            pose_photo: A photo of anybody in the wanted pose; used where pose is "another photo".
            reference_2: Another photo of the same person; more photos help the likeness.
            reference_3: A third photo of the same person.
            reference_4: A fourth photo of the same person.
            expression: Whose expression the face shows: "pose", "reference" or "neutral".
            expression_strength: Weight of that expression, 0 to 2.
            yaw: Degrees by which the pose is turned further, -45 to 45; above 0 to the picture's right.
            pitch: Degrees by which it is nodded further, -30 to 30; above 0 looks down.
            roll: Degrees by which it is tilted further, -45 to 45; above 0 counter-clockwise.
            head_size: Times the head size of the pose, 0.6 to 1.6.
            width: Pixels of the portrait; the model's own where it is null.
            height: Pixels of the portrait; the model's own where it is null.
        Returns:
            picture: The landmarks as the model sees them, a PNG file.
            report: The landmarks in pixels of that picture; each face's box in its photo; the faces seen; notes.
        """
        given = dict(locals())
        try:
            look = studio.look(Sitting(**fields(Sitting, given)))
        except Exception as error:
            raise gr.Error(words(error), print_exception=False) from None
        drawn, faces = look.result.drawing, [reading.face for reading in look.references]
        return drawn, {
            "width": drawn.shape[1],
            "height": drawn.shape[0],
            "landmarks": np.round(look.result.landmarks, 2).tolist(),
            "face_boxes": [np.round(face.box, 1).tolist() for face in faces],
            "faces_in_photos": [face.count for face in faces],
            "notes": list(look.result.notes),
        }

    def generate(
        reference: str | None = None,
        prompt: str = "",
        consent: bool = False,
        pose: str = OWN_POSE,
        pose_photo: str | None = None,
        reference_2: str | None = None,
        reference_3: str | None = None,
        reference_4: str | None = None,
        style: str = NO_STYLE,
        negative_prompt: str = "",
        preset: str = "best",
        steps: int | None = None,
        guidance: float | None = None,
        identity_strength: float = 1.0,
        landmark_strength: float = 1.0,
        expression: str = "pose",
        expression_strength: float = 1.0,
        yaw: float = 0.0,
        pitch: float = 0.0,
        roll: float = 0.0,
        head_size: float = 1.0,
        width: int | None = None,
        height: int | None = None,
        count: int = 1,
        scheduler: str = OWN_SCHEDULER,
        seed: int = -1,
    ) -> Generator[tuple[list[str], dict[str, Any]]]:
        """Portraits of the person in the photos. Answers once a step; the last answer holds all portraits.

        Parameters:
            reference: A photo of the person: JPEG, PNG or WebP, at most 10 MB and 25 megapixels.
            prompt: What the portrait shows: clothes, place, light, glasses or a hat.
            consent: Must be true: the people in the photos are you, or they agreed to this.
            pose: "as in the photo", "another photo", or a template's name: "front", "quarter-left" and so on.
            pose_photo: A photo of anybody in the wanted pose; used where pose is "another photo".
            reference_2: Another photo of the same person; more photos help the likeness.
            reference_3: A third photo of the same person.
            reference_4: A fourth photo of the same person.
            style: A style's name, as on the page: "photo", "pencil sketch" and so on; "no style" adds no words.
            negative_prompt: What should not be in the portrait.
            preset: "best" or "fast".
            steps: Denoising steps, 1 to 50; the preset's where it is null.
            guidance: How strictly the prompt is followed (classifier-free guidance), 1 to 10; the preset's where null.
            identity_strength: How strongly the face is that of the photos, 0 to 2; 1 as trained.
            landmark_strength: How strongly the landmarks are followed, 0 to 2; 1 as trained.
            expression: Whose expression the face shows: "pose", "reference" or "neutral".
            expression_strength: Weight of that expression, 0 to 2.
            yaw: Degrees by which the pose is turned further, -45 to 45; above 0 to the picture's right.
            pitch: Degrees by which it is nodded further, -30 to 30; above 0 looks down.
            roll: Degrees by which it is tilted further, -45 to 45; above 0 counter-clockwise.
            head_size: Times the head size of the pose, 0.6 to 1.6.
            width: Pixels of the portrait; the model's own where it is null.
            height: Pixels of the portrait; the model's own where it is null.
            count: How many portraits, 1 to 4, with seeds that count up.
            scheduler: A sampler's name, as on the page: "DPM++ SDE", "Euler" and so on, or "the model's own".
            seed: The same seed and inputs give the same portrait; -1 takes a new one.
        Returns:
            pictures: The portraits, PNG files that say how they were made.
            report: Seed, identity score, landmarks, settings, seconds, licence; before that, {"step": k, "of": n}.
        """
        given = dict(locals())
        paths: list[str] = []
        try:
            order = Order(**fields(Order, given))
            with closing(studio.make(order)) as events:
                for event in events:
                    if isinstance(event, Step):
                        yield paths, {"step": event.done, "of": event.of, "picture": event.number + 1}
                    elif isinstance(event, Waiting):
                        yield paths, {"waiting": event.ahead}
                    elif isinstance(event, Portrait):
                        paths = [*paths, event.path]
                        yield paths, event.report
        except Exception as error:
            raise gr.Error(words(error), print_exception=False) from None

    # Plain boxes: what is out of range is refused by `Order.check`, in a sentence that says what to do.
    texts = {"pose": OWN_POSE, "expression": "pose", "style": NO_STYLE, "negative_prompt": "", "preset": "best"}
    texts |= {"prompt": "", "scheduler": OWN_SCHEDULER}
    numbers = dict.fromkeys(("yaw", "pitch", "roll"), 0) | dict.fromkeys(("steps", "guidance", "width", "height"))
    numbers |= dict.fromkeys(("expression_strength", "head_size", "identity_strength", "landmark_strength", "count"), 1)
    with gr.Row(visible=False):
        boxes: dict[str, Any] = {
            **{name: Photo(type="filepath", image_mode=None, label=name) for name in (*photos, "pose_photo")},
            "consent": raw(gr.Checkbox(False, label="consent")),
            "seed": raw(gr.Number(-1, precision=0, label="seed")),
            **{name: raw(gr.Textbox(value, label=name)) for name, value in texts.items()},
            **{
                name: raw(gr.Number(value, precision=0 if LIMITS.get(name, (0, 0, True))[2] else None, label=name))
                for name, value in numbers.items()
            },
        }
        picture = gr.Image(type="filepath", format="png", label="picture")
        pictures = gr.File(file_count="multiple", label="pictures")
        report = gr.JSON(label="report")
        trigger = gr.Button()
    line: dict[str, Any] = {"concurrency_id": "portrait", "concurrency_limit": MOST_AT_ONCE}
    for function, outputs, options in (
        (preview, [picture, report], {"concurrency_id": "preview"}),
        (generate, [pictures, report], line | {"validator": validate(list(generate.__annotations__)[:-1])}),
    ):
        names = list(function.__annotations__)[:-1]
        trigger.click(function, [boxes[name] for name in names], outputs, api_name=function.__name__, **options)


def validate(names: list[str]) -> Callable[..., list[dict[str, Any]]]:
    """Before the queue: a missing photo (the first of the names) or consent is said at its field. `Order.check` says
    it once more."""

    def check(*values: Any) -> list[dict[str, Any]]:
        given = dict(zip(names, values, strict=True))
        verdicts = {
            names[0]: gr.validate(bool(values[0]), NO_REFERENCE),
            "consent": gr.validate(given["consent"] is True, NO_CONSENT),
        }
        return [verdicts.get(name, gr.validate(True, "")) for name in names]

    return check


def words(error: Exception) -> str:
    """What a visitor may read of an error; Gradio's own are meant for visitors (a GPU quota that is used up), and may
    hold the HTML of a toast."""
    if not isinstance(error, gr.Error):
        return sentence(error)
    return html.unescape(re.sub(r"<[^>]*>", "", str(error.message))).strip()


def slider(name: str, value: float, step: float, label: str, info: str | None = None) -> gr.Slider:
    low, high, _ = LIMITS[name]
    return gr.Slider(low, high, value=value, step=step, label=label, info=info)


def raw(component: Any) -> Any:
    """The component hands over what was sent, unread. What its own preprocessing raises for nonsense reaches
    nobody as a sentence; `Order.check` says what is wrong."""
    component.preprocess = lambda payload: payload
    return component


# Classes and no patched components: Gradio makes a component anew for each session that it updates.


async def without_addresses(self: Any, path: str | Path | None) -> str | None:
    """Gradio would download what an upload's path names if that is a URL."""
    if path is not None and is_http_url_like(str(path)):
        raise gr.Error(NO_URLS, print_exception=False)
    return await super(type(self), self).async_move_resource_to_block_cache(path)


class Photo(gr.Image):
    """An input for one picture that hands over the upload's path, opens nothing, and fetches no address:
    `facesnap.images.open_image` reads the header first and says what is wrong."""

    is_template = True  # looks like its parent
    async_move_resource_to_block_cache = without_addresses

    def preprocess(self, payload: Any) -> Any:
        return payload.path if payload else None


class Photos(gr.Gallery):
    """The same for several pictures: a list of paths."""

    is_template = True
    async_move_resource_to_block_cache = without_addresses

    def preprocess(self, payload: Any) -> Any:
        if payload is None:
            return None
        return [(getattr(item, "image", None) or item.video).path for item in payload.root]


class MorePhotos(gr.UploadButton):
    """The same as a button."""

    is_template = True
    async_move_resource_to_block_cache = without_addresses

    def preprocess(self, payload: Any) -> Any:
        items = payload.root if hasattr(payload, "root") else payload or []
        return [item.path for item in (items if isinstance(items, list) else [items])]


def examples(folder: Path) -> list[dict[str, str]]:
    """examples.json lists {"reference": file, "pose": one of POSES, "prompt", "style"}, all rendered people."""
    index = folder / "examples.json"
    if not index.exists():
        return []
    rows = json.loads(index.read_text(encoding="utf-8"))
    return [{**row, "reference": str(folder / row["reference"])} for row in rows]


def launch(demo: gr.Blocks, **options: Any) -> Any:
    """Limits and looks. Nothing is kept, no server text is shown, nothing is asked of the network."""
    return demo.queue(api_open=False, max_size=40).launch(
        theme=THEME,
        css=(ROOT / "page" / "page.css").read_text(encoding="utf-8") + views.pose_tiles(ASSETS / "templates"),
        max_file_size="10mb",
        show_error=False,
        state_session_capacity=MOST_SESSIONS,
        run_history=False,
        footer_links=["api"],
        ssr_mode=False,
        mcp_server=importlib.util.find_spec("mcp") is not None,
        **options,
    )


def load(model: str, lora: str | None = None) -> Any:
    """The checkpoint where it will run, in the memory mode that FACESNAP_MEMORY names or that fits.

    Who serves a model by its name wants its files, so they are fetched unasked.
    """
    from facesnap import checkpoints

    base = os.environ.get("FACESNAP_BASE")
    pipeline = checkpoints.load(model, base=base, lora=lora or os.environ.get("FACESNAP_LORA"), yes=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def one_heap() -> None:
    """Two heaps on Linux: glibc gives each new thread its own, and what a portrait's thread leaves in it stays."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-8, 2)  # M_ARENA_MAX


def main(arguments: list[str] | None = None) -> None:
    """Serves the checkpoint that FACESNAP_MODEL names (a folder or a Hub id), else the mini."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--lora", help="a LoRA for the base model: a folder, a file or a Hub id")
    given = parser.parse_args(arguments)
    one_heap()
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    model = os.environ.get("FACESNAP_MODEL", str(MINI))
    try:
        pipeline = load(model, given.lora)
        allowed = safety.checker(is_mini=model in (str(MINI), "mini"))
    except InputError as error:
        sys.exit(f"{error}\nThe environment variable FACESNAP_MODEL names the checkpoint to serve.")
    # Ended by its host as by Ctrl-C: Gradio then deletes the visitors' files on its way out.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    launch(build(pipeline, allowed=allowed))


if __name__ == "__main__":
    main()

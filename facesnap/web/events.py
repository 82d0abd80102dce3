"""What happens on the page: every change asks for a preview, the button for portraits, an example for all of it.

Each handler answers with updates of components; `views` says how they look. All go to the same `studio.Studio`.
"""

import time
from collections.abc import Generator
from contextlib import closing
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from facesnap.errors import InputError
from facesnap.preview import MAX_REFERENCES
from facesnap.web import views
from facesnap.web.denoise import Step
from facesnap.web.door import MALFORMED, for_visitors, visitor_of
from facesnap.web.endpoints import MOST_AT_ONCE
from facesnap.web.form import Form
from facesnap.web.line import NOBODY_IN_PARTICULAR, Listeners, Visitor
from facesnap.web.request import NO_REFERENCE, PHOTO_POSE, SPECS, PortraitRequest, frame, preset
from facesnap.web.studio import Look, Portrait, Reading, Studio, Waiting, role
from facesnap.web.words import unknown_words

QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
AT_ONCE: dict[str, Any] = {"queue": False, **QUIET}  # needs no place in Gradio's queue
EXAMPLE_SEED = 7
NO_CONSENT = "Please tick the box first: it says that the people in the photos agree."
Updates = dict[Any, Any]


class Events:
    """The page's handlers over its form, and when each is called."""

    def __init__(self, form: Form, studio: Studio, listeners: Listeners) -> None:
        self.form, self.studio, self.listeners = form, studio, listeners
        # Sliders ask for a preview many times a second: what a visitor's photos say is remembered until they leave.
        self.faces = gr.Cache(max_size=64, per_session=True)
        # What the examples show, once made: updates of the page, the PNG file's bytes and the report.
        self.shown: dict[int, tuple[Updates, bytes, dict[str, Any]]] = {}
        self.defaults = {name: box.value for name, box in form.inputs.items() if name not in ("references", "new_seed")}
        self.results = [
            form.status, form.stage, form.pictures, form.summary, form.download, form.again, form.seeds, form.chosen,
            form.made, form.go, form.stop, form.inputs["seed"],
        ]  # fmt: skip
        self._wire_preview()
        self._wire_portraits()
        self._wire_session()

    # -------------------------------------------------------------- when

    def _wire_preview(self) -> None:
        form, inputs = self.form, self.form.inputs
        self.previewed = [
            name for name in inputs
            if name in ("references", "aspect", "size") or name.startswith("expressions.")
            or (name in SPECS and SPECS[name].preview)
        ]  # fmt: skip
        boxes = [inputs[name] for name in self.previewed]
        look: dict[str, Any] = {
            "fn": self.show_preview,
            "inputs": boxes,
            "outputs": [form.seen, form.preview],
            "concurrency_id": "preview",
            "concurrency_limit": MOST_AT_ONCE,
            **QUIET,
        }
        gr.on([box.change for box in boxes], trigger_mode="always_last", **look)
        pose, photos = inputs["pose"], inputs["references"]
        pose.change(lambda pose: gr.Image(visible=pose == PHOTO_POSE), pose, inputs["pose_photo"], **AT_ONCE)
        room: dict[str, Any] = {
            "fn": self.show_room,
            "inputs": [photos, inputs["consent"]],
            "outputs": [form.more, inputs["consent"]],
            **AT_ONCE,
        }
        photos.change(**room)
        # A gallery that is filled from here need not say that it changed: what follows from it is asked for.
        added = form.more.upload(lambda more, paths: [*(paths or []), *more], [form.more, photos], photos, **QUIET)
        added.then(**room)
        added.then(**look)
        self.look, self.room = look, room
        prompt = inputs["prompt"]
        prompt.change(self.show_unknown, prompt, form.unknown, trigger_mode="always_last", **AT_ONCE)

    def _wire_portraits(self) -> None:
        form, inputs = self.form, self.form.inputs
        inputs["preset"].input(self.show_preset, inputs["preset"], [inputs["steps"], inputs["guidance"]], **QUIET)
        line: dict[str, Any] = {"concurrency_id": "generate", "concurrency_limit": MOST_AT_ONCE, **QUIET}
        asked = [form.go.click, inputs["prompt"].submit]
        running = [gr.on(asked, self.show_portrait, list(inputs.values()), self.results, **line)]
        if form.shelf:
            filled = [inputs[name] for name in ("references", "consent", *self.defaults) if name != "seed"]
            outputs = [*self.results, *dict.fromkeys(filled), form.seen, form.preview]
            running.append(form.gallery.select(self.show_example, outputs=outputs, **line))
            running[1].then(**self.room)
            running[1].then(**self.look)
        for event in running:  # whatever came of it, the browser keeps the portraits that there are
            event.then(
                None, [form.pictures, form.made, form.session, form.kept], [form.session, form.kept],
                js="(...given) => window.facesnap.keep(...given)", **AT_ONCE,
            )  # fmt: skip
        stopped = {"fn": self.show_stopped, "outputs": [form.status, form.stage, form.go, form.stop], "queue": False}
        # Twice, because a step that was on its way when Stop was pressed may arrive after the first.
        form.stop.click(**stopped, cancels=running, **QUIET).then(**stopped, **QUIET)
        form.status.change(None, js="() => window.facesnap.began()", **QUIET)
        form.pictures.select(
            self.choose, [form.pictures, form.seeds], [form.chosen, form.download, form.again], **AT_ONCE
        )
        form.again.click(
            self.use_again, [form.seeds, form.chosen], [inputs["seed"], inputs["new_seed"], form.status], **AT_ONCE
        )

    def _wire_session(self) -> None:
        form = self.form
        form.session.select(self.choose_kept, None, [form.kept_chosen, form.back], **AT_ONCE)
        self.restored = [name for name in self.form.inputs if name not in ("references", "pose_photo", "consent")]
        form.back.click(
            self.restore, [form.kept, form.kept_chosen],
            [*(form.inputs[name] for name in self.restored), form.status], **AT_ONCE,
        )  # fmt: skip

    # -------------------------------------------------------------- previews

    def read(self, path: str, role: str, visitor: Visitor) -> Reading:
        """The face of an upload, from memory where this visitor's page has asked before."""
        if hit := self.faces.get(path):
            return hit["reading"]
        reading = self.studio.read(path, role, visitor)
        self.faces.set(path, reading=reading)
        return reading

    def heard(self, request: gr.Request | None) -> Visitor:
        if request is None:
            return NOBODY_IN_PARTICULAR
        visitor = visitor_of(request)
        self.listeners.await_one(visitor.session)
        return visitor

    def values(self, form: dict[str, Any]) -> tuple[list[str], dict[str, Any]]:
        """What the form says, as photos and the other fields of a `PortraitRequest`."""
        values = {name: value for name, value in form.items() if not name.startswith("expressions.")}
        width, height = frame(values.pop("aspect"), values.pop("size"), self.form.grid)
        weights = {name: form[f"expressions.{name}"] for name in self.form.expressions}
        values |= {"width": width, "height": height, "expressions": {name: w for name, w in weights.items() if w}}
        if values.get("pose") != PHOTO_POSE:  # the photo stays in its hidden box
            values["pose_photo"] = None
        return list(values.pop("references") or ()), values

    def show_preview(self, request: gr.Request, *given: Any) -> tuple[str, str]:
        """How each photo was read, and the landmarks."""
        paths, values = self.values(dict(zip(self.previewed, given, strict=True)))
        if not paths:
            return views.SEEN_EMPTY, views.PREVIEW_EMPTY
        readings: list[Reading | str] = []
        try:
            visitor = self.heard(request)
        except Exception as error:
            return views.SEEN_EMPTY, views.note(for_visitors(error), error=True)
        for number, path in enumerate(paths[:MAX_REFERENCES]):
            try:
                readings.append(self.read(path, role(number, len(paths)), visitor))
            except Exception as error:
                readings.append(for_visitors(error))
        seen = views.seen(readings)
        if any(isinstance(reading, str) for reading in readings):
            return seen, views.PREVIEW_BLOCKED
        if values["pose"] == PHOTO_POSE and values["pose_photo"] is None:
            return seen, views.PREVIEW_WAITS
        try:
            asked = PortraitRequest.of_photos(paths, **values)
            look = self.studio.look(asked, lambda path, role: self.read(path, role, visitor))
            return seen, views.preview(look, asked.pose)
        except Exception as error:
            return seen, views.note(for_visitors(error), error=True)

    def show_room(self, paths: list[str] | None, consent: bool) -> tuple[Any, Any]:
        """Whether another photo is offered; and who takes the last one out may put another person in."""
        return gr.UploadButton(visible=0 < len(paths or ()) < MAX_REFERENCES), consent and bool(paths)

    def show_unknown(self, prompt: str) -> Any:
        notes = unknown_words(prompt or "", self.studio.pipeline.tokenizer)
        return gr.HTML(views.notes(notes), visible=bool(notes))

    def show_preset(self, name: str) -> tuple[int, float]:
        options = preset(name, self.form.settings)
        return options["num_inference_steps"], options["guidance_scale"]

    # -------------------------------------------------------------- portraits

    def show_portrait(self, request: gr.Request, *given: Any) -> Generator[Updates]:
        """The work from the button to the last picture, as updates of the result card."""
        form = dict(zip(self.form.inputs, given, strict=True))
        if not form["references"] or form["consent"] is not True:  # said at once, and shown at its field by page.css
            wanted = ("consent", NO_CONSENT) if form["references"] else ("photo", NO_REFERENCE)
            yield self._say(views.wanted(*wanted))
            return
        yield {**self._say(views.working("Reading the photos…")), **self._busy(True), self.form.made: []}
        try:
            visitor = self.heard(request)
            paths, values = self.values(form)
            if values.pop("new_seed") or values["seed"] is None:
                values["seed"] = -1
            for update, _ in self._made(PortraitRequest.of_photos(paths, **values), form, visitor):
                yield update
        except Exception as error:
            yield self._failed(error)

    def show_example(self, event: gr.SelectData, request: gr.Request) -> Generator[Updates]:
        """Fills the form with an example, all else as at first, and shows its portrait, which is made for the first
        visitor who asks."""
        row, inputs = _one_of(self.form.shelf, event.index), self.form.inputs
        form = self.defaults | {name: row[name] for name in ("pose", "prompt", "style")} | {"consent": False}
        # As pixels: Gradio gives out files of the working directory only, wherever the page was started.
        filled = {inputs["references"]: [Image.open(row["reference"])]}
        filled |= {inputs[name]: value for name, value in form.items() if name != "seed"}
        if event.index in self.shown:
            looks, png, report = self.shown[event.index]
            with closing(self.studio.keep(png, report)) as kept:
                for portrait in kept:
                    yield filled | self._done([portrait.path], portrait.report, form, "", last=True) | looks
            return
        yield {**filled, **self._say(views.working("Reading the photo…")), **self._busy(True), self.form.made: []}
        asked = PortraitRequest.of_photos(
            (row["reference"],), pose=row["pose"], prompt=row["prompt"], style=row["style"], consent=True,
            seed=EXAMPLE_SEED,
        )  # fmt: skip
        looks = {}
        try:
            for update, made in self._made(asked, form, self.heard(request)):
                if isinstance(made, Look):
                    looks[self.form.seen] = views.seen(made.references)
                    looks[self.form.preview] = views.preview(made, row["pose"])
                    update |= looks
                elif isinstance(made, Portrait):
                    looks[self.form.summary] = update[self.form.summary]
                    self.shown[event.index] = looks, Path(made.path).read_bytes(), made.report
                yield update
        except Exception as error:
            yield self._failed(error)

    def _made(
        self, asked: PortraitRequest, form: dict[str, Any], visitor: Visitor
    ) -> Generator[tuple[Updates, Look | Waiting | Step | Portrait]]:
        """What happens while portraits are made, each with the updates of the page that show it."""
        paths: list[str] = []
        comparison = ""
        began = time.perf_counter()
        with closing(self.studio.make(asked, lambda path, role: self.read(path, role, visitor), visitor)) as events:
            for event in events:
                if isinstance(event, Step):  # the clock runs from before the first step
                    a_step = (time.perf_counter() - began) / event.done
                    yield self._say(views.steps(event.done, event.of, event.number, asked.count, a_step)), event
                    continue
                if isinstance(event, Look):
                    look = event
                    drawing = {self.form.stage: views.stage_working(event.result.drawing)}
                    yield self._say(views.working("Starting…")) | drawing, event
                elif isinstance(event, Waiting):
                    yield self._say(views.waiting(event.ahead)), event
                else:
                    paths.append(event.path)
                    comparison = comparison or views.compared(
                        look.references[0].face.crop, np.asarray(Image.open(event.path)), look.result.landmarks
                    )
                    last = len(paths) == asked.count
                    yield self._done(paths, event.report, form, comparison, last=last), event
                began = time.perf_counter()

    def show_stopped(self) -> Updates:
        return {**self._say(views.note("Stopped.")), **self._busy(False), self.form.stage: views.STAGE_EMPTY}

    def _say(self, text: str) -> Updates:
        return {self.form.status: gr.HTML(text, visible=bool(text))}

    def _busy(self, is_busy: bool) -> Updates:
        return {self.form.go: gr.Button(visible=not is_busy), self.form.stop: gr.Button(visible=is_busy)}

    def _failed(self, error: Exception) -> Updates:
        note = views.note(for_visitors(error), error=True)
        return {**self._say(note), **self._busy(False), self.form.stage: views.STAGE_FAILED}

    def _done(
        self, paths: list[str], report: dict[str, Any], form: dict[str, Any], comparison: str, *, last: bool
    ) -> Updates:
        page = self.form
        seeds = [made["seed"] for made in report["pictures"]]
        settings = {name: value for name, value in form.items() if name in self.restored}
        update = {
            page.stage: gr.HTML(views.STAGE_EMPTY, visible=False),
            # The captions are not shown: they are the alternative texts.
            page.pictures: gr.Gallery(
                [(path, f"Portrait with seed {seed}") for path, seed in zip(paths, seeds, strict=True)],
                columns=1 if len(paths) == 1 else 2,
                visible=True,
            ),
            page.summary: gr.HTML(views.summary(report, comparison), visible=True),
            page.download: gr.DownloadButton(value=paths[0], visible=True),
            page.again: gr.Button(f"Use seed {seeds[0]} again", visible=True),
            page.seeds: seeds,
            page.made: [settings | {"seed": seed, "new_seed": False, "count": 1} for seed in seeds],
            page.chosen: 0,
            page.inputs["seed"]: seeds[0],
        }
        return update | ({**self._say(views.finished(report)), **self._busy(False)} if last else {})

    # -------------------------------------------------------------- afterwards

    def choose(self, event: gr.SelectData, pictures: list[Any], seeds: list[int]) -> tuple[int, Any, Any]:
        """The picture that was clicked is the one to download and the one whose seed is used again."""
        path, seed = _one_of(pictures, event.index)[0], _one_of(seeds, event.index)
        return event.index, gr.DownloadButton(value=path), gr.Button(f"Use seed {seed} again")

    @staticmethod
    def use_again(seeds: list[int], chosen: int) -> tuple[int, bool, Any]:
        """The chosen picture's seed is put into the form, and a note says so: the form's own fields are folded away."""
        seed = _one_of(seeds, chosen)
        kept = f"The next portrait uses seed {seed} until “New seed each time” under Advanced is ticked again."
        return seed, False, gr.HTML(views.note(kept), visible=True)

    @staticmethod
    def choose_kept(event: gr.SelectData) -> tuple[int, Any]:
        return event.index, gr.Button(visible=True)

    def restore(self, kept: list[dict[str, Any]], chosen: int) -> list[Any]:
        """The settings of an earlier portrait are put into the form, its seed among them; the photos stay."""
        settings = _one_of(kept, chosen)
        if not isinstance(settings, dict) or not settings.keys() >= {*self.restored}:
            raise InputError(MALFORMED)
        note = views.note("The form is as it was for that portrait, with its seed; the photos are those you have now.")
        return [*(settings.get(name, self.defaults.get(name)) for name in self.restored), gr.HTML(note, visible=True)]


def _one_of(items: Any, index: Any) -> Any:
    """What was chosen; InputError where there is no such thing, which no page would send."""
    if not isinstance(items, list | tuple) or not isinstance(index, int | float) or not 0 <= index < len(items):
        raise InputError(MALFORMED)
    return items[int(index)]

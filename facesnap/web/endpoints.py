"""/preview and /generate: what programs and agents call. The page may change and these do not.

Signatures, defaults and texts are made from the fields of `PortraitRequest`. The inputs take whatever is sent and
hand it over unread: what is wrong with it is said by the request itself, in a sentence.
"""

import inspect
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from typing import Any

import gradio as gr
import numpy as np
from gradio.data_classes import FileData

from facesnap.web import uploads
from facesnap.web.denoise import Step
from facesnap.web.door import for_visitors, visitor_of
from facesnap.web.line import Listeners, Visitor
from facesnap.web.request import DEFAULTS, PREVIEW, SPECS, PortraitRequest, meaning
from facesnap.web.studio import Portrait, Studio, Waiting

PARAMETERS: dict[str, tuple[str, ...]] = {"preview": PREVIEW, "generate": tuple(SPECS)}
TYPES: dict[str, type] = {"text": str, "choice": str, "number": float, "switch": bool, "weights": dict}
MOST_AT_ONCE = 40  # requests that Gradio hands over at a time; the studio lines them up

PREVIEW_TEXT = """The 72 landmarks that a portrait would follow. Takes a fraction of a second.

A photo is given as a file that was uploaded, by its path, or as a data: URL.
Parameters:
{parameters}
Returns:
    picture: The landmarks as the model sees them, a PNG file.
    report: The landmarks in pixels of that picture; each face's box in its photo; the faces seen; notes."""
GENERATE_TEXT = """Portraits of the person in the photos. Answers once a step; the last answer holds all portraits.

A photo is given as a file that was uploaded, by its path, or as a data: URL.
Parameters:
{parameters}
Returns:
    pictures: The portraits, PNG files that say how they were made.
    report: Seed, identity score, landmarks, settings, seconds, licence; before that, {{"step": k, "of": n}}."""


def add_endpoints(studio: Studio, listeners: Listeners) -> None:
    """Both, on components that are never shown."""

    def heard(request: gr.Request) -> Visitor:
        visitor = visitor_of(request)
        listeners.await_one(visitor.session)
        return visitor

    def answer_preview(*values: Any) -> tuple[np.ndarray, dict[str, Any]]:
        given = dict(zip(PARAMETERS["preview"], values, strict=False))
        try:
            return preview(studio, given, heard(values[-1]))
        except Exception as error:
            raise gr.Error(for_visitors(error), print_exception=False) from None

    def answer_generate(*values: Any) -> Generator[tuple[list[str], dict[str, Any]]]:
        given = dict(zip(PARAMETERS["generate"], values, strict=False))
        try:
            yield from generate(studio, given, heard(values[-1]))
        except Exception as error:
            raise gr.Error(for_visitors(error), print_exception=False) from None

    with gr.Row(visible=False):
        boxes = {name: Argument(name, meaning(name, studio.pipeline)) for name in SPECS}
        picture = gr.Image(type="filepath", format="png", label="picture")
        pictures = gr.File(file_count="multiple", label="pictures")
        report = gr.JSON(label="report")
        trigger = gr.Button()
    for name, function, text, outputs in (
        ("preview", answer_preview, PREVIEW_TEXT, [picture, report]),
        ("generate", answer_generate, GENERATE_TEXT, [pictures, report]),
    ):
        names = PARAMETERS[name]
        parameters = "\n".join(f"    {one}: {meaning(one, studio.pipeline)}" for one in names)
        declared = declare(function, name, names, text.format(parameters=parameters))
        trigger.click(
            declared, [boxes[one] for one in names], outputs, api_name=name,
            concurrency_id=name, concurrency_limit=MOST_AT_ONCE,
        )  # fmt: skip


def preview(studio: Studio, given: dict[str, Any], visitor: Visitor) -> tuple[np.ndarray, dict[str, Any]]:
    """The drawing, RGB uint8 (height, width, 3), and the report."""
    look = studio.look(parse(given), lambda path, role: studio.read(path, role, visitor))
    drawn, faces = look.result.drawing, [reading.face for reading in look.references]
    return drawn, {
        "width": drawn.shape[1],
        "height": drawn.shape[0],
        "landmarks": np.round(look.result.landmarks, 2).tolist(),
        "face_boxes": [np.round(face.box, 1).tolist() for face in faces],
        "faces_in_photos": [face.count for face in faces],
        "notes": list(look.result.notes),
    }


def generate(studio: Studio, given: dict[str, Any], visitor: Visitor) -> Generator[tuple[list[str], dict[str, Any]]]:
    """After every step the paths of the portraits so far, and the report."""
    paths: list[str] = []
    with closing(studio.make(parse(given), visitor=visitor)) as events:
        for event in events:
            if isinstance(event, Step):
                yield paths, {"step": event.done, "of": event.of, "picture": event.number + 1}
            elif isinstance(event, Waiting):
                yield paths, {"waiting": event.ahead}
            elif isinstance(event, Portrait):
                paths = [*paths, event.path]
                yield paths, event.report


def parse(given: dict[str, Any]) -> PortraitRequest:
    """What a program sent as a request. InputError for photos that are none; the rest is checked where it is used."""
    values = {}
    for name, value in given.items():
        values[name] = uploads.photo(value) if SPECS[name].kind == "photo" else value
    return PortraitRequest.parse(values)


def declare(function: Callable[..., Any], name: str, names: Sequence[str], text: str) -> Callable[..., Any]:
    """The function with a signature and a docstring of its own, from which Gradio makes its documentation."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    types: dict[str, Any] = {one: TYPES.get(SPECS[one].kind, str) for one in names}
    types |= {one: types[one] | None for one in names if DEFAULTS[one] is None}
    parameters = [inspect.Parameter(one, kind, default=DEFAULTS[one], annotation=types[one]) for one in names]
    visitor = inspect.Parameter("request", kind, default=None, annotation=gr.Request)
    function.__name__, function.__doc__ = name, text
    function.__annotations__ = types | {"request": gr.Request}
    function.__signature__ = inspect.Signature([*parameters, visitor])  # type: ignore[attr-defined]
    return function


class Argument(gr.Textbox):
    """An input that is never shown, of any type: what is sent is handed over unread."""

    is_template = True

    def __init__(self, name: str, text: str, **rest: Any) -> None:
        self.name_, self.text = name, text
        super().__init__(DEFAULTS[name], label=name)

    def get_config(self) -> dict[str, Any]:
        return super().get_config(gr.Textbox)

    def preprocess(self, payload: Any) -> Any:
        return payload

    def postprocess(self, value: Any) -> Any:
        return value

    def api_info(self) -> dict[str, Any]:
        spec = SPECS[self.name_]
        if spec.kind == "photo":
            info = FileData.model_json_schema()
            info.pop("description", None)
        else:
            json_type = {"number": "integer" if spec.whole else "number", "switch": "boolean", "weights": "object"}
            info = {"type": json_type.get(spec.kind, "string")}
        return info | {"additional_description": self.text}

    def example_payload(self) -> Any:
        if SPECS[self.name_].kind == "photo":
            example = {"path": "me.jpg", "url": "me.jpg", "meta": {"_type": "gradio.FileData"}}
            return example if self.name_ == "reference" else None
        return {"prompt": "wearing a red jacket", "consent": True}.get(self.name_, DEFAULTS[self.name_])

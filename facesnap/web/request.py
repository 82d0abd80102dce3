"""What a visitor or a program may ask for: one frozen dataclass. Knows nothing of Gradio and makes nothing.

The API's signatures and texts (`endpoints`), the page's boxes (`form`) and every check are made from the fields of
`PortraitRequest` and the `Spec` of each. What a preview depends on is a part of them.
"""

from __future__ import annotations

import json
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal, get_args

from facesnap.errors import InputError, did_you_mean, shown
from facesnap.preview import MAX_REFERENCES
from facesnap.request import SCHEDULERS
from facesnap.results import Expression
from facesnap.speed import PRESETS
from facesnap.templates import TEMPLATES

OWN_POSE, PHOTO_POSE = "as in the photo", "another photo"
POSES = (OWN_POSE, *(template.name for template in TEMPLATES), PHOTO_POSE)
EXPRESSIONS: tuple[str, ...] = get_args(Expression)
OWN_SCHEDULER = "the model's own"
MAX_PROMPT = 1000
MAX_SEED = 2**31 - 1
MOST_AREA = 1.5  # times that of the checkpoint's square
MOST_WORK = 160  # steps × pictures × pixels of one request, in steps at the checkpoint's square
ASPECTS = {"1:1": 1.0, "4:5": 4 / 5, "3:4": 3 / 4, "2:3": 2 / 3, "4:3": 4 / 3, "3:2": 3 / 2}  # width over height

NO_CONSENT = "The consent must be true: it says that the people in the photos are you, or agreed to this."
NO_REFERENCE = "There is no photo yet: add one of the person."
NO_POSE_PHOTO = "There is no photo of a pose yet: add one, or choose another pose."


@dataclass(frozen=True)
class Style:
    """Words around a prompt. `negative` is added to what should not be in the portrait."""

    name: str
    words: str
    negative: str = ""

    def around(self, prompt: str) -> str:
        return self.words.format(prompt=prompt).strip(", ")


NO_STYLE = "no style"
STYLES = (
    Style(NO_STYLE, "{prompt}"),
    Style("photo", "a photo of a person, {prompt}"),
    Style("black and white", "a black and white photo of a person, {prompt}"),
    Style("pencil sketch", "a pencil sketch of a person, {prompt}"),
    Style("watercolor", "a watercolor painting of a person, {prompt}"),
    Style("oil painting", "an oil painting of a person, {prompt}"),
    Style("film", "film still of a person, {prompt}, 35 mm, shallow depth of field, soft grain", "drawing, cartoon"),
    Style("golden hour", "photo of a person at golden hour, {prompt}, low sun, warm rim light", "harsh flash"),
    Style("studio", "studio portrait of a person, {prompt}, softbox light, seamless backdrop", "clutter"),
    Style("noir", "film noir photo of a person, {prompt}, hard shadows, high contrast, monochrome", "colour"),
    Style("comic", "comic book drawing of a person, {prompt}, ink lines, flat colours", "photo, 3d"),
    Style("clay", "clay figure of a person, {prompt}, stop motion, miniature set", "photo, drawing"),
)


def styles(settings: Any) -> tuple[Style, ...]:
    """Those a checkpoint was taught: it may list them as "styles" of its `about`; else it takes them all."""
    known = settings.about.get("styles")
    return STYLES if known is None else tuple(style for style in STYLES if style.name in (NO_STYLE, *known))


@dataclass(frozen=True)
class Spec:
    """What is known of a field beside its type and default.

    text: what it means, a clause without its values; those are added. label, info: its words on the page, where it is
    a slider. low, high: its range, whole numbers only where `whole`. step: of the slider. choices: its values.
    preview: whether a preview depends on it.
    """

    kind: Literal["photo", "text", "choice", "number", "switch", "weights"]
    text: str
    label: str = ""
    info: str = ""
    low: float = 0.0
    high: float = 0.0
    whole: bool = False
    step: float = 1.0
    choices: tuple[str, ...] = ()
    preview: bool = False


def _field(kind: Any, default: Any, text: str, label: str = "", info: str = "", **rest: Any) -> Any:
    return field(default=default, metadata={"spec": Spec(kind, text, label, info, **rest)})


def _number(default: Any, low: float, high: float, text: str, *words: str, **rest: Any) -> Any:
    return _field("number", default, text, *words, low=low, high=high, **rest)


@dataclass(frozen=True, kw_only=True)
class PortraitRequest:
    """All that portraits depend on; photos are paths of uploads.

    seed −1 asks for a new one, steps and guidance None are the preset's, width and height None the checkpoint's.
    `parse` reads what programs send, `check` refuses what is out of bounds.
    """

    reference: str | None = _field(
        "photo", None, "A photo of the person: JPEG, PNG, WebP, HEIC and others, at most 20 MB", preview=True
    )
    prompt: str = _field("text", "", "What the portrait shows: clothes, place, light, glasses or a hat")
    consent: bool = _field("switch", False, "Must be true: the people in the photos are you, or they agreed to this")
    pose: str = _field("choice", OWN_POSE, "How the head is held", choices=POSES, preview=True)
    pose_photo: str | None = _field(
        "photo", None, f'A photo of anybody in the wanted pose, which is then "{PHOTO_POSE}"', preview=True
    )
    reference_2: str | None = _field(
        "photo", None, "Another photo of the same person; more help the likeness", preview=True
    )
    reference_3: str | None = _field("photo", None, "A third photo of the same person", preview=True)
    reference_4: str | None = _field("photo", None, "A fourth photo of the same person", preview=True)
    style: str = _field(
        "choice", NO_STYLE, "Words put around the prompt", choices=tuple(style.name for style in STYLES)
    )
    negative_prompt: str = _field("text", "", "What should not be in the portrait")
    preset: str = _field(
        "choice", "best", "Best leaves nothing out, fast leaves out what shows least", choices=tuple(PRESETS)
    )
    steps: int | None = _number(
        None, 1, 50, "Denoising steps", "Steps", "more take longer; the model’s own number is enough", whole=True
    )
    guidance: float | None = _number(
        None, 1, 10, "How strictly the prompt is followed (classifier-free guidance)", "Guidance",
        "higher: the words weigh more, colours get harsher", step=0.1,
    )  # fmt: skip
    identity_strength: float = _number(
        1.0, 0, 2, "How strongly the face is that of the photos, 1 as trained", "Identity strength",
        "higher: more of the face in the photos", step=0.05,
    )  # fmt: skip
    landmark_strength: float = _number(
        1.0, 0, 2, "How strongly the landmarks are followed, 1 as trained", "Landmark strength",
        "lower: pose and expression are followed less strictly", step=0.05,
    )  # fmt: skip
    expression: str = _field(
        "choice", "pose", "Whose expression the face shows: the pose's, that of the photo, or none",
        choices=EXPRESSIONS, preview=True,
    )  # fmt: skip
    expression_strength: float = _number(
        1.0, 0, 2, "Weight of that expression", "Expression strength", "0: none of it", step=0.05, preview=True
    )
    yaw: float = _number(
        0.0, -45, 45, "Degrees by which the pose is turned further, above 0 to the picture's right", "Turn (yaw)",
        "degrees; + to the picture’s right", preview=True,
    )  # fmt: skip
    pitch: float = _number(
        0.0, -30, 30, "Degrees by which it is nodded further, above 0 looks down", "Nod (pitch)",
        "degrees; + looks down", preview=True,
    )  # fmt: skip
    roll: float = _number(
        0.0, -45, 45, "Degrees by which it is tilted further, above 0 counter-clockwise", "Tilt (roll)",
        "degrees; + counter-clockwise", preview=True,
    )  # fmt: skip
    head_size: float = _number(
        1.0, 0.6, 1.6, "Times the head size of the pose", "Head size", "times that of the pose", step=0.02, preview=True
    )
    width: int | None = _field("number", None, "Pixels of the portrait", whole=True, preview=True)
    height: int | None = _field("number", None, "Pixels of the portrait", whole=True, preview=True)
    count: int = _number(1, 1, 4, "How many portraits, with seeds that count up", "Pictures", whole=True)
    scheduler: str = _field("choice", OWN_SCHEDULER, "The sampler", choices=(OWN_SCHEDULER, *SCHEDULERS))
    seed: int = _number(
        -1, -1, MAX_SEED, "The same seed and inputs give the same portrait; -1 takes a new one", whole=True
    )
    expressions: Mapping[str, float] | None = _field(
        "weights", None, "Weights, -1 to 1, added to the expression by the head model's own names", preview=True
    )

    @classmethod
    def of_photos(cls, photos: Sequence[str], **rest: Any) -> PortraitRequest:
        """The same with the references as one list; None is the default. InputError where they are too many."""
        if (count := len(photos)) > MAX_REFERENCES:
            raise InputError(f"There are {count} photos; choose at most {MAX_REFERENCES} of one person.")
        references: dict[str, Any] = dict(zip(REFERENCES, photos, strict=False))
        return cls(**references, **{name: value for name, value in rest.items() if value is not None})

    @classmethod
    def parse(cls, given: Mapping[str, Any]) -> PortraitRequest:
        """From what a program sent, photos being paths already: null is the default, "8" is 8, 8.0 is 8."""
        values = {name: _read(SPECS[name], value) for name, value in given.items() if value is not None}
        if values.get("pose_photo") and values.get("pose", OWN_POSE) == OWN_POSE:
            values["pose"] = PHOTO_POSE
        return cls(**values)

    @property
    def references(self) -> tuple[str, ...]:
        return tuple(path for name in REFERENCES if (path := getattr(self, name)) is not None)

    def check(self, pipeline: Any, *, preview: bool = False) -> None:
        """Raises InputError for what is out of bounds. `preview`: looks only at what a preview depends on.

        Runs with every portrait, as a browser's own checks can be walked around.
        """
        settings = pipeline.settings
        if not preview:
            self.check_value("consent", settings)
            if not self.consent:
                raise InputError(NO_CONSENT)
        if not self.references:
            raise InputError(NO_REFERENCE)
        for name in PREVIEW if preview else tuple(SPECS):
            self.check_value(name, settings)
        if self.pose == PHOTO_POSE and self.pose_photo is None:
            raise InputError(NO_POSE_PHOTO)
        if self.pose not in (OWN_POSE, PHOTO_POSE) and self.pose_photo is not None:
            raise InputError(
                f'There is a pose photo, but the pose is "{self.pose}": '
                f'set it to "{PHOTO_POSE}", or leave the photo out.'
            )
        self._check_expressions(pipeline.head_model.expression_names)
        width, height = (side or settings.size for side in (self.width, self.height))
        if width * height > MOST_AREA * settings.size**2:
            most = f"{MOST_AREA * settings.size**2 / 1e6:.2g} million pixels"
            raise InputError(f"The picture would be {width} × {height} pixels; it may have {most}: make it smaller.")
        if not preview:
            self._check_work(settings, width * height / settings.size**2)
            if (last := self.seed + self.count - 1) > MAX_SEED:
                raise InputError(f"The last picture's seed would be {last}: choose a seed of at most {MAX_SEED}.")

    def check_value(self, name: str, settings: Any) -> None:
        """Raises InputError where the value of one parameter is of a wrong kind, or beyond its range."""
        if (value := getattr(self, name)) is not None:
            _check(name, value, SPECS[name], settings)

    def _check_expressions(self, known: Sequence[str]) -> None:
        for name, weight in (self.expressions or {}).items():
            if name not in known:
                hint = did_you_mean(name, known, None if known else "this head model names none.")
                raise InputError(f"There is no expression {shown(name)!r}; {hint}")
            _in_range(f"expression {name}", weight, -1, 1, whole=False)

    def _check_work(self, settings: Any, squares: float) -> None:
        steps = self.options(settings)["num_inference_steps"]
        if (work := steps * self.count * squares) > MOST_WORK:
            raise InputError(
                f"{self.count} × {steps} steps at this size are {work / MOST_WORK:.1f} times what one request may "
                "take: choose fewer pictures, fewer steps or a smaller size."
            )

    def words(self) -> tuple[str, str | None]:
        """(prompt, negative prompt) with the style around them."""
        style = next(style for style in STYLES if style.name == self.style)
        negative = ", ".join(text for text in (self.negative_prompt.strip(), style.negative) if text)
        return style.around(self.prompt.strip()), negative or None

    def options(self, settings: Any) -> dict[str, Any]:
        """What the preset, and the visitor after it, say to the pipeline's call about speed and quality."""
        options = preset(self.preset, settings)
        by_hand = {"num_inference_steps": self.steps, "guidance_scale": self.guidance}
        return options | {name: value for name, value in by_hand.items() if value is not None}


SPECS: dict[str, Spec] = {one.name: one.metadata["spec"] for one in fields(PortraitRequest)}
DEFAULTS: dict[str, Any] = {one.name: one.default for one in fields(PortraitRequest) if one.default is not MISSING}
PREVIEW: tuple[str, ...] = tuple(name for name, spec in SPECS.items() if spec.preview)
PHOTOS: tuple[str, ...] = tuple(name for name, spec in SPECS.items() if spec.kind == "photo")
REFERENCES: tuple[str, ...] = tuple(name for name in PHOTOS if name.startswith("reference"))


def preset(name: str, settings: Any) -> dict[str, Any]:
    """Arguments of the pipeline's call, for a checkpoint with these settings."""
    return {"num_inference_steps": settings.steps, "guidance_scale": settings.guidance, "preset": name}


def frame(aspect: str, side: float, factor: int) -> tuple[int, int]:
    """(width, height) of an aspect with the area of side², both multiples of `factor`. InputError for what is none."""
    if aspect not in ASPECTS or not isinstance(side, numbers.Real) or not 0 < side < 1e6:  # nor is NaN
        raise InputError(f"The size must be a number of pixels, and the aspect one of {', '.join(ASPECTS)}.")
    root = ASPECTS[aspect] ** 0.5
    return factor * round(side * root / factor), factor * round(side / root / factor)


def meaning(name: str, pipeline: Any) -> str:
    """A sentence for the API: what a parameter means, its values and its default."""
    spec, default, settings = SPECS[name], DEFAULTS[name], pipeline.settings
    values = {
        "choice": lambda: "one of " + ", ".join(f'"{choice}"' for choice in _choices(name, spec, settings)),
        "number": lambda: "{:.10g} to {:.10g}".format(*_range(name, spec, settings)),
        "text": lambda: f"at most {MAX_PROMPT} characters",
        "weights": lambda: ", ".join(pipeline.head_model.expression_names) or "this model has none",
        "photo": lambda: "",
        "switch": lambda: "",
    }[spec.kind]()
    unsaid = {"steps": "the preset's", "guidance": "the preset's", "width": settings.size, "height": settings.size}
    default_words = f"default {unsaid.get(name, default)}" if spec.kind in ("number", "choice") else ""
    return "; ".join(part for part in (spec.text, values, default_words) if part) + "."


def _choices(name: str, spec: Spec, settings: Any) -> tuple[str, ...]:
    return tuple(style.name for style in styles(settings)) if name == "style" else spec.choices


def _range(name: str, spec: Spec, settings: Any) -> tuple[float, float]:
    return (settings.size / 2, settings.size * 2) if name in ("width", "height") else (spec.low, spec.high)


def _read(spec: Spec, value: Any) -> Any:
    """A value as it was sent, as the numbers that it stands for; what stands for none is left to `check`."""
    if spec.kind == "number":
        return _as_number(value, whole=spec.whole)
    if spec.kind == "switch" and isinstance(value, str):
        return {"true": True, "false": False}.get(value.strip().lower(), value)
    if spec.kind == "weights" and isinstance(value, str):  # agents may send any value as text
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return value
    if spec.kind == "weights" and isinstance(value, Mapping):
        return {name: _as_number(weight, whole=False) for name, weight in value.items()}
    return value


def _as_number(value: Any, *, whole: bool) -> Any:
    if isinstance(value, str):
        try:
            value = float(value) if not whole or "." in value else int(value)
        except ValueError:
            return value
    return int(value) if whole and isinstance(value, float) and value.is_integer() else value


def _check(name: str, value: Any, spec: Spec, settings: Any) -> None:
    words = name.replace("_", " ")
    if spec.kind == "number":
        _in_range(words, value, *_range(name, spec, settings), whole=spec.whole)
    elif spec.kind == "switch" and not isinstance(value, bool):
        raise InputError(f"The {words} is {shown(value)}; it must be true or false.")
    elif spec.kind == "weights" and not isinstance(value, Mapping):
        raise InputError(f'The {words} must be names with weights, such as {{"smile": 0.5}}.')
    elif spec.kind == "photo" and not isinstance(value, str):
        raise InputError(f"The {words} must be text: the path of a file that was uploaded, or a data: URL.")
    elif spec.kind == "choice":
        known = _choices(name, spec, settings)
        if not isinstance(value, str) or value not in known:  # a pose is thus never taken for a path
            raise InputError(f"There is no {words} {shown(value)!r}; {did_you_mean(value, known, cutoff=0.4)}")
    elif spec.kind == "text":
        if not isinstance(value, str):
            raise InputError(f"The {words} must be text.")
        if len(value) > MAX_PROMPT:
            raise InputError(f"The {words} has {len(value)} characters; the most are {MAX_PROMPT}.")
        if not _is_unicode(value):
            raise InputError(f"The {words} holds half a character (a lone surrogate): remove it.")


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _in_range(words: str, value: Any, low: float, high: float, *, whole: bool) -> None:
    kind: Any = numbers.Integral if whole else numbers.Real
    if isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= high:  # nor is NaN
        allowed = f"choose a {'whole ' if whole else ''}number between {low:.10g} and {high:.10g}."
        raise InputError(f"The {words} is {shown(value)}; {allowed}")

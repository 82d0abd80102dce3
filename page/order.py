"""What a visitor asks for, and which of it is allowed. Knows nothing of Gradio and makes nothing.

A `Sitting` is all that the landmark preview depends on, an `Order` all that a portrait does. Every limit is
checked here, whichever way a request came in.
"""

import difflib
import numbers
from dataclasses import dataclass
from typing import Any, get_args

from facesnap.errors import InputError
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
MAX_COUNT = 4
# Name → least, most, whole numbers only. `None` is for what the preset decides.
LIMITS: dict[str, tuple[float, float, bool]] = {
    "expression_strength": (0, 2, False),
    "yaw": (-45, 45, False),
    "pitch": (-30, 30, False),
    "roll": (-45, 45, False),
    "head_size": (0.6, 1.6, False),
    "steps": (1, 50, True),
    "guidance": (1, 10, False),
    "identity_strength": (0, 2, False),
    "landmark_strength": (0, 2, False),
    "count": (1, MAX_COUNT, True),
    "seed": (-1, MAX_SEED, True),
}
ASPECTS = {"1:1": 1.0, "4:5": 4 / 5, "3:4": 3 / 4, "2:3": 2 / 3, "4:3": 4 / 3, "3:2": 3 / 2}  # width over height
MOST_AREA = 1.5  # times that of the checkpoint's square

NO_CONSENT = "Please tick the box first: it says that the people in the photos agree."
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


@dataclass(frozen=True, kw_only=True)
class Sitting:
    """Photos (paths of uploads), head pose and frame. yaw, pitch, roll turn the pose further, in degrees;
    head_size multiplies; width and height in pixels, the checkpoint's square where None."""

    references: tuple[str, ...]
    pose: str = OWN_POSE
    pose_photo: str | None = None
    expression: str = "pose"
    expression_strength: float = 1.0
    yaw: float = 0.0
    pitch: float = 0.0
    roll: float = 0.0
    head_size: float = 1.0
    width: int | None = None
    height: int | None = None

    def check(self, settings: Any) -> None:
        """Raises InputError. `settings` are the checkpoint's."""
        paths = isinstance(self.references, list | tuple) and all(isinstance(path, str) for path in self.references)
        if not paths or not self.references:
            raise InputError(NO_REFERENCE)
        if (count := len(self.references)) > MAX_REFERENCES:
            raise InputError(f"There are {count} photos; choose at most {MAX_REFERENCES} of one person.")
        _one_of("pose", self.pose, POSES)
        if self.pose == PHOTO_POSE and not isinstance(self.pose_photo, str):
            raise InputError(NO_POSE_PHOTO)
        _one_of("expression", self.expression, EXPRESSIONS)
        for name in ("width", "height"):
            if getattr(self, name) is not None:
                _number(name, getattr(self, name), settings.size / 2, settings.size * 2, whole=True)
        width, height = (side or settings.size for side in (self.width, self.height))
        if width * height > MOST_AREA * settings.size**2:
            most = f"{MOST_AREA * settings.size**2 / 1e6:.2g} million pixels"
            raise InputError(f"The picture would be {width} × {height} pixels; it may have {most}: make it smaller.")
        for name, (low, high, whole) in LIMITS.items():
            if hasattr(self, name) and (value := getattr(self, name)) is not None:
                _number(name, value, low, high, whole=whole)


@dataclass(frozen=True, kw_only=True)
class Order(Sitting):
    """All that portraits depend on. seed −1 asks for a new one; steps and guidance None are the preset's."""

    prompt: str
    consent: bool
    style: str = NO_STYLE
    negative_prompt: str = ""
    preset: str = "best"
    steps: int | None = None
    guidance: float | None = None
    identity_strength: float = 1.0
    landmark_strength: float = 1.0
    count: int = 1
    scheduler: str = OWN_SCHEDULER
    seed: int = -1

    def check(self, settings: Any) -> None:
        """Raises InputError. Runs with every portrait, as a browser's own checks can be walked around."""
        if self.consent is not True:
            raise InputError(NO_CONSENT)
        super().check(settings)
        for name in ("prompt", "negative_prompt"):
            text = getattr(self, name)
            if not isinstance(text, str):
                raise InputError(f"The {name.replace('_', ' ')} must be text.")
            if len(text) > MAX_PROMPT:
                raise InputError(f"The {name.replace('_', ' ')} has {len(text)} characters; the most are {MAX_PROMPT}.")
        _one_of("style", self.style, [style.name for style in styles(settings)])
        _one_of("preset", self.preset, PRESETS)
        _one_of("scheduler", self.scheduler, (OWN_SCHEDULER, *SCHEDULERS))

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


def preset(name: str, settings: Any) -> dict[str, Any]:
    """Arguments of the pipeline's call, for a checkpoint with these settings."""
    return {"num_inference_steps": settings.steps, "guidance_scale": settings.guidance, "preset": name}


def styles(settings: Any) -> tuple[Style, ...]:
    """Those a checkpoint was taught: it may list them as "styles" of its `about`; else it takes them all."""
    known = settings.about.get("styles")
    return STYLES if known is None else tuple(style for style in STYLES if style.name in (NO_STYLE, *known))


def frame(aspect: str, side: float, factor: int) -> tuple[int, int]:
    """(width, height) of an aspect with the area of side², both multiples of `factor`."""
    root = ASPECTS[aspect] ** 0.5
    return factor * round(side * root / factor), factor * round(side / root / factor)


def _one_of(name: str, value: Any, choices: Any) -> None:
    """InputError unless it is one of the choices; a pose is thus never taken for a path."""
    known = list(choices)
    if isinstance(value, str) and value in known:
        return
    nearest = difflib.get_close_matches(str(value), known, n=1, cutoff=0.4)
    hint = f"did you mean {nearest[0]!r}?" if nearest else f"choose {', '.join(known)}."
    raise InputError(f"There is no {name} {str(value)[:60]!r}; {hint}")


def _number(name: str, value: Any, low: float, high: float, *, whole: bool) -> None:
    kind = numbers.Integral if whole else numbers.Real
    if isinstance(value, bool) or not isinstance(value, kind) or not low <= float(value) <= high:
        words = f"The {name.replace('_', ' ')} is {str(value)[:60]}"
        raise InputError(f"{words}; choose a {'whole ' if whole else ''}number between {low:g} and {high:g}.")

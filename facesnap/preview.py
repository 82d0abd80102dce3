"""From photos to what a portrait will follow: whose face it is, how it is held, and what is changed about that."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np

from facesnap import landmarks as landmarks72
from facesnap import templates
from facesnap.errors import InputError, check_number, shown
from facesnap.faces import Face, cosine
from facesnap.heads import Head
from facesnap.predictor import LandmarkPredictor
from facesnap.results import Expression, PreviewResult, Source

MAX_REFERENCES = 4
MAX_TURN = 60.0  # degrees added to a pose
Analyse = Callable[[Source, str], Face]  # a photo and what errors call it → its face


@dataclass(frozen=True)
class Change:
    """What is changed about a pose, within its limits; the fields are arguments of `FaceSnapPipeline.preview`."""

    expression: Expression = "pose"
    expression_strength: float = 1.0
    yaw: float = 0.0
    pitch: float = 0.0
    roll: float = 0.0
    head_size: float = 1.0
    expressions: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        check_number("expression strength", self.expression_strength, 0, 2)
        check_number("head size", self.head_size, 0.5, 2)
        for name, degrees in self.turn.items():
            check_number(name, degrees, -MAX_TURN, MAX_TURN)
        if self.expression not in get_args(Expression):
            raise InputError(f"There is no expression {self.expression!r}; choose pose, reference or neutral.")
        if not isinstance(self.expressions, Mapping | None):
            raise InputError('The expressions must be names with weights, such as {"smile": 0.5}.')
        for name, weight in (self.expressions or {}).items():
            check_number(f"expression {shown(name)!r}", weight, -1, 1)

    @property
    def turn(self) -> dict[str, float]:
        return {"yaw": self.yaw, "pitch": self.pitch, "roll": self.roll}

    def of(self, driver: Head, reference: Head, predictor: LandmarkPredictor) -> Head:
        """The driver with another expression, turned and resized; its shape is its own."""
        added, coefficients = predictor.expression(self.expressions), driver.expression
        if self.expression == "reference":
            coefficients = reference.expression
        elif self.expression == "neutral":
            coefficients = np.zeros_like(coefficients)
        coefficients = self.expression_strength * coefficients + added
        if predictor.model.nonnegative_expression:
            coefficients = np.maximum(coefficients, 0)
        if any(self.turn.values()) or self.head_size != 1:
            driver = predictor.turned(driver, **self.turn, head_size=self.head_size)
        return replace(driver, expression=coefficients)


def preview(
    reference: Any,
    pose: Any,
    size: tuple[int, int],
    change: Change,
    *,
    analyse: Analyse,
    predictor: LandmarkPredictor,
    draw: Callable[[np.ndarray, tuple[int, int]], np.ndarray],
    keeps_shape: bool,
    same_person: float,
    least: float,
) -> PreviewResult:
    """The landmarks of a portrait; reference, pose and size as in `FaceSnapPipeline.preview`.

    keeps_shape: whether the head has the driver's shape rather than the reference's. same_person: `Settings`.
    least: pixels from brows to chin below which the model draws a face badly.
    """
    predictor.expression(change.expressions)  # names that the model does not know are refused before photos are read
    faces, notes = references(reference, analyse, same_person)
    driver_face: Face | None = None
    head: Head | None = None
    if _are_landmarks(pose):
        points = _given_landmarks(pose, change, size)
    else:
        own = predictor.reconstruct(list(faces))[0]
        driver, driver_face = _driver(pose, own, size, analyse, predictor)
        notes += face_notes(driver_face, "The pose photo") if driver_face else []
        driver = change.of(driver, own, predictor)
        head = driver if keeps_shape else replace(driver, identity=own.identity)
        points = predictor.predict(head, head, size)
    height = float(np.ptp(points[:, 1]))
    if height < least:
        notes.append(
            f"The face will be only {height:.0f} pixels high, too small for this model to draw well: "
            "raise the head size or choose a pose that is closer."
        )
    return PreviewResult(points, draw(points, size), faces, driver_face, tuple(notes), head, keeps_shape)


def references(reference: Any, analyse: Analyse, same_person: float) -> tuple[tuple[Face, ...], list[str]]:
    """The face of every reference, and what the user should know about them."""
    sources: list[Any] = list(reference) if isinstance(reference, list | tuple) else [reference]
    if not sources or any(source is None for source in sources):
        raise InputError("There is no reference photo; give one to four photos of one person.")
    if len(sources) > MAX_REFERENCES:
        raise InputError(f"{len(sources)} reference photos were given; choose at most {MAX_REFERENCES} of one person.")
    roles = ["The reference photo"]
    if len(sources) > 1:
        roles = [f"Reference photo {k}" for k in range(1, len(sources) + 1)]
    faces = tuple(analyse(source, role) for source, role in zip(sources, roles, strict=True))
    notes = [note for face, role in zip(faces, roles, strict=True) for note in face_notes(face, role)]
    for k, face in enumerate(faces):
        for other in range(k):
            similarity = cosine(faces[other].embedding, face.embedding)
            if similarity < same_person:
                notes.append(
                    f"Reference photos {other + 1} and {k + 1} may show different people "
                    f"(similarity {similarity:.2f}); the portrait will be a mixture."
                )
    return faces, notes


def face_notes(face: Face, role: str) -> list[str]:
    """What the user should know about how a photo was read."""
    notes = []
    if face.turned:
        lay = "stands on its head" if face.turned == 180 else "lies on its side"
        notes.append(f"{role} {lay}; it was read after a turn by {face.turned}° clockwise.")
    if face.tilt:
        way = "left" if face.tilt > 0 else "right"
        notes.append(f"{role}: the head is tilted by {abs(face.tilt):.0f}° to the {way}; it was read upright.")
    if face.count > 1:
        notes.append(f"{role} shows {face.count} faces; the largest was used.")
    if face.found_by == "haar":
        notes.append(f"{role}: the face was hard to find, so the likeness and the pose may suffer.")
    return notes


def _driver(
    pose: Any, own: Head, size: tuple[int, int], analyse: Analyse, predictor: LandmarkPredictor
) -> tuple[Head, Face | None]:
    """The head that says how the portrait's is held, and the face of the photo it was read from."""
    if pose is None:
        return predictor.framed(own, size), None
    if isinstance(pose, Head):
        wanted = (predictor.model.num_identity, predictor.model.num_expression)
        if (given := (len(pose.identity), len(pose.expression))) != wanted:
            raise InputError(
                "The pose is a head of another head model: it has {} coefficients of identity and {} of expression, "
                "this pipeline's have {} and {}.".format(*given, *wanted)
            )
        return pose, None
    if isinstance(pose, str) and not _names_picture(pose):
        return templates.get(pose).head(predictor.model, size), None
    face = analyse(pose, "The pose photo")
    return predictor.turned(predictor.reconstruct(face)[0], roll=face.tilt), face


def _given_landmarks(pose: np.ndarray, change: Change, size: tuple[int, int]) -> np.ndarray:
    turned = replace(change, expression_strength=1.0, expressions=None) != Change()
    if turned or any((change.expressions or {}).values()):
        raise InputError("Landmarks are followed as they are; turn and resize them yourself.")
    if pose.shape not in ((landmarks72.NUM, 2), (len(landmarks72.TO_68), 2)):
        raise InputError(
            f"The pose is an array of {' × '.join(map(str, pose.shape))}: landmarks are 72 points (72, 2), or iBUG's "
            "68 (68, 2), in pixels."
        )
    if not np.issubdtype(pose.dtype, np.number) or not np.isfinite(points := pose.astype(np.float32)).all():
        raise InputError("The pose landmarks hold values that are not numbers; give 72 points in pixels.")
    if not ((points >= 0) & (points < size[::-1])).all(axis=1).any():
        raise InputError(f"No landmark of the pose lies in the portrait of {size[1]} × {size[0]} pixels: give its own.")
    return points if len(points) == landmarks72.NUM else landmarks72.from_68(points)


def _are_landmarks(pose: Any) -> bool:
    """Whether an array means points: no picture is two or three pixels wide."""
    return isinstance(pose, np.ndarray) and pose.ndim == 2 and pose.shape[1] in (2, 3)


def _names_picture(pose: str) -> bool:
    """Whether a string means a file, there or not, rather than a template."""
    return os.path.isfile(pose) or bool(Path(pose).suffix) or "/" in pose or "\\" in pose


def refuse_beside(
    given: PreviewResult, reference: Any, pose: Any, expression_strength: float, variant: str | None
) -> None:
    """InputError where a call says again what its preview has settled; its own faces are no contradiction, nor is its
    own variant."""
    if not isinstance(given, PreviewResult):
        raise InputError(f"The preview is a {type(given).__name__}; give what `preview` returns.")
    said = {
        "reference": reference is not None and reference is not given.reference_faces,
        "pose": pose is not None,
        "expression_strength": expression_strength != 1,
        "variant": variant == ("predicted" if given.keeps_shape else "driver"),
    }
    if any(said.values()):
        names = ", ".join(name for name, is_said in said.items() if is_said)
        raise InputError(f"The preview says whose face it is and how it is held: leave out {names}, or the preview.")

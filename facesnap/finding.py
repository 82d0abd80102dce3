"""Where the faces of a picture are, and which way is up.

Detectors also fire on clothes and foliage. A landmark net tells these from faces: asked again with the box moved a
little, it finds the same points on a face and others on anything else. How far they move, beside the detector's
score, chooses the face, and the turn of the picture in which it is upright.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from insightface.app.common import Face as InsightFace

SMALLEST = 32  # pixels: below this, an embedding says little about the person
WEAKEST = 0.8  # of the best score in the picture, where nothing but scores is asked
NESTED = 0.6  # of the smaller of two boxes: what covers so much of it is the same face
MOVES = ((0.08, 0.08, 1.1), (-0.08, -0.08, 0.9))  # of a box, in its sides: right, down, and times as large
PER_MOVEMENT = 5.0  # what a movement of one box takes from a score
LEAST_QUALITY = 0.5  # of a face: score − 5 × movement; the measurements are in docs/photographs.md
LEAST_LATE = 0.6  # the same where the picture was turned, or the first search in vain: each more is a chance to err
SURE = 0.016  # movement, in boxes, of a face that is certainly upright
HOPELESS = 0.15  # movement at the first move, after which the second is not asked
MOST_ROLL = 45.0  # degrees: a head tilted further is upright in another quarter turn
MOST_JUDGED = 8  # boxes of one search, the largest first
HAAR_SCORE = 0.7  # Haar's cascades give none; this is a detector's of a middling face
LARGEST_SIZE = 640  # of the detector's input, but where all else failed and the picture is larger
FLAT = 0.45  # share of a drawing's pixels that equal their neighbours; a poor JPEG has up to 0.37, a render 0.3
CASCADES = (  # of OpenCV, and whether the picture is mirrored: there is one cascade for profiles
    ("frontalface_alt2", False),
    ("frontalface_default", False),
    ("profileface", False),
    ("profileface", True),
)


@dataclass(frozen=True)
class Found:
    """Boxes (N, 4) in the picture's pixels, scores (N,) of the detector, and which attempt saw them (`faces.Face`)."""

    boxes: np.ndarray
    scores: np.ndarray
    by: str


NOTHING = Found(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), "nothing")


@dataclass(frozen=True)
class Candidate:
    """A box (4,) that may be a face: score of the detector, 0 for Haar; the landmarks (68, 3) found in it, and how far
    these move with the box, in sides of the box."""

    box: np.ndarray
    score: float
    by: str
    landmarks: np.ndarray
    movement: float

    @property
    def side(self) -> float:
        return float((self.box[2:] - self.box[:2]).max())

    @property
    def quality(self) -> float:
        return (self.score or HAAR_SCORE) - PER_MOVEMENT * self.movement

    @property
    def roll(self) -> float:
        """Degrees by which the head is tilted, counter-clockwise."""
        across = (self.landmarks[42:48] - self.landmarks[36:42]).mean(axis=0)
        return float(np.degrees(np.arctan2(-across[1], across[0])))

    def is_face(self, least: float) -> bool:
        return self.quality >= least and abs(self.roll) <= MOST_ROLL


@dataclass(frozen=True)
class Sight:
    """What was seen of a picture after `turns` quarter turns counter-clockwise: faces, the largest first; other boxes,
    the likeliest first; count of faces, those included that were too many to be judged."""

    faces: tuple[Candidate, ...]
    others: tuple[Candidate, ...]
    count: int
    turns: int = 0

    @property
    def quality(self) -> float:
        return max((face.quality for face in self.faces), default=-np.inf)

    @property
    def is_sure(self) -> bool:
        return any(face.movement <= SURE for face in self.faces[:1])


class Finder:
    """An SCRFD-form detector and a 3D-68 landmark net of InsightFace's; sizes and threshold as in `FaceAnalyser`."""

    def __init__(self, detector: Any, landmark_net: Any, sizes: tuple[int, ...], threshold: float):
        self.detector, self.landmark_net = detector, landmark_net
        self.sizes, self.threshold = sizes, threshold

    def find(self, bgr: np.ndarray, hard: AbstractContextManager[Any] | None = None) -> Found:
        """What the first search that sees anything sees, by scores alone and as the picture stands."""
        attempts = self._attempts(bgr)
        found = next(attempts)
        if not len(found.boxes):
            with hard or nullcontext():
                found = next((found for found in attempts if len(found.boxes)), NOTHING)
        kept = distinct(found.boxes, found.scores)
        kept = kept[found.scores[kept] >= WEAKEST * found.scores.max(initial=0)]
        return Found(found.boxes[kept], found.scores[kept], found.by)

    def look(self, bgr: np.ndarray, hard: AbstractContextManager[Any] | None = None, *, upright: bool = False) -> Sight:
        """The faces of a picture, turned so that they are upright; without any, the likeliest of the other boxes.

        Where the first search is not sure, the three other quarter turns are searched in the same way and the best
        is taken; only then come the slower ways to find a face, in the picture as it stands. What `hard` gives, if it
        gives anything, is called before each of these searches, and may wait. upright: the picture is known to be."""
        attempts = self._attempts(bgr)
        first = self._judged(bgr, next(attempts), LEAST_QUALITY)
        if first.is_sure or (upright and first.faces):
            return first
        with hard or nullcontext() as given:
            pause = given or (lambda: None)
            sights = [first]
            for turns in () if upright else (1, 2, 3):
                pause()
                turned = np.ascontiguousarray(np.rot90(bgr, turns))
                sights.append(replace(self._judged(turned, next(self._attempts(turned, 1.0))), turns=turns))
            best = max(sights, key=lambda sight: sight.quality)
            if best.faces:
                return best
            pause()
            for found in attempts:
                sights.append(self._judged(bgr, found))
                pause()
                if sights[-1].faces:
                    return sights[-1]
        as_it_stands = [sight for sight in sights if not sight.turns]
        others = sorted((other for sight in as_it_stands for other in sight.others), key=lambda c: -c.quality)
        return Sight((), tuple(others), 0)

    def landmarks(self, bgr: np.ndarray, box: np.ndarray) -> np.ndarray:
        """(68, 3), iBUG-68, z towards the camera, all in pixels."""
        return np.asarray(self.landmark_net.get(bgr, InsightFace(bbox=box, det_score=0.0)), np.float32)

    def _judged(self, bgr: np.ndarray, found: Found, least: float = LEAST_LATE) -> Sight:
        sides = (found.boxes[:, 2:] - found.boxes[:, :2]).max(axis=1, initial=0)
        order = np.argsort(-sides, kind="stable")
        seen = [self._candidate(bgr, found.boxes[i], float(found.scores[i]), found.by) for i in order[:MOST_JUDGED]]
        faces = [candidate for candidate in seen if candidate.is_face(least)]
        kept = distinct(np.array([f.box for f in faces]).reshape(-1, 4), np.array([f.quality for f in faces]))
        faces = sorted((faces[i] for i in kept), key=lambda face: -face.side)
        count = len(faces)
        if faces and len(found.boxes) > MOST_JUDGED:
            count = max(count, len(distinct(found.boxes, found.scores)))
        return Sight(tuple(faces), tuple(c for c in seen if not c.is_face(least)), count)

    def _candidate(self, bgr: np.ndarray, box: np.ndarray, score: float, by: str) -> Candidate:
        landmarks = self.landmarks(bgr, box)
        middle, size = (box[:2] + box[2:]) / 2, box[2:] - box[:2]
        movements: list[float] = []
        for right, down, larger in MOVES:
            centre = middle + size.max() * np.array([right, down])
            there = self.landmarks(bgr, np.r_[centre - size * larger / 2, centre + size * larger / 2])
            movements.append(np.linalg.norm((there - landmarks)[:, :2], axis=1).mean() / size.max())
            if movements[0] > HOPELESS:
                break
        return Candidate(box, score, by, landmarks, float(np.mean(movements)))

    def _attempts(self, bgr: np.ndarray, larger: float = 0.5) -> Iterator[Found]:
        """From the likeliest to the last resort; each is computed only if it is asked for. larger: of the second size,
        from which on a picture is searched at that size at once."""
        longer = max(bgr.shape[:2])
        first = [size for size in self.sizes[:2] if size == self.sizes[0] or longer > size * larger]
        yield self._detect(bgr, first, "detector")
        fitting = [size for size in self.sizes if size <= LARGEST_SIZE or longer > size / 2]
        yield self._detect(bgr, [size for size in fitting if size not in first], "resized")
        border = longer // 2
        grey = cv2.copyMakeBorder(bgr, *[border] * 4, cv2.BORDER_CONSTANT, value=(127, 127, 127))
        padded = self._detect(grey, [size for size in self.sizes if size < LARGEST_SIZE], "padded")  # for large faces
        yield Found(padded.boxes - border, padded.scores, "padded")
        boxes = haar(bgr)
        yield Found(boxes, np.zeros(len(boxes), np.float32), "haar")

    def _detect(self, bgr: np.ndarray, sizes: list[int], by: str) -> Found:
        """All boxes seen at several input sizes, without doubles.

        InsightFace shrinks with plain bilinear sampling; shrinking by area first spares small faces the
        aliasing."""
        rows = [np.zeros((0, 5), np.float32)]
        for size in sizes:
            ratio = min(1.0, size / max(bgr.shape[:2]))
            shape = [max(1, round(side * ratio)) for side in bgr.shape[1::-1]]
            small = bgr if ratio == 1 else cv2.resize(bgr, shape, interpolation=cv2.INTER_AREA)
            found, _ = self.detector.detect(small, input_size=(size, size), det_thresh=self.threshold)
            scale = np.array(bgr.shape[1::-1]) / shape
            rows.append(found * np.r_[scale, scale, 1].astype(np.float32))
        row = np.concatenate(rows)
        kept = np.array(self.detector.nms(row), dtype=int)
        return Found(row[kept, :4], row[kept, 4], by)


def distinct(boxes: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Which of the boxes (N, 4) are faces of their own, the best score first: of two that cover one another for the
    most part, as the box of a head and that of its eyes and mouth do, the better stays."""
    kept: list[int] = []
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    for i in np.argsort(-scores, kind="stable"):
        low, high = np.maximum(boxes[i, :2], boxes[kept, :2]), np.minimum(boxes[i, 2:], boxes[kept, 2:])
        common = np.maximum(high - low, 0).prod(axis=1)
        if (common <= NESTED * np.minimum(areas[i], areas[kept])).all():
            kept.append(int(i))
    return np.array(kept, dtype=int)


def haar(bgr: np.ndarray) -> np.ndarray:
    """Boxes (N, 4) by OpenCV's Haar cascades (Viola and Jones, 2001): frontal faces, else profiles of both
    sides.

    Their squares reach from the brows to the mouth; they are moved down a little, to be about the face."""
    ratio = min(1.0, 640 / max(bgr.shape[:2]))
    grey = cv2.cvtColor(bgr, cv2.COLOR_BGR2GRAY)
    shape = [max(1, round(side * ratio)) for side in grey.shape[::-1]]
    grey = cv2.equalizeHist(cv2.resize(grey, shape, interpolation=cv2.INTER_AREA))
    smallest = max(20, round(SMALLEST * ratio))
    for name, mirrored in CASCADES:
        cascade = cv2.CascadeClassifier(str(Path(cv2.data.haarcascades) / f"haarcascade_{name}.xml"))
        seen = cascade.detectMultiScale(
            np.ascontiguousarray(grey[:, ::-1]) if mirrored else grey, 1.1, 5, minSize=(smallest, smallest)
        )
        if len(seen):
            squares = np.array(seen, np.float32)
            if mirrored:
                squares[:, 0] = grey.shape[1] - squares[:, 0] - squares[:, 2]
            side = squares[:, 2:]
            low = squares[:, :2] + side * [0.08, 0.05]
            return (np.concatenate([low, low + side * [0.84, 1.0]], axis=1) / ratio).astype(np.float32)
    return np.zeros((0, 4), np.float32)


def is_drawn(picture: np.ndarray, box: np.ndarray) -> bool:
    """Whether what lies in a box (4,) of RGB or BGR uint8 (H, W, 3) has the even areas of a cartoon; a photograph has
    noise, and what is nearly black says nothing."""
    low, high = np.clip(box.reshape(2, 2), 0, np.array(picture.shape[1::-1]) - 1).round().astype(int)
    part = picture[low[1] : high[1] + 1, low[0] : high[0] + 1]
    if min(part.shape[:2]) < 8 or part.std() < 12:
        return False
    here = part[1:, 1:]
    same = (here == part[:-1, 1:]).all(axis=-1) & (here == part[1:, :-1]).all(axis=-1)
    return bool(same.mean() > FLAT)

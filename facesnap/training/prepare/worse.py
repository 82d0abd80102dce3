"""The same face in a worse photograph: partly covered, in the dark, or blurred.

Visitors bring such photographs. Their crop and their embedding go with a sample, so that training can show a reference
as bad as those while the target stays what it is.
"""

import zlib

import cv2
import numpy as np

KINDS = ("covered", "dark", "blurred")
COVERED = (0.25, 0.5)  # sides of what covers, of the face's box
DARK = (0.08, 0.35)  # of the light that is left
BLURRED = (0.015, 0.05)  # deviation of the blur, of the box


def worse(picture: np.ndarray, box: np.ndarray, name: str) -> tuple[np.ndarray, str]:
    """A copy of a picture (H, W, 3) whose face in a box (4,) is harder to see, and which of `KINDS` it is: always the
    same for the same `name`."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    kind = KINDS[int(rng.integers(len(KINDS)))]
    side = float(max(box[2:] - box[:2]))
    if kind == "covered":
        return covered(picture, box, rng), kind
    if kind == "dark":
        return dark(picture, rng), kind
    return cv2.GaussianBlur(picture, (0, 0), max(0.8, side * rng.uniform(*BLURRED))), kind


def covered(picture: np.ndarray, box: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A turned block of one colour, somewhere over the face: a hand, a mask, a telephone."""
    middle, sides = (box[:2] + box[2:]) / 2, box[2:] - box[:2]
    centre = middle + sides * rng.uniform(-0.3, 0.3, 2)
    width, height = (float(side) for side in sides.max() * rng.uniform(*COVERED, 2))
    corners = cv2.boxPoints(((float(centre[0]), float(centre[1])), (width, height), float(rng.uniform(0, 180))))
    colour = tuple(int(value) for value in rng.integers(0, 256, 3))
    return cv2.fillConvexPoly(picture.copy(), np.round(corners).astype(np.int32), colour, cv2.LINE_AA)


def dark(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Little light, and the noise that cameras add to it."""
    out = picture.astype(np.float32) * rng.uniform(*DARK)
    noise = rng.standard_normal(picture.shape, dtype=np.float32) * rng.uniform(1, 6)
    return np.clip(out + noise, 0, 255).astype(np.uint8)

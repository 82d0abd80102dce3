"""A picture as its own reference, changed so that nothing of it can be copied but the person.

Where reference and target are one picture, a model learns to paste: pose, light and background of the reference come
back in every portrait. So the reference loses its background, is lit anew, turned and cropped harder than another
photograph would be, and is embedded in a mirror.
"""

import cv2
import numpy as np

from facesnap.faces import align
from facesnap.geometry import CROP_SIZE, warp
from facesnap.training.shards import Picture, Reference

Rng = np.random.Generator

TURN = 25.0  # degrees to either side
SIZE = (0.75, 1.3)  # of what the crop shows
SHIFT = 0.12  # of its side
ALONE = 0.9  # how often the background goes
LIGHT = 0.6  # the most by which one side is brighter than the middle, in natural logarithms
GAMMA = 0.35  # the same of its exponent


def same_picture(target: Picture, rng: Rng) -> Reference:
    """The target as its own reference; the embedding is its mirror image's. The aligned face, which the identity loss
    compares, stays as it is."""
    x0, y0, side = target.arrays["crop_box"]
    angle, size = np.radians(rng.uniform(-TURN, TURN)), side * np.exp(rng.uniform(*np.log(SIZE)))
    centre = np.array([x0, y0]) + side / 2 + side * rng.uniform(-SHIFT, SHIFT, 2)
    turn = CROP_SIZE / size * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = np.column_stack([turn, CROP_SIZE / 2 - 0.5 - turn @ (centre - 0.5)])
    crop = warp(target.picture, matrix, CROP_SIZE, borderMode=cv2.BORDER_REPLICATE)
    head = warp(target.mask, matrix, CROP_SIZE, borderMode=cv2.BORDER_CONSTANT)
    crop = recoloured(relit(crop, rng), rng)
    if rng.random() < ALONE:
        crop = alone(crop, head, rng)
    return target.arrays["embeddings"][1], crop, align(target.picture, target.arrays["keypoints"])


def alone(crop: np.ndarray, head: np.ndarray, rng: Rng) -> np.ndarray:
    """The head (H, W) of a crop (H, W, 3) before two colours that run into each other."""
    share = cv2.GaussianBlur(head, (0, 0), 1.5)[..., None].astype(np.float32) / 255
    first, last = rng.uniform(0, 255, (2, 3)).astype(np.float32)
    ramp = _ramp(crop.shape[:2], rng)[..., None] / 2 + 0.5
    return np.round(share * crop + (1 - share) * (first + ramp * (last - first))).astype(np.uint8)


def relit(crop: np.ndarray, rng: Rng) -> np.ndarray:
    """Light from a side, and another exposure."""
    light = np.exp(rng.uniform(-LIGHT, LIGHT) * _ramp(crop.shape[:2], rng))[..., None]
    exponent = np.exp(rng.uniform(-GAMMA, GAMMA))
    return np.clip(255 * (crop.astype(np.float32) / 255 * light) ** exponent, 0, 255).astype(np.uint8)


def recoloured(image: np.ndarray, rng: Rng) -> np.ndarray:
    """Brightness, contrast and saturation changed by up to a fifth, the balance of colours by a twentieth."""
    brightness, contrast, saturation = rng.uniform(0.8, 1.2, 3)
    out = image.astype(np.float32) * brightness * rng.uniform(0.95, 1.05, 3).astype(np.float32)
    out = (out - out.mean()) * contrast + out.mean()
    grey = out.mean(axis=2, keepdims=True)
    return np.clip((out - grey) * saturation + grey, 0, 255).astype(np.uint8)


def _ramp(size: tuple[int, int], rng: Rng) -> np.ndarray:
    """(H, W) float32 that rises from −1 to 1 in some direction."""
    angle = rng.uniform(0, 2 * np.pi)
    rows, columns = (np.linspace(-1, 1, side, dtype=np.float32) for side in size)
    across = np.cos(angle) * columns[None] + np.sin(angle) * rows[:, None]
    return across / np.abs(across).max()

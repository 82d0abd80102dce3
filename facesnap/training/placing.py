"""Where a picture comes to lie in a bucket: everything of it moves by one matrix (2, 3).

Scaled, turned, shifted and padded: the paper's augmentation. Sizes are (height, width).
"""

from collections.abc import Sequence

import cv2
import numpy as np

from facesnap.geometry import warp
from facesnap.training.shards import Picture

SCALES = (0.75, 1.6)  # of the picture that covers the bucket: below 1 it is padded
ENLARGED = 2.0  # the most: beyond it there is nothing to be learnt but blur, so the rest is padded
TURN = 15.0  # degrees to either side
SHIFT = 0.1  # of the bucket's sides
HEAD = 0.95  # the most of a bucket's side that a head may take


def step(resolution: int) -> int:
    """What the sides of buckets are multiples of: 64 as SDXL's, 32 below 512²."""
    return 64 if resolution >= 512 else 32


def bucket_sizes(resolution: int) -> list[tuple[int, int]]:
    """(height, width) of SDXL's kind: multiples of 64, at most resolution² pixels, between 1:2 and 2:1."""
    grid = step(resolution)
    sizes = set()
    for side in range(grid, 2 * resolution, grid):
        other = resolution**2 // side // grid * grid
        if side <= other <= 2 * side:
            sizes |= {(side, other), (other, side)}
    return sorted(sizes)


def place(target: Picture, size: tuple[int, int], rng: np.random.Generator | None) -> tuple[np.ndarray, float]:
    """The matrix (2, 3) from the picture's pixels to those of a bucket (height, width), and its scale.

    Without `rng` the picture covers the bucket, centred. With it, it is scaled, turned and shifted at random. In both
    cases it is shrunk and shifted as far as the head needs to be seen whole, and enlarged by `ENLARGED` at most.
    """
    picture_size, canvas = np.array(target.picture.shape[1::-1]), np.array(size[::-1])
    scale, angle, shift = float((canvas / picture_size).max()), 0.0, np.zeros(2)
    if rng is not None:
        scale *= float(np.exp(rng.uniform(*np.log(SCALES))))
        angle = float(np.radians(rng.uniform(-TURN, TURN)))
        shift = rng.uniform(-SHIFT, SHIFT, 2) * canvas
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    x, y, w, h = cv2.boundingRect(target.mask)
    head = np.array([[x, y], [x + w, y], [x, y + h], [x + w, y + h]]) @ turn.T
    extent = np.ptp(head, axis=0)
    scale = min(scale, ENLARGED, float(((1 if rng is None else HEAD) * canvas / np.maximum(extent, 1)).min()))
    # Corner coordinates (a pixel is 1 wide, the picture begins at 0) until the last line.
    offset = canvas / 2 + shift - scale * turn @ (picture_size / 2)
    low, high = scale * head.min(0) + offset, scale * head.max(0) + offset
    offset += np.maximum(-low, 0) - np.maximum(high - canvas, 0)
    linear = scale * turn
    return np.column_stack([linear, offset + linear @ [0.5, 0.5] - 0.5]), scale


def placed(image: np.ndarray, matrix: np.ndarray, size: tuple[int, int], padding: tuple[int, ...]) -> np.ndarray:
    """A uint8 picture or mask under a matrix (2, 3) in a bucket (height, width); `padding` where it ends."""
    way = cv2.INTER_CUBIC if np.linalg.det(matrix[:, :2]) > 1 and image.ndim == 3 else cv2.INTER_LINEAR
    return warp(image, matrix, size, flags=way, borderMode=cv2.BORDER_CONSTANT, borderValue=padding)


def time_ids(original: Sequence[int], matrix: np.ndarray, scale: float, size: tuple[int, int]) -> np.ndarray:
    """SDXL's size-and-crop conditioning (6,): the size (height, width) of the photo before it was scaled; top and left
    of the bucket in the scaled picture; the bucket's size.

    Of a turned picture it is the bucket about its own middle; where padding begins before the picture, it is 0.
    """
    canvas = np.array(size[::-1])
    middle = np.linalg.solve(matrix[:, :2], (canvas - 1) / 2 - matrix[:, 2])
    left, top = np.maximum(np.round((middle + 0.5) * scale - canvas / 2), 0)
    return np.array([*original, top, left, *size], np.float32)

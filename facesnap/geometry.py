"""Points and pictures in the plane, with one pixel convention for all.

Whole numbers are the centres of pixels, x right, y down: the first pixel is at 0 and reaches from −0.5 to 0.5, and a
picture of width w from −0.5 to w − 0.5. So a picture that is made f times as large takes x to f (x + 0.5) − 0.5, which
is also what OpenCV's `resize` does. Sizes are (height, width); a matrix (2, 3) takes points to A p + b.
"""

from __future__ import annotations

import cv2
import numpy as np

CROP_SIZE, CROP_SCALE = 224, 1.8  # of a face crop: its side, and its width in boxes, so that the hair is in it


def resized(points: np.ndarray, factor: float | np.ndarray, corner: np.ndarray | float = 0) -> np.ndarray:
    """Points (…, 2) of a picture → where they are in its part that begins with the pixel `corner`, `factor` times as
    large."""
    return (points - corner + 0.5) * factor - 0.5


def letterbox(points: np.ndarray, source: tuple[int, int], target: tuple[int, int]) -> np.ndarray:
    """Points (…, 2) of a picture of size `source` → where they are when it is fitted whole into `target`, float32.

    One scale for both axes, and the picture centred.
    """
    scale = min(target[0] / source[0], target[1] / source[1])
    border = (np.array(target[::-1]) - scale * np.array(source[::-1])) / 2
    return (resized(points, scale) + border).astype(np.float32)


# ---------------------------------------------------------------------- matrices


def moved(points: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Points (N, 2), or (N, 3) whose z grows with the scale, after a matrix (2, 3), float32."""
    flat = points[:, :2] @ matrix[:, :2].T + matrix[:, 2]
    depth = points[:, 2:] * np.sqrt(abs(np.linalg.det(matrix[:, :2])))
    return np.concatenate([flat, depth], axis=1).astype(np.float32)


def similarity(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The turn, scaling and shift (…, 2, 3) that bring points (…, N, 2) closest to others (N, 2).

    Umeyama's least squares (1991), which in the plane are a product of complex numbers; no reflection.
    """
    z, w = (points[..., 0] + 1j * points[..., 1] for points in (source, target))
    z0, w0 = z.mean(-1, keepdims=True), w.mean(-1, keepdims=True)
    turn = (np.conj(z - z0) * (w - w0)).sum(-1) / (np.abs(z - z0) ** 2).sum(-1)
    shift = w0[..., 0] - turn * z0[..., 0]
    rows = [[turn.real, -turn.imag, shift.real], [turn.imag, turn.real, shift.imag]]
    return np.moveaxis(np.array(rows), (0, 1), (-2, -1))


def warp(
    picture: np.ndarray, matrix: np.ndarray, size: int | tuple[int, int], *, flags: int = cv2.INTER_LINEAR, **options
) -> np.ndarray:
    """`cv2.warpAffine` to `size` (height, width), or to a square of that side, without aliasing where it shrinks."""
    scale = np.sqrt(abs(np.linalg.det(matrix[:, :2])))
    if scale < 0.6:
        factor = max(1.2 * scale, 4 / min(picture.shape[:2]))
        small = cv2.resize(picture, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA)
        ratio = np.array([small.shape[1] / picture.shape[1], small.shape[0] / picture.shape[0]])
        linear = matrix[:, :2] / ratio
        matrix = np.c_[linear, matrix[:, 2] - linear @ resized(np.zeros(2), ratio)]
        picture = small
    height, width = (size, size) if isinstance(size, int) else size
    return cv2.warpAffine(picture, matrix, (width, height), flags=flags, **options)


# ---------------------------------------------------------------------- the crop of a face


def crop_window(box: np.ndarray) -> tuple[np.ndarray, int]:
    """First pixel (2,) and side of the square that `square_crop` cuts out around a box (4,) x0 y0 x1 y1."""
    side = CROP_SCALE * float(max(box[2] - box[0], box[3] - box[1]))
    corner = ((box[:2] + box[2:]) / 2 - side / 2).round().astype(int)
    return corner, max(2, round(side))


def square_crop(image: np.ndarray, box: np.ndarray, *, nearest: bool = False) -> np.ndarray:
    """(224, 224, …) around the box's centre, 1.8 times its longer side; the picture's edge goes on outside.

    `nearest` for pictures of labels, which must not be mixed."""
    (x0, y0), side = crop_window(box)
    # Only the part of the picture that is seen is copied, whatever the picture's size.
    height, width = image.shape[:2]
    part = image[max(y0, 0) : max(min(y0 + side, height), 1), max(x0, 0) : max(min(x0 + side, width), 1)]
    border = (max(-y0, 0), max(y0 + side - height, 0), max(-x0, 0), max(x0 + side - width, 0))
    whole = cv2.copyMakeBorder(part, *border, cv2.BORDER_REPLICATE)
    way = cv2.INTER_AREA if side > CROP_SIZE else cv2.INTER_CUBIC
    way = cv2.INTER_NEAREST if nearest else way
    return cv2.resize(whole, (CROP_SIZE, CROP_SIZE), interpolation=way)


def in_crop(points: np.ndarray, box: np.ndarray) -> np.ndarray:
    """Points (…, 2) of the picture → where they are in the `square_crop` around the box."""
    corner, side = crop_window(box)
    return resized(points, CROP_SIZE / side, corner)

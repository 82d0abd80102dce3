"""The 72 landmarks: their order, their mirror, iBUG-68 ↔ 72, and the drawing that FFRNet reads.

The order is that of Face2Face^ρ (ECCV 2022): iBUG-68 and a middle point on each upper and lower eyelid.
Left and right are the picture's, not the person's.

    0–8    left contour, temple to chin (8)       36–43  left eye, a closed loop (corners 36 and 40)
    9–16   right contour, temple to near the chin 44–51  right eye, a closed loop (corners 44 and 48)
    17–21  left brow, 22–26 right brow            52–71  mouth (corners 52 and 57)
    27–30  nose bridge (30 is the tip), 31–35 nose base

Points are pixels of their picture, x right, y down; as in OpenCV, a whole number is the centre of a pixel.
"""

import cv2
import numpy as np

NUM = 72

GROUPS: dict[str, tuple[int, ...]] = {
    "contour": (*range(0, 9), *range(16, 8, -1)),  # along the jaw, from left temple to right temple
    "left_brow": tuple(range(17, 22)),
    "right_brow": tuple(range(22, 27)),
    "nose": tuple(range(27, 36)),
    "left_eye": tuple(range(36, 44)),
    "right_eye": tuple(range(44, 52)),
    "mouth": tuple(range(52, 72)),
}

# A closed stroke ends where it began. The contour comes first, so that everything else lies over it.
STROKES: tuple[tuple[str, tuple[int, ...]], ...] = (
    ("contour", GROUPS["contour"]),
    ("left_brow", GROUPS["left_brow"]),
    ("right_brow", GROUPS["right_brow"]),
    ("left_eye", (*GROUPS["left_eye"], 36)),
    ("right_eye", (*GROUPS["right_eye"], 44)),
    ("nose", (27, 28, 29, 30, 33)),
    ("nose", (31, 32, 33)),
    ("nose", (35, 34, 33)),
    ("mouth", (52, 54, 53, 62, 58, 59, 57, 65, 66, 71, 69, 68, 52)),  # outer lip
    ("mouth", (55, 56, 63, 61, 60, 64, 70, 67, 55)),  # inner lip
)

COLOURS: dict[str, tuple[int, int, int]] = {
    "contour": (125, 125, 125),
    "left_brow": (255, 0, 0),
    "right_brow": (0, 255, 0),
    "left_eye": (0, 0, 255),
    "right_eye": (0, 255, 255),
    "nose": (255, 0, 255),
    "mouth": (255, 255, 0),
}

# TO_68[i] is the index in 72 of iBUG-68's point i: to_68 is a plain lookup.
TO_68 = np.array(
    [
        *range(0, 9), *range(16, 8, -1), *range(17, 36),
        36, 37, 39, 40, 41, 43, 44, 45, 47, 48, 49, 51,
        52, 54, 53, 62, 58, 59, 57, 65, 66, 71, 69, 68,
        55, 56, 63, 61, 60, 64, 70, 67,
    ]
)  # fmt: skip


def _parents() -> np.ndarray:
    parents = np.empty((NUM, 2), dtype=np.int64)
    parents[TO_68] = np.arange(68)[:, None]
    for lid, neighbours in {38: (37, 38), 42: (40, 41), 46: (43, 44), 50: (46, 47)}.items():
        parents[lid] = neighbours
    return parents


def _mirror() -> np.ndarray:
    """The mirror is defined on iBUG-68, where it is well known, and carried over by the parents."""
    mirror_68 = np.array(
        [
            *range(16, -1, -1), *range(26, 16, -1), *range(27, 31), *range(35, 30, -1),
            45, 44, 43, 42, 47, 46, 39, 38, 37, 36, 41, 40,
            *range(54, 47, -1), *range(59, 54, -1), *range(64, 59, -1), *range(67, 64, -1),
        ]
    )  # fmt: skip
    index_of = {tuple(sorted(pair)): i for i, pair in enumerate(FROM_68.tolist())}
    return np.array([index_of[tuple(sorted(mirror_68[pair].tolist()))] for pair in FROM_68])


# FROM_68[i] are the two points of iBUG-68 whose middle is point i (twice the same where 68 has it too).
FROM_68 = _parents()
# MIRROR[i] is the point that i becomes when the picture is flipped left to right.
MIRROR = _mirror()


def from_68(points: np.ndarray) -> np.ndarray:
    """iBUG-68 points (..., 68, D) → (..., 72, D); a new lid point is the middle of its neighbours."""
    return points[..., FROM_68, :].mean(axis=-2, dtype=points.dtype)


def to_68(points: np.ndarray) -> np.ndarray:
    """(..., 72, D) → iBUG-68 points (..., 68, D); exact."""
    return points[..., TO_68, :]


def mirror(points: np.ndarray, width: int) -> np.ndarray:
    """The landmarks (..., 72, D) of the flipped picture, `image[:, ::-1]`, of the given width in pixels."""
    flipped = points[..., MIRROR, :].copy()
    flipped[..., 0] = width - 1 - flipped[..., 0]
    return flipped


def eye_distance(points: np.ndarray) -> np.ndarray:
    """The distance (...) between the outer eye corners 36 and 48 of (..., 72, D), in the points' unit."""
    return np.linalg.norm(points[..., 48, :] - points[..., 36, :], axis=-1)


def draw(points: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Landmarks (72, 2) in pixels → their drawing, RGB uint8 (height, width, 3), antialiased on black.

    Lines are about 1/85 of the picture wide (3 px at 256², 12 px at 1024²), so that they still show after the
    shrinking to the latent grid. What lies outside the frame falls off.
    """
    height, width = size
    # The root of the area, because SDXL's portrait and landscape sizes share their area, not their sides.
    line_width = (height * width) ** 0.5 / 85
    # Measured: cv2's antialiased lines come out 1.4 px wider than asked, in steps of two.
    thickness = max(1, 2 * round((line_width - 1.4) / 2))
    shift = 4  # cv2 takes fixed-point coordinates: sixteenths of a pixel
    fixed = np.round(np.asarray(points, dtype=np.float64) * (1 << shift)).astype(np.int32)
    canvas = np.zeros((height, width, 3), dtype=np.uint8)
    for part, indices in STROKES:
        cv2.polylines(canvas, [fixed[list(indices)]], False, COLOURS[part], thickness, cv2.LINE_AA, shift)
    return canvas

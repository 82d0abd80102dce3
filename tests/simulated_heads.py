"""A made-up linear head with plausible proportions, to test fitting where the truth is known.

Unit: half the distance between the outer eye corners. x right, y up, z to the camera.
"""

import numpy as np

from facesnap.heads import LinearHeadModel
from facesnap.landmarks import GROUPS, MIRROR

EXPRESSIONS = ("smile", "mouth_open", "brows_up", "blink")


def mean_head() -> np.ndarray:
    points = np.zeros((72, 3))
    turn = np.linspace(-1, 1, 17)  # along the jaw
    jaw = np.stack([1.5 * np.sin(turn * np.pi / 2), -0.1 - 1.75 * (1 - turn**2) ** 0.75, -1.1 * turn**2], 1)
    points[list(GROUPS["contour"])] = jaw
    for side, group in ((-1, GROUPS["left_brow"]), (1, GROUPS["right_brow"])):
        across = np.linspace(1.2, 0.25, 5)[:: 1 if side < 0 else -1]
        arch = 0.42 + 0.12 * np.sin(np.linspace(0.2, np.pi - 0.4, 5))[:: 1 if side < 0 else -1]
        points[list(group)] = np.stack([side * across, arch, 0.1 - 0.25 * across**2], 1)
    points[27:31] = np.stack([np.zeros(4), np.linspace(0.05, -0.6, 4), np.linspace(0.1, 0.55, 4)], 1)
    points[31:36] = np.stack(
        [np.linspace(-0.32, 0.32, 5), [-0.72, -0.77, -0.8, -0.77, -0.72], [0.1, 0.2, 0.27, 0.2, 0.1]], 1
    )
    loop = np.linspace(np.pi, -np.pi, 9)[:8]
    for side, group in ((-1, GROUPS["left_eye"]), (1, GROUPS["right_eye"])):
        x = side * 0.68 + 0.32 * np.cos(loop)
        points[list(group)] = np.stack([x, 0.11 * np.sin(loop), -0.22 * x**2], 1)
    outer = np.linspace(np.pi, -np.pi, 13)[:12]
    inner = np.linspace(np.pi, -np.pi, 9)[:8]
    for loop, order, rx, ry in (
        (outer, (52, 54, 53, 62, 58, 59, 57, 65, 66, 71, 69, 68), 0.55, 0.2),
        (inner, (55, 56, 63, 61, 60, 64, 70, 67), 0.42, 0.03),
    ):
        x = rx * np.cos(loop)
        points[list(order)] = np.stack([x, -1.15 + ry * np.sin(loop), 0.22 - 0.5 * x**2], 1)
    return (points + points[MIRROR] * [-1, 1, 1]) / 2


def _bumps(mean: np.ndarray, count: int, width: float, rng: np.random.Generator) -> np.ndarray:
    """Smooth symmetric deformations (count, 72, 3): what neighbouring points do, they do together."""
    distance = np.linalg.norm(mean[:, None] - mean[None], axis=-1)
    smooth = np.linalg.cholesky(np.exp(-((distance / width) ** 2)) + 1e-6 * np.eye(len(mean)))
    fields = smooth @ rng.standard_normal((count, 72, 3))
    return (fields + fields[:, MIRROR] * [-1, 1, 1]) / 2


def people(count: int, seed: int = 0) -> np.ndarray:
    """Neutral heads (count, 72, 3): broad and fine differences of shape, and of size."""
    rng = np.random.default_rng(seed)
    mean = mean_head()
    heads = mean * rng.normal(1, [0.05, 0.05, 0.05], (count, 1, 3))
    heads += 0.09 * _bumps(mean, count, 1.0, rng) + 0.03 * _bumps(mean, count, 0.4, rng)
    return heads * rng.normal(1, 0.06, (count, 1, 1))


def expression_offsets() -> np.ndarray:
    """The four EXPRESSIONS at full strength, (4, 72, 3)."""
    mean, mouth = mean_head(), list(GROUPS["mouth"])
    offsets = np.zeros((4, 72, 3))
    across = mean[mouth, 0] / 0.55
    offsets[0, mouth] = np.stack([0.15 * across, 0.16 * across**2 - 0.03, -0.06 * across**2], 1)
    lower = mean[mouth, 1] < -1.15
    offsets[1, mouth, 1] = -0.35 * lower * (1 - across**2)
    offsets[1, list(GROUPS["contour"])] = [0, -0.25, -0.05] * (1 - np.linspace(-1, 1, 17)[:, None] ** 2)
    offsets[2, 17:27, 1] = 0.18
    for group in (GROUPS["left_eye"], GROUPS["right_eye"]):
        offsets[3, list(group), 1] = -0.9 * mean[list(group), 1]
    return offsets


def model(num_identity: int = 30, seed: int = 0) -> LinearHeadModel:
    return LinearHeadModel.from_samples(
        people(400, seed),
        expression_offsets(),
        num_identity=num_identity,
        expression_std=0.5,
        expression_names=EXPRESSIONS,
        nonnegative_expression=True,
        name="simulated",
    )

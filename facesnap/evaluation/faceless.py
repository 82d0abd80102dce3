"""Pictures without a face that every installation of the tests has: those of scikit-image, and textures made here.

What looks most like a face is what a detector has never been shown: fur, folds, leaves, coins. (scikit-image's coins
are left out: there are heads on them.)
"""

from collections.abc import Iterator

import cv2
import numpy as np

BUNDLED = (
    "brick", "cat", "cell", "checkerboard", "clock", "coffee", "colorwheel", "grass", "gravel", "horse",
    "hubble_deep_field", "immunohistochemistry", "logo", "moon", "page", "retina", "rocket", "text",
)  # fmt: skip
SIDE = 512


def pictures(textures: int = 8, seed: int = 0) -> Iterator[tuple[str, np.ndarray]]:
    """Names and RGB uint8 pictures: those of scikit-image, upright and on their side, then textures of each kind."""
    from skimage import data  # a development dependency

    for name in BUNDLED:
        picture = np.asarray(getattr(data, name)())
        picture = picture * 255 if picture.dtype == bool else picture
        picture = np.dstack([picture] * 3) if picture.ndim == 2 else picture[..., :3]
        yield name, np.ascontiguousarray(picture, np.uint8)
        yield f"{name}, turned", np.ascontiguousarray(np.rot90(picture), np.uint8)
    rng = np.random.default_rng(seed)
    for kind, draw in (("clouds", clouds), ("leaves", leaves), ("cloth", cloth), ("room", room)):
        for number in range(textures):
            yield f"{kind} {number}", draw(rng)


def spectrum(rng: np.random.Generator, falls: float) -> np.ndarray:
    """(SIDE, SIDE) in [0, 1]: noise whose amplitude falls with that power of the frequency; photographs have 1."""
    frequency = np.hypot(np.fft.fftfreq(SIDE)[:, None], np.fft.fftfreq(SIDE)[None])
    noise = np.fft.ifft2(np.fft.fft2(rng.standard_normal((SIDE, SIDE))) / np.maximum(frequency, 1 / SIDE) ** falls).real
    return (noise - noise.min()) / np.ptp(noise)


def clouds(rng: np.random.Generator) -> np.ndarray:
    common = spectrum(rng, rng.uniform(0.8, 1.8))
    channels = [0.7 * common + 0.3 * spectrum(rng, rng.uniform(0.6, 1.6)) for _ in range(3)]
    return (np.dstack(channels) * 255).astype(np.uint8)


def leaves(rng: np.random.Generator) -> np.ndarray:
    picture = np.full((SIDE, SIDE, 3), (30, 50, 25), np.uint8)
    for _ in range(900):
        green = rng.uniform(40, 200)
        colour = (green * rng.uniform(0.4, 0.9), green, green * rng.uniform(0.2, 0.5))
        centre, axes = rng.integers(0, SIDE, 2).tolist(), rng.integers((6, 3), (40, 14)).tolist()
        cv2.ellipse(picture, centre, axes, rng.uniform(0, 180), 0, 360, colour, -1, cv2.LINE_AA)
    return picture


def cloth(rng: np.random.Generator) -> np.ndarray:
    """Stripes on folds."""
    y, x = np.mgrid[:SIDE, :SIDE]
    folds = spectrum(rng, 2.0)
    stripes = 0.5 + 0.5 * np.sin((x + y * rng.uniform(-1, 1) + 120 * folds) / rng.uniform(4, 20))
    return np.dstack([stripes * rng.uniform(40, 190) + 60 * folds for _ in range(3)]).astype(np.uint8)


def room(rng: np.random.Generator) -> np.ndarray:
    """A wall, a floor, boxes and round things, in uneven light."""
    picture = np.full((SIDE, SIDE, 3), rng.uniform(90, 230, 3), np.uint8)
    floor = int(SIDE * rng.uniform(0.6, 0.8))
    picture[floor:] = (picture[floor:] * rng.uniform(0.4, 0.8)).astype(np.uint8)
    for _ in range(rng.integers(4, 12)):
        corner, size = rng.integers(0, SIDE, 2), rng.integers(30, 220, 2)
        cv2.rectangle(picture, corner.tolist(), (corner + size).tolist(), rng.uniform(20, 240, 3).tolist(), -1)
        if rng.random() < 0.5:
            colour = rng.uniform(20, 240, 3).tolist()
            cv2.circle(picture, (corner + size // 2).tolist(), int(size.min() // 4), colour, -1, cv2.LINE_AA)
    lit = cv2.GaussianBlur(picture, (0, 0), 1.2) * (0.6 + 0.4 * spectrum(rng, 1.8)[..., None])
    return np.clip(lit + rng.normal(0, 4, lit.shape), 0, 255).astype(np.uint8)

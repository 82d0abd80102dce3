"""Pictures without a face, to put behind people: gradients, clouds, stripes, shapes, pieces of people in disorder."""

import cv2
import numpy as np

from facesnap.synthetic.dataset import Rows

Rng = np.random.Generator


def room(image: np.ndarray, rng: Rng) -> np.ndarray:
    """A background, or most often what it leaves of itself behind a person: paler, out of focus, in the colours of
    wood, walls, skin and hair, from which a head is hard to tell."""
    if rng.random() < 0.35:
        return image
    gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32)[..., None]
    tone = np.array(colour(rng), np.float32) if rng.random() < 0.7 else rng.uniform(40, 235) * np.ones(3, np.float32)
    tinted = tone * (1 + rng.uniform(0.2, 1) * (gray / max(1.0, gray.mean()) - 1))
    x = tinted + rng.uniform(0, 0.7) * (image - gray)
    x = cv2.GaussianBlur(x, (0, 0), len(image) * np.exp(rng.uniform(np.log(0.003), np.log(0.06))))
    return np.clip(x, 0, 255).astype(np.uint8)


def colour(rng: Rng) -> tuple[int, ...]:
    """Any colour, or one of the browns between skin, wood and sand, which a detector must not fall for."""
    if rng.random() < 0.5:
        return tuple(int(v) for v in rng.integers(0, 256, 3))
    return tuple(int(v) for v in rng.uniform(0.2, 1) * np.array([235, rng.uniform(140, 210), rng.uniform(90, 180)]))


def shapes(image: np.ndarray, rng: Rng, count: int) -> None:
    """Draw ellipses, boxes, triangles and lines onto a picture."""
    size = image.shape[0]
    for _ in range(count):
        centre = tuple(int(v) for v in rng.uniform(0, size, 2))
        kind = rng.integers(0, 5)
        if kind == 4:
            ball(image, rng, np.array(centre), rng.uniform(0.04, 0.3, 2) * size)
        elif kind == 0:
            axes = tuple(int(v) for v in rng.uniform(2, size / 4, 2))
            cv2.ellipse(image, centre, axes, rng.uniform(0, 180), 0, 360, colour(rng), -1, cv2.LINE_AA)
        elif kind == 1:
            other = tuple(int(v) for v in np.array(centre) + rng.uniform(-size / 3, size / 3, 2))
            cv2.rectangle(image, centre, other, colour(rng), -1)
        elif kind == 2:
            corners = (np.array(centre) + rng.uniform(-size / 4, size / 4, (3, 2))).astype(np.int32)
            cv2.fillPoly(image, [corners], colour(rng), cv2.LINE_AA)
        else:
            other = tuple(int(v) for v in rng.uniform(0, size, 2))
            cv2.line(image, centre, other, colour(rng), int(rng.integers(1, max(2, size // 24))), cv2.LINE_AA)


def ball(image: np.ndarray, rng: Rng, centre: np.ndarray, axes: np.ndarray) -> None:
    """A rounded thing in a light, with spots or stripes but without a face's order: fists, fruit, helmets."""
    low = np.maximum(np.floor(centre - axes), 0).astype(int)
    high = np.minimum(np.ceil(centre + axes), image.shape[0]).astype(int)
    if (high - low < 3).any():
        return
    part = image[low[1] : high[1], low[0] : high[0]]
    y, x = np.mgrid[low[1] : high[1], low[0] : high[0]].astype(np.float32)
    x, y = (x - centre[0]) / axes[0], (y - centre[1]) / axes[1]
    depth = np.sqrt(np.clip(1 - x**2 - y**2, 0, 1))
    light = rng.normal(size=3) + [0, -0.5, 1.5]
    shade = 0.35 + 0.65 * np.clip((x * light[0] + y * light[1] + depth * light[2]) / np.linalg.norm(light), 0, 1)
    painted = np.array(colour(rng), np.float32) * shade[..., None]
    spots = np.ascontiguousarray(np.broadcast_to(np.uint8(0), part.shape[:2]))
    for _ in range(int(rng.integers(0, 5))):
        place = tuple(int(v) for v in rng.uniform(0, 1, 2) * part.shape[1::-1])
        extent = tuple(int(v) + 1 for v in rng.uniform(0.02, 0.3, 2) * part.shape[1::-1])
        cv2.ellipse(spots, place, extent, rng.uniform(0, 180), 0, 360, 255, -1 if rng.random() < 0.6 else 1)
    painted[spots > 0] *= rng.uniform(0.3, 1.4)
    inside = x**2 + y**2 < 1
    part[inside] = np.clip(painted[inside], 0, 255)


def background(rng: Rng, size: int, pictures: Rows | np.ndarray | None = None) -> np.ndarray:
    """A picture without a face: gradients, clouds, stripes, shapes, or shuffled pieces of `pictures`."""
    kind = rng.random()
    if kind < 0.2:
        cells = rng.uniform(0, 255, (2, 2, 3)).astype(np.float32)
        image = cv2.resize(cells, (size, size), interpolation=cv2.INTER_LINEAR)
    elif kind < 0.55:  # clouds of several octaves, steep (soft) or flat (gravel, leaves, cloth)
        image = np.zeros((size, size, 3), np.float32)
        decay, channels = rng.uniform(0.35, 1.0), 1 if rng.random() < 0.5 else 3
        for octave in range(1, 7):
            noise = rng.standard_normal((2**octave + 1, 2**octave + 1, channels), dtype=np.float32)
            stretched = cv2.resize(noise, (size, size), interpolation=cv2.INTER_CUBIC)
            image += decay**octave * stretched.reshape(size, size, channels)
        image = (image - image.mean()) / (image.std() + 1e-3)
        if rng.random() < 0.5:  # as a height, lit from a side: folds, rock, fur
            slope = cv2.Sobel(image, cv2.CV_32F, *((1, 0) if rng.random() < 0.5 else (0, 1))).reshape(image.shape)
            image = slope / (slope.std() + 1e-3)
        image = np.array(colour(rng), np.float32) + image * np.abs(rng.normal(20, 35, 3)).astype(np.float32)
    elif kind < 0.65:
        grid = np.arange(size, dtype=np.float32)
        angle, period = rng.uniform(0, np.pi), rng.uniform(4, size / 2)
        wave = np.sin(2 * np.pi * (np.cos(angle) * grid[None] + np.sin(angle) * grid[:, None]) / period)
        wave = wave[..., None] if rng.random() < 0.5 else np.sign(wave[..., None])
        image = np.array(colour(rng), np.float32) + wave * rng.uniform(-80, 80, 3).astype(np.float32)
    elif kind < 0.8 or pictures is None:
        image = np.full((size, size, 3), colour(rng), np.float32)
    else:  # parts of people, in the wrong places
        picture = pictures[rng.integers(len(pictures))]
        n = int(rng.integers(4, 9))  # too fine for a whole face
        part = picture.shape[0] // n
        tiles = [picture[i * part : (i + 1) * part, j * part : (j + 1) * part] for i in range(n) for j in range(n)]
        order = rng.permutation(n * n)
        rows = [np.concatenate([tiles[k] for k in order[i * n : (i + 1) * n]], axis=1) for i in range(n)]
        image = cv2.resize(np.concatenate(rows), (size, size), interpolation=cv2.INTER_AREA)
    image = np.clip(image, 0, 255).astype(np.uint8)
    if rng.random() < 0.5:
        shapes(image, rng, int(rng.integers(1, 16)))
    return image


class Backgrounds:
    """A pool of backgrounds, and now and then a new one: making one costs more than training on it."""

    def __init__(self, rng: Rng, size: int, pictures: Rows | np.ndarray, count: int = 200):
        self.size, self.pictures = size, pictures
        self.pool = [background(rng, size, pictures) for _ in range(count)]

    def draw(self, rng: Rng, size: int) -> np.ndarray:
        """(size, size, 3), by `rng` alone, so that a batch can be drawn again."""
        if rng.random() < 0.1:
            image = background(rng, self.size, self.pictures)
        else:
            image = self.pool[rng.integers(len(self.pool))]
        side = int(rng.integers(self.size // 2, self.size + 1))
        x, y = rng.integers(0, self.size - side + 1, 2)
        part = image[y : y + side, x : x + side][:, :: rng.choice((-1, 1)), rng.permutation(3)]
        return cv2.resize(np.ascontiguousarray(part), (size, size), interpolation=cv2.INTER_LINEAR)

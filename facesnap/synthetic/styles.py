"""Picture styles beside "photo", as filters over a rendered picture: what a prompt can change about the whole."""

import cv2
import numpy as np


def apply_style(image: np.ndarray, style: str, seed: int = 0) -> np.ndarray:
    """`image` (H, W, 3) uint8 RGB in one of `people.STYLES`."""
    if style == "photo":
        return image
    return {
        "black and white": black_and_white,
        "pencil sketch": pencil_sketch,
        "watercolor": watercolor,
        "oil painting": oil_painting,
    }[style](image, np.random.default_rng(seed))


def black_and_white(image, rng):
    gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32)
    gray = np.clip((gray - 128) * 1.15 + 128, 0, 255).astype(np.uint8)
    return cv2.cvtColor(gray, cv2.COLOR_GRAY2RGB)


def paper(shape, rng, strength):
    grain = cv2.GaussianBlur(rng.standard_normal(shape[:2]).astype(np.float32), (0, 0), 0.8)
    return 1 + strength * grain[..., None]


def pencil_sketch(image, rng):
    """Graphite: colour dodge of the picture by its blurred negative, hatching in the shade."""
    gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32)
    blurred = cv2.GaussianBlur(255 - gray, (0, 0), 5)
    lines = np.clip(gray * 255 / np.maximum(256 - blurred, 1), 0, 255)
    y, x = np.mgrid[: gray.shape[0], : gray.shape[1]]
    hatch = 0.5 + 0.5 * np.sin((x + y) * (2 * np.pi / 6))
    shade = np.clip((150 - cv2.GaussianBlur(gray, (0, 0), 2)) / 150, 0, 1)
    out = lines * (1 - 0.5 * shade * (0.55 + 0.45 * hatch))
    out = np.clip(out[..., None] * paper(gray.shape, rng, 0.02) * np.array([1.0, 0.985, 0.95]), 0, 255)
    return out.astype(np.uint8)


def kuwahara(image, radius):
    """Each pixel takes the mean of the calmest of its four neighbouring squares, radius + 1 pixels wide."""
    h, w = image.shape[:2]
    step = (radius + 1) // 2
    x = cv2.copyMakeBorder(image.astype(np.float32), step, step, step, step, cv2.BORDER_REFLECT)
    mean = cv2.blur(x, (radius + 1, radius + 1))
    variance = (cv2.blur(x * x, (radius + 1, radius + 1)) - mean * mean).sum(-1)
    corners = [(slice(dy, dy + h), slice(dx, dx + w)) for dy in (0, 2 * step) for dx in (0, 2 * step)]
    best = np.stack([variance[c] for c in corners]).argmin(0)
    return np.take_along_axis(np.stack([mean[c] for c in corners]), best[None, ..., None], 0)[0]


def oil_painting(image, rng):
    """Dabs of one colour each, more colourful than life, with the relief of thick paint."""
    out = kuwahara(image, 3)  # wider dabs would swallow the rims of glasses
    gray = out.mean(-1, keepdims=True)
    out = gray + (out - gray) * 1.35
    strokes = cv2.GaussianBlur(rng.standard_normal(image.shape[:2]).astype(np.float32), (0, 0), 3.0, sigmaY=0.8)
    out = out + 40 * (strokes - np.roll(strokes, 1, 0))[..., None] + 6
    return np.clip(out, 0, 255).astype(np.uint8)


def watercolor(image, rng):
    """Thin washes on paper: pale flat colours, darker where a wash ends."""
    wash = kuwahara(cv2.medianBlur(image, 5), 3)
    edges = np.abs(cv2.Laplacian(cv2.GaussianBlur(wash, (0, 0), 1.2), cv2.CV_32F)).mean(-1, keepdims=True)
    cloud = cv2.GaussianBlur(rng.standard_normal(image.shape[:2]).astype(np.float32), (0, 0), 12)[..., None]
    pale = 255 - (255 - wash) * (0.72 + 1.6 * cloud)
    out = (pale - 3.0 * np.minimum(edges, 14)) * paper(image.shape, rng, 0.02)
    return np.clip(out, 0, 255).astype(np.uint8)

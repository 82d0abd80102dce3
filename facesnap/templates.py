"""The ten pose templates: how a head is held, and how large it is, as numbers any head model can take.

`python -m facesnap.templates --model HEAD_FOLDER --out facesnap/web/templates` draws their thumbnails.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from facesnap import landmarks
from facesnap.errors import InputError, did_you_mean, shown
from facesnap.heads import Head, HeadModel, from_pretrained
from facesnap.predictor import LandmarkPredictor


@dataclass(frozen=True)
class PoseTemplate:
    """A head pose: angles in degrees and head size as LandmarkPredictor.from_numbers takes them."""

    name: str
    title: str
    yaw: float = 0.0
    pitch: float = 0.0
    roll: float = 0.0
    head_size: float = 0.37

    def head(self, model: HeadModel, size: tuple[int, int]) -> Head:
        """The template as a driver in a picture of size (height, width)."""
        return LandmarkPredictor(model).from_numbers(
            yaw=self.yaw, pitch=self.pitch, roll=self.roll, head_size=self.head_size, size=size
        )


TEMPLATES: tuple[PoseTemplate, ...] = (
    PoseTemplate("front-close", "Front, close", head_size=0.45),
    PoseTemplate("front", "Front"),
    PoseTemplate("front-far", "Front, far", head_size=0.29),
    PoseTemplate("quarter-left", "Quarter left", yaw=-20),
    PoseTemplate("quarter-right", "Quarter right", yaw=20),
    PoseTemplate("three-quarter-left", "Three-quarter left", yaw=-36),
    PoseTemplate("three-quarter-right", "Three-quarter right", yaw=36),
    PoseTemplate("looking-up", "Looking up", pitch=-16, yaw=6),
    PoseTemplate("looking-down", "Looking down", pitch=16, yaw=-6),
    PoseTemplate("tilted", "Tilted", yaw=10, roll=-13),
)


def get(name: str) -> PoseTemplate:
    """The template of that name; InputError, with the nearest name, where there is none."""
    names = [template.name for template in TEMPLATES]
    if name in names:
        return TEMPLATES[names.index(name)]
    raise InputError(f"There is no pose template {shown(name)!r}; {did_you_mean(name, names, cutoff=0.4)}")


def thumbnail(template: PoseTemplate, model: HeadModel, side: int = 192) -> np.ndarray:
    """The template's landmarks over a grey bust, RGB uint8 (side, side, 3)."""
    large = 4 * side  # shrunk at the end, which is the antialiasing of the bust
    head = template.head(model, (large, large))
    bust = np.full((large, large, 3), (24, 26, 31), dtype=np.uint8)
    for cloud, grey in _bust(head, model):
        hull = cv2.convexHull(np.round(cloud).astype(np.int32))
        cv2.fillConvexPoly(bust, hull, (grey, grey + 4, grey + 11))  # a cool grey, apart from the contour's
    bust = cv2.GaussianBlur(bust, (0, 0), large / 150)
    canvas = np.maximum(bust, landmarks.draw(model.project(head), (large, large)))
    return cv2.resize(canvas, (side, side), interpolation=cv2.INTER_AREA)


def _bust(head: Head, model: HeadModel) -> list[tuple[np.ndarray, int]]:
    """Point clouds (N, 2) in pixels, the hulls of which are a bust, and their greys, back to front.

    Ellipsoids placed by the usual proportions of a head, in face heights: the cranium reaches half of one
    above the brows, and the ears stand between brows and nose.
    """
    unit, half_width = model.face_height, np.ptp(model.mean[:, 0]) / 2
    brow, chin, temple = model.mean[:, 1].max(), model.mean[:, 1].min(), model.mean[:, 2].min()
    around, down = np.meshgrid(np.linspace(0, 2 * np.pi, 64), np.linspace(0, np.pi, 32))
    sphere = np.stack([np.sin(down) * np.cos(around), np.cos(down), np.sin(down) * np.sin(around)], axis=-1)

    def ellipsoid(x: float, y: float, z: float, radii: tuple[float, float, float], turns: bool) -> np.ndarray:
        cloud = sphere.reshape(-1, 3) * np.multiply(radii, unit) + (x, y, z)
        cloud = cloud @ head.rotation.T if turns else cloud
        return head.scale * cloud[:, :2] * [1, -1] + head.translation

    shoulders = ellipsoid(0, chin - 0.95 * unit, temple - 0.3 * unit, (1.1, 0.6, 0.1), turns=False)
    neck_top = ellipsoid(0, chin + 0.3 * unit, temple - 0.25 * unit, (0.27, 0.08, 0.15), turns=True)
    neck_foot = ellipsoid(0, chin - 0.4 * unit, temple - 0.25 * unit, (0.32, 0.08, 0.15), turns=False)
    ears = [
        ellipsoid(x, brow - 0.33 * unit, temple - 0.12 * unit, (0.05, 0.15, 0.07), turns=True)
        for x in (-1.06 * half_width, 1.06 * half_width)
    ]
    width = 1.05 * half_width / unit
    skull = ellipsoid(0, brow - 0.08 * unit, temple - 0.15 * unit, (width, 0.6, 0.72), turns=True)
    groups = landmarks.GROUPS["contour"] + landmarks.GROUPS["left_brow"] + landmarks.GROUPS["right_brow"]
    face = model.project(head)[list(groups)]
    return [
        (shoulders, 55),
        (np.concatenate([neck_top, neck_foot]), 64),
        *((ear, 82) for ear in ears),
        (np.concatenate([skull, face]), 92),
        (face, 105),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the thumbnails of the pose templates.")
    parser.add_argument("--model", type=Path, required=True, help="folder of a head model")
    parser.add_argument("--out", type=Path, required=True, help="folder for <name>.png")
    arguments = parser.parse_args()
    model = from_pretrained(arguments.model)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for template in TEMPLATES:
        picture = Image.fromarray(thumbnail(template, model))
        picture.save(arguments.out / f"{template.name}.png", optimize=True)


if __name__ == "__main__":
    main()

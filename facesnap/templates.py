"""The ten pose templates: how a head is held, and how large it is, as numbers any head model can take.

`python -m facesnap.templates --model HEAD_FOLDER --out assets/templates` draws their thumbnails.
"""

import argparse
import difflib
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from facesnap import landmarks
from facesnap.heads import Head, LinearHeadModel
from facesnap.images import InputError
from facesnap.predictor import LandmarkPredictor


@dataclass(frozen=True)
class PoseTemplate:
    """A head pose: angles in degrees and head size as LandmarkPredictor.from_numbers takes them."""

    name: str
    title: str
    yaw: float = 0.0
    pitch: float = 0.0
    roll: float = 0.0
    head_size: float = 0.42

    def head(self, model: LinearHeadModel, size: tuple[int, int]) -> Head:
        """The template as a driver in a picture of size (height, width)."""
        return LandmarkPredictor(model).from_numbers(
            yaw=self.yaw, pitch=self.pitch, roll=self.roll, head_size=self.head_size, size=size
        )


TEMPLATES: tuple[PoseTemplate, ...] = (
    PoseTemplate("front-close", "Front, close", head_size=0.52),
    PoseTemplate("front", "Front"),
    PoseTemplate("front-far", "Front, far", head_size=0.32),
    PoseTemplate("quarter-left", "Quarter left", yaw=-20),
    PoseTemplate("quarter-right", "Quarter right", yaw=20),
    PoseTemplate("three-quarter-left", "Three-quarter left", yaw=-38),
    PoseTemplate("three-quarter-right", "Three-quarter right", yaw=38),
    PoseTemplate("looking-up", "Looking up", pitch=-16, yaw=6),
    PoseTemplate("looking-down", "Looking down", pitch=16, yaw=-6),
    PoseTemplate("tilted", "Tilted", yaw=10, roll=-13),
)


def get(name: str) -> PoseTemplate:
    """The template of that name; InputError, with the nearest name, where there is none."""
    names = [template.name for template in TEMPLATES]
    if name in names:
        return TEMPLATES[names.index(name)]
    nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    hint = f"did you mean {nearest[0]!r}?" if nearest else f"there are {', '.join(names)}."
    raise InputError(f"There is no pose template {name!r}; {hint}")

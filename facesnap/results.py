"""What the pipeline takes and gives: photos, previews and portraits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from diffusers.utils import BaseOutput
from PIL import Image

from facesnap.faces import Face
from facesnap.heads import Head
from facesnap.speed import Speed

Picture = str | Path | bytes | Image.Image | np.ndarray
Expression = Literal["pose", "reference", "neutral"]
Source = Picture | Face  # a photo, or what was read from it before


@dataclass(frozen=True, eq=False)
class PreviewResult:
    """What a portrait will follow, known before it is made.

    landmarks (72, 2) float32, pixels of the output frame; drawing (h, w, 3) uint8, what FFRNet sees of them;
    reference_faces: the face used in each reference; driver_face: that of the pose photo, if there was one;
    notes: sentences for the user; head: the reconstruction behind the landmarks, None where they were given;
    keeps_shape: whether the head has the shape of the driver, as variant "driver" has it.
    """

    landmarks: np.ndarray
    drawing: np.ndarray
    reference_faces: tuple[Face, ...]
    driver_face: Face | None
    notes: tuple[str, ...]
    head: Head | None = None
    keeps_shape: bool = False


@dataclass(eq=False)
class FaceSnapOutput(BaseOutput):
    """Portraits, and all that is needed to make them again.

    images: what the stock pipeline returns as its `images`. seed: of the first picture, seeds: of each one; a
    picture made alone with its seed is the same picture (None where the caller brought a generator).
    landmarks (72, 2) in pixels of the output and its drawing; face: that of the first reference.
    identity_scores: cosine of each picture to the references by the scoring recogniser, None where no face
    was found in the picture; empty without a scorer or for pictures that are not PIL images. speed: what was
    left out for its sake.
    """

    images: Any
    seed: int | None
    seeds: tuple[int, ...]
    landmarks: np.ndarray
    drawing: np.ndarray
    face: Face
    reference_faces: tuple[Face, ...]
    driver_face: Face | None
    identity_scores: tuple[float | None, ...]
    notes: tuple[str, ...]
    model: str
    scheduler: str
    size: tuple[int, int]
    steps: int
    guidance: float
    speed: Speed = Speed()

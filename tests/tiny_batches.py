"""Batches for the tiny FaceSnap, in the form that `photos.PhotoShards` gives: noise for pictures, but all there."""

from __future__ import annotations

import numpy as np
import torch
from tiny import SIZE

FACE = np.array([[24, 26], [40, 26], [32, 34], [26, 42], [38, 42]], np.float32)  # five points in 64²


def sample(position: int, index: int) -> dict:
    """One sample; which one depends on the position in the run and its index in the batch of all processes."""
    rng = np.random.default_rng((position, index))

    def picture(*shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.integers(0, 256, shape, dtype=np.uint8))

    mask = torch.zeros(1, SIZE, SIZE, dtype=torch.uint8)
    mask[:, 8:56, 16 : 32 + 8 * int(rng.integers(1, 4))] = 255
    drawing = torch.zeros(3, SIZE, SIZE, dtype=torch.uint8)
    drawing[:, 20:44, 20:44] = picture(3, 24, 24)
    return {
        "pixels": picture(3, SIZE, SIZE),
        "mask": mask,
        "control": drawing,
        "keypoints": torch.from_numpy(FACE + rng.normal(0, 1, (5, 2)).astype(np.float32)),
        "time_ids": torch.tensor([SIZE, SIZE, 0, 0, SIZE, SIZE], dtype=torch.float32),
        "captions": f"person {index}",
        "drop_text": torch.tensor(index == 1),
        "drop_face": torch.tensor(False),
        "drop_landmarks": torch.tensor(False),
        "embeddings": torch.from_numpy(rng.standard_normal((2, 512)).astype(np.float32)),
        "crops": picture(2, 224, 224, 3),
        "reference_mask": torch.tensor([True, index % 2 == 0]),
        "reference_faces": picture(2, 112, 112, 3),
        "keys": f"{index:08d}_{position:04d}",
    }


def batch(position: int, first: int, count: int) -> dict:
    samples = [sample(position, first + i) for i in range(count)]
    return {
        key: torch.stack([s[key] for s in samples]) if isinstance(value, torch.Tensor) else [s[key] for s in samples]
        for key, value in samples[0].items()
    }


def stream(count: int, change=lambda position, batch: batch):
    """`count` samples a batch and process; `change` may spoil some of them."""

    def batches(position: int, rank: int, world: int):
        while True:
            yield change(position, batch(position, rank * count, count))
            position += 1

    return batches

"""Training batches from the shards that `facesnap.training.prepare` writes.

    dataset = PhotoShards(folder, PhotoConfig(resolution=1024, batch_size=7), rank=…, world_size=…)
    for batch in photo_loader(dataset, workers=8): …

The target is a picture of a person, the reference another picture of the same person where there is one; else the
same picture, changed so that nothing can be copied but the person (`references`), and only half as often. Some
references are shown covered, dark or blurred. The target is scaled, turned, shifted and padded together with its mask
and landmarks (the paper's augmentation, `placing`), into one of SDXL's aspect buckets.

The stream has no end, and no state but its position. Which pictures a reader gets, in which order, follows from
(seed, epoch, rank, worker); what is done to a picture from (seed, epoch, key) alone. To go on at batch k the order is
walked through without opening a picture: only the small lists beside the shards are read.
"""

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count, islice
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from facesnap.geometry import moved
from facesnap.landmarks import draw
from facesnap.training.placing import bucket_sizes, place, placed, step, time_ids
from facesnap.training.references import same_picture
from facesnap.training.shards import Item, Shard, fingerprint, shard_urls

Batch = dict[str, Any]

REFERENCES = (0.6, 0.2, 0.1, 0.1)  # how often a target is given 1, 2, 3, 4 references, where there are as many
PADDING = (127, 127, 127)


@dataclass(frozen=True)
class PhotoConfig:
    """How batches are made. Shares lie in [0, 1]."""

    resolution: int = 1024  # side of the square whose area all buckets share
    buckets: bool = True  # sizes of about that area between 1:2 and 2:1; else the square alone
    batch_size: int = 7
    max_references: int = 4
    augment: bool = True  # without it a picture is always the same, so that its latents can be kept
    fitted_share: float = 0.5  # of the drawings that show the head model's landmarks, as at use, not those found
    lone_share: float = 0.5  # of the pictures that must be their own reference: how many an epoch shows
    worse_share: float = 0.1  # of the references: how often one is covered, dark or blurred
    drop_text: float = 0.1
    drop_face: float = 0.0
    drop_landmarks: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.resolution % step(self.resolution) or self.resolution < 64:
            raise ValueError(f"resolution {self.resolution} is no multiple of {step(self.resolution)}, from 64 on")
        if self.batch_size < 1 or not 1 <= self.max_references <= len(REFERENCES):
            raise ValueError(
                f"batch_size {self.batch_size} must be at least 1, max_references {self.max_references} 1 to 4"
            )
        for name in ("fitted_share", "lone_share", "worse_share", "drop_text", "drop_face", "drop_landmarks"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give a share between 0 and 1")
        if not self.lone_share:
            raise ValueError("lone_share is 0: a person with one picture would never be seen; give more than 0")


class PhotoShards(IterableDataset):
    """Endless batches from prepared shards: a folder, a brace pattern, a URL webdataset opens, or a list of these.

    `rank` of `world_size` processes read different pictures. `position` is how many batches this rank has had. A
    batch holds, for B targets of one size (H, W) and up to R references:

        pixels (B, 3, H, W) uint8; mask (B, 1, H, W) uint8, 255 on the head; control (B, 3, H, W) uint8, the drawing
        landmarks (B, 72, 2), keypoints (B, 5, 2), box (B, 4) float32, pixels of the target; the landmarks drawn
        time_ids (B, 6) float32: SDXL's original height and width, top and left of the crop, target height and width
        captions, keys: lists of B strings; epochs: a list of B
        drop_text, drop_face, drop_landmarks, same_picture (B,) bool
        embeddings (B, R, 512) float32, crops (B, R, 224, 224, 3) uint8, reference_faces (B, R, 112, 112, 3) uint8,
        reference_mask (B, R) bool: raw embeddings, CLIP-form crops and aligned faces of the references; false: none

    Raises FileNotFoundError without shards; ValueError for fewer pictures than readers, and for a sample that is
    damaged or of wrong shape.
    """

    def __init__(
        self,
        shards: str | Path | Sequence[str | Path],
        config: PhotoConfig,
        *,
        rank: int = 0,
        world_size: int = 1,
        position: int = 0,
    ) -> None:
        if not 0 <= rank < world_size or position < 0:
            raise ValueError(f"rank {rank} of {world_size} at position {position}: count both from 0")
        self.urls = shard_urls(shards)
        self.config, self.rank, self.world_size, self.position = config, rank, world_size, position
        self.sizes = bucket_sizes(config.resolution) if config.buckets else [(config.resolution, config.resolution)]

    @property
    def recogniser(self) -> str | None:
        """Whose embeddings the shards hold: `FaceAnalyser.recogniser_digest`."""
        return Shard(self.urls[0]).recogniser

    @cached_property
    def fingerprint(self) -> str:
        """Of the data: a hash of the shards' names and lists. Raises ValueError for shards of two prepares."""
        return fingerprint(self.urls)

    @cached_property
    def num_samples(self) -> int:
        return sum(len(Shard(url).rows) for url in self.urls)

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        workers, worker = (info.num_workers, info.id) if info else (1, 0)
        if info:
            cv2.setNumThreads(0)
        # The loader asks its workers in turn, from the first on: at position k it is reader k's turn.
        reader = (worker + self.position) % workers
        done = (self.position - reader + workers - 1) // workers  # batches that this reader has given
        part, parts = self.rank + reader * self.world_size, workers * self.world_size
        for items in islice(self._order(part, parts, done), done, None):
            yield collate([self._sample(item) for item in items])

    def _order(self, part: int, parts: int, skipped: int) -> "Iterator[list[Item]]":
        """What goes into each batch of one of `parts` readers; the first `skipped` batches will not be opened."""
        waiting: dict[tuple[int, int], list[Item]] = {}
        given = 0
        by_shard = len(self.urls) >= parts  # each reader has shards of its own; else every shard is shared out
        for epoch in count():
            some, turn = False, 0
            shards = np.random.default_rng((self.config.seed, epoch)).permutation(len(self.urls))
            for number in shards[part::parts] if by_shard else shards:
                shard = Shard(self.urls[number])
                rows = np.random.default_rng((self.config.seed, epoch, number)).permutation(len(shard.rows))
                if not by_shard:
                    rows, turn = rows[(part - turn) % parts :: parts], turn + len(rows)
                for row in rows:
                    some = True
                    key = shard.rows[row]["key"]
                    references = self._references(shard, int(row), epoch)
                    if not references and self._rng(epoch, key, 4).random() >= self.config.lone_share:
                        continue
                    size = self._bucket(*shard.rows[row]["size"])
                    waiting.setdefault(size, []).append(Item(shard, int(row), references, epoch, size))
                    if len(waiting[size]) == self.config.batch_size:
                        yield waiting.pop(size)
                        given += 1
                if given >= skipped:
                    for items in waiting.values():
                        for item in items:
                            item.fetch()
            if not some:
                raise ValueError(
                    f"reader {part} of {parts} has no pictures in {len(self.urls)} shards: use fewer workers"
                )

    def _bucket(self, height: int, width: int) -> tuple[int, int]:
        return min(self.sizes, key=lambda size: abs(np.log(size[0] / size[1]) - np.log(height / width)))

    def _references(self, shard: "Shard", row: int, epoch: int) -> list[int]:
        """Rows of some other photographs of the same person; the same photograph does not count."""
        told = shard.rows[row]
        others = [r for r in shard.people[told["identity"]] if shard.rows[r]["source"] != told["source"]]
        rng = self._rng(epoch, told["key"], 0)
        wanted = 1 + int(rng.choice(len(REFERENCES), p=REFERENCES))
        return [int(r) for r in rng.permutation(others)[: min(wanted, self.config.max_references)]]

    def _rng(self, epoch: int, key: str, purpose: int) -> np.random.Generator:
        return np.random.default_rng((self.config.seed, epoch, zlib.crc32(key.encode()), purpose))

    # ---- one sample --------------------------------------------------------------------------------------------

    def _sample(self, item: "Item") -> Batch:
        config, (height, width) = self.config, item.size
        chances = self._rng(item.epoch, item.key, 1).random(4)  # an option never changes what another one draws
        placing = self._rng(item.epoch, item.key, 2) if config.augment else None
        target = item.target()
        matrix, scale = place(target, item.size, placing)
        fitted = "fitted" in target.arrays and chances[0] < config.fitted_share
        landmarks = moved(target.arrays["fitted" if fitted else "landmarks"], matrix)
        keypoints = moved(target.arrays["keypoints"], matrix)
        x0, y0, x1, y1 = target.arrays["box"]
        corners = moved(np.array([[x0, y0], [x1, y0], [x0, y1], [x1, y1]]), matrix)
        no_landmarks = bool(chances[3] < config.drop_landmarks)
        drawing = np.zeros((height, width, 3), np.uint8) if no_landmarks else draw(landmarks, item.size)
        if item.references:
            worse = self._rng(item.epoch, item.key, 5).random(len(item.references)) < config.worse_share
            references = [item.reference(row, bool(w)) for row, w in zip(item.references, worse, strict=True)]
        else:
            references = [same_picture(target, self._rng(item.epoch, item.key, 3))]
        return {
            "pixels": placed(target.picture, matrix, item.size, PADDING).transpose(2, 0, 1),
            "mask": placed(target.mask, matrix, item.size, (0,))[None],
            "control": drawing.transpose(2, 0, 1),
            "landmarks": landmarks,
            "keypoints": keypoints,
            "box": np.concatenate([corners.min(0), corners.max(0)]),
            "time_ids": time_ids(target.about["original_size"], matrix, scale, item.size),
            "captions": target.about["caption"],
            "drop_text": bool(chances[1] < config.drop_text),
            "drop_face": bool(chances[2] < config.drop_face),
            "drop_landmarks": no_landmarks,
            "same_picture": not item.references,
            "embeddings": np.stack([reference[0] for reference in references]),
            "crops": np.stack([reference[1] for reference in references]),
            "reference_faces": np.stack([reference[2] for reference in references]),
            "keys": item.key,
            "epochs": item.epoch,
        }


def photo_loader(dataset: PhotoShards, workers: int = 0) -> DataLoader:
    """A loader of whole batches in a fixed order. It is not for `accelerator.prepare`, which would share the batches
    out a second time."""
    return DataLoader(dataset, batch_size=None, num_workers=workers, pin_memory=torch.cuda.is_available())


def collate(samples: Sequence[Batch]) -> Batch:
    """Samples → a batch; references are filled up with zeros to the most that a sample has."""
    most = max(len(sample["embeddings"]) for sample in samples)
    batch: Batch = {
        "reference_mask": torch.tensor([[i < len(s["embeddings"]) for i in range(most)] for s in samples]),
    }
    for name, first in samples[0].items():
        values = [sample[name] for sample in samples]
        if name in ("embeddings", "crops", "reference_faces"):
            values = [np.concatenate([v, np.zeros((most - len(v), *v.shape[1:]), v.dtype)]) for v in values]
        if isinstance(first, np.ndarray):
            batch[name] = torch.from_numpy(np.stack(values))
        elif isinstance(first, bool):
            batch[name] = torch.tensor(values)
        else:
            batch[name] = values
    return batch

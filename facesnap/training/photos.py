"""Training batches from the shards that `facesnap.training.prepare` writes.

    dataset = PhotoShards(folder, PhotoConfig(resolution=1024, batch_size=7), rank=…, world_size=…)
    for batch in photo_loader(dataset, workers=8): …

The target is a picture of a person, the reference another picture of the same person where there is one; else the
same picture, re-cropped and recoloured so that its pixels cannot be copied. The target is scaled, turned, shifted and
padded together with its mask and landmarks (the paper's augmentation), into one of SDXL's aspect buckets.

The stream has no end, and no state but its position. Which pictures a reader gets, in which order, follows from
(seed, epoch, rank, worker); what is done to a picture from (seed, epoch, key) alone. To go on at batch k the order is
walked through without opening a picture: only the small lists beside the shards are read.
"""

import hashlib
import io
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count, islice
from pathlib import Path
from typing import Any

import braceexpand
import cv2
import numpy as np
import torch
import webdataset
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from facesnap.faces import align
from facesnap.geometry import CROP_SIZE, moved, resized, warp
from facesnap.landmarks import NUM, draw

Batch = dict[str, Any]

REFERENCES = (0.6, 0.2, 0.1, 0.1)  # how often a target is given 1, 2, 3, 4 references, where there are as many
SCALES = (0.75, 1.6)  # of the picture that covers the bucket: below 1 it is padded
TURN = 15.0  # degrees to either side
SHIFT = 0.1  # of the bucket's sides
HEAD = 0.95  # the most of a bucket's side that a head may take
PADDING = (127, 127, 127)
ARRAYS = {  # of a sample's .npz
    "embeddings": (2, 512),
    "landmarks68": (68, 3),
    "landmarks": (NUM, 2),
    "box": (4,),
    "keypoints": (5, 2),
    "crop_box": (3,),
}


@dataclass(frozen=True)
class PhotoConfig:
    """How batches are made. Shares lie in [0, 1]."""

    resolution: int = 1024  # side of the square whose area all buckets share
    buckets: bool = True  # sizes of about that area between 1:2 and 2:1; else the square alone
    batch_size: int = 7
    max_references: int = 4
    augment: bool = True  # without it a picture is always the same, so that its latents can be kept
    fitted_share: float = 0.5  # of the drawings that show the head model's landmarks, as at use, not those found
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
        for name in ("fitted_share", "drop_text", "drop_face", "drop_landmarks"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give a share between 0 and 1")


def step(resolution: int) -> int:
    """What the sides of buckets are multiples of: 64 as SDXL's, 32 below 512²."""
    return 64 if resolution >= 512 else 32


def bucket_sizes(resolution: int) -> list[tuple[int, int]]:
    """(height, width) of SDXL's kind: multiples of 64, at most resolution² pixels, between 1:2 and 2:1."""
    grid = step(resolution)
    sizes = set()
    for side in range(grid, 2 * resolution, grid):
        other = resolution**2 // side // grid * grid
        if side <= other <= 2 * side:
            sizes |= {(side, other), (other, side)}
    return sorted(sizes)


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
        return _Shard(self.urls[0]).recogniser

    @cached_property
    def fingerprint(self) -> str:
        """Of the data: a hash of the shards' names and lists."""
        told = hashlib.sha256()
        for url in self.urls:
            told.update(Path(url).name.encode() + _read(list_url(url)))
        return told.hexdigest()

    @cached_property
    def num_samples(self) -> int:
        return sum(len(_Shard(url).rows) for url in self.urls)

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

    def _order(self, part: int, parts: int, skipped: int) -> "Iterator[list[_Item]]":
        """What goes into each batch of one of `parts` readers; the first `skipped` batches will not be opened."""
        waiting: dict[tuple[int, int], list[_Item]] = {}
        given = 0
        by_shard = len(self.urls) >= parts  # each reader has shards of its own; else every shard is shared out
        for epoch in count():
            some, turn = False, 0
            shards = np.random.default_rng((self.config.seed, epoch)).permutation(len(self.urls))
            for number in shards[part::parts] if by_shard else shards:
                shard = _Shard(self.urls[number])
                rows = np.random.default_rng((self.config.seed, epoch, number)).permutation(len(shard.rows))
                if not by_shard:
                    rows, turn = rows[(part - turn) % parts :: parts], turn + len(rows)
                for row in rows:
                    some = True
                    size = self._bucket(*shard.rows[row]["size"])
                    references = self._references(shard, int(row), epoch)
                    waiting.setdefault(size, []).append(_Item(shard, int(row), references, epoch, size))
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

    def _references(self, shard: "_Shard", row: int, epoch: int) -> list[int]:
        """Rows of some other photographs of the same person; the same photograph does not count."""
        told = shard.rows[row]
        others = [r for r in shard.people[told["identity"]] if shard.rows[r]["source"] != told["source"]]
        rng = self._rng(epoch, told["key"], 0)
        wanted = 1 + int(rng.choice(len(REFERENCES), p=REFERENCES))
        return [int(r) for r in rng.permutation(others)[: min(wanted, self.config.max_references)]]

    def _rng(self, epoch: int, key: str, purpose: int) -> np.random.Generator:
        return np.random.default_rng((self.config.seed, epoch, zlib.crc32(key.encode()), purpose))

    # ---- one sample --------------------------------------------------------------------------------------------

    def _sample(self, item: "_Item") -> Batch:
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
            references = [item.reference(row) for row in item.references]
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


# ---- geometry: everything of a picture moves by one matrix (2, 3) -----------------------------------------------


def place(target: "_Picture", size: tuple[int, int], rng: np.random.Generator | None) -> tuple[np.ndarray, float]:
    """The matrix (2, 3) from the picture's pixels to those of a bucket (height, width), and its scale.

    Without `rng` the picture covers the bucket, centred. With it, it is scaled, turned and shifted at random. In both
    cases it is shrunk and shifted as far as the head needs to be seen whole.
    """
    picture_size, canvas = np.array(target.picture.shape[1::-1]), np.array(size[::-1])
    scale, angle, shift = float((canvas / picture_size).max()), 0.0, np.zeros(2)
    if rng is not None:
        scale *= float(np.exp(rng.uniform(*np.log(SCALES))))
        angle = float(np.radians(rng.uniform(-TURN, TURN)))
        shift = rng.uniform(-SHIFT, SHIFT, 2) * canvas
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    x, y, w, h = cv2.boundingRect(target.mask)
    head = np.array([[x, y], [x + w, y], [x, y + h], [x + w, y + h]]) @ turn.T
    extent = np.ptp(head, axis=0)
    scale = min(scale, float(((1 if rng is None else HEAD) * canvas / np.maximum(extent, 1)).min()))
    # Corner coordinates (a pixel is 1 wide, the picture begins at 0) until the last line.
    offset = canvas / 2 + shift - scale * turn @ (picture_size / 2)
    low, high = scale * head.min(0) + offset, scale * head.max(0) + offset
    offset += np.maximum(-low, 0) - np.maximum(high - canvas, 0)
    linear = scale * turn
    return np.column_stack([linear, offset + linear @ [0.5, 0.5] - 0.5]), scale


def placed(image: np.ndarray, matrix: np.ndarray, size: tuple[int, int], padding: tuple[int, ...]) -> np.ndarray:
    """A uint8 picture or mask under a matrix (2, 3) in a bucket (height, width); `padding` where it ends."""
    way = cv2.INTER_CUBIC if np.linalg.det(matrix[:, :2]) > 1 and image.ndim == 3 else cv2.INTER_LINEAR
    return warp(image, matrix, size, flags=way, borderMode=cv2.BORDER_CONSTANT, borderValue=padding)


def time_ids(original: Sequence[int], matrix: np.ndarray, scale: float, size: tuple[int, int]) -> np.ndarray:
    """SDXL's size-and-crop conditioning (6,): the size (height, width) of the photo before it was scaled; top and left
    of the bucket in the scaled picture; the bucket's size.

    Of a turned picture it is the bucket about its own middle; where padding begins before the picture, it is 0.
    """
    canvas = np.array(size[::-1])
    middle = np.linalg.solve(matrix[:, :2], (canvas - 1) / 2 - matrix[:, 2])
    left, top = np.maximum(np.round((middle + 0.5) * scale - canvas / 2), 0)
    return np.array([*original, top, left, *size], np.float32)


# ---- references ------------------------------------------------------------------------------------------------

Reference = tuple[np.ndarray, np.ndarray, np.ndarray]  # embedding (512,), crop (224, 224, 3), face (112, 112, 3)


def same_picture(target: "_Picture", rng: np.random.Generator) -> Reference:
    """The target as its own reference: cropped anew and in other colours; the embedding is its mirror image's."""
    x0, y0, side = target.arrays["crop_box"]
    angle, size = np.radians(rng.uniform(-10, 10)), side * rng.uniform(0.85, 1.15)
    centre = np.array([x0, y0]) + side / 2 + side * rng.uniform(-0.08, 0.08, 2)
    turn = CROP_SIZE / size * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = np.column_stack([turn, CROP_SIZE / 2 - 0.5 - turn @ (centre - 0.5)])
    crop = warp(target.picture, matrix, CROP_SIZE, borderMode=cv2.BORDER_REPLICATE)
    face = align(target.picture, target.arrays["keypoints"])
    return target.arrays["embeddings"][1], recoloured(crop, rng), face


def recoloured(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Brightness, contrast and saturation changed by up to a fifth, the balance of colours by a twentieth."""
    brightness, contrast, saturation = rng.uniform(0.8, 1.2, 3)
    out = image.astype(np.float32) * brightness * rng.uniform(0.95, 1.05, 3).astype(np.float32)
    out = (out - out.mean()) * contrast + out.mean()
    grey = out.mean(axis=2, keepdims=True)
    return np.clip((out - grey) * saturation + grey, 0, 255).astype(np.uint8)


# ---- shards ----------------------------------------------------------------------------------------------------


def shard_urls(shards: str | Path | Sequence[str | Path]) -> list[str]:
    """Folders, brace patterns and URLs, one or several, → the shards, in order."""
    urls: list[str] = []
    for place in [shards] if isinstance(shards, (str, Path)) else shards:
        if Path(place).is_dir():
            urls += [str(path) for path in sorted(Path(place).glob("shard-*.tar"))]
        else:
            urls += braceexpand.braceexpand(str(place))
    for url in urls:
        if "://" not in url and not url.startswith("pipe:") and not Path(url).is_file():
            raise FileNotFoundError(f"there is no shard {url!r}: run facesnap.training.prepare, or mend the pattern")
    if not urls:
        raise FileNotFoundError(f"no shards (shard-*.tar) in {str(shards)!r}: run facesnap.training.prepare first")
    return urls


def list_url(url: str) -> str:
    """Where the list of a shard's samples is."""
    return re.sub(r"\.tar\b", ".json", url)


def _read(url: str) -> bytes:
    try:
        with webdataset.gopen(url) as stream:
            return stream.read()
    except OSError as error:
        raise ValueError(f"{url} cannot be read ({error}): it belongs to its shard, copy both") from error


class _Shard:
    """The list of a shard's samples, and the samples themselves once one is asked for."""

    def __init__(self, url: str) -> None:
        self.url = url
        try:
            told = json.loads(_read(list_url(url)))
            self.rows: list[dict[str, Any]] = told["samples"]
            self.recogniser: str | None = told.get("recogniser")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{list_url(url)} is no list of samples ({error}): run prepare again") from error

    @cached_property
    def people(self) -> dict[int, list[int]]:
        """{identity: its rows}."""
        people: dict[int, list[int]] = {}
        for row, told in enumerate(self.rows):
            people.setdefault(told["identity"], []).append(row)
        return people

    @cached_property
    def samples(self) -> dict[str, dict[str, bytes]]:
        try:
            return {sample["__key__"]: sample for sample in webdataset.tarfile_samples([{"url": self.url}])}
        except Exception as error:  # of tarfile, of pipes and of webdataset itself: they share no ancestor but this
            raise ValueError(f"shard {self.url} cannot be read ({error}): copy or prepare it again") from error

    def members(self, row: int) -> dict[str, bytes]:
        key = self.rows[row]["key"]
        if key not in self.samples:
            raise ValueError(f"shard {self.url} has no sample {key}, though its list has: copy or prepare it again")
        return self.samples[key]


class _Item:
    """One target on its way into a batch, and the rows of its references; none where it must be its own."""

    def __init__(self, shard: _Shard, row: int, references: list[int], epoch: int, size: tuple[int, int]) -> None:
        self.shard: _Shard | None = shard
        self.row, self.references, self.epoch, self.size = row, references, epoch, size
        self.key: str = shard.rows[row]["key"]
        self.kept: dict[int, dict[str, bytes]] = {}

    def fetch(self) -> None:
        """Take along what the sample needs, so that the shard itself can be forgotten."""
        if self.shard is not None:
            self.kept = {row: self.shard.members(row) for row in (self.row, *self.references)}
            self.shard = None

    def members(self, row: int) -> dict[str, bytes]:
        return self.kept[row] if self.shard is None else self.shard.members(row)

    def target(self) -> "_Picture":
        return _Picture(self.key, self.members(self.row))

    def reference(self, row: int) -> Reference:
        members = self.members(row)
        key = str(members["__key__"])
        arrays = _arrays(members, key)
        crop = _image(members, "crop.jpg", key, (CROP_SIZE, CROP_SIZE))
        side = arrays["crop_box"][2]
        points = resized(arrays["keypoints"], CROP_SIZE / side, arrays["crop_box"][:2])
        return arrays["embeddings"][0], crop, align(crop, points)


class _Picture:
    """A sample's picture, decoded and checked."""

    def __init__(self, key: str, members: dict[str, bytes]) -> None:
        self.arrays = _arrays(members, key)
        self.about: dict[str, Any] = json.loads(members["json"])
        self.picture = _image(members, "jpg" if "jpg" in members else "png", key)
        self.mask = _image(members, "mask.png", key, self.picture.shape[:2])


def _arrays(members: dict[str, bytes], key: str) -> dict[str, np.ndarray]:
    try:
        with np.load(io.BytesIO(members["npz"])) as file:
            arrays = dict(file)
    except Exception as error:  # KeyError, zip's and NumPy's own
        raise ValueError(f"the arrays of sample {key} cannot be read ({error}): prepare its shard again") from error
    for name, shape in ARRAYS.items():
        if name not in arrays or arrays[name].shape != shape or not np.isfinite(arrays[name]).all():
            found = arrays[name].shape if name in arrays else "missing"
            raise ValueError(f"{name} of sample {key} must be {shape} and finite, is {found}: prepare its shard again")
    return arrays


def _image(members: dict[str, bytes], kind: str, key: str, size: tuple[int, ...] | None = None) -> np.ndarray:
    way = cv2.IMREAD_GRAYSCALE if kind == "mask.png" else cv2.IMREAD_COLOR
    image = cv2.imdecode(np.frombuffer(members.get(kind, b"\0"), np.uint8), way)
    if image is None or (size is not None and image.shape[:2] != tuple(size)):
        found = "cannot be read" if image is None else f"is {image.shape[:2]}, not {tuple(size or ())}"
        raise ValueError(f"the .{kind} of sample {key} {found}: prepare its shard again")
    return image if way == cv2.IMREAD_GRAYSCALE else cv2.cvtColor(image, cv2.COLOR_BGR2RGB)

"""What `facesnap.training.prepare` wrote, read again: shards, the lists beside them, and their samples."""

import hashlib
import io
import json
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import braceexpand
import cv2
import numpy as np
import webdataset

from facesnap.faces import align
from facesnap.geometry import CROP_SIZE, resized
from facesnap.landmarks import NUM

Reference = tuple[np.ndarray, np.ndarray, np.ndarray]  # embedding (512,), crop (224, 224, 3), face (112, 112, 3)
ARRAYS = {  # of a sample's .npz
    "embeddings": (2, 512),
    "landmarks68": (68, 3),
    "landmarks": (NUM, 2),
    "box": (4,),
    "keypoints": (5, 2),
    "crop_box": (3,),
}


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


def fingerprint(urls: Sequence[str]) -> str:
    """A hash of the shards' names and lists.

    Raises ValueError where they are of several prepares: keys and numbers of people would mean two things.
    """
    told, prepares = hashlib.sha256(), set()
    for url in urls:
        data = _read(list_url(url))
        told.update(Path(url).name.encode() + data)
        prepares.add(Shard(url, data).prepared)
    if len(prepares) > 1:
        raise ValueError(
            f"the shards are of {len(prepares)} different runs of prepare, each of which numbers people and keys from "
            "0: prepare all photographs in one run"
        )
    return told.hexdigest()


def list_url(url: str) -> str:
    """Where the list of a shard's samples is."""
    return re.sub(r"\.tar\b", ".json", url)


def _read(url: str) -> bytes:
    try:
        with webdataset.gopen(url) as stream:
            return stream.read()
    except OSError as error:
        raise ValueError(f"{url} cannot be read ({error}): it belongs to its shard, copy both") from error


class Shard:
    """The list of a shard's samples (its bytes, if they were read), and the samples once one is asked for."""

    def __init__(self, url: str, data: bytes | None = None) -> None:
        self.url = url
        try:
            told = json.loads(_read(list_url(url)) if data is None else data)
            self.rows: list[dict[str, Any]] = told["samples"]
            self.recogniser: str | None = told.get("recogniser")
            self.prepared: str | None = told.get("prepared")
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


class Item:
    """One target on its way into a batch, and the rows of its references; none where it must be its own."""

    def __init__(self, shard: Shard, row: int, references: list[int], epoch: int, size: tuple[int, int]) -> None:
        self.shard: Shard | None = shard
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

    def target(self) -> "Picture":
        return Picture(self.key, self.members(self.row))

    def reference(self, row: int, worse: bool = False) -> Reference:
        """A photograph of the target's person; `worse`: covered, dark or blurred, if it was prepared so too. The
        aligned face, which the identity loss compares, is always the good one's."""
        members = self.members(row)
        key = str(members["__key__"])
        arrays = _arrays(members, key)
        crop = _image(members, "crop.jpg", key, (CROP_SIZE, CROP_SIZE))
        side = arrays["crop_box"][2]
        points = resized(arrays["keypoints"], CROP_SIZE / side, arrays["crop_box"][:2])
        face = align(crop, points)
        if worse and "worse_embedding" in arrays:
            crop = _image(members, "worse.jpg", key, (CROP_SIZE, CROP_SIZE))
            return arrays["worse_embedding"], crop, face
        return arrays["embeddings"][0], crop, face


class Picture:
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

"""Shards of rendered people, read as arrays.

A shard is a WebDataset tar as `python -m facesnap.synthetic` writes it. Each sample is three members that
share a key `{person:07d}_{k:02d}`: `.png` (RGB picture), `.mask.png` (uint8 labels) and `.json` (captions,
landmarks, parameters, pose). Each shard is decoded once into flat `.npy` files in a cache folder; pictures
are then memory-mapped, so that many training processes share one copy in the page cache.

The people of `EVALUATION_PEOPLE` are for evaluation: training data that holds one of them is refused.
"""

import json
import os
import shutil
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from facesnap.synthetic.people import EVALUATION_PEOPLE

BACKGROUND, SKIN, HAIR, CLOTHES, GLASSES, HAT = range(6)  # the labels in a mask

_NUMBERS = ("landmarks", "landmarks3d", "parameters", "pose", "person", "index")
_TEXTS = ("prompt", "rich", "style", "attributes", "seed")


class Rows:
    """Arrays that lie in several files, read as one along their first axis. Indexing copies.

    `rows[i]` is one row; `rows[2:9]` and `rows[[3, 1]]` are several, in the order asked for.
    """

    def __init__(self, parts: Sequence[np.ndarray]) -> None:
        self.parts = list(parts)
        self.starts = np.cumsum([0] + [len(part) for part in self.parts])
        self.shape = (int(self.starts[-1]), *self.parts[0].shape[1:])
        self.dtype = self.parts[0].dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: int | np.integer | slice | Sequence[int] | np.ndarray) -> np.ndarray:
        if isinstance(key, (int, np.integer)):
            row = int(key) + len(self) if key < 0 else int(key)
            if not 0 <= row < len(self):
                raise IndexError(f"row {int(key)} of {len(self)}")
            part = int(np.searchsorted(self.starts, row, side="right")) - 1
            return np.array(self.parts[part][row - self.starts[part]])
        rows = np.arange(len(self))[key]
        out = np.empty((len(rows), *self.shape[1:]), self.dtype)
        for i, row in enumerate(rows):
            part = int(np.searchsorted(self.starts, row, side="right")) - 1
            out[i] = self.parts[part][row - self.starts[part]]
        return out


@dataclass(frozen=True)
class People:
    """N pictures of rendered people, in the order of their shards' names.

    Lengths are pixels of the picture (landmarks: x right, y down) or units of the head frame (landmarks3d:
    x right, y up, z to the camera); angles are radians.
    """

    images: Rows  # (N, H, W, 3) uint8 RGB
    masks: Rows  # (N, H, W) uint8 labels
    landmarks: np.ndarray  # (N, 72, 2) float32
    landmarks3d: np.ndarray  # (N, 72, 3) float32
    person: np.ndarray  # (N,) int64
    index: np.ndarray  # (N,) int64, which of the person's pictures
    parameters: np.ndarray  # (N, P) float32
    names: list[str]  # of the P parameters
    pose: np.ndarray  # (N, Q) float32
    pose_names: list[str]  # yaw, pitch, roll, scale, tx, ty
    prompts: list[str]  # what the prompt controls
    rich: list[str]  # that, and the face
    styles: list[str]
    attributes: list[dict[str, Any]]
    seeds: list[int]
    version: str  # of the renderer

    def __len__(self) -> int:
        return len(self.person)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the pictures."""
        return self.images.shape[1], self.images.shape[2]

    def by_person(self) -> dict[int, np.ndarray]:
        """{person: the rows of that person's pictures}."""
        order = np.argsort(self.person, kind="stable")
        people, starts = np.unique(self.person[order], return_index=True)
        groups = np.split(order, starts[1:])
        return {int(person): rows for person, rows in zip(people, groups, strict=True)}


def load_people(folder: str | Path, cache_dir: str | Path | None = None, *, held_out: bool = False) -> People:
    """All pictures of the shards `*.tar` that lie in `folder` now; call again to pick up new ones.

    A shard that is still being written carries another suffix (its writer renames it when whole) and is not
    seen. `cache_dir` defaults to `folder/cache`. Raises FileNotFoundError without shards, and ValueError for
    people held out for evaluation (unless `held_out`), for shards of different renderers and for a sample
    that lacks a part.
    """
    folder = Path(folder)
    cache = Path(cache_dir) if cache_dir is not None else folder / "cache"
    shards = sorted(folder.glob("*.tar"))
    if not shards:
        raise FileNotFoundError(f"no shards (*.tar) in {folder}: render people with facesnap.synthetic")
    cached = [_cached(shard, cache) for shard in shards]

    texts: dict[str, list] = {key: [] for key in _TEXTS}
    numbers: dict[str, list[np.ndarray]] = {key: [] for key in _NUMBERS}
    heads = []
    for place in cached:
        told = json.loads((place / "texts.json").read_text(encoding="utf-8"))
        heads.append((told["version"], told["names"], told["pose_names"]))
        for key in _TEXTS:
            texts[key] += told[key]
        with np.load(place / "numbers.npz") as file:
            for key in _NUMBERS:
                numbers[key].append(file[key])
    for shard, head in zip(shards, heads, strict=True):
        if head != heads[0]:
            raise ValueError(
                f"{shard.name} was rendered by version {head[0]!r}, {shards[0].name} by {heads[0][0]!r}: "
                "keep the people of one renderer in one folder"
            )
    arrays = {key: np.concatenate(parts) for key, parts in numbers.items()}
    if not held_out:
        refused = np.unique([p for p in arrays["person"].tolist() if p in EVALUATION_PEOPLE])
        if len(refused):
            raise ValueError(
                f"{len(refused)} people here (first {int(refused[0])}) are held out for evaluation: "
                f"train on people outside {EVALUATION_PEOPLE.start}..{EVALUATION_PEOPLE.stop - 1}"
            )
    version, names, pose_names = heads[0]
    return People(
        images=Rows([np.load(place / "images.npy", mmap_mode="r") for place in cached]),
        masks=Rows([np.load(place / "masks.npy", mmap_mode="r") for place in cached]),
        **arrays,
        names=names,
        pose_names=pose_names,
        prompts=texts["prompt"],
        rich=texts["rich"],
        styles=texts["style"],
        attributes=texts["attributes"],
        seeds=texts["seed"],
        version=version,
    )


def draw_references(rng: np.random.Generator, groups: Iterable[np.ndarray], most: int) -> tuple[np.ndarray, np.ndarray]:
    """Up to `most` different rows out of each of N groups of rows: (N, most), and which of them are there (N, most)."""
    taken = [rng.permutation(group)[:most] for group in groups]
    chosen, mask = np.zeros((len(taken), most), int), np.zeros((len(taken), most), bool)
    for i, take in enumerate(taken):
        chosen[i, : len(take)], mask[i, : len(take)] = take, True
    return chosen, mask


def read_shard(shard: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(key, {"png": …, "mask.png": …, "json": …}) for each sample, in the order of the tar."""
    key = ""
    parts: dict[str, bytes] = {}
    with tarfile.open(shard) as tar:
        for member in tar:
            file = tar.extractfile(member)
            if file is None:
                continue
            name, _, kind = member.name.partition(".")
            if name != key and parts:
                yield key, parts
                parts = {}
            key = name
            parts[kind] = file.read()
    if parts:
        yield key, parts


def _cached(shard: Path, cache: Path) -> Path:
    """The folder of a shard's arrays, decoded now if it is not there. Several processes may ask at once."""
    stat = shard.stat()
    place = cache / f"{shard.stem}-{stat.st_size}-{stat.st_mtime_ns}"  # a shard written anew is decoded anew
    if place.is_dir():
        return place
    draft = cache / f"{place.name}.{os.getpid()}.tmp"
    draft.mkdir(parents=True)
    try:
        _decode(shard, draft)
        try:
            draft.rename(place)
        except OSError:
            if not place.is_dir():  # otherwise another process was first, and its copy is as good
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return place


def _decode(shard: Path, place: Path) -> None:
    images: list[np.ndarray] = []
    masks: list[Any] = []
    records: list[dict[str, Any]] = []
    for key, parts in read_shard(shard):
        for kind in ("png", "mask.png", "json"):
            if kind not in parts:
                raise ValueError(f"sample {key} of {shard.name} has no .{kind}: render the shard again")
        picture: Any = cv2.imdecode(np.frombuffer(parts["png"], np.uint8), cv2.IMREAD_COLOR)
        images.append(cv2.cvtColor(picture, cv2.COLOR_BGR2RGB))
        masks.append(cv2.imdecode(np.frombuffer(parts["mask.png"], np.uint8), cv2.IMREAD_GRAYSCALE))
        records.append(json.loads(parts["json"]))
    if not records:
        raise ValueError(f"{shard.name} holds no samples: render the shard again")
    names, pose_names = _flat(records[0]["parameters"])[0], list(records[0]["pose"])
    np.save(place / "images.npy", np.stack(images))
    np.save(place / "masks.npy", np.stack(masks))
    np.savez(
        place / "numbers.npz",
        landmarks=np.array([r["landmarks"] for r in records], np.float32),
        landmarks3d=np.array([r["landmarks3d"] for r in records], np.float32),
        parameters=np.array([_flat(r["parameters"])[1] for r in records], np.float32),
        pose=np.array([[r["pose"][name] for name in pose_names] for r in records], np.float32),
        person=np.array([r["person"] for r in records], np.int64),
        index=np.array([r["index"] for r in records], np.int64),
    )
    texts: dict[str, Any] = {key: [r[key] for r in records] for key in _TEXTS}
    texts |= {"names": names, "pose_names": pose_names, "version": str(records[0]["version"])}
    (place / "texts.json").write_text(json.dumps(texts), encoding="utf-8")


def _flat(parameters: dict[str, float | list[float]]) -> tuple[list[str], list[float]]:
    """(names, values), a colour `skin: [r, g, b]` as `skin_0`, `skin_1`, `skin_2`; in the order of names, so
    that the order of the members of a JSON object never matters."""
    names: list[str] = []
    values: list[float] = []
    for name, value in sorted(parameters.items()):
        several = isinstance(value, list)
        for i, number in enumerate(value if isinstance(value, list) else [value]):
            names.append(f"{name}_{i}" if several else name)
            values.append(float(number))
    return names, values

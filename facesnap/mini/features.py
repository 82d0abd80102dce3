"""What the diffusion stages read of every picture, computed once: latents, and the face as `faces.py` finds it.

The face's features come through the path a visitor's photo takes (detector, points, InsightFace's crop, ONNX), never
from exact landmarks, so training meets the same errors as use. Pictures without a found face serve as targets only.
"""

import copy
import multiprocessing
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import nn
from tqdm import tqdm

from facesnap.errors import InputError
from facesnap.faces import FaceAnalyser, align, five_points
from facesnap.heads import LinearHeadModel, from_pretrained
from facesnap.heads.regressor import ShapeRegressor
from facesnap.mini.augment import as_photograph, poor
from facesnap.mini.backgrounds import Backgrounds
from facesnap.mini.nets.vae import to_tensor
from facesnap.predictor import LandmarkPredictor
from facesnap.synthetic.dataset import HAIR, SKIN, People, load_people
from facesnap.synthetic.head import landmarks
from facesnap.synthetic.people import EXPRESSION, sample_person, sample_picture
from facesnap.synthetic.render import CAMERA

PART = 250  # pictures that a process looks at before it tells what it found


@dataclass(frozen=True)
class Features:
    """Aligned with the rows of `People`; a file each in a folder that is there whole or not at all."""

    found: np.ndarray  # (N,) bool: the analyser found a face
    embeddings: np.ndarray  # (N, 512) float32, recogniser A, raw
    crops: np.ndarray  # (N, 224, 224, 3) uint8
    fitted: np.ndarray  # (N, 72, 2) float32 pixels: the head model fitted to the landmarks that were found
    points68: np.ndarray  # (N, 68, 3) float32 pixels, as found

    @classmethod
    def load(cls, folder: Path) -> "Features":
        """Memory-mapped: the crops are gigabytes, and only the face encoder looks at them."""
        return cls(**{name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in cls.__dataclass_fields__})


def _one_core(cores: list[int]) -> None:
    """Pin a worker, so that ONNX Runtime starts one thread in it: more would only wait for each other, spinning."""
    worker = multiprocessing.current_process()._identity[-1]
    os.sched_setaffinity(0, {cores[worker % len(cores)]})


def look_at(job: tuple[Path, Path, Path, np.ndarray, str]) -> list[tuple[int, Any]]:
    data, pack, head, rows, look = job
    cv2.setNumThreads(1)
    people = load_people(data, held_out=True)
    analyser = FaceAnalyser(pack)
    predictor = LandmarkPredictor(from_pretrained(head))
    backgrounds = None
    if look == "photographed":
        backgrounds = Backgrounds(np.random.default_rng(0), people.size[0], people.images)
    out: list[tuple[int, Any]] = []
    for row in rows:
        image = people.images[int(row)]
        if backgrounds is not None:
            rng = np.random.default_rng((1, int(row)))
            image = as_photograph(image, people.masks[int(row)], backgrounds, rng)
        elif look == "poor":
            image = poor(image, people.landmarks[row], f"{people.person[row]}/{people.index[row]}")
        try:
            face = analyser.analyse(image)
        except InputError:
            out.append((int(row), None))
            continue
        fit = predictor.reconstruct(face)[0]
        points = predictor.predict(fit, fit, people.size)
        out.append((int(row), (face.embedding, face.crop, points, face.landmarks)))
    return out


def analyse_people(
    data: Path,
    pack: Path,
    head: Path,
    folder: Path,
    count: int,
    *,
    rows: np.ndarray | None = None,
    look: str = "rendered",
    workers: int = 1,
) -> Features:
    """Run every one of `count` pictures of the shards in `data` through the face pack and the head model, and keep what
    was found in `folder`; where that is there already, only read it.

    Of all but `rows`, where given, nothing is found. look: "rendered", as the pictures are; "photographed" changes each
    as a camera might have, "poor" makes its face hard to read. What was killed goes on from the parts that were done.
    """
    if folder.exists():
        return Features.load(folder)
    rows = np.arange(count) if rows is None else rows
    kinds: dict[str, tuple[Any, tuple[int, ...]]] = {  # as in Features
        "found": (bool, ()), "embeddings": (np.float32, (512,)), "crops": (np.uint8, (224, 224, 3)),
        "fitted": (np.float32, (72, 2)), "points68": (np.float32, (68, 3)),
    }  # fmt: skip
    draft = folder.with_suffix(".part")
    draft.mkdir(parents=True, exist_ok=True)
    done = draft / "done.txt"  # the rows that were looked at
    if not done.exists():
        for name, (kind, shape) in kinds.items():
            np.lib.format.open_memmap(draft / f"{name}.npy", "w+", kind, (count, *shape))
        done.touch()
    out = {name: np.load(draft / f"{name}.npy", mmap_mode="r+") for name in kinds}
    left = np.setdiff1d(rows, np.array(done.read_text().split(), int))
    parts = np.split(left, range(PART, len(left), PART))
    jobs = [(data, pack, head, part, look) for part in parts if len(part)]

    def results() -> Iterator[list]:
        if workers == 1:
            yield from map(look_at, jobs)
        else:
            cores = sorted(os.sched_getaffinity(0))
            with multiprocessing.get_context("spawn").Pool(workers, _one_core, (cores,)) as pool:
                yield from pool.imap_unordered(look_at, jobs)

    for part in tqdm(results(), total=len(jobs), unit="part"):
        for row, told in part:
            if told is not None:
                for name, values in zip(out, (True, *told), strict=True):
                    out[name][row] = values
        with done.open("a") as file:
            file.write("".join(f"{row}\n" for row, _ in part))
    done.unlink()
    draft.rename(folder)
    return Features.load(folder)


@torch.no_grad()
def latents_of(vae: AutoencoderKL, people: People, *, device: str = "cpu", batch_size: int = 16) -> np.ndarray:
    """Means of the latents (N, C, h, w), float16."""
    # bfloat16 with channels last is nearly twice as fast as autocast on a CPU, and off by 0.4 % of a deviation
    vae = copy.deepcopy(vae).to(device, torch.bfloat16).to(memory_format=torch.channels_last)
    starts = tqdm(range(0, len(people), batch_size), unit="batch")
    return np.concatenate([encoded(vae, people.images[k : k + batch_size]).astype(np.float16) for k in starts])


@torch.no_grad()
def encoded(vae: AutoencoderKL, images: np.ndarray, batch_size: int = 16) -> np.ndarray:
    """Means of the latents (N, C, h, w) float32 of pictures (N, H, W, 3) uint8."""
    out = []
    for start in range(0, len(images), batch_size):
        pixels = to_tensor(images[start : start + batch_size])
        pixels = pixels.to(vae.device, vae.dtype).contiguous(memory_format=torch.channels_last)
        out.append(vae.encode(pixels).latent_dist.mean.float().cpu().numpy())
    return np.concatenate(out)


def head_masks(people: People, grid: int) -> np.ndarray:
    """Share of each latent cell that is face or hair (N, 1, grid, grid), float16: the M of equation 3."""
    out = np.empty((len(people), 1, grid, grid), np.float16)
    for row in range(len(people)):
        labels = people.masks[row]
        head = ((labels == SKIN) | (labels == HAIR)).astype(np.float32)
        out[row, 0] = cv2.resize(head, (grid, grid), interpolation=cv2.INTER_AREA)
    return out


def neutral_landmarks(seed: int) -> np.ndarray:
    """The 72 landmarks (72, 3) of a rendered person without expression, in the head's frame."""
    p = sample_person(seed).parameters.copy()
    p["eyelids"] = 1.0
    return landmarks(p[()])


def shape_regressor(model: LinearHeadModel, features: Features, people: People) -> ShapeRegressor:
    """What the pack's embeddings tell of `model`'s identity coefficients; `people` must be unknown to the pack."""
    basis = model.identity_basis.reshape(model.num_identity, -1)
    known = {
        int(seed): np.linalg.lstsq(basis.T, (neutral_landmarks(int(seed)) - model.mean).ravel(), rcond=None)[0]
        for seed in np.unique(people.person)
    }
    rows = np.flatnonzero(features.found)
    identities = np.stack([known[int(seed)] for seed in people.person[rows]])
    return ShapeRegressor.fit(features.embeddings[rows], identities, people.person[rows])


def make_head_model(people: int = 1500, *, identities: int = 40, first: int = 50_000) -> LinearHeadModel:
    """The mini's own linear head: principal components of the 72 landmarks of rendered heads.

    Expression offsets are taken over many people, so that the basis is what smiles have in common.
    """
    neutral, offsets, weights = [], [], []
    rng = np.random.default_rng(0)
    for seed in range(first, first + people):
        rest = neutral_landmarks(seed)
        neutral.append(rest)
        person = sample_person(seed)
        p = person.parameters.copy()
        picture = sample_picture(person, int(rng.integers(100)))
        for name in EXPRESSION:
            p[name] = picture.parameters[name]
        offsets.append(landmarks(p[()]) - rest)
        weights.append([p[name] - (name == "eyelids") for name in EXPRESSION])
    return LinearHeadModel.from_samples(
        np.stack(neutral),
        np.stack(offsets),
        num_identity=identities,
        expression_weights=np.array(weights),
        expression_names=EXPRESSION,
        distance=CAMERA,
        name="rendered people",
    )


def phi_of(recogniser: nn.Module, people: People, features: Features, *, few: int = 32) -> np.ndarray:
    """φ's unit embedding of every picture in which the analyser found a face (N, 512); zeros for the others."""
    out = np.zeros((len(people), 512), np.float32)
    rows = np.flatnonzero(features.found)
    for start in range(0, len(rows), few):
        some = rows[start : start + few]
        crops = [align(people.images[int(row)], five_points(features.points68[row])) for row in some]
        pixels = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float().sub(127.5).div(127.5)
        with torch.no_grad():
            out[some] = nn.functional.normalize(recogniser(pixels).float()).numpy()
    return out

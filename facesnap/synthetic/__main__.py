"""Render people into shards: `python -m facesnap.synthetic --out DIR --people N --per-person K --size 256 --seed S`.

A shard is a WebDataset tar of fifty people. Each picture is `{person:07d}_{index:02d}` with `.png` (RGB), `.mask.png`
(labels, see render.LABELS) and `.json` (captions, landmarks, attributes, every parameter). Shards that are already
there are kept, so a run that was stopped goes on where it was.
"""

import argparse
import io
import json
import multiprocessing
import os
import tarfile
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from .captions import captions
from .people import EVALUATION_PEOPLE, VERSION, Picture, sample_person, sample_picture
from .render import Rendered, render

PEOPLE_PER_SHARD = 50


def record(picture: Picture, rendered: Rendered, index: int) -> dict:
    """What is written beside a picture; see the module docstring."""
    p = picture.parameters[()]
    prompt, rich = captions(picture, index)
    return {
        "person": picture.person.seed,
        "index": index,
        "version": VERSION,
        "prompt": prompt,
        "rich": rich,
        "style": picture.style,
        "attributes": {**picture.person.attributes, **picture.attributes, "style": picture.style},
        "pose": {
            "yaw": p["yaw"], "pitch": p["pitch"], "roll": p["roll"],
            "scale": p["scale"], "tx": p["shift_x"], "ty": p["shift_y"],
        },
        "parameters": {n: np.round(p[n], 5).tolist() for n in p.dtype.names},
        "landmarks": np.round(rendered.landmarks, 3).tolist(),
        "landmarks3d": np.round(rendered.landmarks3d, 4).tolist(),
    }  # fmt: skip


def png(image: np.ndarray) -> bytes:
    """Fast PNG of an RGB or a single-channel picture."""
    if image.ndim == 3:
        image = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    return cv2.imencode(".png", image, [cv2.IMWRITE_PNG_COMPRESSION, 1])[1].tobytes()


def write_shard(job: tuple) -> int:
    """Render people [start, start + count) into one tar; it appears under its name only when it is whole."""
    path, start, count, per_person, size = job
    if path.exists():
        return count
    part = path.with_suffix(".part")
    with tarfile.open(part, "w") as tar:
        for seed in range(start, start + count):
            person = sample_person(seed)
            for index in range(per_person):
                picture = sample_picture(person, index)
                rendered = render(picture, size)
                files = {
                    "png": png(rendered.image),
                    "mask.png": png(rendered.mask),
                    "json": json.dumps(record(picture, rendered, index)).encode(),
                }
                for suffix, data in files.items():
                    info = tarfile.TarInfo(f"{seed:07d}_{index:02d}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    os.replace(part, path)
    return count


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m facesnap.synthetic", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the shards")
    parser.add_argument("--people", type=int, default=1000)
    parser.add_argument("--per-person", type=int, default=5)
    parser.add_argument("--size", type=int, default=256, help="side of the pictures in pixels")
    parser.add_argument(
        "--seed", type=int, default=0,
        help=f"seed of the first person; {EVALUATION_PEOPLE.start} to {EVALUATION_PEOPLE.stop - 1} are held out",
    )  # fmt: skip
    parser.add_argument("--workers", type=int, default=1, help="processes")
    args = parser.parse_args(argv)
    if args.people < 1 or args.per_person < 1 or args.size < 32 or args.seed < 0:
        parser.error("--people and --per-person must be at least 1, --size at least 32, --seed at least 0")
    args.out.mkdir(parents=True, exist_ok=True)
    jobs = []
    for start in range(args.seed, args.seed + args.people, PEOPLE_PER_SHARD):
        count = min(PEOPLE_PER_SHARD, args.seed + args.people - start)
        name = f"people-{start:07d}-{count}x{args.per_person}-{args.size}-v{VERSION}.tar"
        jobs.append((args.out / name, start, count, args.per_person, args.size))
    with tqdm(total=args.people, unit="person", smoothing=0.05) as bar:
        if args.workers > 1:
            with multiprocessing.get_context("spawn").Pool(args.workers) as pool:
                for done in pool.imap_unordered(write_shard, jobs):
                    bar.update(done)
        else:
            for job in jobs:
                bar.update(write_shard(job))


if __name__ == "__main__":
    main()

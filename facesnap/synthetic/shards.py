"""Writing rendered people as WebDataset shards.

A shard is a tar of fifty people. Each picture is `{person:07d}_{index:02d}` with `.png` (RGB), `.mask.png` (labels, see
render.LABELS) and `.json` (captions, landmarks, attributes, every parameter).
"""

import io
import json
import os
import tarfile

import cv2
import numpy as np

from facesnap.synthetic.captions import captions
from facesnap.synthetic.parameters import PARAMETERS, VERSION, Picture
from facesnap.synthetic.people import sample_person, sample_picture
from facesnap.synthetic.render import Rendered, render

PEOPLE_PER_SHARD = 50


def rounded(p: np.void | np.ndarray) -> dict[str, float | list[float]]:
    """Every field of a record of PARAMETERS to five digits, as JSON wants it."""
    values = np.round(np.frombuffer(p.tobytes()), 5).tolist()
    fields = {name: (kind.shape, offset // 8) for name, (kind, offset, *_) in (PARAMETERS.fields or {}).items()}
    return {name: values[k : k + 3] if shape else values[k] for name, (shape, k) in fields.items()}


def record(picture: Picture, rendered: Rendered, index: int) -> dict:
    """What is written beside a picture; see the module docstring."""
    p = picture.parameters[()]
    prompt, rich = captions(picture, index)
    return {
        "person": picture.person.seed,
        "index": index,
        "seed": picture.person.seed,
        "version": VERSION,
        "prompt": prompt,
        "rich": rich,
        "style": picture.style,
        "attributes": {**picture.person.attributes, **picture.attributes, "style": picture.style},
        "pose": {
            "yaw": p["yaw"], "pitch": p["pitch"], "roll": p["roll"],
            "scale": p["scale"], "tx": p["shift_x"], "ty": p["shift_y"],
        },
        "parameters": rounded(p),
        "landmarks": np.round(rendered.landmarks, 3).tolist(),
        "landmarks3d": np.round(rendered.landmarks3d, 4).tolist(),
    }  # fmt: skip


def png(image: np.ndarray) -> bytes:
    """Fast PNG of an RGB or a single-channel picture."""
    if image.ndim == 3:
        image = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    return cv2.imencode(".png", image)[1].tobytes()  # without options it is fastest, for a tenth more bytes


def write_shard(job: tuple) -> int:
    """Render people [start, start + count) into one tar; it appears under its name only when it is whole."""
    path, start, count, per_person, size, wide, varied = job
    if path.exists():
        return count
    part = path.with_suffix(".part")
    with tarfile.open(part, "w") as tar:
        for seed in range(start, start + count):
            person = sample_person(seed, varied=varied)
            for index in range(per_person):
                picture = sample_picture(person, index, wide=wide)
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

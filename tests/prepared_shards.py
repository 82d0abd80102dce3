"""What `facesnap.training.prepare` wrote; helpers of several tests."""

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from facesnap.synthetic.dataset import read_shard


def samples_of(out: Path) -> dict[str, dict]:
    """{source and face: sample}, decoded; the order of the shards."""
    samples = {}
    for shard in sorted(out.glob("shard-*.tar")):
        for key, parts in read_shard(shard):
            about = json.loads(parts["json"])
            with np.load(io.BytesIO(parts["npz"])) as arrays:
                sample = {"shard": shard.name, "about": about} | dict(arrays)
            for kind in ("jpg", "png", "mask.png", "crop.jpg"):
                if kind in parts:
                    sample[kind] = np.array(Image.open(io.BytesIO(parts[kind])))
            assert about["key"] == key
            samples[f"{about['source']}:{about['face']}"] = sample
    return samples


def report_of(out: Path) -> dict:
    return json.loads((out / "report.json").read_text())

"""Batches of a reader of shards, taken and compared; helpers of several tests."""

import io
import json

import numpy as np
import pytest
import torch
import webdataset

from facesnap.synthetic.dataset import read_shard
from facesnap.training.photos import PhotoConfig, photo_loader

SMALL = PhotoConfig(resolution=128, batch_size=2)


def take(dataset, number, workers=0):
    loader = iter(photo_loader(dataset, workers))
    return [next(loader) for _ in range(number)]


def equal(a, b):
    return a.keys() == b.keys() and all(
        torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a
    )


@pytest.fixture(scope="module")
def stored(prepared):
    """{key: the members of its sample} over all shards."""
    return {key: parts for shard in sorted(prepared.out.glob("*.tar")) for key, parts in read_shard(shard)}


def arrays_of(parts):
    with np.load(io.BytesIO(parts["npz"])) as arrays:
        return dict(arrays)


def rewrite(source, target, change):
    """Copy shards, each sample as `change(key, members)` returns it; None leaves it out."""
    for shard in sorted(source.glob("shard-*.tar")):
        listed = json.loads(shard.with_suffix(".json").read_text())["samples"]
        rows = []
        with webdataset.TarWriter(str(target / shard.name), encoder=False) as tar:
            for row, (key, parts) in zip(listed, read_shard(shard), strict=True):
                changed = change(key, dict(parts))
                if changed is not None:
                    tar.write({"__key__": key} | changed)
                    rows.append(row | {"size": json.loads(changed["json"])["size"]})
        (target / shard.name).with_suffix(".json").write_text(json.dumps({"samples": rows}))

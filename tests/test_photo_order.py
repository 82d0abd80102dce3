"""The order in which photographs are read, and what is no shard, sample or option."""

import io
import json
import shutil

import cv2
import numpy as np
import pytest
import webdataset
from shard_batches import SMALL, arrays_of, equal, rewrite, take
from torch.utils.data import DataLoader

from facesnap.training import shards as shard_files
from facesnap.training.photos import PhotoConfig, PhotoShards, photo_loader

# order --------------------------------------------------------------------------------------------------


def test_every_picture_comes_once_an_epoch_in_a_new_order(prepared, stored):
    batches = take(PhotoShards(prepared.out, PhotoConfig(resolution=64, batch_size=3)), 6)
    keys = [key for batch in batches for key in batch["keys"]]
    assert sorted(keys[:9]) == sorted(keys[9:]) == sorted(stored)
    assert keys[:9] != keys[9:]
    other = take(PhotoShards(prepared.out, PhotoConfig(resolution=64, batch_size=3, seed=1)), 3)
    assert [key for batch in other for key in batch["keys"]] != keys[:9]


@pytest.mark.parametrize(("world_size", "workers"), [(2, 0), (3, 0), (4, 0), (2, 2)])
def test_ranks_share_an_epoch(prepared, stored, world_size, workers):
    """With fewer shards (3) than readers (4) they share the pictures of each."""
    keys = []
    for rank in range(world_size):
        config = PhotoConfig(resolution=64, batch_size=1)
        dataset = PhotoShards(prepared.out, config, rank=rank, world_size=world_size)
        for batch in take(dataset, 9, workers):
            keys += [key for key, epoch in zip(batch["keys"], batch["epochs"], strict=True) if epoch == 0]
    assert sorted(keys) == sorted(stored)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_goes_on_where_it_was(prepared, workers):
    config = PhotoConfig(resolution=64, batch_size=2)
    batches = take(PhotoShards(prepared.out, config), 9, workers)
    for position in (1, 6):
        later = take(PhotoShards(prepared.out, config, position=position), 9 - position, workers)
        assert all(equal(a, b) for a, b in zip(later, batches[position:], strict=True))


def test_what_was_had_before_is_not_opened_again(prepared, monkeypatch):
    opened = []
    tarfile_samples = webdataset.tarfile_samples
    monkeypatch.setattr(
        shard_files.webdataset, "tarfile_samples", lambda src: opened.append(src) or tarfile_samples(src)
    )
    dataset = PhotoShards(prepared.out, PhotoConfig(resolution=64, batch_size=3), position=2000)
    (batch,) = take(dataset, 1)
    assert len(opened) == 1 and min(batch["epochs"]) == 2000 // 3


def test_fingerprint_and_number(prepared, tmp_path):
    dataset = PhotoShards(prepared.out, SMALL)
    assert dataset.num_samples == 9
    rewrite(prepared.out, tmp_path, lambda key, parts: None if key.endswith("1") else parts)
    other = PhotoShards(tmp_path, SMALL)
    assert other.num_samples == 6 and other.fingerprint != dataset.fingerprint
    assert PhotoShards(str(prepared.out / "shard-{000000..000002}.tar"), SMALL).fingerprint == dataset.fingerprint
    assert PhotoShards(f"pipe:cat {prepared.out}/shard-000000.tar", SMALL).num_samples == 3


def test_shards_stream_through_pipes(prepared):
    pipe = f"pipe:cat {prepared.out}/shard-{{000000..000002}}.tar"
    assert equal(take(PhotoShards(pipe, SMALL), 1)[0], take(PhotoShards(prepared.out, SMALL), 1)[0])


def test_the_loader_hands_out_whole_batches(prepared):
    loader = photo_loader(PhotoShards(prepared.out, SMALL))
    assert isinstance(loader, DataLoader) and next(iter(loader))["pixels"].shape[0] == 2


# bad input ----------------------------------------------------------------------------------------------


def test_no_shards_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no shards \(shard-\*.tar\)"):
        PhotoShards(tmp_path, SMALL)
    with pytest.raises(FileNotFoundError, match="there is no shard .*000001.tar"):
        PhotoShards(str(tmp_path / "shard-{000001..000002}.tar"), SMALL)


def test_shards_of_two_prepares_do_not_mix(prepared, tmp_path):
    for shard in sorted(prepared.out.glob("shard-*")):
        shutil.copy(shard, tmp_path)
    assert PhotoShards(tmp_path, SMALL).fingerprint == PhotoShards(prepared.out, SMALL).fingerprint
    file = tmp_path / "shard-000001.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"prepared": "another"}))
    with pytest.raises(ValueError, match="of 2 different runs of prepare"):
        PhotoShards(tmp_path, SMALL).fingerprint  # noqa: B018


def test_more_readers_than_pictures(prepared):
    with pytest.raises(ValueError, match="reader 39 of 40 has no pictures"):
        take(PhotoShards(prepared.out, SMALL, rank=39, world_size=40), 1)


def test_shards_that_cannot_be_read(prepared, tmp_path):
    rewrite(prepared.out, tmp_path, lambda key, parts: parts)
    whole = (tmp_path / "shard-000001.tar").read_bytes()
    (tmp_path / "shard-000001.tar").write_bytes(whole[: len(whole) // 3])
    with pytest.raises(ValueError, match="shard .*shard-000001.tar (cannot be read|has no sample)"):
        take(PhotoShards(tmp_path, SMALL), 9)
    (tmp_path / "shard-000001.json").unlink()
    with pytest.raises(ValueError, match="shard-000001.json cannot be read"):
        take(PhotoShards(tmp_path, SMALL), 9)
    (tmp_path / "shard-000001.json").write_text("[]")
    with pytest.raises(ValueError, match="shard-000001.json is no list of samples"):
        take(PhotoShards(tmp_path, SMALL), 9)


def damage(kind):
    def change(key, parts):
        arrays = arrays_of(parts)
        if kind == "landmarks":
            arrays["landmarks"] = arrays["landmarks"][:68]
        elif kind == "embeddings":
            arrays["embeddings"][0, 3] = np.nan
        elif kind == "mask":
            parts["mask.png"] = cv2.imencode(".png", np.zeros((10, 10), np.uint8))[1].tobytes()
        elif kind == "picture":
            parts["jpg"] = parts["jpg"][:20]
        if kind == "npz":
            parts["npz"] = b"nothing"
        else:
            file = io.BytesIO()
            np.savez(file, **arrays)
            parts["npz"] = file.getvalue()
        return parts

    return change


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("landmarks", r"landmarks of sample \d{8}_\d{4} must be \(72, 2\) and finite, is \(68, 2\)"),
        ("embeddings", r"embeddings of sample \d{8}_\d{4} must be \(2, 512\) and finite"),
        ("mask", r"the .mask.png of sample \d{8}_\d{4} is \(10, 10\), not"),
        ("picture", r"the .jpg of sample \d{8}_\d{4} cannot be read"),
        ("npz", r"the arrays of sample \d{8}_\d{4} cannot be read"),
    ],
)
def test_wrong_shapes_and_damage_name_the_sample(prepared, tmp_path, kind, message):
    rewrite(prepared.out, tmp_path, damage(kind))
    with pytest.raises(ValueError, match=message):
        take(PhotoShards(tmp_path, SMALL), 1)


@pytest.mark.parametrize(
    "options",
    [{"resolution": 1000}, {"resolution": 0}, {"batch_size": 0}, {"max_references": 5}, {"drop_text": 1.5},
     {"fitted_share": -0.1}],
)  # fmt: skip
def test_impossible_options(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}.*{next(iter(options.values()))}"):
        PhotoConfig(**options)


def test_impossible_places(prepared):
    for options in ({"rank": 2, "world_size": 2}, {"position": -1}):
        with pytest.raises(ValueError, match="rank"):
            PhotoShards(prepared.out, SMALL, **options)

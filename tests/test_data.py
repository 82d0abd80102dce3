"""Shards: what is read, what is refused, what is not seen yet."""

import io
import json
import tarfile
from pathlib import Path

import cv2
import numpy as np
import pytest

from facesnap.synthetic.dataset import Rows, draw_references, load_people


def write_shard(path: Path, people: list[int], per_person: int = 2, version="1", skip="") -> None:
    """A shard of 8 × 8 pictures whose red channel is person % 200 + index."""
    with tarfile.open(path, "w") as tar:
        for person in people:
            for k in range(per_person):
                image = np.zeros((8, 8, 3), np.uint8)
                image[..., 0] = person % 200 + k
                mask = np.full((8, 8), k, np.uint8)
                record = {
                    "person": person, "index": k, "seed": 7, "prompt": f"p{person}", "rich": f"r{person}",
                    "style": "photo", "parameters": {"smile": 0.5, "skin": [0.1, 0.2, 0.3]},
                    "landmarks": [[k, person % 200]] * 72, "landmarks3d": [[0, 0, 1]] * 72,
                    "attributes": {"hat": "none"}, "version": version,
                    "pose": {"yaw": 0.1, "pitch": 0, "roll": 0, "scale": 1, "tx": 0, "ty": 0},
                }  # fmt: skip
                members = {
                    "png": cv2.imencode(".png", image[..., ::-1])[1].tobytes(),
                    "mask.png": cv2.imencode(".png", mask)[1].tobytes(),
                    "json": json.dumps(record).encode(),
                }
                for kind, data in members.items():
                    if kind == skip:
                        continue
                    info = tarfile.TarInfo(f"{person:07d}_{k:02d}.{kind}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))


def test_samples_come_back_as_written(tmp_path):
    write_shard(tmp_path / "000.tar", [3, 4])
    write_shard(tmp_path / "001.tar", [9])
    people = load_people(tmp_path, tmp_path / "cache")
    assert len(people) == 6 and people.size == (8, 8)
    assert people.person.tolist() == [3, 3, 4, 4, 9, 9]
    assert people.images[:].shape == (6, 8, 8, 3)
    assert people.images[5][0, 0].tolist() == [10, 0, 0]  # RGB, not BGR
    assert people.images[[5, 0]][:, 0, 0, 0].tolist() == [10, 3]
    assert people.masks[1].max() == 1
    assert people.landmarks[4, 0].tolist() == [0, 9]
    assert people.names == ["skin_0", "skin_1", "skin_2", "smile"]
    assert people.parameters[0].tolist() == pytest.approx([0.1, 0.2, 0.3, 0.5])
    assert {p: r.tolist() for p, r in people.by_person().items()} == {3: [0, 1], 4: [2, 3], 9: [4, 5]}
    assert people.prompts[0] == "p3" and people.rich[5] == "r9" and people.attributes[2] == {"hat": "none"}


def test_shards_still_being_written_are_not_seen_and_new_ones_are_picked_up(tmp_path):
    write_shard(tmp_path / "000.tar", [1])
    (tmp_path / "001.tar.tmp").write_bytes(b"half a shard")
    assert len(load_people(tmp_path)) == 2
    (tmp_path / "001.tar.tmp").unlink()
    write_shard(tmp_path / "001.tar", [2])
    assert load_people(tmp_path).person.tolist() == [1, 1, 2, 2]


def test_a_shard_written_anew_is_read_anew(tmp_path):
    write_shard(tmp_path / "000.tar", [1])
    assert load_people(tmp_path).person[0] == 1
    write_shard(tmp_path / "000.tar", [5, 6])
    assert load_people(tmp_path).person.tolist() == [5, 5, 6, 6]


@pytest.mark.parametrize("person", [1_000_000, 1_009_999])
def test_held_out_people_are_refused(tmp_path, person):
    write_shard(tmp_path / "000.tar", [1, person])
    with pytest.raises(ValueError, match=f"first {person}.*held out"):
        load_people(tmp_path)
    assert len(load_people(tmp_path, held_out=True)) == 4


def test_people_beside_the_held_out_range_are_not_refused(tmp_path):
    write_shard(tmp_path / "000.tar", [999_999, 1_010_000])
    assert len(load_people(tmp_path)) == 4


def test_damage_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no shards"):
        load_people(tmp_path)
    write_shard(tmp_path / "000.tar", [1], skip="mask.png")
    with pytest.raises(ValueError, match="0000001_00 of 000.tar has no .mask.png"):
        load_people(tmp_path)


def test_two_renderers_do_not_mix(tmp_path):
    write_shard(tmp_path / "000.tar", [1])
    write_shard(tmp_path / "001.tar", [2], version="2")
    with pytest.raises(ValueError, match="001.tar was rendered by version"):
        load_people(tmp_path)


def test_rows_read_like_one_array():
    whole = np.arange(30).reshape(10, 3)
    rows = Rows([whole[:4], whole[4:5], whole[5:]])
    assert rows.shape == whole.shape and len(rows) == 10
    for key in (0, -1, slice(2, 8), slice(None, None, -2), [7, 0, 7], np.arange(10) > 5):
        assert np.array_equal(rows[key], whole[key])
    with pytest.raises(IndexError):
        rows[10]


def test_references_are_different_rows_of_their_own_group():
    groups = [np.array([4, 7, 9]), np.array([1])]
    for seed in range(9):
        chosen, there = draw_references(np.random.default_rng(seed), groups, 2)
        assert there.tolist() == [[True, True], [True, False]]
        assert set(chosen[0]) < {4, 7, 9} and len(set(chosen[0])) == 2 and chosen[1, 0] == 1

"""Photographs → training shards, on rendered people and on photographs, read by the mini's face pack."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import photo_folder
import pytest
import skimage.data
from insightface.data import get_image
from PIL import Image
from prepared_shards import report_of, samples_of

from facesnap.landmarks import eye_distance
from facesnap.synthetic.dataset import GLASSES, HAIR, HAT, SKIN, read_shard
from facesnap.training.prepare import __main__ as prepare
from facesnap.training.prepare.engines import start

# rendered people ----------------------------------------------------------------------------------------


def test_every_photograph_becomes_a_whole_sample(prepared):
    samples = samples_of(prepared.out)
    assert sorted(samples) == sorted(f"{name}:0" for name in prepared.rendered)
    for name, sample in samples.items():
        about = sample["about"]
        assert sample["jpg"].shape == (*about["size"], 3) and sample["jpg"].dtype == np.uint8
        assert sample["mask.png"].shape == tuple(about["size"])
        assert set(np.unique(sample["mask.png"])) == {0, 255}
        assert sample["crop.jpg"].shape == (224, 224, 3)
        assert sample["embeddings"].shape == (2, 512) and not np.allclose(np.linalg.norm(sample["embeddings"][0]), 1)
        assert sample["landmarks68"].shape == (68, 3)
        assert sample["landmarks"].shape == sample["fitted"].shape == (72, 2)
        person, picture = name.removesuffix(".png:0").split("/")
        assert about["caption"] == f"person {person}, picture {picture}"
        assert about["original_size"] == about["size"] == [256, 256]
    report = report_of(prepared.out)
    assert report["photos"] == report["faces"] == report["samples"] == 9 and report["shards"] == 3
    assert not any(report["rejected"].values())


def test_landmarks_are_where_the_renderer_drew_them(prepared):
    for name, sample in samples_of(prepared.out).items():
        true = prepared.rendered[name.removesuffix(":0")].landmarks
        for points in (sample["landmarks"], sample["fitted"]):
            assert np.linalg.norm(points - true, axis=1).mean() < 0.1 * eye_distance(true)


def test_masks_are_heads_with_their_hair_and_no_boxes(prepared):
    overlaps = []
    for name, sample in samples_of(prepared.out).items():
        labels = prepared.rendered[name.removesuffix(":0")].mask
        known = labels != HAT  # for hair is taken what covers it, where no face parser tells them apart
        head, mask = np.isin(labels, (SKIN, HAIR, GLASSES)), sample["mask.png"] > 0
        overlaps.append((head & mask & known).sum() / ((head | mask) & known).sum())
        _, _, width, height = cv2.boundingRect(sample["mask.png"])
        assert mask.sum() < 0.9 * width * height
        assert mask[tuple(sample["keypoints"].round().astype(int).T[::-1])].all()
    assert np.median(overlaps) > 0.85 and min(overlaps) > 0.6  # the least is of hair to the shoulders


def test_people_of_a_folder_stay_together(prepared):
    samples = samples_of(prepared.out)
    people = {name: (s["about"]["identity"], s["shard"]) for name, s in samples.items()}
    for person in {name.split("/")[0] for name in samples}:
        assert len({place for name, place in people.items() if name.startswith(person)}) == 1
    assert len({identity for identity, _ in people.values()}) == 3
    for shard in prepared.out.glob("shard-*.tar"):
        listed = json.loads(shard.with_suffix(".json").read_text())["samples"]
        assert [row["key"] for row in listed] == [key for key, _ in read_shard(shard)]


def test_a_killed_run_goes_on_with_nothing_twice_and_nothing_lost(prepared, tmp_path):
    words = [str(prepared.photos), str(tmp_path / "out"), *photo_folder.OPTIONS, *photo_folder.SHARDS]
    words += ["--photos-per-part", "1"]
    command = [sys.executable, "-m", "facesnap.training.prepare", *words, "--keep-work", "--workers", "2"]
    running = subprocess.Popen(command, cwd=Path(prepare.__file__).parents[3], start_new_session=True)
    work = tmp_path / "out" / "work"
    try:
        while not list(work.glob("part-*.json")):
            assert running.poll() is None, "it ended before it could be killed"
            time.sleep(0.05)
    finally:
        os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    done = {part: part.stat().st_mtime_ns for part in work.glob("part-*.json")}
    assert done
    prepare.main([*words, "--keep-work"])
    assert {part: part.stat().st_mtime_ns for part in done} == done
    for name in ("shard-000000.tar", "shard-000001.tar", "shard-000002.tar", "shard-000002.json"):
        assert (tmp_path / "out" / name).read_bytes() == (prepared.out / name).read_bytes()

    # Cut short while the shards were written: what was there stays, what was not comes again.
    for name in ("shard-000001.tar", "report.json"):
        (tmp_path / "out" / name).unlink()
    (tmp_path / "out" / "shard-000001.tar.123.tmp").write_bytes(b"half a shard")
    prepare.main(words)
    assert (tmp_path / "out" / "shard-000001.tar").read_bytes() == (prepared.out / "shard-000001.tar").read_bytes()
    assert report_of(tmp_path / "out")["samples"] == 9 and not work.exists()
    assert not list((tmp_path / "out").glob("*.tmp"))


def test_a_finished_folder_is_left_as_it_is_and_other_options_are_refused(prepared, capsys):
    words = [str(prepared.photos), str(prepared.out), *photo_folder.OPTIONS, *photo_folder.SHARDS]
    before = {path: path.stat().st_mtime_ns for path in prepared.out.glob("shard-*")}
    prepare.main(words)
    assert "9 samples of 3 people" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in before} == before
    with pytest.raises(SystemExit, match="begun with other min_sharpness"):
        prepare.main([*words, "--min-sharpness", "50"])


def test_ray_gives_the_shards_of_one_process_and_goes_on_after_a_kill(prepared, tmp_path):
    pytest.importorskip("ray")
    words = [str(prepared.photos), str(tmp_path / "out"), *photo_folder.OPTIONS, *photo_folder.SHARDS]
    words += ["--photos-per-part", "2", "--keep-work"]
    command = [sys.executable, "-m", "facesnap.training.prepare", *words, "--engine", "ray", "--workers", "2"]
    running = subprocess.Popen(command, cwd=Path(prepare.__file__).parents[3], start_new_session=True)
    work = tmp_path / "out" / "work"
    while not list(work.glob("part-*.json")):
        assert running.poll() is None, "it ended before it could be killed"
        time.sleep(0.1)
    running.kill()  # its cluster ends with it
    running.wait()
    done = {part: part.stat().st_mtime_ns for part in work.glob("part-*.json")}
    assert subprocess.run(command, cwd=Path(prepare.__file__).parents[3]).returncode == 0
    assert {part: part.stat().st_mtime_ns for part in done} == done
    for shard in prepared.out.glob("shard-*"):
        assert (tmp_path / "out" / shard.name).read_bytes() == shard.read_bytes()


def test_rays_large_models_stay_in_one_process_of_a_machine(monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def slowly(_):
        time.sleep(0.5)
        return os.getpid()

    with start("ray", 3) as engine:
        assert len({future.result() for future in [engine.few.submit(slowly, k) for k in range(3)]}) == 1


# photographs that every installation has ----------------------------------------------------------------


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photographs")
    astronaut = Image.fromarray(skimage.data.astronaut())
    astronaut.save(folder / "astronaut.png")
    astronaut.resize((410, 410)).save(folder / "copy.jpg", quality=85)
    Image.fromarray(get_image("t1", to_rgb=True)).save(folder / "t1.png")
    prepare.main([str(folder), str(folder / "out"), *photo_folder.OPTIONS, "--resolution", "512"])
    return folder / "out"


def test_photographs_pass_with_masks_and_landmarks(photographs):
    samples = samples_of(photographs)
    assert sorted(samples) == ["astronaut.png:0", *(f"t1.png:{face}" for face in range(6))]
    for sample in samples.values():
        landmarks, mask = sample["landmarks"], sample["mask.png"] > 0
        height, width = mask.shape
        assert ((landmarks >= 0) & (landmarks < [width, height])).all()
        x, y = landmarks[17:].round().astype(int).T  # brows, eyes, nose, mouth
        assert mask[y, x].mean() > 0.97
        hull = cv2.contourArea(cv2.convexHull(landmarks))
        assert 1.3 * hull < mask.sum() < 4 * hull  # forehead and hair, not the room
        assert np.linalg.norm(sample["fitted"] - landmarks, axis=1).mean() < 0.1 * eye_distance(landmarks)
    # Eyes and mouth corners of the astronaut, read off the photograph.
    sample = samples["astronaut.png:0"]
    corner = np.array([224, 108]) - (sample["box"][:2] + sample["box"][2:]) / 2
    in_photo = sample["keypoints"] + np.round(corner)
    assert np.abs(in_photo[:2].mean(0) - [224, 103]).max() < 12


def test_false_faces_and_copies_are_counted_by_reason(photographs):
    rejected = report_of(photographs)["rejected"]
    assert rejected["near-duplicate"] == 1  # the smaller of the two astronauts
    assert rejected["unsteady landmarks"] >= 1  # the badge on her suit, which the detector takes for a face
    lines = [json.loads(line) for line in (photographs / "rejected.jsonl").read_text().splitlines()]
    assert {"source": "copy.jpg", "face": 0, "reason": "near-duplicate", "figure": "astronaut.png"} in lines
    assert sum(rejected.values()) == len(lines)


def test_nobody_is_twice_in_one_photo(photographs):
    people = [s["about"]["identity"] for name, s in samples_of(photographs).items() if name.startswith("t1")]
    assert len(set(people)) == 6

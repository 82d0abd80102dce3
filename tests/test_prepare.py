"""Photographs → training shards, on rendered people and the mini's face pack; details on a pack of toy nets."""

import errno
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import cv2
import numpy as np
import photo_folder
import pytest
import skimage.data
import torch
import toy_pack
from insightface.data import get_image
from PIL import Image

from facesnap.errors import InputError
from facesnap.heads import LinearHeadModel, rotation_from_euler
from facesnap.landmarks import eye_distance, to_68
from facesnap.synthetic.dataset import GLASSES, HAIR, HAT, SKIN, read_shard
from facesnap.synthetic.shards import write_shard
from facesnap.training.prepare import __main__ as prepare
from facesnap.training.prepare.engines import Here
from facesnap.training.prepare.engines import run as run_tasks
from facesnap.training.prepare.grouping import identities_of, near_duplicates, same_people, unit
from facesnap.training.prepare.headmask import landmark_mask
from facesnap.training.prepare.looks import Captioner
from facesnap.training.prepare.options import MINI_PARTS, Options
from facesnap.training.prepare.parts import PartJob, find
from facesnap.training.prepare.samples import cut, perceptual_hash, sharpness
from facesnap.training.prepare.shards import ShardJob, plan_shards
from facesnap.training.prepare.sources import list_photos

GREEN, BLUE = (0, 255, 0), (0, 0, 255)


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


# ---- rendered people ---------------------------------------------------------------------------------------------


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


# ---- photographs that every installation has ---------------------------------------------------------------------


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


# ---- toy nets: what surrounds the faces --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    return toy_pack.write(tmp_path_factory.mktemp("pack"))


def squares(*spots, size=256, seed=0):
    """A dark, lightly speckled picture with square faces (x, y, side, colour)."""
    image = np.random.default_rng(seed).integers(10, 30, (size, size, 3), np.uint8)
    for x, y, side, colour in spots:
        image[y : y + side, x : x + side] = colour
    return image


def run(folder, out, pack, *words):
    prepare.main(
        [str(folder), str(out), "--pack", str(pack), "--head", "none", "--resolution", "256", "--min-sharpness", "0",
         "--duplicate-bits", "0", "--duplicate-cosine", "2", "--identities", "none", *map(str, words)]
    )  # fmt: skip
    return samples_of(out)


@pytest.fixture
def photos(tmp_path):
    """An empty folder; results go beside it."""
    (tmp_path / "photos").mkdir()
    return tmp_path / "photos"


def test_several_faces_are_several_samples_if_large_enough(pack, photos, tmp_path):
    Image.fromarray(squares((40, 40, 8, GREEN), (176, 160, 16, BLUE))).save(photos / "two.png")
    samples = run(photos, tmp_path / "out", pack)
    assert sorted(samples) == ["two.png:0", "two.png:1"]
    assert np.ptp(samples["two.png:0"]["box"][[0, 2]]) == pytest.approx(128, abs=1)  # the largest first
    few = run(photos, tmp_path / "few", pack, "--min-face", 100)
    assert sorted(few) == ["two.png:0"] and report_of(tmp_path / "few")["rejected"]["small face"] == 1


def test_labels_belong_to_the_largest_face(pack, photos, tmp_path):
    (photos / "anna").mkdir()
    two = squares((40, 40, 8, GREEN), (176, 160, 16, BLUE))
    Image.fromarray(two).save(photos / "anna" / "1.png")
    Image.fromarray(two[:, ::-1]).save(photos / "anna" / "2.png")
    samples = run(photos, tmp_path / "out", pack, "--identities", "folder")
    people = {name: sample["about"]["identity"] for name, sample in samples.items()}
    assert people["anna/1.png:0"] == people["anna/2.png:0"]
    assert len(set(people.values())) == 3


def test_shards_are_read_like_folders(pack, tmp_path):
    with tarfile.open(tmp_path / "some.tar", "w") as tar:
        for key in ("anna_1", "anna_2", "ben_1"):
            image = io.BytesIO()
            Image.fromarray(squares((120, 120, 16, BLUE), seed=len(key))).save(image, "PNG")
            note = json.dumps({"prompt": f"{key} smiles"}).encode()
            for kind, data in (("png", image.getvalue()), ("mask.png", b"no picture"), ("json", note)):
                member = tarfile.TarInfo(f"{key}.{kind}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    samples = run(tmp_path / "some.tar", tmp_path / "out", pack, "--identities", "prefix")
    assert sorted(samples) == ["some.tar/anna_1:0", "some.tar/anna_2:0", "some.tar/ben_1:0"]
    assert samples["some.tar/ben_1:0"]["about"]["caption"] == "ben_1 smiles"
    people = [samples[f"some.tar/{key}:0"]["about"]["identity"] for key in ("anna_1", "anna_2", "ben_1")]
    assert people[0] == people[1] != people[2]


def test_captions_and_identities_from_tables(pack, photos, tmp_path):
    for name in ("a", "b", "c"):
        Image.fromarray(squares((120, 120, 16, BLUE))).save(photos / f"{name}.png")
        (photos / f"{name}.txt").write_text("beside the photo")
    (tmp_path / "captions.csv").write_text("file,caption\na.png,a man\nb.png,\n")
    (tmp_path / "who.csv").write_text("file,identity\na.png,7\nc.png,7\n")
    words = ["--captions", tmp_path / "captions.csv", "--identities", tmp_path / "who.csv"]
    samples = run(photos, tmp_path / "out", pack, *words)
    assert [samples[f"{n}.png:0"]["about"]["caption"] for n in "abc"] == ["a man", "", ""]
    assert len({samples[f"{n}.png:0"]["about"]["identity"] for n in "ac"}) == 1
    assert {s["about"]["caption"] for s in run(photos, tmp_path / "2", pack).values()} == {"beside the photo"}
    assert {s["about"]["caption"] for s in run(photos, tmp_path / "3", pack, "--captions", "none").values()} == {""}
    with pytest.raises(SystemExit, match="columns 'file' and 'identity'"):
        run(photos, tmp_path / "4", pack, "--identities", tmp_path / "captions.csv")
    (tmp_path / "who.csv").write_text("file,identity\nnobody.png,7\n")
    with pytest.raises(SystemExit, match="names none of the photographs"):
        run(photos, tmp_path / "5", pack, "--identities", tmp_path / "who.csv")


def test_large_photographs_are_cut_about_the_face_and_shrunk(pack, photos, tmp_path):
    Image.fromarray(squares((1000, 600, 32, BLUE), size=1600)).save(photos / "large.png")
    for sample in run(photos, tmp_path / "out", pack, "--max-side", 300, "--context", 2, "--format", "png").values():
        assert max(sample["png"].shape) <= 300 < max(sample["about"]["original_size"]) < 1600
        square = np.argwhere(sample["png"][..., 2] > 128).mean(axis=0)[::-1]  # the face is where its box is
        assert np.abs((sample["box"][:2] + sample["box"][2:]) / 2 - square).max() < 0.1 * np.ptp(sample["box"][::2])
    part, corner, scale = cut(np.zeros((400, 600, 3), np.uint8), np.array([500, 10, 580, 110.0]), 4.0, 200)
    assert part.shape == (105, 130, 3) or max(part.shape) == 200
    assert corner.tolist() == [340, 0] and scale == 200 / 260


@pytest.mark.parametrize(
    ("files", "message"),
    [({}, "no photographs in"), ({"readme.md": b"hello"}, "no photographs in"),
     ({"a.jpg": b"no picture", "b.png": b""}, r"none of the 2 photographs .*2 unreadable picture"),
     ({"broken.tar": b"this is no tar"}, "no photographs in")],
)  # fmt: skip
def test_nothing_usable_is_an_error_that_says_why(pack, photos, tmp_path, files, message):
    for name, data in files.items():
        (photos / name).write_bytes(data)
    with pytest.raises(SystemExit, match=message):
        run(photos, tmp_path / "out", pack)


def test_no_faces_at_all(pack, photos, tmp_path):
    for k in range(2):
        Image.fromarray(squares(seed=k)).save(photos / f"{k}.png")
    for _ in range(2):  # the answer is the same when asked again
        with pytest.raises(SystemExit, match="none of the 2 photographs .*2 no face"):
            run(photos, tmp_path / "out", pack)
    assert report_of(tmp_path / "out")["rejected"]["no face"] == 2


def test_what_cannot_be_read_is_counted_and_the_rest_goes_on(pack, photos, tmp_path):
    good = io.BytesIO()
    Image.fromarray(squares((120, 120, 16, BLUE))).save(good, "PNG")
    (photos / "a.png").write_bytes(good.getvalue())
    (photos / "cut.png").write_bytes(good.getvalue()[:5000])
    (photos / "noted.png").write_bytes(good.getvalue())
    (photos / "noted.json").write_text("{no json")
    (photos / "broken.tar").write_bytes(b"x" * 2000)
    assert sorted(run(photos, tmp_path / "out", pack)) == ["a.png:0"]
    report = report_of(tmp_path / "out")
    assert report["rejected"]["unreadable picture"] == report["rejected"]["unreadable caption"] == 1
    assert list(report["unreadable_shards"]) == ["broken.tar"]


def test_wrong_places_are_named(pack, photos, tmp_path):
    with pytest.raises(SystemExit, match="there is no '/nowhere/x.tar'"):
        run("/nowhere/x.tar", tmp_path / "out", pack)
    with pytest.raises(SystemExit, match="local files"):
        run("https://example.org/x.tar", tmp_path / "out", pack)
    Image.fromarray(squares()).save(photos / "a.png")
    with pytest.raises(SystemExit, match="no face pack"):
        run(photos, tmp_path / "out", tmp_path / "nothing")
    with pytest.raises(SystemExit):
        prepare.main([str(tmp_path), str(tmp_path / "o"), "--workers", "0"])


def test_the_minis_face_pack_is_the_default_wherever_one_works(photos, tmp_path, monkeypatch):
    shutil.copy(photo_folder.MINI.parent / "examples" / "avery.png", photos)
    monkeypatch.chdir(tmp_path)
    prepare.main([str(photos), "out", "--resolution", "256"])
    assert report_of(tmp_path / "out")["samples"] == 1
    assert json.loads((tmp_path / "out" / "prepare.json").read_text())["options"]["pack"] == "mini"  # no place of ours
    monkeypatch.setitem(MINI_PARTS, "pack", tmp_path / "nothing")
    with pytest.raises(SystemExit, match="work in a checkout, or give --pack and --head"):
        prepare.main([str(photos), "other"])
    assert not (tmp_path / "other").exists()  # the same command with --pack may begin there


def test_what_one_machine_of_several_lacks_is_named_with_it(pack, photos, tmp_path, monkeypatch):
    Image.fromarray(squares((120, 120, 16, BLUE))).save(photos / "a.png")
    found, _ = list_photos(str(photos), tmp_path / "out")
    job = PartJob(tmp_path / "out", 0, tuple(found), {}, Options(str(pack), None), ("CPUExecutionProvider",), "cpu")
    with pytest.raises(InputError, match=f"{socket.gethostname()} does not see .*out"):
        find(job)
    (tmp_path / "out" / "work").mkdir(parents=True)
    (tmp_path / "out" / "prepare.json").write_text("{}")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(InputError, match=f"{socket.gethostname()} .*No space left"):
        patch.setattr("facesnap.training.prepare.parts.np.save", full)
        find(job)
    assert [path.name for path in (tmp_path / "out" / "work").iterdir()] == ["part-000000.tar"]  # no list: not done
    (photos / "a.png").unlink()
    with pytest.raises(InputError, match="a.png is gone, or this machine does not see"):
        find(job)


def test_a_worker_that_died_is_told_by_the_parts_it_may_have_died_of():
    class Dies(Here):
        def submit(self, task, job):
            return super().submit(task, job) if job.number != 3 else super().submit(die, job)

    def die(job):
        raise BrokenProcessPool("killed")

    jobs = [ShardJob(Path(), number) for number in range(9)]
    with pytest.raises(InputError, match=r"a worker died over parts (\d, )*3\b.*give the same command again"):
        list(run_tasks([(Dies(), lambda job: None)], jobs, 1))


def test_shards_whose_making_nobody_knows_are_not_added_to(pack, photos, tmp_path):
    Image.fromarray(squares((120, 120, 16, BLUE))).save(photos / "a.png")
    run(photos, tmp_path / "out", pack)
    (tmp_path / "out" / "prepare.json").unlink()
    with pytest.raises(SystemExit, match="not how they were made"):
        run(photos, tmp_path / "out", pack)


def test_rendered_people_of_the_evaluation_are_refused(pack, tmp_path):
    (tmp_path / "people").mkdir()
    write_shard((tmp_path / "people" / "000.tar", 1_000_000, 1, 1, 64, False, False))
    with pytest.raises(SystemExit, match=r"000.tar holds people held out for evaluation \(1000000\)"):
        run(tmp_path / "people", tmp_path / "out", pack)


# ---- face parsing and captions by tiny models of transformers ----------------------------------------------------

LABELS = (  # CelebAMask-HQ's
    "background skin nose eye_g l_eye r_eye l_brow r_brow l_ear r_ear mouth u_lip l_lip hair hat ear_r neck_l neck "
    "cloth"
)


def tiny_segformer(folder: Path, answer: str) -> Path:
    """A face-parsing model that calls every pixel by one name."""
    from transformers import SegformerConfig, SegformerForSemanticSegmentation, SegformerImageProcessorPil

    names = LABELS.split()
    config = SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[4, 8], patch_sizes=[7, 3], strides=[4, 2],
        num_attention_heads=[1, 1], mlp_ratios=[1, 1], decoder_hidden_size=8,
        id2label=dict(enumerate(names)), label2id={n: i for i, n in enumerate(names)},
    )  # fmt: skip
    model = SegformerForSemanticSegmentation(config)
    with torch.no_grad():
        model.decode_head.classifier.weight.zero_()
        model.decode_head.classifier.bias.copy_(torch.eye(len(names))[names.index(answer)])
    model.save_pretrained(folder)
    SegformerImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder


def test_a_face_parser_draws_the_mask(pack, photos, tmp_path):
    Image.fromarray(squares((120, 120, 16, BLUE))).save(photos / "a.png")
    hair = tiny_segformer(tmp_path / "hair", "hair")
    mask = run(photos, tmp_path / "1", pack, "--parser", hair)["a.png:0"]["mask.png"]
    assert (mask > 0).mean() > 0.9  # all that the parser was shown
    cloth = tiny_segformer(tmp_path / "cloth", "cloth")
    with pytest.raises(SystemExit, match="1 no mask"):
        run(photos, tmp_path / "2", pack, "--parser", cloth)


def test_a_model_that_knows_no_hair_is_refused(pack, photos, tmp_path):
    folder = tiny_segformer(tmp_path / "model", "hair")
    config = json.loads((folder / "config.json").read_text())
    config["id2label"]["13"] = "tree"
    (folder / "config.json").write_text(json.dumps(config))
    Image.fromarray(squares((120, 120, 16, BLUE))).save(photos / "a.png")
    with pytest.raises(SystemExit, match="no labels for skin and hair"):
        run(photos, tmp_path / "out", pack, "--parser", folder)


def tiny_blip2(folder: Path) -> Path:
    from tiny import tiny_tokenizer
    from transformers import (
        Blip2Config,
        Blip2ForConditionalGeneration,
        Blip2QFormerConfig,
        Blip2VisionConfig,
        BlipImageProcessorPil,
        OPTConfig,
    )

    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    vocabulary = len(tokenizer)
    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    text = OPTConfig(
        vocab_size=vocabulary + 1, hidden_size=8, word_embed_proj_dim=8, num_hidden_layers=1, num_attention_heads=2,
        ffn_dim=8, max_position_embeddings=64, bos_token_id=2, eos_token_id=3, pad_token_id=1,
    )  # fmt: skip
    config = Blip2Config(
        vision_config=Blip2VisionConfig(**size, image_size=32, patch_size=16).to_dict(),
        qformer_config=Blip2QFormerConfig(**size, encoder_hidden_size=8, vocab_size=10).to_dict(),
        text_config=text.to_dict(),
        num_query_tokens=2,
        image_token_index=vocabulary,
    )
    Blip2ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    BlipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def test_blip2_captions(pack, photos, tmp_path):
    folder = tiny_blip2(tmp_path / "blip2")
    for k in range(2):
        Image.fromarray(squares((60 * k + 20, 120, 16, BLUE), seed=k)).save(photos / f"{k}.png")
        (photos / f"{k}.txt").write_text("not this one")
    words = ["--captions", "blip2", "--caption-model", folder, "--format", "png"]
    samples = run(photos, tmp_path / "out", pack, *words)
    captioner = Captioner(str(folder), batch_size=1)
    for sample in samples.values():  # one by one or all together, from the stored picture or before it was stored
        assert sample["about"]["caption"] == captioner([sample["png"]])[0] != ""


# ---- the parts, alone --------------------------------------------------------------------------------------------


def test_near_duplicates_are_those_that_brute_force_finds():
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**63, 200, dtype=np.uint64)
    flips = np.array(
        [sum(1 << int(b) for b in rng.choice(64, rng.integers(1, 7), replace=False)) for _ in range(60)], np.uint64
    )
    hashes[100:160] = hashes[:60] ^ flips
    embeddings = unit(rng.normal(size=(200, 16)))
    embeddings[100:150] = embeddings[:50]
    for bits in (0, 3, 4, 16):
        groups = near_duplicates(hashes, embeddings, bits, 0.9, block=64)
        near = np.bitwise_count(hashes[:, None] ^ hashes) <= bits
        assert ((near & (embeddings @ embeddings.T >= 0.9)) == np.equal.outer(groups, groups)).all()
    assert len(set(near_duplicates(hashes, embeddings, 4, 0.9))) not in (150, 200)  # some are near, and not all


def test_people_are_told_apart_by_their_embeddings():
    rng = np.random.default_rng(0)
    centres = unit(rng.normal(size=(5, 64)))
    true = rng.integers(0, 5, 60)
    embeddings = unit(centres[true] + 0.08 * rng.normal(size=(60, 64)))
    for options in ({"block": 7}, {"exact": 10}):  # the latter: as with millions of faces
        groups = same_people(embeddings, 0.5, **options)
        assert (np.equal.outer(groups, groups) == np.equal.outer(true, true)).all()
    # A face between two people would chain them: who is far from the mean of the chain stands alone.
    angles = np.radians(np.arange(0, 180, 30))
    chain = same_people(np.stack([np.cos(angles), np.sin(angles)], 1), 0.8)
    assert chain[0] != chain[2] and chain[5] != chain[2]


def test_identities_are_numbered_as_they_come():
    samples = [{"source": s, "face": f} for s, f in (("a", 0), ("a", 1), ("b", 0), ("c", 0))]
    assert identities_of(samples, {"a": "x", "b": "x"}, np.zeros(0)).tolist() == [0, 1, 0, 2]
    assert identities_of(samples, None, np.array([3, 3, 3, 1])).tolist() == [0, 1, 0, 2]


def test_an_identity_lies_in_one_shard_unless_it_is_larger():
    identities = np.repeat(np.arange(30), np.random.default_rng(0).integers(1, 9, 30))
    identities = np.concatenate([identities, np.full(25, 30)])
    shards = plan_shards(identities, 10, seed=1)
    assert sorted(row for shard in shards for row in shard) == list(range(len(identities)))
    assert all(0 < len(shard) <= 10 for shard in shards)
    for identity in range(30):
        assert sum(identity in identities[shard] for shard in shards) == 1
    for shard in shards:  # together within the shard
        people = identities[shard]
        assert len(set(people)) == 1 + (np.diff(people) != 0).sum()
    assert shards != plan_shards(identities, 10, seed=2)


def test_sharpness_and_hash_say_what_they_should():
    crop = cv2.resize(skimage.data.astronaut()[20:200, 140:320], (224, 224))
    blurred = cv2.GaussianBlur(crop, (0, 0), 4)
    assert sharpness(crop) > 5 * sharpness(blurred) and sharpness(blurred) < 20
    small = cv2.resize(cv2.resize(crop, (150, 150)), (224, 224))
    assert (perceptual_hash(crop) ^ perceptual_hash(small)).bit_count() <= 4
    assert (perceptual_hash(crop) ^ perceptual_hash(crop[:, ::-1])).bit_count() > 12


def test_the_skull_turns_with_the_face():
    model = LinearHeadModel.from_pretrained(photo_folder.MINI / "head")

    def side_by_side(yaw):
        points = 60 * to_68(model.mean) @ rotation_from_euler(yaw=yaw).T * [1, -1, 1] + [128, 128, 0]
        columns = np.flatnonzero(landmark_mask(points.astype(np.float32), (256, 256)).any(axis=0))
        return points[30, 0] - columns[0], columns[-1] - points[30, 0]  # from the tip of the nose to either edge

    left, right = side_by_side(0)
    assert abs(left - right) <= 2
    left, right = side_by_side(40)  # she looks to the picture's right: the head is behind, on the left
    assert left > 2 * right

"""Photographs → training shards, on toy nets: what surrounds the faces, every way to go wrong, parser and captioner."""

import errno
import io
import json
import shutil
import socket
import tarfile
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path

import numpy as np
import photo_folder
import pytest
import torch
import toy_pack
from PIL import Image
from prepared_shards import report_of, samples_of
from safetensors.torch import load_file

from facesnap.errors import InputError
from facesnap.synthetic.shards import write_shard
from facesnap.training.prepare import __main__ as prepare
from facesnap.training.prepare.engines import Here
from facesnap.training.prepare.engines import run as run_tasks
from facesnap.training.prepare.headmask import FaceParser
from facesnap.training.prepare.looks import Captioner
from facesnap.training.prepare.options import MINI_PARTS, Options
from facesnap.training.prepare.parts import PartJob, find
from facesnap.training.prepare.samples import cut
from facesnap.training.prepare.shards import ShardJob
from facesnap.training.prepare.sources import list_photos

GREEN, BLUE = (0, 255, 0), (0, 0, 255)


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


def test_captions_and_identities_from_tables(pack, photos, tmp_path, capsys):
    for name in ("a", "b", "c"):
        Image.fromarray(squares((120, 120, 16, BLUE))).save(photos / f"{name}.png")
        (photos / f"{name}.txt").write_text("beside the photo")
    (tmp_path / "captions.csv").write_text("file,caption\na.png,a man\nb.png,\n")
    (tmp_path / "who.csv").write_text("file,identity\na.png,7\nc.png,7\n")
    words = ["--captions", tmp_path / "captions.csv", "--identities", tmp_path / "who.csv"]
    samples = run(photos, tmp_path / "out", pack, *words)
    assert "1 of 3 photographs, such as b.png, have no row in the table" in capsys.readouterr().err
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

    elsewhere = replace(job, providers=("NoSuchExecutionProvider",))
    with pytest.raises(
        InputError, match=f"no NoSuchExecutionProvider here.* leave out --providers .*{socket.gethostname()}"
    ):
        find(elsewhere)
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


# face parsing and captions by tiny models of transformers -----------------------------------------------


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


def test_a_face_parser_that_is_a_pickle_is_never_read(tmp_path):
    place = tiny_segformer(tmp_path / "hair", "hair")
    torch.save(load_file(place / "model.safetensors"), place / "pytorch_model.bin")
    (place / "model.safetensors").unlink()
    with pytest.raises(OSError, match="safetensors"):
        FaceParser(str(place))


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

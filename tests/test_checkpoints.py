"""Names, folders and Hub ids to pipelines, over Hub caches made by hand; nothing here reaches a network."""

import errno
import json
import re
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    DPMSolverSinglestepScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from fake_hub import MINI, half, put, tiny_sdxl, write_base, write_clip, write_pack, write_single_file
from head_files import write_gnm
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from tiny import TinyAnalyser, photo, tiny_unet
from tiny_batches import stream
from tiny_instantid import write_instantid

from facesnap import checkpoints
from facesnap.checkpoints import plans, sources, verify
from facesnap.checkpoints.__main__ import main
from facesnap.errors import InputError
from facesnap.ffrnet import VARIANTS
from facesnap.folder import BASE_PARTS
from facesnap.instantid import InstantIDPipeline
from facesnap.mixer import VARIANTS as MIXERS
from facesnap.pipeline import FaceSnapPipeline
from facesnap.training.config import read_config
from facesnap.training.train import run

HEAD = MINI / "head"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folders that the tests copy from: a tiny base, InstantID's files, FaceSnap weights, a CLIP."""
    root = tmp_path_factory.mktemp("made")
    pipe = tiny_sdxl()
    write_base(root / "base", pipe)
    write_instantid(root / "instantid", pipe.unet)
    write_clip(root / "clip", pipe.face_encoder)
    (root / "scorer").mkdir()
    shutil.copyfile(MINI / "scorer" / "recogniser.onnx", root / "scorer" / "glintr100.onnx")
    for name in ("mixer", "ffrnet"):
        getattr(pipe, name).save_pretrained(root / "slim" / name)
    settings = {"name": "slim", "size": 64, "steps": 2, "guidance": 2.0}
    (root / "slim" / "facesnap.json").write_text(json.dumps(settings))
    return root


@pytest.fixture(autouse=True)
def hub(tmp_path, monkeypatch):
    """An empty Hub cache and an empty home, without a network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("MODEL", "BASE", "LORA", "MEMORY", "FACE_PACK", "HEAD"):
        monkeypatch.delenv(f"FACESNAP_{name}", raising=False)
    return tmp_path / "hub"


SIZES = {  # of some files, as the Hub might give them
    "unet/diffusion_pytorch_model.fp16.safetensors": 5_135_149_760,
    "ip-adapter.bin": 1_691_134_141,
    "model_index.json": 609,
}


@pytest.fixture
def online(monkeypatch):
    """A Hub that answers what is in its repositories, and lets nothing be fetched."""

    def model_info(self, repo, revision=None, files_metadata=False):
        files = [SimpleNamespace(rfilename=path, size=SIZES.get(path, 1_000_000)) for path in ALL_FILES]
        return SimpleNamespace(siblings=files)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("facesnap.checkpoints.sources.HfApi.model_info", model_info)
    monkeypatch.setattr(
        "facesnap.checkpoints.sources.urlopen", lambda *a, **k: SimpleNamespace(headers={"Content-Length": 900})
    )


ALL_FILES = [
    file.path for source in (sources.SDXL, sources.INSTANTID, sources.CLIP, sources.HEAD) for file in source.files
]


@pytest.fixture
def pack(monkeypatch):
    """antelopev2 where InsightFace unpacks it; its files are the mini's, so their sizes are those."""
    folder = write_pack(Path.home() / ".insightface" / "models" / "antelopev2")
    files = tuple(
        replace(file, size=(folder / "antelopev2" / file.path).stat().st_size) for file in sources.FACE_PACK.files
    )
    monkeypatch.setattr(sources, "FACE_PACK", replace(sources.FACE_PACK, files=files))
    return folder


@pytest.fixture
def full_hub(hub, made, pack):
    """All that instantid needs but its head, which the tests give."""
    for source, folder in (
        (sources.DREAMSHAPER, "base"),
        (sources.SDXL, "base"),
        (sources.INSTANTID, "instantid"),
        (sources.CLIP, "clip"),
        (sources.SCORER, "scorer"),
    ):
        put(hub, source.repo, source.revision, made / folder)
    return hub


def copied(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


# ---------------------------------------------------------------------- names


def test_nothing_named_is_the_mini(capsys):
    pipe = checkpoints.load(device="cpu")
    assert type(pipe) is FaceSnapPipeline and pipe.settings.name == "FaceSnap mini"
    assert pipe.memory == "full" and pipe.unet.dtype == torch.float32
    assert checkpoints.plan("mini").missing() == []


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("instntid", "There is no model 'instntid'; did you mean 'instantid'?"),
        ("minni", "did you mean 'mini'?"),
        ("/no/such/folder", "there are mini, instantid, folders and Hub ids"),
        ("somebody/something", "The Hub gave no repository 'somebody/something' .*nothing of it is on this machine"),
    ],
)
def test_unknown_names(name, sentence):
    with pytest.raises(InputError, match=sentence):
        checkpoints.load(name, device="cpu")


def test_the_mini_outside_a_checkout_and_a_kind_of_tomorrow(tmp_path, monkeypatch):
    shutil.copy(MINI / "facesnap.json", tmp_path)
    told = json.loads((tmp_path / "facesnap.json").read_text())
    (tmp_path / "facesnap.json").write_text(json.dumps(told | {"kind": "holographic"}))
    with pytest.raises(InputError, match="is of kind 'holographic', which is not known; update facesnap"):
        checkpoints.plan(tmp_path)
    monkeypatch.setattr(plans, "MINI", tmp_path / "nowhere")
    with pytest.raises(InputError, match="The mini lies in assets/mini of the repository; run from a checkout"):
        checkpoints.plan("mini")


def test_environment_names_model_and_memory(monkeypatch):
    monkeypatch.setenv("FACESNAP_MODEL", "minni")
    with pytest.raises(InputError, match="no model 'minni'"):
        checkpoints.load(device="cpu")
    monkeypatch.setenv("FACESNAP_MEMORY", "balanced")
    with pytest.raises(InputError, match="there is no GPU here"):
        checkpoints.load("mini", device="cpu")


# ---------------------------------------------------------------------- show


def test_show_lists_every_file_with_size_licence_and_pin(hub, made, online):
    shown = re.sub(" +", " ", checkpoints.show(checkpoints.plan("instantid")))
    for line in (
        "base model: Lykon/dreamshaper-xl-v2-turbo @ main, NOT PINNED",
        "InstantID: InstantX/InstantID @ 57b32dfee076092ad2930c71fd6d439c2c3b1820",
        "fetch 5.14 GB unet/diffusion_pytorch_model.fp16.safetensors",
        "fetch 1.69 GB ip-adapter.bin",
        "fetch 260.7 MB glintr100.onnx",
        "fetch 0.9 kB gnm/shape/data/landmarks/head_sparse_68.txt",
        "licence: non-commercial research only ** NO COMMERCIAL USE **",
        "head model: google/gnm-v3 @",
        "7.27 GB from elsewhere, 7.27 GB of it still to be fetched",
    ):
        assert line in shown
    assert "face encoder" not in shown  # InstantID has none
    folder = put(hub, "InstantX/InstantID", sources.INSTANTID.revision, made / "instantid")
    shown = re.sub(" +", " ", checkpoints.show(checkpoints.plan("instantid")))
    size = (folder / "ip-adapter.bin").stat().st_size
    assert f"cached {plans.shown_size(size)} ip-adapter.bin" in shown  # what lies here is as large as it is
    assert "fetch 5.14 GB" in shown


def test_sizes_that_nobody_can_say_are_not_made_up(hub):
    """Offline: only what InsightFace's pack weighs is known, since its files are told apart by that."""
    shown = re.sub(" +", " ", checkpoints.show(checkpoints.plan("instantid")))
    assert "fetch size unknown ip-adapter.bin" in shown and "fetch 260.7 MB glintr100.onnx" in shown
    assert "23 files of unknown size and 421.2 MB from elsewhere" in shown


def test_show_from_the_command_line(capsys):
    main(["show", "mini"])
    assert "nothing to fetch" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="did you mean 'instantid'"):
        main(["show", "instantdi"])


# ---------------------------------------------------------------------- fetching


def test_offline_one_error_names_the_files_and_where_they_belong(hub):
    with pytest.raises(InputError) as caught:
        checkpoints.load("instantid", device="cpu", yes=True)
    said = str(caught.value)
    for words in (
        "HF_HUB_OFFLINE is set",
        "InstantID, 3 files of InstantX/InstantID: on a machine",
        f"hf download InstantX/InstantID --revision {sources.INSTANTID.revision} ControlNetModel/config.json",
        "ip-adapter.bin",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "models--InstantX--InstantID",
        str(hub),
        "antelopev2.zip",
        "head_sparse_68.txt",
    ):
        assert words in said


def test_network_errors_are_the_same_error(monkeypatch, online):
    monkeypatch.setattr(
        "facesnap.checkpoints.sources.snapshot_download", lambda *a, **k: (_ for _ in ()).throw(OSError("no"))
    )
    with pytest.raises(InputError, match=r"(?s)could not be fetched \(OSError\).*Lykon"):
        checkpoints.fetch(checkpoints.plan("instantid"), yes=True)


def test_a_disk_that_fills_while_fetching(monkeypatch, online):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("facesnap.checkpoints.sources.snapshot_download", full)
    with pytest.raises(InputError, match=r"The disk is full; 'instantid' needs 7\.27 GB"):
        checkpoints.fetch(checkpoints.plan("instantid"), yes=True)


def test_large_files_are_not_fetched_unasked(monkeypatch, online):
    with pytest.raises(InputError, match=r"needs 7\.27 GB from .*fetch instantid --yes"):
        checkpoints.load("instantid", device="cpu")
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("builtins.input", lambda question: "n")
    with pytest.raises(InputError, match="Nothing was fetched"):
        checkpoints.load("instantid", device="cpu")
    monkeypatch.setattr(sources.Source, "sized", lambda self: self)
    with pytest.raises(InputError, match="Nothing was fetched"):  # nor those of which nobody knows how large they are
        checkpoints.fetch(checkpoints.plan("instantid"))


def test_no_room_on_the_disk(monkeypatch, online):
    monkeypatch.setattr("shutil.disk_usage", lambda place: shutil._ntuple_diskusage(10**10, 10**9, 10**9))
    with pytest.raises(InputError, match=r"no room: 7\.27 GB are to be fetched and 1.00 GB are free"):
        checkpoints.load("instantid", device="cpu", yes=True)


def test_small_files_are_fetched_unasked_and_checked(hub, made, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    asked = []

    def download(repo, *, revision, allow_patterns):
        asked.append((repo, revision, tuple(allow_patterns)))
        put(hub, repo, revision, made / "clip")

    monkeypatch.setattr("facesnap.checkpoints.sources.snapshot_download", download)
    small = replace(sources.CLIP, files=tuple(replace(file, size=1000) for file in sources.CLIP.files))
    wanted = plans.Plan("x", "facesnap", {}, {"face_encoder": small})
    checkpoints.fetch(wanted)
    assert asked == [(small.repo, small.revision, ("config.json", "model.safetensors"))]
    assert wanted.place("face_encoder").name == small.revision
    lost = replace(small, files=(*small.files, sources.File("tokens.json", 1)))
    with pytest.raises(InputError, match="it did not arrive"):
        checkpoints.fetch(plans.Plan("x", "facesnap", {}, {"face_encoder": lost}))


def test_face_pack_is_unpacked_by_insightface_and_checked(pack, monkeypatch):
    """Nested, as its archive is, and compared by content: a file of the right size may be another."""
    kept = pack.rename(pack.with_name("kept"))

    def unpack(kind, name, force):
        assert (kind, name, force) == ("models", "antelopev2", True)
        shutil.copytree(kept, pack)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(sources, "insightface_download", unpack)
    source = sources.FACE_PACK
    assert source.cached(source.files[0]) is None
    with pytest.raises(InputError, match="scrfd_10g_bnkps.onnx of antelopev2 did not arrive whole"):
        checkpoints.fetch(plans.Plan("x", "facesnap", {}, {"face_pack": source}), yes=True)
    true = {file.path: sources.digest(source.cached(file)) for file in source.files}
    right = replace(source, files=tuple(replace(file, sha256=true[file.path]) for file in source.files))
    shutil.rmtree(pack)
    checkpoints.fetch(plans.Plan("x", "facesnap", {}, {"face_pack": right}), yes=True)
    assert right.cached(right.files[0]).parent == pack / "antelopev2"


def test_head_landmarks_come_from_github_at_a_commit_and_are_checked(tmp_path, monkeypatch):
    source = sources.HEAD_LANDMARKS
    served = tmp_path / "web" / source.repo / source.revision / source.files[0].path
    served.parent.mkdir(parents=True)
    served.write_text("0 1 1 0 2 0\n" * 68)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(sources, "GITHUB", (tmp_path / "web").as_uri())
    wanted = plans.Plan("x", "facesnap", {}, {"head_landmarks": source})
    with pytest.raises(InputError, match="could not be fetched .RuntimeError"):  # the hash is another
        checkpoints.fetch(wanted)
    assert source.cached(source.files[0]) is None
    right = replace(source, files=(replace(source.files[0], sha256=sources.digest(served)),))
    checkpoints.fetch(plans.Plan("x", "facesnap", {}, {"head_landmarks": right}))
    assert right.cached(right.files[0]).read_text() == served.read_text()


# ---------------------------------------------------------------------- instantid


def test_instantid_from_the_hub_cache_makes_a_portrait(full_hub, tmp_path):
    (tmp_path / "gnm").mkdir()
    model, landmarks = write_gnm(tmp_path / "gnm")
    (tmp_path / "gnm" / "v3_0").mkdir()
    model.rename(tmp_path / "gnm" / "v3_0" / model.name)
    sources.HEAD_LANDMARKS.folder.mkdir(parents=True)
    landmarks.rename(sources.HEAD_LANDMARKS.folder / landmarks.name)
    put(full_hub, sources.HEAD.repo, sources.HEAD.revision, tmp_path / "gnm")

    pipe = checkpoints.load("instantid", device="cpu")
    assert pipe.head_model.name == "GNM Head v3"
    assert type(pipe) is InstantIDPipeline and pipe.settings.kind == "instantid"
    assert isinstance(pipe.scheduler, DPMSolverSinglestepScheduler) and pipe.scheduler.config.use_karras_sigmas
    assert (pipe.settings.steps, pipe.settings.guidance) == (8, 2.0)  # as the turbo base wants it
    dtypes = {p.dtype for part in (pipe.unet, pipe.text_encoder, pipe.mixer, pipe.ffrnet) for p in part.parameters()}
    assert dtypes == {torch.float32}  # half-precision files on a CPU
    pipe.set_progress_bar_config(disable=True)
    pipe.face_analyser = TinyAnalyser(pipe.head_model)
    out = pipe("a photo", reference=photo(1), pose=photo(2), height=64, width=64, num_inference_steps=2, seed=1)
    assert np.asarray(out.images[0]).std() > 0 and out.model == "InstantID"


def test_instantid_on_another_base(full_hub, made, pack):
    pipe = checkpoints.load("instantid", base=made / "base", device="cpu", head=HEAD, face_pack=pack)
    assert (pipe.settings.steps, pipe.settings.guidance) == (30, 5.0)  # InstantID's own, the base being unknown
    assert type(pipe.scheduler).__name__ == "DPMSolverMultistepScheduler"


def test_controlnet_of_another_architecture(full_hub, made, tmp_path):
    folder = copied(made / "instantid", tmp_path / "other")
    shutil.rmtree(folder / "ControlNetModel")
    unet = tiny_unet(4)
    unet.register_to_config(cross_attention_dim=24)
    ControlNetModel.from_unet(unet, load_weights_from_unet=False).save_pretrained(folder / "ControlNetModel")
    shutil.rmtree(full_hub / "models--InstantX--InstantID")
    put(full_hub, "InstantX/InstantID", sources.INSTANTID.revision, folder)
    with pytest.raises(InputError, match="ControlNet's cross_attention_dim is 24, the UNet's 32"):
        checkpoints.load("instantid", device="cpu", head=HEAD)


# ---------------------------------------------------------------------- FaceSnap weights


def test_slim_folder_takes_the_rest_from_elsewhere(full_hub, made, pack):
    pipe = checkpoints.load(made / "slim", base=made / "base", device="cpu", head=HEAD)
    assert type(pipe) is FaceSnapPipeline and pipe.settings.name == "slim" and pipe.settings.steps == 2
    vision = tiny_sdxl().face_encoder.state_dict()
    for key, tensor in pipe.face_encoder.state_dict().items():
        assert torch.equal(tensor, vision[key])
    assert pipe.scorer is None


def test_hub_id_is_read_from_its_snapshot(full_hub, made, pack):
    put(full_hub, "someone/face-weights", "main", made / "slim")
    pipe = checkpoints.load("someone/face-weights", device="cpu", head=HEAD)
    assert pipe.settings.name == "slim"
    shown = checkpoints.show(checkpoints.plan("someone/face-weights"))
    assert "FaceSnap weights: someone/face-weights @ " + "f" * 40 in shown
    assert "mixer/diffusion_pytorch_model.safetensors" in shown


def test_a_base_given_as_the_model_is_pointed_out(hub, made):
    put(hub, "someone/base", "main", made / "base")
    with pytest.raises(InputError, match="holds no FaceSnap weights; if it is a base model, give it as --base"):
        checkpoints.plan("someone/base")


def test_of_a_base_on_the_hub_only_what_is_read_is_listed_and_at_its_commit(monkeypatch):
    sizes = {
        "model_index.json": 600,
        "README.md": 9000,
        "sd_xl_base_1.0.safetensors": 6_938_000_000,
        "unet/config.json": 1700,
        "unet/diffusion_pytorch_model.safetensors": 10_270_000_000,
        "unet/diffusion_pytorch_model.fp16.safetensors": 5_135_000_000,
        "unet/diffusion_pytorch_model.bin": 10_270_000_000,
        "unet/model.onnx": 7_000_000,
        "text_encoder/model.safetensors": 492_000_000,
        "text_encoder/flax_model.msgpack": 492_000_000,
        "tokenizer/merges.txt": 524_619,
        "vae_1_0/diffusion_pytorch_model.safetensors": 334_000_000,
    }

    def model_info(self, repo, files_metadata=False):
        files = [SimpleNamespace(rfilename=path, size=size) for path, size in sizes.items()]
        return SimpleNamespace(siblings=files, sha="a" * 40, card_data={"license": "openrail++"})

    monkeypatch.setattr("facesnap.checkpoints.plans.HfApi.model_info", model_info)
    source = plans.listing("someone/sdxl", "base model")
    assert (source.revision, source.licence) == ("a" * 40, "openrail++")
    assert {file.path for file in source.files} == {
        "model_index.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "text_encoder/model.safetensors",
        "tokenizer/merges.txt",
    }
    sizes |= {"pytorch_model.bin": 1}
    for path in [path for path in sizes if not path.endswith((".bin", ".json"))]:
        del sizes[path]
    with pytest.raises(InputError, match="holds no safetensors weights"):
        plans.listing("someone/pickles", "base model")


def test_lora_of_the_base(full_hub, made, tmp_path):
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipe = tiny_sdxl()
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipe.unet))
    StableDiffusionXLPipeline.save_lora_weights(tmp_path / "lora", unet_lora_layers=layers)
    loaded = checkpoints.load(made / "slim", base=made / "base", lora=tmp_path / "lora", device="cpu", head=HEAD)
    assert loaded.get_active_adapters() == ["default_0"]
    with pytest.raises(InputError, match="is no LoRA: one safetensors file is needed, 0"):
        checkpoints.load(made / "slim", base=made / "base", lora=made / "base", device="cpu", head=HEAD)


def test_base_in_one_file(full_hub, made, tmp_path):
    """With the small files of SDXL's own repository, and the same weights as from folders, half precision apart."""
    put(full_hub, sources.SDXL.repo, sources.SDXL.revision, made / "base")
    file = write_single_file(tmp_path / "base.safetensors", tiny_sdxl())
    pipe = checkpoints.load(made / "slim", base=file, device="cpu", head=HEAD)
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        expected = getattr(tiny_sdxl(), name).state_dict()
        for key, tensor in getattr(pipe, name).state_dict().items():
            torch.testing.assert_close(tensor, expected[key], msg=f"{name}.{key}")


# ---------------------------------------------------------------------- bases that cannot be used


def load_on(base, made):
    return checkpoints.load(made / "slim", base=base, device="cpu", head=HEAD)


def test_truncated_and_missing_shards(full_hub, made, tmp_path):
    base = copied(made / "base", tmp_path / "base")
    file = base / "unet" / "diffusion_pytorch_model.fp16.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    with pytest.raises(InputError, match="unet: diffusion_pytorch_model.fp16.safetensors is truncated"):
        load_on(base, made)
    file.unlink()
    shards = {"weight_map": {"conv_in.weight": "diffusion_pytorch_model.fp16-00001-of-00002.safetensors"}}
    (base / "unet" / "diffusion_pytorch_model.safetensors.index.fp16.json").write_text(json.dumps(shards))
    with pytest.raises(
        InputError, match="the shard diffusion_pytorch_model.fp16-00001-of-00002.safetensors is missing"
    ):
        load_on(base, made)


def test_stable_diffusion_1_5(full_hub, made, tmp_path):
    base = tmp_path / "sd15"
    base.mkdir()
    index = {"_class_name": StableDiffusionPipeline.__name__, "unet": ["diffusers", "UNet2DConditionModel"]}
    (base / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="it is a StableDiffusionPipeline, of Stable Diffusion 1 or 2"):
        load_on(base, made)
    base = copied(made / "base", tmp_path / "odd")
    config = json.loads((base / "unet" / "config.json").read_text())
    config |= {"addition_embed_type": None, "cross_attention_dim": 768}
    (base / "unet" / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"UNet \(cross-attention width 768\) is that of Stable Diffusion 1 or 2"):
        load_on(base, made)


@pytest.mark.parametrize(
    ("key", "sentence"),
    [
        ("cond_stage_model.transformer.text_model.embeddings.position_ids", "is a Stable Diffusion 1 or 2"),
        ("lora_unet_down.weight", "is no SDXL checkpoint"),
    ],
)
def test_single_files_that_are_no_sdxl(full_hub, made, tmp_path, key, sentence):
    small = put(full_hub, sources.SDXL.repo, sources.SDXL.revision, made / "base")
    assert small.is_dir()
    save_file({key: torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=sentence):
        load_on(tmp_path / "model.safetensors", made)


def test_single_files_that_cannot_be_read(full_hub, made, tmp_path):
    put(full_hub, sources.SDXL.repo, sources.SDXL.revision, made / "base")
    (tmp_path / "model.safetensors").write_bytes(b"\x10" * 40)
    with pytest.raises(InputError, match="model.safetensors' is truncated or damaged"):
        load_on(tmp_path / "model.safetensors", made)
    (tmp_path / "model.ckpt").write_bytes(b"")
    with pytest.raises(InputError, match="no safetensors file; convert it"):
        load_on(tmp_path / "model.ckpt", made)
    with pytest.raises(InputError, match="There is no base model 'nothing'"):
        load_on("nothing", made)


def test_face_pack_without_a_file(full_hub, made, tmp_path):
    folder = copied(Path.home() / ".insightface" / "models" / "antelopev2" / "antelopev2", tmp_path / "pack")
    (folder / "glintr100.onnx").unlink()
    with pytest.raises(InputError, match="has no recogniser"):
        checkpoints.load(made / "slim", base=made / "base", device="cpu", head=HEAD, face_pack=folder)
    with pytest.raises(InputError, match="There is no folder .* for the face pack"):
        checkpoints.load("instantid", device="cpu", head=HEAD, face_pack=tmp_path / "none")


# ---------------------------------------------------------------------- check


def test_the_mini_passes_its_check(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["check", str(MINI)])
    out = capsys.readouterr().out
    assert ended.value.code == 0 and "no problems found" in out and "PROBLEM" not in out
    assert all(part in out for part in ("unet", "mixer", "ffrnet", "face_analyser", "scorer"))


def test_check_says_what_a_slim_folder_takes_from_elsewhere(made):
    report = verify.check(made / "slim")
    assert report.problems == () and report.absent["face_encoder"].startswith("laion/")
    assert "not there, taken from elsewhere: unet (the base model)" in verify.table(report)


def test_check_finds_what_is_wrong(made, tmp_path):
    folder = copied(made / "slim", tmp_path / "bad")
    file = folder / "mixer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    key = min(tensors)
    tensors["surplus"] = torch.zeros(1)
    tensors["queries"] = tensors["queries"][:, :2].contiguous().half()
    del tensors[key]
    save_file(tensors, file)
    shutil.rmtree(folder / "ffrnet")
    problems = " ".join(verify.check(folder).problems)
    assert "ffrnet is missing" in problems
    assert f"mixer: 1 tensors are missing, such as {key}" in problems
    assert "mixer: 1 tensors have other shapes, such as queries: (1, 2, 24), not (1, 4, 24)" in problems
    assert "mixer: 1 tensors belong to no such model, such as surplus" in problems
    assert "mixer: its tensors are of several dtypes, F16, F32" in problems
    with pytest.raises(SystemExit) as ended:
        main(["check", str(folder)])
    assert ended.value.code == 1


def test_check_compares_parts_with_each_other():
    unet = dict(tiny_unet(4).config)
    assert verify.mismatches({"unet": unet, "mixer": {"token_dim": 32}}) == []
    (problem,) = verify.mismatches({"unet": unet, "mixer": {"token_dim": 2048}})
    assert "width of the face tokens is 2048, the UNet's 32" in problem
    (problem,) = verify.mismatches({"mixer": {"clip_dim": 1280}, "face_encoder": {"hidden_size": 1024}})
    assert "face encoder's width is 1024" in problem
    ffrnet = dict(ControlNetModel.from_unet(tiny_unet(4), load_weights_from_unet=False).config)
    (problem,) = verify.mismatches({"unet": unet, "ffrnet": ffrnet | {"addition_embed_type": None}})
    assert "ControlNet is for Stable Diffusion 1 or 2" in problem


def test_check_of_no_checkpoint(tmp_path, capsys):
    with pytest.raises(SystemExit, match="There is no folder"):
        main(["check", str(tmp_path / "none")])
    with pytest.raises(SystemExit, match="has no facesnap.json"):
        main(["check", str(tmp_path)])


# ---------------------------------------------------------------------- init


def test_an_untrained_facesnap_changes_nothing_of_its_base(full_hub, made, tmp_path):
    said = checkpoints.init(tmp_path / "start", base=made / "base", head=HEAD).settings.about["start"]
    assert verify.check(tmp_path / "start").problems == () and not list(tmp_path.glob("*.tmp"))
    pipe = FaceSnapPipeline.from_pretrained(tmp_path / "start")
    assert pipe.settings.size == 32 and (pipe.settings.steps, pipe.settings.guidance) == (30, 5.0)
    assert said == pipe.settings.about["start"] and "outputs, which are zero" in said["new"]
    assert "antelopev2" in pipe.settings.about["license"]
    assert torch.equal(pipe.ffrnet.conv_in.weight, pipe.unet.conv_in.weight)
    assert pipe.mixer.config.width == pipe.face_encoder.config.hidden_size
    pipe.set_progress_bar_config(disable=True)
    pipe.face_analyser = TinyAnalyser(pipe.head_model)
    how = {"height": 64, "width": 64, "num_inference_steps": 2, "guidance_scale": 2.0, "output_type": "latent"}
    ours = pipe("a photo", reference=photo(1), seed=3, score=False, **how).images
    stock = StableDiffusionXLPipeline(**{name: getattr(pipe, name) for name in BASE_PARTS})
    stock.set_progress_bar_config(disable=True)
    assert torch.equal(ours, stock("a photo", generator=torch.Generator().manual_seed(3), **how).images)


def test_a_start_is_on_sdxl_base_and_its_portraits_on_any(full_hub, pack, tmp_path, monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        pipe = checkpoints.init(tmp_path / "start", head=HEAD)
    assert pipe.settings.about["start"]["base"] == "stabilityai/stable-diffusion-xl-base-1.0"
    assert (pipe.settings.steps, pipe.settings.guidance) == (30, 5.0)
    assert (tmp_path / "start" / "scorer" / "recogniser.onnx").is_file()  # AuraFace's
    assert verify.check(tmp_path / "start").problems == ()
    made_with = checkpoints.load(tmp_path / "start", base=checkpoints.TURBO, device="cpu")
    assert (made_with.settings.steps, made_with.settings.guidance) == (8, 2.0)
    assert type(made_with.scheduler) is DPMSolverSinglestepScheduler
    monkeypatch.setenv("FACESNAP_MODEL", str(tmp_path / "start"))
    monkeypatch.setenv("FACESNAP_BASE", checkpoints.TURBO)
    assert checkpoints.load(device="cpu").settings.steps == 8


def test_a_distilled_base_is_warned_of_and_brings_its_sampler(full_hub, pack, tmp_path):
    with pytest.warns(UserWarning, match="dreamshaper-xl-v2-turbo is a distilled base.*Train on stabilityai"):
        pipe = checkpoints.init(tmp_path / "start", base=checkpoints.TURBO, head=HEAD)
    assert (pipe.settings.steps, pipe.settings.guidance) == (8, 2.0) and pipe.settings.about["start"]["distilled"]
    assert type(FaceSnapPipeline.from_pretrained(tmp_path / "start").scheduler) is DPMSolverSinglestepScheduler
    assert sources.is_distilled("models/sdxl_LCM.safetensors") and not sources.is_distilled("mini")
    more = {"base": checkpoints.TURBO, "head": HEAD}
    again, other = (checkpoints.init(tmp_path / str(seed), seed=seed, **more).mixer.queries for seed in (0, 1))
    assert torch.equal(pipe.mixer.queries, again) and not torch.equal(again, other)


def test_instantids_controlnet_is_kept_but_for_its_drawing(full_hub, pack, made, tmp_path, capsys):
    main(["init", "--ffrnet", "instantid", "--head", str(HEAD), "--out", str(tmp_path / "start")])
    assert "kept: InstantID's encoder" in capsys.readouterr().out
    pipe = FaceSnapPipeline.from_pretrained(tmp_path / "start")
    assert "InstantX/InstantID" in pipe.settings.about["license"]
    theirs = ControlNetModel.from_pretrained(made / "instantid" / "ControlNetModel").state_dict()
    for key, tensor in pipe.ffrnet.state_dict().items():
        if not key.startswith("controlnet_cond_embedding"):
            assert torch.equal(tensor, theirs[key].half().float()), key
    assert not any(tensor.any() for tensor in pipe.ffrnet.controlnet_cond_embedding.conv_out.parameters())


def test_ffrnet_from_a_folder_or_a_facesnap(full_hub, pack, made, tmp_path):
    wanted = load_file(made / "slim" / "ffrnet" / "diffusion_pytorch_model.safetensors")
    for name, folder in (("a", made / "slim"), ("b", made / "slim" / "ffrnet")):
        got = checkpoints.init(tmp_path / name, base=made / "base", ffrnet=folder, head=HEAD).ffrnet.state_dict()
        assert all(torch.equal(got[key], tensor.half()) for key, tensor in wanted.items())


@pytest.mark.parametrize(
    ("mixer", "variant"), [*((m, "predicted") for m in MIXERS), *(("full", v) for v in VARIANTS if v != "predicted")]
)
def test_every_row_of_tables_2_and_3_begins_and_trains(mixer, variant, full_hub, pack, made, tmp_path):
    words = ["init", "--base", str(made / "base"), "--head", str(HEAD), "--mixer", mixer, "--variant", variant]
    main([*words, "--out", str(tmp_path / "start")])
    began = FaceSnapPipeline.from_pretrained(tmp_path / "start")
    assert began.settings.variant == variant and began.mixer.config.variant == mixer
    assert (began.ffrnet is None) == (variant == "none")
    config = read_config(
        None,
        [f"model={tmp_path / 'start'}", "shards=none", f"out={tmp_path / 'run'}", "steps=2", "warmup=0", "lr=1e-3",
         "device=cpu", "precision=fp32", "sheet_every=0", "save_dtype=fp32", "gradient_checkpointing=false"],
    )  # fmt: skip
    run(config, stream=stream(1))  # at the first step the outputs are zero, and the mixer learns nothing yet
    trained = FaceSnapPipeline.from_pretrained(tmp_path / "run" / "model")
    assert trained.settings.variant == variant and "training" in trained.settings.about
    assert not torch.equal(trained.mixer.norm_out.weight, began.mixer.norm_out.weight)


def test_a_facesnap_lends_what_is_not_learned(tmp_path):
    checkpoints.init(tmp_path / "start", base="mini")
    assert verify.check(tmp_path / "start").problems == ()
    for part in ("face_pack", "head", "scorer"):
        for file in (tmp_path / "start" / part).glob("*.onnx"):
            assert file.read_bytes() == (MINI / part / file.name).read_bytes()
    ours, theirs = (json.loads((folder / "facesnap.json").read_text()) for folder in (tmp_path / "start", MINI))
    assert all(ours[key] == theirs[key] for key in ("size", "steps", "guidance", "variant"))


def test_what_cannot_be_a_start_is_refused(full_hub, pack, made, tmp_path, monkeypatch):
    def refused(sentence, **how):
        with pytest.raises(InputError, match=sentence):
            checkpoints.init(tmp_path / "start", **({"base": made / "base", "head": HEAD} | how))
        assert not (tmp_path / "start").exists() and not (tmp_path / "start.tmp").exists()

    refused("There is no FFRNet 'instantd'; did you mean 'instantid'", ffrnet="instantd")
    refused("There is no mixer 'fll'; choose full, id, clip, concat", mixer="fll")
    refused("There is no variant 'grey'; choose predicted", variant="grey")
    refused("There is no base model 'nothing'", base="nothing")
    refused(
        "The VAE's latent channels is 16, the ControlNet's 4|ControlNet's .* the UNet's",
        base="mini",
        ffrnet=made / "slim",
    )
    other = copied(made / "base", tmp_path / "inpainting")
    unet = tiny_unet(9, 4)
    shutil.rmtree(other / "unet")
    unet.save_pretrained(other / "unet")
    half(other / "unet")
    refused("takes 9 channels, 4 of them latents", base=other)
    monkeypatch.setattr(
        FaceSnapPipeline,
        "save_pretrained",
        lambda *a, **k: (_ for _ in ()).throw(OSError(28, "No space left on device")),
    )
    refused("could not be written .*No space left.*make room", base="mini")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="is there already and not empty"):
        checkpoints.init(tmp_path / "full", base="mini")


def test_a_start_is_not_fetched_unasked(hub, tmp_path, online):
    with pytest.raises(InputError, match="'FaceSnap on .*/stable-diffusion-xl-base-1.0' needs .* GB .*give --yes"):
        checkpoints.init(tmp_path / "start")

"""Names, folders and Hub ids to pipelines, over Hub caches made by hand (tiny_hub.py)."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    DPMSolverSinglestepScheduler,
    StableDiffusionXLPipeline,
)
from fake_hub import MINI, put, tiny_sdxl, write_single_file
from head_files import write_gnm
from tiny import TinyAnalyser, photo, tiny_unet
from tiny_hub import HEAD, copied

from facesnap import checkpoints
from facesnap.checkpoints import plans, sources
from facesnap.errors import InputError
from facesnap.instantid import InstantIDPipeline
from facesnap.pipeline import FaceSnapPipeline

pytestmark = pytest.mark.usefixtures("hub")


# names --------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"name": "a" * 5000}, "There is no model 'a+…'"),
        ({"name": 5}, "The model is named by a text or a path, not by a int"),
        ({"lora": "a" * 5000}, "There is no LoRA 'a+…'"),
        ({"base": 5}, "The base model is named by"),
        ({"head": "a" * 5000}, "There is no folder 'a+…' for the head"),
        ({"device": "gpu"}, "There is no device 'gpu'; give cpu, cuda or mps"),
        ({"device": "cuda"}, "has no device 'cuda'; give cpu, or leave it out"),
        ({"providers": "CPUExecutionProvider"}, r"must be a list: give \['CPUExecutionProvider'\]"),
        ({"providers": ["CPU"]}, "ONNX Runtime has no provider 'CPU'; "),
    ],
)
def test_arguments_that_name_nothing_are_said_before_anything_is_made(monkeypatch, given, sentence):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=sentence):
        checkpoints.load(**{"name": "mini", "device": "cpu"} | given)


def test_the_mini_outside_a_checkout_and_a_kind_of_tomorrow(tmp_path, monkeypatch):
    shutil.copy(MINI / "facesnap.json", tmp_path)
    told = json.loads((tmp_path / "facesnap.json").read_text())
    (tmp_path / "facesnap.json").write_text(json.dumps(told | {"kind": "holographic"}))
    with pytest.raises(
        InputError, match="has the kind 'holographic', which facesnap .* does not know; update facesnap"
    ):
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


# instantid ----------------------------------------------------------------------------------------------


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


# FaceSnap weights ---------------------------------------------------------------------------------------


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

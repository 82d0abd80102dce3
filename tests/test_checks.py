"""`python -m facesnap.checkpoints check`, and the bases that cannot be used (tiny_hub.py)."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionPipeline,
)
from fake_hub import MINI, put
from safetensors.torch import load_file, save_file
from tiny import tiny_unet
from tiny_hub import HEAD, copied, load_on

from facesnap import checkpoints
from facesnap.checkpoints import sources, verify
from facesnap.checkpoints.__main__ import main
from facesnap.errors import InputError

pytestmark = pytest.mark.usefixtures("hub")


# bases that cannot be used ------------------------------------------------------------------------------


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


# check --------------------------------------------------------------------------------------------------


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

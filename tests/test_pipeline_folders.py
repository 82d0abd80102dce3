"""What a checkpoint folder holds: written and read again, damaged, incomplete; and the mini's."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    StableDiffusionXLPipeline,
)
from portraits import ALICE, BOB, pixels, plain, portrait, same, state
from tiny import SIZE, tiny_pipeline

from facesnap.errors import InputError
from facesnap.pipeline import FaceSnapPipeline


@pytest.fixture(scope="module")
def saved(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    pipe.save_pretrained(folder)
    return folder


def test_save_load_same_picture(pipe, saved, tiny_readers):
    again = FaceSnapPipeline.from_pretrained(saved)
    again.set_progress_bar_config(disable=True)
    assert again.settings == pipe.settings
    first, second = portrait(pipe, pose=BOB), portrait(again, pose=BOB)
    assert same(first, second)
    np.testing.assert_allclose(first.landmarks, second.landmarks, atol=1e-3)
    assert first.identity_scores == pytest.approx(second.identity_scores, abs=1e-2)


def test_stock_sdxl_loads_the_folder(pipe, saved, caplog):
    index = json.loads((saved / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionXLPipeline"
    assert not set(index) & {"mixer", "ffrnet", "face_encoder", "face_analyser", "head_model", "scorer"}
    stock = StableDiffusionXLPipeline.from_pretrained(saved)
    assert np.array_equal(plain(stock), pixels(portrait(pipe, ffrnet_scale=0)))


def test_half_precision_files_keep_the_text_encoders_whole_and_the_pipeline_as_it_was(pipe, tmp_path, tiny_readers):
    before = state(pipe)
    pipe.save_pretrained(tmp_path, dtype=torch.float16, max_shard_size="20KB")
    assert state(pipe) == before
    assert len(list((tmp_path / "unet").glob("*.safetensors"))) > 1
    stock = StableDiffusionXLPipeline.from_pretrained(tmp_path)  # no dtype given
    assert stock.text_encoder.dtype == stock.unet.dtype == torch.float32
    again = FaceSnapPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert {again.mixer.dtype, again.ffrnet.dtype, again.face_encoder.dtype} == {torch.float32}
    difference = np.abs(pixels(portrait(again)).astype(int) - pixels(portrait(pipe)))
    assert difference.mean() < 4


def test_every_module_takes_the_dtype_asked_for(saved, tiny_readers):
    again = FaceSnapPipeline.from_pretrained(saved, torch_dtype=torch.bfloat16)
    again.set_progress_bar_config(disable=True)
    modules = [c for c in again.components.values() if isinstance(c, torch.nn.Module)]
    assert {m.dtype for m in modules} == {torch.bfloat16} and not any(m.training for m in modules)
    assert portrait(again).images[0].size == (SIZE, SIZE)


def test_half_precision_on_a_cpu_is_refused(saved, tiny_readers):
    half = FaceSnapPipeline.from_pretrained(saved, torch_dtype=torch.float16)
    with pytest.raises(InputError, match="half precision, in which a CPU is many times slower; load it with"):
        half("a photo", reference=ALICE)
    assert half.preview(ALICE).landmarks.shape == (72, 2)  # which no weights are needed for


def test_hub_ids_are_snapshotted_first(saved, tiny_readers, monkeypatch):
    asked = []
    monkeypatch.setattr("facesnap.folder.hf_hub_download", lambda name, file: asked.append(file))
    monkeypatch.setattr("facesnap.folder.snapshot_download", lambda name: asked.append(name) or saved)
    assert FaceSnapPipeline.from_pretrained("somebody/facesnap").settings.name == "tiny"
    assert asked == ["facesnap.json", "somebody/facesnap"]


def test_missing_folder_is_named(monkeypatch):
    def offline(name, file):
        raise OSError("no network")

    monkeypatch.setattr("facesnap.folder.hf_hub_download", offline)
    with pytest.raises(InputError, match="no folder 'assets/nowhere', and the Hub gave none"):
        FaceSnapPipeline.from_pretrained("assets/nowhere")
    with pytest.raises(InputError, match="no folder './nowhere'; give the folder"):
        FaceSnapPipeline.from_pretrained("./nowhere")


@pytest.mark.parametrize("part", ["facesnap.json", "mixer", "ffrnet", "face_pack", "head", "unet", "vae", "tokenizer"])
def test_missing_part_is_named(saved, tmp_path, tiny_readers, part):
    folder = shutil.copytree(saved, tmp_path / "copy")
    if (folder / part).is_dir():
        shutil.rmtree(folder / part)
    else:
        (folder / part).unlink()
    with pytest.raises(InputError, match="plain SDXL checkpoint" if part == "facesnap.json" else f"has no {part}"):
        FaceSnapPipeline.from_pretrained(folder)


@pytest.mark.parametrize(
    ("file", "part"),
    [
        ("mixer/diffusion_pytorch_model.safetensors", "mixer"),
        ("head/model.safetensors", "head"),
        ("face_encoder/config.json", "face_encoder"),
        ("unet/diffusion_pytorch_model.safetensors", "base model"),
        ("facesnap.json", "facesnap.json"),
    ],
)
def test_damaged_part_is_named(saved, tmp_path, tiny_readers, file, part):
    folder = shutil.copytree(saved, tmp_path / "copy")
    (folder / file).write_bytes((folder / file).read_bytes()[:100])
    with pytest.raises(InputError, match=f"The {part} of the checkpoint .* cannot be read"):
        FaceSnapPipeline.from_pretrained(folder)


def test_weights_that_lack_tensors_are_damaged(saved, tmp_path, tiny_readers):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(saved, tmp_path / "copy")
    file = folder / "ffrnet/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors.pop("controlnet_mid_block.weight")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match="ffrnet"):
        FaceSnapPipeline.from_pretrained(folder)


@pytest.mark.parametrize(("part", "tensor"), [("unet", "conv_in.bias"), ("text_encoder", "norm.bias"), ("vae", "to_q")])
def test_a_base_model_that_lacks_tensors_is_damaged(saved, tmp_path, tiny_readers, part, tensor):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(saved, tmp_path / "copy")
    (file,) = (folder / part).glob("*.safetensors")
    tensors = load_file(file)
    gone = next(key for key in tensors if tensor in key)
    tensors.pop(gone)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=f"is damaged: {part}: 1 tensors are missing.*Fetch or build it again"):
        FaceSnapPipeline.from_pretrained(folder)
    parts = {part: getattr(FaceSnapPipeline.from_pretrained(saved), part)}
    assert getattr(FaceSnapPipeline.from_pretrained(folder, **parts), part) is parts[part]  # it is not read then


def test_arguments_that_nobody_knows_are_refused(pipe):
    with pytest.raises(TypeError, match="unexpected argument 'sede'"):
        portrait(pipe, sede=3)
    with pytest.raises(TypeError, match="unexpected argument 'yaw'; give it to `preview`"):
        portrait(pipe, yaw=30)


def test_checkpoint_trained_without_ffrnet_needs_none(pipe, tmp_path, tiny_readers):
    without = tiny_pipeline(ffrnet=None)
    without.settings = replace(without.settings, variant="none")
    without.save_pretrained(tmp_path)
    again = FaceSnapPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert again.ffrnet is None
    assert same(portrait(again), portrait(pipe, variant="none"))


def test_saving_over_the_folder_it_came_from(saved, tmp_path, tiny_readers):
    folder = shutil.copytree(saved, tmp_path / "copy")
    again = FaceSnapPipeline.from_pretrained(folder)
    again.settings = replace(again.settings, steps=3)
    again.save_pretrained(folder)
    assert FaceSnapPipeline.from_pretrained(folder).settings.steps == 3


def test_scorer_may_be_absent(saved, tmp_path, tiny_readers):
    folder = shutil.copytree(saved, tmp_path / "copy")
    shutil.rmtree(folder / "scorer")
    again = FaceSnapPipeline.from_pretrained(folder)
    again.set_progress_bar_config(disable=True)
    assert portrait(again).identity_scores == ()


# the mini -----------------------------------------------------------------------------------------------


ASSETS = Path(__file__).parents[1] / "assets"


@pytest.fixture(scope="module")
def mini():
    if not (ASSETS / "mini" / "facesnap.json").is_file():
        pytest.skip("assets/mini is not built yet")
    pipe = FaceSnapPipeline.from_pretrained(ASSETS / "mini")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_the_mini_comes_back_from_a_folder_pack_and_head_included(mini, tmp_path):
    reference = min((ASSETS / "examples").glob("*.png"))
    mini.save_pretrained(tmp_path, max_shard_size="9MB")
    again = FaceSnapPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    made = [
        portrait(p, "a photo of a person", reference=reference, pose="quarter-left", num_inference_steps=2)
        for p in (mini, again)
    ]
    assert same(*made)
    assert np.array_equal(made[0].face.embedding, made[1].face.embedding)
    np.testing.assert_allclose(made[0].landmarks, made[1].landmarks, atol=1e-3)
    assert made[0].identity_scores == pytest.approx(made[1].identity_scores, abs=1e-2)


def test_the_mini_refuses_a_picture_without_a_face(mini):
    with pytest.raises(InputError, match="The reference photo: No face was found"):
        mini.preview(np.full((256, 256, 3), 127, np.uint8))


def test_the_face_encoder_is_shown_as_much_colour_as_the_checkpoint_says(pipe, monkeypatch):
    face = pipe.analyse(ALICE)
    gray = replace(face, crop=np.repeat(np.round(face.crop @ [0.299, 0.587, 0.114])[..., None], 3, -1).astype(np.uint8))
    states = {}
    for saturation in (1.0, 0.5, 0.0):
        monkeypatch.setattr(pipe, "settings", replace(pipe.settings, saturation=saturation))
        states[saturation] = [pipe.encode_faces([one])[1] for one in (face, gray)]
    apart = [float((coloured - pale).abs().max()) for coloured, pale in states.values()]
    assert apart[0] > apart[1] > apart[2] and apart[2] < 0.05 * apart[0]

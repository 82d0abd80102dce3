"""Checkpoint folders: what is never read, what a newer one says, and what is written."""

import json
import re
import shutil
from inspect import signature
from types import SimpleNamespace

import httpx
import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import RemoteEntryNotFoundError
from safetensors.torch import load_file
from tiny import photo, tiny_pipeline

from facesnap import checkpoints
from facesnap.checkpoints import verify
from facesnap.errors import InputError
from facesnap.pipeline import FaceSnapPipeline

ALICE = photo(1)


def pixels(pipe, **arguments):
    pipe.set_progress_bar_config(disable=True)
    return pipe("a photo", reference=ALICE, pose="front", seed=1, output_type="np", **arguments).images


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("part", ["mixer", "ffrnet", "face_encoder", "unet", "vae", "text_encoder", "text_encoder_2"])
def test_pickled_weights_are_never_read(saved, tmp_path, tiny_readers, part):
    """Not even where nothing else is there: unpickling runs what the file says."""
    folder = shutil.copytree(saved, tmp_path / "copy")
    (file,) = (folder / part).glob("*.safetensors")
    pickled = "pytorch_model.bin" if file.name == "model.safetensors" else "diffusion_pytorch_model.bin"
    torch.save(load_file(file), folder / part / pickled)
    file.unlink()
    with pytest.raises(InputError, match="cannot be read"):
        FaceSnapPipeline.from_pretrained(folder)


def test_pickles_cannot_be_asked_for(saved, tiny_readers):
    FaceSnapPipeline.from_pretrained(saved, use_safetensors=True)  # as it is anyway
    with pytest.raises(InputError, match="safetensors only, never pickles; leave out use_safetensors=False"):
        FaceSnapPipeline.from_pretrained(saved, use_safetensors=False)


@pytest.mark.parametrize(
    ("setting", "named"),
    [({"aura": 1}, "'aura'"), ({"kind": "aura"}, "the kind 'aura'"), ({"variant": "aura"}, "the variant 'aura'")],
)
def test_a_setting_of_a_later_version_is_named_with_both_versions(saved, tmp_path, setting, named):
    settings = json.loads((saved / "facesnap.json").read_text())
    assert settings["facesnap"] == "0.1.0"  # which wrote it
    (tmp_path / "facesnap.json").write_text(json.dumps(settings | {"facesnap": "0.9"} | setting))
    said = f"written by facesnap 0.9 has {named}, which facesnap 0.1.0 does not know; update"
    with pytest.raises(InputError, match=said):
        FaceSnapPipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize("setting", [{"steps": "8"}, {"size": None}, {"guidance": True}, {"about": []}])
def test_a_setting_of_another_kind_is_named(saved, tmp_path, setting):
    settings = json.loads((saved / "facesnap.json").read_text())
    (tmp_path / "facesnap.json").write_text(json.dumps(settings | setting))
    ((name, value),) = setting.items()
    with pytest.raises(InputError, match=re.escape(f"has {value!r} as its {name}, where something like")):
        FaceSnapPipeline.from_pretrained(tmp_path)


def test_the_whole_scorer_is_saved_and_check_says_what_evaluation_would_miss(saved, tmp_path, tiny_readers):
    folder = shutil.copytree(saved, tmp_path / "copy")
    missed = verify.check(folder).unevaluated
    assert missed == ("attributes.json", "attributes_face.onnx", "attributes_whole.onnx")
    assert "facesnap.evaluation would miss of scorer/: attributes.json, attr" in verify.table(verify.check(folder))
    for name in missed:
        (folder / "scorer" / name).write_text(name)
    FaceSnapPipeline.from_pretrained(folder).save_pretrained(tmp_path / "again")
    assert verify.check(tmp_path / "again").unevaluated == ()
    assert (tmp_path / "again" / "scorer" / "attributes.json").read_text() == "attributes.json"


def test_a_half_precision_pipeline_comes_back(tmp_path, tiny_readers):
    """The text encoders are written in float32 whatever they are, since transformers would keep a file's own dtype."""
    pipe = tiny_pipeline().to(torch.bfloat16)
    pipe.save_pretrained(tmp_path)
    again = FaceSnapPipeline.from_pretrained(tmp_path)
    modules = {name: part.dtype for name, part in again.components.items() if isinstance(part, torch.nn.Module)}
    assert set(modules.values()) == {torch.float32} and pipe.text_encoder.dtype == torch.bfloat16
    assert pixels(again).shape[0] == 1


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_both_names_of_the_dtype_are_known(saved, tiny_readers, name):
    again = FaceSnapPipeline.from_pretrained(saved, **{name: torch.bfloat16})
    assert {part.dtype for part in again.components.values() if isinstance(part, torch.nn.Module)} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"dtype": "bfloat16"}, "The dtype is 'bfloat16'; give one of torch's"),
        ({"dtype": {"unett": torch.float16}}, "no part 'unett' to have a dtype; did you mean 'unet'"),
        ({"device_map": "auto"}, "or leave out device_map"),
        ({"proxies": {"https": "proxy:3128"}}, "takes proxies from the environment only: set HTTPS_PROXY"),
    ],
)
def test_an_argument_that_does_not_fit_is_not_taken_for_damage(saved, tiny_readers, arguments, said):
    with pytest.raises(InputError, match=said):
        FaceSnapPipeline.from_pretrained(saved, **arguments)


@pytest.mark.parametrize("name", [None, 5, "a" * 5000])
def test_what_names_no_folder_is_said(name):
    with pytest.raises(InputError, match="named by its folder or its Hub id|There is no folder"):
        FaceSnapPipeline.from_pretrained(name)


@pytest.mark.parametrize(
    ("place", "options", "said"),
    [
        ("file", {}, "There can be no folder '.*file' .FileExistsError"),
        ("file/x", {}, "There can be no folder '.*x' .NotADirectoryError"),
        ("new", {"variant": "a/b"}, "cannot be 'a/b'"),
        ("new", {"dtype": "float16"}, "The dtype is 'float16'"),
    ],
)
def test_what_cannot_be_saved_so_is_said(pipe, tmp_path, place, options, said):
    (tmp_path / "file").write_text("words")
    with pytest.raises(InputError, match=said):
        pipe.save_pretrained(tmp_path / place, **options)


def test_saving_deletes_nothing_of_a_folder_that_is_no_checkpoint(tmp_path):
    pipe = tiny_pipeline()
    (tmp_path / "scorer").mkdir()
    pipe.register_modules(scorer=None)
    pipe.save_pretrained(tmp_path)
    assert (tmp_path / "scorer").is_dir()


def test_files_of_a_variant_are_written_and_read(tmp_path, tiny_readers):
    pipe = tiny_pipeline()
    pipe.save_pretrained(tmp_path, variant="fp16", dtype=torch.float16)
    for name in ("unet", "mixer", "text_encoder"):
        assert [file.name.endswith(".fp16.safetensors") for file in (tmp_path / name).glob("*.safetensors")] == [True]
    again = FaceSnapPipeline.from_pretrained(tmp_path, variant="fp16", dtype=torch.float32)
    assert abs(pixels(again) - pixels(pipe)).mean() < 0.01


@pytest.mark.parametrize("part", ["unet", "text_encoder_2", "mixer"])
def test_files_of_a_variant_that_are_not_there_are_named(tmp_path, tiny_readers, part):
    tiny_pipeline().save_pretrained(tmp_path, variant="fp16")
    for file in (tmp_path / part).glob("*.fp16.safetensors"):
        file.rename(str(file).replace(".fp16", ""))
    with pytest.raises(InputError, match=f"The {part} of the checkpoint .* has no files of variant 'fp16'"):
        FaceSnapPipeline.from_pretrained(tmp_path, variant="fp16")


def test_a_folder_is_written_over_another(tmp_path, tiny_readers):
    pipe = tiny_pipeline()
    pipe.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "unet" / "diffusion_pytorch_model.safetensors.index.json").exists()
    pipe.register_modules(scorer=None)
    pipe.save_pretrained(tmp_path)
    again = FaceSnapPipeline.from_pretrained(tmp_path)
    assert again.scorer is None and abs(pixels(again) - pixels(pipe)).max() < 1e-4


def test_a_folder_of_a_variant_alone_names_it(tmp_path, tiny_readers):
    tiny_pipeline().save_pretrained(tmp_path, variant="fp16", max_shard_size="20KB")
    with pytest.raises(InputError, match="has files of variant 'fp16' only; load it with variant='fp16'"):
        FaceSnapPipeline.from_pretrained(tmp_path)


def test_a_size_of_pieces_that_is_none_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(InputError, match="max_shard_size is large; give bytes"):
        tiny_pipeline().save_pretrained(tmp_path / "new", max_shard_size="large")
    assert not (tmp_path / "new").exists()


def test_arguments_of_the_hub_reach_it(saved, tiny_readers, monkeypatch):
    asked = []
    for name in ("hf_hub_download", "snapshot_download"):
        taken = signature(getattr(huggingface_hub, name))
        answer = lambda *a, taken=taken, **how: asked.append(taken.bind(*a, **how).arguments) or saved  # noqa: E731
        monkeypatch.setattr(f"facesnap.folder.{name}", answer)
    given = {"revision": "abc", "token": "t", "cache_dir": "/c", "local_files_only": True, "force_download": True}
    FaceSnapPipeline.from_pretrained("somebody/facesnap", **given)
    named = {"repo_id": "somebody/facesnap"}
    assert asked == [given | named | {"filename": "facesnap.json"}, given | named]


def test_of_a_repository_without_facesnap_nothing_else_is_fetched(monkeypatch):
    def no_such_file(name, file, **how):
        raise RemoteEntryNotFoundError("no such file", response=httpx.Response(404, request=httpx.Request("GET", "/")))

    monkeypatch.setattr("facesnap.folder.hf_hub_download", no_such_file)
    monkeypatch.setattr("facesnap.folder.snapshot_download", None)
    with pytest.raises(InputError, match="'stabilityai/sdxl' has no facesnap.json, so it holds no FaceSnap"):
        FaceSnapPipeline.from_pretrained("stabilityai/sdxl")


def test_our_parts_come_to_the_device_of_a_device_map(saved, tiny_readers, monkeypatch):
    monkeypatch.setattr("facesnap.components.read_base", lambda *a, **how: tiny_pipeline().to("meta"))
    again = FaceSnapPipeline.from_pretrained(saved, device_map="meta")
    assert {part.device.type for part in again.components.values() if isinstance(part, torch.nn.Module)} == {"meta"}


@pytest.mark.parametrize("index", ["{", "[]", "{}", '{"weight_map": 5}'])
def test_an_index_of_pieces_that_is_damaged_is_said(saved, tmp_path, tiny_readers, index):
    folder = shutil.copytree(saved, tmp_path / "copy")
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(index)
    assert "unet: the index of its files is damaged." in verify.check(folder).problems
    with pytest.raises(InputError, match="The base model of the checkpoint .* cannot be read"):
        FaceSnapPipeline.from_pretrained(folder)


@pytest.mark.parametrize("file", ["model_index.json", "unet/config.json", "mixer/config.json", "facesnap.json"])
def test_json_of_another_form_is_damage(saved, tmp_path, file):
    folder = shutil.copytree(saved, tmp_path / "copy")
    (folder / file).write_text("[]")
    with pytest.raises(InputError, match="cannot be (read|loaded)"):
        checkpoints.load(folder, device="cpu")


def test_push_to_hub_uploads_what_was_saved(tmp_path, monkeypatch):
    sent = {}
    made = lambda name, **how: SimpleNamespace(repo_id=f"me/{name}")  # noqa: E731
    monkeypatch.setattr("facesnap.components.create_repo", made)
    monkeypatch.setattr(
        FaceSnapPipeline, "_upload_folder", lambda self, folder, repo, **how: sent.update(how, folder=folder, repo=repo)
    )
    tiny_pipeline().save_pretrained(tmp_path, push_to_hub=True, repo_id="portraits", token="t", private=True)
    assert sent == {"folder": tmp_path, "repo": "me/portraits", "token": "t"}


def test_an_argument_that_saving_does_not_know_is_no_wish_of_the_hubs(pipe, tmp_path):
    with pytest.raises(TypeError, match="unexpected argument 'torch_dtype'; did you mean 'dtype'"):
        pipe.save_pretrained(tmp_path / "new", torch_dtype=torch.float16)
    assert not (tmp_path / "new").exists()


def test_pickles_are_not_written(tmp_path):
    with pytest.raises(InputError, match="safetensors only"):
        tiny_pipeline().save_pretrained(tmp_path, safe_serialization=False)


def lora(pipe, folder):
    """A LoRA of the UNet's, that changes pictures; loaded."""
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    donor = tiny_pipeline().unet
    donor.add_adapter(LoraConfig(r=2, lora_alpha=2, init_lora_weights=False, target_modules=["to_q", "to_v"]))
    type(pipe).save_lora_weights(folder, unet_lora_layers=get_peft_model_state_dict(donor))
    pipe.load_lora_weights(folder)


def test_a_fused_lora_is_saved_in_the_weights_and_a_loaded_one_is_refused(tmp_path, tiny_readers):
    pipe = tiny_pipeline()
    plain = pixels(pipe)
    lora(pipe, tmp_path / "lora")
    styled = pixels(pipe)
    with pytest.raises(InputError, match=r"LoRA lies over the unet.*fuse_lora\(\).*unload_lora_weights"):
        pipe.save_pretrained(tmp_path / "model")
    pipe.fuse_lora()
    pipe.save_pretrained(tmp_path / "model")
    again = pixels(FaceSnapPipeline.from_pretrained(tmp_path / "model"))
    assert abs(again - styled).max() < 1e-3 < abs(styled - plain).max()
    assert abs(pixels(pipe) - styled).max() < 1e-3  # the pipeline keeps its LoRA
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path / "plain")
    assert abs(pixels(FaceSnapPipeline.from_pretrained(tmp_path / "plain")) - plain).max() < 1e-3

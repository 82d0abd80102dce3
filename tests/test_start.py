"""`python -m facesnap.checkpoints init`: an untrained FaceSnap on a base (tiny_hub.py)."""

import json
import shutil
import warnings

import pytest
import torch
from diffusers import (
    ControlNetModel,
    DPMSolverSinglestepScheduler,
    StableDiffusionXLPipeline,
)
from fake_hub import MINI, half
from safetensors.torch import load_file
from tiny import TinyAnalyser, photo, tiny_unet
from tiny_batches import stream
from tiny_hub import HEAD, copied

from facesnap import checkpoints
from facesnap.checkpoints import sources, verify
from facesnap.checkpoints.__main__ import main
from facesnap.errors import InputError
from facesnap.ffrnet import VARIANTS
from facesnap.folder import BASE_PARTS
from facesnap.mixer import VARIANTS as MIXERS
from facesnap.pipeline import FaceSnapPipeline
from facesnap.training.config import read_config
from facesnap.training.train import run

pytestmark = pytest.mark.usefixtures("hub")


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

"""One step of the portrait stage: what learns, what it costs, what is dropped, cached and branched off."""

import dataclasses
from pathlib import Path

import pytest
import tiny
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tiny_batches import batch, stream
from tiny_runs import with_identity, words

from facesnap.errors import InputError
from facesnap.ffrnet import VARIANTS
from facesnap.mixer import VARIANTS as MIXERS
from facesnap.pipeline import FaceSnapPipeline
from facesnap.training import train
from facesnap.training.config import read_config
from facesnap.training.portraits import PortraitStage
from facesnap.training.train import run

pytestmark = pytest.mark.usefixtures("tiny_readers")


def stage_of(start: Path, tmp_path: Path, pipe=None, **changes) -> PortraitStage:
    config = read_config(None, words(start, tmp_path, **changes))
    return train.make_stage(config, stream(2), torch.device("cpu"))


def one_loss(stage: PortraitStage, made=None) -> torch.Tensor:
    loss, _ = stage.loss(made or batch(0, 0, 2), 0, torch.Generator().manual_seed(1))
    return loss


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_row_of_tables_2_and_3_trains_all_that_learns(start, tmp_path, mixer, variant):
    """No parameter is without a gradient: with several processes DDP would wait for it for ever."""
    if mixer != "full" and variant != "predicted":
        pytest.skip("no row of the tables")
    model = start / "model"
    if mixer != "full":
        model = tmp_path / "model"
        tiny.tiny_pipeline(mixer=tiny.tiny_mixer(mixer)).save_pretrained(model)
    stage = stage_of(start, tmp_path, model=model, variant=variant)
    one_loss(stage).backward()
    for part, module in stage.modules().items():
        for name, parameter in module.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad, f"{part}.{name}"
    assert ("ffrnet" in stage.modules()) == (variant != "none")
    assert all(not p.requires_grad for p in stage.pipe.unet.parameters())


def test_light_training_leaves_the_unets_encoder_in_ffrnet(start, tmp_path):
    run(read_config(None, words(start, tmp_path, steps=2, learn="light")), stream=stream(2))
    began, ended = (FaceSnapPipeline.from_pretrained(f) for f in (start / "model", tmp_path / "model"))
    for part in ("mixer", "ffrnet"):
        after = dict(getattr(ended, part).named_parameters())
        for name, before in getattr(began, part).named_parameters():
            learns = part == "mixer" or any(word in name for word in ("attn2.", "add_embedding.", "controlnet_"))
            assert torch.equal(after[name], before) != learns, f"{part}.{name}"


def test_gradient_checkpointing_changes_nothing_but_memory(start, tmp_path):
    found = []
    for on in ("false", "true"):
        stage = stage_of(start, tmp_path, gradient_checkpointing=on, **with_identity(start))
        one_loss(stage).backward()
        found.append({f"{n}.{k}": p.grad for n, m in stage.modules().items() for k, p in m.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-6)


def test_a_compiled_step_is_the_same_step(start, tmp_path):
    found = []
    for options in ({}, {"compile": "eager"}):  # dynamo's whole front end, without a compiler behind it
        stage = stage_of(start, tmp_path, **options)
        one_loss(stage).backward()
        found.append({f"{n}.{k}": p.grad for n, m in stage.modules().items() for k, p in m.named_parameters()})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-6)


def test_caches_give_the_same_loss_without_the_encoders(start, tmp_path, monkeypatch):
    fly = one_loss(stage_of(start, tmp_path))
    options = {"cache": tmp_path / "cache", "data__augment": "false"}
    first = one_loss(stage_of(start, tmp_path, **options))
    stage = stage_of(start, tmp_path, **options)

    def never(*args, **kwargs):
        raise AssertionError("asked though it is in the cache")

    monkeypatch.setattr(stage.pipe.vae, "encode", never)
    monkeypatch.setattr(stage.pipe, "encode_prompt", never)
    assert torch.equal(one_loss(stage), first)
    assert first.item() == pytest.approx(fly.item(), rel=1e-2)  # latents are kept in bfloat16
    with pytest.raises(AssertionError, match="asked though"):  # pictures that are augmented are new each time
        stage.source.latent_cache = None
        one_loss(stage)


def test_a_dropped_face_says_nothing_of_the_reference(start, tmp_path):
    stage = stage_of(start, tmp_path)
    made, other = batch(0, 0, 2), batch(0, 0, 2)
    other["embeddings"] = other["embeddings"] + 1
    assert not torch.equal(one_loss(stage, made), one_loss(stage, other))
    for b in (made, other):
        b["drop_face"] = torch.tensor([True, True])
    assert torch.equal(one_loss(stage, made), one_loss(stage, other))


def test_dropped_text_is_the_pipelines_unconditional_one(start, tmp_path):
    stage = stage_of(start, tmp_path)
    made = batch(0, 0, 2)
    made["captions"], made["drop_text"] = ["a hat", "a hat"], torch.tensor([False, True])
    given = stage.conditions(made)
    assert given.text[0].abs().sum() > 0 and (given.text[1] == 0).all() and (given.pooled[1] == 0).all()
    assert torch.equal(given.bare_text[0], given.bare_text[1])


def test_the_lightning_branch_is_a_unet_or_a_lora_of_the_base(start, tmp_path):
    pipe = FaceSnapPipeline.from_pretrained(start / "model")
    before = {k: v.clone() for k, v in pipe.unet.state_dict().items()}
    other = tiny.tiny_unet(seed=7)
    other.save_pretrained(tmp_path / "unet")
    read = train.load_lightning(str(tmp_path / "unet"), pipe, torch.float32, 4)
    assert all(torch.equal(v, read.state_dict()[k]) for k, v in other.state_dict().items())

    tuned = tiny.tiny_unet()
    tuned.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    pipe.save_lora_weights(tmp_path / "lora", unet_lora_layers=get_peft_model_state_dict(tuned))
    (file,) = (tmp_path / "lora").glob("*.safetensors")
    fused = train.load_lightning(str(file), pipe, torch.float32, 4)
    changed = [k for k, v in fused.state_dict().items() if not torch.equal(v, before[k])]
    assert changed and all("to_q" in k or "to_v" in k for k in changed)
    assert all(torch.equal(v, before[k]) for k, v in pipe.unet.state_dict().items())
    x, text = torch.randn(1, 16, 4, 4), torch.randn(1, 3, tiny.TOKEN_DIM)
    added = {"text_embeds": torch.randn(1, tiny.POOLED_DIM), "time_ids": torch.zeros(1, 6)}
    with torch.no_grad():
        wanted, found = (u(x, 10, text, added_cond_kwargs=added).sample for u in (tuned, fused))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    save_file(other.state_dict(), tmp_path / "whole.safetensors")
    read = train.load_lightning(str(tmp_path / "whole.safetensors"), pipe, torch.bfloat16, 4)
    assert {v.dtype for v in read.state_dict().values()} == {torch.bfloat16}
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(other.state_dict(), tmp_path / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):  # a pickle is never read
        train.load_lightning(str(tmp_path / "unet"), pipe, torch.float32, 4)
    with pytest.raises(ValueError, match="no lightning UNet or LoRA"):
        train.load_lightning(str(tmp_path / "nothing"), pipe, torch.float32, 4)
    tiny.tiny_unet(in_channels=4).save_pretrained(tmp_path / "foreign")
    with pytest.raises(InputError, match="of another architecture than the base .in_channels 4, the base has 16"):
        train.load_lightning(str(tmp_path / "foreign"), pipe, torch.float32, 4)
    save_file(tiny.tiny_unet(in_channels=4).state_dict(), tmp_path / "foreign.safetensors")
    save_file({"lora_of_something_else": torch.zeros(2, 2)}, tmp_path / "lora.safetensors")
    (tmp_path / "torn.safetensors").write_bytes(b"torn")
    for name, sentence in (
        ("foreign", "lightning UNet 'foreign.safetensors' cannot be read .* made from the base"),
        ("lora", "LoRA 'lora.safetensors' does not fit this base"),
        ("torn", "lightning file 'torn.safetensors' cannot be read"),
    ):
        with pytest.raises(InputError, match=sentence):
            train.load_lightning(str(tmp_path / f"{name}.safetensors"), pipe, torch.float32, 4)


def test_sdxl_lightning_is_fetched_at_a_commit_for_the_steps_it_has(start, tmp_path, monkeypatch):
    pipe = FaceSnapPipeline.from_pretrained(start / "model")
    with pytest.raises(InputError, match="no UNet of 1 steps: choose identity.steps 2, 4 or 8"):
        train.load_lightning(train.LIGHTNING, pipe, torch.float32, 1)
    save_file(pipe.unet.state_dict(), tmp_path / "whole.safetensors")
    asked = []
    monkeypatch.setattr(
        train, "hf_hub_download", lambda *a, **k: asked.append((a, k)) or tmp_path / "whole.safetensors"
    )
    assert train.load_lightning(train.LIGHTNING, pipe, torch.float32, 4) is not None
    assert asked[0][0] == ("ByteDance/SDXL-Lightning", "sdxl_lightning_4step_unet.safetensors")
    assert len(asked[0][1]["revision"]) == 40  # a commit

    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(train, "hf_hub_download", offline)
    with pytest.raises(InputError, match="hf download ByteDance/SDXL-Lightning sdxl_lightning_8step_unet.safetensors"):
        train.load_lightning(train.LIGHTNING, pipe, torch.float32, 8)


def test_start_is_read_in_the_dtype_it_is_used_in(start, tmp_path):
    config = read_config(None, words(start, tmp_path, base_precision="bf16"))
    pipe = train.make_stage(config, stream(1), torch.device("cpu")).pipe
    kinds = {name: getattr(pipe, name).dtype for name in ("unet", "text_encoder", "text_encoder_2", "face_encoder")}
    assert set(kinds.values()) == {torch.bfloat16}
    assert {pipe.vae.dtype, pipe.mixer.dtype, pipe.ffrnet.dtype} == {torch.float32}


def test_latents_are_kept_in_half_of_the_bytes(start, tmp_path):
    stage = stage_of(start, tmp_path, cache=tmp_path / "cache", data__augment="false")
    first, again = (stage.source.latents(batch(0, 0, 2)) for _ in range(2))
    assert torch.equal(first, again) and first.dtype == torch.float32
    kept = [load_file(file)["latents"] for file in (tmp_path / "cache").rglob("*/latents/*/*.safetensors")]
    assert len(kept) == 2 and {x.dtype for x in kept} == {torch.bfloat16}


def test_packages_that_are_not_there_are_named(start, tmp_path, monkeypatch):
    monkeypatch.setitem(train.TRACKERS, "wandb", "a_package_nobody_has")
    with pytest.raises(ValueError, match="tracker wandb needs the package a_package_nobody_has"):
        run(read_config(None, words(start, tmp_path, trackers="[wandb]")), stream=stream(2))


def test_the_identity_part_has_the_weight_it_is_given(start, tmp_path):
    found = {}
    for weight in (0.5, 2.0):
        stage = stage_of(start, tmp_path, identity__weight=weight, **with_identity(start))
        loss, logs = stage.loss(batch(0, 0, 2), 0, torch.Generator().manual_seed(1))
        found[weight] = float(loss)
        assert float(loss) == pytest.approx(float(logs["masked"] + weight * logs["identity"]), rel=1e-5)
    every = stage_of(start, tmp_path, identity__every=3, identity__weight=0.5, **with_identity(start))
    loss, logs = every.loss(batch(0, 0, 2), 0, torch.Generator().manual_seed(1))
    assert float(loss) == pytest.approx(float(logs["masked"] + 3 * 0.5 * logs["identity"]), rel=1e-5)
    few = stage_of(start, tmp_path, identity__samples=1, **with_identity(start))
    _, logs = few.loss(batch(0, 0, 2), 0, torch.Generator().manual_seed(1))
    assert found[2.0] > found[0.5] and logs["each"].shape == (2,)
    assert dataclasses.asdict(few.identity)["samples"] == 1

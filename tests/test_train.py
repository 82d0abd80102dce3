"""Training on photographs, on the tiny FaceSnap: exact resuming, several processes, caches, faults, what is left."""

import dataclasses
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import train_in_processes
from accelerate.commands.config.config_args import load_config_from_file
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tiny_batches import batch, stream

from facesnap.errors import InputError
from facesnap.ffrnet import VARIANTS
from facesnap.mini.nets.recogniser import RecogniserNet, export_recogniser
from facesnap.mixer import VARIANTS as MIXERS
from facesnap.pipeline import FaceSnapPipeline
from facesnap.training import train
from facesnap.training.config import read_config
from facesnap.training.portraits import PortraitStage
from facesnap.training.train import run
from facesnap.training.trainer import Trainer

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """An untrained FaceSnap folder, and φ beside it."""
    folder = tmp_path_factory.mktemp("start")
    tiny.tiny_pipeline().save_pretrained(folder / "model")
    torch.manual_seed(0)
    export_recogniser(RecogniserNet((8, 8, 8, 8, 8), (1, 1, 1, 1)), folder / "phi.onnx")
    return folder


@pytest.fixture(autouse=True)
def readers(tiny_readers):
    """The tiny stand-ins of the parts that are ONNX files, for every run here."""


def words(start: Path, out: Path, **changes) -> list[str]:
    values = {
        "model": start / "model", "shards": "none", "out": out, "steps": 4, "lr": 1e-2, "warmup": 1, "ema": 0.5,
        "device": "cpu", "precision": "fp32", "gradient_checkpointing": "false", "log_every": 1, "checkpoint_every": 2,
        "sheet_every": 0, "save_dtype": "fp32",
    }  # fmt: skip
    return [f"{key.replace('__', '.')}={value}" for key, value in (values | changes).items()]


def with_identity(start: Path) -> dict:
    return {"identity__recogniser": start / "phi.onnx", "identity__steps": 2, "identity__margin": 1}


def losses(out: Path) -> list[tuple]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [tuple(line.get(key) for key in ("step", "loss", "masked", "identity", "norm")) for line in lines]


def test_a_killed_run_goes_on_with_the_losses_of_one_that_was_not(start, tmp_path):
    options = {"steps": 5, "accumulate": 2, "identity__every": 2, **with_identity(start)}
    whole = run(read_config(None, words(start, tmp_path / "whole", **options)), stream=stream(2))

    def kill(position, made):
        if position == 7:  # the second batch of step 4: after the checkpoint of step 2
            raise KeyboardInterrupt
        return made

    parts = read_config(None, words(start, tmp_path / "parts", **options))
    with pytest.raises(KeyboardInterrupt):
        run(parts, stream=stream(2, kill))
    assert [p.name for p in (tmp_path / "parts").glob("checkpoint-*")] == ["checkpoint-00000002"]
    again = run(parts, stream=stream(2))
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert [line[3] is not None for line in losses(tmp_path / "whole")] == [True, False, True, False, True]
    for a, b in zip(whole.parameters, again.parameters, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(whole.average.shadow_params, again.average.shadow_params, strict=True):
        assert torch.equal(a, b)
    assert len(list((tmp_path / "whole").glob("checkpoint-*"))) == 2  # keep


@pytest.fixture(scope="module")
def in_processes(start, tmp_path_factory) -> Path:
    """A run of one process (`one`), of two (`two`) with half the batch each, and of two that hold the weights in pieces
    (`pieces`). The clip bites, so it must be by the norm of the whole gradient."""
    folder = tmp_path_factory.mktemp("processes")
    options = {"steps": 2, "clip": 0.05, **with_identity(start)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("facesnap.folder.FaceAnalyser", tiny.TinyAnalyser)
        patch.setattr("facesnap.folder.Recogniser", tiny.TinyScorer)
        train_in_processes.steps(words(start, folder / "one", **options), 4, folder / "one.safetensors")
    told = {
        "overrides": words(start, folder / "two", **options),
        "in_pieces": words(start, folder / "pieces", **options),
        "count": 2,
        "gradients": str(folder / "two.safetensors"),
    }
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    subprocess.run(
        [*launch, str(ROOT / "tests" / "train_in_processes.py"), json.dumps(told)],
        check=True, env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, timeout=300,
    )  # fmt: skip
    return folder


def test_two_processes_give_the_gradient_of_one_with_the_double_batch(in_processes):
    one, two = (load_file(in_processes / f"{name}.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys() and any(name.startswith("mixer.") for name in one)
    for name, gradient in one.items():
        torch.testing.assert_close(two[name], gradient, rtol=1e-3, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
    assert json.loads((in_processes / "two" / "run.json").read_text())["processes"] == 2
    ours, theirs = (FaceSnapPipeline.from_pretrained(in_processes / name / "model") for name in ("one", "two"))
    torch.testing.assert_close(ours.mixer.w_out.weight, theirs.mixer.w_out.weight, atol=2e-3, rtol=0)


def test_a_loss_that_is_no_number_in_one_process_ends_both_with_its_sample(in_processes):
    told = {(in_processes / "two" / f"told-{rank}.txt").read_text() for rank in (0, 1)}
    assert len(told) == 1 and "the loss is nan at step 3 (samples 00000002_0000)" in told.pop()


def test_weights_in_pieces_give_the_losses_and_norms_of_whole_ones(in_processes):
    whole, pieces = losses(in_processes / "two"), losses(in_processes / "pieces")
    assert len(whole) == 2 and all(line[-1] > 0.05 for line in whole)
    for ours, theirs in zip(pieces, whole, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)


def test_what_a_run_leaves_is_a_facesnap(start, tmp_path):
    config = read_config(None, words(start, tmp_path, sheet_every=4))
    trainer = run(config, stream=stream(2), validation=batch(0, 0, 2), data="a fingerprint")
    pipe = FaceSnapPipeline.from_pretrained(tmp_path / "model")
    pipe.set_progress_bar_config(disable=True)
    began = FaceSnapPipeline.from_pretrained(start / "model")
    for name, value in zip(trainer.names, trainer.average.shadow_params, strict=True):
        part, _, parameter = name.partition(".")
        assert torch.equal(dict(getattr(pipe, part).named_parameters())[parameter], value), name
    assert not torch.equal(pipe.mixer.w_out.weight, began.mixer.w_out.weight)
    for name in ("unet", "vae", "text_encoder", "face_encoder"):
        kept = getattr(began, name).state_dict()
        assert all(torch.equal(v, kept[k]) for k, v in getattr(pipe, name).state_dict().items()), name
    image = pipe("a face", reference=tiny.photo(1), seed=0).images[0]
    assert image.size == (tiny.SIZE, tiny.SIZE)
    told = json.loads((tmp_path / "run.json").read_text())
    assert told["data"] == "a fingerprint" and told["config"]["lr"] == 0.01 and len(told["commit"]) >= 7
    assert told["versions"]["torch"] == torch.__version__ and told["config"]["data"]["batch_size"] == 7
    assert pipe.settings.about["training"]["steps"] == 4 and pipe.settings.size == tiny.SIZE
    figures = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    assert {"val_identity", "val_identity_true", "val_strangers", "val_retention", "val_found"} <= figures.keys()
    assert (tmp_path / "sheet.png").stat().st_size > 0


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_loss_that_is_no_number_names_step_and_sample_and_overwrites_nothing(start, tmp_path):
    def spoil(position, made):
        if position == 3:
            made["pixels"] = made["pixels"].float()
            made["pixels"][1, 0, 0, 0] = float("nan")
        return made

    with pytest.raises(FloatingPointError, match=r"the loss is nan at step 4 \(samples 00000001_0003\)"):
        run(read_config(None, words(start, tmp_path)), stream=stream(3, spoil))
    kept = files(tmp_path / "checkpoint-00000002")
    assert kept and not (tmp_path / "model").exists()
    with pytest.raises(FloatingPointError):
        run(read_config(None, words(start, tmp_path)), stream=stream(3, spoil))
    assert files(tmp_path / "checkpoint-00000002") == kept


def test_a_full_disk_leaves_the_last_checkpoint_whole(start, tmp_path):
    """The kernel refuses to let files grow: what a full disk does to a write, for real."""
    config = read_config(None, words(start, tmp_path, steps=2))
    trainer = run(config, stream=stream(2))
    kept = files(tmp_path / "checkpoint-00000002")
    trainer.step = 3
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(OSError, match="the checkpoint of step 3 could not be written .* before it is whole"):
            trainer.checkpoint()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-00000002"]
    assert files(tmp_path / "checkpoint-00000002") == kept
    assert Trainer(trainer.stage, trainer.config).step == 2


def test_a_checkpoint_of_another_architecture_is_refused(start, tmp_path):
    run(read_config(None, words(start, tmp_path / "run", steps=1)), stream=stream(2))
    tiny.tiny_pipeline(mixer=tiny.tiny_mixer(depth=1)).save_pretrained(tmp_path / "model")
    other = words(start, tmp_path / "run", steps=2, model=tmp_path / "model")
    with pytest.raises(ValueError, match="another architecture .*mixer.decoder.1.* absent here"):
        run(read_config(None, other), stream=stream(2))
    mixer = tiny.FacialAttributeMixer(
        width=8, heads=1, clip_dim=tiny.CLIP_DIM, token_dim=12, pooled_dim=tiny.POOLED_DIM, depth=1
    )
    tiny.tiny_pipeline(mixer=mixer).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="the mixer of .* another architecture .*token_dim 12, the base has 32"):
        run(read_config(None, words(start, tmp_path / "new", model=tmp_path / "model")), stream=stream(2))


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["lerning_rate=1"], "no key lerning_rate"),
        (["identity.wieght=1"], "no key identity.wieght: did you mean 'identity.weight'"),
        (["steps=many"], "steps is 'many': input should be a valid integer"),
        (["identity=3"], "identity is a section"),
        (["steps"], "'steps' is no key=value"),
        (["identity.steps=9"], "choose 1 to 8"),
        (["precision=fp8"], "precision 'fp8' is not known"),
        (["loss.weighting=heavy"], "loss.weighting 'heavy' is not known; choose none, min_snr, capped_snr"),
        (["betas=[0.9]"], "betas.1 is .*field required"),
        (["learn=half"], "learn 'half' is not known; choose all, light"),
        (["trackers=[mlflow]"], "tracker 'mlflow' is not known"),
    ],
)
def test_a_config_that_is_not_right_is_told_in_one_sentence(given, sentence):
    with pytest.raises(ValueError, match=sentence):
        read_config(None, ["model=a", "shards=b", "out=c", *given])


def test_the_command_line_says_it_and_no_more(tmp_path):
    (tmp_path / "x.yaml").write_text("model: a\nlr: 1e-5\n")
    with pytest.raises(SystemExit, match="the config lacks shards, out: add it"):
        train.main(["--config", str(tmp_path / "x.yaml")])
    with pytest.raises(SystemExit, match="there is no config at"):
        train.main(["--config", str(tmp_path / "y.yaml")])
    assert read_config(tmp_path / "x.yaml", ["shards=b", "out=c", "betas=[0.9, 0.95]"]).betas == (0.9, 0.95)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_the_configs_parse(path):
    if path.name.startswith("accelerate"):
        told = load_config_from_file(str(path))
        assert told.num_processes > 1
        if "zero2" in path.name:
            assert told.distributed_type.value == "DEEPSPEED" and told.deepspeed_config["zero_stage"] == 2
        if "fsdp" in path.name:
            assert told.distributed_type.value == "FSDP" and told.fsdp_config
    else:
        config = read_config(path, ["model=a", "shards=b", "out=c"])
        assert config.lr > 0 and config.trainer().steps == config.steps


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
    with pytest.raises(ValueError, match="no lightning UNet or LoRA"):
        train.load_lightning(str(tmp_path / "nothing"), pipe, torch.float32, 4)
    tiny.tiny_unet(in_channels=4).save_pretrained(tmp_path / "foreign")
    with pytest.raises(InputError, match="of another architecture than the base .in_channels 4, the base has 16"):
        train.load_lightning(str(tmp_path / "foreign"), pipe, torch.float32, 4)


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


def test_losses_go_to_tensorboard(start, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(read_config(None, words(start, tmp_path, steps=2, trackers="[tensorboard]")), stream=stream(2))
    events = EventAccumulator(str(tmp_path / "facesnap"))
    events.Reload()
    assert [e.step for e in events.Scalars("loss")] == [1, 2]
    assert np.allclose([e.value for e in events.Scalars("loss")], [line[1] for line in losses(tmp_path)], rtol=1e-4)


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


def test_shards_of_another_recogniser_are_refused(start, prepared, tmp_path):
    """The mini's embeddings mean nothing to a model whose face pack has another recogniser."""
    config = read_config(None, words(start, tmp_path / "out", shards=prepared.out, **{"data.resolution": 64}))
    with pytest.raises(ValueError, match="of another recogniser than .*model's: .*--pack .*model/face_pack"):
        run(config)
    assert not (tmp_path / "out" / "run.json").exists()

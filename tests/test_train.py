"""The training command: killed and gone on, in several processes, out of disk, told wrong things."""

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
import train_in_processes
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file
from tiny_batches import batch, stream
from tiny_runs import files, losses, with_identity, words

from facesnap.pipeline import FaceSnapPipeline
from facesnap.training import train
from facesnap.training.config import read_config
from facesnap.training.train import run
from facesnap.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("tiny_readers")


ROOT = Path(__file__).parent.parent


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
        (["sdxl.yaml"], "'sdxl.yaml' is no key=value; a file of them is given as --config sdxl.yaml"),
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


def test_a_path_at_home_is_found_though_no_shell_writes_it_out(monkeypatch):
    monkeypatch.setenv("HOME", "/somebody")
    config = read_config(None, ["model=a", "shards=b", "out=~/run", "identity.recogniser=~/phi.onnx"])
    assert config.identity.recogniser == "/somebody/phi.onnx" and config.out == "/somebody/run"


def test_a_missing_recogniser_is_named_before_the_start_is_read(tmp_path):
    config = read_config(None, ["model=nowhere", "shards=b", f"out={tmp_path}", "identity.recogniser=phi.onnx"])
    with pytest.raises(ValueError, match="there is no recogniser at phi.onnx"):
        run(config, stream=stream(2))


def test_deepspeed_is_told_what_it_asks_for_and_casts_nothing():
    told = load_config_from_file(str(ROOT / "configs" / "accelerate-zero2.yaml"))
    assert told.mixed_precision == "no"  # else the average of the weights would be bfloat16, and stand still
    assert "gradient_accumulation_steps" not in told.deepspeed_config  # accelerate would read it as a number
    plugin = SimpleNamespace(deepspeed_config={"gradient_clipping": "auto"})
    config = read_config(None, ["model=a", "shards=b", "out=c", "clip=0.5", "data.batch_size=3"])
    train._tell_deepspeed(SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin)), config)
    assert plugin.deepspeed_config == {"gradient_clipping": 0.5, "train_micro_batch_size_per_gpu": 3}


def test_losses_go_to_tensorboard(start, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(read_config(None, words(start, tmp_path, steps=2, trackers="[tensorboard]")), stream=stream(2))
    events = EventAccumulator(str(tmp_path / "facesnap"))
    events.Reload()
    assert [e.step for e in events.Scalars("loss")] == [1, 2]
    assert np.allclose([e.value for e in events.Scalars("loss")], [line[1] for line in losses(tmp_path)], rtol=1e-4)


def test_shards_of_another_recogniser_are_refused(start, prepared, tmp_path):
    """The mini's embeddings mean nothing to a model whose face pack has another recogniser."""
    config = read_config(None, words(start, tmp_path / "out", shards=prepared.out, **{"data.resolution": 64}))
    with pytest.raises(ValueError, match="of another recogniser than .*model's: .*--pack .*model/face_pack"):
        run(config)
    assert not (tmp_path / "out" / "run.json").exists()


def test_validation_of_another_recogniser_is_refused_too(start, prepared, tmp_path, monkeypatch):
    shutil.copytree(prepared.out, tmp_path / "others")
    for listed in (tmp_path / "others").glob("shard-*.json"):
        told = json.loads(listed.read_text())
        monkeypatch.setattr(tiny.TinyAnalyser, "recogniser_digest", told["recogniser"])
        listed.write_text(json.dumps(told | {"recogniser": "other"}))
    more = {"shards": prepared.out, "validation": tmp_path / "others", "data.resolution": 64}
    with pytest.raises(ValueError, match="others holds the embeddings of another recogniser"):
        run(read_config(None, words(start, tmp_path / "out", **more)))

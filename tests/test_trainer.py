"""The trainer: resuming, averages, rates, and what a crash leaves behind."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecision

from facesnap.training.optim import orthogonal, rate
from facesnap.training.processes import keep_inputs
from facesnap.training.trainer import Stage, Trainer, TrainerConfig


class Line(Stage):
    """Learns y = 2x from noisy points; the loss has noise of its own and the network has dropout."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1), nn.Linear(8, 4))
        self.losses: list[float] = []
        self.sheets = 0

    def modules(self):
        return {"net": self.net}

    def batch(self, rng):
        x = torch.from_numpy(rng.normal(size=(8, 4)).astype(np.float32))
        return {"x": x, "y": 2 * x, "name": "not a tensor"}

    def loss(self, batch, step, generator):
        noise = torch.randn(8, 4, generator=generator)
        loss = (self.net(batch["x"]).float() - batch["y"] + 0.1 * noise).square().mean()
        self.losses.append(loss.item())
        return loss, {"twice": 2 * loss}

    def sample_sheet(self, path):
        self.sheets += 1
        path.write_bytes(b"sheet")
        return {"score": 1.0}


def config(out, **changes) -> TrainerConfig:
    return TrainerConfig(out, **{"steps": 12, "lr": 1e-2, "warmup": 3, "log_every": 2} | changes)


@pytest.mark.parametrize("optimiser", ["adamw", "muon"])
def test_a_run_that_was_killed_goes_on_as_if_it_had_not_been(tmp_path, optimiser):
    whole = Line()
    Trainer(whole, config(tmp_path / "whole", optimiser=optimiser)).train()

    first = Line()
    trainer = Trainer(first, config(tmp_path / "parts", optimiser=optimiser))
    batches = first.stream(0, 0)
    for _ in range(5):
        trainer.update(next(batches))
    trainer.checkpoint()
    for _ in range(2):
        trainer.update(next(batches))  # lost: the process is killed before the next checkpoint
    batches.close()

    second = Line()
    resumed = Trainer(second, config(tmp_path / "parts", optimiser=optimiser))
    assert resumed.step == 5
    resumed.train()
    assert first.losses[:5] + second.losses == whole.losses
    for a, b in zip(whole.net.parameters(), second.net.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("optimiser", ["adamw", "muon"])
def test_it_learns(tmp_path, optimiser):
    stage = Line()
    Trainer(stage, config(tmp_path, steps=100, optimiser=optimiser, lr=3e-2)).train()
    assert np.mean(stage.losses[-20:]) < 0.3 * np.mean(stage.losses[:5])


def test_a_half_written_checkpoint_is_not_used(tmp_path):
    stage = Line()
    trainer = Trainer(stage, config(tmp_path))
    trainer.step = 3
    trainer.checkpoint()
    (tmp_path / "checkpoint-00000009.tmp").mkdir()
    assert Trainer(Line(), config(tmp_path)).step == 3


def test_only_the_last_checkpoint_is_kept_and_it_needs_no_pickle(tmp_path):
    trainer = Trainer(Line(), config(tmp_path))
    trainer.checkpoint()
    trainer.step = 4
    place = trainer.checkpoint()
    assert list(tmp_path.glob("checkpoint-*")) == [place]
    torch.load(place / "state.pt", weights_only=True)


def test_a_finished_run_does_nothing_more(tmp_path):
    Trainer(Line(), config(tmp_path)).train()
    again = Line()
    Trainer(again, config(tmp_path)).train()
    assert again.losses == [] and again.sheets == 0


def test_the_budget_of_minutes_ends_a_run(tmp_path):
    stage = Line()
    trainer = Trainer(stage, config(tmp_path, steps=None, minutes=0.005))
    trainer.train()
    assert len(stage.losses) > 1 and trainer.share == 1
    assert Trainer(Line(), config(tmp_path, steps=None, minutes=0.005)).share == 1
    with pytest.raises(ValueError, match="needs an end"):
        TrainerConfig(tmp_path)


def test_the_log_has_each_step_once_even_after_a_crash(tmp_path):
    trainer = Trainer(Line(), config(tmp_path))
    trainer.step = 4
    trainer.checkpoint()
    lines = [{"step": 2, "loss": 1.0}, {"step": 4, "loss": 1.0}, {"step": 6, "loss": 9.0}]
    trainer.log_path.write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 8, "lo')
    Trainer(Line(), config(tmp_path)).train()
    logged = [json.loads(line) for line in trainer.log_path.read_text().splitlines()]
    assert [line["step"] for line in logged if "loss" in line] == [2, 4, 6, 8, 10, 12]
    assert all(line["loss"] != 9.0 for line in logged if "loss" in line)
    assert logged[-1]["score"] == 1.0 and (tmp_path / "sheet.png").is_file()


def test_the_average_follows_the_weights_and_forgets_the_start_soon(tmp_path):
    stage = Line()
    trainer = Trainer(stage, config(tmp_path, ema=0.5))
    expected, batches = None, stage.stream(0, 0)
    for n, batch in zip(range(4), batches, strict=False):
        trainer.update(batch)
        decay = min(0.5, (1 + n) / (10 + n)) if n else 0.0
        now = [p.detach().clone() for p in trainer.parameters]
        expected = now if n == 0 else [decay * e + (1 - decay) * v for e, v in zip(expected, now, strict=True)]
    batches.close()
    with trainer.averaged():
        for wanted, parameter in zip(expected, trainer.parameters, strict=True):
            torch.testing.assert_close(parameter.detach(), wanted)
    assert all(torch.equal(a, b) for a, b in zip(now, trainer.parameters, strict=True))


def test_bfloat16_on_a_cpu_is_trained_by_one_thread(tmp_path):
    before = torch.get_num_threads()
    try:
        for precision, threads in (("fp32", 2), ("bf16", 1)):
            torch.set_num_threads(2)
            Trainer(Line(), config(tmp_path / precision, precision=precision))
            assert torch.get_num_threads() == threads, precision
    finally:
        torch.set_num_threads(before)


def test_nothing_around_the_loss_can_turn_its_autocast_off(tmp_path):
    """As DeepSpeed does around its own forward."""
    kinds = []

    class Seen(Line):
        def loss(self, batch, step, generator):
            kinds.append(self.net(batch["x"]).dtype)
            return super().loss(batch, step, generator)

    trainer = Trainer(Seen(), config(tmp_path))
    with torch.autocast("cpu", enabled=False):
        trainer.update(trainer.stage.batch(np.random.default_rng(0)))
    assert kinds == [torch.bfloat16]


def test_averaged_weights_are_put_back_even_after_an_error(tmp_path):
    trainer = Trainer(Line(), config(tmp_path))
    before = [p.detach().clone() for p in trainer.parameters]
    trainer.average.shadow_params[0].fill_(7.0)
    with pytest.raises(RuntimeError), trainer.averaged():
        assert (trainer.parameters[0] == 7).all()
        raise RuntimeError
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.parameters, strict=True))


def test_the_rate_warms_up_holds_and_falls():
    def at(step, share):
        return rate(1.0, step, share, warmup=10, hold=0.5, floor=0.1)

    assert at(0, 0.0) == pytest.approx(0.1) and at(4, 0.0) == pytest.approx(0.5)
    assert at(100, 0.2) == at(100, 0.5) == pytest.approx(1.0)
    assert at(100, 0.75) == pytest.approx(0.1 + 0.9 * 0.5)
    assert at(100, 1.0) == pytest.approx(0.1)


def test_frozen_parameters_stay_and_relative_rates_are_kept(tmp_path):
    class Two(Line):
        def modules(self):
            return {"first": self.net[0], "last": self.net[2]}

        def rates(self):
            return {"last": 0.0}

    stage = Two()
    stage.net[0].bias.requires_grad_(False)
    bias, last, weight = (x.detach().clone() for x in (stage.net[0].bias, stage.net[2].weight, stage.net[0].weight))
    Trainer(stage, config(tmp_path)).train()
    assert torch.equal(bias, stage.net[0].bias) and torch.equal(last, stage.net[2].weight)
    assert not torch.equal(weight, stage.net[0].weight)


def test_faults_of_a_batch_and_losses_that_are_no_number_are_told(tmp_path):
    class Broken(Line):
        def batch(self, rng):
            raise OSError("the disk is gone")

    with pytest.raises(OSError, match="disk is gone"):  # raised in the process that draws
        Trainer(Broken(), config(tmp_path / "a")).train()

    class Diverged(Line):
        def loss(self, batch, step, generator):
            loss, logs = super().loss(batch, step, generator)
            return loss * float("nan"), logs

    with pytest.raises(FloatingPointError, match="the loss is nan at step 1:"):
        Trainer(Diverged(), config(tmp_path / "b")).train()


def test_a_scaled_loss_is_unscaled_once_for_both_optimisers(tmp_path):
    """Muon and AdamW share the scaler of fp16, here on the CPU: the weights are those without it."""
    weights: list[list] = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=1024.0)):
        line = Line()
        line.net = nn.Sequential(nn.Linear(4, 16), nn.Linear(16, 16), nn.Linear(16, 4))  # the middle one for Muon
        trainer = Trainer(line, config(tmp_path / str(len(weights)), optimiser="muon", steps=3, clip=0.1))
        assert len(trainer.optimisers) == 2
        trainer.accelerator.scaler = scaler
        trainer.train()
        weights.append([p.detach().clone() for p in trainer.parameters])
    for plain, scaled in zip(*weights, strict=True):
        torch.testing.assert_close(scaled, plain, rtol=1e-4, atol=1e-6)


def test_fsdps_precision_is_for_weights_and_not_for_a_batchs_points():
    plugin = SimpleNamespace(mixed_precision_policy=MixedPrecision(param_dtype=torch.bfloat16))
    assert plugin.mixed_precision_policy.cast_root_forward_inputs  # 1023.5 would become 1024
    keep_inputs(plugin)
    policy = plugin.mixed_precision_policy
    assert not policy.cast_root_forward_inputs and not policy.cast_forward_inputs
    assert (policy.param_dtype, policy.reduce_dtype) == (torch.bfloat16, torch.float32)


def test_orthogonal_keeps_the_directions_and_evens_the_strengths():
    u, _, v = torch.linalg.svd(torch.randn(6, 20, generator=torch.Generator().manual_seed(0)), full_matrices=False)
    matrix = u @ torch.diag(torch.tensor([1.0, 0.8, 0.6, 0.5, 0.4, 0.3])) @ v
    for given in (matrix, matrix.T):
        strengths = torch.linalg.svdvals(orthogonal(given))
        assert strengths.min() > 0.6 and strengths.max() < 1.3
    assert ((u.T @ orthogonal(matrix) @ v.T).diagonal() > 0.6).all()

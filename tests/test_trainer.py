"""The trainer: resuming, averages, rates, and what a crash leaves behind. And the VAE stage's arithmetic."""

import json

import numpy as np
import pytest
import torch
from test_data import write_shard
from torch import nn

from facesnap.synthetic.dataset import load_people
from facesnap.training import vae as vae_module
from facesnap.training.trainer import Average, Stage, Trainer, TrainerConfig, orthogonal, rate


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
    batches = trainer._batches()
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
    assert len(stage.losses) > 1 and 0.3 <= trainer.spent < 3
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


def test_average_by_hand_and_its_exchange():
    parameter = nn.Parameter(torch.tensor([0.0]))
    average = Average([parameter], decay=0.5)
    expected = 0.0
    for n, value in enumerate([1.0, 2.0, 3.0]):
        with torch.no_grad():
            parameter.fill_(value)
        average.update()
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * value
    assert average.values[0].item() == pytest.approx(expected)
    average.swap()
    assert parameter.item() == pytest.approx(expected) and average.values[0].item() == 3.0


def test_averaged_weights_are_put_back_even_after_an_error(tmp_path):
    trainer = Trainer(Line(), config(tmp_path))
    before = [p.detach().clone() for p in trainer.parameters]
    trainer.average.values[0].fill_(7.0)
    with pytest.raises(RuntimeError), trainer.averaged():
        assert (trainer.parameters[0] == 7).all()
        raise RuntimeError
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.parameters, strict=True))


def test_the_rate_warms_up_holds_and_falls(tmp_path):
    c = config(tmp_path, lr=1.0, warmup=10, hold=0.5, floor=0.1)
    assert rate(c, 0, 0.0) == pytest.approx(0.1) and rate(c, 4, 0.0) == pytest.approx(0.5)
    assert rate(c, 100, 0.2) == rate(c, 100, 0.5) == pytest.approx(1.0)
    assert rate(c, 100, 0.75) == pytest.approx(0.1 + 0.9 * 0.5)
    assert rate(c, 100, 1.0) == pytest.approx(0.1)


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

    with pytest.raises(OSError, match="disk is gone"):
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


def test_orthogonal_keeps_the_directions_and_evens_the_strengths():
    u, _, v = torch.linalg.svd(torch.randn(6, 20, generator=torch.Generator().manual_seed(0)), full_matrices=False)
    matrix = u @ torch.diag(torch.tensor([1.0, 0.8, 0.6, 0.5, 0.4, 0.3])) @ v
    for given in (matrix, matrix.T):
        strengths = torch.linalg.svdvals(orthogonal(given))
        assert strengths.min() > 0.6 and strengths.max() < 1.3
    assert ((u.T @ orthogonal(matrix) @ v.T).diagonal() > 0.6).all()


def test_folding_the_normalisation_changes_the_latents_and_not_the_pictures():
    torch.manual_seed(0)
    vae = vae_module.make_vae((8, 8, 16)).eval()
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    images = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), np.uint8)
    device = torch.device("cpu")
    before = vae.encode(vae_module.to_tensor(images)).latent_dist
    decoded = vae_module.reconstruct(vae, images, device)
    mean, std = vae_module.latent_statistics(vae, images, device)
    vae_module.fold_normalisation(vae, mean, std)
    after = vae.encode(vae_module.to_tensor(images)).latent_dist
    now_mean, now_std = vae_module.latent_statistics(vae, images, device)
    torch.testing.assert_close(now_mean, torch.zeros(16), atol=1e-4, rtol=0)
    torch.testing.assert_close(now_std, torch.ones(16), atol=1e-4, rtol=0)
    torch.testing.assert_close(after.std * std[:, None, None], before.std, atol=1e-5, rtol=1e-4)
    assert np.abs(vae_module.reconstruct(vae, images, device).astype(int) - decoded).max() <= 1


def test_eyes_and_mouth_weigh_more_in_the_vae_loss():
    error = torch.zeros(1, 3, 16, 16)
    weights = torch.ones(1, 1, 16, 16)
    weights[..., 8:, :] = 4
    plain, heavy = error.clone(), error.clone()
    plain[..., 2, 2], heavy[..., 12, 2] = 0.5, 0.5
    assert vae_module.reconstruction_loss(heavy, weights) > 2 * vae_module.reconstruction_loss(plain, weights)
    assert vae_module.reconstruction_loss(error, weights) == 0


def test_the_default_vae_is_stock_with_16_channels_at_a_sixteenth():
    vae = vae_module.make_vae()
    with torch.no_grad():
        latents = vae.encode(torch.zeros(1, 3, 64, 64)).latent_dist.mean
        assert latents.shape == (1, 16, 4, 4) and vae.decode(latents).sample.shape == (1, 3, 64, 64)
    assert vae.config.scaling_factor == 1 and vae.config.latents_mean is None


def test_a_decoder_that_goes_on_alone_leaves_the_latents_as_they_were(tmp_path):
    write_shard(tmp_path / "000.tar", [1, 2, 39])  # 39 is kept for validation
    torch.manual_seed(0)
    vae = vae_module.make_vae((8, 8))
    pictures = torch.rand(1, 3, 8, 8)
    with torch.no_grad():
        latents = vae.encode(pictures).latent_dist.mean
    decoder = vae.decoder.conv_in.weight.detach().clone()
    known = load_people(tmp_path)
    with torch.no_grad():
        whole = vae.encode(vae_module.to_tensor(known.images[:])).latent_dist.mean.numpy()
    with pytest.raises(ValueError, match="1 latents for"):
        vae_module.VaeStage(vae, tmp_path, batch_size=2, crop=8, latents=whole[:1])
    stage = vae_module.VaeStage(vae, tmp_path, batch_size=2, crop=8, latents=whole)
    batch = stage.batch(np.random.default_rng(0))
    for latent, image in zip(batch["latents"], batch["images"], strict=True):  # the part that lies under the crop
        row, x, y = next(
            (row, x, y)
            for row in stage.rows
            for x in range(0, known.size[1] - 7, 2)
            for y in range(0, known.size[0] - 7, 2)
            if torch.equal(vae_module.to_tensor(known.images[[row]])[0, :, y : y + 8, x : x + 8], image)
        )
        assert np.array_equal(latent.numpy(), whole[row, :, y // 2 : y // 2 + 4, x // 2 : x // 2 + 4])
    assert set(stage.people.person[stage.rows].tolist()) == {1, 2}
    trainer = Trainer(stage, config(tmp_path / "out", steps=3))
    trainer.train()
    vae_module.export(trainer, stage, tmp_path / "vae")
    saved = vae_module.AutoencoderKL.from_pretrained(tmp_path / "vae")
    with torch.no_grad():
        assert torch.equal(saved.encode(pictures).latent_dist.mean, latents)
    assert not torch.equal(saved.decoder.conv_in.weight, decoder)
    assert (tmp_path / "out" / "sheet.png").is_file()

"""The mini's VAE: more latent channels without a new start, and losses that each teach the right side."""

import numpy as np
import pytest
import torch
from test_data import write_shard
from transformers import CLIPVisionConfig, CLIPVisionModel

from facesnap.mini.nets import vae
from facesnap.mini.nets import vae as vae_module
from facesnap.mini.nets.vae import make_vae, widened
from facesnap.mini.nets.vae_losses import FaceFeatures, PatchCritic
from facesnap.synthetic.dataset import load_people
from facesnap.training.trainer import Trainer, TrainerConfig

WIDTHS = (8, 8, 8)


@pytest.fixture(scope="module")
def pictures():
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_a_widened_vae_keeps_the_latents_it_had(pictures):
    torch.manual_seed(0)
    old = make_vae(WIDTHS, 4).eval()
    torch.nn.init.normal_(old.quant_conv.bias, std=0.1)
    new = widened(old, 6).eval()
    with torch.no_grad():
        before, after = old.encode(pictures).latent_dist, new.encode(pictures).latent_dist
        torch.testing.assert_close(after.mean[:, :4], before.mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(after.logvar[:, :4], before.logvar, rtol=1e-5, atol=1e-5)
        # where the new channels say nothing the picture is what it was
        latents = torch.cat([before.mean, torch.zeros_like(before.mean[:, :2])], 1)
        torch.testing.assert_close(new.decode(latents).sample, old.decode(before.mean).sample, rtol=1e-4, atol=1e-5)


def test_the_noise_that_the_decoder_learns_with_is_no_part_of_the_kl(pictures, monkeypatch):
    torch.manual_seed(0)
    model = make_vae(WIDTHS, 4)
    stage = object.__new__(vae.VaeStage)
    stage.vae, stage.latents, stage.features, stage.critic, stage.kl = model, None, None, None, 2e-5
    batch = {"images": pictures, "weights": torch.ones(2, 1, 32, 32)}
    quiet, loud = {}, {}
    for logs, most in ((quiet, 0.0), (loud, 5.0)):
        monkeypatch.setattr(vae, "MOST_NOISE", most)
        logs.update(stage.loss(batch, 0, torch.Generator().manual_seed(0))[1])
    assert quiet["psnr"] != loud["psnr"]  # the noise is there
    posterior = model.encode(pictures).latent_dist
    for logs in (quiet, loud):
        torch.testing.assert_close(logs["kl"], posterior.kl().mean() / posterior.mean[0].numel(), rtol=1e-4, atol=1e-5)


def test_face_features_are_apart_only_where_pictures_are(pictures):
    torch.manual_seed(0)
    recogniser = torch.nn.Sequential(torch.nn.AvgPool2d(16), torch.nn.Flatten(), torch.nn.Linear(3 * 49, 8))
    encoder = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=16,
            patch_size=8,
        )
    )
    features = FaceFeatures(recogniser, encoder)
    points = np.tile([[10, 12], [22, 12], [16, 18], [11, 24], [21, 24]], (2, 1, 1)).astype(np.float32)
    same = features(pictures, pictures, points)
    assert all(abs(value.item()) < 1e-5 for value in same)
    decoded = pictures.flip(0).requires_grad_()
    apart = features(decoded, pictures, points)
    assert all(value.item() > 1e-3 for value in apart)
    sum(apart).backward()
    assert decoded.grad.abs().sum() > 0 and all(p.grad is None for p in features.parameters())


def test_the_critic_teaches_the_decoder_and_itself_apart(pictures):
    torch.manual_seed(0)
    critic, decoded = PatchCritic(), pictures.flip(0).clone().requires_grad_()
    fooled, texture, own = critic.judge(decoded, pictures)
    (fooled + texture).backward(retain_graph=True)
    assert decoded.grad.abs().sum() > 0 and all(p.grad is None for p in critic.parameters())
    decoded.grad = None
    own.backward()
    assert decoded.grad is None and all(p.grad is not None for p in critic.parameters())


def test_the_critic_learns_to_tell_soft_from_sharp(pictures):
    torch.manual_seed(0)
    critic = PatchCritic()
    optimiser = torch.optim.Adam(critic.parameters(), lr=2e-3)
    soft = torch.nn.functional.avg_pool2d(pictures, 3, 1, 1)
    losses = []
    for _ in range(20):
        *_, own = critic.judge(soft, pictures)
        optimiser.zero_grad()
        own.backward()
        optimiser.step()
        losses.append(own.item())
    assert losses[-1] < 0.7 * losses[0]


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
    torch.testing.assert_close(now_mean, torch.zeros(32), atol=1e-4, rtol=0)
    torch.testing.assert_close(now_std, torch.ones(32), atol=1e-4, rtol=0)
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


def test_the_default_vae_is_stock_with_32_channels_at_a_sixteenth():
    vae = vae_module.make_vae()
    with torch.no_grad():
        latents = vae.encode(torch.zeros(1, 3, 64, 64)).latent_dist.mean
        assert latents.shape == (1, 32, 4, 4) and vae.decode(latents).sample.shape == (1, 3, 64, 64)
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
    trainer = Trainer(stage, TrainerConfig(tmp_path / "out", steps=3, lr=1e-2, warmup=3))
    trainer.train()
    vae_module.export(trainer, stage, tmp_path / "vae")
    saved = vae_module.AutoencoderKL.from_pretrained(tmp_path / "vae")
    with torch.no_grad():
        assert torch.equal(saved.encode(pictures).latent_dist.mean, latents)
    assert not torch.equal(saved.decoder.conv_in.weight, decoder)
    assert (tmp_path / "out" / "sheet.png").is_file()

"""The mini's VAE: more latent channels without a new start, and losses that each teach the right side."""

import numpy as np
import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from facesnap.training.vae import make_vae, widened
from facesnap.training.vae_losses import FaceFeatures, PatchCritic

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

"""The diffusion losses against closed forms and sums done by hand."""

import pytest
import torch
from diffusers import DDPMScheduler

from facesnap.training import losses


def scheduler(kind: str = "v_prediction") -> DDPMScheduler:
    return DDPMScheduler(1000, 0.00085, 0.012, "scaled_linear", prediction_type=kind)


def test_equation_3_by_hand():
    target = torch.zeros(1, 1, 2, 2)
    prediction = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    mask = torch.tensor([[[[1.0, 0.5], [0.0, 0.0]]]])
    total = 1**2 + (2 * 0.5) ** 2
    as_printed = losses.masked_diffusion_loss(prediction, target, mask, as_printed=True)
    normalised = losses.masked_diffusion_loss(prediction, target, mask)
    assert as_printed.item() == pytest.approx(total / 4)
    assert normalised.item() == pytest.approx(total / (1**2 + 0.5**2))


def test_a_full_mask_is_the_plain_loss():
    prediction, target = torch.randn(2, 3, 4, 4, 4)
    ones = torch.ones(3, 1, 4, 4)
    plain = (prediction - target).square().mean().item()
    for as_printed in (False, True):
        loss = losses.masked_diffusion_loss(prediction, target, ones, as_printed=as_printed)
        assert loss.item() == pytest.approx(plain, rel=1e-5)


def test_the_mask_is_resized_by_area():
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., :4, :16] = 1  # a quarter of the upper left cell's rows
    assert losses.latent_mask(mask, (2, 2)).flatten().tolist() == pytest.approx([0.25, 0, 0, 0])


def test_no_gradient_reaches_what_lies_outside_the_mask():
    prediction = torch.randn(1, 2, 4, 4, requires_grad=True)
    mask = torch.zeros(1, 1, 4, 4)
    mask[..., 1:3, 1:3] = 1
    losses.masked_diffusion_loss(prediction, torch.zeros(1, 2, 4, 4), mask).backward()
    inside = mask.bool().expand_as(prediction)
    assert (prediction.grad[inside] != 0).all() and (prediction.grad[~inside] == 0).all()


def test_a_small_face_counts_as_much_as_a_large_one():
    prediction, target = torch.full((2, 4, 8, 8), 3.0), torch.zeros(2, 4, 8, 8)
    mask = torch.zeros(2, 1, 8, 8)
    mask[0, :, :2, :2] = 1
    mask[1] = 1
    assert losses.masked_diffusion_loss(prediction, target, mask).item() == pytest.approx(9)
    assert losses.masked_diffusion_loss(prediction, target, mask, as_printed=True).item() < 9


def test_the_background_may_have_a_small_weight_and_samples_theirs():
    prediction, target = torch.ones(2, 1, 1, 2), torch.zeros(2, 1, 1, 2)
    mask = torch.tensor([[[[1.0, 0.0]]], [[[0.0, 0.0]]]])
    loss = losses.masked_diffusion_loss(prediction, target, mask, background=0.1, as_printed=True)
    assert loss.item() == pytest.approx((1 + 0.01 + 0.01 + 0.01) / 4)
    alone = losses.masked_diffusion_loss(prediction, target, mask, weight=torch.tensor([4.0, 1.0]))
    assert alone.item() == pytest.approx(4 / 2)  # the sample without a face costs nothing, and is no NaN


@pytest.mark.parametrize("kind", losses.KINDS)
def test_targets_agree_with_diffusers_and_lead_back_to_the_latents(kind):
    noise_scheduler = scheduler(kind)
    latents, noise = torch.randn(2, 5, 4, 3, 3)
    timesteps = torch.tensor([0, 10, 300, 700, 990])
    a = noise_scheduler.alphas_cumprod[timesteps]
    noisy = losses.add_noise(latents, noise, a)
    target = losses.diffusion_target(kind, latents, noise, a)
    torch.testing.assert_close(noisy, noise_scheduler.add_noise(latents, noise, timesteps))
    theirs = noise if kind == "epsilon" else noise_scheduler.get_velocity(latents, noise, timesteps)
    torch.testing.assert_close(target, theirs)
    back = losses.predicted_latents(kind, target, noisy, a)
    torch.testing.assert_close(back, latents, atol=2e-4, rtol=1e-3)


def test_min_snr_weighs_the_same_x0_error_alike_for_both_kinds():
    a = scheduler().alphas_cumprod[torch.tensor([5, 400, 900])]
    latents, noise = torch.randn(2, 3, 4, 2, 2)
    noisy = losses.add_noise(latents, noise, a)
    wrong = latents + 0.1
    # ε and v that belong to the wrong x₀
    root, rest = a.sqrt()[:, None, None, None], (1 - a).sqrt()[:, None, None, None]
    eps = (noisy - root * wrong) / rest
    v = root * eps - rest * wrong
    weighed = []
    for kind, prediction in (("epsilon", eps), ("v_prediction", v)):
        target = losses.diffusion_target(kind, latents, noise, a)
        error = (prediction - target).square().mean((1, 2, 3))
        weighed.append(losses.min_snr_weight(kind, a) * error)
    torch.testing.assert_close(weighed[0], weighed[1], rtol=1e-3, atol=1e-6)
    snr = a / (1 - a)
    torch.testing.assert_close(weighed[0], snr.clamp(max=5) * 0.1**2, rtol=1e-2, atol=1e-6)


def test_noisy_steps_keep_their_own_weight_and_clear_ones_are_capped():
    a = scheduler().alphas_cumprod[torch.tensor([5, 400, 900])]
    snr = a / (1 - a)
    weight = losses.capped_snr_weight(a)
    assert snr[0] > 4 and weight[0] * (snr[0] + 1) == pytest.approx(5, rel=1e-4)
    assert (snr[1:] < 4).all() and (weight[1:] == 1).all()


def test_unknown_kinds_are_named():
    with pytest.raises(ValueError, match="'sample' is not known"):
        losses.min_snr_weight("sample", torch.tensor([0.5]))


def test_timesteps_cover_the_range_and_follow_the_generator():
    def draw():
        return losses.stratified_timesteps(10, 1000, torch.Generator().manual_seed(3))

    t = draw()
    assert sorted((t // 100).tolist()) == list(range(10))
    assert torch.equal(t, draw())

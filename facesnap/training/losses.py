"""What the diffusion model is asked to do: noise, targets, weights, and the masked loss, equation 3 of
the paper.

Latents are (B, C, h, w). `alphas_cumprod` is the scheduler's ᾱ at each sample's timestep, (B,): a noisy
latent is √ᾱ x₀ + √(1−ᾱ) ε. Predictions are of ε ("epsilon") or of v = √ᾱ ε − √(1−ᾱ) x₀ ("v_prediction"),
as diffusers names them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

KINDS = ("epsilon", "v_prediction")
WEIGHTINGS = ("none", "min_snr", "capped_snr")


def stratified_timesteps(batch: int, num: int, generator: torch.Generator | None = None) -> Tensor:
    """(B,) timesteps in 0..num−1, one from each of B equal parts of the range, in random order.

    Each is uniform on its own, but a batch covers all noise levels, which calms the loss.
    """
    device = generator.device if generator is not None else None
    parts = torch.randperm(batch, generator=generator, device=device)
    inside = torch.rand(batch, generator=generator, device=device)
    return ((parts + inside) / batch * num).long().clamp_(max=num - 1)  # the sum may round up to the end


def add_noise(latents: Tensor, noise: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """√ᾱ x₀ + √(1−ᾱ) ε."""
    a = _over_pixels(alphas_cumprod)
    return a.sqrt() * latents + (1 - a).sqrt() * noise


def diffusion_target(kind: str, latents: Tensor, noise: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """What a model of this kind should predict."""
    if kind == "epsilon":
        return noise
    if kind == "v_prediction":
        a = _over_pixels(alphas_cumprod)
        return a.sqrt() * noise - (1 - a).sqrt() * latents
    raise ValueError(f"prediction kind {kind!r} is not known; choose one of {', '.join(KINDS)}")


def predicted_latents(kind: str, prediction: Tensor, noisy: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """The x₀ that a prediction amounts to."""
    a = _over_pixels(alphas_cumprod)
    if kind == "epsilon":
        return (noisy - (1 - a).sqrt() * prediction) / a.sqrt()
    if kind == "v_prediction":
        return a.sqrt() * noisy - (1 - a).sqrt() * prediction
    raise ValueError(f"prediction kind {kind!r} is not known; choose one of {', '.join(KINDS)}")


def min_snr_weight(kind: str, alphas_cumprod: Tensor, gamma: float = 5.0) -> Tensor:
    """(B,) weights of Min-SNR-γ (arXiv 2303.09556): an x₀ loss weighed by min(SNR, γ), in this kind's
    units."""
    snr = alphas_cumprod / (1 - alphas_cumprod)
    capped = snr.clamp(max=gamma)
    if kind == "epsilon":
        return capped / snr
    if kind == "v_prediction":
        return capped / (snr + 1)
    raise ValueError(f"prediction kind {kind!r} is not known; choose one of {', '.join(KINDS)}")


def capped_snr_weight(alphas_cumprod: Tensor, gamma: float = 5.0) -> Tensor:
    """(B,) weights for v-prediction: an x₀ loss weighed by min(SNR + 1, γ).

    Min-SNR leaves next to nothing to the noisiest half of the steps. There the picture is decided by what the model
    is told (face, pose, prompt), and half of an eight-step sampler's steps lie there: they keep v-prediction's own
    weight, and only the steps with little noise are capped.
    """
    snr = alphas_cumprod / (1 - alphas_cumprod)
    return (snr + 1).clamp(max=gamma) / (snr + 1)


def timestep_weight(weighting: str, kind: str, alphas_cumprod: Tensor, gamma: float) -> Tensor | None:
    """(B,) weights of one of WEIGHTINGS; None where all weigh the same."""
    if weighting == "min_snr":
        return min_snr_weight(kind, alphas_cumprod, gamma)
    return capped_snr_weight(alphas_cumprod, gamma) if weighting == "capped_snr" else None


def latent_mask(mask: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    """A pixel mask (B, 1, H, W) in [0, 1] on the latent grid (h, w): the share of each cell that it
    covers."""
    return F.interpolate(mask.float(), size=tuple(size), mode="area")


def masked_diffusion_loss(
    prediction: Tensor,
    target: Tensor,
    mask: Tensor,
    *,
    weight: Tensor | None = None,
    emphasis: Tensor | None = None,
    background: float = 0.0,
    as_printed: bool = False,
    each: bool = False,
) -> Tensor:
    """Equation 3, ‖(target − prediction) ⊙ M‖²: the mean over the batch, in float32; (B,) losses with `each`.

    `mask` (B, 1, H, W) is 1 on the region of the face, at the size of the picture or of the latents.
    `background` is the M of everything else: 0 as in the paper, small while the base model learns too.
    `emphasis` (B, 1, H, W) multiplies M where some parts of a face matter more.
    `weight` (B,) weighs samples. Each sample's sum is divided by its own ΣM², so that a small face counts
    as much as a large one and a constant residual r costs r²; `as_printed` divides by the number of
    elements instead. A sample whose M is zero everywhere costs nothing.
    """
    m = background + (1 - background) * latent_mask(mask, target.shape[-2:])
    m = m if emphasis is None else m * latent_mask(emphasis, target.shape[-2:])
    error = ((target.float() - prediction.float()) * m).square().mean(1)  # (B, h, w)
    if as_printed:
        loss = error.mean((1, 2))
    else:
        area = m.square().sum((1, 2, 3))
        loss = torch.where(area > 0, error.sum((1, 2)) / area.clamp(min=1e-12), 0.0)
    loss = loss if weight is None else loss * weight
    return loss if each else loss.mean()


def _over_pixels(values: Tensor) -> Tensor:
    return values[:, None, None, None]

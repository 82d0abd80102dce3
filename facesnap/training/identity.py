"""The identity loss, equation 4: 1 − cos(φ(reference), φ(what a few steps make of pure noise)).

φ is a face recogniser that is used for nothing else (design: recogniser B; for photographs buffalo_l's
`w600k_r50`). It comes as an ONNX file, which has no gradient: `IResNet.from_onnx` reads it into a torch net.
The gradient runs from φ through a differentiable ArcFace crop by the known landmarks, the VAE's decoder and every
step of the few-step ("lightning") branch, through frozen weights, to the face tokens and FFRNet.

Memory does not grow with the number of steps: each step is checkpointed, so one step's activations exist at a time,
and between the steps only their latents are kept. Of the latents, the window around the face alone is decoded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from insightface.utils.face_align import arcface_dst
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from facesnap.geometry import similarity
from facesnap.training.iresnet import FACE
from facesnap.training.losses import predicted_latents

Predict = Callable[[Tensor, Tensor], Tensor]  # noisy latents (B, C, h, w), timesteps (B,) → the model's prediction

# ------------------------------------------------------------------------------------------------- the crop


def crop_to_picture(keypoints: np.ndarray) -> np.ndarray:
    """(B, 2, 3): where in the picture a point of ArcFace's crop lies, both in pixels.

    keypoints (B, 5, 2). The inverse of the similarity that brings them to ArcFace's template in least squares.
    """
    back = np.linalg.inv(np.insert(similarity(keypoints, arcface_dst), 2, [0, 0, 1], axis=-2))
    return back[..., :2, :]


def crop_faces(pictures: Tensor, matrices: np.ndarray) -> Tensor:
    """ArcFace's crops (B, 3, 112, 112) of pictures (B, 3, H, W) in [−1, 1], differentiable.

    matrices: those of `crop_to_picture`. Bilinear, black outside: insightface's `norm_crop`.
    """
    height, width = pictures.shape[-2:]
    x, y = np.meshgrid(np.arange(FACE), np.arange(FACE))
    places = np.stack([x, y, np.ones_like(x)], -1) @ matrices.transpose(0, 2, 1)[:, None]  # (B, 112, 112, 2)
    grid = (2 * places + 1) / np.array([width, height]) - 1
    grid_ = torch.from_numpy(grid.astype(np.float32)).to(pictures.device)
    return F.grid_sample(pictures.float() + 1, grid_, mode="bilinear", padding_mode="zeros", align_corners=False) - 1


def face_window(matrix: np.ndarray, grid: tuple[int, int], factor: int, margin: int) -> tuple[int, int, int, int]:
    """The latents that one crop is made of: top, left, height, width.

    matrix (2, 3): of `crop_to_picture`. `margin` latents on every side, since a decoded pixel depends on its
    neighbourhood; cut where the picture ends.
    """
    last = FACE - 1
    x, y = matrix @ np.array([[0, last, 0, last], [0, 0, last, last], [1, 1, 1, 1]])
    bounds = []
    for places, size in ((y, grid[0]), (x, grid[1])):
        low = int(np.floor(places.min() / factor)) - margin
        high = int(np.ceil((places.max() + 1) / factor)) + margin
        low = min(max(low, 0), size - 1)
        bounds.append((low, max(min(high, size), low + 1)))
    (top, bottom), (left, right) = bounds
    return top, left, bottom - top, right - left


# ------------------------------------------------------------------------------------- the lightning branch


@dataclass(frozen=True)
class IdentityConfig:
    """Equation 5's second half, and when it counts."""

    recogniser: str | None = None  # φ: an ONNX file; None: no identity loss
    lightning: str | None = None  # a few-step UNet (folder or safetensors) or LoRA of the base; None: the base itself
    weight: float = 0.5  # λ
    steps: int = 4  # of the branch, 1 to 8
    most_steps: int | None = None  # with it, each batch draws their number from `steps` to this one
    after: int = 0  # optimiser steps before it is switched on
    every: int = 1  # it is computed every so many steps
    samples: int | None = None  # of each batch, the first so many; None: all
    margin: int = 4  # latents around the face that are decoded with it

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= (self.most_steps or self.steps) <= 8:
            raise ValueError(
                f"the lightning branch has {self.steps} steps, at most {self.most_steps or self.steps}: choose 1 to 8"
            )
        if self.every < 1 or (self.samples is not None and self.samples < 1):
            raise ValueError("identity.every and identity.samples must be at least 1")

    def counts(self, step: int) -> bool:
        """Whether this optimiser step computes it."""
        return self.recogniser is not None and self.weight > 0 and step >= self.after and step % self.every == 0

    def draw_steps(self, seed: int) -> int:
        """The branch's steps for one batch; all processes draw the same."""
        most = self.most_steps or self.steps
        return int(np.random.default_rng((seed, 2)).integers(self.steps, most + 1))


def trailing_timesteps(steps: int, num: int) -> list[int]:
    """SDXL-Lightning's: 4 of 1000 are 999, 749, 499, 249."""
    return [round(t) - 1 for t in np.arange(num, 0, -num / steps)]


def few_steps(predict: Predict, noise: Tensor, alphas_cumprod: Sequence[float], kind: str, steps: int) -> Tensor:
    """Latents (B, C, h, w) from pure noise in `steps` Euler steps without guidance, each of them checkpointed.

    The same as diffusers' EulerDiscreteScheduler with trailing timesteps, written with ᾱ instead of σ: the noise
    that the model sees stays, its share goes down.
    """
    timesteps = trailing_timesteps(steps, len(alphas_cumprod))
    a = torch.tensor([alphas_cumprod[timesteps[0]]], device=noise.device)
    latents = noise * (1 - a).sqrt()
    for t, after in zip(timesteps, [*timesteps[1:], None], strict=True):
        at = torch.full((len(noise),), t, device=noise.device)
        prediction = checkpoint(
            predict,
            latents,
            at,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=_without_copies(noise.device),
        ).float()
        clean = predicted_latents(kind, prediction, latents, a)
        rest = (latents - a.sqrt() * clean) / (1 - a).sqrt()
        a = torch.tensor([1.0 if after is None else alphas_cumprod[after]], device=noise.device)
        latents = a.sqrt() * clean + (1 - a).sqrt() * rest
    return latents


def _without_copies(device: torch.device) -> Callable[[], tuple[Any, Any]]:
    """For `checkpoint`: as it was the first time, but autocast keeps no half-precision copies of the weights.

    They would all be there, as large as FFRNet, while a step is computed again and FFRNet's gradients of the later
    steps wait.
    """
    kind = device.type
    state = {"dtype": torch.get_autocast_dtype(kind), "enabled": torch.is_autocast_enabled(kind)}
    return lambda: (nullcontext(), torch.autocast(kind, **state, cache_enabled=False))


def unscale(vae: Any, latents: Tensor) -> Tensor:
    """The denoiser's latents in the units of the VAE's decoder."""
    config = vae.config
    if getattr(config, "latents_mean", None) is not None and getattr(config, "latents_std", None) is not None:
        mean, std = (
            torch.tensor(v, device=latents.device).view(1, -1, 1, 1) for v in (config.latents_mean, config.latents_std)
        )
        return latents * std / config.scaling_factor + mean
    return latents / config.scaling_factor + (getattr(config, "shift_factor", None) or 0.0)


class IdentityLoss:
    """Equation 4 for whatever predicts noise: the mini's stages and the training on photographs share it.

    recogniser, vae: frozen. alphas_cumprod and kind: of the lightning branch, as its scheduler has them.
    """

    def __init__(
        self, recogniser: nn.Module, vae: Any, alphas_cumprod: Tensor, kind: str, *, steps: int = 4, margin: int = 4
    ) -> None:
        self.recogniser = recogniser.requires_grad_(False).eval()
        self.vae = vae.requires_grad_(False).eval()
        self.alphas, self.kind = alphas_cumprod.tolist(), kind
        self.steps, self.margin = steps, margin
        self.factor = 2 ** (len(vae.config.block_out_channels) - 1)

    @classmethod
    def of(cls, pipe: Any, recogniser: nn.Module, config: IdentityConfig) -> IdentityLoss:
        """By the VAE and the noise of a pipeline."""
        scheduler = pipe.scheduler
        return cls(
            recogniser, pipe.vae, scheduler.alphas_cumprod, scheduler.config.prediction_type, steps=config.steps,
            margin=config.margin,
        )  # fmt: skip

    @torch.no_grad()
    def embed(self, faces: Tensor, mask: Tensor | None = None) -> Tensor:
        """φ of the references: aligned crops (B, R, 112, 112, 3) uint8 RGB → (B, 512), the mean of their
        directions. mask (B, R): which of them there are."""
        pixels = faces.flatten(0, 1).permute(0, 3, 1, 2).float().sub(127.5).div(127.5)
        with torch.autocast(faces.device.type, enabled=False):
            directions = F.normalize(self.recogniser(pixels)).unflatten(0, faces.shape[:2])
        if mask is not None:
            directions = directions * mask[..., None]
        return directions.sum(1)

    def __call__(self, predict: Predict, noise: Tensor, keypoints: Tensor | np.ndarray, reference: Tensor) -> Tensor:
        """1 − cos for each sample (B,), of what `latents` and `distance` say."""
        return self.distance(self.latents(predict, noise, self.steps), keypoints, reference)

    def latents(self, predict: Predict, noise: Tensor, steps: int) -> Tensor:
        """What the branch makes of noise (B, C, h, w). predict: the whole conditioned model, gradients on."""
        return few_steps(predict, noise, self.alphas, self.kind, steps)

    def distance(self, latents: Tensor, keypoints: Tensor | np.ndarray, reference: Tensor) -> Tensor:
        """1 − cos for each sample (B,).

        keypoints (B, 5, 2) in pixels of the picture that the branch makes: they are known, since FFRNet draws the face
        where its landmarks are. reference (B, 512): what `embed` gives.
        """
        faces = self.faces(latents, keypoints)
        with torch.autocast(latents.device.type, enabled=False):
            # the recogniser's activations are as large as a picture: it is checkpointed as well
            found = checkpoint(self.recogniser, faces.float(), use_reentrant=False, preserve_rng_state=False)
        return 1 - F.cosine_similarity(reference.float(), found.float(), dim=-1)

    def faces(self, latents: Tensor, keypoints: Tensor | np.ndarray) -> Tensor:
        """Aligned crops (B, 3, 112, 112) in [−1, 1] of what latents (B, C, h, w) decode to, without decoding more than
        the window around each face."""
        points = keypoints.detach().cpu().numpy() if isinstance(keypoints, Tensor) else keypoints
        matrices = crop_to_picture(points.astype(np.float64))
        crops = []
        for row, matrix in enumerate(matrices):  # one at a time: nothing in the loss is as large as a decoded picture
            top, left, height, width = face_window(matrix, tuple(latents.shape[-2:]), self.factor, self.margin)
            window = latents[row : row + 1, :, top : top + height, left : left + width]
            matrix[:, 2] -= np.array([left, top]) * self.factor
            crops.append(checkpoint(self._decode, window, matrix[None], use_reentrant=False, preserve_rng_state=False))
        return torch.cat(crops)

    def _decode(self, latents: Tensor, matrices: np.ndarray) -> Tensor:
        # SDXL's decoder overflows in half precision
        half = torch.get_autocast_dtype(latents.device.type) == torch.float16
        with torch.autocast(latents.device.type, enabled=False) if half else nullcontext():
            pictures = self.vae.decode(unscale(self.vae, latents).to(self.vae.dtype), return_dict=False)[0]
        return crop_faces(pictures, matrices)

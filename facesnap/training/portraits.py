"""The stage that learns to make portraits: the base model is frozen, mixer and FFRNet learn by equations 3 to 5.

The stage is built around a `FaceSnapPipeline`, at any size, and a `Source` of samples: photographs (conditions.py), or
features that were computed beforehand (facesnap/mini/kept.py). Text comes from the pipeline's own encoding, and FFRNet
is attached to the UNet by the hook that makes portraits. So every row of the paper's Tables 2 and 3 trains as it will
be used, from what the checkpoint says of itself.

A sample's noise and timestep depend on the seed, the position in the run and the sample's place in the batch of *all*
processes: two processes give the gradient that one gives on both their batches.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from facesnap.ffrnet import FFRNet, attach
from facesnap.pipeline import FaceSnapPipeline
from facesnap.training.identity import IdentityConfig, IdentityLoss
from facesnap.training.losses import (
    WEIGHTINGS,
    add_noise,
    diffusion_target,
    masked_diffusion_loss,
    stratified_timesteps,
    timestep_weight,
)
from facesnap.training.sheet import draw_sheet
from facesnap.training.trainer import Batch, Stage

# Of FFRNet, what reads the face or the drawing, and its outputs. The rest is the base UNet's encoder, which knows
# pictures already: with `learn` "light" it stays as it is, and needs no gradient, optimiser or average.
LEARN = ("all", "light")
LIGHT = ("attn2.", "add_embedding.", "controlnet_")
FEATURES = (slice(36, 44), slice(44, 52), slice(52, 72))  # of the 72 landmarks: the eyes and the mouth


@dataclass(frozen=True)
class LossConfig:
    """Equation 3 and its options."""

    weighting: str = "none"  # of the timesteps: all alike as in the paper, or "min_snr", "capped_snr" (losses.py)
    gamma: float = 5.0  # of the two others
    background: float = 0.0  # the M of what is neither face nor hair
    features: float = 1.0  # the M of eyes and mouth: small, and looked at first
    as_printed: bool = False  # not normalised by the mask's area: a small face then weighs less
    branch: float = 0.0  # weight of what the identity loss's few steps make, compared with the true latents by eq. 3

    def __post_init__(self) -> None:
        if self.weighting not in WEIGHTINGS:
            raise ValueError(f"loss.weighting {self.weighting!r} is not known; choose {', '.join(WEIGHTINGS)}")


@dataclass
class Conditions:
    """All that a prediction is conditioned on, B rows each; `bare` is the text before any of it was dropped."""

    text: Tensor  # (B, n, d)
    pooled: Tensor  # (B, p)
    bare_text: Tensor
    bare_pooled: Tensor
    tokens: Tensor  # (B, m, d)
    pooled_face: Tensor  # (B, p)
    control: Tensor  # (B, 3, H, W) in [0, 1], or its embedding (B, C, h, w)
    time_ids: Tensor  # (B, 6)
    ffrnet: Tensor | None = None  # (B,) bool: false for samples that do without FFRNet

    def rows(self, which: Any) -> Conditions:
        return Conditions(**{key: None if value is None else value[which] for key, value in vars(self).items()})


class Source(Protocol):
    """Where a stage's samples come from. A batch of B samples with up to R references holds at least

    captions: a list of B strings; drop_text, drop_face (B,) bool; reference_mask (B, R) bool; time_ids (B, 6)
    mask (B, 1, H, W), 1 (or uint8 255) on the head; landmarks (B, 72, 2) and keypoints (B, 5, 2), pixels of the target

    and may hold: ffrnet (B,) bool, false where FFRNet is off; resembles (B,) bool, false where the identity loss does
    not count; phi (B, 512), φ's mean direction of the references, or else reference_faces (B, R, 112, 112, 3) uint8;
    keys, the samples' names.
    """

    @property
    def validation(self) -> Batch | None:
        """What the sheets are made of; also with pixels (B, 3, H, W) and crops (B, 1, s, s, 3)."""

    def batches(self, position: int, seed: int, rank: int, world: int) -> Iterable[Batch]:
        """The batches of one process, from number `position` on."""

    def latents(self, batch: Batch) -> Tensor:
        """(B, C, h, w) float32, in the denoiser's units."""

    def faces(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The references' raw embeddings (B, R, 512) and the face encoder's states (B, R, P, C), zeros for none."""

    def control(self, batch: Batch) -> Tensor:
        """As in `Conditions`."""

    def texts(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(B, n, d) and pooled (B, p), as the pipeline encodes a prompt, of frozen encoders."""


class PortraitStage(Stage):
    """Mixer and FFRNet of `pipe` learn from the samples of a source.

    identity_loss: φ and the rest of equation 4, with `lightning` the few-step UNet (the base's own where None).
    dtype: of the frozen parts on the device. learn: "all" of FFRNet, or "light".
    """

    def __init__(
        self,
        pipe: FaceSnapPipeline,
        source: Source,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        loss: LossConfig = LossConfig(),  # noqa: B008 (frozen)
        identity: IdentityConfig = IdentityConfig(),  # noqa: B008
        identity_loss: IdentityLoss | None = None,
        lightning: nn.Module | None = None,
        checkpointing: bool = False,
        learn: str = "all",
    ) -> None:
        self.pipe, self.source = pipe, source
        self.device = torch.device(device)
        self.config, self.identity, self.identity_loss = loss, identity, identity_loss
        self.variant = pipe.settings.variant
        self.kind = pipe.scheduler.config.prediction_type
        self.alphas = pipe.scheduler.alphas_cumprod.float()
        self._freeze(dtype)
        for module in self.modules().values():
            module.requires_grad_(True).float().train()
        if "ffrnet" in self.modules():
            what_learns(pipe.ffrnet, learn)
        if self.variant == "none":  # without FFRNet nothing takes the pooled face
            pipe.mixer.to_pooled.requires_grad_(False)
        self.lightning = pipe.unet
        if lightning is not None:
            self.lightning = lightning.requires_grad_(False).eval().to(self.device, dtype)
        if identity_loss is not None:
            identity_loss.recogniser.to(self.device)
        if checkpointing:
            parts = {id(m): m for m in (pipe.unet, self.lightning, pipe.ffrnet, pipe.vae) if m is not None}
            for module in parts.values():
                module.enable_gradient_checkpointing()
        with torch.no_grad():
            _, empty, _, pooled = pipe.encode_prompt("", device=self.device, do_classifier_free_guidance=True)
        self.empty_text, self.empty_pooled = empty[0], pooled[0]

    def _freeze(self, dtype: torch.dtype) -> None:
        for name in ("unet", "vae", "text_encoder", "text_encoder_2", "face_encoder"):
            module = getattr(self.pipe, name)
            # SDXL's VAE overflows in float16, and in bfloat16 it shifts colours: it alone is always whole
            wanted = torch.float32 if name == "vae" else dtype
            if module is not None:
                module.requires_grad_(False).eval().to(self.device, wanted)

    # ---- what the trainer asks -----------------------------------------------------------------------------

    def modules(self) -> dict[str, nn.Module]:
        parts = {"mixer": self.pipe.mixer, "ffrnet": None if self.variant == "none" else self.pipe.ffrnet}
        return {name: part for name, part in parts.items() if part is not None}

    def stream(self, position: int, seed: int) -> Generator[Batch]:
        yield from self.source.batches(position, seed, self.rank, self.world)

    def sample_sheet(self, path: Path) -> dict[str, float]:
        return {} if self.source.validation is None else draw_sheet(self, self.source.validation, path)

    # ---- equation 5 ----------------------------------------------------------------------------------------

    def loss(self, batch: Batch, step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Any]]:
        """L = L_mask + λ L_id, and what is noted of this step: the masked loss of equation 3, and in the steps that
        compute it the identity loss of equation 4 with its weight."""
        latents, given = self.source.latents(batch), self.conditions(batch)
        count = len(latents)
        draws = [self._draws(generator, self.rank * count + i) for i in range(count)]
        noise = self._noise(latents, draws)
        timesteps = self._timesteps(count, generator)
        alphas = self.alphas.to(self.device)[timesteps]
        prediction = self.predict(self.pipe.unet, add_noise(latents, noise, alphas), timesteps, given)
        target = diffusion_target(self.kind, latents, noise, alphas)
        weight = timestep_weight(self.config.weighting, self.kind, alphas, self.config.gamma)
        each = self.masked(prediction, target, batch, weight)
        parts, logs = {"masked": each.mean()}, self._errors(prediction, target, timesteps, alphas)
        each = each.detach().clone()
        if self.identity_loss is not None and self.identity.counts(step):
            rows, more = self.few_steps(batch, given, latents, self._noise(latents, draws), generator.initial_seed())
            for name, (scale, values) in more.items():
                parts[name], logs[name] = scale * values.mean(), values.mean()
                logs[f"weight_{name}"] = torch.tensor(scale)
                each[rows] += values.detach()
        total = torch.stack(list(parts.values())).sum()
        return total, {"masked": parts["masked"]} | logs | {"each": each, "parts": parts}

    def _draws(self, generator: torch.Generator, sample: int) -> torch.Generator:
        """A generator for one sample of the batch of all processes."""
        mixed = np.random.SeedSequence((generator.initial_seed(), sample)).generate_state(1, np.uint64)[0] >> 1
        return torch.Generator(self.device).manual_seed(int(mixed))

    def _noise(self, latents: Tensor, draws: Sequence[torch.Generator]) -> Tensor:
        return torch.stack([torch.randn(latents.shape[1:], generator=g, device=self.device) for g in draws])

    def _timesteps(self, count: int, generator: torch.Generator) -> Tensor:
        """Every process draws for all of them, and takes its part."""
        first = self.rank * count
        return stratified_timesteps(count * self.world, len(self.alphas), generator)[first : first + count]

    @torch.no_grad()
    def _errors(self, prediction: Tensor, target: Tensor, timesteps: Tensor, alphas: Tensor) -> dict[str, Tensor]:
        """The error of the latents themselves, by noise level: comparable between runs and kinds."""
        scale = alphas.reciprocal() * (1 - alphas) if self.kind == "epsilon" else 1 - alphas
        error = (prediction.float() - target).square().mean((1, 2, 3)) * scale
        quarter = timesteps * 4 // len(self.alphas)
        return {f"x0_{q * 250}": error[quarter == q].mean() for q in range(4) if (quarter == q).any()}

    # ---- equation 3 ----------------------------------------------------------------------------------------

    def masked(self, found: Tensor, wanted: Tensor, batch: Batch, weight: Tensor | None = None) -> Tensor:
        """Equation 3 for each sample (B,)."""
        mask, emphasis = batch["mask"], None
        if self.config.features != 1:
            size = batch["time_ids"][0, 4:6].int().tolist()
            parts = [feature_mask(points, size) for points in batch["landmarks"].cpu().numpy()]
            emphasis = 1 + (self.config.features - 1) * torch.from_numpy(np.stack(parts))[:, None].to(mask.device)
        return masked_diffusion_loss(
            found, wanted, mask.float() / 255 if mask.dtype == torch.uint8 else mask.float(), weight=weight,
            emphasis=emphasis, background=self.config.background, as_printed=self.config.as_printed, each=True,
        )  # fmt: skip

    def conditions(self, batch: Batch) -> Conditions:
        """Text with a share of it dropped, face tokens (their gradient on), drawing and sizes."""
        text, pooled = self.texts(batch["captions"])
        gone = batch["drop_text"]
        with torch.no_grad():
            embeddings, states = self.source.faces(batch)
            kept = ~batch["drop_face"]  # no face: zeros, of which the mixer makes its unconditional tokens
        mixed = self.pipe.mixer(
            embeddings * kept[:, None, None], states * kept[:, None, None, None], batch["reference_mask"]
        )
        return Conditions(
            text=torch.where(gone[:, None, None], self.empty_text.to(text), text),
            pooled=torch.where(gone[:, None], self.empty_pooled.to(pooled), pooled),
            bare_text=text,
            bare_pooled=pooled,
            tokens=mixed.tokens,
            pooled_face=mixed.pooled,
            control=self.source.control(batch),
            time_ids=batch["time_ids"].float(),
            ffrnet=batch.get("ffrnet"),
        )

    def texts(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return self.source.texts(captions)

    def predict(self, unet: nn.Module, noisy: Tensor, timesteps: Tensor, given: Conditions, *, bare=False) -> Tensor:
        """The UNet's prediction with FFRNet attached; `bare`: none of the text dropped."""
        text, pooled = (given.bare_text, given.bare_pooled) if bare else (given.text, given.pooled)
        dtype = self.pipe.unet.dtype
        with self.attached(unet, given):
            return unet(
                noisy.to(dtype),
                timesteps,
                text.to(dtype),
                added_cond_kwargs={"text_embeds": pooled.to(dtype), "time_ids": given.time_ids.to(dtype)},
                return_dict=False,
            )[0]

    @contextmanager
    def attached(self, unet: nn.Module, given: Conditions, **options: Any) -> Iterator[None]:
        """FFRNet on `unet`, fed by these conditions."""
        ffrnet = self.pipe.ffrnet
        known = ffrnet is not None and given.control.shape[1] != 3
        scale: Any = 1.0 if given.ffrnet is None else given.ffrnet.float()[:, None, None, None]
        with embedded(ffrnet) if known else nullcontext(), attach(
            unet, ffrnet, tokens=given.tokens, pooled=given.pooled_face, control=given.control, scale=scale,
            variant=self.variant, **options,
        ):  # fmt: skip
            yield

    # ---- equation 4 ----------------------------------------------------------------------------------------

    def few_steps(
        self, batch: Batch, given: Conditions, latents: Tensor, noise: Tensor, seed: int
    ) -> tuple[Tensor, dict[str, tuple[float, Tensor]]]:
        """The branch from pure noise, no text dropped, and what is asked of its result: which samples it makes, and for
        each loss its weight in this step and its values.

        A loss that is computed every k-th step counts k-fold there, so that λ is that of equation 5.
        """
        assert self.identity_loss is not None
        face = ~batch["drop_face"]  # a sample whose face was dropped has nobody to resemble
        counts = face & batch.get("resembles", face)
        rows = counts.int().argsort(descending=True, stable=True)[: self.identity.samples]
        some = given.rows(rows)
        part = {key: value[rows] for key, value in batch.items() if isinstance(value, Tensor)}
        made = self.identity_loss.latents(
            lambda noisy, t: self.predict(self.lightning, noisy, t, some, bare=True), noise[rows],
            self.identity.draw_steps(seed),
        )  # fmt: skip
        if "phi" in part:
            reference = part["phi"]
        else:
            reference = self.identity_loss.embed(part["reference_faces"], part["reference_mask"])
        far = self.identity_loss.distance(made, part["keypoints"], reference) * counts[rows]
        losses = {"identity": (self.identity.weight * self.identity.every, far)}
        if self.config.branch:
            apart = self.masked(made, latents[rows], part) * face[rows]
            losses["branch"] = (self.config.branch * self.identity.every, apart)
        return rows, losses


def what_learns(ffrnet: nn.Module, learn: str) -> list[nn.Parameter]:
    """Freeze what of FFRNet does not learn; returns the parameters that do."""
    for name, parameter in ffrnet.named_parameters():
        parameter.requires_grad_(learn == "all" or any(part in name for part in LIGHT))
    return [parameter for parameter in ffrnet.parameters() if parameter.requires_grad]


def feature_mask(landmarks: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """(h, w) float32, 1 on eyes and mouth: the hulls of their landmarks (72, 2), in pixels, and a rim."""
    mask = np.zeros(size, np.float32)
    for part in FEATURES:
        hull = cv2.convexHull(np.round(landmarks[part]).astype(np.int32))
        cv2.fillConvexPoly(mask, hull, 1.0)
        cv2.polylines(mask, [hull], True, 1.0, thickness=max(1, size[0] // 64))
    return mask


@contextmanager
def embedded(ffrnet: FFRNet) -> Iterator[None]:
    """While it lasts, FFRNet takes the control picture's embedding in place of the picture."""
    embedding = ffrnet.controlnet_cond_embedding
    ffrnet.controlnet_cond_embedding = nn.Identity()
    try:
        yield
    finally:
        ffrnet.controlnet_cond_embedding = embedding

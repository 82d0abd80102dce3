"""The two stages that learn to make portraits.

`joint` learns the whole mini from nothing: base UNet, text encoders, mixer and FFRNet together, with FFRNet switched
off for a share of the samples so that the base stands on its own. `facesnap` is the paper's training: the base is
frozen, only mixer and FFRNet learn, by the masked loss (equation 3) and, where a recogniser φ is given, by the identity
loss (equation 4, identity.py) with the base itself as the few-step branch.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from diffusers import EulerDiscreteScheduler, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from facesnap.faces import align, five_points
from facesnap.ffrnet import FFRNet
from facesnap.landmarks import draw, to_68
from facesnap.mini.features import Features, head_masks
from facesnap.mini.nets.tokenizer import encode_text, token_ids
from facesnap.mixer import FacialAttributeMixer
from facesnap.synthetic.dataset import People, draw_references
from facesnap.training.identity import IdentityConfig, IdentityLoss
from facesnap.training.losses import (
    add_noise,
    capped_snr_weight,
    diffusion_target,
    drop_text,
    masked_diffusion_loss,
    stratified_timesteps,
)
from facesnap.training.trainer import Batch, Stage

WIDTHS = (96, 128, 144)
CONTROL_WIDTHS = (4, 8, 24, 64, 96)  # of the control picture's embedding: thin where the picture is large
PREDICTION = "v_prediction"


def make_unet(
    latent_channels: int, grid: int, token_dim: int, pooled_dim: int, widths: tuple[int, ...] = WIDTHS
) -> UNet2DConditionModel:
    """SDXL's architecture at about 1/290 of its size: no attention at the first level, as there."""
    return UNet2DConditionModel(
        sample_size=grid,
        in_channels=latent_channels,
        out_channels=latent_channels,
        block_out_channels=widths,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=1,
        attention_head_dim=tuple(width // 32 for width in widths),
        cross_attention_dim=token_dim,
        norm_num_groups=16,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=pooled_dim + 6 * 32,
    )


def make_mixer(clip_dim: int, token_dim: int, pooled_dim: int) -> FacialAttributeMixer:
    return FacialAttributeMixer(
        id_dim=512, clip_dim=clip_dim, width=160, num_id_tokens=8, num_tokens=16, depth=2, heads=5,
        token_dim=token_dim, pooled_dim=pooled_dim,
    )  # fmt: skip


def make_scheduler() -> EulerDiscreteScheduler:
    """SDXL's noise, v-prediction, and plain Euler steps.

    The paper's sampler (DPM++ SDE) adds noise at every step, and a model this small does not find its way back in
    eight: held-out people kept a fifth less of their likeness, and plain backgrounds came out mottled.
    """
    return EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=PREDICTION,
        timestep_spacing="trailing",
    )  # fmt: skip


@dataclass
class Parts:
    """Everything of the pipeline that a diffusion stage touches."""

    unet: UNet2DConditionModel
    text_encoder: CLIPTextModel
    text_encoder_2: CLIPTextModelWithProjection
    tokenizer: CLIPTokenizer
    mixer: FacialAttributeMixer
    ffrnet: FFRNet

    def base(self) -> dict[str, nn.Module]:
        return {"unet": self.unet, "text_encoder": self.text_encoder, "text_encoder_2": self.text_encoder_2}

    def ours(self) -> dict[str, nn.Module]:
        return {"mixer": self.mixer, "ffrnet": self.ffrnet}


class DiffusionStage(Stage):
    """Batches of (latents, noise, text, references, drawing) for both stages.

    latents (N, C, h, w) float16 and clip features (N, P, C) float16 lie in memory; drawings are made on the fly,
    unless `use_controls` is called.

    photographed, clip_photographed: what the face's features become where a picture is changed as cameras change it;
    half of the references are of that kind. strangers: the share of references with somebody else's embedding. On
    photographs a recogniser of rendered people errs more than the face encoder does, and the mixer learns to doubt it
    where the two disagree. phi (N, 512), with `identity_loss`: what `phi_of` gives. Targets whose prompt asks for a hat
    or glasses are left out of that loss: to a recogniser these make another person, so that it would take them off.
    """

    def __init__(
        self,
        parts: Parts,
        people: People,
        features: Features,
        latents: np.ndarray,
        clip: np.ndarray,
        *,
        photographed: Features | None = None,
        clip_photographed: np.ndarray | None = None,
        joint: bool,
        batch_size: int = 32,
        without_ffrnet: float = 0.15,
        text_drop: float = 0.1,
        strangers: float = 0.3,
        background: float = 0.5,
        control_size: int = 256,
        identity: IdentityConfig = IdentityConfig(),  # noqa: B008 (frozen)
        identity_loss: IdentityLoss | None = None,
        phi: np.ndarray | None = None,
    ) -> None:
        self.parts, self.joint, self.batch_size = parts, joint, batch_size
        self.people, self.features = people, features
        self.latents, self.clip = latents, clip
        self.photographed, self.clip_photographed = photographed, clip_photographed
        self.controls: np.ndarray | None = None
        self.without_ffrnet = without_ffrnet if joint else 0.0
        self.text_drop, self.strangers, self.background = text_drop, strangers, background if joint else 0.0
        self.control_size = control_size
        self.identity, self.identity_loss, self.phi = identity, identity_loss, phi
        self.masks = head_masks(people, latents.shape[-1])
        self.prompt_ids = token_ids(parts.tokenizer, people.prompts)
        self.rich_ids = token_ids(parts.tokenizer, people.rich)
        self.alphas = make_scheduler().alphas_cumprod.float()
        usable = features.found & np.array([style == "photo" for style in people.styles])
        # who can be shown: a target needs another picture of the same person, a photo with a face, as its reference
        self.references: dict[int, np.ndarray] = {}
        for rows in people.by_person().values():
            photos = rows[usable[rows]]
            for row in rows:
                others = photos[photos != row]
                if len(others):
                    self.references[int(row)] = others
        self.rows = np.array(sorted(self.references))
        self.photos = np.flatnonzero(usable)
        self.covered = np.array([a["hat"] != "none" or a["glasses"] != "none" for a in people.attributes])
        for module in parts.base().values():
            module.requires_grad_(joint)
        # few channels at many pixels: twice as fast this way on a CPU
        parts.ffrnet.controlnet_cond_embedding.to(memory_format=torch.channels_last)

    def modules(self) -> dict[str, nn.Module]:
        return self.parts.ours() | (self.parts.base() if self.joint else {})

    def batch(self, rng: np.random.Generator) -> Batch:
        rows = rng.choice(self.rows, self.batch_size)
        most = int(rng.choice([1, 2, 3, 4], p=[0.6, 0.2, 0.1, 0.1]))
        chosen, mask = draw_references(rng, (self.references[int(row)] for row in rows), most)
        embeddings, states = self.features.embeddings[chosen], self.clip[chosen]
        if self.photographed is not None and self.clip_photographed is not None:
            changed = self.photographed.found[chosen] & (rng.random(chosen.shape) < 0.5)
            embeddings[changed] = self.photographed.embeddings[chosen[changed]]
            states[changed] = self.clip_photographed[chosen[changed]]
        wrong = rng.random(chosen.shape) < self.strangers
        embeddings[wrong] = self.features.embeddings[rng.choice(self.photos, int(wrong.sum()))]
        # half of the drawings are what the predictor gives at use, half are exact
        fitted = self.features.found[rows] & (rng.random(len(rows)) < 0.5)
        if self.controls is not None:
            control = torch.from_numpy(self.controls[fitted.astype(int), rows])
        else:
            control = torch.stack([self.drawing(row, own) for row, own in zip(rows, fitted, strict=True)])
        rich = self.joint & (rng.random(len(rows)) < self.without_ffrnet)
        ids = torch.where(torch.from_numpy(rich & (rng.random(len(rows)) < 0.7))[:, None],
                          self.rich_ids[rows], self.prompt_ids[rows])  # fmt: skip
        known = {}
        if self.phi is not None:  # the mean of the references' directions
            directions = torch.from_numpy((self.phi[chosen] * mask[..., None]).sum(1))
            points = [five_points(to_68(self.points(row, own))) for row, own in zip(rows, fitted, strict=True)]
            known = {
                "keypoints": torch.from_numpy(np.stack(points).astype(np.float32)),
                "phi": directions,
                "bare": torch.from_numpy(~self.covered[rows]),
            }
        return (
            known
            | {
                "latents": torch.from_numpy(self.latents[rows]).float(),
                "mask": torch.from_numpy(self.masks[rows]).float(),
                "ids": ids,
                "embeddings": torch.from_numpy(embeddings),
                "clip": torch.from_numpy(states),
                "reference_mask": torch.from_numpy(mask),
                "control": control,
            }
            | ({"ffrnet": torch.from_numpy(~rich)} if self.without_ffrnet else {})
        )

    def points(self, row: int, fitted: bool = False) -> np.ndarray:
        """The 72 landmarks (72, 2), exact or as the predictor gives them, in pixels of the control picture."""
        points = (self.features.fitted if fitted else self.people.landmarks)[row]
        return points * (self.control_size / self.people.size[0])

    def drawing(self, row: int, fitted: bool = False) -> Tensor:
        """(3, H, W) uint8."""
        size = self.control_size
        return torch.from_numpy(draw(self.points(row, fitted), (size, size))).permute(2, 0, 1)

    def use_controls(self, controls: np.ndarray) -> None:
        """Freeze FFRNet's embedding of the drawings and take its output from `embed_controls`: half the cost."""
        self.parts.ffrnet.controlnet_cond_embedding.requires_grad_(False)
        self.controls = controls

    @torch.no_grad()
    def embed_controls(self) -> np.ndarray:
        """(2, N, C, h, w) float16: FFRNet's embedding of every picture's exact drawing and of its fitted one."""
        embedding = self.parts.ffrnet.controlnet_cond_embedding
        device = next(embedding.parameters()).device
        out = []
        for fitted in (False, True):
            for start in tqdm(range(0, len(self.people), 32), unit="batch"):
                rows = range(start, min(start + 32, len(self.people)))
                # a picture without a face has no fitted points, and never asks for them
                drawings = [self.drawing(row, fitted and bool(self.features.found[row])) for row in rows]
                with torch.autocast(device.type, torch.bfloat16):
                    out.append(embedding(_pixels(torch.stack(drawings).to(device))).half().cpu().numpy())
        return np.concatenate(out).reshape(2, len(self.people), *out[0].shape[1:])

    def conditions(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Text (B, n, d) and pooled text, face tokens (B, m, d) and pooled face."""
        encoders = (self.parts.text_encoder, self.parts.text_encoder_2)
        with torch.set_grad_enabled(self.joint), short_attention(batch["ids"].device):
            text, pooled = encode_text(encoders, batch["ids"])
        mixed = self.parts.mixer(batch["embeddings"], batch["clip"].float(), batch["reference_mask"])
        return text, pooled, mixed.tokens, mixed.pooled

    def predict(self, noisy: Tensor, timesteps: Tensor, batch: Batch, text, pooled, tokens, pooled_face) -> Tensor:
        side = float(self.people.size[0])
        time_ids = torch.tensor([side, side, 0, 0, side, side], device=noisy.device).expand(len(noisy), -1)
        embedded = batch["control"].dtype == torch.float16
        with short_attention(noisy.device):
            with _embedded(self.parts.ffrnet) if embedded else nullcontext():
                down, mid = self.parts.ffrnet(
                    noisy, timesteps, tokens, batch["control"].float() if embedded else _pixels(batch["control"]),
                    added_cond_kwargs={"text_embeds": pooled_face, "time_ids": time_ids}, return_dict=False,
                )  # fmt: skip
            if "ffrnet" in batch:
                on = batch["ffrnet"].to(mid.dtype)[:, None, None, None]
                down, mid = [d * on for d in down], mid * on
            return self.parts.unet(
                noisy, timesteps, text, added_cond_kwargs={"text_embeds": pooled, "time_ids": time_ids},
                down_block_additional_residuals=down, mid_block_additional_residual=mid, return_dict=False,
            )[0]  # fmt: skip

    def loss(self, batch: Batch, step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        latents = batch["latents"]
        count = len(latents)
        text, pooled, tokens, pooled_face = told = self.conditions(batch)
        # the pipeline gives zeros for an empty negative prompt (force_zeros_for_empty_prompt)
        nothing = torch.zeros_like(text[0]), torch.zeros_like(pooled[0])
        text, pooled = drop_text(text, pooled, *nothing, self.text_drop, generator)
        # every process draws for all of them, and takes its part
        everyone, own = count * self.world, slice(self.rank, None, self.world)
        noise = torch.randn((everyone, *latents.shape[1:]), generator=generator, device=latents.device)[own]
        timesteps = stratified_timesteps(everyone, len(self.alphas), generator).to(latents.device)[own]
        alphas = self.alphas.to(latents.device)[timesteps]
        prediction = self.predict(
            add_noise(latents, noise, alphas), timesteps, batch, text, pooled, tokens, pooled_face
        )
        target = diffusion_target(PREDICTION, latents, noise, alphas)
        loss = masked_diffusion_loss(
            prediction,
            target,
            batch["mask"],
            weight=capped_snr_weight(alphas),
            background=self.background,
        )
        with torch.no_grad():  # error of the latents themselves, by noise level: comparable between runs
            error = (prediction.float() - target).square().mean((1, 2, 3)) * (1 - alphas)
            logs = {
                f"x0_{low}": error[(timesteps >= low) & (timesteps < low + 250)].mean() for low in (0, 250, 500, 750)
            }
        if self.identity_loss is not None and self.identity.counts(step):
            some = batch["bare"].int().argsort(descending=True, stable=True)[: self.identity.samples]
            part = {key: value[some] for key, value in batch.items()}
            given = [x[some] for x in told]  # with its text, dropped or not
            far = self.identity_loss(
                lambda noisy, t: self.predict(noisy, t, part, *given),
                # drawn last, so that all else is as it is without this loss
                torch.randn(part["latents"].shape, generator=generator, device=latents.device),
                part["keypoints"],
                part["phi"],
            )
            far = (far * part["bare"]).sum() / part["bare"].sum().clamp(min=1)
            loss, logs["identity"] = loss + self.identity.weight * far, far
        return loss, logs

    @torch.no_grad()
    def sample(self, rows: np.ndarray, *, seed: int = 0, steps: int = 8, guidance: float = 2.0) -> Tensor:
        """Latents (n, C, h, w) for some rows: first reference of each, its own prompt and exact landmarks."""
        scheduler = make_scheduler()
        scheduler.set_timesteps(steps)
        generator = torch.Generator().manual_seed(seed)
        references = np.array([[self.references[int(row)][0]] for row in rows])
        batch = {
            "ids": self.prompt_ids[rows],
            "embeddings": torch.from_numpy(self.features.embeddings[references]),
            "clip": torch.from_numpy(self.clip[references]).float(),  # autocast cannot join halves
            "reference_mask": torch.ones(len(rows), 1, dtype=torch.bool),
            "control": torch.stack([self.drawing(row) for row in rows]),
        }
        device = next(self.parts.unet.parameters()).device
        batch = {key: value.to(device) for key, value in batch.items()}
        text, pooled, tokens, pooled_face = self.conditions(batch)
        both = {key: torch.cat([value, value]) for key, value in batch.items()}
        both["ffrnet"] = torch.arange(2 * len(rows), device=device) >= len(rows)  # in the conditional half, as in use
        conditions = (
            torch.cat([text * 0, text]), torch.cat([pooled * 0, pooled]),
            torch.cat([tokens, tokens]), torch.cat([pooled_face, pooled_face]),
        )  # fmt: skip
        latents = torch.randn(len(rows), *self.latents.shape[1:], generator=generator).to(device)
        latents = latents * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            noisy = scheduler.scale_model_input(latents, t)
            timesteps = t.expand(2 * len(rows)).to(device)
            with torch.autocast(device.type, torch.bfloat16):
                plain, told = self.predict(torch.cat([noisy, noisy]), timesteps, both, *conditions).float().chunk(2)
            prediction = plain + guidance * (told - plain)
            latents = scheduler.step(prediction, t, latents, generator=generator).prev_sample
        return latents


def short_attention(device: torch.device) -> AbstractContextManager:
    """On a CPU the flash kernel's backward pass takes ten times as long as plain products for sequences this short."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()


def _pixels(drawings: Tensor) -> Tensor:
    """Drawings (B, 3, H, W) uint8 as FFRNet wants them."""
    return drawings.float().div(255).contiguous(memory_format=torch.channels_last)


@contextmanager
def _embedded(ffrnet: FFRNet) -> Iterator[None]:
    """While it lasts, the network takes the control picture's embedding in place of the picture."""
    embedding = ffrnet.controlnet_cond_embedding
    ffrnet.controlnet_cond_embedding = nn.Identity()
    try:
        yield
    finally:
        ffrnet.controlnet_cond_embedding = embedding


def phi_of(recogniser: nn.Module, people: People, features: Features, *, few: int = 32) -> np.ndarray:
    """φ's unit embedding of every picture in which the analyser found a face (N, 512); zeros for the others."""
    out = np.zeros((len(people), 512), np.float32)
    rows = np.flatnonzero(features.found)
    for start in range(0, len(rows), few):
        some = rows[start : start + few]
        crops = [align(people.images[int(row)], five_points(features.points68[row])) for row in some]
        pixels = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float().sub(127.5).div(127.5)
        with torch.no_grad():
            out[some] = nn.functional.normalize(recogniser(pixels).float()).numpy()
    return out


class SheetStage(DiffusionStage):
    """A diffusion stage that draws: reference | drawing | generated | true picture, for a few rows."""

    def __init__(self, *args, vae, sheet_rows: int = 8, **options) -> None:
        super().__init__(*args, **options)
        self.vae, self.sheet_rows = vae, sheet_rows

    @torch.no_grad()
    def sample_sheet(self, path: Path) -> dict[str, float]:
        people = np.unique(self.people.person[self.rows])
        chosen = people[np.linspace(0, len(people) - 1, self.sheet_rows).astype(int)]
        rows = np.array([self.rows[self.people.person[self.rows] == person][0] for person in chosen])
        latents = self.sample(rows)
        decoded = self.vae.to(latents.device).decode(latents).sample.float().clamp(-1, 1)
        images = ((decoded + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        columns = []
        for row, image in zip(rows, images, strict=True):
            reference = self.people.images[int(self.references[int(row)][0])]
            drawing = draw(self.people.landmarks[row], self.people.size)
            columns.append(np.vstack([reference, drawing, image, self.people.images[int(row)]]))
        cv2.imwrite(str(path), cv2.cvtColor(np.hstack(columns), cv2.COLOR_RGB2BGR))
        return {}

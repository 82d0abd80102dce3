"""The paper's training, on photographs: the base model is frozen, mixer and FFRNet learn by equations 3 to 5.

The stage is built around a `FaceSnapPipeline`, at any size, and sees its batches through the same parts as a visitor's
photos: the pipeline's own text encoding, its face encoder, and FFRNet attached to the UNet by the same hook. So every
row of the paper's Tables 2 and 3 trains as it will be used, from what the checkpoint says of itself.

A sample's noise and timestep depend on the seed, the position in the run and the sample's place in the batch of *all*
processes: two processes give the gradient that one gives on both their batches.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from diffusers import StableDiffusionXLPipeline
from insightface.utils.face_align import arcface_dst
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from facesnap.attachment import parts_of
from facesnap.clip import face_pixels
from facesnap.errors import InputError
from facesnap.evaluation.metrics import cosines, retention
from facesnap.ffrnet import attach
from facesnap.pipeline import FaceSnapPipeline
from facesnap.training.identity import IdentityConfig, IdentityLoss, batch_part, unscale
from facesnap.training.losses import (
    add_noise,
    diffusion_target,
    masked_diffusion_loss,
    min_snr_weight,
    stratified_timesteps,
)
from facesnap.training.trainer import Batch, Stage

# Of FFRNet, what reads the face or the drawing, and its outputs. The rest is the base UNet's encoder, which knows
# pictures already: with `learn` "light" it stays as it is, and needs no gradient, optimiser or average.
LEARN = ("all", "light")
LIGHT = ("attn2.", "add_embedding.", "controlnet_")
Stream = Callable[[int, int, int], Iterable[Batch]]  # position, rank, world → the batches from there on
MEGAPIXEL = 1024**2  # the VAE reads about so much at a time: at 1024² one picture fills a GPU


@dataclass(frozen=True)
class LossConfig:
    """Equation 3 and its options."""

    min_snr: float | None = None  # γ of Min-SNR weighting; None: every timestep weighs the same, as in the paper
    background: float = 0.0  # the M of what is neither face nor hair
    as_printed: bool = False  # not normalised by the mask's area: a small face then weighs less


def what_learns(ffrnet: nn.Module, learn: str) -> list[nn.Parameter]:
    """Freeze what of FFRNet does not learn; returns the parameters that do."""
    for name, parameter in ffrnet.named_parameters():
        parameter.requires_grad_(learn == "all" or any(part in name for part in LIGHT))
    return [parameter for parameter in ffrnet.parameters() if parameter.requires_grad]


class Cache:
    """What the frozen encoders said, a safetensors file for each name. Several processes may share the folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, names: Sequence[str], compute: Callable[[list[int]], list[dict[str, Tensor]]]) -> list[dict]:
        """The tensors of each name; those that are not there yet come from `compute`, which is given their indices."""
        paths = [self._path(name) for name in names]
        missing = [i for i, path in enumerate(paths) if not path.exists()]
        made: dict[int, dict[str, Tensor]] = {}
        if missing:
            made = dict(zip(missing, compute(missing), strict=True))
        for i, tensors in made.items():
            paths[i].parent.mkdir(parents=True, exist_ok=True)
            draft = paths[i].with_suffix(f".{torch.randint(2**62, ()).item()}.part")
            save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, draft)
            draft.replace(paths[i])
        return [made[i] if i in made else load_file(path) for i, path in enumerate(paths)]

    def _path(self, name: str) -> Path:
        digest = hashlib.sha256(name.encode()).hexdigest()
        return self.folder / digest[:2] / f"{digest[2:34]}.safetensors"


@dataclass
class Conditions:
    """All that a prediction is conditioned on, B rows each; `bare` is the text before any of it was dropped."""

    text: Tensor  # (B, n, d)
    pooled: Tensor  # (B, p)
    bare_text: Tensor
    bare_pooled: Tensor
    tokens: Tensor  # (B, m, d)
    pooled_face: Tensor  # (B, p)
    control: Tensor  # (B, 3, H, W) in [0, 1]
    time_ids: Tensor  # (B, 6)

    def first(self, count: int | None) -> Conditions:
        return self if count is None else Conditions(**{key: value[:count] for key, value in vars(self).items()})


class PortraitStage(Stage):
    """Mixer and FFRNet of `pipe` learn from batches in the form of `photos.PhotoShards`.

    stream: the batches of one process from a position on. identity_loss: φ and the rest of equation 4, with
    `lightning` the few-step UNet (the base's own where None). dtype: of the frozen parts on the device. learn: "all" of
    FFRNet, or "light".
    validation: a batch that the sheets are made of. cache: where latents are kept (for data that is not augmented) and
    texts.
    """

    def __init__(
        self,
        pipe: FaceSnapPipeline,
        stream: Stream,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        loss: LossConfig = LossConfig(),  # noqa: B008 (frozen)
        identity: IdentityConfig = IdentityConfig(),  # noqa: B008
        identity_loss: IdentityLoss | None = None,
        lightning: nn.Module | None = None,
        checkpointing: bool = False,
        learn: str = "all",
        validation: Batch | None = None,
        latent_cache: Cache | None = None,
        text_cache: Cache | None = None,
    ) -> None:
        self.pipe, self._stream = pipe, stream
        self.device = torch.device(device)
        self.config, self.identity, self.identity_loss = loss, identity, identity_loss
        self.validation, self.latent_cache, self.text_cache = validation, latent_cache, text_cache
        self.variant = pipe.settings.variant
        self.kind = pipe.scheduler.config.prediction_type
        self.alphas = pipe.scheduler.alphas_cumprod.float()
        for name in ("unet", "vae", "text_encoder", "text_encoder_2", "face_encoder"):
            # SDXL's VAE overflows in float16, and in bfloat16 it shifts colours: it alone is always whole
            wanted = torch.float32 if name == "vae" else dtype
            getattr(pipe, name).requires_grad_(False).eval().to(self.device, wanted)
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
            for module in {
                id(m): m for m in (pipe.unet, self.lightning, pipe.ffrnet, pipe.vae) if m is not None
            }.values():
                module.enable_gradient_checkpointing()
        with torch.no_grad():
            _, empty, _, pooled = pipe.encode_prompt("", device=self.device, do_classifier_free_guidance=True)
        self.empty_text, self.empty_pooled = empty[0], pooled[0]

    # ---- what the trainer asks -----------------------------------------------------------------------------

    def modules(self) -> dict[str, nn.Module]:
        parts = {"mixer": self.pipe.mixer, "ffrnet": None if self.variant == "none" else self.pipe.ffrnet}
        return {name: part for name, part in parts.items() if part is not None}

    def stream(self, position: int, seed: int) -> Generator[Batch]:
        yield from self._stream(position, self.rank, self.world)

    def loss(self, batch: Batch, step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        count = len(batch["pixels"])
        latents = self.latents(batch)
        conditions = self.conditions(batch)
        first = self.rank * count
        draws = [_generator(self.device, generator.initial_seed(), first + i) for i in range(count)]
        noise = torch.stack([torch.randn(latents.shape[1:], generator=g, device=self.device) for g in draws])
        timesteps = stratified_timesteps(count * self.world, len(self.alphas), generator)[first : first + count]
        alphas = self.alphas.to(self.device)[timesteps]
        prediction = self.predict(self.pipe.unet, add_noise(latents, noise, alphas), timesteps, conditions)
        weight = None
        if self.config.min_snr is not None:
            weight = min_snr_weight(self.kind, alphas, self.config.min_snr)
        each = masked_diffusion_loss(
            prediction,
            diffusion_target(self.kind, latents, noise, alphas),
            batch["mask"].float() / 255,
            weight=weight,
            background=self.config.background,
            as_printed=self.config.as_printed,
            each=True,
        )
        loss, each = each.mean(), each.detach().clone()
        logs = {"masked": loss}
        if self.identity_loss is not None and self.identity.counts(step):
            noise = torch.stack([torch.randn(latents.shape[1:], generator=g, device=self.device) for g in draws])
            far = self.identity_distance(batch, conditions, noise)
            # a sample whose face was dropped has nobody to resemble
            far = far * ~batch["drop_face"][: len(far)]
            loss = loss + self.identity.weight * far.mean()
            logs["identity"] = far.mean()
            each[: len(far)] += far.detach()
        return loss, logs | {"each": each}

    # ---- equation 3 ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def latents(self, batch: Batch) -> Tensor:
        """(B, C, h, w) float32: the means of the VAE's posteriors, in the denoiser's units."""

        def encode(rows: list[int]) -> list[dict[str, Tensor]]:
            vae = self.pipe.vae
            pixels = batch["pixels"][rows].to(self.device, vae.dtype) / 127.5 - 1
            few = max(1, MEGAPIXEL // (pixels.shape[-1] * pixels.shape[-2]))
            with torch.autocast(self.device.type, enabled=False):
                means = [vae.encode(part).latent_dist.mode() for part in pixels.split(few)]
            latents = scale(vae, torch.cat(means).float())
            return [{"latents": x} for x in (latents if self.latent_cache is None else latents.bfloat16())]

        rows = list(range(len(batch["pixels"])))
        size = "x".join(map(str, batch["pixels"].shape[-2:]))
        if self.latent_cache is None:
            found = encode(rows)
        else:
            found = self.latent_cache.get([f"{key} {size}" for key in batch["keys"]], lambda some: encode(some))
        return torch.stack([tensors["latents"].to(self.device).float() for tensors in found])

    @torch.no_grad()
    def texts(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(B, n, d) and pooled (B, p), as the pipeline encodes a prompt."""

        def encode(rows: list[int]) -> list[dict[str, Tensor]]:
            with torch.autocast(self.device.type, enabled=False):
                text, _, pooled, _ = self.pipe.encode_prompt(
                    [captions[i] for i in rows], device=self.device, do_classifier_free_guidance=False
                )
            return [{"text": t, "pooled": p} for t, p in zip(text, pooled, strict=True)]

        if self.text_cache is None:
            found = encode(list(range(len(captions))))
        else:
            found = self.text_cache.get(captions, encode)
        text, pooled = (torch.stack([x[key].to(self.device) for x in found]) for key in ("text", "pooled"))
        return text, pooled

    def conditions(self, batch: Batch) -> Conditions:
        """Text with a share of it dropped, face tokens (their gradient on), drawing and sizes."""
        text, pooled = self.texts(batch["captions"])
        gone = batch["drop_text"]
        with torch.no_grad():
            crops, mask = batch["crops"], batch["reference_mask"]
            pixels = face_pixels(crops[mask], self.pipe.face_encoder.config.image_size, self.pipe.settings.saturation)
            features = self.pipe.face_encoder(pixels.to(self.pipe.face_encoder.dtype), output_hidden_states=True)
            states = features.hidden_states[-2].float()
            clip = states.new_zeros(*mask.shape, *states.shape[1:])
            clip[mask] = states
            kept = ~batch["drop_face"]  # no face: zeros, of which the mixer makes its unconditional tokens
            clip = clip * kept[:, None, None, None]
            embeddings = batch["embeddings"] * kept[:, None, None]
        mixed = self.pipe.mixer(embeddings, clip, mask)
        return Conditions(
            text=torch.where(gone[:, None, None], self.empty_text.to(text), text),
            pooled=torch.where(gone[:, None], self.empty_pooled.to(pooled), pooled),
            bare_text=text,
            bare_pooled=pooled,
            tokens=mixed.tokens,
            pooled_face=mixed.pooled,
            control=batch["control"].float() / 255,
            time_ids=batch["time_ids"].float(),
        )

    def predict(self, unet: nn.Module, noisy: Tensor, timesteps: Tensor, given: Conditions, *, bare=False) -> Tensor:
        """The UNet's prediction with FFRNet attached; `bare`: none of the text dropped."""
        text, pooled = (given.bare_text, given.bare_pooled) if bare else (given.text, given.pooled)
        dtype = self.pipe.unet.dtype
        with attach(
            unet,
            self.pipe.ffrnet,
            tokens=given.tokens,
            pooled=given.pooled_face,
            control=given.control,
            variant=self.variant,
        ):
            return unet(
                noisy.to(dtype),
                timesteps,
                text.to(dtype),
                added_cond_kwargs={"text_embeds": pooled.to(dtype), "time_ids": given.time_ids.to(dtype)},
                return_dict=False,
            )[0]

    # ---- equation 4 ----------------------------------------------------------------------------------------

    def identity_distance(self, batch: Batch, given: Conditions, noise: Tensor) -> Tensor:
        """1 − cos for the first `identity.samples` of the batch (or all), no text dropped."""
        assert self.identity_loss is not None
        count = self.identity.samples
        part, some = batch_part(batch, count), given.first(count)

        def predict(noisy: Tensor, timesteps: Tensor) -> Tensor:
            return self.predict(self.lightning, noisy, timesteps, some, bare=True)

        reference = self.identity_loss.embed(part["reference_faces"], part["reference_mask"])
        return self.identity_loss(predict, noise if count is None else noise[:count], part["keypoints"], reference)

    # ---- the sheet -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample_sheet(self, path: Path) -> dict[str, float]:
        """reference | drawing | generated | true picture for each sample of the validation batch, made as the
        pipeline makes portraits. Figures by the recogniser that scores, on the evaluation's scale: 0 for strangers, 1
        for the true pictures."""
        if self.validation is None:
            return {}
        pipe, batch = self.pipe, _to(self.validation, self.device)
        given = self.conditions(batch)
        stock = StableDiffusionXLPipeline(
            pipe.vae, pipe.text_encoder, pipe.text_encoder_2, pipe.tokenizer, pipe.tokenizer_2, pipe.unet,
            type(pipe.scheduler).from_config(pipe.scheduler.config), add_watermarker=False,
            force_zeros_for_empty_prompt=pipe.config.force_zeros_for_empty_prompt,
        )  # fmt: skip
        stock.set_progress_bar_config(disable=True)
        height, width = batch["pixels"].shape[-2:]
        images = []
        for row, caption in enumerate(batch["captions"]):  # one at a time, as large as training leaves room for
            alone = Conditions(**{key: value[row : row + 1] for key, value in vars(given).items()})
            with attach(
                pipe.unet, pipe.ffrnet, tokens=alone.tokens, pooled=alone.pooled_face, control=alone.control,
                variant=self.variant, parts=lambda: parts_of(stock),
            ):  # fmt: skip
                latents = stock(
                    caption, height=height, width=width, num_inference_steps=pipe.settings.steps,
                    guidance_scale=pipe.settings.guidance, generator=torch.Generator().manual_seed(row),
                    output_type="latent",
                ).images  # fmt: skip
            with torch.autocast(self.device.type, enabled=False):
                decoded = pipe.vae.decode(unscale(pipe.vae, latents.float()).to(pipe.vae.dtype)).sample[0].float()
            images.append(decoded.clamp(-1, 1).add(1).mul(127.5).round().byte().permute(1, 2, 0).cpu().numpy())
        true = batch["pixels"].permute(0, 2, 3, 1).cpu().numpy()
        drawings = batch["control"].permute(0, 2, 3, 1).cpu().numpy()
        crops = batch["crops"][:, 0].cpu().numpy()
        rows = []
        for crop, *pictures in zip(crops, drawings, images, true, strict=True):
            rows.append(np.hstack([cv2.resize(crop, (height, height), interpolation=cv2.INTER_AREA), *pictures]))
        cv2.imwrite(str(path), cv2.cvtColor(np.vstack(rows), cv2.COLOR_RGB2BGR))
        return self.figures(images, true, batch) if pipe.scorer is not None else {}

    def figures(self, images: Sequence[np.ndarray], true: np.ndarray, batch: Batch) -> dict[str, float]:
        """Of generated and true pictures, each against the batch's references: mean cosines and retention."""
        scorer = self.pipe.scorer
        faces = batch["reference_faces"][:, 0].cpu().numpy()
        references = np.stack([scorer.embed(face, arcface_dst) for face in faces])  # they are aligned already
        made = []
        for image in images:
            try:
                made.append(scorer.embed(image, self.pipe.face_analyser.analyse(image).keypoints))
            except InputError:  # no face: a cosine of 0, as in the evaluation
                made.append(np.zeros_like(references[0]))
        points = batch["keypoints"].cpu().numpy()
        real = np.stack([scorer.embed(picture, p) for picture, p in zip(true, points, strict=True)])
        people = np.array([key.rsplit("_", 1)[0] for key in batch["keys"]])
        apart = people[:, None] != people[None]
        told = cosines(np.stack(made), references).diagonal()
        ceiling = cosines(real, references).diagonal()
        figures = {
            "val_identity": float(told.mean()),
            "val_identity_true": float(ceiling.mean()),
            "val_found": float(np.mean([np.any(e) for e in made])),
        }
        if apart.any():
            strangers = float(cosines(references, references)[apart].mean())
            figures |= {"val_strangers": strangers, "val_retention": retention(told, ceiling, strangers)}
        return figures


def scale(vae: Any, latents: Tensor) -> Tensor:
    """The VAE's latents in the denoiser's units: the inverse of `identity.unscale`."""
    config = vae.config
    if getattr(config, "latents_mean", None) is not None and getattr(config, "latents_std", None) is not None:
        values = (config.latents_mean, config.latents_std)
        mean, std = (torch.tensor(v, device=latents.device).view(1, -1, 1, 1) for v in values)
        return (latents - mean) * config.scaling_factor / std
    return (latents - (getattr(config, "shift_factor", None) or 0.0)) * config.scaling_factor


def _to(batch: Batch, device: torch.device) -> Batch:
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}


def _generator(device: torch.device, seed: int, sample: int) -> torch.Generator:
    """For one sample of the batch of all processes."""
    mixed = int(np.random.SeedSequence((seed, sample)).generate_state(1, np.uint64)[0] >> 1)
    return torch.Generator(device).manual_seed(mixed)

"""Photographs as a source of samples: what the frozen encoders say of pictures, texts and references, now or from a
cache."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from facesnap.clip import face_pixels
from facesnap.pipeline import FaceSnapPipeline
from facesnap.training.trainer import Batch

Stream = Callable[[int, int, int], Iterable[Batch]]  # position, rank, world → the batches from there on
MEGAPIXEL = 1024**2  # the VAE reads about so much at a time: at 1024² one picture fills a GPU


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


class Photographs:
    """A `portraits.Source` of batches in the form of `photos.PhotoShards`, seen through the same parts as a visitor's
    photos: the pipeline's VAE, its text encoding and its face encoder.

    stream: the batches of one process from a position on. latent_cache: where latents are kept, for data that is not
    augmented; text_cache: where texts are.
    """

    def __init__(
        self,
        pipe: FaceSnapPipeline,
        stream: Stream,
        *,
        device: torch.device | str = "cpu",
        validation: Batch | None = None,
        latent_cache: Cache | None = None,
        text_cache: Cache | None = None,
    ) -> None:
        self.pipe, self.stream, self.device = pipe, stream, torch.device(device)
        self.validation, self.latent_cache, self.text_cache = validation, latent_cache, text_cache

    def batches(self, position: int, seed: int, rank: int, world: int) -> Iterable[Batch]:
        return self.stream(position, rank, world)

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

        size = "x".join(map(str, batch["pixels"].shape[-2:]))
        if self.latent_cache is None:
            found = encode(list(range(len(batch["pixels"]))))
        else:
            found = self.latent_cache.get([f"{key} {size}" for key in batch["keys"]], encode)
        return torch.stack([tensors["latents"].to(self.device).float() for tensors in found])

    @torch.no_grad()
    def texts(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
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

    @torch.no_grad()
    def faces(self, batch: Batch) -> tuple[Tensor, Tensor]:
        crops, mask = batch["crops"], batch["reference_mask"]
        encoder = self.pipe.face_encoder
        pixels = face_pixels(crops[mask], encoder.config.image_size, self.pipe.settings.saturation)
        states = encoder(pixels.to(encoder.dtype), output_hidden_states=True).hidden_states[-2].float()
        clip = states.new_zeros(*mask.shape, *states.shape[1:])
        clip[mask] = states
        return batch["embeddings"], clip

    def control(self, batch: Batch) -> Tensor:
        return batch["control"].float() / 255


def scale(vae: Any, latents: Tensor) -> Tensor:
    """The VAE's latents in the denoiser's units: the inverse of `identity.unscale`."""
    config = vae.config
    if getattr(config, "latents_mean", None) is not None and getattr(config, "latents_std", None) is not None:
        values = (config.latents_mean, config.latents_std)
        mean, std = (torch.tensor(v, device=latents.device).view(1, -1, 1, 1) for v in values)
        return (latents - mean) * config.scaling_factor / std
    return (latents - (getattr(config, "shift_factor", None) or 0.0)) * config.scaling_factor

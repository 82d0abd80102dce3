"""How far a portrait stage is: a sheet of portraits made as the pipeline makes them, and figures of merit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import torch
from diffusers import StableDiffusionXLPipeline
from insightface.utils.face_align import arcface_dst
from torch import Tensor

from facesnap.attachment import parts_of
from facesnap.errors import InputError
from facesnap.metrics import cosines, retention
from facesnap.training.identity import unscale
from facesnap.training.trainer import Batch

if TYPE_CHECKING:
    from facesnap.training.portraits import Conditions, PortraitStage


@torch.no_grad()
def draw_sheet(stage: PortraitStage, batch: Batch, path: Path) -> dict[str, float]:
    """Write reference | drawing | generated | true picture for each sample of a batch (as `Source.validation`).

    Returns figures by the recogniser that scores, on the evaluation's scale: 0 for strangers, 1 for the true pictures;
    none where the pipeline has no such recogniser.
    """
    moved = {key: value.to(stage.device) if isinstance(value, Tensor) else value for key, value in batch.items()}
    images = portraits(stage, stage.conditions(moved), batch["captions"], batch["pixels"].shape[-2:])
    true = batch["pixels"].permute(0, 2, 3, 1).numpy()
    drawings = batch["control"].permute(0, 2, 3, 1).numpy()
    height = true.shape[1]
    rows = []
    for crop, *pictures in zip(batch["crops"][:, 0].numpy(), drawings, images, true, strict=True):
        rows.append(np.hstack([cv2.resize(crop, (height, height), interpolation=cv2.INTER_AREA), *pictures]))
    cv2.imwrite(str(path), cv2.cvtColor(np.vstack(rows), cv2.COLOR_RGB2BGR))
    return figures(stage.pipe, images, true, batch) if stage.pipe.scorer is not None else {}


def portraits(
    stage: PortraitStage, given: Conditions, captions: Sequence[str], size: tuple[int, int]
) -> list[np.ndarray]:
    """RGB uint8 (H, W, 3) for each row of the conditions, one at a time: as large as training leaves room for."""
    pipe, (height, width) = stage.pipe, size
    stock = StableDiffusionXLPipeline(
        pipe.vae, pipe.text_encoder, pipe.text_encoder_2, pipe.tokenizer, pipe.tokenizer_2, pipe.unet,
        type(pipe.scheduler).from_config(pipe.scheduler.config), add_watermarker=False,
        force_zeros_for_empty_prompt=pipe.config.force_zeros_for_empty_prompt,
    )  # fmt: skip
    stock.set_progress_bar_config(disable=True)
    images = []
    for row, caption in enumerate(captions):
        alone = given.rows(slice(row, row + 1))
        with stage.attached(pipe.unet, alone, parts=lambda: parts_of(stock)):
            latents = stock(
                caption, height=height, width=width, num_inference_steps=pipe.settings.steps,
                guidance_scale=pipe.settings.guidance, generator=torch.Generator().manual_seed(row),
                output_type="latent",
            ).images  # fmt: skip
        with torch.autocast(stage.device.type, enabled=False):
            decoded = pipe.vae.decode(unscale(pipe.vae, latents.float()).to(pipe.vae.dtype)).sample[0].float()
        images.append(decoded.clamp(-1, 1).add(1).mul(127.5).round().byte().permute(1, 2, 0).cpu().numpy())
    return images


def figures(pipe: Any, images: Sequence[np.ndarray], true: np.ndarray, batch: Batch) -> dict[str, float]:
    """Of generated and true pictures, each against the batch's references: mean cosines and retention."""
    scorer = pipe.scorer
    faces = batch["reference_faces"][:, 0].numpy()
    references = np.stack([scorer.embed(face, arcface_dst) for face in faces])  # they are aligned already
    made = []
    for image in images:
        try:
            made.append(scorer.embed(image, pipe.face_analyser.analyse(image).keypoints))
        except InputError:  # no face: a cosine of 0, as in the evaluation
            made.append(np.zeros_like(references[0]))
    points = batch["keypoints"].numpy()
    real = np.stack([scorer.embed(picture, p) for picture, p in zip(true, points, strict=True)])
    people = np.array([key.rsplit("_", 1)[0] for key in batch["keys"]])
    apart = people[:, None] != people[None]
    likeness = cosines(np.stack(made), references).diagonal()
    ceiling = cosines(real, references).diagonal()
    found = {
        "val_identity": float(likeness.mean()),
        "val_identity_true": float(ceiling.mean()),
        "val_found": float(np.mean([np.any(e) for e in made])),
    }
    if apart.any():
        strangers = float(cosines(references, references)[apart].mean())
        found |= {"val_strangers": strangers, "val_retention": retention(likeness, ceiling, strangers)}
    return found

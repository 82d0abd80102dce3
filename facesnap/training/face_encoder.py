"""The mini's face encoder: a small CLIP that learns from face crops and their rich captions.

The picture side becomes `face_encoder` (its penultimate hidden states are the mixer's detailed features), the text side
starts the second text encoder. It never sees an identity label and shares nothing with the recognisers. `probes` asks
what the features know, by linear classifiers; `python -m facesnap.evaluation probes` asks it of people nobody has seen.
"""

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
)

from facesnap.evaluation.metrics import linear_probe
from facesnap.faces import box_around, square_crop
from facesnap.pipeline import face_pixels

from .data import People
from .text import token_ids
from .trainer import Batch, Stage

CROP = 120  # stored side of the crops; training cuts the encoder's 112 out of it


def make_face_encoder(width: int = 192, layers: int = 6, projection: int = 128) -> CLIPVisionModelWithProjection:
    """A ViT of 7 x 7 patches and a class token on 112² crops."""
    return CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers, num_attention_heads=width // 32,
            image_size=112, patch_size=16, projection_dim=projection, hidden_act="gelu",
        )
    )  # fmt: skip


class FaceEncoderStage(Stage):
    """Contrastive learning (CLIP, arXiv 2103.00020): a crop should find its own caption among the batch's.

    `crops` are (N, 224, 224, 3) uint8 as `faces.Face.crop`; batches hold N different people, since two pictures of
    one person have captions that are both right.
    """

    def __init__(
        self,
        encoder: CLIPVisionModelWithProjection,
        text: CLIPTextModelWithProjection,
        tokenizer: CLIPTokenizer,
        people: People,
        crops: np.ndarray,
        *,
        batch_size: int = 96,
    ) -> None:
        self.encoder, self.text = encoder, text
        self.scale = nn.ParameterDict({"log": nn.Parameter(torch.tensor(math.log(10.0)))})
        self.ids = token_ids(tokenizer, people.rich)
        self.crops = crops
        self.groups = list(people.by_person().values())
        self.batch_size = min(batch_size, len(self.groups))

    def modules(self) -> dict[str, nn.Module]:
        return {"face_encoder": self.encoder, "text_encoder_2": self.text, "scale": self.scale}

    def batch(self, rng: np.random.Generator) -> Batch:
        chosen = rng.choice(len(self.groups), self.batch_size, replace=False)
        rows = np.array([rng.choice(self.groups[i]) for i in chosen])
        images = np.stack([jitter(self.crops[row], rng) for row in rows])
        return {"pixels": face_pixels(images, self.encoder.config.image_size), "ids": self.ids[rows]}

    def loss(self, batch: Batch, step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        image = F.normalize(self.encoder(batch["pixels"]).image_embeds.float(), dim=-1)
        text = F.normalize(self.text(batch["ids"]).text_embeds.float(), dim=-1)
        logits = image @ text.T * self.scale["log"].clamp(max=math.log(100.0)).exp()
        own = torch.arange(len(logits), device=logits.device)
        loss = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
        return loss, {"accuracy": (logits.argmax(1) == own).float().mean()}


def jitter(crop: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A face crop as another detector or camera might have given it: shifted, mirrored, brighter or darker."""
    size = crop.shape[0]
    side = int(rng.uniform(0.86, 1.0) * size)
    y, x = rng.integers(0, size - side + 1, 2)
    view = crop[y : y + side, x : x + side]
    if rng.random() < 0.5:
        view = view[:, ::-1]
    rows = np.linspace(0, side - 1, CROP).round().astype(int)
    view = view[rows][:, rows].astype(np.float32) * rng.uniform(0.8, 1.2) + rng.normal(0, 6)
    return np.clip(view, 0, 255).astype(np.uint8)


def crops_of(people: People, rows: np.ndarray | None = None) -> np.ndarray:
    """(N, 224, 224, 3) crops around the box that the exact landmarks span, extended over the forehead.

    Only the encoder itself is trained on these, jittered; everything after it uses the crops of `faces.py`.
    """
    rows = np.arange(len(people)) if rows is None else rows
    out = np.empty((len(rows), 224, 224, 3), np.uint8)
    for i, row in enumerate(rows):
        out[i] = square_crop(people.images[int(row)], box_around(people.landmarks[row]))
    return out


@torch.no_grad()
def features_of(encoder: nn.Module, crops: np.ndarray, batch_size: int = 64) -> Tensor:
    """Penultimate hidden states (N, P, C) of crops (N, h, w, 3) uint8, float32."""
    out = []
    for start in range(0, len(crops), batch_size):
        pixels = face_pixels(crops[start : start + batch_size], encoder.config.image_size)
        out.append(encoder(pixels, output_hidden_states=True).hidden_states[-2].float())
    return torch.cat(out)


def probes(features: Tensor, people: People, rows: np.ndarray) -> dict[str, dict[str, float]]:
    """Linear probes for eyes, hair and beard from `features` (N, P, C) of `rows`, on the last third of the people.

    Those people are unknown to the probes, not to the encoder: a quick look. The evaluation asks strangers.
    """
    person = people.person[rows]
    held = np.isin(person, np.unique(person)[-len(np.unique(person)) // 3 :])
    x = features.flatten(1).double().numpy()
    names = ("eyes", "hair", "beard")
    return {name: linear_probe(x, [people.attributes[row][name] for row in rows], held) for name in names}


def save_face_encoder(encoder: CLIPVisionModelWithProjection, folder: Path) -> None:
    """Save the picture side alone, as the `CLIPVisionModel` that the pipeline loads."""
    model = CLIPVisionModel(encoder.config)
    own = "vision_model."
    kept = {k.removeprefix(own): v for k, v in encoder.state_dict().items() if k.startswith(own)}
    model.load_state_dict(kept)
    model.save_pretrained(folder)

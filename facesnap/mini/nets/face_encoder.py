"""The mini's face encoder: a small CLIP that learns from face crops and their rich captions.

The picture side becomes `face_encoder` (its penultimate hidden states are the mixer's detailed features), the text side
starts the second text encoder. It never sees an identity label and shares nothing with the recognisers. `probes` asks
what the features know, by linear classifiers; `python -m facesnap.evaluation probes` asks it of people nobody has seen.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import cv2
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

from facesnap.clip import face_pixels
from facesnap.faces import box_around
from facesnap.geometry import square_crop, warp
from facesnap.metrics import linear_probe
from facesnap.mini import augment as views
from facesnap.mini.backgrounds import Backgrounds
from facesnap.mini.nets.tokenizer import token_ids
from facesnap.synthetic.dataset import People
from facesnap.training.trainer import Batch, Stage

SIDE = 112  # of the encoder's picture


def make_face_encoder(width: int = 192, layers: int = 6, projection: int = 128) -> CLIPVisionModelWithProjection:
    """A ViT of 7 x 7 patches and a class token on 112² crops."""
    return CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers, num_attention_heads=width // 32,
            image_size=SIDE, patch_size=16, projection_dim=projection, hidden_act="gelu",
        )
    )  # fmt: skip


class FaceEncoderStage(Stage):
    """A crop should find its own caption among the batch's (CLIP, arXiv 2103.00020) and name its words.

    Contrast alone learns what tells most captions apart, clothes and backgrounds, and reads an eye's colour late.
    Naming the words (Joulin et al., arXiv 1511.02251) asks for every one of them, and asks it of the very hidden states
    that the mixer reads. `crops` (N, 224, 224, 3) uint8 are as `faces.Face.crop`, `labels` (N, 224, 224) their masks.
    Batches hold N different people, since two pictures of one person have captions that are both right.
    """

    def __init__(
        self,
        encoder: CLIPVisionModelWithProjection,
        text: CLIPTextModelWithProjection,
        tokenizer: CLIPTokenizer,
        people: People,
        crops: np.ndarray,
        labels: np.ndarray,
        *,
        batch_size: int = 96,
    ) -> None:
        self.encoder, self.text = encoder, text
        self.scale = nn.ParameterDict({"log": nn.Parameter(torch.tensor(math.log(10.0)))})
        self.ids = token_ids(tokenizer, people.rich)
        self.words, self.named = named_words(people.rich)
        self.naming = make_naming(encoder, len(self.words))
        self.crops, self.labels = crops, labels
        self.groups = list(people.by_person().values())
        self.batch_size = min(batch_size, len(self.groups))
        self.backgrounds = Backgrounds(np.random.default_rng(0), SIDE, people.images)

    def modules(self) -> dict[str, nn.Module]:
        return {"face_encoder": self.encoder, "text_encoder_2": self.text, "scale": self.scale, "naming": self.naming}

    def batch(self, rng: np.random.Generator) -> Batch:
        chosen = rng.choice(len(self.groups), self.batch_size, replace=False)
        rows = np.array([rng.choice(self.groups[i]) for i in chosen])
        images = np.stack([view(self.crops[row], self.labels[row], self.backgrounds, rng) for row in rows])
        named = torch.from_numpy(self.named[rows])
        return {"pixels": face_pixels(images, SIDE), "ids": self.ids[rows], "named": named}

    def loss(self, batch: Batch, step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        seen = self.encoder(batch["pixels"], output_hidden_states=True)
        image = F.normalize(seen.image_embeds.float(), dim=-1)
        text = F.normalize(self.text(batch["ids"]).text_embeds.float(), dim=-1)
        logits = image @ text.T * self.scale["log"].clamp(max=math.log(100.0)).exp()
        own = torch.arange(len(logits), device=logits.device)
        contrast = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
        words = misnamed(self.naming, summary(seen.hidden_states[-2]), batch["named"])
        logs = {"accuracy": (logits.argmax(1) == own).float().mean(), "words": words}
        return contrast + 0.2 * words, logs


def make_naming(encoder: nn.Module, words: int) -> nn.Sequential:
    """What names `words` words from a `summary` of the encoder's states."""
    width = 2 * encoder.config.hidden_size
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, words))


def summary(states: Tensor) -> Tensor:
    """The class token and the mean patch (N, 2·C) of hidden states (N, 1 + P, C): what no shift of a crop changes."""
    return torch.cat([states[:, 0], states[:, 1:].mean(1)], -1)


def misnamed(naming: nn.Module, summaries: Tensor, named: Tensor) -> Tensor:
    """The mean picture's nats over all its words; named (N, K) bool."""
    words = naming(summaries).float()
    return F.binary_cross_entropy_with_logits(words, named.float(), reduction="none").sum(1).mean()


def named_words(captions: Sequence[str], least: float = 0.004) -> tuple[list[str], np.ndarray]:
    """The words, and pairs of neighbouring words, that describe the person in at least the share `least` of the rich
    captions, and which caption has which (N, K) bool.

    Pairs, since "blue" alone may be eyes or hair; only the first part, since a view may lie over another background.
    """
    told = []
    for caption in captions:
        phrases = [phrase.split() for phrase in re.split(" with | and ", caption.split(",")[0])]
        pairs = {" ".join(pair) for words in phrases for pair in zip(words, words[1:], strict=False)}
        told.append(pairs.union(*phrases))
    counts = Counter(words for own in told for words in own)
    kept = sorted(words for words, count in counts.items() if least * len(captions) <= count < len(captions))
    return kept, np.array([[words in own for words in kept] for own in told])


def view(
    crop: np.ndarray,
    labels: np.ndarray,
    backgrounds: Backgrounds,
    rng: np.random.Generator,
    *,
    mirror: bool = True,
) -> np.ndarray:
    """A face crop as another detector and camera might have given it (112, 112, 3): moved, scaled, a photograph, and
    with `mirror` half of the time mirrored."""
    size = len(crop)
    scale = SIDE / size * np.exp(rng.uniform(-0.25, 0.25))
    room = max(size * scale - SIDE, 0) / 2
    target = SIDE / 2 + rng.uniform(-1, 1, 2) * (room + 0.08 * SIDE)
    matrix = views.around((size / 2, size / 2), rng.normal() * 0.3, scale, target)
    picture = warp(crop, matrix, SIDE, borderMode=cv2.BORDER_REPLICATE)
    if rng.random() < 0.8:
        kinds = cv2.warpAffine(labels, matrix, (SIDE, SIDE), flags=cv2.INTER_NEAREST, borderMode=cv2.BORDER_REPLICATE)
        picture = views.as_photograph(picture, kinds, backgrounds, rng)
    if rng.random() < 0.5:  # a picture that ends near the face, most often below, as `geometry.square_crop` extends it
        top, bottom, left, right = (rng.uniform(0, (0.12, 0.35, 0.16, 0.16)) * SIDE).astype(int)
        kept = picture[top : SIDE - bottom, left : SIDE - right]
        picture = cv2.copyMakeBorder(kept, top, bottom, left, right, cv2.BORDER_REPLICATE)
    if mirror and rng.random() < 0.5:
        picture = picture[:, ::-1]
    return np.ascontiguousarray(picture)


def crops_of(people: People, rows: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Crops (N, 224, 224, 3) around the box that the exact landmarks span, extended over the forehead, and their
    labels (N, 224, 224), of all pictures or of some `rows`.

    Only the encoder itself is trained on these, changed by `view`; everything after it uses the crops of `faces.py`.
    """
    rows = np.arange(len(people)) if rows is None else rows
    crops, labels = np.empty((len(rows), 224, 224, 3), np.uint8), np.empty((len(rows), 224, 224), np.uint8)
    for i, row in enumerate(rows):
        box = box_around(people.landmarks[row])
        crops[i] = square_crop(people.images[int(row)], box)
        labels[i] = square_crop(people.masks[int(row)], box, nearest=True)
    return crops, labels


@torch.no_grad()
def features_of(encoder: nn.Module, crops: np.ndarray, rows: np.ndarray | None = None, batch_size: int = 64) -> Tensor:
    """Penultimate hidden states (N, P, C) of crops (N, h, w, 3) uint8, or of some rows of them, float32."""
    out = []
    rows = np.arange(len(crops)) if rows is None else rows
    for start in range(0, len(rows), batch_size):
        pixels = face_pixels(np.array(crops[rows[start : start + batch_size]]), encoder.config.image_size)
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

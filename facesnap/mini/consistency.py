"""Consistency: what face encoder and mixer say of a photograph becomes what they say of the render behind it.

A photograph differs from a render in texture, light, clothes, background and sharpness, and in where the detector puts
its box. None of that is the person, so none of it should reach the face tokens. The diffusion stages teach this too,
but through the noise of a whole picture's loss. Here the tokens themselves are compared: a frozen copy of encoder and
mixer (the teacher) reads the render as it is, the two that learn read it as another camera might have taken it, and
their tokens shall agree (distillation between clean and changed inputs, as in noisy student, arXiv 1911.04252). The
tokens keep their meaning, so FFRNet and the base have nothing to learn anew.
"""

import copy
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPVisionModel

from facesnap.clip import face_pixels
from facesnap.faces import Recogniser
from facesnap.mini import augment as views
from facesnap.mini.backgrounds import Backgrounds
from facesnap.mini.nets.face_encoder import SIDE, make_naming, misnamed, named_words, summary, view
from facesnap.mixer import FacialAttributeMixer
from facesnap.synthetic.dataset import People, draw_references
from facesnap.training.trainer import Batch, Stage

CLAIMED = ("hair", "haircut", "beard")
HELD_OUT = 50  # every so many-th person is not learned from
LOOKS = 3  # embeddings of each picture: the render's own, then some of photographs


class ConsistencyStage(Stage):
    """`rows` are the pictures that may be references, `crops` and `labels` theirs (`face_encoder.crops_of`), `looks`
    their embeddings (`embeddings_of`).

    On photographs the recogniser errs more than the face encoder, about hair and beard most of all, and where they
    disagree the mixer is to believe the encoder. So the teacher has the right embedding, and of the references that the
    mixer learns from the share `strangers` comes with somebody else's, and the share `claims` with one that is moved to
    where embeddings of other hair and beards lie.
    """

    def __init__(
        self,
        encoder: CLIPVisionModel,
        mixer: FacialAttributeMixer,
        people: People,
        rows: np.ndarray,
        crops: np.ndarray,
        labels: np.ndarray,
        looks: np.ndarray,
        *,
        batch_size: int = 64,
        strangers: float = 0.5,
        claims: float = 0.6,
    ) -> None:
        self.encoder, self.mixer = encoder, mixer
        self.teachers = tuple(copy.deepcopy(part).eval().requires_grad_(False) for part in (encoder, mixer))
        self.crops, self.labels, self.looks = crops, labels, looks
        words, self.named = named_words([people.rich[row] for row in rows])
        self.naming = make_naming(encoder, len(words))
        nn.init.zeros_(self.naming[-1].weight)  # until it has learned, it has nothing to say to the encoder
        person = people.person[rows]
        groups = [np.flatnonzero(person == one) for one in np.unique(person)]
        self.held_out, self.groups = groups[::HELD_OUT], [g for i, g in enumerate(groups) if i % HELD_OUT]
        self.batch_size, self.strangers, self.claims = batch_size, strangers, claims
        self.values = []  # of each of CLAIMED: which a picture has (N,), and the mean embedding of each (K, 512)
        for name in CLAIMED:
            codes = np.unique([people.attributes[row][name] for row in rows], return_inverse=True)[1]
            self.values.append((codes, np.stack([looks[codes == k, 0].mean(0) for k in range(codes.max() + 1)])))
        self.backgrounds = Backgrounds(np.random.default_rng(0), SIDE, people.images)

    def modules(self) -> dict[str, nn.Module]:
        return {"face_encoder": self.encoder, "mixer": self.mixer, "naming": self.naming}

    def batch(self, rng: np.random.Generator) -> Batch:
        return self.references(rng, self.groups)

    def references(self, rng: np.random.Generator, groups: list[np.ndarray]) -> Batch:
        """As many people as make `batch_size` references, of 1 to 4 pictures each, out of `groups` of rows."""
        most = int(rng.choice([1, 2, 3, 4], p=[0.7, 0.15, 0.1, 0.05]))
        count = min(max(1, self.batch_size // most), len(groups))
        people = rng.choice(len(groups), count, replace=False)
        chosen, mask = draw_references(rng, (groups[person] for person in people), most)
        flat = chosen.ravel()
        render, photo = [], []
        for row in flat:
            way = int(rng.choice((-1, 1)))  # mirrored or not, the same for both
            crop, labels = np.ascontiguousarray(self.crops[row][:, ::way]), self.labels[row][:, ::way]
            render.append(crop)
            photo.append(view(crop, np.ascontiguousarray(labels), self.backgrounds, rng, mirror=False))
        told = self.looks[flat, rng.integers(self.looks.shape[1], size=len(flat))]
        wrong = rng.random(len(flat)) < self.strangers
        told[wrong] = self.looks[rng.integers(len(self.looks), size=int(wrong.sum())), 0]
        claimed = (rng.random(len(flat)) < self.claims) * rng.uniform(0.5, 1.5, len(flat))
        for codes, means in self.values:
            others = rng.integers(len(means), size=len(flat))
            told += (claimed[:, None] * (means[others] - means[codes[flat]])).astype(np.float32)
        return {
            "render": face_pixels(np.stack(render), SIDE),
            "photo": face_pixels(np.stack(photo), SIDE),
            "right": torch.from_numpy(self.looks[flat, 0]).unflatten(0, chosen.shape),
            "told": torch.from_numpy(told).unflatten(0, chosen.shape),
            "named": torch.from_numpy(self.named[flat]).unflatten(0, chosen.shape),
            "mask": torch.from_numpy(mask),
        }

    def loss(self, batch: Batch, step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        mask = batch["mask"]
        encoder, mixer = (teacher.to(mask.device) for teacher in self.teachers)
        with torch.no_grad():
            render = states_of(encoder, batch["render"], mask)
            wanted = mixer(batch["right"], render, mask)
        photo = states_of(self.encoder, batch["photo"], mask)
        # Each learns from its own fault. The encoder: what the teacher's mixer makes of its states beside the teacher's
        # own embedding, and which of the rich caption's words they name. The mixer: what it makes of them beside
        # whatever embedding it is told. A face encoder that learned from a recogniser would make the paper's Table 2
        # meaningless.
        summed = summary(photo[mask])
        seen = mixer(batch["right"], photo, mask)
        told = self.mixer(batch["told"], photo.detach(), mask)
        logs = {
            "states": unexplained(summed, summary(render[mask])),
            "words": misnamed(self.naming, summed, batch["named"][mask]),
            "seen": unexplained(seen.tokens, wanted.tokens) + 0.2 * unexplained(seen.pooled, wanted.pooled),
            "told": unexplained(told.tokens, wanted.tokens) + 0.2 * unexplained(told.pooled, wanted.pooled),
        }
        return 0.5 * logs["states"] + 0.02 * logs["words"] + logs["seen"] + logs["told"], logs

    @torch.no_grad()
    def sample_sheet(self, path: Path) -> dict[str, float]:
        """No picture: what is left unexplained of people who are not learned from."""
        batch = self.references(np.random.default_rng(0), self.held_out)
        device = next(self.mixer.parameters()).device
        batch = {key: value.to(device) for key, value in batch.items()}
        logs = self.loss(batch, 0, torch.Generator())[1]
        return {f"held_out_{key}": float(value) for key, value in logs.items()}


def states_of(encoder: nn.Module, pixels: Tensor, mask: Tensor) -> Tensor:
    """Penultimate hidden states (B, R, P, C) float32 of crops (B·R, 3, h, w); mask (B, R)."""
    return encoder(pixels, output_hidden_states=True).hidden_states[-2].float().unflatten(0, mask.shape)


def unexplained(values: Tensor, wanted: Tensor) -> Tensor:
    """The share of the batch's variance in `wanted` (B, …) that `values` miss: 0 says the same of everyone, 1 is no
    better than the mean."""
    values, wanted = values.float(), wanted.float()
    spread = (wanted - wanted.mean(0)).square().mean()
    return (values - wanted).square().mean() / spread.clamp(min=1e-6)


def embeddings_of(recogniser: Recogniser, faces: views.FaceSet, rows: np.ndarray, looks: int = LOOKS) -> np.ndarray:
    """(N, looks, 512) float32, raw: of each picture as rendered, then as photographs with a detector's errors."""
    backgrounds = Backgrounds(np.random.default_rng(0), SIDE, faces.images)
    out = np.empty((len(rows), looks, 512), np.float32)
    for i, row in enumerate(tqdm(rows, unit="picture")):
        rng = np.random.default_rng((2, int(row)))
        crops = [views.aligned_view(faces, int(row), rng, jitter=0.0)]
        crops += [views.aligned_view(faces, int(row), rng, backgrounds=backgrounds) for _ in range(looks - 1)]
        out[i] = recogniser.embed_crops(crops)
    return out

"""Rendered people as a source of samples whose latents and face features were computed beforehand (features.py)."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from facesnap.faces import five_points
from facesnap.ffrnet import FFRNet
from facesnap.landmarks import draw, to_68
from facesnap.mini.features import Features, head_masks
from facesnap.pipeline import FaceSnapPipeline
from facesnap.synthetic.dataset import People, draw_references
from facesnap.training.prefetch import Batch, prefetched


@dataclass(frozen=True)
class KeptConfig:
    """How batches are drawn. Shares lie in [0, 1].

    strangers: of the references, how many have somebody else's embedding. On photographs a recogniser of rendered
    people errs more than the face encoder does, and the mixer learns to doubt it where the two disagree.
    glasses: how many times as often a picture with glasses is drawn: so thin, they are learned last.
    photographed: how many are changed as cameras change them. poor: of all but one of a set, how many are hard to read
    (hidden, blurred, dark), so that a set learns to listen to its best picture.
    """

    batch_size: int = 32
    without_ffrnet: float = 0.0  # samples without FFRNet, most of them with the caption that tells of the face
    drop_text: float = 0.1
    drop_face: float = 0.0
    glasses: float = 2.0
    strangers: float = 0.3
    photographed: float = 0.5
    poor: float = 0.5
    references: tuple[float, ...] = (0.4, 0.2, 0.2, 0.2)  # how often a batch has sets of 1, 2, 3, 4
    fitted: float = 0.5  # drawings that show what the predictor gives at use; the others are exact


@dataclass(frozen=True)
class Looks:
    """What was found of each picture, as rendered or changed: the analyser's features and the face encoder's states."""

    features: Features
    clip: np.ndarray  # (N, P, C) float16


class KeptFeatures:
    """A `portraits.Source` of rendered people.

    latents (N, C, h, w) float16, in the denoiser's units; `looks` of the pictures as they are, `photographed` and
    `poor` of changed ones. controls: of `embed_controls`, or None to draw. phi (N, 512): of `features.phi_of`; targets
    whose prompt asks for a hat, glasses or a drawing are left out of the identity loss: to a recogniser these make
    another person, so that it would take them off and make a photograph of it.
    """

    def __init__(
        self,
        pipe: FaceSnapPipeline,
        people: People,
        latents: np.ndarray,
        looks: Looks,
        config: KeptConfig = KeptConfig(),  # noqa: B008 (frozen)
        *,
        photographed: Looks | None = None,
        poor: Looks | None = None,
        phi: np.ndarray | None = None,
        sheet_rows: int = 8,
    ) -> None:
        self.pipe, self.people, self.config, self.sheet_rows = pipe, people, config, sheet_rows
        self.kept, self.looks, self.photographed, self.poor, self.phi = latents, looks, photographed, poor, phi
        self.controls: np.ndarray | None = None
        self.masks = head_masks(people, latents.shape[-1])
        found = looks.features.found & np.array([style == "photo" for style in people.styles])
        # who can be shown: a target needs another picture of the same person, a photo with a face, as its reference
        self.references: dict[int, np.ndarray] = {}
        for rows in people.by_person().values():
            for row in rows:
                others = rows[found[rows] & (rows != row)]
                if len(others):
                    self.references[int(row)] = others
        self.rows, self.photos = np.array(sorted(self.references)), np.flatnonzero(found)
        often = [config.glasses if people.attributes[row]["glasses"] != "none" else 1.0 for row in self.rows]
        self.share = np.array(often) / sum(often)
        plain = [a["hat"] == "none" and a["glasses"] == "none" for a in people.attributes]
        self.resembles = np.array(plain) & np.isin(people.styles, ("photo", "black and white"))

    # ---- what the stage asks -------------------------------------------------------------------------------

    def batches(self, position: int, seed: int, rank: int, world: int) -> Iterable[Batch]:
        return prefetched(self.batch, position, seed, rank, world)

    def latents(self, batch: Batch) -> Tensor:
        return batch["latents"]

    def faces(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return batch["embeddings"], batch["clip"].float()

    def control(self, batch: Batch) -> Tensor:
        control = batch["control"]
        if control.dtype == torch.uint8:
            return control.float().div(255).contiguous(memory_format=torch.channels_last)
        return control.float()

    def texts(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        device = self.pipe.text_encoder.device
        text, _, pooled, _ = self.pipe.encode_prompt(list(captions), device=device, do_classifier_free_guidance=False)
        return text, pooled

    @cached_property
    def validation(self) -> Batch | None:
        """A picture each of some people, always the same, each with one reference; nothing dropped."""
        people = np.unique(self.people.person[self.rows])
        chosen = people[np.linspace(0, len(people) - 1, self.sheet_rows).astype(int)]
        rows = np.array([self.rows[self.people.person[self.rows] == person][0] for person in chosen])
        first = np.array([[self.references[int(row)][0]] for row in rows])
        nothing = torch.zeros(len(rows), dtype=torch.bool)
        return self.targets(rows, nothing.numpy(), [self.people.prompts[row] for row in rows]) | {
            "embeddings": torch.from_numpy(np.array(self.looks.features.embeddings[first])),
            "clip": torch.from_numpy(np.array(self.looks.clip[first])),
            "reference_mask": ~nothing[:, None],
            "control": torch.stack([self.drawing(row) for row in rows]),
            "drop_text": nothing,
            "drop_face": nothing,
            "pixels": torch.from_numpy(self.people.images[rows]).permute(0, 3, 1, 2),
            "crops": torch.from_numpy(self.people.images[first[:, 0]])[:, None],
        }

    # ---- a batch -------------------------------------------------------------------------------------------

    def batch(self, rng: np.random.Generator) -> Batch:
        config = self.config
        rows = rng.choice(self.rows, config.batch_size, p=self.share)
        most = 1 + int(rng.choice(len(config.references), p=config.references))
        chosen, mask = draw_references(rng, (self.references[int(row)] for row in rows), most)
        embeddings, clip = self.draw_looks(rng, chosen, mask)
        fitted = self.looks.features.found[rows] & (rng.random(len(rows)) < config.fitted)
        bare = rng.random(len(rows)) < config.without_ffrnet
        rich = bare & (rng.random(len(rows)) < 0.7)
        captions = [(self.people.rich if r else self.people.prompts)[row] for row, r in zip(rows, rich, strict=True)]
        if self.controls is not None:
            control = torch.from_numpy(self.controls[fitted.astype(int), rows])
        else:
            control = torch.stack([self.drawing(row, own) for row, own in zip(rows, fitted, strict=True)])
        batch = self.targets(rows, fitted, captions) | {
            "embeddings": torch.from_numpy(embeddings),
            "clip": torch.from_numpy(clip),
            "reference_mask": torch.from_numpy(mask),
            "control": control,
            "drop_text": torch.from_numpy(rng.random(len(rows)) < config.drop_text),
            "drop_face": torch.from_numpy(rng.random(len(rows)) < config.drop_face),
            "resembles": torch.from_numpy(self.resembles[rows]),
        }
        if config.without_ffrnet:
            batch["ffrnet"] = torch.from_numpy(~bare)
        if self.phi is not None:  # the mean of the references' directions
            batch["phi"] = torch.from_numpy((self.phi[chosen] * mask[..., None]).sum(1))
        return batch

    def draw_looks(
        self, rng: np.random.Generator, chosen: np.ndarray, mask: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Embeddings (B, R, 512) and states (B, R, P, C) of references `chosen` (B, R), of which `mask` are there."""
        embeddings, clip = self.looks.features.embeddings[chosen], self.looks.clip[chosen]
        best = rng.integers(mask.sum(1))  # of each set, the reference that stays as it is
        others = mask & (np.arange(mask.shape[1]) != best[:, None])
        for looks, share, which in (
            (self.photographed, self.config.photographed, mask),
            (self.poor, self.config.poor, others),
        ):
            drawn = which & (rng.random(chosen.shape) < share)
            if looks is not None:
                drawn &= looks.features.found[chosen]
                embeddings[drawn] = looks.features.embeddings[chosen[drawn]]
                clip[drawn] = looks.clip[chosen[drawn]]
        wrong = rng.random(chosen.shape) < self.config.strangers
        embeddings[wrong] = self.looks.features.embeddings[rng.choice(self.photos, int(wrong.sum()))]
        return embeddings, clip

    def targets(self, rows: np.ndarray, fitted: np.ndarray, captions: list[str]) -> Batch:
        """What a batch holds of the pictures themselves."""
        points = np.stack([self.points(row, own) for row, own in zip(rows, fitted, strict=True)]).astype(np.float32)
        height, width = self.people.size
        return {
            "latents": torch.from_numpy(self.kept[rows]).float(),
            "mask": torch.from_numpy(self.masks[rows]).float(),
            "captions": captions,
            "landmarks": torch.from_numpy(points),
            "keypoints": torch.from_numpy(five_points(to_68(points))),
            "time_ids": torch.tensor([height, width, 0, 0, height, width], dtype=torch.float32).repeat(len(rows), 1),
            "keys": [f"{self.people.person[row]:07d}_{self.people.index[row]:02d}" for row in rows],
        }

    def points(self, row: int, fitted: bool = False) -> np.ndarray:
        """The 72 landmarks (72, 2), exact or as the predictor gives them, in pixels."""
        return (self.looks.features.fitted if fitted else self.people.landmarks)[row]

    def drawing(self, row: int, fitted: bool = False) -> Tensor:
        """(3, H, W) uint8."""
        return torch.from_numpy(draw(self.points(row, fitted), self.people.size)).permute(2, 0, 1)

    @torch.no_grad()
    def embed_controls(self, ffrnet: FFRNet) -> np.ndarray:
        """(2, N, C, h, w) float16: FFRNet's embedding of every picture's exact drawing and of its fitted one. With them
        in `controls` a step costs half, and the embedding must stay as it is."""
        embedding = ffrnet.controlnet_cond_embedding
        device = next(embedding.parameters()).device
        out = []
        for fitted in (False, True):
            for start in tqdm(range(0, len(self.people), 32), unit="batch"):
                rows = range(start, min(start + 32, len(self.people)))
                # a picture without a face has no fitted points, and never asks for them
                drawings = [self.drawing(row, fitted and bool(self.looks.features.found[row])) for row in rows]
                with torch.autocast(device.type, torch.bfloat16):
                    pixels = self.control({"control": torch.stack(drawings).to(device)})
                    out.append(embedding(pixels).half().cpu().numpy())
        return np.concatenate(out).reshape(2, len(self.people), *out[0].shape[1:])

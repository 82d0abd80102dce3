"""The mini's recognisers A and B: 112² crop → 512, CosFace (Wang et al., 2018). A conditions, B is φ of the identity
loss; C, which scores, is in judge.py."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from facesnap.mini import augment as views
from facesnap.mini.augment import FaceSet
from facesnap.mini.backgrounds import Backgrounds
from facesnap.mini.nets.common import NetStage, split, to_input, to_onnx, train
from facesnap.training.trainer import Batch

MARGIN, MARGIN_STEPS = 0.3, 400  # CosFace's, and the steps in which it grows to that


class IRBlock(nn.Module):
    """The block of ArcFace's IResNet: BN, conv, BN, rectifier, conv (which strides), BN, around a shortcut.

    Leaky instead of parametric rectifiers: on a CPU the latter take a third of the time."""

    def __init__(self, inner: int, outer: int, stride: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.BatchNorm2d(inner),
            nn.Conv2d(inner, outer, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outer),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(outer, outer, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outer),
        )
        same = inner == outer and stride == 1
        self.shortcut = (
            nn.Identity()
            if same
            else nn.Sequential(nn.Conv2d(inner, outer, 1, stride, bias=False), nn.BatchNorm2d(outer))
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + self.shortcut(x)


class RecogniserNet(nn.Module):
    """Aligned crops (B, 3, 112, 112), (x − 127.5) / 127.5 → embeddings (B, 512), not normalised.

    In evaluation mode the embedding is the mean of the crop's and of its mirror image's.

    While it trains it also holds a prototype of every person and a head that reads the renderer's parameters
    off the last features: learning what a face *is* teaches it faster than telling faces apart does. Neither
    is exported."""

    def __init__(
        self,
        widths: tuple[int, ...] = (24, 32, 64, 96, 128),
        depths: tuple[int, ...] = (1, 2, 2, 2),
        *,
        embedding: int = 512,
        identities: Tensor | None = None,
    ):
        """identities (people, P): each person's standardised parameters; None for a net that does not
        train."""
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, widths[0], 3, 2, 1, bias=False),
            nn.BatchNorm2d(widths[0]),
            nn.LeakyReLU(0.2, inplace=True),
        )
        blocks: list[nn.Module] = []
        for inner, outer, depth in zip(widths[:-1], widths[1:], depths, strict=True):
            blocks += [IRBlock(inner if k == 0 else outer, outer, 2 if k == 0 else 1) for k in range(depth)]
        self.body = nn.Sequential(*blocks, nn.BatchNorm2d(widths[-1]), nn.Flatten())
        self.embed = nn.Sequential(
            nn.Linear(widths[-1] * 16, embedding, bias=False), nn.BatchNorm1d(embedding, affine=False)
        )
        if identities is not None:
            self.register_buffer("identities", identities, persistent=False)
            self.prototypes = Prototypes(identities.shape[1], embedding)
            self.regress = nn.Linear(widths[-1] * 16, identities.shape[1])

    def forward(self, crops: Tensor) -> Tensor:
        if self.training:
            return self.embed(self.body(self.stem(crops))).float()
        both = torch.cat([crops, crops.flip(3)])
        one, mirrored = self.embed(self.body(self.stem(both))).float().chunk(2)
        return (one + mirrored) / 2

    def loss(self, crops: Tensor, person: Tensor, margin: float = MARGIN) -> dict[str, Tensor]:
        """CosFace with scale 30, and the parameters' regression; person (B,) indexes `identities`."""
        features = self.body(self.stem(crops))
        prototypes = self.prototypes(self.identities).float()
        cosine = F.normalize(self.embed(features).float()) @ F.normalize(prototypes).T
        target = F.one_hot(person, len(prototypes))
        return {
            "id": F.cross_entropy(30 * (cosine - margin * target), person),
            "parameters": 4 * F.smooth_l1_loss(self.regress(features).float(), self.identities[person]),
        }


class Prototypes(nn.Module):
    """Where on the sphere a person with given parameters (…, P) belongs: a random projection to begin with,
    so that who looks alike is close from the first step, which makes learning many times faster.

    Prototypes that are free to move remember the people of the training set; a map that all people share must
    learn which parameters show in a picture, and holds for people never seen."""

    def __init__(self, parameters: int, embedding: int, hidden: int = 256):
        super().__init__()
        self.project = nn.Linear(parameters, embedding, bias=False)
        self.bend = nn.Sequential(nn.Linear(parameters, hidden), nn.ReLU(), nn.Linear(hidden, embedding))
        nn.init.normal_(self.project.weight, std=parameters**-0.5)
        nn.init.zeros_(self.bend[-1].weight)
        nn.init.zeros_(self.bend[-1].bias)

    def forward(self, identities: Tensor) -> Tensor:
        return self.project(identities) + self.bend(identities)


# Widths and depths differ on purpose: what teaches must not share the blind spots of what conditions.
RECOGNISERS: dict[str, dict[str, Any]] = {
    "A": {"widths": (24, 32, 64, 96, 128), "depths": (1, 2, 2, 2)},
    "B": {"widths": (20, 32, 56, 96, 120), "depths": (1, 1, 2, 2)},
}


class RecogniserStage(NetStage):
    """CosFace's margin grows over the first steps."""

    def loss(self, batch: Batch, step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        return super().loss(batch | {"margin": MARGIN * min(1.0, step / MARGIN_STEPS)}, step, generator)


def train_recogniser(
    variant: str,
    faces: FaceSet,
    out: Path,
    minutes: float,
    *,
    batch_size: int = 96,
    sizes: dict | None = None,
    **options,
) -> RecogniserNet:
    """Train recogniser "A" or "B" on aligned crops and write `out/recogniser_VARIANT.onnx`.

    sizes: `widths` and `depths` in place of the variant's own; options: of `TrainerConfig`."""
    seed = 20 + ord(variant)
    torch.manual_seed(seed)
    training, held_out = split(faces)
    # A meets photographs at use; B sees nothing but renders and portraits
    backgrounds = Backgrounds(np.random.default_rng(seed), 112, faces.images) if variant == "A" else None
    first = training[np.unique(faces.person[training], return_index=True)[1]]
    known = faces.parameters[first][:, faces.is_identity]
    known = known[:, known.std(0) > 1e-6]
    identities = np.clip((known - known.mean(0)) / known.std(0), -2.5, 2.5).astype(np.float32)

    def draw(rng: np.random.Generator) -> Batch:
        chosen = rng.choice(training, batch_size)
        crops = np.stack([views.aligned_view(faces, index, rng, backgrounds=backgrounds) for index in chosen])
        mirrored = rng.random(batch_size) < 0.5
        crops[mirrored] = crops[mirrored, :, ::-1]
        return {"crops": to_input(crops, 127.5), "person": torch.from_numpy(faces.person[chosen])}

    def measure(net: nn.Module) -> dict[str, float]:
        return measure_recogniser(net, faces, held_out)

    net = RecogniserNet(**sizes or RECOGNISERS[variant], identities=torch.from_numpy(identities))
    train(RecogniserStage(f"recogniser_{variant}", net, draw, measure), out, minutes=minutes, seed=seed, **options)
    export_recogniser(net, out / f"recogniser_{variant}.onnx")
    return net


@torch.no_grad()
def measure_recogniser(net: nn.Module, faces: FaceSet, held_out: np.ndarray) -> dict[str, float]:
    """`recogniser_figures` of the first thousand pictures of people whom the net has not met."""
    place = next(net.parameters()).device
    rng = np.random.default_rng(5)
    chosen = held_out[:1000]
    crops = [views.aligned_view(faces, index, rng, jitter=0) for index in chosen]
    parts = [net(to_input(np.stack(crops[k : k + 50]), 127.5).to(place)) for k in range(0, len(crops), 50)]
    return recogniser_figures(torch.cat(parts).cpu().numpy(), faces.person[chosen])


def recogniser_figures(embeddings: np.ndarray, person: np.ndarray) -> dict[str, float]:
    """TAR at FAR 1e-3, rank 1, and the mean cosine of the same person and of strangers."""
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    cosine = unit @ unit.T
    pairs = np.triu_indices(len(unit), 1)
    same = (person[:, None] == person[None])[pairs]
    own, other = cosine[pairs][same], cosine[pairs][~same]
    accepted = (own > np.quantile(other, 0.999)).mean()
    np.fill_diagonal(cosine, -2)
    first = (person[cosine.argmax(1)] == person).mean()
    return {"TAR": float(accepted), "rank1": float(first), "same": float(own.mean()), "other": float(other.mean())}


def export_recogniser(net: nn.Module, path: Path) -> None:
    """The embedding alone; the number of crops stays free. Prototypes and regression are left behind."""
    axes = {"input": {0: "crops"}, "embedding": {0: "crops"}}
    to_onnx(net, torch.zeros(1, 3, 112, 112), path, ["embedding"], axes)

"""The attribute scorer's two nets, trained on rendered people whose attributes are known (evaluation/scorer.py reads
them).

They must be right on true renders (>= 0.95), otherwise their verdict on generated pictures means little; the evaluation
prints both.
"""

import json
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from facesnap import landmarks
from facesnap.evaluation.report import rounded, table
from facesnap.evaluation.scorer import VIEWS, Values, starts, visible, whole
from facesnap.faces import align, five_points
from facesnap.metrics import attribute_accuracy
from facesnap.synthetic.dataset import CLOTHES, People
from facesnap.training.trainer import Batch, Stage, Trainer, TrainerConfig

LEAST_CLOTHES = 0.01  # of the picture: a head that fills it leaves them no room
SHARES = {"face": 0.3, "whole": 0.7}  # of the minutes
RECIPE: dict[str, Any] = {"optimiser": "muon", "lr": 3e-3, "betas": (0.9, 0.98), "ema": 0.995, "hold": 0.2}


class Block(nn.Module):
    """Two 3x3 convolutions beside a 1x1 one; halves the picture."""

    def __init__(self, inside: int, out: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inside, out, 3, 2, 1, bias=False),
            nn.BatchNorm2d(out),
            nn.ReLU(),
            nn.Conv2d(out, out, 3, 1, 1, bias=False),
            nn.BatchNorm2d(out),
        )
        self.skip = nn.Conv2d(inside, out, 1, 2, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.body(x) + self.skip(x))


def build_net(attributes: Values, width: int = 18) -> nn.Module:
    """Picture (B, 3, S, S) in [-1, 1], S = 112 or 128 → logits of all values of all attributes, one after the other."""
    sizes = (width, width, 2 * width, 3 * width, 5 * width)
    return nn.Sequential(
        nn.Conv2d(3, width, 5, 2, 2),
        nn.ReLU(),
        *(Block(a, b) for a, b in pairwise(sizes)),
        nn.Conv2d(sizes[-1], 48, 1),
        nn.ReLU(),
        nn.Flatten(),  # of 4x4 places, and not their mean: which side is lit is a matter of place
        nn.Dropout(0.1),
        nn.Linear(48 * 4 * 4, int(starts(attributes)[-1])),
    )


def read(data: People, rows: np.ndarray, view: str) -> np.ndarray:
    """What a view's net sees of the pictures: (N, S, S, 3) uint8."""
    rng = np.random.default_rng(0)
    found = []
    for i in tqdm(rows, desc=f"reading ({view})", unit="picture", mininterval=5):
        image = data.images[int(i)]
        if view == "whole":
            found.append(whole(image))
        else:  # as inexactly aligned as by a landmark net
            points = data.landmarks[i]
            noise = rng.normal(0, 0.03, (5, 2)) * landmarks.eye_distance(points)
            found.append(align(image, five_points(landmarks.to_68(points)) + noise))
    return np.stack(found)


def balance(labels: torch.Tensor, attributes: Values) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels (N, attributes) → chances (N,) of drawing a picture, and what to add to the logits in training (V,).

    Pictures with rare values are drawn more often. What is left of the imbalance must not become a habit: with the
    log frequency added to the logits in training only, the trained logits are those of equal frequencies (Menon et
    al. 2021, "Long-tail learning via logit adjustment").
    """
    shown = [
        nn.functional.one_hot(column + 1, len(values) + 1)[:, 1:].float()
        for column, values in zip(labels.T, attributes.values(), strict=True)
    ]
    rarity = [one_hot @ (1 / (one_hot.sum(0) + 1)) for one_hot in shown]
    chances = torch.stack([r / r.mean() for r in rarity]).mean(0)
    counts = [chances @ one_hot + 1 for one_hot in shown]
    return chances, torch.cat([torch.log(count / count.sum()) for count in counts])


def softened(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Half of the batch loses detail and gains noise, as generated pictures do; all move by a few pixels.
    Never mirrored (the side of the light is a label) and never tinted (so are the colours)."""
    size = images.shape[-1]
    dx, dy = torch.randint(-6, 7, (2,), generator=generator).tolist()
    padded = nn.functional.pad(images, (6, 6, 6, 6), mode="replicate")
    images = padded[:, :, 6 + dy : 6 + dy + size, 6 + dx : 6 + dx + size].clone()
    half = images[::2]
    small = int(torch.randint(size // 2, size, (), generator=generator))
    blurred = nn.functional.interpolate(half, size=small, mode="bilinear", antialias=True)
    blurred = nn.functional.interpolate(blurred, size=size, mode="bilinear")
    noise = torch.randn(half.shape, generator=generator) * 0.06 * torch.rand((), generator=generator)
    images[::2] = blurred + noise
    return images


class ScorerStage(Stage):
    """One view's net learns what its pictures show; rare values are drawn more often (`balance`)."""

    def __init__(self, pictures: np.ndarray, labels: np.ndarray, attributes: Values, batch_size: int = 64):
        self.pictures, self.labels, self.batch_size = torch.from_numpy(pictures), torch.from_numpy(labels), batch_size
        self.net = build_net(attributes).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.chances, self.lean = balance(self.labels, attributes)
        self.parts = list(pairwise(starts(attributes)))

    def modules(self) -> dict[str, nn.Module]:
        return {"net": self.net}

    def batch(self, rng: np.random.Generator) -> Batch:
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        rows = torch.multinomial(self.chances, self.batch_size, generator=generator)
        images = self.pictures[rows].permute(0, 3, 1, 2).float() / 127.5 - 1
        return {"images": softened(images, generator), "labels": self.labels[rows]}

    def loss(self, batch: Batch, step: int, generator: torch.Generator) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        logits = self.net(batch["images"].contiguous(memory_format=torch.channels_last)).float()
        logits, labels = logits + self.lean.to(logits.device), batch["labels"]
        losses = [
            nn.functional.cross_entropy(logits[:, first:last], column, ignore_index=-1)
            for (first, last), column in zip(self.parts, labels.T, strict=True)
            if (column >= 0).any()
        ]
        return torch.stack(losses).sum(), {}


def labels_of(data: People, rows: Iterable[int], attributes: Values) -> np.ndarray:
    """(N, attributes): the index of each value, -1 for what cannot be seen."""
    seen = []
    for i in rows:
        shown = visible(data.attributes[i], data.styles[i])
        if (data.masks[int(i)] == CLOTHES).mean() < LEAST_CLOTHES:
            shown.pop("clothes_color", None)
        seen.append(shown)
    return np.array([[v.index(s[n]) if n in s else -1 for n, v in attributes.items()] for s in seen])


def train_scorer(data: People, out: Path, minutes: float, *, device: str = "cpu", pictures: int = 20_000) -> None:
    """Train both nets on at most `pictures` pictures (50 KB of memory each) and write the judge's files into `out`."""
    rows = np.sort(np.random.default_rng(0).permutation(len(data))[:pictures])
    left_out = data.person[rows] % 20 == 0
    out.mkdir(parents=True, exist_ok=True)
    accuracy: dict[str, dict] = {}
    for view, share in SHARES.items():
        seen, labels = read(data, rows, view), labels_of(data, rows, VIEWS[view])
        torch.manual_seed(0)
        stage = ScorerStage(seen[~left_out], labels[~left_out], VIEWS[view])
        net = train(stage, TrainerConfig(out / f"{view}_run", minutes=share * minutes, device=device, **RECIPE))
        example = torch.zeros(1, 3, *seen.shape[1:3])
        path, names = str(out / f"attributes_{view}.onnx"), {"input_names": ["image"], "output_names": ["logits"]}
        torch.onnx.export(net, (example,), path, **names, dynamo=False)
        result = measured(net, seen[left_out], labels[left_out], VIEWS[view])
        accuracy |= result["attributes"]
        print(table([(n, a["score"], f"recall {a['recall']:.3f}") for n, a in result["attributes"].items()]))
    notes = {"views": VIEWS, "left_out_people": rounded(accuracy)}
    (out / "attributes.json").write_text(json.dumps(notes, indent=1) + "\n")


def train(stage: ScorerStage, config: TrainerConfig) -> nn.Module:
    """The stage's net when its run has ended, with the moving average of its weights."""
    trainer = Trainer(stage, config)
    trainer.train()
    trainer.average.copy_to(trainer.parameters)  # for good: what follows is the export
    return stage.net.cpu().eval()


@torch.inference_mode()
def measured(net: nn.Module, pictures: np.ndarray, labels: np.ndarray, attributes: Values) -> dict:
    """How often the net is right on pictures (N, S, S, 3) uint8 with labels (N, attributes)."""
    found, wanted = [], []
    for picture, row in zip(pictures, labels, strict=True):
        logits = net(torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 127.5 - 1)[0].numpy()
        guesses = [int(part.argmax()) for part in np.split(logits, starts(attributes)[1:-1])]
        found.append({n: v[g] for (n, v), g in zip(attributes.items(), guesses, strict=True)})
        wanted.append({n: v[i] for (n, v), i in zip(attributes.items(), row, strict=True) if i >= 0})
    return attribute_accuracy(found, wanted)

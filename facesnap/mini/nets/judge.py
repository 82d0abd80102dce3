"""Recogniser C, the judge: 112² crop → 512.

It has nothing in common with A, which conditions, and B, whose taste the identity loss follows, but its task: other
people, another architecture, another loss, and not the renderer's parameters. So a portrait that pleases it does so
for the likeness, rather than for a habit of all recognisers that were made alike.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from facesnap.mini import augment as views
from facesnap.mini.augment import FaceSet
from facesnap.mini.nets.common import NetStage, split, to_input, train
from facesnap.mini.nets.recogniser import export_recogniser, measure_recogniser
from facesnap.training.trainer import Batch

TEMPERATURE = 0.07
PICTURES = 3  # of each person in a batch


class Bottleneck(nn.Module):
    """ResNet's bottleneck (He et al., 2016) that weighs its channels (squeeze and excitation, Hu et al., 2018)."""

    def __init__(self, width: int):
        super().__init__()
        inner = width // 2
        self.body = nn.Sequential(
            nn.Conv2d(width, inner, 1, bias=False),
            nn.BatchNorm2d(inner),
            nn.SiLU(inplace=True),
            nn.Conv2d(inner, inner, 3, 1, 1, bias=False),
            nn.BatchNorm2d(inner),
            nn.SiLU(inplace=True),
            nn.Conv2d(inner, width, 1, bias=False),
            nn.BatchNorm2d(width),
        )
        self.excite = nn.Sequential(nn.Linear(width, width // 8), nn.SiLU(), nn.Linear(width // 8, width), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return F.silu(x + y * self.excite(y.mean((2, 3)))[..., None, None])


class JudgeNet(nn.Module):
    """Aligned crops (B, 3, 112, 112), (x − 127.5) / 127.5 → embeddings (B, 512), not normalised.

    Patches of 4 × 4 (as ConvNeXt begins), bottlenecks at 28², 14² and 7², and a weight for each place of each channel
    (MobileFaceNet's global depthwise convolution). In evaluation mode the embedding is the mean of the crop's and of
    its mirror image's.
    """

    def __init__(self, widths: tuple[int, ...] = (64, 128, 192), depths: tuple[int, ...] = (2, 4, 3)):
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, 4, bias=False), nn.BatchNorm2d(widths[0])]
        for k, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            if k:
                layers += [nn.Conv2d(widths[k - 1], width, 2, 2, bias=False), nn.BatchNorm2d(width)]
            layers += [Bottleneck(width) for _ in range(depth)]
        self.body = nn.Sequential(*layers)
        side = 28 // 2 ** (len(widths) - 1)
        self.places = nn.Conv2d(widths[-1], widths[-1], side, groups=widths[-1], bias=False)
        self.embed = nn.Sequential(nn.BatchNorm1d(widths[-1]), nn.Linear(widths[-1], 512))

    def forward(self, crops: Tensor) -> Tensor:
        both = crops if self.training else torch.cat([crops, crops.flip(3)])
        found = self.embed(self.places(self.body(both)).flatten(1)).float()
        return found if self.training else sum(found.chunk(2)) / 2

    def loss(self, crops: Tensor, person: Tensor) -> dict[str, Tensor]:
        """Supervised contrast (Khosla et al., arXiv 2004.11362, L_out): of a batch's other pictures, those of the same
        `person` (B,) should be the nearest."""
        unit = F.normalize(self(crops), dim=1)
        itself = torch.eye(len(unit), dtype=torch.bool, device=unit.device)
        cosine = (unit @ unit.T / TEMPERATURE).masked_fill(itself, -torch.inf)
        same = (person[:, None] == person[None]) & ~itself
        likely = cosine.log_softmax(1).masked_fill(~same, 0).sum(1) / same.sum(1)
        return {"contrast": -likely.mean()}


def train_judge(
    faces: FaceSet, out: Path, minutes: float, *, people: int = 32, net: JudgeNet | None = None, **options: Any
) -> JudgeNet:
    """Train recogniser C on aligned crops of `people` persons a batch and write `out/recogniser_C.onnx`."""
    seed = 20 + ord("C")
    torch.manual_seed(seed)
    training, held_out = split(faces)
    order = np.argsort(faces.person[training], kind="stable")
    groups = np.split(training[order], np.unique(faces.person[training][order], return_index=True)[1][1:])
    groups = [rows for rows in groups if len(rows) > 1]

    def draw(rng: np.random.Generator) -> Batch:
        chosen = rng.choice(len(groups), min(people, len(groups)), replace=False)
        rows = np.concatenate([rng.permutation(groups[k])[:PICTURES] for k in chosen])
        crops = np.stack([views.aligned_view(faces, row, rng) for row in rows])
        mirrored = rng.random(len(rows)) < 0.5
        crops[mirrored] = crops[mirrored, :, ::-1]
        return {"crops": to_input(crops, 127.5), "person": torch.from_numpy(faces.person[rows])}

    net = net or JudgeNet()
    stage = NetStage("recogniser_C", net, draw, lambda net: measure_recogniser(net, faces, held_out))
    train(stage, out, minutes=minutes, seed=seed, **options)
    export_recogniser(net, out / "recogniser_C.onnx")
    return net

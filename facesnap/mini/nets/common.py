"""What the mini's small convolutional nets share: their blocks, how they train, and how they become ONNX files.

InsightFace loads any folder of ONNX files whose inputs and outputs it knows; the nets here have those forms.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from facesnap.mini.augment import FaceSet
from facesnap.training.trainer import Batch, Stage, Trainer, TrainerConfig


def conv(inner: int, outer: int, stride: int = 1, kernel: int = 3) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inner, outer, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(outer),
        nn.ReLU(inplace=True),
    )


class Residual(nn.Module):
    """Two 3 × 3 convolutions around a shortcut; the first one strides."""

    def __init__(self, inner: int, outer: int, stride: int = 1):
        super().__init__()
        self.body = nn.Sequential(
            conv(inner, outer, stride), nn.Conv2d(outer, outer, 3, 1, 1, bias=False), nn.BatchNorm2d(outer)
        )
        straight = inner == outer and stride == 1
        self.shortcut = (
            nn.Identity()
            if straight
            else nn.Sequential(nn.Conv2d(inner, outer, 1, stride, bias=False), nn.BatchNorm2d(outer))
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


def to_input(images: np.ndarray, deviation: float) -> Tensor:
    """RGB uint8 (B, H, W, 3) → (B, 3, H, W) float, channels last, as InsightFace normalises."""
    x = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)
    return x.float().sub_(127.5).div_(deviation)


class NetStage(Stage):
    """One of the nets as a stage of the trainer.

    `views(rng)` draws a batch, whose items are the arguments of `net.loss`; `measure(net)` gives figures of merit on
    people who are never trained on.
    """

    def __init__(
        self,
        name: str,
        net: nn.Module,
        views: Callable[[np.random.Generator], Batch],
        measure: Callable[[nn.Module], dict[str, float]],
    ) -> None:
        self.name, self.net, self.views, self.measure = name, net.to(memory_format=torch.channels_last), views, measure
        for module in net.modules():
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                module.momentum = 0.02  # over fifty batches: the averaged weights are measured and exported with them

    def modules(self) -> dict[str, nn.Module]:
        return {self.name: self.net}

    def batch(self, rng: np.random.Generator) -> Batch:
        return self.views(rng)

    def loss(self, batch: Batch, step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        losses = self.net.loss(**batch)
        return torch.stack(list(losses.values())).sum(), losses

    def sample_sheet(self, path: Path) -> dict[str, float]:
        return self.measure(self.net)


def train(stage: NetStage, out: Path, *, minutes: float, lr: float = 3e-3, **options: Any) -> None:
    """Train the stage's net for some minutes; it ends with the moving average of its weights.

    `out/NAME_run` holds checkpoints and the log; a run that was stopped goes on from there."""
    config = TrainerConfig(
        out / f"{stage.name}_run", minutes=minutes, optimiser="muon", lr=lr, betas=(0.9, 0.98), weight_decay=0.02,
        clip=5.0, ema=0.995, warmup=50, hold=0.2, **options,
    )  # fmt: skip
    trainer = Trainer(stage, config)
    trainer.train()
    trainer.average.copy_to(trainer.parameters)  # for good: what follows is the export
    stage.net.eval()


def split(faces: FaceSet) -> tuple[np.ndarray, np.ndarray]:
    """Pictures to train on, and pictures of other people (a twentieth, at least 20) to measure with."""
    people = int(faces.person.max()) + 1
    kept = people - max(20, people // 20)
    if kept < 2:
        raise ValueError(f"{people} people are too few to train on and to measure with: render at least 22")
    return faces.people(0, kept), faces.people(kept, people)


def to_onnx(net: nn.Module, example: Tensor, path: Path, outputs: list[str], axes: dict) -> None:
    """Write an ONNX file; the net is left on the CPU, in evaluation mode."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.onnx.export(
        net.eval().cpu(), (example,), str(path), input_names=["input"], output_names=outputs,
        dynamic_axes=axes, opset_version=17, dynamo=False,
    )  # fmt: skip

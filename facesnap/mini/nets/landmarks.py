"""The mini's landmark net: 192² crop → 3309 numbers, of which InsightFace keeps the last 68 × 3."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from facesnap.mini import augment as views
from facesnap.mini.augment import FaceSet
from facesnap.mini.backgrounds import Backgrounds
from facesnap.mini.nets.common import NetStage, Residual, conv, split, to_input, to_onnx, train
from facesnap.training.trainer import Batch


class LandmarkNet(nn.Module):
    """Crops (B, 3, 192, 192), (x − 127.5) / 128 → 68 points (B, 68, 3) in [−1, 1] of the crop, z in that
    unit.

    x and y are the expectation of a 24 × 24 map of probabilities per point (integral regression, Sun et al.,
    2018), finer than a cell and indifferent to where in the crop the face lies; z is read from a second map
    at the same place."""

    def __init__(self, widths: tuple[int, ...] = (16, 24, 48, 80, 112), maps: int = 64):
        super().__init__()
        a, b, c, d, e = widths
        self.stem = nn.Sequential(conv(3, a, 2), conv(a, b, 2), Residual(b, b))  # 48
        self.stage24 = nn.Sequential(Residual(b, c, 2), Residual(c, c))
        self.stage12 = nn.Sequential(Residual(c, d, 2), Residual(d, d))
        self.stage6 = nn.Sequential(Residual(d, e, 2), Residual(e, e), Residual(e, e))
        self.up12 = conv(e, d, kernel=1)
        self.up24 = conv(d, maps, kernel=1)
        self.side24 = conv(c, maps, kernel=1)
        self.mix = nn.Sequential(Residual(d, d))
        self.last = nn.Sequential(conv(maps, maps))
        self.output = nn.Conv2d(maps, 2 * 68, 1)
        cells = (torch.arange(24, dtype=torch.float32) + 0.5) / 12 - 1
        self.register_buffer("cells", cells, persistent=False)

    def forward(self, crops: Tensor) -> Tensor:
        fine = self.stage24(self.stem(crops))
        middle = self.stage12(fine)
        coarse = self.stage6(middle)
        middle = self.mix(middle + F.interpolate(self.up12(coarse), scale_factor=2.0, mode="nearest"))
        up = F.interpolate(self.up24(middle), scale_factor=2.0, mode="bilinear", align_corners=False)
        raw = self.output(self.last(self.side24(fine) + up)).float()
        chance = raw[:, :68].flatten(2).softmax(-1)
        z = (chance * raw[:, 68:].flatten(2)).sum(-1)
        chance = chance.unflatten(-1, (24, 24))
        x = (chance.sum(2) * self.cells).sum(-1)
        y = (chance.sum(3) * self.cells).sum(-1)
        return torch.stack([x, y, z], dim=-1)

    def loss(self, crops: Tensor, points: Tensor) -> dict[str, Tensor]:
        """points (B, 68, 3) in the output's units. Smooth L1; depth counts half."""
        loss = F.smooth_l1_loss(self(crops), points, beta=0.02, reduction="none")
        return {"xy": 20 * loss[..., :2].mean(), "z": 5 * loss[..., 2].mean()}


def train_landmarks(
    faces: FaceSet,
    out: Path,
    minutes: float,
    *,
    batch_size: int = 32,
    seed: int = 12,
    net: LandmarkNet | None = None,
    **options,
) -> LandmarkNet:
    """Train the landmark net on `augment.landmark_view` and write `out/landmarks.onnx`."""
    torch.manual_seed(seed)
    training, held_out = split(faces)
    backgrounds = Backgrounds(np.random.default_rng(seed), 256, faces.images)

    def view(index: int, pool: Backgrounds, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        crop, points = views.landmark_view(faces, index, pool, rng)
        return crop, points / 96 - [1, 1, 0]

    def collate(pairs: list) -> Batch:
        crops, points = (np.stack(parts) for parts in zip(*pairs, strict=True))
        return {"crops": to_input(crops, 128.0), "points": torch.from_numpy(points.astype(np.float32))}

    def draw(rng: np.random.Generator) -> Batch:
        return collate([view(index, backgrounds, rng) for index in rng.choice(training, batch_size)])

    @torch.no_grad()
    def measure(net: nn.Module) -> dict[str, float]:
        rng = np.random.default_rng(5)
        fixed = Backgrounds(rng, 256, faces.images, count=40)
        errors, depths = [], []
        for _ in range(6):
            inputs = collate([view(index, fixed, rng) for index in rng.choice(held_out, 32)])
            place = next(net.parameters()).device
            truth, found = inputs["points"].numpy(), net(inputs["crops"].to(place)).cpu().numpy()
            corners = np.linalg.norm(truth[:, 36] - truth[:, 45], axis=-1)  # 3D: the frontal distance
            errors.append(np.linalg.norm((found - truth)[..., :2], axis=-1).mean(1) / corners)
            depths.append(np.abs((found - truth)[..., 2]).mean(1) / corners)
        error, depth = np.concatenate(errors), np.concatenate(depths)  # in eye distances
        return {"error": float(error.mean()), "median": float(np.median(error)), "depth": float(depth.mean())}

    net = net or LandmarkNet()
    train(NetStage("landmarks", net, draw, measure), out, minutes=minutes, seed=seed, **options)
    export_landmarks(net, out / "landmarks.onnx")
    return net


class _Last68(nn.Module):
    """InsightFace's file has 1103 points and keeps the last 68: the rest is zeros."""

    def __init__(self, net: LandmarkNet):
        super().__init__()
        self.net = net

    def forward(self, crop: Tensor) -> Tensor:
        return F.pad(self.net(crop).flatten(1), (3309 - 204, 0))


def export_landmarks(net: LandmarkNet, path: Path) -> None:
    to_onnx(_Last68(net), torch.zeros(1, 3, 192, 192), path, ["points"], {})

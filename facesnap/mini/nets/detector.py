"""The mini's face detector: SCRFD (Guo et al., 2021) with strides 8, 16, 32, two anchors a cell, nine outputs."""

import math
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from facesnap.mini import augment as views
from facesnap.mini.augment import FaceSet
from facesnap.mini.backgrounds import Backgrounds
from facesnap.mini.nets.common import NetStage, Residual, conv, split, to_input, to_onnx, train
from facesnap.training.trainer import Batch

STRIDES = (8, 16, 32)


class Detector(nn.Module):
    """An SCRFD-form detector for pictures (B, 3, H, W), (x − 127.5) / 128, sides multiples of 32.

    `forward` gives the nine outputs InsightFace expects, (B, N, C) each: scores of strides 8, 16, 32 as
    logits (C = 1), boxes (4: distances left, top, right, bottom), points (10: x and y offsets), in units of
    the stride. N runs over y, x, anchor; an anchor's centre is its cell's index times the stride.
    """

    sizes = ((20.0, 36.0), (60.0, 104.0), (176.0, 300.0))  # of the anchors, pixels: a geometric row

    def __init__(self, widths: tuple[int, ...] = (16, 32, 48, 80, 128), neck: int = 48):
        super().__init__()
        a, b, c, d, e = widths
        self.stem = nn.Sequential(conv(3, a, 2), conv(a, b, 2), Residual(b, b))
        self.stage8 = nn.Sequential(Residual(b, c, 2), Residual(c, c))
        self.stage16 = nn.Sequential(Residual(c, d, 2), Residual(d, d))
        self.stage32 = nn.Sequential(Residual(d, e, 2), Residual(e, e))
        self.laterals = nn.ModuleList([conv(width, neck, kernel=1) for width in (c, d, e)])
        self.heads = nn.ModuleList([nn.Sequential(conv(neck, neck), conv(neck, neck)) for _ in STRIDES])
        self.outputs = nn.ModuleList([nn.Conv2d(neck, 2 * 15, 1) for _ in STRIDES])
        halves = torch.tensor(self.sizes) / (2 * torch.tensor(STRIDES)[:, None])
        self.register_buffer("half_sizes", halves[..., None], persistent=False)  # (3, 2, 1), in strides
        for output in self.outputs:
            nn.init.normal_(output.weight, std=0.01)
            nn.init.zeros_(output.bias)
            output.bias.data[[0, 15]] = -4.0  # few anchors hold a face: start from that belief

    def forward(self, pictures: Tensor) -> tuple[Tensor, ...]:
        fine = self.stage8(self.stem(pictures))
        middle = self.stage16(fine)
        coarse = self.laterals[2](self.stage32(middle))
        middle = self.laterals[1](middle) + F.interpolate(coarse, scale_factor=2.0, mode="nearest")
        fine = self.laterals[0](fine) + F.interpolate(middle, scale_factor=2.0, mode="nearest")
        scores, boxes, points = [], [], []
        for level, x in enumerate((fine, middle, coarse)):
            raw = self.outputs[level](self.heads[level](x)).float()
            raw = raw.permute(0, 2, 3, 1).reshape(raw.shape[0], -1, 2, 15)
            half = self.half_sizes[level]
            scores.append(raw[..., :1].reshape(raw.shape[0], -1, 1))
            boxes.append((half * raw[..., 1:5].clamp(-3, 3).exp()).reshape(raw.shape[0], -1, 4))
            points.append((half * raw[..., 5:]).reshape(raw.shape[0], -1, 10))
        return *scores, *boxes, *points

    def decode(self, outputs: tuple[Tensor, ...], height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (B, N), boxes xyxy (B, N, 4) and points (B, N, 5, 2) in pixels, all levels in one row."""
        boxes, points = [], []
        for level, stride in enumerate(STRIDES):
            centres = anchor_centres(height, width, stride, outputs[0].device)
            near, far = outputs[3 + level].mul(stride).split(2, dim=-1)
            boxes.append(torch.cat([centres - near, centres + far], dim=-1))
            offsets = outputs[6 + level].mul(stride).unflatten(-1, (5, 2))
            points.append(centres[:, None] + offsets)
        return torch.cat(outputs[:3], 1).squeeze(-1), torch.cat(boxes, 1), torch.cat(points, 1)

    def loss(self, pictures: Tensor, boxes: Tensor, points: Tensor, real: Tensor) -> dict[str, Tensor]:
        """pictures (B, 3, H, W); boxes (B, G, 4); points (B, G, 5, 2); real (B, G), false for padding.

        Quality focal loss (Li et al., 2020) on the scores, with the square root of the box's IoU as target;
        DIoU on boxes; L1 on points as fractions of the box."""
        height, width = pictures.shape[-2:]
        logits, found, spots = self.decode(self(pictures), height, width)
        centres, sizes = self.anchors(height, width, pictures.device)
        choice, positive = self.assign(centres, sizes, boxes, real)
        row = torch.arange(len(boxes), device=boxes.device)[:, None].expand_as(choice)[positive]
        wanted, wanted_points = boxes[row, choice[positive]], points[row, choice[positive]]
        iou, diou = overlaps(found[positive], wanted)
        count = positive.sum().clamp(min=1)
        target = torch.zeros_like(logits)
        target[positive] = iou.detach().clamp(min=0.05).sqrt()
        quality = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
        quality = quality * (target - logits.sigmoid()).abs() ** 2
        side = (wanted[:, 2:] - wanted[:, :2]).amax(1).view(-1, 1, 1)
        spot = F.smooth_l1_loss(spots[positive] / side, wanted_points / side, beta=0.02, reduction="none")
        return {
            "score": quality.sum() / count,
            "box": (1 - diou).sum() / count,
            "points": 4 * spot.mean((1, 2)).sum() / count,
        }

    def anchors(self, height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
        centres, sizes = [], []
        for stride, pair in zip(STRIDES, self.sizes, strict=True):
            here = anchor_centres(height, width, stride, device)
            centres.append(here)
            sizes.append(torch.tensor(pair, device=device).repeat(len(here) // 2))
        return torch.cat(centres), torch.cat(sizes)

    def assign(self, centres: Tensor, sizes: Tensor, boxes: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """Which face each anchor should find (B, N), and whether any: those near the face's middle whose size
        is within half an octave of the face's."""
        side = (boxes[..., 2:] - boxes[..., :2]).clamp(min=1)  # (B, G, 2)
        middle = (boxes[..., :2] + boxes[..., 2:]) / 2
        size = side.prod(-1).sqrt().clamp(self.sizes[0][0], self.sizes[-1][-1])
        octaves = (size[:, None].log2() - sizes.log2()[None, :, None]).abs()  # (B, N, G)
        # A cell is as wide as its stride, and the anchors of a stride are at most 2.5 and 9.4 of it: every
        # face has at least one centre within 0.55 strides of its own.
        stride = torch.where(sizes > 130, 32.0, torch.where(sizes > 50, 16.0, 8.0))
        away = (centres[None, :, None] - middle[:, None]).abs()
        reach = torch.maximum(0.22 * side[:, None], 0.55 * stride[None, :, None, None])
        inside = (away <= reach).all(-1) & (octaves < 0.55) & real[:, None]
        cost = octaves + (away / side[:, None]).amax(-1) + torch.where(inside, 0.0, 1e4)
        best = cost.min(-1)
        return best.indices, best.values < 1e3


def anchor_centres(height: int, width: int, stride: int, device: torch.device) -> Tensor:
    """(N, 2) pixels x, y; N runs over y, x and the two anchors of a cell."""
    y, x = torch.meshgrid(
        torch.arange(height // stride, device=device),
        torch.arange(width // stride, device=device),
        indexing="ij",
    )
    return torch.stack([x, y], -1).mul(float(stride)).reshape(-1, 1, 2).repeat(1, 2, 1).reshape(-1, 2)


def overlaps(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and DIoU (Zheng et al., 2020) of boxes xyxy (N, 4), pair by pair."""
    low, high = torch.maximum(a[:, :2], b[:, :2]), torch.minimum(a[:, 2:], b[:, 2:])
    common = (high - low).clamp(min=0).prod(1)
    union = (a[:, 2:] - a[:, :2]).prod(1) + (b[:, 2:] - b[:, :2]).prod(1) - common
    iou = common / union.clamp(min=1e-6)
    hull = torch.maximum(a[:, 2:], b[:, 2:]) - torch.minimum(a[:, :2], b[:, :2])
    apart = (a[:, :2] + a[:, 2:] - b[:, :2] - b[:, 2:]).square().sum(1) / 4
    return iou, iou - apart / hull.square().sum(1).clamp(min=1e-6)


def train_detector(
    faces: FaceSet,
    out: Path,
    minutes: float,
    *,
    batch_size: int = 24,
    seed: int = 11,
    net: Detector | None = None,
    **options,
) -> Detector:
    """Train the detector on scenes of 160² to 256² (`augment.scene`) and write `out/detector.onnx`."""
    torch.manual_seed(seed)
    training, held_out = split(faces)
    backgrounds = Backgrounds(np.random.default_rng(seed), 256, faces.images)

    def draw(rng: np.random.Generator) -> Batch:
        size = int(rng.choice((160, 192, 256), p=(0.3, 0.4, 0.3)))
        scenes = [views.scene(faces, training, backgrounds, rng, size) for _ in range(batch_size * 192**2 // size**2)]
        most = max(1, max(len(boxes) for _, boxes, _ in scenes))
        boxes, points = np.zeros((len(scenes), most, 4), "f4"), np.zeros((len(scenes), most, 5, 2), "f4")
        real = np.zeros((len(scenes), most), bool)
        for k, (_, found, spots) in enumerate(scenes):
            boxes[k, : len(found)], points[k, : len(found)], real[k, : len(found)] = found, spots, True
        labels = {"boxes": boxes, "points": points, "real": real}
        return {
            "pictures": to_input(np.stack([image for image, _, _ in scenes]), 128.0),
            **{key: torch.from_numpy(value) for key, value in labels.items()},
        }

    def measure(net: nn.Module) -> dict[str, float]:
        rng = np.random.default_rng(5)
        fixed = Backgrounds(rng, 256, faces.images, count=40)
        return detector_figures(net, [views.scene(faces, held_out, fixed, rng, 256) for _ in range(160)])

    net = net or Detector()
    train(NetStage("detector", net, draw, measure), out, minutes=minutes, seed=seed, **options)
    export_detector(net, out / "detector.onnx")
    return net


@torch.no_grad()
def detector_figures(model: nn.Module, scenes: list) -> dict[str, float]:
    """Recall at IoU 0.5 and score 0.5, false alarms a picture, and the points' error in eye distances."""
    device = next(model.parameters()).device
    hits = faces = alarms = 0
    errors = []
    for image, boxes, points in scenes:
        logits, found, spots = model.decode(model(to_input(image[None], 128.0).to(device)), *image.shape[:2])
        scores, found, spots = (
            logits[0].sigmoid().cpu().numpy(),
            found[0].cpu().numpy(),
            spots[0].cpu().numpy(),
        )
        corners = np.concatenate([found[:, :2], found[:, 2:] - found[:, :2]], axis=1)
        kept = np.array(cv2.dnn.NMSBoxes(corners.tolist(), scores.tolist(), 0.5, 0.4), dtype=int).reshape(-1)
        match = np.zeros((len(kept), len(boxes)))
        for j, box in enumerate(boxes):
            wanted = torch.from_numpy(box)[None].expand(len(kept), 4)
            match[:, j] = overlaps(torch.from_numpy(found[kept]), wanted)[0].numpy()
        faces += len(boxes)
        alarms += int((match.max(1, initial=0) < 0.3).sum())
        for j in range(len(boxes)):
            best = int(match[:, j].argmax()) if len(kept) else -1
            if best < 0 or match[best, j] < 0.5:
                continue
            hits += 1
            distance = max(np.linalg.norm(points[j][0] - points[j][1]), 0.25 * (boxes[j][3] - boxes[j][1]))
            errors.append(np.linalg.norm(spots[kept[best]] - points[j], axis=1).mean() / distance)
    error = float(np.median(errors)) if errors else math.nan
    return {"recall": hits / max(1, faces), "alarms": alarms / len(scenes), "points": error}


class _Nine(nn.Module):
    """The detector with scores as probabilities, one picture at a time."""

    def __init__(self, net: Detector):
        super().__init__()
        self.net = net

    def forward(self, picture: Tensor) -> tuple[Tensor, ...]:
        outputs = self.net(picture)
        return (*(scores.sigmoid() for scores in outputs[:3]), *outputs[3:])


def export_detector(net: Detector, path: Path) -> None:
    """Sides stay free, with names of their own, which InsightFace needs to fix them for a session."""
    outputs = [f"{kind}_{stride}" for kind in ("score", "box", "points") for stride in STRIDES]
    axes = {"input": {2: "height", 3: "width"}} | {name: {1: f"n_{name}"} for name in outputs}
    to_onnx(_Nine(net), torch.zeros(1, 3, 256, 192), path, outputs, axes)

"""The mini's face pack, trained: a detector, a 3D landmark net and three recognisers, exported to ONNX.

InsightFace loads any folder of ONNX files whose inputs and outputs it knows; the nets here have those forms.

    detector    SCRFD (Guo et al., 2021): strides 8, 16, 32, two anchors a cell, nine outputs
    landmarks   192² crop → 3309 numbers, of which InsightFace keeps the last 68 × 3
    recogniser  112² crop → 512, CosFace (Wang et al., 2018): A conditions, B is φ of the identity loss, C scores

    python -m facesnap.training.facenets --net A --data DIR --out DIR --minutes 12

Each run keeps its checkpoints in OUT/NAME_run and goes on from there when it is started again.
"""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from facesnap.training import faceviews as views
from facesnap.training.faceviews import FaceSet
from facesnap.training.trainer import Batch, Stage, Trainer, TrainerConfig

STRIDES = (8, 16, 32)
MARGIN, MARGIN_STEPS = 0.3, 400  # CosFace's, and the steps in which it grows to that


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


# ------------------------------------------------------------------------------------------------ detector


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
        centres, sizes = self._anchors(height, width, pictures.device)
        choice, positive = self._assign(centres, sizes, boxes, real)
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

    def _anchors(self, height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
        centres, sizes = [], []
        for stride, pair in zip(STRIDES, self.sizes, strict=True):
            here = anchor_centres(height, width, stride, device)
            centres.append(here)
            sizes.append(torch.tensor(pair, device=device).repeat(len(here) // 2))
        return torch.cat(centres), torch.cat(sizes)

    def _assign(self, centres: Tensor, sizes: Tensor, boxes: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
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


# ----------------------------------------------------------------------------------------------- landmarks


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


# --------------------------------------------------------------------------------------------- recognisers


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


# Widths and depths differ on purpose: a net that scores must not share the blind spots of the one that
# conditions.
RECOGNISERS: dict[str, dict[str, Any]] = {
    "A": {"widths": (24, 32, 64, 96, 128), "depths": (1, 2, 2, 2)},
    "B": {"widths": (20, 32, 56, 96, 120), "depths": (1, 1, 2, 2)},
    "C": {"widths": (16, 40, 64, 112, 128), "depths": (1, 1, 3, 1)},
}


# ------------------------------------------------------------------------------------------------ training


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


class RecogniserStage(NetStage):
    """CosFace's margin grows over the first steps."""

    def loss(self, batch: Batch, step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        return super().loss(batch | {"margin": MARGIN * min(1.0, step / MARGIN_STEPS)}, step, generator)


def train(stage: NetStage, out: Path, *, minutes: float, lr: float = 3e-3, **options: Any) -> nn.Module:
    """Train the stage's net for some minutes; it comes back with the moving average of its weights.

    `out/NAME_run` holds checkpoints and the log; a run that was stopped goes on from there."""
    config = TrainerConfig(
        out / f"{stage.name}_run", minutes=minutes, optimiser="muon", lr=lr, betas=(0.9, 0.98), weight_decay=0.02,
        clip=5.0, ema=0.995, warmup=50, hold=0.2, **options,
    )  # fmt: skip
    trainer = Trainer(stage, config)
    trainer.train()
    trainer.average.swap()  # for good: what follows is the export
    return stage.net.eval()


def split(faces: FaceSet) -> tuple[np.ndarray, np.ndarray]:
    """Pictures to train on, and pictures of other people (a twentieth, at least 20) to measure with."""
    people = int(faces.person.max()) + 1
    kept = people - max(20, people // 20)
    if kept < 2:
        raise ValueError(f"{people} people are too few to train on and to measure with: render at least 22")
    return faces.people(0, kept), faces.people(kept, people)


def train_detector(
    faces: FaceSet,
    out: Path,
    minutes: float,
    *,
    batch_size: int = 24,
    seed: int = 11,
    **options,
) -> Detector:
    """Train the detector on scenes of 160² to 256² (`faceviews.scene`) and write `out/detector.onnx`."""
    torch.manual_seed(seed)
    training, held_out = split(faces)
    backgrounds = views.Backgrounds(np.random.default_rng(seed), 256, faces.images)

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
        fixed = views.Backgrounds(rng, 256, faces.images, count=40)
        return detector_figures(net, [views.scene(faces, held_out, fixed, rng, 256) for _ in range(160)])

    net = train(NetStage("detector", Detector(), draw, measure), out, minutes=minutes, seed=seed, **options)
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


def train_landmarks(
    faces: FaceSet,
    out: Path,
    minutes: float,
    *,
    batch_size: int = 32,
    seed: int = 12,
    **options,
) -> LandmarkNet:
    """Train the landmark net on `faceviews.landmark_view` and write `out/landmarks.onnx`."""
    torch.manual_seed(seed)
    training, held_out = split(faces)
    backgrounds = views.Backgrounds(np.random.default_rng(seed), 256, faces.images)

    def view(index: int, pool: views.Backgrounds, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
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
        fixed = views.Backgrounds(rng, 256, faces.images, count=40)
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

    net = train(NetStage("landmarks", LandmarkNet(), draw, measure), out, minutes=minutes, seed=seed, **options)
    export_landmarks(net, out / "landmarks.onnx")
    return net


def train_recogniser(
    variant: str,
    faces: FaceSet,
    out: Path,
    minutes: float,
    *,
    batch_size: int = 96,
    start: Path | None = None,
    **options,
) -> RecogniserNet:
    """Train recogniser "A", "B" or "C" on aligned crops; write `out/recogniser_VARIANT.onnx` and, for the
    identity loss, `out/recogniser_VARIANT.safetensors`, which `load_recogniser` reads.

    `start` is such a safetensors file of the same variant, trained on other people perhaps: all but the classifier
    goes on from there."""
    seed = 20 + ord(variant)
    torch.manual_seed(seed)
    training, held_out = split(faces)
    # A meets photographs at use; B and C see nothing but renders and portraits
    backgrounds = views.Backgrounds(np.random.default_rng(seed), 112, faces.images) if variant == "A" else None
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

    @torch.no_grad()
    def measure(net: nn.Module) -> dict[str, float]:
        place = next(net.parameters()).device
        rng = np.random.default_rng(5)
        chosen = held_out[:1000]
        crops = [views.aligned_view(faces, index, rng, jitter=0) for index in chosen]
        parts = [net(to_input(np.stack(crops[k : k + 50]), 127.5).to(place)) for k in range(0, len(crops), 50)]
        return recogniser_figures(torch.cat(parts).cpu().numpy(), faces.person[chosen])

    net = RecogniserNet(**RECOGNISERS[variant], identities=torch.from_numpy(identities))
    if start is not None:
        net.load_state_dict(net.state_dict() | load_recogniser(start, variant).state_dict())
    train(RecogniserStage(f"recogniser_{variant}", net, draw, measure), out, minutes=minutes, seed=seed, **options)
    kept = [k for k in net.state_dict() if not k.startswith(("prototypes", "regress"))]
    weights = {key: net.state_dict()[key].contiguous() for key in kept}  # undoes channels last
    save_file(weights, out / f"recogniser_{variant}.safetensors", metadata={"variant": variant})
    export_recogniser(net, out / f"recogniser_{variant}.onnx")
    return net


def load_recogniser(path: Path, variant: str | None = None) -> RecogniserNet:
    """The trained net of `recogniser_VARIANT.safetensors`, frozen, in evaluation mode, differentiable in its
    input: φ of the identity loss. Raises ValueError where it is not the `variant` asked for."""
    with safe_open(path, "pt") as file:
        if variant not in (None, file.metadata()["variant"]):
            raise ValueError(f"{path.name} holds recogniser {file.metadata()['variant']}, not {variant}")
        net = RecogniserNet(**RECOGNISERS[file.metadata()["variant"]])
        net.load_state_dict({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
    return net.eval().requires_grad_(False)


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


# -------------------------------------------------------------------------------------------------- export


class _Nine(nn.Module):
    """The detector with scores as probabilities, one picture at a time."""

    def __init__(self, net: Detector):
        super().__init__()
        self.net = net

    def forward(self, picture: Tensor) -> tuple[Tensor, ...]:
        outputs = self.net(picture)
        return (*(scores.sigmoid() for scores in outputs[:3]), *outputs[3:])


class _Last68(nn.Module):
    """InsightFace's file has 1103 points and keeps the last 68: the rest is zeros."""

    def __init__(self, net: LandmarkNet):
        super().__init__()
        self.net = net

    def forward(self, crop: Tensor) -> Tensor:
        return F.pad(self.net(crop).flatten(1), (3309 - 204, 0))


def export_detector(net: Detector, path: Path) -> None:
    """Sides stay free, with names of their own, which InsightFace needs to fix them for a session."""
    outputs = [f"{kind}_{stride}" for kind in ("score", "box", "points") for stride in STRIDES]
    axes = {"input": {2: "height", 3: "width"}} | {name: {1: f"n_{name}"} for name in outputs}
    to_onnx(_Nine(net), torch.zeros(1, 3, 256, 192), path, outputs, axes)


def export_landmarks(net: LandmarkNet, path: Path) -> None:
    to_onnx(_Last68(net), torch.zeros(1, 3, 192, 192), path, ["points"], {})


def export_recogniser(net: RecogniserNet, path: Path) -> None:
    """The embedding alone; the number of crops stays free. Prototypes and regression are left behind."""
    axes = {"input": {0: "crops"}, "embedding": {0: "crops"}}
    to_onnx(net, torch.zeros(1, 3, 112, 112), path, ["embedding"], axes)


def to_onnx(net: nn.Module, example: Tensor, path: Path, outputs: list[str], axes: dict) -> None:
    """Write an ONNX file; the net is left on the CPU, in evaluation mode."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.onnx.export(
        net.eval().cpu(), (example,), str(path), input_names=["input"], output_names=outputs,
        dynamic_axes=axes, opset_version=17, dynamo=False,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", required=True, choices=("detector", "landmarks", "A", "B", "C"))
    parser.add_argument("--data", required=True, type=Path, help="folder of shards")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--minutes", required=True, type=float)
    parser.add_argument("--start", type=Path, help="recogniser_X.safetensors that recogniser X goes on from")
    # torch 2.13 can corrupt the heap with two threads in the backward pass of small bfloat16 convolutions
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cv2.setNumThreads(args.threads)
    faces = views.load(args.data)
    print(f"{args.net}: {len(faces)} pictures of {int(faces.person.max()) + 1} people", flush=True)
    options: dict[str, Any] = {"device": args.device}
    if args.start and args.net not in RECOGNISERS:
        parser.error("--start is for the recognisers A, B and C")
    if args.net == "detector":
        train_detector(faces, args.out, args.minutes, **options)
    elif args.net == "landmarks":
        train_landmarks(faces, args.out, args.minutes, **options)
    else:
        train_recogniser(args.net, faces, args.out, args.minutes, start=args.start, **options)


if __name__ == "__main__":
    main()

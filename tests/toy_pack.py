"""A face pack of toy nets in InsightFace's form, which see what a test paints: green squares are faces.

A cell of 8 × 8 pixels that is greener than its surroundings is a face of 64 × 64 pixels about the cell's
corner, a blue one a face of 128 × 128. The landmark net answers a mean face on the coloured square that it sees, and
one in the middle of its crop where it sees none: there it is as unsteady as on clothes. Magenta is seen by it alone,
red by the detector alone."""

from pathlib import Path

import numpy as np
import torch
from insightface.data import get_object
from torch import nn
from torch.nn import functional as F

from facesnap.mini.nets.common import to_onnx
from facesnap.mini.nets.recogniser import export_recogniser

SMALL, LARGE = 64, 128  # pixels of the detector's input


class ToyDetector(nn.Module):
    def forward(self, picture):
        red, green, blue = picture.split(1, dim=1)
        outputs = []
        for stride in (8, 16, 32):
            if stride == 32:
                signal = -F.avg_pool2d(picture[:, :1].abs(), 32)
            else:
                colour = (green - torch.maximum(red, blue)) if stride == 8 else (blue - torch.maximum(red, green))
                if stride == 8:
                    colour = torch.maximum(colour, red - torch.maximum(green, blue))
                cell = F.avg_pool2d(colour, 8)
                signal = cell - F.avg_pool2d(cell, 9, 1, 4, count_include_pad=False)
                signal = signal if stride == 8 else F.max_pool2d(signal, 2)
            # The second anchor of each cell never fires.
            both = torch.cat([signal - 0.6, torch.full_like(signal, -9.0)], dim=1)
            outputs.append((both * 20).sigmoid().permute(0, 2, 3, 1).reshape(1, -1, 1))
        boxes = [torch.full((1, 1, 4), side / 2 / s) for side, s in ((SMALL, 8), (LARGE, 16), (LARGE, 32))]
        five = torch.tensor([[-1.0, -1, 1, -1, 0, 0, -1, 1, 1, 1]]) / 4
        points = [five * 2 * box[0, 0, 0] for box in boxes]
        zeros = [score * 0 for score in outputs]
        return (
            *outputs,
            *(box + zero for box, zero in zip(boxes, zeros, strict=True)),
            *(point[None] + zero for point, zero in zip(points, zeros, strict=True)),
        )


class ToyLandmarks(nn.Module):
    def __init__(self):
        super().__init__()
        mean = torch.from_numpy(np.asarray(get_object("meanshape_68.pkl"), np.float32))
        self.register_buffer("mean", mean / mean[:, :2].abs().max())
        across = torch.linspace(-1, 1, 193)[:-1] + 1 / 192
        self.register_buffer("x", across[None, :].expand(192, 192).clone())
        self.register_buffer("y", across[:, None].expand(192, 192).clone())

    def forward(self, crop):
        red, green, blue = crop[0]
        signal = torch.maximum(green - torch.maximum(red, blue), blue - green.maximum(red))
        signal = torch.maximum(signal, torch.minimum(red, blue) - green)
        mark = (20 * (signal - 0.8)).sigmoid()
        area = mark.sum()
        seen = (area > 4).float()
        middle = seen * torch.stack([(mark * self.x).sum(), (mark * self.y).sum(), area * 0]) / (area + 1e-6)
        # The face is 7.2 times as wide as its mark: 0.6 of the crop around the box that the detector gives.
        half = seen * 3.6 * area.sqrt() / 96 + (1 - seen) * 0.6
        return F.pad((self.mean * half + middle).reshape(1, -1), (3309 - 204, 0))


class ToyRecogniser(nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.register_buffer("weight", torch.randn(512, 3 * 14 * 14, generator=generator))

    def forward(self, crops):
        return F.linear(F.avg_pool2d(crops, 8).flatten(1), self.weight)


def write(folder: Path, leave_out: str = "") -> Path:
    """Export detector.onnx, landmarks.onnx and recogniser.onnx to `folder`, but for one."""
    names = [f"{kind}_{stride}" for kind in ("score", "box", "points") for stride in (8, 16, 32)]
    if leave_out != "detector":
        axes = {"input": {2: "height", 3: "width"}} | {name: {1: f"n_{name}"} for name in names}
        to_onnx(ToyDetector(), torch.zeros(1, 3, 64, 64), folder / "detector.onnx", names, axes)
    if leave_out != "landmarks":
        to_onnx(ToyLandmarks(), torch.zeros(1, 3, 192, 192), folder / "landmarks.onnx", ["points"], {})
    if leave_out != "recogniser":
        export_recogniser(ToyRecogniser(), folder / "recogniser.onnx")
    return folder

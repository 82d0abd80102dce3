"""ArcFace's IResNet, read from an ONNX file into torch: φ of the identity loss, differentiable in its input."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import Tensor, nn

FACE = 112  # side of a recogniser's crop, pixels


class Block(nn.Module):
    """BatchNorm, conv, PReLU, conv (which may stride), around a shortcut; what normalised the convolutions'
    outputs is part of their weights."""

    def __init__(self, norm: nn.Module, first: nn.Module, act: nn.Module, second: nn.Module, shortcut: nn.Module):
        super().__init__()
        self.norm, self.first, self.act, self.second, self.shortcut = norm, first, act, second, shortcut

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.act(self.first(self.norm(x)))) + self.shortcut(x)


class IResNet(nn.Module):
    """ArcFace's IResNet (Deng et al., 2019; the 50-layer one has 3, 4, 14, 3 blocks), frozen, differentiable in its
    input: crops (B, 3, 112, 112) in [−1, 1] → embeddings (B, 512), not normalised.

    `mirror`: the embedding is the mean of the crop's and of its mirror image's, as in the mini's recognisers.
    """

    def __init__(self, stem: nn.Sequential, blocks: Sequence[Block], head: nn.Sequential, *, mirror: bool = False):
        super().__init__()
        self.stem, self.blocks, self.head, self.mirror = stem, nn.Sequential(*blocks), head, mirror
        self.eval().requires_grad_(False)

    def forward(self, crops: Tensor) -> Tensor:
        if not self.mirror:
            return self.head(self.blocks(self.stem(crops)))
        one, mirrored = self.head(self.blocks(self.stem(torch.cat([crops, crops.flip(3)])))).chunk(2)
        return (one + mirrored) / 2

    @classmethod
    def from_onnx(cls, path: str | Path) -> IResNet:
        """Read a recogniser from an ONNX file in the layout that torch's exporter gives an IResNet.

        The result is compared with ONNX Runtime on a crop before it is returned. Raises ValueError where the file
        cannot be read, has another layout, or answers otherwise than our reading of it.
        """
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"there is no recogniser at {path}: give the path of its ONNX file")
        try:
            graph = onnx.load(path).graph
            net = _Reader(graph).read()
        except Exception as error:  # protobuf's own errors, and whatever a graph of another kind trips over
            raise ValueError(
                f"{path.name} is no IResNet in ArcFace's layout ({type(error).__name__}: {error}): give a recogniser "
                "such as w600k_r50.onnx or the mini's recogniser_B.onnx"
            ) from error
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        crop = np.random.default_rng(0).uniform(-1, 1, (1, 3, FACE, FACE)).astype(np.float32)
        told = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: crop})[0])
        with torch.no_grad():
            ours = net(torch.from_numpy(crop))
        apart = float((F.normalize(ours) - F.normalize(told)).abs().max())
        if not apart < 1e-4:
            raise ValueError(f"{path.name} was misread: its embedding and ours are {apart:.1e} apart")
        return net


class _Reader:
    """The layers of a graph in its order, which is that of the forward pass, each taken once."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.values = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
        self.nodes: list[onnx.NodeProto] = []
        self.mirror = False
        for node in graph.node:
            if node.op_type == "Constant":
                self.values[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
            elif node.op_type in ("Identity", "Cast", "Unsqueeze") and node.input[0] in self.values:
                # weights stored in half precision, slopes given a shape
                self.values[node.output[0]] = self.values[node.input[0]]
            elif node.op_type in ("Conv", "PRelu", "LeakyRelu", "BatchNormalization", "Gemm", "MatMul"):
                self.nodes.append(node)
            elif node.op_type == "Concat" and not self.nodes:
                self.mirror = True

    def read(self) -> IResNet:
        stem = nn.Sequential(self.conv(), self.act())
        blocks = []
        while len(self.nodes) > 1 and self.nodes[1].op_type == "Conv":
            main = self.norm(nn.BatchNorm2d), self.conv(), self.act(), self.conv()
            blocks.append(Block(*main, self.conv() if self.next_is("Conv") else nn.Identity()))
        head = [self.norm(nn.BatchNorm2d), nn.Flatten(), self.linear()]
        if self.nodes:
            head.append(self.norm(nn.BatchNorm1d))
        if self.nodes:
            raise ValueError(f"{len(self.nodes)} layers after the embedding")
        return IResNet(stem, blocks, nn.Sequential(*head), mirror=self.mirror)

    def next_is(self, kind: str) -> bool:
        return bool(self.nodes) and self.nodes[0].op_type == kind

    def take(self, *kinds: str) -> onnx.NodeProto:
        found = self.nodes.pop(0) if self.nodes else None
        if found is None or found.op_type not in kinds:
            raise ValueError(f"{' or '.join(kinds)} expected, found {found.op_type if found else 'the end'}")
        return found

    def value(self, name: str) -> Tensor:
        return torch.from_numpy(np.array(self.values[name], np.float32))

    def conv(self) -> nn.Conv2d:
        node = self.take("Conv")
        a = _attributes(node)
        weight = self.value(node.input[1])
        outer, inner, size, _ = weight.shape
        pads = a.get("pads", [0] * 4)
        if a.get("group", 1) != 1 or set(a.get("dilations", [1])) != {1} or set(pads) != {size // 2}:
            raise ValueError(f"a convolution with {a}")
        bias = self.value(node.input[2]) if len(node.input) > 2 else torch.zeros(outer)
        if self.next_is("BatchNormalization") and self.nodes[0].input[0] == node.output[0]:
            scale, shift = self.scale_and_shift()  # an exporter that did not fold it
            weight, bias = weight * scale[:, None, None, None], bias * scale + shift
        layer = nn.Conv2d(inner, outer, size, a.get("strides", [1])[0], size // 2)
        layer.load_state_dict({"weight": weight, "bias": bias})
        return layer

    def norm(self, kind: type[nn.Module]) -> nn.Module:
        scale, shift = self.scale_and_shift()
        layer: Any = kind(len(scale), eps=0.0)  # mean 0, variance 1: what is left is the scale and the shift
        layer.weight.data, layer.bias.data = scale, shift
        return layer

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """What a BatchNormalization does to each channel: x → scale · x + shift."""
        node = self.take("BatchNormalization")
        weight, bias, mean, variance = (self.value(name) for name in node.input[1:5])
        scale = weight / (variance + _attributes(node).get("epsilon", 1e-5)).sqrt()
        return scale, bias - mean * scale

    def act(self) -> nn.PReLU:
        node = self.take("PRelu", "LeakyRelu")
        is_leaky = node.op_type == "LeakyRelu"
        slopes = torch.tensor([_attributes(node)["alpha"]]) if is_leaky else self.value(node.input[1]).flatten()
        layer = nn.PReLU(len(slopes))
        layer.load_state_dict({"weight": slopes})
        return layer

    def linear(self) -> nn.Linear:
        product = self.take("Gemm", "MatMul")
        weight = self.value(product.input[1])
        if not _attributes(product).get("transB"):
            weight = weight.T
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        bias = self.value(product.input[2]) if len(product.input) > 2 else torch.zeros(len(weight))
        layer.load_state_dict({"weight": weight, "bias": bias})
        return layer


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}

"""Two public nets of the Inception family, in the form of their public weights: FID's Inception v3, and FaceNet.

InceptionV3 is the net of Szegedy et al. 2015 ("Rethinking the Inception architecture") as TensorFlow's graph of
2015-12-05 has it, which Heusel et al. 2017 measured FID with; its average pooling does not count the padding, and its
last block pools by the maximum. The names are those of `pt_inception-2015-12-05-6726825d.pth`.
FaceNet is Inception-ResNet v1 (Szegedy et al. 2016) with the embedding of Schroff et al. 2015; the names are those of
`20180402-114759-vggface2.pt`.

Both are read strictly: weights of another form are refused, not fitted in.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from facesnap.errors import InputError

Kernel = int | tuple[int, int]
Conv = tuple[int, Kernel] | tuple[int, Kernel, int]  # channels, kernel and, where it is not 1, the stride
Branches = Sequence[Sequence[Conv]]


class ConvNorm(nn.Module):
    """Convolution, batch norm, ReLU; by default padded to keep the size where the stride is 1, else not at all."""

    def __init__(self, inside: int, out: int, kernel: Kernel, stride: int = 1, *, padded: bool = True):
        super().__init__()
        sides = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = tuple(side // 2 for side in sides) if stride == 1 and padded else (0, 0)
        self.conv = nn.Conv2d(inside, out, sides, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


# ---------------------------------------------------------------------------------------------- Inception v3


class Mixed(nn.Module):
    """Paths side by side on one input, joined by their channels; the last path is a pooling.

    paths: each a chain of (name, Conv); a list in the chain's last place splits it into several ends. pool: how the
    last path pools, "average" or "maximum"; after it comes `branch_pool`, a 1x1 convolution of `pool_channels`; with
    0 of them the pooling (always the maximum, stride 2) stands alone.
    """

    def __init__(self, inside: int, paths: Sequence[Sequence], pool: str = "maximum", pool_channels: int = 0):
        super().__init__()
        self.paths: list[list[list[str]]] = []
        self.pool, out = pool, pool_channels or inside
        for path in paths:
            width, chain = inside, []
            for step in path:
                ends = step if isinstance(step, list) else [step]
                for name, conv in ends:
                    self.add_module(name, ConvNorm(width, *conv))
                chain.append([name for name, _ in ends])
                width = sum(conv[0] for _, conv in ends)
            self.paths.append(chain)
            out += width
        if pool_channels:
            self.branch_pool = ConvNorm(inside, pool_channels, 1)
        self.stride = 1 if pool_channels else 2
        self.out = out

    def forward(self, x: Tensor) -> Tensor:
        found = []
        for chain in self.paths:
            y = x
            for names in chain:
                y = torch.cat([self.get_submodule(name)(y) for name in names], 1)
            found.append(y)
        if self.stride == 2:
            return torch.cat([*found, F.max_pool2d(x, 3, 2)], 1)
        if self.pool == "average":
            pooled = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        else:
            pooled = F.max_pool2d(x, 3, 1, 1)
        return torch.cat([*found, self.branch_pool(pooled)], 1)


def _dbl(first: int, second: int, third: Conv) -> list:
    return [("branch3x3dbl_1", (first, 1)), ("branch3x3dbl_2", (second, 3)), ("branch3x3dbl_3", third)]


def _mixed_5(inside: int, pool_channels: int) -> Mixed:
    fives = [("branch5x5_1", (48, 1)), ("branch5x5_2", (64, 5))]
    paths = [[("branch1x1", (64, 1))], fives, _dbl(64, 96, (96, 3))]
    return Mixed(inside, paths, "average", pool_channels)


def _mixed_6(inside: int, width: int) -> Mixed:
    row, column = (1, 7), (7, 1)
    sevens = [("branch7x7_1", (width, 1)), ("branch7x7_2", (width, row)), ("branch7x7_3", (192, column))]
    shapes = [(width, 1), (width, column), (width, row), (width, column), (192, row)]
    twice = [(f"branch7x7dbl_{k}", shape) for k, shape in enumerate(shapes, 1)]
    return Mixed(inside, [[("branch1x1", (192, 1))], sevens, twice], "average", 192)


def _mixed_7(inside: int, pool: str) -> Mixed:
    def ends(name: str) -> list:
        return [(f"{name}a", (384, (1, 3))), (f"{name}b", (384, (3, 1)))]

    threes = [("branch3x3_1", (384, 1)), ends("branch3x3_2")]
    twice = [("branch3x3dbl_1", (448, 1)), ("branch3x3dbl_2", (384, 3)), ends("branch3x3dbl_3")]
    return Mixed(inside, [[("branch1x1", (320, 1))], threes, twice], pool, 192)


def _mixed_7a(inside: int) -> Mixed:
    threes = [("branch3x3_1", (192, 1)), ("branch3x3_2", (320, 3, 2))]
    shapes: list[Conv] = [(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3, 2)]
    return Mixed(inside, [threes, [(f"branch7x7x3_{k}", shape) for k, shape in enumerate(shapes, 1)]])


class InceptionV3(nn.Module):
    """Pictures (N, 3, 299, 299), values (x − 128) / 128 of 0…255 → pooled features (N, 2048)."""

    size = 299

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = ConvNorm(3, 32, 3, 2)
        self.Conv2d_2a_3x3 = ConvNorm(32, 32, 3, padded=False)
        self.Conv2d_2b_3x3 = ConvNorm(32, 64, 3)
        self.Conv2d_3b_1x1 = ConvNorm(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvNorm(80, 192, 3, padded=False)
        width = 192
        self.blocks: list[str] = []

        def put(name: str, block: Mixed) -> None:
            nonlocal width
            self.add_module(f"Mixed_{name}", block)
            self.blocks.append(f"Mixed_{name}")
            width = block.out

        for name, pool_channels in (("5b", 32), ("5c", 64), ("5d", 64)):
            put(name, _mixed_5(width, pool_channels))
        put("6a", Mixed(width, [[("branch3x3", (384, 3, 2))], _dbl(64, 96, (96, 3, 2))]))
        for name, channels in (("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192)):
            put(name, _mixed_6(width, channels))
        put("7a", _mixed_7a(width))
        put("7b", _mixed_7(width, "average"))
        put("7c", _mixed_7(width, "maximum"))
        self.fc = nn.Linear(2048, 1008)  # never asked; it belongs to the public file

    def forward(self, x: Tensor) -> Tensor:
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))
        x = F.max_pool2d(x, 3, 2)
        for name in self.blocks:
            x = self.get_submodule(name)(x)
        return x.mean((2, 3))


# --------------------------------------------------------------------------------------------------- FaceNet


def _chain(inside: int, convs: Sequence[Conv]) -> nn.Module:
    steps = []
    for conv in convs:
        steps.append(ConvNorm(inside, *conv))
        inside = conv[0]
    return steps[0] if len(steps) == 1 else nn.Sequential(*steps)


class Residual(nn.Module):
    """x + scale · conv1x1(branches of x), then ReLU unless it is the last one."""

    def __init__(self, width: int, branches: Branches, scale: float, *, last: bool = False):
        super().__init__()
        self.count, self.scale, self.last = len(branches), scale, last
        for k, convs in enumerate(branches):
            self.add_module(f"branch{k}", _chain(width, convs))
        self.conv2d = nn.Conv2d(sum(convs[-1][0] for convs in branches), width, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([self.get_submodule(f"branch{k}")(x) for k in range(self.count)], 1)
        x = x + self.scale * self.conv2d(y)
        return x if self.last else F.relu(x)


class Reduction(nn.Module):
    """Branches that halve the picture, and beside them a maximum pooling."""

    def __init__(self, width: int, branches: Branches):
        super().__init__()
        self.count = len(branches)
        for k, convs in enumerate(branches):
            self.add_module(f"branch{k}", _chain(width, convs))

    def forward(self, x: Tensor) -> Tensor:
        found = [self.get_submodule(f"branch{k}")(x) for k in range(self.count)]
        return torch.cat([*found, F.max_pool2d(x, 3, 2)], 1)


class FaceNet(nn.Module):
    """Faces (N, 3, 160, 160), values (x − 127.5) / 128 of 0…255 → embeddings (N, 512) of length 1."""

    size = 160

    def __init__(self, people: int = 8631) -> None:
        super().__init__()
        row, column = (128, (1, 7)), (128, (7, 1))
        block35: Branches = [[(32, 1)], [(32, 1), (32, 3)], [(32, 1), (32, 3), (32, 3)]]
        block17: Branches = [[(128, 1)], [(128, 1), row, column]]
        block8: Branches = [[(192, 1)], [(192, 1), (192, (1, 3)), (192, (3, 1))]]
        self.conv2d_1a = ConvNorm(3, 32, 3, 2)
        self.conv2d_2a = ConvNorm(32, 32, 3, padded=False)
        self.conv2d_2b = ConvNorm(32, 64, 3)
        self.conv2d_3b = ConvNorm(64, 80, 1)
        self.conv2d_4a = ConvNorm(80, 192, 3, padded=False)
        self.conv2d_4b = ConvNorm(192, 256, 3, 2)
        self.repeat_1 = nn.Sequential(*(Residual(256, block35, 0.17) for _ in range(5)))
        sixes: Branches = [[(384, 3, 2)], [(192, 1), (192, 3), (256, 3, 2)]]
        self.mixed_6a = Reduction(256, sixes)
        self.repeat_2 = nn.Sequential(*(Residual(896, block17, 0.10) for _ in range(10)))
        sevens: Branches = [[(256, 1), (384, 3, 2)], [(256, 1), (256, 3, 2)], [(256, 1), (256, 3), (256, 3, 2)]]
        self.mixed_7a = Reduction(896, sevens)
        self.repeat_3 = nn.Sequential(*(Residual(1792, block8, 0.20) for _ in range(5)))
        self.block8 = Residual(1792, block8, 1.0, last=True)
        self.last_linear = nn.Linear(1792, 512, bias=False)
        self.last_bn = nn.BatchNorm1d(512, eps=1e-3)
        self.logits = nn.Linear(512, people)  # never asked; it belongs to the public file

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.conv2d_2b(self.conv2d_2a(self.conv2d_1a(x))), 3, 2)
        x = self.conv2d_4b(self.conv2d_4a(self.conv2d_3b(x)))
        x = self.repeat_2(self.mixed_6a(self.repeat_1(x)))
        x = self.block8(self.repeat_3(self.mixed_7a(x))).mean((2, 3))
        return F.normalize(self.last_bn(self.last_linear(x)))


# --------------------------------------------------------------------------------------------------- reading


def read_weights(net: nn.Module, file: Path, what: str) -> nn.Module:
    """`net` with the weights of a .pt, .pth or .safetensors file, in evaluation mode. `what`: their name in words.

    Raises InputError where the file is missing, unreadable, or of a net of another form.
    """
    if not file.is_file():
        raise InputError(f"There is no file '{file.name}' with {what}: give its path.")
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(file)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
        state = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    except Exception as error:  # whatever a damaged or foreign file raises
        raise InputError(f"'{file.name}' cannot be read as {what} ({type(error).__name__}): fetch it again.") from error
    own = net.state_dict()
    counters = {name for name in own if name.endswith("num_batches_tracked")}  # older files lack them
    odd = [name for name in (own.keys() ^ state.keys()) if name not in counters]
    odd += [name for name in own.keys() & state.keys() if own[name].shape != state[name].shape]
    if odd:
        raise InputError(f"'{file.name}' does not hold {what}: {len(odd)} tensors differ, such as '{min(odd)}'.")
    net.load_state_dict(state, strict=False)
    return net.eval().requires_grad_(False)

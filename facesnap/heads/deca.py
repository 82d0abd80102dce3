"""DECA (Feng et al., SIGGRAPH 2021): FLAME's coefficients, pose and camera, read from a picture by one network.

This is the paper's way to a head: no landmarks are fitted, they only say where the face is. The picture's window
(`window`) is scaled to 224², RGB in [0, 1]; a ResNet-50 and two layers give 236 numbers (`CODES`), of which texture
and light are not needed for landmarks. Its camera is orthographic: s · (X + t) in units of half the window.

The weights are its authors' (non-commercial); `python -m facesnap.heads convert flame --deca` takes them over.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from scipy.spatial.transform import Rotation
from torch import Tensor, nn
from torch.nn import functional as F

from facesnap.errors import InputError
from facesnap.heads.flame import NUM_EXPRESSION, NUM_SHAPE, FlameHeadModel
from facesnap.heads.model import Head
from facesnap.heads.unpickle import load_torch

if TYPE_CHECKING:
    from facesnap.faces import Face

ENCODER_NAME = "encoder.safetensors"
SIZE = 224
CODES = {"shape": NUM_SHAPE, "tex": 50, "exp": NUM_EXPRESSION, "pose": 6, "cam": 3, "light": 27}
AROUND = 1.1 * 1.25  # the window's side in means of width and height of the landmarks


class Bottleneck(nn.Module):
    """1 × 1, 3 × 3, 1 × 1 convolutions and a way around them."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
        self.downsample: nn.Module = nn.Identity()
        if stride > 1 or inputs != 4 * width:
            around = nn.Conv2d(inputs, 4 * width, 1, stride, bias=False)
            self.downsample = nn.Sequential(around, nn.BatchNorm2d(4 * width))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + self.downsample(x))


class ResNet(nn.Module):
    """ResNet (He et al., 2016) without its last layer: (N, 3, 224, 224) → (N, 32 · width). 50 layers by default."""

    def __init__(self, width: int = 64, blocks: Sequence[int] = (3, 4, 6, 3)) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        inputs = width
        for stage, count in enumerate(blocks):
            layers = []
            for block in range(count):
                layers.append(Bottleneck(inputs, width << stage, 2 if stage > 0 and block == 0 else 1))
                inputs = 4 * (width << stage)
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layers))

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, padding=1)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
        return x.mean(dim=(2, 3))


class DecaEncoder(nn.Module):
    """Pictures (N, 3, 224, 224) in [0, 1] → `CODES`, each (N, ·). Laid out as DECA's `E_flame`."""

    def __init__(self, width: int = 64, blocks: Sequence[int] = (3, 4, 6, 3), hidden: int = 1024) -> None:
        super().__init__()
        self.encoder = ResNet(width, blocks)
        self.layers = nn.Sequential(nn.Linear(32 * width, hidden), nn.ReLU(), nn.Linear(hidden, sum(CODES.values())))

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        parts = self.layers(self.encoder(pictures)).split(list(CODES.values()), dim=1)
        return dict(zip(CODES, parts, strict=True))

    @classmethod
    def from_state(cls, state: dict[str, Tensor], source: str) -> "DecaEncoder":
        """The encoder of a state dict, whose shapes tell the sizes; InputError unless every key fits."""
        try:
            names = [key.split(".") for key in state]  # encoder.layer1.0.conv1.weight
            blocks = [len({name[2] for name in names if name[1] == f"layer{stage}"}) for stage in range(1, 5)]
            encoder = cls(len(state["encoder.conv1.weight"]), blocks, len(state["layers.0.weight"]))
            encoder.load_state_dict(state)
        except (KeyError, IndexError, RuntimeError, AttributeError, TypeError) as error:
            what = str(error).splitlines()[-1].strip()[:200]  # one line for each kind of misfit
            raise InputError(f"{source} does not hold DECA's encoder: {what}") from error
        return encoder.eval().requires_grad_(False)


@dataclass(frozen=True, eq=False)
class DecaHeadModel(FlameHeadModel):
    """FLAME whose heads are read from pictures. Where only landmarks are at hand, `fit` still fits it to them."""

    encoder: DecaEncoder = field(kw_only=True)
    name: str = "FLAME by DECA"
    reads_pictures: ClassVar[bool] = True

    @classmethod
    def around(cls, flame: FlameHeadModel, encoder: DecaEncoder) -> "DecaHeadModel":
        parts = {part.name: getattr(flame, part.name) for part in fields(flame) if part.name != "name"}
        return cls(**parts, encoder=encoder)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "DecaHeadModel":
        state = load_file(Path(folder) / ENCODER_NAME)
        return cls(**cls._saved(Path(folder)), encoder=DecaEncoder.from_state(state, ENCODER_NAME))

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes config.json, model.safetensors and encoder.safetensors."""
        super().save_pretrained(folder)
        save_file(self.encoder.state_dict(), Path(folder) / ENCODER_NAME)

    def reconstruct(self, faces: "Sequence[Face]") -> list[Head]:
        """Faces, all of one person, → a Head for each; the identity is the mean of what each picture says.

        Raises InputError for a face that was kept without its picture.
        """
        windows = [window(face.landmarks) for face in faces]
        crops = [crop(_picture(face), *place) for face, place in zip(faces, windows, strict=True)]
        with torch.no_grad():
            codes = {name: code.double().numpy() for name, code in self.encoder(torch.cat(crops)).items()}
        identity = codes["shape"].mean(axis=0)
        return [
            self._head(identity, {name: code[n] for name, code in codes.items()}, *windows[n], face.size)
            for n, face in enumerate(faces)
        ]

    def _head(
        self, identity: np.ndarray, code: dict[str, np.ndarray], corner: np.ndarray, side: int, size: tuple[int, int]
    ) -> Head:
        """One picture's codes and window → the head in that picture.

        DECA turns the head about its root joint and adds t; we turn it about the model's origin and then place
        it, which is the same once the root's way is part of the place. (p + 1) · 112 maps DECA's frame to the
        window's 224 pixels, of which the similarity transform, however, counts the steps between centres, 223.
        """
        rotation = Rotation.from_rotvec(code["pose"][:3]).as_matrix()
        expression = np.concatenate([code["exp"], code["pose"][3:]])
        root = self.root(identity, expression)
        scale, shift = code["cam"][0], code["cam"][1:]
        place = scale * ((root - rotation @ root)[:2] + shift) * [1, -1]
        pixel = side / (SIZE - 1)  # of the picture in one of the window
        return Head(
            identity=identity.astype(np.float32),
            expression=expression.astype(np.float32),
            rotation=rotation,
            scale=float(scale * SIZE / 2 * pixel),
            translation=(place + 1) * SIZE / 2 * pixel + corner,
            size=(int(size[0]), int(size[1])),
        )


def window(points: np.ndarray) -> tuple[np.ndarray, int]:
    """Landmarks (N, 2+) → the corner (2,) and side, in pixels, of the square that DECA looks at."""
    low, high = points[:, :2].min(axis=0), points[:, :2].max(axis=0)
    extent = (high - low).mean() * AROUND
    return (low + high) / 2 - int(extent) / 2, int(extent)


def crop(picture: np.ndarray, corner: np.ndarray, side: int) -> Tensor:
    """RGB uint8 (H, W, 3) and a window of it → (1, 3, 224, 224) in [0, 1], bilinear, black where the picture ends.

    The centre of the first pixel is the corner, that of the last is a side further (DECA's similarity transform).
    """
    # Only the part of the picture that is seen is copied, whatever the picture's size.
    low = np.clip(np.floor(corner).astype(int), 0, np.array(picture.shape[1::-1]) - 1)
    high = np.clip(np.ceil(corner + side).astype(int) + 1, low + 1, picture.shape[1::-1])
    part = picture[low[1] : high[1], low[0] : high[0]]
    pixels = torch.from_numpy(part.astype(np.float32) / 255).permute(2, 0, 1)[None]
    at = [torch.from_numpy(corner[axis] - low[axis] + np.arange(SIZE) * side / (SIZE - 1)) for axis in (0, 1)]
    # grid_sample counts in units in which the part's outer edges are ±1
    x, y = ((2 * place + 1) / length - 1 for place, length in zip(at, (part.shape[1], part.shape[0]), strict=True))
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)[None].float()
    return F.grid_sample(pixels, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def read_encoder(path: Path) -> DecaEncoder:
    """deca_model.tar → the encoder. Raises InputError where it is damaged, incomplete or names what it must not."""
    loaded = load_torch(path)
    if not isinstance(loaded, dict) or not isinstance(loaded.get("E_flame"), dict):
        raise InputError(f"{path.name} has no E_flame: give DECA's deca_model.tar.")
    return DecaEncoder.from_state(loaded["E_flame"], path.name)


def _picture(face: "Face") -> np.ndarray:
    if face.image is None:
        raise InputError("The head model reads pictures, and the face was kept without one: analyse its photo again.")
    return face.image

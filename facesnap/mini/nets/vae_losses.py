"""What the mini's VAE is asked for beside pixels: the face as trained eyes see it, and texture as a critic knows it.

Pixel losses alone leave an autoencoder soft, since the mean of all textures that fit is the safest answer.
`FaceFeatures` compares what recogniser A and the face encoder read in both pictures; `PatchCritic` learns to tell
decoded patches from true ones (VQGAN, arXiv 2012.09841), and its activations are compared as well (pix2pixHD,
arXiv 1711.11585).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from transformers import CLIPVisionModel

from facesnap.clip import CLIP_MEAN, CLIP_STD
from facesnap.training.identity import crop_faces, crop_to_picture
from facesnap.training.iresnet import IResNet


class FaceFeatures(nn.Module):
    """How far two pictures of one face are apart for frozen nets: 0 where they read the same.

    recogniser: on ArcFace's crop; 1 − cos of its embeddings. face_encoder: on the picture as it is, whatever of the
    face it shows; squared distance of its penultimate hidden states, relative to their variance.
    """

    def __init__(self, recogniser: nn.Module, face_encoder: CLIPVisionModel) -> None:
        super().__init__()
        self.recogniser = recogniser.requires_grad_(False).eval()
        self.face_encoder = face_encoder.requires_grad_(False).eval()
        self.register_buffer("mean", torch.tensor(CLIP_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(CLIP_STD).view(1, 3, 1, 1), persistent=False)

    @classmethod
    def from_folder(cls, folder: Path) -> FaceFeatures:
        """By the recogniser and the face encoder of a checkpoint, or of a work folder, which has the same places."""
        encoder = CLIPVisionModel.from_pretrained(folder / "face_encoder", dtype=torch.float32, use_safetensors=True)
        return cls(IResNet.from_onnx(folder / "face_pack" / "recogniser.onnx"), encoder)

    def forward(self, decoded: Tensor, images: Tensor, keypoints: np.ndarray) -> tuple[Tensor, Tensor]:
        """Pictures (B, 3, H, W) in [−1, 1], their five points (B, 5, 2) in pixels, which may lie outside."""
        matrices = crop_to_picture(keypoints.astype(np.float64))
        with torch.no_grad():
            wanted, states = self.recogniser(crop_faces(images, matrices)), self._states(images)
        found = self.recogniser(crop_faces(decoded, matrices))
        apart = 1 - F.cosine_similarity(found.float(), wanted.float(), dim=-1).mean()
        distance = (self._states(decoded) - states).square().mean() / states.var()
        return apart, distance

    def _states(self, pictures: Tensor) -> Tensor:
        side = self.face_encoder.config.image_size
        pixels = (F.interpolate(pictures, (side, side), mode="bilinear", antialias=True) + 1) / 2
        return self.face_encoder((pixels - self.mean) / self.std, output_hidden_states=True).hidden_states[-2].float()


class PatchCritic(nn.Module):
    """Two nets of convolutions: one sees fine texture at full size, one patches of a fifth of the crop."""

    def __init__(self) -> None:
        super().__init__()
        self.nets = nn.ModuleList(
            [
                _convolutions((3, 24, 3, 1), (24, 32, 4, 2), (32, 48, 3, 1), (48, 1, 3, 1)),
                _convolutions((3, 32, 4, 2), (32, 64, 4, 2), (64, 96, 4, 2), (96, 1, 3, 1)),
            ]
        )

    def forward(self, pictures: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Pictures (B, 3, H, W) in [−1, 1] → a map of scores and the hidden layers of each net."""
        scores, hidden = [], []
        for net in self.nets:
            x = pictures
            for layer in net[:-1]:
                x = F.leaky_relu(layer(x), 0.2)
                hidden.append(x)
            scores.append(net[-1](x))
        return scores, hidden

    def judge(self, decoded: Tensor, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The decoder's loss, the distance of the hidden layers, and the critic's own hinge loss.

        All three may be added and sent back at once: of the first two the critic's weights learn nothing, of the third
        the decoder does not.
        """
        on_true, wanted = self(images)
        on_decoded, _ = self(decoded.detach())
        self.requires_grad_(False)
        scores, hidden = self(decoded)
        self.requires_grad_(True)
        fooled = -sum(score.float().mean() for score in scores) / len(scores)
        apart = [(h.float() - w.detach().float()).abs().mean() for h, w in zip(hidden, wanted, strict=True)]
        distance = sum(apart) / len(apart)
        own = sum(
            F.relu(1 - true.float()).mean() + F.relu(1 + false.float()).mean()
            for true, false in zip(on_true, on_decoded, strict=True)
        ) / len(on_true)
        return fooled, distance, own


def _convolutions(*layers: tuple[int, int, int, int]) -> nn.ModuleList:
    """Layers (channels in, channels out, kernel, stride), all but the first of spectral norm 1."""
    made = [nn.Conv2d(i, o, kernel, stride, padding=(kernel - 1) // 2) for i, o, kernel, stride in layers]
    return nn.ModuleList([made[0], *(spectral_norm(layer) for layer in made[1:])])

"""FID and KID, by torchmetrics' classes on features that we extract.

With the public Inception weights the figures are FID (Heusel et al. 2017) and KID (Binkowski et al. 2018), pictures
resized as clean-fid does (Parmar et al. 2022: Pillow, bicubic, antialiased). Without them the features are those of
the checkpoint's face encoder, of the whole picture, and the figures are called FD-mini and KD-mini: they order
methods on one set of pictures, and mean nothing beside anybody's FID.

FID depends on the number of pictures: compare only figures of equally many. For 2048 features take 2048 or more.
"""

import hashlib
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance
from transformers import CLIPVisionModel

from facesnap.clip import face_pixels
from facesnap.errors import InputError, reading
from facesnap.evaluation.inception import InceptionV3, read_weights
from facesnap.provenance import fingerprint

SUBSET, SUBSETS = 1000, 100  # of KID, as in its paper; half of the pictures where there are fewer


class Extractor(Protocol):
    """names: what the two distances of its features are called; about: which weights."""

    names: tuple[str, str]
    about: str

    def features(self, picture: np.ndarray) -> np.ndarray:
        """RGB uint8 (H, W, 3) → (D,)."""
        ...


class InceptionFeatures:
    names = ("FID", "KID")

    def __init__(self, weights: Path, device: str = "cpu"):
        self.net = read_weights(InceptionV3(), weights, "the Inception weights of FID").to(device)
        digest = hashlib.sha256(weights.read_bytes()).hexdigest()[:12]
        self.device, self.about = device, f"{weights.name}, {digest}"

    @torch.no_grad()
    def features(self, picture: np.ndarray) -> np.ndarray:
        size = (InceptionV3.size, InceptionV3.size)
        # each channel as floats, which Pillow does not round
        channels = [Image.fromarray(c).resize(size, Image.Resampling.BICUBIC) for c in picture.astype("f4").T]
        pixels = torch.from_numpy(np.stack([np.asarray(c).T for c in channels])).to(self.device)
        return self.net((pixels[None].clamp(0, 255) - 128) / 128)[0].cpu().numpy()


class EncoderFeatures:
    """The face encoder's penultimate states of the whole picture, their mean over the patches."""

    names = ("FD-mini", "KD-mini")

    def __init__(self, folder: Path, device: str = "cpu"):
        with reading(f"The face_encoder of '{folder.parent.name}'"):
            self.net = (
                CLIPVisionModel.from_pretrained(folder, dtype=torch.float32, use_safetensors=True).to(device).eval()
            )
        self.device, self.about = device, f"face_encoder of {folder.parent.name}, {fingerprint(folder)}"

    @torch.no_grad()
    def features(self, picture: np.ndarray) -> np.ndarray:
        pixels = face_pixels(picture[None], self.net.config.image_size).to(self.device)
        states = self.net(pixels, output_hidden_states=True).hidden_states[-2][0, 1:]
        # normed, as every layer reads them: else a few channels of huge values are all that counts
        return nn.functional.layer_norm(states, states.shape[-1:]).mean(0).cpu().numpy()


class Given(nn.Module):
    """Stands where torchmetrics expects the net: what comes in are the features already."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


def distances(real: np.ndarray, made: np.ndarray, *, seed: int = 0) -> tuple[float, float, float]:
    """Features (N, D) and (M, D) → (FID, KID, deviation of KID over its subsets).

    Raises InputError for fewer than 2 pictures on a side: no covariance can be told from them.
    """
    fewest = min(len(real), len(made))
    if fewest < 2:
        raise InputError(
            f"FID needs at least 2 pictures on each side, and there are {len(real)} real and {len(made)} made ones."
        )
    given = Given(real.shape[1])
    # the first process has the features of all and computes alone: the others must not be waited for
    options = {"feature": given, "sync_on_compute": False}
    fid = FrechetInceptionDistance(**options)
    kid = KernelInceptionDistance(**options, subset_size=min(SUBSET, max(2, fewest // 2)), subsets=SUBSETS)
    for features, is_real in ((real, True), (made, False)):
        # KID's third powers overflow nothing in doubles, and FID's square root loses less
        tensor = torch.from_numpy(np.asarray(features, np.float64))
        fid.update(tensor, real=is_real)
        kid.update(tensor, real=is_real)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mean, deviation = kid.compute()
    return float(fid.compute()), float(mean), float(deviation)

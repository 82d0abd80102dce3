"""What the face encoder, a CLIP vision model, is shown of a face and what it says."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

# OpenAI's CLIP and all its kin, our own face encoder included, are trained on pictures normalised like this
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
LUMA = (0.299, 0.587, 0.114)  # how much of each colour is brightness (ITU-R BT.601)


def face_pixels(crops: np.ndarray | Tensor, size: int, saturation: float = 1.0) -> Tensor:
    """Face crops (N, H, W, 3) uint8 → the face encoder's input (N, 3, size, size), normalised as CLIP's; `saturation`
    below 1 makes them paler, 0 gray."""
    pixels = torch.as_tensor(crops).permute(0, 3, 1, 2).float() / 255
    if saturation != 1:
        gray = (pixels * pixels.new_tensor(LUMA).view(1, 3, 1, 1)).sum(1, keepdim=True)
        pixels = (gray + saturation * (pixels - gray)).clamp(0, 1)
    if pixels.shape[-1] != size:
        pixels = F.interpolate(pixels, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
    mean, std = (pixels.new_tensor(values).view(1, 3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return (pixels - mean) / std


def face_features(encoder: Any, crops: np.ndarray, device: torch.device, saturation: float = 1.0) -> Tensor:
    """The encoder's penultimate hidden states (N, P, C) of face crops (N, H, W, 3) uint8, float32 on a device."""
    pixels = face_pixels(crops, encoder.config.image_size, saturation).to(device, encoder.dtype)
    return encoder(pixels, output_hidden_states=True).hidden_states[-2].float()

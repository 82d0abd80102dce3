"""Memory modes: where a pipeline's weights lie while it works, from everything on the GPU to 8 GB cards.

    full       all on the device.
    balanced   on the GPU while they work: whole components come and go. Exact; costs transfers at every picture.
    low        UNet and FFRNet, which run at every step, are stored in 8-bit floats and cast layer by layer; the
               rest lies in the machine's memory and comes layer by layer; the VAE decodes in tiles of 512². Slower, and
               not exact: the weights are rounded, the tiles blended.

On a CPU there is one memory, so there is nothing to move: "balanced" is refused there, and "low" means the 8-bit
floats and the tiles only. "low" cannot be left again, since the rounded weights stay rounded: load anew.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import psutil
import torch
from diffusers.hooks import apply_group_offloading
from torch import nn

from facesnap.errors import InputError, did_you_mean, shown

Mode = Literal["full", "balanced", "low"]
MODES: tuple[Mode, ...] = get_args(Mode)

# What a portrait of 1024² needs beside the weights: the activations of a guided step, or of the VAE. It is what the
# full mode's 15 GB leave over the 10.7 GB of SDXL's, FFRNet's and ViT-H's weights, and it grows with the picture.
WORKING_SPACE = 4.3e9

# Side of the VAE's tiles in the "low" mode. Decoding 1024² in float32, as SDXL's own VAE must, then holds 0.82 GB of
# tensors at once instead of 3.22 (a test counts them).
TILE = 512


def default_device() -> torch.device:
    """CUDA where there is any, else Apple's GPU, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def device_of(device: Any = None) -> torch.device:
    """A device by its name, `default_device` where None. InputError for what is none, or is not in this machine."""
    try:
        target = default_device() if device is None else torch.device(device)
    except (RuntimeError, TypeError):
        raise InputError(f"There is no device {shown(device)!r}; give cpu, cuda or mps.") from None
    here = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}.get(target.type)
    if here is not None and not here():
        raise InputError(f"This machine, or its PyTorch, has no device {str(target)!r}; give cpu, or leave it out.")
    return target


def set_memory(pipe: Any, mode: str | None = None, device: str | torch.device | None = None) -> Mode:
    """Bring a pipeline to a device in a memory mode; returns the mode.

    Args:
        pipe: a FaceSnapPipeline. LoRAs must be loaded before "low": those loaded later are not cast.
        mode: one of `MODES`; by default the first that fits the free memory.
        device: by default CUDA, Apple's GPU or the CPU, whichever there is.

    Raises:
        InputError: there is no such mode, or it cannot be had on this device or after "low".
    """
    target = device_of(device)
    current = getattr(pipe, "memory", None)
    chosen = check_mode(mode, target) if mode else current if current == "low" else choose(pipe, target)
    if current == "low":
        if chosen == "low":
            return "low"
        raise InputError(f"Memory mode 'low' has rounded the weights to 8 bits; load the model again for '{chosen}'.")

    pipe.remove_all_hooks()
    if chosen == "full":
        pipe.to(target)
    elif chosen == "balanced":
        pipe.enable_model_cpu_offload(device=target)
    else:
        lower(pipe, target, offload=target.type != "cpu")
    pipe.memory = chosen
    return chosen


def lower(pipe: Any, device: torch.device, offload: bool) -> None:
    """Bring a pipeline to a device in mode "low"; offload: what runs once a picture stays in the machine's memory."""
    for name, module in _modules(pipe).items():
        if name in pipe.every_step:
            module.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=module.dtype)
            module.to(device)
        elif offload:
            # Without CUDA streams: these keep copies of the weights, which a VAE that is upcast to decode outruns
            apply_group_offloading(module, onload_device=device, offload_type="leaf_level")
    tile(pipe.vae)


def offload_to_disk(pipe: Any, folder: Path, exclude: Sequence[str] = (), **options: Any) -> None:
    """Every part's groups of layers into a folder of its own below `folder`. diffusers names the files by the layers
    alone, and those of two text encoders, or of UNet and FFRNet, are called alike.

    exclude: parts that stay on the device. options: of diffusers' `apply_group_offloading`.

    Raises:
        InputError: `folder` is a file, or holds weights already, which diffusers would take for this pipeline's.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError("The place for offloaded weights is a file; give a folder.")
    if any(folder.glob("*/group_*.safetensors")):
        raise InputError("The folder for offloaded weights holds some already, maybe of another model; empty it first.")
    for name, module in _modules(pipe).items():
        if name in exclude:
            module.to(options["onload_device"])
        else:
            apply_group_offloading(module, offload_to_disk_path=str(folder / name), **options)


def tile(vae: Any) -> None:
    """Tiles of at most `TILE` pixels; diffusers' own are as large as the pictures that the VAE was made for."""
    vae.enable_tiling()
    vae.tile_sample_min_size = min(TILE, vae.tile_sample_min_size)
    vae.tile_latent_min_size = vae.tile_sample_min_size // 2 ** (len(vae.config.block_out_channels) - 1)


def check_mode(mode: str, device: torch.device) -> Mode:
    if mode not in MODES:
        raise InputError(f"There is no memory mode '{mode}'; {did_you_mean(mode, MODES)}")
    if mode == "balanced" and device.type == "cpu":
        raise InputError(
            "Memory mode 'balanced' moves components between a GPU and the machine's memory, and there is no GPU "
            "here; use 'full' or, for 8-bit weights, 'low'."
        )
    return mode  # type: ignore[return-value]


def choose(pipe: Any, device: torch.device) -> Mode:
    """The first mode that fits the device's free memory, by the size of the weights and of the portraits."""
    if os.environ.get("SPACES_ZERO_GPU"):
        return "full"  # ZeroGPU packs what lies on "cuda" at start-up, before there is a card to ask
    weights = {name: _bytes(module) for name, module in _modules(pipe).items()}
    work = WORKING_SPACE * (pipe.settings.size / 1024) ** 2
    free = free_memory(device)
    if device.type == "cpu":  # the weights are in its memory already
        return "full" if work <= free else "low"
    if sum(weights.values()) + work <= free:
        return "full"
    resident = sum(weights[name] for name in pipe.every_step if name in weights)
    return "balanced" if resident + work <= free else "low"


def free_memory(device: torch.device) -> int:
    """Bytes. What PyTorch's own cache holds counts as free."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return psutil.virtual_memory().available  # an Apple GPU shares the machine's


def _modules(pipe: Any) -> dict[str, nn.Module]:
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


def _bytes(module: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in (*module.parameters(), *module.buffers()))

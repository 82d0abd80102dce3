"""InstantID's public files at a tiny size, with random weights: ip-adapter.bin and ControlNetModel."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import ControlNetModel, EulerDiscreteScheduler
from tiny import SIZE, TOKEN_DIM, tiny_pipeline, tiny_unet, tiny_vae

from facesnap.face_adapter import FaceAdapter
from facesnap.folder import Settings
from facesnap.instantid import InstantIDPipeline

WIDTH, HEADS, DEPTH, TOKENS = 128, 2, 3, 5


def adapter_state(unet) -> dict[str, dict[str, torch.Tensor]]:
    """The content of ip-adapter.bin, in InstantID's names."""
    torch.manual_seed(21)

    def linear(outputs: int, inputs: int) -> torch.Tensor:
        return torch.randn(outputs, inputs) / inputs**0.5

    def norm(name: str, width: int) -> dict[str, torch.Tensor]:
        return {f"{name}.weight": 1 + 0.2 * torch.randn(width), f"{name}.bias": 0.2 * torch.randn(width)}

    state = {"latents": torch.randn(1, TOKENS, WIDTH)}
    for name, outputs, inputs in (("proj_in", WIDTH, 512), ("proj_out", TOKEN_DIM, WIDTH)):
        state |= {f"{name}.weight": linear(outputs, inputs), f"{name}.bias": 0.2 * torch.randn(outputs)}
    state |= norm("norm_out", TOKEN_DIM)
    for k in range(DEPTH):
        layer = f"layers.{k}"
        state |= norm(f"{layer}.0.norm1", WIDTH) | norm(f"{layer}.0.norm2", WIDTH) | norm(f"{layer}.1.0", WIDTH)
        state[f"{layer}.0.to_q.weight"] = linear(64 * HEADS, WIDTH)
        state[f"{layer}.0.to_kv.weight"] = linear(2 * 64 * HEADS, WIDTH)
        state[f"{layer}.0.to_out.weight"] = linear(WIDTH, 64 * HEADS)
        state[f"{layer}.1.1.weight"] = linear(4 * WIDTH, WIDTH)
        state[f"{layer}.1.3.weight"] = linear(WIDTH, 4 * WIDTH)
    attention = {}
    for k, name in enumerate(unet.attn_processors):
        if name.endswith("attn2.processor"):
            hidden = unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
            attention |= {f"{k}.to_{kind}_ip.weight": linear(hidden, TOKEN_DIM) for kind in "kv"}
    return {"image_proj": state, "ip_adapter": attention}


def tiny_controlnet(unet) -> ControlNetModel:
    torch.manual_seed(22)
    controlnet = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 4, 4, 8)).eval()
    for parameter in (
        *controlnet.controlnet_down_blocks.parameters(),
        *controlnet.controlnet_mid_block.parameters(),
        *controlnet.controlnet_cond_embedding.parameters(),
    ):
        torch.nn.init.normal_(parameter, std=0.3)
    return controlnet


def write_instantid(folder: Path, unet) -> Path:
    """ip-adapter.bin and ControlNetModel/, as on the Hub."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(adapter_state(unet), folder / "ip-adapter.bin")
    tiny_controlnet(unet).save_pretrained(folder / "ControlNetModel")
    return folder


def tiny_instantid(folder: Path) -> InstantIDPipeline:
    """A tiny SDXL (8x VAE, 4 latent channels) with InstantID's files on it."""
    unet = tiny_unet(4)
    base = tiny_pipeline(
        unet=unet,
        vae=tiny_vae(4, 4),
        ffrnet=None,
        mixer=None,
        face_encoder=None,
        scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear"),
    )
    write_instantid(folder, unet)
    pipe = InstantIDPipeline.from_pipe(
        base,
        mixer=FaceAdapter.from_instantid(folder / "ip-adapter.bin", unet),
        ffrnet=ControlNetModel.from_pretrained(folder / "ControlNetModel").eval(),
    )
    pipe.settings = Settings(name="tiny InstantID", kind="instantid", size=SIZE, steps=2, guidance=3.0)
    pipe.set_progress_bar_config(disable=True)
    return pipe

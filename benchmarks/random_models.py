"""FaceSnaps with random weights, at SDXL's size and at a small one: costs do not depend on what weights hold."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPVisionConfig, CLIPVisionModel

from facesnap.ffrnet import FFRNet
from facesnap.mini.nets.tokenizer import train_tokenizer
from facesnap.mixer import FacialAttributeMixer
from facesnap.pipeline import FaceSnapPipeline

PROMPT = "a photo of a person in a red jacket, by the sea"
TOKENS = 16  # that carry a face


@dataclass(frozen=True)
class Size:
    """Widths of everything. SDXL's are those of its published configurations."""

    side: int  # of the portrait, pixels
    unet: tuple[int, int, int]
    time_embedding: int
    vae: tuple[int, int, int, int]
    text: tuple[int, int]  # widths of the two text encoders
    text_layers: tuple[int, int]
    face: int  # width of the face encoder
    face_layers: int
    face_side: int  # of its picture, pixels
    mixer: int
    depths: tuple[int, int, int] = (1, 2, 10)  # of the UNet's transformers


SIZES = {
    "sdxl": Size(1024, (320, 640, 1280), 256, (128, 256, 512, 512), (768, 1280), (12, 32), 1280, 32, 224, 1280),
    # a fifth of the widths at an eighth of the side: about 1/1600 of the work; as many steps and blocks in the UNet
    "small": Size(128, (64, 128, 256), 64, (32, 64, 128, 128), (128, 256), (2, 2), 256, 2, 112, 256),
}


def make_unet(size: Size) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=size.side // 8,
        block_out_channels=size.unet,
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=size.depths,
        attention_head_dim=tuple(width // 64 for width in size.unet),
        cross_attention_dim=sum(size.text),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=size.time_embedding,
        projection_class_embeddings_input_dim=size.text[1] + 6 * size.time_embedding,
    )


def make_vae(size: Size) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=size.vae,
        layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        sample_size=size.side,
        scaling_factor=0.13025,
        force_upcast=False,
    )


def make_text_encoder(size: Size, which: int, eos: int) -> CLIPTextModel:
    width = size.text[which]
    config = CLIPTextConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=size.text_layers[which],
        num_attention_heads=width // 64,
        projection_dim=width,
        hidden_act=("quick_gelu", "gelu")[which],
        eos_token_id=eos,
    )
    return (CLIPTextModel, CLIPTextModelWithProjection)[which](config)


def make_face_encoder(size: Size) -> CLIPVisionModel:
    return CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=size.face,
            intermediate_size=4 * size.face,
            num_hidden_layers=size.face_layers,
            num_attention_heads=16,
            image_size=size.face_side,
            patch_size=14,
            hidden_act="gelu",
        )
    )


def make_pipeline(size: Size, device: str, dtype: torch.dtype) -> FaceSnapPipeline:
    """FaceSnap with random weights, without the parts that read photos; on the device "meta" without weights."""
    tokenizer = train_tokenizer([PROMPT])
    tokenizer.model_max_length = 77
    torch.manual_seed(0)
    with torch.device(device), default_dtype(dtype):  # never at float32 first, which would be twice the memory
        unet = make_unet(size)
        modules: dict[str, nn.Module] = {
            "unet": unet,
            "vae": make_vae(size),
            "text_encoder": make_text_encoder(size, 0, tokenizer.eos_token_id),
            "text_encoder_2": make_text_encoder(size, 1, tokenizer.eos_token_id),
            "ffrnet": FFRNet.from_unet(unet, load_weights_from_unet=False),
            "face_encoder": make_face_encoder(size),
            "mixer": FacialAttributeMixer(
                clip_dim=size.face,
                width=size.mixer,
                heads=size.mixer // 64,
                num_tokens=TOKENS,
                token_dim=sum(size.text),
                pooled_dim=size.text[1],
            ),
        }
    scheduler = DPMSolverMultistepScheduler(beta_schedule="scaled_linear", algorithm_type="sde-dpmsolver++")
    pipe = FaceSnapPipeline(
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        scheduler=scheduler,
        **{name: module.eval().requires_grad_(False) for name, module in modules.items()},
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def weights_gb(pipe: FaceSnapPipeline) -> dict[str, float]:
    """Of each part in its dtype, 10⁹ bytes."""
    modules = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    return {name: sum(p.numel() * p.element_size() for p in m.parameters()) / 1e9 for name, m in modules.items()}

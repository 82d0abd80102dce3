"""A whole FaceSnap with tiny random weights: the mini's form (16x VAE, 16 latent channels), far smaller."""

from __future__ import annotations

import string

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
)

from facesnap.ffrnet import FFRNet
from facesnap.mixer import FacialAttributeMixer

SIZE = 64
TOKEN_DIM, POOLED_DIM, CLIP_DIM = 32, 16, 16


def tiny_unet(in_channels: int = 16, out_channels: int | None = None, seed: int = 0) -> UNet2DConditionModel:
    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=4,
        in_channels=in_channels,
        out_channels=out_channels or in_channels,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 2),
        transformer_layers_per_block=(1, 1),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=POOLED_DIM + 6 * 4,
        cross_attention_dim=TOKEN_DIM,
    ).eval()


def tiny_vae(levels: int = 5, latent_channels: int = 16) -> AutoencoderKL:
    torch.manual_seed(1)
    return AutoencoderKL(
        block_out_channels=(4,) * levels,
        norm_num_groups=2,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        latent_channels=latent_channels,
        layers_per_block=1,
        sample_size=SIZE,
        force_upcast=False,
    ).eval()


def tiny_tokenizer() -> CLIPTokenizer:
    """Letters only, no merges: a token a letter, 20 to a prompt."""
    symbols = list(string.printable.strip())
    symbols.remove("!")  # padding, so that it is token 0
    vocab = {s: i for i, s in enumerate(["!", *symbols, "!</w>", *(s + "</w>" for s in symbols)])}
    vocab |= {"<|startoftext|>": len(vocab), "<|endoftext|>": len(vocab) + 1}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=20, pad_token="!")


def tiny_text_encoder(width: int, projection: bool, vocab_size: int = 192) -> CLIPTextModel:
    torch.manual_seed(2 + projection)
    config = CLIPTextConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=20,
        projection_dim=POOLED_DIM,
        bos_token_id=vocab_size - 2,
        eos_token_id=vocab_size - 1,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def tiny_face_encoder() -> CLIPVisionModel:
    torch.manual_seed(4)
    return CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=CLIP_DIM,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=32,
            patch_size=16,
        )
    ).eval()


def tiny_mixer(variant: str = "full", **config) -> FacialAttributeMixer:
    torch.manual_seed(5)
    sizes = {"width": 24, "heads": 2, "num_id_tokens": 3, "num_tokens": 4, "depth": 2} | config
    return FacialAttributeMixer(
        clip_dim=CLIP_DIM, token_dim=TOKEN_DIM, pooled_dim=POOLED_DIM, variant=variant, **sizes
    ).eval()


def tiny_ffrnet(unet: UNet2DConditionModel, *, zero: bool = False, vae_scale_factor: int = 16) -> FFRNet:
    """An FFRNet of the UNet; its zero convolutions are filled with noise, as if trained, unless `zero`."""
    widths = {8: (4, 4, 4, 8), 16: (4, 4, 4, 4, 8)}[vae_scale_factor]
    ffrnet = FFRNet.from_unet(
        unet, vae_scale_factor=vae_scale_factor, conditioning_embedding_out_channels=widths
    ).eval()
    if not zero:
        torch.manual_seed(6)
        picture = ffrnet.controlnet_cond_embedding.conv_out
        for module in (ffrnet.controlnet_down_blocks, ffrnet.controlnet_mid_block, picture):
            for parameter in module.parameters():
                torch.nn.init.normal_(parameter, std=0.3)
    return ffrnet

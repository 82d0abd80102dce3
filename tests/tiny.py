"""A whole FaceSnap with tiny random weights: the mini's form (16x VAE, 16 latent channels), far smaller."""

from __future__ import annotations

import string
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import simulated_heads
import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, UNet2DConditionModel
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
)

from facesnap.errors import InputError
from facesnap.faces import Face
from facesnap.ffrnet import FFRNet
from facesnap.folder import Settings
from facesnap.heads import Head, LinearHeadModel, rotation_from_euler
from facesnap.landmarks import to_68
from facesnap.mixer import FacialAttributeMixer
from facesnap.pipeline import FaceSnapPipeline

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
        picture = ffrnet.controlnet_cond_embedding
        for module in (ffrnet.controlnet_down_blocks, ffrnet.controlnet_mid_block, picture.conv_out):
            for parameter in module.parameters():
                torch.nn.init.normal_(parameter, std=0.3)
        for conv in (picture.conv_in, *picture.blocks):  # else little of the drawing would come through
            torch.nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    return ffrnet


def lively(net: nn.Module) -> nn.Module:
    """Random weights whose every layer matters: norms and slopes that are not the initial ones."""
    torch.manual_seed(0)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.1)
        if isinstance(module, nn.PReLU):
            nn.init.uniform_(module.weight, 0.1, 0.4)
    return net.eval()


def photo(person: int, number: int = 0, size: int = 96) -> np.ndarray:
    """Stands for a photo: all that the tiny analyser reads of it is who it shows and which photo it is."""
    pixels = np.random.default_rng(person * 1000 + number).integers(60, 200, (size, size, 3), dtype=np.uint8)
    pixels[0, 0] = person, number, 0
    return pixels


def faceless(size: int = 96) -> np.ndarray:
    return np.zeros((size, size, 3), np.uint8)


class TinyAnalyser:
    """Reads `photo`s as the face pack reads photographs: one embedding a person, a little noise a picture."""

    recogniser_digest = "tiny"

    def __init__(self, head_model: LinearHeadModel):
        self.head_model = head_model

    def analyse(self, image: np.ndarray, *, hard=None, portrait=False) -> Face:
        if image.shape[0] >= 96 and not image.any():
            with hard or nullcontext():
                pass
            raise InputError("No face was found; choose a photo that shows one from the front.")
        person, number, _ = (int(v) for v in image[0, 0])
        who, which = np.random.default_rng(person), np.random.default_rng([person, number])
        embedding = who.standard_normal(512) + 0.3 * which.standard_normal(512)
        height, width = image.shape[:2]
        head = Head(
            identity=who.standard_normal(self.head_model.num_identity),
            expression=which.uniform(0, 0.5, self.head_model.num_expression),
            rotation=rotation_from_euler(*which.uniform(-20, 20, 3)),
            scale=width / 6,
            translation=np.array([width / 2, height / 2]),
            size=(height, width),
        )
        points = to_68(self.head_model.project(head))
        crop = np.random.default_rng(image.astype(np.int64).sum()).integers(0, 255, (224, 224, 3), dtype=np.uint8)
        return Face(
            box=np.array([width / 4, height / 4, width * 3 / 4, height * 3 / 4], np.float32),
            score=0.9,
            keypoints=points[[36, 45, 30, 48, 54]].astype(np.float32),
            landmarks=np.concatenate([points, np.zeros((68, 1))], axis=1).astype(np.float32),
            embedding=embedding.astype(np.float32),
            crop=crop,
            size=(height, width),
            count=2 if number == 99 else 1,
            found_by="detector",
        )

    def save_pretrained(self, folder: Path) -> None:
        self.head_model.save_pretrained(folder)

    @classmethod
    def from_pretrained(cls, folder: Path, providers=()) -> TinyAnalyser:
        return cls(LinearHeadModel.from_pretrained(folder))


class TinyScorer:
    """Takes the place of the recogniser that scores: its embedding is the picture, blurred to 4 × 4."""

    def __init__(self, path: Path = Path(__file__), providers=()):
        self.path = path  # any file will do: it is copied, never read

    def embed(self, image: np.ndarray, keypoints: np.ndarray) -> np.ndarray:
        side = image.shape[0] // 4
        blurred = image[: 4 * side, : 4 * side].reshape(4, side, 4, side, 3).mean((1, 3))
        return (blurred - 100).ravel().astype(np.float32)


def tiny_pipeline(vae_levels: int = 5, latent_channels: int = 16, **parts) -> FaceSnapPipeline:
    """A FaceSnap of 64² portraits; `parts` take the place of components made here."""
    unet, head_model = tiny_unet(latent_channels), simulated_heads.model(num_identity=6)
    made = {
        "vae": tiny_vae(vae_levels, latent_channels),
        "text_encoder": tiny_text_encoder(TOKEN_DIM - POOLED_DIM, projection=False),
        "text_encoder_2": tiny_text_encoder(POOLED_DIM, projection=True),
        "tokenizer": tiny_tokenizer(),
        "tokenizer_2": tiny_tokenizer(),
        "unet": unet,
        "scheduler": DPMSolverMultistepScheduler(
            beta_schedule="scaled_linear", algorithm_type="sde-dpmsolver++", prediction_type="v_prediction"
        ),
        "mixer": tiny_mixer(),
        "ffrnet": tiny_ffrnet(unet, vae_scale_factor=2 ** (vae_levels - 1)),
        "face_encoder": tiny_face_encoder(),
        "face_analyser": TinyAnalyser(head_model),
        "head_model": head_model,
        "scorer": TinyScorer(),
    }
    settings = Settings(name="tiny", size=SIZE, steps=2, guidance=2.0)
    pipe = FaceSnapPipeline(**made | parts, settings=settings)
    pipe.set_progress_bar_config(disable=True)
    return pipe

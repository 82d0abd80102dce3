"""The mini's base from nothing: its UNet, mixer and sampler, and the stage that teaches all of them together.

FFRNet is off for a share of the samples, so that the base stands on its own: guidance goes from the picture that it
makes alone to the one that FFRNet adds the face to.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from facesnap.ffrnet import FFRNet
from facesnap.folder import Settings
from facesnap.mixer import FacialAttributeMixer
from facesnap.pipeline import FaceSnapPipeline
from facesnap.training.portraits import PortraitStage

WIDTHS = (128, 192, 256)
CONTROL_WIDTHS = (4, 8, 24, 64, 96)  # of the control picture's embedding: thin where the picture is large
SIZE = 256
PARTS: dict[str, Any] = {  # what the stages change
    "unet": UNet2DConditionModel,
    "text_encoder": CLIPTextModel,
    "text_encoder_2": CLIPTextModelWithProjection,
    "tokenizer": CLIPTokenizer,
    "mixer": FacialAttributeMixer,
    "ffrnet": FFRNet,
}


def make_unet(
    latent_channels: int, grid: int, token_dim: int, pooled_dim: int, widths: tuple[int, ...] = WIDTHS
) -> UNet2DConditionModel:
    """SDXL's architecture at about 1/290 of its size: no attention at the first level, as there."""
    return UNet2DConditionModel(
        sample_size=grid,
        in_channels=latent_channels,
        out_channels=latent_channels,
        block_out_channels=widths,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=1,
        attention_head_dim=tuple(width // 32 for width in widths),
        cross_attention_dim=token_dim,
        norm_num_groups=16,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=pooled_dim + 6 * 32,
    )


def make_mixer(clip_dim: int, token_dim: int, pooled_dim: int) -> FacialAttributeMixer:
    return FacialAttributeMixer(
        id_dim=512, clip_dim=clip_dim, width=160, num_id_tokens=8, num_tokens=16, depth=2, heads=5,
        token_dim=token_dim, pooled_dim=pooled_dim,
    )  # fmt: skip


def make_scheduler() -> EulerDiscreteScheduler:
    """SDXL's noise, v-prediction, and plain Euler steps.

    The paper's sampler (DPM++ SDE) adds noise at every step, and a model this small does not find its way back in
    eight: held-out people kept a fifth less of their likeness, and plain backgrounds came out mottled.
    """
    return EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction",
        timestep_spacing="trailing",
    )  # fmt: skip


def make_pipe(
    vae: AutoencoderKL, parts: dict[str, Any], about: dict[str, Any] | None = None, **others: Any
) -> FaceSnapPipeline:
    """The mini of PARTS and a VAE, which is as far as the stages need it; `others` look at photographs."""
    settings = Settings(
        name="FaceSnap mini", size=SIZE, steps=8, guidance=2.0, about=about or {}, prompt="a photo of a person",
        same_person=0.47,  # renders: 0.4 % of strangers pass, 3 % of pairs fail; strangers' photographs: 70 % pass
        saturation=0.6,  # chosen on seven photographs; of renders it changes next to nothing
    )  # fmt: skip
    pipe = FaceSnapPipeline(
        vae=vae, tokenizer_2=parts["tokenizer"], scheduler=make_scheduler(), settings=settings, **parts, **others
    )
    # few channels at many pixels: twice as fast this way on a CPU
    pipe.ffrnet.controlnet_cond_embedding.to(memory_format=torch.channels_last)
    return pipe


def save_parts(pipe: FaceSnapPipeline, folder: Path) -> None:
    for name in PARTS:
        getattr(pipe, name).save_pretrained(folder / name)


def load_parts(folder: Path) -> dict[str, Any]:
    """In single precision, whatever the files hold."""

    def load(name: str, kind: Any) -> Any:
        options = {"dtype": torch.float32} if "text" in name else {}
        return kind.from_pretrained(folder / name, use_safetensors=True, **options)

    return {name: load(name, kind) for name, kind in PARTS.items()}


class JointStage(PortraitStage):
    """Base UNet and text encoders learn as well, from the same loss."""

    def modules(self) -> dict[str, nn.Module]:
        base = ("unet", "text_encoder", "text_encoder_2")
        return super().modules() | {name: getattr(self.pipe, name) for name in base}

    def texts(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        return self.source.texts(captions)

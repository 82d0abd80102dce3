"""A style as a LoRA of the base UNet, trained on filtered pictures of rendered people.

    python -m facesnap.mini.style_lora --style "screen print" --out assets/lora/screen-print

It is trained as such files usually are: the base model alone, its own text encoders, no face and no FFRNet. That
FaceSnap follows it all the same is the point (docs/plug_and_play.md). The file is in diffusers' format, written by
`StableDiffusionXLPipeline.save_lora_weights`, for `load_lora_weights` of any SDXL pipeline over the same base.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import torch
from diffusers import StableDiffusionXLPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn
from tqdm import tqdm

from facesnap.synthetic.captions import STYLE_WORDS, captions
from facesnap.synthetic.people import sample_person, sample_picture
from facesnap.synthetic.render import render
from facesnap.training.losses import (
    add_noise,
    capped_snr_weight,
    diffusion_target,
    min_snr_weight,
    stratified_timesteps,
)
from facesnap.training.trainer import Batch, Stage, Trainer, TrainerConfig

# attention, feed-forward and convolutions: a change of all colours is little work for attention alone
LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2")
INKS = ((22, 28, 74), (196, 44, 62), (240, 158, 66), (250, 236, 205))  # of a screen print, dark to light


# ---------------------------------------------------------------------- styles that the mini does not know


def screen_print(image: np.ndarray) -> np.ndarray:
    """Four flat inks by brightness, as on a poster; picture (H, W, 3) uint8 RGB."""
    gray = cv2.cvtColor(cv2.bilateralFilter(image, 7, 40, 5), cv2.COLOR_RGB2GRAY)
    gray = cv2.createCLAHE(1.5, (4, 4)).apply(gray)
    return np.array(INKS, np.uint8)[np.digitize(gray, (62, 118, 176))]


def blueprint(image: np.ndarray) -> np.ndarray:
    """White lines on blue paper, a little lighter where the picture is light."""
    gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32)
    lines = cv2.GaussianBlur(gray, (0, 0), 3) - cv2.GaussianBlur(gray, (0, 0), 1)
    ink = np.clip(np.abs(lines) / 14, 0, 1)[..., None]
    paper = np.array([18, 58, 140]) + 0.16 * gray[..., None]
    return (paper * (1 - ink) + np.array([236, 244, 255]) * ink).astype(np.uint8)


STYLES: dict[str, Callable[[np.ndarray], np.ndarray]] = {"screen print": screen_print, "blueprint": blueprint}


def pictures(style: str, count: int, size: int) -> tuple[np.ndarray, list[str]]:
    """`count` pictures (N, H, W, 3) uint8 in the style, each of another person, and their captions."""
    images, texts = [], []
    for seed in tqdm(range(count), desc="pictures", unit="picture"):
        picture = sample_picture(sample_person(seed), 0, style="photo")
        images.append(STYLES[style](render(picture, size).image))
        texts.append(caption(captions(picture)[1], style))
    return np.stack(images), texts


def caption(text: str, style: str) -> str:
    """The caption of a photo as one of a picture in `style`."""
    words = next(w for w in sorted(STYLE_WORDS["photo"], key=len, reverse=True) if text.startswith(w))
    return f"a {style} of{text.removeprefix(words)}"


# ---------------------------------------------------------------------- training


class StyleStage(Stage):
    """The UNet's LoRA learns to denoise pictures of one style; everything else is frozen."""

    def __init__(self, pipe: StableDiffusionXLPipeline, images: np.ndarray, texts: list[str], batch_size: int = 16):
        self.unet, self.batch_size = pipe.unet, batch_size
        self.kind, self.alphas = pipe.scheduler.config.prediction_type, pipe.scheduler.alphas_cumprod.float()
        self.side = float(images.shape[1])
        with torch.no_grad():
            latents = [pipe.vae.encode(_pixels(image)).latent_dist.mean for image in tqdm(images, desc="latents")]
            self.latents = torch.cat(latents) * pipe.vae.config.scaling_factor
            self.text, _, self.pooled, _ = pipe.encode_prompt(texts, do_classifier_free_guidance=False)

    def modules(self) -> dict[str, nn.Module]:
        return {"unet": self.unet}

    def batch(self, rng: np.random.Generator) -> Batch:
        rows = torch.from_numpy(rng.choice(len(self.latents), self.batch_size))
        return {"latents": self.latents[rows], "text": self.text[rows], "pooled": self.pooled[rows]}

    def loss(self, batch: Batch, step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        latents = batch["latents"]
        # zeros are the pipeline's empty prompt (force_zeros_for_empty_prompt)
        kept = torch.rand(len(latents), generator=generator, device=latents.device) >= 0.1
        text, pooled = batch["text"] * kept[:, None, None], batch["pooled"] * kept[:, None]
        timesteps = stratified_timesteps(len(latents), len(self.alphas), generator)
        alphas = self.alphas.to(latents.device)[timesteps]
        noise = torch.randn(latents.shape, generator=generator, device=latents.device)
        time_ids = torch.tensor([self.side, self.side, 0, 0, self.side, self.side], device=latents.device)
        prediction = self.unet(
            add_noise(latents, noise, alphas), timesteps, text, return_dict=False,
            added_cond_kwargs={"text_embeds": pooled, "time_ids": time_ids.expand(len(latents), -1)},
        )[0]  # fmt: skip
        error = (prediction.float() - diffusion_target(self.kind, latents, noise, alphas)).square().mean((1, 2, 3))
        # a style is decided where there is much noise
        weight = capped_snr_weight(alphas) if self.kind == "v_prediction" else min_snr_weight(self.kind, alphas)
        return (error * weight).mean(), {}


def _pixels(image: np.ndarray) -> Tensor:
    """(H, W, 3) uint8 → (1, 3, H, W) in [−1, 1]."""
    return torch.from_numpy(image).permute(2, 0, 1)[None].float() / 127.5 - 1


def add_lora(unet: nn.Module, rank: int, layers: tuple[str, ...] = LAYERS) -> None:
    """A new LoRA in the UNet, which alone learns; at first it changes nothing."""
    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=list(layers)))


def save(unet: nn.Module, folder: Path, dtype: torch.dtype = torch.float16) -> None:
    """The UNet's LoRA as `folder/pytorch_lora_weights.safetensors`, in diffusers' format."""
    # peft's own names, one form for all layers: `convert_state_dict_to_diffusers` renames those of attention only, and
    # a file with both forms loads without them
    layers = get_peft_model_state_dict(unet)
    layers = {name: tensor.detach().cpu().to(dtype).contiguous() for name, tensor in layers.items()}
    StableDiffusionXLPipeline.save_lora_weights(folder, unet_lora_layers=layers)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m facesnap.mini.style_lora", description=__doc__.split("\n")[0])
    parser.add_argument("--style", choices=STYLES, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder of the LoRA")
    parser.add_argument("--model", default="assets/mini", help="an SDXL checkpoint's folder, the base of the LoRA")
    parser.add_argument("--work", type=Path, help="checkpoints, for going on after a stop (default: OUT.work)")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--pictures", type=int, default=128)
    parser.add_argument("--size", type=int, default=256, help="of the pictures, pixels")
    parser.add_argument("--rank", type=int, default=6)
    parser.add_argument("--lr", type=float, default=2e-3)
    arguments = parser.parse_args(argv)
    if not Path(arguments.model).is_dir():
        parser.error(f"there is no folder '{arguments.model}': give that of an SDXL checkpoint as --model")
    pipe = StableDiffusionXLPipeline.from_pretrained(arguments.model, use_safetensors=True)
    pipe.vae.requires_grad_(False)
    stage = StyleStage(pipe, *pictures(arguments.style, arguments.pictures, arguments.size))
    torch.manual_seed(0)
    add_lora(pipe.unet, arguments.rank)
    work = arguments.work or arguments.out.with_name(arguments.out.name + ".work")
    config = TrainerConfig(out=work, steps=arguments.steps, lr=arguments.lr, warmup=20, ema=0.98)
    trainer = Trainer(stage, config)
    trainer.train()
    with trainer.averaged():
        save(pipe.unet, arguments.out)


if __name__ == "__main__":
    main()

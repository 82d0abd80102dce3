"""FaceSnap beside what else there is for SDXL, on the mini: one sheet.

    python benchmarks/plug_and_play.py --out docs/plug_and_play.jpg

reference | portrait | with a LoRA | on another base UNet | a picture | image-to-image over it | inpainting in it

Everything but the portraits themselves runs in stock diffusers pipelines. The other base UNet is the mini's with a
second LoRA fused into its weights, which is what fine-tuned checkpoints of one base are to each other.
"""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # so that the file runs as it is, installed or not

from facesnap.evaluation import report  # noqa: E402
from facesnap.folder import BASE_PARTS  # noqa: E402
from facesnap.images import open_image  # noqa: E402
from facesnap.pipeline import FaceSnapPipeline  # noqa: E402

PEOPLE = ("avery", "casey", "ellis")
GIVEN = ("devon", "frankie", "blake")  # whose pictures image-to-image and inpainting start from
PROMPT = "a photo of a person, wearing a red shirt, a plain blue background"
TITLES = ("reference", "portrait", "LoRA", "another base", "a picture", "image-to-image", "inpainting")


def image_to_image(pipe: FaceSnapPipeline) -> StableDiffusionXLImg2ImgPipeline:
    parts = {name: getattr(pipe, name) for name in BASE_PARTS} | {"scheduler": copy.deepcopy(pipe.scheduler)}
    stock = StableDiffusionXLImg2ImgPipeline(**parts, add_watermarker=False)
    stock.set_progress_bar_config(disable=True)
    return stock


def keep_outside(stock: Any, picture: torch.Tensor, mask: torch.Tensor, seed: int) -> dict[str, Any]:
    """Arguments that turn image-to-image into inpainting: after every step the latents outside the mask are the
    picture's own, with the noise of that step. (The stock inpainting pipeline knows 4 latent channels only, and the
    mini has 16; with SDXL's own, or with an inpainting UNet, use it.)

    picture (1, 3, H, W) in [−1, 1]; mask (1, 1, h, w) on the latent grid, 1 where the picture is made anew.
    """
    kept = stock.vae.encode(picture).latent_dist.mean * stock.vae.config.scaling_factor
    noise = torch.randn(kept.shape, generator=torch.Generator().manual_seed(seed))

    def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        timesteps, latents = pipe.scheduler.timesteps[-pipe.num_timesteps :], tensors["latents"]
        last = step + 1 == len(timesteps)
        outside = kept if last else pipe.scheduler.add_noise(kept, noise, timesteps[step + 1 : step + 2])
        return {"latents": mask * latents + (1 - mask) * outside}

    return {"callback_on_step_end": callback}


def head_mask(landmarks: np.ndarray, size: int) -> np.ndarray:
    """(size, size) float32, 1 in an ellipse around the head of 72 landmarks with its hair."""
    low, high = landmarks.min(0), landmarks.max(0)
    centre, span = (low + high) / 2 - (0, 0.18 * (high - low)[1]), high - low
    mask = np.zeros((size, size), np.float32)
    axes = (int(0.75 * span[0]), int(0.85 * span[1]))
    return cv2.ellipse(mask, (int(centre[0]), int(centre[1])), axes, 0, 0, 360, 1.0, -1)


@torch.no_grad()
def row(pipe: FaceSnapPipeline, other: FaceSnapPipeline, lora: Path, person: str, given: str, seed: int) -> list:
    reference, picture = (ROOT / "assets" / "examples" / f"{name}.png" for name in (person, given))
    size = pipe.settings.size
    arguments = {"reference": reference, "pose": "quarter-left", "seed": seed}
    portrait = pipe(PROMPT, **arguments).images[0]
    pipe.load_lora_weights(lora)
    styled = pipe(PROMPT.replace("a photo", f"a {lora.name.replace('-', ' ')}"), **arguments).images[0]
    pipe.unload_lora_weights()
    based = other(PROMPT.replace("a photo", "a blueprint"), **arguments).images[0]

    start = Image.fromarray(open_image(picture)).resize((size, size))
    pixels = torch.from_numpy(np.asarray(start)).permute(2, 0, 1)[None].float() / 127.5 - 1
    stock = image_to_image(pipe)
    common = {"image": start, "guidance_scale": pipe.settings.guidance, "num_inference_steps": 12}
    changed = []
    with pipe.attached_to(stock, reference, pose=picture) as preview:
        grid = size // pipe.vae_scale_factor
        mask = head_mask(preview.landmarks, size)
        mask = torch.from_numpy(cv2.resize(mask, (grid, grid), interpolation=cv2.INTER_AREA))[None, None]
        inpainting = keep_outside(stock, pixels, mask, seed)
        for strength, more in ((0.6, {}), (0.9, inpainting)):
            generator = torch.Generator().manual_seed(seed)
            prompt = "a photo of a person" if more else "a watercolor of a person"
            changed.append(stock(prompt, strength=strength, generator=generator, **common, **more).images[0])
    shown = [Image.open(reference), portrait, styled, based, start, *changed]
    return [np.asarray(image.convert("RGB")) for image in shown]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=ROOT / "assets" / "mini")
    parser.add_argument("--lora", type=Path, default=ROOT / "assets" / "lora" / "screen-print")
    parser.add_argument("--base-lora", type=Path, default=ROOT / "assets" / "lora" / "blueprint")
    parser.add_argument("--out", type=Path, required=True, help="the sheet, .jpg or .png")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    pipe = FaceSnapPipeline.from_pretrained(arguments.model)
    other = FaceSnapPipeline.from_pipe(pipe, unet=copy.deepcopy(pipe.unet))
    other.load_lora_weights(arguments.base_lora)
    other.fuse_lora()
    other.unload_lora_weights()
    for each in (pipe, other):
        each.set_progress_bar_config(disable=True)
    rows = [
        row(pipe, other, arguments.lora, person, given, arguments.seed)
        for person, given in zip(PEOPLE, GIVEN, strict=True)
    ]
    report.contact_sheet(rows, TITLES, arguments.out, cell=200)


if __name__ == "__main__":
    main()

"""Portraits by the tiny pipeline, and their pixels; helpers of several tests."""

import numpy as np
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLInpaintPipeline
from PIL import Image
from tiny import SIZE, photo, tiny_unet

from facesnap.folder import BASE_PARTS
from facesnap.pipeline import LAST_CALL

ALICE, BOB = photo(1), photo(2)


def portrait(pipe, prompt="a photo", reference=ALICE, seed=0, **kwargs):
    return pipe(prompt, reference=reference, seed=seed, **kwargs)


def pixels(output, k=0):
    return np.asarray(output.images[k])


def same(a, b):
    """Equal but for rounding: tensors that lie elsewhere in memory may be summed in another order."""
    return np.abs(pixels(a).astype(int) - pixels(b)).max() <= 1


def state(pipe):
    """All that a request could change: attributes, configs, weights and hooks."""
    modules = {n: c for n, c in pipe.components.items() if isinstance(c, torch.nn.Module)}
    return {
        "attributes": {k: repr(v) for k, v in vars(pipe).items() if k not in (*pipe.components, *LAST_CALL)},
        "identities": {k: id(v) for k, v in pipe.components.items()},
        "scheduler": {k: repr(v) for k, v in vars(pipe.scheduler).items()},
        "weights": {n: sum(p.double().abs().sum().item() for p in m.parameters()) for n, m in modules.items()},
        "dtypes": {n: m.dtype for n, m in modules.items()},
        "hooks": [
            (n, h)
            for n, m in modules.items()
            for s in m.modules()
            for h in (*s._forward_pre_hooks.values(), *s._forward_hooks.values())
        ],
        "generator": torch.get_rng_state().sum().item(),
    }


def plain(stock):
    """The picture of a stock pipeline where `portrait` makes one with FaceSnap: the same prompt, steps and seed."""
    stock.set_progress_bar_config(disable=True)
    seed = torch.Generator().manual_seed(0)
    how = {"height": SIZE, "width": SIZE, "num_inference_steps": 2, "guidance_scale": 2.0}
    return pixels(stock("a photo", generator=seed, **how))


STOCK_KINDS = [  # stock pipelines that begin with a picture, and the input channels of their UNet
    (StableDiffusionXLImg2ImgPipeline, 4),
    (StableDiffusionXLInpaintPipeline, 4),
    (StableDiffusionXLInpaintPipeline, 9),
]


def stock_beside(ours, kind, channels):
    """A stock pipeline of the parts of `ours` with a UNet of its own, and what makes its picture, always the same."""
    unet = tiny_unet(in_channels=channels, out_channels=4)
    stock = kind(**{n: getattr(ours, n) for n in BASE_PARTS} | {"unet": unet}, add_watermarker=False)
    stock.set_progress_bar_config(disable=True)
    inputs = {"image": Image.fromarray(photo(4, size=SIZE)), "num_inference_steps": 4, "strength": 0.8}
    if kind is StableDiffusionXLInpaintPipeline:
        inputs |= {"mask_image": Image.new("L", (SIZE, SIZE), 255), "height": SIZE, "width": SIZE}

    def made():
        with torch.no_grad():
            return np.asarray(stock("a photo", **inputs, generator=torch.Generator().manual_seed(0)).images[0])

    return stock, made

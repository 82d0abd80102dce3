"""What may be given up for speed, and what of it the two presets give up. Nothing, unless it is asked for.

Of a guided 1024² picture of eight steps, SDXL's UNet costs 108 TFLOP, half of it for the unconditional half of
guidance, and FFRNet 24. So two things are worth leaving out: FFRNet at some steps, since its residuals change
slowly, and guidance at the last ones, where the picture is settled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

from torch import Tensor, nn

from facesnap.errors import InputError

Preset = Literal["best", "fast"]


@dataclass(frozen=True)
class Speed:
    """How often FFRNet runs and how long guidance lasts; the values given here are exact.

    ffrnet_every: FFRNet runs at every so many-th step and its residuals are kept in between.
    ffrnet_end, guidance_end: shares of the steps; step i of n has FFRNet (or both halves of guidance) while
    i / n is below them. Steps are calls of the UNet, of which some schedulers make two a step.
    """

    ffrnet_every: int = 1
    ffrnet_end: float = 1.0
    guidance_end: float = 1.0


PRESETS: dict[Preset, Speed] = {"best": Speed(), "fast": Speed(ffrnet_every=2, guidance_end=0.5)}


def chosen(preset: Preset | None, **explicit: float | None) -> Speed:
    """The preset's `Speed`, the exact one by default, with every explicit value that is not None in its place.

    Raises InputError if there is no such preset.
    """
    if preset is not None and preset not in get_args(Preset):
        raise InputError(f"There is no preset {preset!r}; choose {' or '.join(get_args(Preset))}.")
    given: dict[str, Any] = {f.name: explicit[f.name] for f in fields(Speed) if explicit.get(f.name) is not None}
    return replace(PRESETS[preset or "best"], **given)


def ending_guidance(end: float, arguments: dict[str, Any]) -> dict[str, Any]:
    """The stock call's `arguments` with a step callback by which guidance ends after its share of the steps.

    The caller's own callback, if there is one among them, still runs, before ours and with the tensors that it
    asked for. (diffusers' `SDXLCFGCutoffCallback` does the like for one picture only.)
    """
    theirs = arguments.get("callback_on_step_end")
    wanted = getattr(theirs, "tensor_inputs", arguments.get("callback_on_step_end_tensor_inputs", ["latents"]))
    halved = ["prompt_embeds", "add_text_embeds", "add_time_ids"]

    def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        outputs = {} if theirs is None else theirs(pipe, step, timestep, {name: tensors[name] for name in wanted})
        if pipe.do_classifier_free_guidance and (step + 1) / pipe.num_timesteps >= end:
            pipe._guidance_scale = 1.0
            outputs |= {name: outputs.get(name, tensors[name]).chunk(2)[1] for name in halved}
        return outputs

    inputs = list(dict.fromkeys([*wanted, *halved]))
    return arguments | {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": inputs}


@contextmanager
def halved_images(unet: nn.Module, guidance: Callable[[], bool]) -> Iterator[None]:
    """While the block lasts, the UNet gets the conditional half of an IP-Adapter's pictures once guidance has ended.

    They are the one input in two halves that a step callback cannot reach.
    """

    def pre_hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        added = kwargs.get("added_cond_kwargs") or {}
        if "image_embeds" not in added or guidance():
            return None
        halves = {"image_embeds": [images.chunk(2)[1] for images in added["image_embeds"]]}
        return args, kwargs | {"added_cond_kwargs": added | halves}

    handle = unet.register_forward_pre_hook(pre_hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()

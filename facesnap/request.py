"""What one call asks for: its limits, samplers and seeds, checked and filled in with what the checkpoint wants."""

from __future__ import annotations

import copy
import inspect
import secrets
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSDEScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UniPCMultistepScheduler,
)

from facesnap.errors import InputError, check_number, did_you_mean, shown
from facesnap.ffrnet import VARIANTS, Variant
from facesnap.folder import Settings
from facesnap.speed import Preset, Speed, chosen

Call = TypeVar("Call", bound=Callable)
MAX_SIDE = 4096
MAX_STEPS = 200
MAX_GUIDANCE = 30.0
MAX_PICTURES = 64  # of one prompt
SCALES = {"identity_scale": "identity scale", "landmark_scale": "landmark scale", "scale": "FFRNet scale"}
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
STOCK_ARGUMENTS = {*inspect.signature(StableDiffusionXLPipeline.__call__).parameters, "callback", "callback_steps"}

# Samplers by the names people know, as diffusers maps them; a checkpoint's own settings (prediction type, betas,
# spacing) go over to each. All call the model once a step but the last, k-diffusion's own second-order sampler.
SCHEDULERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "DPM++ SDE": (DPMSolverSinglestepScheduler, {"algorithm_type": "dpmsolver++", "lower_order_final": True}),
    "DPM++ 2M": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++"}),
    "DPM++ 2M SDE": (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    "UniPC": (UniPCMultistepScheduler, {}),
    "Euler": (EulerDiscreteScheduler, {}),
    "Euler a": (EulerAncestralDiscreteScheduler, {}),
    "DDIM": (DDIMScheduler, {}),
    "DPM++ SDE, stochastic": (DPMSolverSDEScheduler, {}),
}


# With fewer steps their pictures are pale or have colours of their own (benchmarks/schedulers.py)
FEWEST_STEPS = {"PNDMScheduler": 8, "KDPM2AncestralDiscreteScheduler": 6}


@dataclass(frozen=True, eq=False)
class Request:
    """One call, whole and within its limits.

    prompts: empty where ready embeddings take their place. size: (height, width) in pixels. seeds: one a picture,
    empty where the caller brought a generator. scheduler: for this call alone. stock: arguments of the stock call
    that are not ours, the generators among them.
    """

    prompts: tuple[str, ...]
    size: tuple[int, int]
    steps: int
    guidance: float
    variant: Variant
    identity_scale: float
    landmark_scale: float
    ffrnet_scale: float
    speed: Speed
    seeds: tuple[int, ...]
    scheduler: Any
    stock: dict[str, Any]

    @classmethod
    def of(
        cls,
        settings: Settings,
        own_scheduler: Any,
        prompt: Any,
        size: tuple[int, int],
        *,
        num_inference_steps: int | None,
        guidance_scale: float | None,
        identity_scale: float,
        landmark_scale: float,
        ffrnet_scale: float,
        variant: Variant | None,
        preset: Preset | None,
        ffrnet_every: int | None,
        ffrnet_end: float | None,
        guidance_end: float | None,
        scheduler: str | None,
        seed: int | None,
        stock: dict[str, Any],
    ) -> Request:
        """The arguments of `FaceSnapPipeline.__call__`, checked; InputError names the first that is wrong."""
        steps = settings.steps if num_inference_steps is None else num_inference_steps
        guidance = settings.guidance if guidance_scale is None else guidance_scale
        check_number("number of steps", steps, 1, MAX_STEPS, whole=True)
        check_number("guidance scale", guidance, 0, MAX_GUIDANCE)
        check_scales({"identity_scale": identity_scale, "landmark_scale": landmark_scale, "scale": ffrnet_scale})
        speed = chosen(preset, ffrnet_every=ffrnet_every, ffrnet_end=ffrnet_end, guidance_end=guidance_end)
        check_number("interval of FFRNet's steps", speed.ffrnet_every, 1, MAX_STEPS, whole=True)
        check_number("end of FFRNet", speed.ffrnet_end, 0, 1)
        check_number("end of guidance", speed.guidance_end, 0, 1)
        if (kind := stock.get("output_type", "pil")) not in OUTPUT_TYPES:
            raise InputError(f"There is no output type {kind!r}; {did_you_mean(kind, OUTPUT_TYPES)}")
        own_steps = next((given for name in ("timesteps", "sigmas") if (given := stock.get(name)) is not None), None)
        if own_steps is not None:
            steps = _length(own_steps)
        prompts = _prompts(prompt, stock, settings.prompt)
        seeds, generator = _seeds(seed, len(prompts), stock)
        return cls(
            prompts=prompts,
            size=size,
            steps=steps,
            guidance=guidance,
            variant=variant_of(variant, settings),
            identity_scale=identity_scale,
            landmark_scale=landmark_scale,
            ffrnet_scale=ffrnet_scale,
            speed=speed,
            seeds=seeds,
            scheduler=_scheduler(scheduler, own_scheduler, generator, steps),
            stock=stock | {"generator": generator},
        )


def check_stock(caller: str, stock: Mapping[str, Any], unet: Any, elsewhere: Collection[str]) -> None:
    """TypeError for an argument that the stock call would pass over; elsewhere: what `preview` takes. InputError for an
    IP-Adapter's picture without an IP-Adapter."""
    for name in sorted(stock.keys() - STOCK_ARGUMENTS):
        where = "; give it to `preview`, and what that returns to `preview=` here" if name in elsewhere else ""
        raise TypeError(f"{caller} got an unexpected argument {name!r}{where}")
    for name in ("ip_adapter_image", "ip_adapter_image_embeds"):
        if stock.get(name) is not None and unet.encoder_hid_proj is None:
            raise InputError(f"There is no IP-Adapter to read the {name}: load_ip_adapter() first, or leave it out.")


def _length(own_steps: Any) -> int:
    """How many steps a caller gave by timesteps or sigmas."""
    try:
        steps = len(own_steps)
    except TypeError:  # a number, a tensor without an axis
        steps = 0
    if steps == 0:
        raise InputError("Timesteps and sigmas must be a list, of one number at least.")
    return steps


def check_scales(options: Mapping[str, Any]) -> None:
    """InputError where one of `attach`'s scales is not within 0–2; other options are passed over."""
    for name in SCALES.keys() & options.keys():
        check_number(SCALES[name], options[name], 0, 2)


def variant_of(variant: Variant | None, settings: Settings) -> Variant:
    """A row of Table 3, the checkpoint's own by default."""
    if variant is not None and variant not in VARIANTS:
        raise InputError(f"There is no variant {variant!r}; {did_you_mean(variant, VARIANTS)}")
    return variant or settings.variant


def frame_size(size: tuple[int | None, int | None], settings: Settings, factor: int) -> tuple[int, int]:
    """(height, width), the checkpoint's where None; InputError unless they are multiples of the VAE's factor."""
    if not isinstance(size, Sequence) or isinstance(size, str) or len(size) != 2:
        raise InputError(f"The size is {shown(size)}; it must be two whole numbers, (height, width).")
    sides = []
    for name, given in zip(("height", "width"), size, strict=True):
        side = settings.size if given is None else given
        check_number(name, side, factor, MAX_SIDE, whole=True)
        if side % factor:
            below = side // factor * factor
            nearest = f"{below} and {below + factor}"
            raise InputError(f"The {name} {side} is not a multiple of {factor}; the nearest are {nearest}.")
        sides.append(int(side))
    return sides[0], sides[1]


def unread_words(prompts: Sequence[str], tokenizer: Any) -> list[str]:
    """A note for every prompt longer than the text encoders read."""
    notes = []
    for prompt in prompts:
        ids = tokenizer(prompt, truncation=False, verbose=False).input_ids
        limit = tokenizer.model_max_length
        if len(ids) > limit:
            cut = tokenizer.decode(ids[limit - 1 : -1]).strip()
            shown = cut if len(cut) <= 80 else cut[:80].rstrip() + "…"
            notes.append(f"The prompt is too long; the model did not read the words from “{shown}” on.")
    return notes


def with_stock_arguments(call: Call) -> Call:
    """Decorates a call that takes **kwargs for the stock call: its signature names those arguments too."""
    own = inspect.signature(call)
    ours = [parameter for parameter in own.parameters.values() if parameter.kind != inspect.Parameter.VAR_KEYWORD]
    stock = inspect.signature(StableDiffusionXLPipeline.__call__).parameters.items()
    passed = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for name, p in stock if name not in own.parameters]
    whole = own.replace(parameters=[*ours, *(p for p in passed if p.name != "kwargs")])
    call.__signature__ = whole  # type: ignore[attr-defined]
    return call


def _prompts(prompt: Any, stock: dict[str, Any], default: str) -> tuple[str, ...]:
    """The prompts, `default` for those without a word; none where ready embeddings take their place."""
    if prompt is None and (ready := stock.get("prompt_embeds")) is not None:
        if not isinstance(ready, torch.Tensor):
            raise InputError(f"The prompt_embeds must be a tensor, not {type(ready).__name__}.")
        return ()
    prompts = prompt if isinstance(prompt, list) else ["" if prompt is None else prompt]
    if not prompts or not all(isinstance(p, str) for p in prompts):
        raise InputError("The prompt must be text, or a list of texts.")
    return tuple(p if p.strip() else default for p in prompts)


def _seeds(seed: int | None, prompts: int, stock: dict[str, Any]) -> tuple[tuple[int, ...], Any]:
    """The seed of every picture, counting up, and their generators: the caller's own, or one a picture on the CPU, so
    that it is the same alone or in a batch and on any device."""
    count = stock.get("num_images_per_prompt", 1)
    check_number("number of pictures for a prompt", count, 1, MAX_PICTURES, whole=True)
    if (given := stock.get("generator")) is not None:
        several = given if isinstance(given, list) else [given]
        if not all(isinstance(one, torch.Generator) for one in several):
            raise InputError("The generator must be a torch.Generator, or a list of one for each picture.")
        return (), given
    seed = secrets.randbelow(2**31) if seed is None else seed
    check_number("seed", seed, 0, 2**53, whole=True)
    pictures = (prompts or len(stock["prompt_embeds"])) * count
    seeds = tuple(range(seed, seed + pictures))
    return seeds, [torch.Generator().manual_seed(s) for s in seeds]


def _scheduler(name: str | None, own: Any, generator: Any, steps: int) -> Any:
    """A scheduler for one call: by its name, with the configuration of the pipeline's own, or a copy of that."""
    if name is None:
        made = copy.deepcopy(own)
    elif not isinstance(name, str):
        raise InputError(
            f"A sampler is chosen by its name, not by a {type(name).__name__}: set pipe.scheduler for one of your own."
        )
    elif name in SCHEDULERS:
        kind, options = SCHEDULERS[name]
        made = kind.from_config(own.config, **options)
    else:
        raise InputError(f"There is no sampler {name!r}; choose {', '.join(SCHEDULERS)}.")
    if not hasattr(made.config, "beta_schedule"):  # EDM's, flow matching's: other noise than SDXL's models were taught
        raise InputError(
            f"{type(made).__name__} is for models that were trained with another kind of noise than SDXL's: take one "
            "of the samplers by name, or another of diffusers' schedulers by from_config(pipe.scheduler.config)."
        )
    if steps < (fewest := FEWEST_STEPS.get(type(made).__name__, 1)):
        raise InputError(
            f"{type(made).__name__} makes good pictures from {fewest} steps on, and {steps} are asked for: choose more "
            "steps or another scheduler."
        )
    if getattr(made.config, "clip_sample", False):  # at ±1, as pictures are; latents go beyond, and would turn gray
        made.register_to_config(clip_sample=False)
    if isinstance(made, DPMSolverSDEScheduler):  # draws its noise from a seed of its own, by default a random one
        alone = isinstance(generator, torch.Generator)
        made.noise_sampler_seed = generator.initial_seed() if alone else [g.initial_seed() for g in generator]
    return made

"""What FFRNet's and InstantID's `attach` share: the UNet's call and its batch, which call of the picture it is,
residuals added to those of others; and who may use a UNet, since what is attached to it is there for everybody."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from facesnap.errors import InputError, shown

# Of each part of the UNet's batch, whether it is conditional, or a function asked for that at every call
Parts = Sequence[bool] | Callable[[], Sequence[bool]]
UNGUIDED: tuple[bool, ...] = (True,)
GUIDED: tuple[bool, ...] = (False, True)
SHAPE = (  # of a UNet's configuration, what must be our base's for its residuals and tokens to fit
    "out_channels", "block_out_channels", "layers_per_block", "transformer_layers_per_block", "cross_attention_dim",
    "addition_embed_type", "projection_class_embeddings_input_dim",
)  # fmt: skip


def parts_of(pipeline: Any) -> tuple[bool, ...]:
    """The parts of a pipeline's UNet batch as it is now. In diffusers the unconditional one comes first, and the one
    whose attention PAG perturbs last."""
    perturbed = getattr(pipeline, "do_perturbed_attention_guidance", False)
    return (False,) * bool(pipeline.do_classifier_free_guidance) + (True,) * (2 if perturbed else 1)


def unet_of(pipeline: Any, like: Any) -> Any:
    """The UNet of any SDXL pipeline. Raises InputError where there is none, or none of the shape of UNet `like`; an
    inpainting UNet's further channels do not matter."""
    if (unet := getattr(pipeline, "unet", None)) is None:
        raise InputError(f"An SDXL pipeline is wanted; this {type(pipeline).__name__} has no unet.")
    for key in SHAPE:
        theirs, ours = getattr(unet.config, key, None), getattr(like.config, key)
        if theirs != ours:
            raise InputError(
                f"The UNet of this {type(pipeline).__name__} is of another kind than our base: its {key} is "
                f"{shown(theirs)}, ours {shown(ours)}."
            )
    return unet


def check_frame(control: Tensor, latents: Tensor, net: Any) -> None:
    """InputError unless the control picture was drawn for the picture that is made; torch would speak of tensors. One
    that was embedded before, as in training, has no longer three channels."""
    if control.shape[1] != 3:
        return
    reduction = 2 ** (len(net.config.conditioning_embedding_out_channels) - 1)
    drawn, made = control.shape[-2:], [reduction * side for side in latents.shape[-2:]]
    if list(drawn) != made:
        raise InputError(
            f"The landmarks were drawn for {drawn[1]} × {drawn[0]} pixels, and the picture has {made[1]} × {made[0]}: "
            "give its (height, width) as `size`."
        )


def asked(parts: Parts) -> tuple[bool, ...]:
    return tuple(parts() if callable(parts) else parts)


def by_name(args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a UNet's call by their names, as a new dict."""
    return dict(zip(("sample", "timestep", "encoder_hidden_states"), args, strict=False)) | kwargs


def rows(x: Tensor, batch: int) -> Tensor:
    """Repeat each of x's rows in place, so that there are `batch`."""
    if batch % len(x):
        raise ValueError(f"the face conditions have {len(x)} rows, the UNet a batch of {batch}: not a multiple")
    return x.repeat_interleave(batch // len(x), dim=0)


def add_residuals(call: dict[str, Any], down: Sequence[Tensor], mid: Tensor) -> None:
    """Put residuals into a UNet's call, added to those of another ControlNet where there are some."""
    name = "down_block_additional_residuals"
    others = call.get(name)
    call[name] = list(down) if others is None else [a + b for a, b in zip(down, others, strict=True)]
    name = "mid_block_additional_residual"
    call[name] = mid if call.get(name) is None else mid + call[name]


def scaled_output(module: nn.Module, factor: float) -> Callable[[], None]:
    """Multiply what a module gives until the returned function is called."""
    return module.register_forward_hook(lambda module, inputs, output: output * factor).remove


class Cadence:
    """Which call of the UNet this is for the picture being made, and what the network beside it does at that call.

    every: it runs at every so many-th call, the first among them, and its residuals are kept in between. end: call i
    of n has residuals while i / n < end. num_steps: n, or a function asked for it, by which the next picture is known
    to begin; needed where the others are not 1.
    """

    def __init__(self, every: int = 1, end: float = 1.0, num_steps: int | Callable[[], int] | None = None):
        if every < 1 or not 0 <= end <= 1:
            raise ValueError(
                f"every is {every}, end {end}: the network runs every 1, 2, … calls, for a share of 0 to 1"
            )
        if (every > 1 or end < 1) and num_steps is None:
            raise ValueError("the network can only rest at some steps if num_steps says how many a picture has")
        self.every, self.end, self.num_steps = every, end, num_steps
        self.calls = 0

    def next(self) -> Literal["run", "keep", "rest"]:
        """Count a call of the UNet: the network runs, its last residuals are kept, or there are none."""
        position, total = self.calls, 1
        if self.num_steps is not None:
            total = self.num_steps() if callable(self.num_steps) else self.num_steps
            self.calls = (self.calls + 1) % total
        if position / total >= self.end:
            return "rest"
        return "run" if position % self.every == 0 else "keep"


# ---------------------------------------------------------------------- one user at a time


class _Turn:
    """Of one module: its lock, and the thread that holds it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.owner: int | None = None


_TURNS: WeakKeyDictionary[nn.Module, _Turn] = WeakKeyDictionary()
_TURNS_LOCK = threading.Lock()


@contextmanager
def alone_with(*modules: nn.Module | None) -> Iterator[None]:
    """While the block lasts, no other `alone_with` has any of these modules; those of other threads wait.

    Raises RuntimeError where this very thread has one of them already, as a callback does that makes a portrait while
    one is made: it would wait for itself.
    """
    inner = {getattr(module, "_orig_mod", module) for module in modules if module is not None}  # of a compiled one
    with _TURNS_LOCK:
        turns = [_TURNS.setdefault(module, _Turn()) for module in inner]
    me = threading.get_ident()
    if any(turn.owner == me for turn in turns):
        raise RuntimeError(
            "This UNet is making a picture already, in this very thread: wait until the call or the `attached_to` "
            "block around this one is over, or load a second pipeline."
        )
    with ExitStack() as held:
        for turn in sorted(turns, key=id):  # in one order for all, so that two never wait for each other
            held.enter_context(turn.lock)
            turn.owner = me
            held.callback(setattr, turn, "owner", None)
        yield


@contextmanager
def for_this_thread(unet: nn.Module) -> Iterator[None]:
    """While the block lasts, other threads' calls of the UNet raise RuntimeError: a stock pipeline that shares it does
    not wait as `alone_with` does, and would silently draw what is attached for somebody else."""
    me = threading.get_ident()

    def refuse(module: nn.Module, args: tuple) -> None:
        if threading.get_ident() != me:
            raise RuntimeError(
                "This UNet is making a portrait in another thread: wait until that is done, or give this pipeline a "
                "UNet of its own."
            )

    handle = unet.register_forward_pre_hook(refuse)
    try:
        yield
    finally:
        handle.remove()

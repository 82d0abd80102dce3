"""FFRNet, the Face Fidelity Reinforce Network: a ControlNet that sees landmarks and face tokens, never text.

Its control picture is the drawing of the 72 landmarks; its cross-attention reads the mixer's tokens where a
ControlNet reads text, and a projection of them takes the place of SDXL's pooled text embedding. `attach` runs it
on the conditional half of classifier-free guidance only, so that guidance strengthens the face as it does the text
(added to both halves, its residuals cancel in their difference). At 1024² that is 1.20× the work of plain SDXL,
where a ControlNet on both halves costs 1.40× (FaceSnap, arXiv 2602.00627; the half is our choice). The drawing is
embedded once a picture rather than once a step, which is exact. What is not exact, and off unless asked for:
residuals kept for some steps (`every`), and none at the last ones (`end`).

`attach` hooks a UNet rather than a pipeline, so any stock SDXL pipeline (text-to-image, image-to-image,
inpainting, with LoRA or IP-Adapter) follows FFRNet while the `with` block lasts; after it nothing is changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from torch import Tensor, nn

from facesnap.attachment import (
    UNGUIDED,
    Cadence,
    Parts,
    add_residuals,
    asked,
    by_name,
    check_frame,
    rows,
    scaled_output,
)

Variant = Literal["predicted", "driver", "black", "none"]
VARIANTS: tuple[Variant, ...] = ("predicted", "driver", "black", "none")


# Channels of the control picture's embedding for each reduction: it halves the picture between one width and
# the next. 8 is ControlNet's own; the others keep its first and last width.
CONDITIONING_WIDTHS = {
    4: (16, 96, 256),
    8: (16, 32, 96, 256),
    16: (16, 32, 64, 96, 256),
    32: (16, 32, 64, 96, 128, 256),
}


class FFRNet(ControlNetModel):
    """A text-free `ControlNetModel` of the base UNet's shape, with the same configuration and file format."""

    _repeated_blocks = ["BasicTransformerBlock"]  # what `compile_repeated_blocks` compiles, as in the UNet

    @classmethod
    def from_unet(  # type: ignore[override]
        cls,
        unet: UNet2DConditionModel,
        *,
        vae_scale_factor: int = 8,
        conditioning_embedding_out_channels: tuple[int, ...] | None = None,
        load_weights_from_unet: bool = True,
    ) -> FFRNet:
        """A new FFRNet whose encoder is the UNet's and whose outputs are zero: it changes nothing yet.

        Args:
            unet: the base model's UNet.
            vae_scale_factor: pixels a latent, along one side; the control picture is reduced by it.
            conditioning_embedding_out_channels: widths of the control picture's embedding, one more than
                its halvings; by default `CONDITIONING_WIDTHS[vae_scale_factor]`.
            load_weights_from_unet: False leaves the encoder random.
        """
        widths = conditioning_embedding_out_channels or CONDITIONING_WIDTHS[vae_scale_factor]
        reduction = 2 ** (len(widths) - 1)
        if reduction != vae_scale_factor:
            raise ValueError(
                f"{len(widths)} widths reduce the control picture {reduction}x, the VAE {vae_scale_factor}x"
            )
        return super().from_unet(
            unet, conditioning_embedding_out_channels=widths, load_weights_from_unet=load_weights_from_unet
        )


@contextmanager
def attach(
    unet: nn.Module,
    ffrnet: FFRNet | None,
    *,
    tokens: Tensor,
    pooled: Tensor | None = None,
    control: Tensor | None = None,
    time_ids: Tensor | None = None,
    scale: float = 1.0,
    identity_scale: float = 1.0,
    landmark_scale: float = 1.0,
    variant: Variant = "predicted",
    parts: Parts = UNGUIDED,
    every: int = 1,
    end: float = 1.0,
    num_steps: int | Callable[[], int] | None = None,
) -> Iterator[None]:
    """While the block lasts, every forward of `unet` gets FFRNet's residuals added to whatever it is given.

    With guidance, those of the unconditional part are zero: guidance then goes from a picture of nobody in
    particular towards this face in this pose, and not only towards the text.

    Rows: `tokens`, `pooled` and `control` have B rows for B prompts; a UNet batch of k·B rows (several
    pictures a prompt, kept together as diffusers does) repeats each row k times. Tensors are moved to the
    UNet's device. FFRNet is hooked too, so one block at a time: `facesnap.attachment.alone_with` sees to that.

    Args:
        unet: the pipeline's current `unet`, compiled or not.
        ffrnet: may be None for variant "none".
        tokens: (B, m, d), from the mixer.
        pooled: (B, p), from the mixer.
        control: (B, 3, H, W) in [0, 1], the drawing of the landmarks.
        time_ids: (B, 6), SDXL's size conditioning; by default that of the UNet's own call.
        scale: of all residuals.
        identity_scale: of all that FFRNet draws from the face tokens; at 0 it sees the landmarks only.
        landmark_scale: of the control picture's embedding; at 0 FFRNet sees the face only.
        variant: a row of Table 3. "predicted" and "driver" differ only in what the caller drew; "black"
            replaces the drawing by a black picture; "none" does without FFRNet and appends the tokens to the
            UNet's text tokens, in all parts of the batch (the three scales have no meaning there).
        parts: which parts of the UNet's batch are conditional, such as `GUIDED`, or a function asked at every
            call, such as `lambda: parts_of(pipe)` (`facesnap.attachment`).
        every: FFRNet runs at every so many-th call of the UNet, the first among them; the calls between get
            the residuals of the last run. Not exact above 1.
        end: share of a picture's UNet calls that get residuals: call i of n does while i / n < end. Not
            exact below 1. (Variant "none" has no residuals; `every` and `end` have no meaning there.)
        num_steps: UNet calls that make one picture, or a function asked for them, such as
            `lambda: pipe.num_timesteps`. Needed where `every` or `end` is not 1, to know where the next
            picture begins: a block whose picture was cut short must then be left before another is made.
    """
    if variant not in VARIANTS:
        raise ValueError(f"unknown FFRNet variant {variant!r}; choose one of {', '.join(VARIANTS)}")
    cadence = Cadence(every, end, num_steps)
    hook: Any
    if variant == "none":
        hook = partial(_with_tokens, tokens)
    elif ffrnet is None or pooled is None or control is None:
        raise ValueError(f'variant "{variant}" needs an FFRNet, pooled tokens and a control picture')
    else:
        if variant == "black":
            control = torch.zeros_like(control)
        # compiled code does not notice hooks that come later, and these two scales are hooks
        eager = (identity_scale, landmark_scale) != (1, 1) and _is_compiled(ffrnet)
        pooled = pooled * identity_scale
        hook = _Residuals(ffrnet, cadence, parts, tokens, pooled, control, time_ids, scale, eager)
    with ExitStack() as hooks:
        if ffrnet is not None:
            hooks.enter_context(_scaled(ffrnet, identity_scale, landmark_scale))
        hooks.callback(unet.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


def _with_tokens(tokens: Tensor, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
    """The UNet's pre-hook of variant "none": face tokens after the text's."""
    call = by_name(args, kwargs)
    text = call["encoder_hidden_states"]
    call["encoder_hidden_states"] = torch.cat([text, rows(tokens, len(text)).to(text)], dim=1)
    return (), call


@dataclass
class _Residuals:
    """The UNet's pre-hook of `attach`, for its arguments of the same names."""

    ffrnet: FFRNet
    cadence: Cadence
    parts: Parts
    tokens: Tensor
    pooled: Tensor
    control: Tensor
    time_ids: Tensor | None
    scale: float
    eager: bool
    kept: tuple[list[Tensor], Tensor] | None = None  # of FFRNet's last run
    picture: Tensor | None = None  # `control` as FFRNet takes it; one tensor for all steps, by which `_Once` knows it

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        call = by_name(args, kwargs)
        turn = self.cadence.next()
        if turn == "rest":
            self.kept = None
            return (), call
        parts = asked(self.parts)
        if turn == "run" or self.kept is None:
            self.kept = self.run(call, len(call["sample"]) // len(parts))
        down, mid = self.kept
        if self.cadence.every == 1:  # else they would lie in memory until the next step
            self.kept = None

        def placed(residual: Tensor) -> Tensor:
            residual = residual.to(call["sample"].dtype)
            zero = torch.zeros_like(residual) if False in parts else residual
            return residual if len(parts) == 1 else torch.cat([residual if part else zero for part in parts])

        add_residuals(call, [placed(residual) for residual in down], placed(mid))
        return (), call

    def run(self, call: dict[str, Any], batch: int) -> tuple[list[Tensor], Tensor]:
        """FFRNet on the last part of the UNet's batch: the latents of all are equal, the size conditioning need not
        be, and the last is conditional."""
        sample, timestep = call["sample"], torch.as_tensor(call["timestep"])
        check_frame(self.control, sample, self.ffrnet)
        device, dtype = sample.device, _dtype(self.ffrnet)
        time_ids = call["added_cond_kwargs"]["time_ids"] if self.time_ids is None else rows(self.time_ids, batch)
        known = self.picture
        if known is None or (len(known), known.device, known.dtype) != (batch, device, dtype):
            self.picture = rows(self.control, batch).to(device, dtype)
        with torch.compiler.set_stance("force_eager") if self.eager else nullcontext():
            return self.ffrnet(
                sample[-batch:, : self.ffrnet.config.in_channels].to(dtype),
                timestep[-batch:] if timestep.ndim else timestep,
                encoder_hidden_states=rows(self.tokens, batch).to(device, dtype),
                controlnet_cond=self.picture,
                conditioning_scale=self.scale,
                added_cond_kwargs={
                    "text_embeds": rows(self.pooled, batch).to(device, dtype),
                    "time_ids": time_ids[-batch:].to(device),
                },
                return_dict=False,
            )


@contextmanager
def _scaled(ffrnet: FFRNet, identity_scale: float, landmark_scale: float) -> Iterator[None]:
    """FFRNet with its two inputs weighted, and the drawing's embedding computed once a picture."""
    with ExitStack() as hooks:
        if _can_be_kept(ffrnet):
            embedding = ffrnet.controlnet_cond_embedding
            ffrnet.controlnet_cond_embedding = _Once(embedding)
            hooks.callback(setattr, ffrnet, "controlnet_cond_embedding", embedding)
        if identity_scale != 1:
            for name, module in ffrnet.named_modules():
                if name.endswith(".attn2"):
                    hooks.callback(scaled_output(module, identity_scale))
        if landmark_scale != 1:
            hooks.callback(scaled_output(ffrnet.controlnet_cond_embedding, landmark_scale))
        yield


def _dtype(ffrnet: FFRNet) -> torch.dtype:
    """As `ffrnet.dtype`, which finds nothing inside FSDP's forward: there the weights are no parameters."""
    weight = ffrnet.conv_in.weight
    return ffrnet.dtype if isinstance(weight, nn.Parameter) else weight.dtype


class _Once(nn.Module):
    """A module that is not asked again about the very tensor it was asked about last; exact.

    Where gradients are recorded it is: a graph that steps share could not be checkpointed step by step.
    """

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module
        self.question: Tensor | None = None
        self.answer: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return self.module(x)
        if x is not self.question:
            self.question, self.answer = x, self.module(x)
        return self.answer


def _can_be_kept(ffrnet: FFRNet) -> bool:
    """Whether the drawing's embedding may be skipped: not where hooks of group offloading count on every module
    being called, nor inside a graph that was compiled with it."""
    whole = hasattr(ffrnet, "_orig_mod") or ffrnet._compiled_call_impl is not None
    return not whole and not any(hasattr(m, "_diffusers_hook") for m in ffrnet.controlnet_cond_embedding.modules())


def _is_compiled(ffrnet: FFRNet) -> bool:
    return hasattr(ffrnet, "_orig_mod") or any(m._compiled_call_impl is not None for m in ffrnet.modules())

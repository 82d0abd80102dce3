"""InstantID's public weights inside our pipeline: its networks, our Landmark Predictor.

InstantID (arXiv 2401.07519) turns a face embedding into 16 tokens by a resampler. They enter twice: in every
cross-attention of the UNet, as keys and values of their own beside the text's (decoupled attention), and in a
ControlNet, where they stand in the place of the text. The ControlNet's picture is a drawing of five points.

It is trained with the pooled text in its ControlNet and with the tokens of nobody (the resampler of a zero
embedding) in the unconditional half of guidance. So its ControlNet must run on both halves: this is what FFRNet
saves. And its five points are those of the pose photo, distances and all, which pulls the portrait towards the
driver's face; ours come from the Landmark Predictor, and so keep the reference's shape. Variant "driver" is the
plain form, with the pose photo's own points, for comparison.

The components keep their names: `mixer` is the `FaceAdapter` (faces to tokens), `ffrnet` the ControlNet. The
attention is diffusers' own `IPAdapterAttnProcessor2_0`, put into the UNet while a portrait is made.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import cv2
import numpy as np
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from torch import Tensor, nn

from facesnap import landmarks as landmarks72
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
from facesnap.errors import InputError
from facesnap.face_adapter import IDENTITY_SCALE, FaceAdapter, cross_attentions
from facesnap.faces import Face, five_points
from facesnap.ffrnet import Variant
from facesnap.geometry import letterbox
from facesnap.heads import Head
from facesnap.mixer import MixerOutput
from facesnap.pipeline import FaceSnapPipeline
from facesnap.results import PreviewResult, Source

CONTROL_SCALE = 0.8  # InstantID's own default; what the caller gives multiplies it

LIMBS = (0, 1, 3, 4)  # each is joined to the nose, point 2: eyes and mouth corners
COLOURS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 0, 255))


@contextmanager
def attach(
    unet: UNet2DConditionModel,
    controlnet: ControlNetModel | None,
    adapter: FaceAdapter,
    *,
    tokens: Tensor,
    control: Tensor | None = None,
    scale: float = 1.0,
    identity_scale: float = 1.0,
    landmark_scale: float = 1.0,
    variant: Variant = "predicted",
    parts: Parts = UNGUIDED,
    every: int = 1,
    end: float = 1.0,
    num_steps: int | Callable[[], int] | None = None,
) -> Iterator[None]:
    """While the block lasts, `unet` works as InstantID does; what `facesnap.ffrnet.attach` is to FFRNet.

    Any stock SDXL pipeline can be called inside; after it nothing is changed.

    Args:
        unet: the pipeline's current `unet`, without another IP-Adapter.
        controlnet: InstantID's; may be None for variant "none".
        tokens: (2, m, d): those of nobody, for the unconditional part, and those of the person.
        control: (1, 3, H, W) in [0, 1], the drawing of the five points.
        scale: of the ControlNet's residuals, times InstantID's own 0.8.
        identity_scale: of the decoupled attention, times InstantID's own 0.8.
        landmark_scale: of the drawing's embedding.
        variant: "black" replaces the drawing by a black picture, "none" does without the ControlNet.
        parts: which parts of the UNet's batch are conditional, or a function asked at every call.
        every, end, num_steps: the ControlNet runs at every so many-th call of the `num_steps` that make one
            picture, and for a share `end` of them; as in FFRNet's `attach`. InstantID's own is 1 and 1.

    Raises:
        InputError: another IP-Adapter is loaded into the UNet.
    """
    if unet.encoder_hid_proj is not None:
        raise InputError("Another IP-Adapter is loaded, and InstantID needs its place; unload_ip_adapter() first.")
    if variant == "none":
        controlnet = None
    elif controlnet is None or control is None:
        raise ValueError(f'variant "{variant}" needs a ControlNet and a control picture')
    if variant == "black" and control is not None:
        control = torch.zeros_like(control)
    hook = _Adapted(controlnet, Cadence(every, end, num_steps), parts, tokens, control, CONTROL_SCALE * scale)
    with ExitStack() as hooks:
        own = unet.attn_processors
        hooks.callback(unet.set_attn_processor, dict(own))
        for processor in adapter.processors:
            processor.scale = [IDENTITY_SCALE * identity_scale]
        unet.set_attn_processor(own | dict(zip(cross_attentions(unet).values(), adapter.processors, strict=True)))
        if controlnet is not None and landmark_scale != 1:
            hooks.callback(scaled_output(controlnet.controlnet_cond_embedding, landmark_scale))
        hooks.callback(unet.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


@dataclass
class _Adapted:
    """The UNet's pre-hook of `attach`, for its arguments of the same names; without a ControlNet there are only the
    tokens."""

    controlnet: ControlNetModel | None
    cadence: Cadence
    parts: Parts
    tokens: Tensor
    control: Tensor | None
    scale: float
    kept: tuple[Tensor, ...] = ()  # residuals of the last run, of the middle block last

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        call = by_name(args, kwargs)
        sample, turn = call["sample"], self.cadence.next()
        own = self.tokens[[int(conditional) for conditional in asked(self.parts)]]
        tokens = rows(own, len(sample)).to(sample)
        if self.controlnet is not None and turn != "rest":
            if turn == "run":
                self.kept = self.run(self.controlnet, call, tokens)
            # guidance may have ended since then: the conditional part comes last
            *down, mid = (residual[-len(sample) :].to(sample.dtype) for residual in self.kept)
            add_residuals(call, down, mid)
        # the form in which the UNet hands text and image tokens to IP-Adapter's processors, one adapter's
        call["encoder_hidden_states"] = (call["encoder_hidden_states"], [tokens[:, None]])
        return (), call

    def run(self, controlnet: ControlNetModel, call: dict[str, Any], tokens: Tensor) -> tuple[Tensor, ...]:
        """The ControlNet on all parts of the batch, since it reads the text and who it is."""
        sample, added, dtype = call["sample"], call["added_cond_kwargs"], controlnet.dtype
        assert self.control is not None
        check_frame(self.control, sample, controlnet)
        down, mid = controlnet(
            sample[:, : controlnet.config.in_channels].to(dtype),
            call["timestep"],
            encoder_hidden_states=tokens.to(dtype),
            controlnet_cond=rows(self.control, len(sample)).to(sample.device, dtype),
            conditioning_scale=self.scale,
            added_cond_kwargs={"text_embeds": added["text_embeds"].to(dtype), "time_ids": added["time_ids"]},
            return_dict=False,
        )
        return (*down, mid)


def draw_five(points: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Five points (5, 2) in pixels → InstantID's drawing, RGB uint8 (height, width, 3).

    Eyes, nose tip, mouth corners, in the order of detectors. The numbers are InstantID's own, in pixels whatever
    the picture's size: it was trained around 1024.
    """
    canvas = np.zeros((*size, 3), np.uint8)
    nose = points[2]
    for k in LIMBS:
        (x, y), (dx, dy) = (points[k] + nose) / 2, points[k] - nose
        axes = (int(math.hypot(dx, dy) / 2), 4)
        limb = cv2.ellipse2Poly((int(x), int(y)), axes, int(math.degrees(math.atan2(dy, dx))), 0, 360, 1)
        cv2.fillConvexPoly(canvas, limb, COLOURS[k])
    canvas = (canvas * 0.6).astype(np.uint8)
    for (x, y), colour in zip(points, COLOURS, strict=True):
        cv2.circle(canvas, (int(x), int(y)), 10, colour, -1)
    return canvas


class InstantIDPipeline(FaceSnapPipeline):
    """A FaceSnapPipeline whose mixer is InstantID's FaceAdapter and whose FFRNet is InstantID's ControlNet.

    Variants: "predicted" draws the points of the Landmark Predictor, "driver" those found in the pose photo
    (InstantID as published); "black" and "none" are as in `attach`.
    """

    kind = "instantid"
    every_step = ("unet", "ffrnet", "mixer")  # the adapter's attention sits in the UNet

    @staticmethod
    def _draw(points: np.ndarray, size: tuple[int, int]) -> np.ndarray:  # type: ignore[override]
        return draw_five(five_points(landmarks72.to_68(points)), size)

    def _attach(self, unet: Any, controlnet: Any, *, pooled: None, **conditions: Any):  # type: ignore[override]
        return attach(unet, controlnet, self.mixer, **conditions)

    @torch.no_grad()
    def mix(self, faces: Sequence[Face]) -> MixerOutput:
        """Faces of one person → tokens (2, R·m, d): of nobody, and of all the faces as one set.

        InstantID was trained on single photos. The tokens of several stand side by side as keys and values,
        none averaged with another; nobody's are repeated, which changes nothing.
        """
        embeddings = torch.from_numpy(np.stack([face.embedding for face in faces]))
        pairs = torch.stack([torch.zeros_like(embeddings), embeddings]).flatten(0, 1)
        adapter = self._part("mixer")
        tokens = adapter(pairs.to(self._execution_device, adapter.dtype))
        return MixerOutput(tokens=tokens.unflatten(0, (2, -1)).flatten(1, 2), pooled=None)

    def preview(
        self,
        reference: Source | Sequence[Source],
        pose: Source | Head | None = None,
        size: tuple[int, int] | None = None,
        *,
        variant: Variant | None = None,
        **how: Any,
    ) -> PreviewResult:
        """As `FaceSnapPipeline.preview`; variant "driver" follows the points found in the pose photo exactly."""
        variant = variant or self.settings.variant
        result = super().preview(reference, pose, size, variant=variant, **how)
        driver = result.driver_face or (result.reference_faces[0] if pose is None else None)
        if variant != "driver" or driver is None:
            return result
        parameters = inspect.signature(super().preview).parameters
        changed = [name for name, value in how.items() if value != parameters[name].default]
        if changed:
            raise InputError(f"The pose photo's own points are drawn as they are; leave out {', '.join(changed)}.")
        height, width = result.drawing.shape[:2]
        points = landmarks72.from_68(driver.landmarks[:, :2])
        points = letterbox(points, driver.size, (height, width))
        return replace(result, landmarks=points, drawing=self._draw(points, (height, width)))

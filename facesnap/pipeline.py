"""FaceSnapPipeline: reference photos, a head pose and a prompt become portraits. Where everything meets.

It is diffusers' `StableDiffusionXLPipeline` with six components more and no line of its `__call__` copied:
photos become face tokens and a drawing of 72 landmarks, then the stock call runs while FFRNet is attached to
the UNet. LoRA, IP-Adapter, callbacks, offloading and every argument of the stock call therefore work as ever.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from torch import Tensor

from facesnap import landmarks as landmarks72
from facesnap.attachment import alone_with, for_this_thread, parts_of, unet_of
from facesnap.clip import face_features
from facesnap.components import Components
from facesnap.errors import InputError
from facesnap.faces import Face, cosine, mean_direction
from facesnap.ffrnet import Variant, attach
from facesnap.geometry import in_crop
from facesnap.heads import Head
from facesnap.images import open_image
from facesnap.mixer import MixerOutput
from facesnap.predictor import LandmarkPredictor
from facesnap.preview import Change, refuse_beside
from facesnap.preview import preview as preview_of
from facesnap.request import (
    Request,
    check_scales,
    check_stock,
    frame_size,
    unread_words,
    variant_of,
    with_stock_arguments,
)
from facesnap.results import Expression, FaceSnapOutput, Picture, PreviewResult, Source
from facesnap.speed import Preset, ending_guidance, halved_images

# What diffusers' pipelines tell of their last call, as properties: num_timesteps, guidance_scale, …
LAST_CALL = (
    "_num_timesteps", "_guidance_scale", "_guidance_rescale", "_clip_skip", "_cross_attention_kwargs", "_denoising_end",
)  # fmt: skip
FEWEST_LATENTS = 4  # rows of latents that a face must span, brows to chin, to be worth drawing


class FaceSnapPipeline(Components):
    """Portraits of the person in one to four photos; its parts, and the folders they lie in, are `Components`'."""

    # How our parts join in; a subclass puts others in their place
    _attach = staticmethod(attach)
    _draw = staticmethod(landmarks72.draw)
    # While a call is at work
    _interrupt = False
    _shared: FaceSnapPipeline | None = None  # whose copy this is

    # ------------------------------------------------------------------ from photos to conditions

    @property
    def predictor(self) -> LandmarkPredictor:
        return LandmarkPredictor(self._part("head_model"))

    def analyse(self, source: Source, role: str = "The photo") -> Face:
        """The face of a photo; a `Face` is passed on as it is. `role` opens the sentence of an error."""
        if isinstance(source, Face):
            return source
        analyser = self._part("face_analyser")
        try:
            return analyser.analyse(open_image(source))
        except InputError as error:
            raise InputError(f"{role}: {error}") from error

    @torch.no_grad()
    def encode_faces(self, faces: Sequence[Face]) -> tuple[Tensor, Tensor]:
        """Faces of one person → the mixer's inputs: identity (1, R, 512) and CLIP features (1, R, P, C).

        The embeddings are raw; the features are the face encoder's penultimate hidden states. Both are
        float32 on the pipeline's device. Training reads faces through here as well.
        """
        device, crops = self._execution_device, np.stack([face.crop for face in faces])
        embeddings = torch.from_numpy(np.stack([face.embedding for face in faces])).float()
        features = face_features(self._part("face_encoder"), crops, device, self.settings.saturation)
        return embeddings[None].to(device), features[None]

    @torch.no_grad()
    def mix(self, faces: Sequence[Face]) -> MixerOutput:
        """Faces of one person → tokens (1, m, token_dim) and pooled (1, pooled_dim)."""
        embeddings, features = self.encode_faces(faces)
        mixer = self._part("mixer")
        return mixer(embeddings.to(mixer.dtype), features.to(mixer.dtype))

    def preview(
        self,
        reference: Source | Sequence[Source],
        pose: Source | Head | None = None,
        size: tuple[int, int] | None = None,
        *,
        expression: Expression = "pose",
        expression_strength: float = 1.0,
        yaw: float = 0.0,
        pitch: float = 0.0,
        roll: float = 0.0,
        head_size: float = 1.0,
        expressions: Mapping[str, float] | None = None,
        variant: Variant | None = None,
    ) -> PreviewResult:
        """Where the landmarks of the portrait will be, without making it.

        Args:
            reference: 1 to 4 photos of one person: paths, bytes, PIL images, arrays or analysed `Face`s.
            pose: how the head is held: None (turned and looking as in the first reference, as large and where a
                portrait has it), a photo of anybody (which says size and place too), the name of a template, a
                `Head`, or landmarks in pixels of the output frame: (72, 2), or iBUG's (68, 2).
            size: (height, width) of the portrait; the checkpoint's by default.
            expression: whose the face shows: the pose's, that of the first reference, or none ("neutral").
            expression_strength: 0–2, weight of that expression; at 0 the face is neutral.
            expressions: weights, each within ±1, that are added to it by the head model's own names, such as
                {"smile": 0.5}; what a model cannot do less of than not at all stops there.
            yaw, pitch, roll: degrees by which the pose is turned further, each within ±60; yaw > 0 turns to the
                picture's right, pitch > 0 looks down, roll > 0 tilts counter-clockwise.
            head_size: 0.5–2, times the pose's, about the middle of the face.
            variant: "driver" keeps the head shape of the pose photo, as in Table 3.
        """
        size = frame_size((None, None) if size is None else size, self.settings, self.vae_scale_factor)
        return preview_of(
            reference,
            pose,
            size,
            Change(expression, expression_strength, yaw, pitch, roll, head_size, expressions),
            analyse=self.analyse,
            predictor=self.predictor,
            draw=self._draw,
            keeps_shape=variant_of(variant, self.settings) == "driver",
            same_person=self.settings.same_person,
            least=min(FEWEST_LATENTS * self.vae_scale_factor, size[0] / 4),
        )

    # ------------------------------------------------------------------ the call

    @with_stock_arguments
    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self,
        prompt: str | list[str] | None = None,
        *,
        reference: Source | Sequence[Source] | None = None,
        pose: Source | Head | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        expression_strength: float = 1.0,
        identity_scale: float = 1.0,
        landmark_scale: float = 1.0,
        ffrnet_scale: float = 1.0,
        variant: Variant | None = None,
        preset: Preset | None = None,
        ffrnet_every: int | None = None,
        ffrnet_end: float | None = None,
        guidance_end: float | None = None,
        scheduler: str | None = None,
        seed: int | None = None,
        score: bool = True,
        preview: PreviewResult | None = None,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> FaceSnapOutput | tuple[Any]:
        """Portraits of the person in `reference`.

        Args:
            prompt: what else the picture shows, or a list of prompts; all get the same face and pose. Without a word
                it is the checkpoint's own.
            reference, pose, expression_strength: as in `preview`.
            height, width: pixels, multiples of the VAE's factor; the checkpoint's by default.
            num_inference_steps, guidance_scale: the checkpoint's by default.
            identity_scale: 0–2, weight of the face tokens inside FFRNet.
            landmark_scale: 0–2, weight of the landmark drawing inside FFRNet.
            ffrnet_scale: 0–2, weight of all that FFRNet adds.
            variant: a row of Table 3; the checkpoint's own by default.
            preset: "best", the default, leaves nothing out; "fast" runs FFRNet at every second step and guidance
                for the first half of them. The next three take the place of the preset's values.
            ffrnet_every: FFRNet runs at every so many-th step; 1 is exact.
            ffrnet_end, guidance_end: 0–1, share of the steps with FFRNet, and with guidance; 1 is exact.
            scheduler: a name from SCHEDULERS, for this call only; the checkpoint's own sampler by default.
            seed: of the first picture, those after it count up; drawn by chance if None. A `generator` among
                the stock arguments takes its place.
            score: whether to measure identity_scores.
            preview: the result of `preview`, in the place of reference, pose and expression_strength: the photos are
                not read again, and what only `preview` can say (expression, turn, head size) comes this way too.
            return_dict: False for the stock pipeline's tuple, with the images alone.
            kwargs: any other argument of `StableDiffusionXLPipeline.__call__`.

        Raises:
            InputError: an argument is out of bounds, a photo cannot be used; in words for the user.
            TypeError: an argument that nobody knows, which the stock call would pass over.
            RuntimeError: a callback of this very UNet's call asks for another portrait. Other threads just wait.
        """
        self._refuse_unknown(kwargs)
        if preview is not None:
            refuse_beside(preview, reference, pose, expression_strength, variant)
        size = self._frame_of(preview, height, width)
        request = Request.of(
            self.settings,
            self.scheduler,
            prompt,
            size,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            identity_scale=identity_scale,
            landmark_scale=landmark_scale,
            ffrnet_scale=ffrnet_scale,
            variant=variant,
            preset=preset,
            ffrnet_every=ffrnet_every,
            ffrnet_end=ffrnet_end,
            guidance_end=guidance_end,
            scheduler=scheduler,
            seed=seed,
            stock=kwargs,
        )
        if preview is None:
            how = {"expression_strength": expression_strength, "variant": request.variant}
            preview = self.preview(reference, pose, size, **how)  # type: ignore[arg-type]
        with alone_with(self.unet, self.ffrnet, self.mixer):
            images = self._denoise(request, preview)
        return self._output(request, preview, images, score) if return_dict else (images,)

    def _denoise(self, request: Request, preview: PreviewResult) -> Any:
        """The stock call with FFRNet attached; returns its `images`."""
        mixed = self.mix(preview.reference_faces)
        # The stock call writes its progress into the pipeline and the scheduler. Both are others for this call, so
        # that the shared pipeline never changes and a callback can set what it likes; the modules are the same.
        self._interrupt = False
        working = copy.copy(self)
        working.scheduler, working._shared = request.scheduler, self
        if request.variant != "none":
            self._part("ffrnet")
        starts_guided = request.guidance > 1 and self.unet.config.time_cond_proj_dim is None
        stock, end = request.stock, request.speed.guidance_end
        ends_guidance = starts_guided and 0 < end < 1
        if ends_guidance:
            stock = ending_guidance(end, stock)
        hook = self._attach(
            working.unet,
            self.ffrnet,
            tokens=mixed.tokens,
            pooled=mixed.pooled,
            control=_control(preview.drawing).to(mixed.tokens),
            scale=request.ffrnet_scale,
            identity_scale=request.identity_scale,
            landmark_scale=request.landmark_scale,
            variant=request.variant,
            parts=lambda: parts_of(working),
            every=request.speed.ffrnet_every,
            end=request.speed.ffrnet_end,
            num_steps=lambda: working.num_timesteps,
        )
        try:
            with ExitStack() as hooks:
                hooks.enter_context(for_this_thread(working.unet))
                hooks.enter_context(hook)
                if ends_guidance:
                    hooks.enter_context(halved_images(working.unet, lambda: working.do_classifier_free_guidance))
                images = StableDiffusionXLPipeline.__call__(
                    working,
                    list(request.prompts) or None,
                    height=request.size[0],
                    width=request.size[1],
                    num_inference_steps=request.steps,
                    guidance_scale=request.guidance if end > 0 else min(request.guidance, 1.0),
                    **stock,
                ).images
        except BaseException:
            working.maybe_free_model_hooks()  # the stock call does so only when it succeeds
            raise
        for name in LAST_CALL:
            setattr(self, name, getattr(working, name))
        return images

    @property
    def interrupt(self) -> bool:
        """Whether the call at work skips the steps that are left: `pipe._interrupt = True`, from anywhere."""
        return self._interrupt or (self._shared is not None and self._shared._interrupt)

    def _output(self, request: Request, preview: PreviewResult, images: Any, score: bool) -> FaceSnapOutput:
        scores: tuple[float | None, ...] = ()
        can_score = self.scorer is not None and self.face_analyser is not None
        if score and can_score and isinstance(images[0], Image.Image):
            scores = tuple(self.identity_score(image, preview.reference_faces) for image in images)
        return FaceSnapOutput(
            images=images,
            seed=request.seeds[0] if request.seeds else None,
            seeds=request.seeds,
            landmarks=preview.landmarks,
            drawing=preview.drawing,
            face=preview.reference_faces[0],
            reference_faces=preview.reference_faces,
            driver_face=preview.driver_face,
            identity_scores=scores,
            notes=(*preview.notes, *unread_words(request.prompts, self.tokenizer)),
            model=self.settings.name,
            scheduler=type(request.scheduler).__name__,
            size=request.size,
            steps=request.steps,
            guidance=request.guidance,
            speed=request.speed,
        )

    def _refuse_unknown(self, arguments: dict[str, Any]) -> None:
        elsewhere = inspect.signature(FaceSnapPipeline.preview).parameters
        check_stock(type(self).__name__, arguments, self._part("unet"), elsewhere)
        if self._execution_device.type == "cpu" and self.unet.dtype == torch.float16:
            raise InputError(
                "The model's weights are in half precision, in which a CPU is many times slower; load it with "
                "dtype=torch.float32, as facesnap.checkpoints.load does, or bring it to a GPU."
            )

    def _frame_of(self, preview: PreviewResult | None, height: int | None, width: int | None) -> tuple[int, int]:
        """(height, width) of the portrait; that of its preview, where there is one."""
        if preview is not None and height is None and width is None:
            height, width = preview.drawing.shape[:2]
        height, width = frame_size((height, width), self.settings, self.vae_scale_factor)
        if preview is not None and preview.drawing.shape[:2] != (height, width):
            made = "{} × {}".format(*preview.drawing.shape[1::-1])
            raise InputError(f"The preview is for {made} pixels, not for {width} × {height}: make one for that size.")
        return height, width

    @contextmanager
    def attached_to(
        self,
        pipeline: Any,
        reference: Source | Sequence[Source],
        pose: Source | Head | None = None,
        size: tuple[int, int] | None = None,
        **options: Any,
    ) -> Iterator[PreviewResult]:
        """While the block lasts, another SDXL pipeline follows the face and the pose, whatever else it does.

            with pipe.attached_to(stock, "me.jpg", "front"):
                stock("a watercolor of a person", image=picture, strength=0.6)

        Args:
            pipeline: a stock pipeline (image-to-image, inpainting, …) whose UNet has our base's shape; an
                inpainting UNet's further channels do not matter. It may share this pipeline's modules.
            reference, pose, size: as in `preview`; `size` is that of the picture that `pipeline` makes.
            options: of `facesnap.ffrnet.attach`, such as variant or the three scales, each within 0–2.
        """
        unet = unet_of(pipeline, like=self._part("unet"))
        check_scales(options)
        variant = options["variant"] = variant_of(options.get("variant"), self.settings)
        preview = self.preview(reference, pose, size, variant=variant)
        own = dict(unet.attn_processors)
        with alone_with(unet, self.ffrnet, self.mixer):
            mixed = self.mix(preview.reference_faces)
            with self._attach(
                unet,
                self.ffrnet,
                tokens=mixed.tokens,
                pooled=mixed.pooled,
                control=_control(preview.drawing).to(mixed.tokens),
                parts=lambda: parts_of(pipeline),
                num_steps=lambda: pipeline.num_timesteps,
                **options,
            ):
                try:
                    yield preview
                except BaseException:
                    unet.set_attn_processor(own)  # a PAG pipeline takes its own out only when it succeeds
                    raise

    def identity_score(self, image: Picture, references: Source | Sequence[Source]) -> float | None:
        """Cosine of the face in `image` to the references', by the recogniser that only scores.

        Several references, photos or their faces, count as the mean of their directions. None: no face in `image`.
        """
        analyser, picture = self._part("face_analyser"), open_image(image)
        try:
            face = analyser.analyse(picture, portrait=True)
        except InputError:
            return None
        given = references if isinstance(references, list | tuple) else [references]
        own, *others = (self._score_embedding(self.analyse(f)) for f in (face, *given))
        return cosine(own, mean_direction(others))

    def _score_embedding(self, face: Face) -> np.ndarray:
        # the crop is enough for 112 pixels of face, and a `Face` need not come with its picture
        return self._part("scorer").embed(face.crop, in_crop(face.keypoints, face.box))


def _control(drawing: np.ndarray) -> Tensor:
    """A drawing (h, w, 3) uint8 → FFRNet's control picture (1, 3, h, w) in [0, 1]."""
    return torch.from_numpy(drawing).permute(2, 0, 1)[None].float() / 255

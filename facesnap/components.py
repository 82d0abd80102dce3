"""The components of a FaceSnap, SDXL's and ours: read from a folder, shared with another pipeline, kept where there is
memory, written again."""

from __future__ import annotations

import inspect
import os
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import StableDiffusionXLPipeline
from huggingface_hub import create_repo
from torch import nn
from transformers import CLIPVisionModel

from facesnap import folder, memory
from facesnap.errors import InputError, did_you_mean
from facesnap.faces import FaceAnalyser, Recogniser
from facesnap.ffrnet import FFRNet
from facesnap.folder import (
    BASE_CLASSES,
    BASE_PARTS,
    HUB_ARGUMENTS,
    OUR_PARTS,
    WEIGHTS,
    Dtypes,
    Settings,
    check_dtype,
    check_variant,
    local_folder,
    read_base,
    read_parts,
    read_settings,
)
from facesnap.heads import HeadModel
from facesnap.mixer import FacialAttributeMixer

DOES = {  # the parts that are no torch modules
    "face_analyser": "analyse",
    "head_model": "points",
    "scorer": "embed",
    "scheduler": "set_timesteps",
    "tokenizer": "tokenize",
    "tokenizer_2": "tokenize",
}
UPLOAD_ARGUMENTS = {"repo_id", "private", "token", "commit_message", "create_pr"}
OPTIONS = ("add_watermarker", "force_zeros_for_empty_prompt")  # of the pipeline itself, no components


class Components(StableDiffusionXLPipeline):
    """SDXL's pipeline with six components more: mixer, FFRNet, face encoder, face pack, head model and a recogniser
    that scores. What is done with them: `facesnap.pipeline`.

    The face encoder is a CLIP vision model; it is not called `image_encoder` because that name belongs to
    IP-Adapter's own.
    """

    _optional_components = [*StableDiffusionXLPipeline._optional_components, *OUR_PARTS, "settings"]
    kind = "facesnap"  # of its checkpoints, one of `folder.KINDS`
    every_step: tuple[str, ...] = ("unet", "ffrnet")  # what runs at every step; the rest, once a picture

    # FFRNet is in no chain: like a ControlNet it runs at every step beside the UNet
    model_cpu_offload_seq = "face_encoder->mixer->text_encoder->text_encoder_2->image_encoder->unet->vae"

    def __init__(
        self,
        vae,
        text_encoder,
        text_encoder_2,
        tokenizer,
        tokenizer_2,
        unet,
        scheduler,
        mixer: FacialAttributeMixer | None = None,
        ffrnet: FFRNet | None = None,
        face_encoder: CLIPVisionModel | None = None,
        face_analyser: FaceAnalyser | None = None,
        head_model: HeadModel | None = None,
        scorer: Recogniser | None = None,
        image_encoder=None,
        feature_extractor=None,
        force_zeros_for_empty_prompt: bool = True,
        add_watermarker: bool = False,
        settings: Settings | None = None,
    ):
        super().__init__(
            vae=vae,
            text_encoder=text_encoder,
            text_encoder_2=text_encoder_2,
            tokenizer=tokenizer,
            tokenizer_2=tokenizer_2,
            unet=unet,
            scheduler=scheduler,
            image_encoder=image_encoder,
            feature_extractor=feature_extractor,
            force_zeros_for_empty_prompt=force_zeros_for_empty_prompt,
            add_watermarker=add_watermarker,
        )
        self.register_modules(
            mixer=mixer,
            ffrnet=ffrnet,
            face_encoder=face_encoder,
            face_analyser=face_analyser,
            head_model=head_model,
            scorer=scorer,
            settings=settings or Settings(),  # so that `FaceSnapPipeline(**pipe.components)` has them too
        )

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        model: str | Path,
        *,
        dtype: Dtypes = None,
        torch_dtype: Dtypes = None,
        providers: tuple[str, ...] = ("CPUExecutionProvider",),
        variant: str | None = None,
        **kwargs: Any,
    ) -> Self:
        """A pipeline from a folder, or from the Hub (its snapshot is taken first, then read as a folder).

        Args:
            model: a folder written by `save_pretrained`, or a Hub id "owner/name".
            dtype: of all torch modules, by default float32; or by component, with "default" for the others.
                torch_dtype: its older name.
            providers: ONNX Runtime's, for the face pack and the scorer.
            variant: of the files to read, such as "fp16".
            kwargs: components to use instead of the folder's, and arguments of the stock `from_pretrained`; of the
                Hub's revision, token, cache_dir, local_files_only and force_download. Where they hold a device_map,
                our parts come to the UNet's device.

        Raises:
            InputError: the folder is missing, incomplete or damaged, or an argument does not fit; the message names it.
        """
        hub = {name: kwargs.pop(name) for name in HUB_ARGUMENTS if name in kwargs}
        given = {name: kwargs.pop(name) for name in OUR_PARTS if name in kwargs}
        options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
        _refuse_strangers(given | kwargs)
        if kwargs.pop("use_safetensors", True) is False:
            raise InputError("FaceSnap reads safetensors only, never pickles; leave out use_safetensors=False.")
        if kwargs.pop("proxies", None) is not None:
            raise InputError("The Hub's library takes proxies from the environment only: set HTTPS_PROXY.")
        dtype = dtype or torch_dtype
        check_dtype(dtype)
        place = local_folder(model, **hub)
        settings = kwargs.pop("settings", None) or read_settings(place, model, cls.kind)
        check_variant(place, model, variant, given | kwargs)
        ours = read_parts(place, model, settings, dtype, providers=providers, given=given, variant=variant)
        base = read_base(place, model, dtype, variant=variant, **kwargs)
        _beside(base.unet, ours)
        return cls._around(base, ours, settings, **options)

    @classmethod
    def from_pipe(  # type: ignore[override]
        cls,
        pipeline: Any,
        model: str | Path | None = None,
        *,
        providers: tuple[str, ...] = ("CPUExecutionProvider",),
        **components: Any,
    ) -> Self:
        """A FaceSnapPipeline that shares the modules of any SDXL pipeline, and changes nothing about them.

        Unlike the stock method it leaves the source's dtypes and devices alone.

        Args:
            pipeline: an SDXL pipeline; if it is a FaceSnapPipeline, its parts of ours are shared too.
            model: a checkpoint (folder or Hub id) to take our parts and the settings from; they are
                brought to the dtype and device of the pipeline's UNet.
            providers: ONNX Runtime's, for the face pack and the scorer of `model`.
            components: single parts to use instead.

        Without a model, and around a stock pipeline, it lacks our parts: give them as `components`.
        """
        if missing := [name for name in BASE_PARTS if not hasattr(pipeline, name)]:
            raise InputError(f"from_pipe takes an SDXL pipeline; this {type(pipeline).__name__} has no {missing[0]}.")
        own_settings, settings = components.pop("settings", None), getattr(pipeline, "settings", None)
        ours = {name: getattr(pipeline, name, None) for name in OUR_PARTS}
        _refuse_strangers(components)
        given = {name: components.pop(name) for name in OUR_PARTS if name in components}
        if model is not None:
            place = local_folder(model)
            settings = read_settings(place, model, cls.kind)
            loaded = read_parts(place, model, settings, pipeline.unet.dtype, providers=providers, given=given)
            _beside(pipeline.unet, loaded)
            ours |= loaded
        return cls._around(pipeline, ours | given, own_settings or settings, **components)

    @classmethod
    def _around(cls, base: Any, ours: dict[str, Any], settings: Settings | None, **overrides: Any) -> Self:
        options: dict[str, Any] = {name: overrides.pop(name) for name in OPTIONS if name in overrides}
        optional = ("image_encoder", "feature_extractor")
        parts: dict[str, Any] = {name: getattr(base, name, None) for name in (*BASE_PARTS, *optional)} | overrides
        options = {"force_zeros_for_empty_prompt": base.config.force_zeros_for_empty_prompt} | options
        return cls(**parts, **ours, settings=settings, **options)

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str = "5GB",
        push_to_hub: bool = False,
        *,
        dtype: torch.dtype | None = None,
        **hub: Any,
    ) -> None:
        """Write the checkpoint folder that `facesnap.folder` describes.

        Args:
            safe_serialization: must be true: weights are never pickled.
            variant: of the files' names, such as "fp16".
            max_shard_size: no weights file gets larger than this, save for a single larger tensor.
            push_to_hub: whether to upload it too, as diffusers does; `hub`: its repo_id, private, token, …
            dtype: of the saved weights, by default as they are; the text encoders are float32 whatever it is.

        Raises:
            InputError: a LoRA is loaded and not fused, pickles were asked for, or nothing can be written there.
        """
        if not safe_serialization:
            raise InputError("FaceSnap writes safetensors only; leave out safe_serialization=False.")
        for name in hub.keys() - UPLOAD_ARGUMENTS:
            known = (*UPLOAD_ARGUMENTS, *inspect.signature(self.save_pretrained).parameters)
            raise TypeError(f"save_pretrained got an unexpected argument {name!r}; {did_you_mean(name, known)}")
        folder.write(
            Path(save_directory),
            {name: getattr(self, name) for name in (*BASE_PARTS, *OUR_PARTS)},
            replace(self.settings, kind=self.kind),
            dtype=dtype,
            force_zeros_for_empty_prompt=self.config.force_zeros_for_empty_prompt,
            variant=variant,
            max_shard_size=max_shard_size,
        )
        if push_to_hub:
            name, private = hub.pop("repo_id", Path(save_directory).name), hub.pop("private", None)
            repo = create_repo(name, private=private, token=hub.get("token"), exist_ok=True)
            self._upload_folder(save_directory, repo.repo_id, **hub)

    def set_memory(self, mode: str | None = None, device: str | torch.device | None = None) -> str:
        """Bring the pipeline to a device in memory mode "full", "balanced" or "low"; see `facesnap.memory`."""
        return memory.set_memory(self, mode, device)

    @wraps(StableDiffusionXLPipeline.enable_group_offload)
    def enable_group_offload(self, *args: Any, **kwargs: Any) -> None:
        # to disk too: diffusers' own would mix up the parts' files
        options = inspect.signature(super().enable_group_offload).bind(*args, **kwargs).arguments
        place = options.pop("offload_to_disk_path", None)
        if place is None:
            return super().enable_group_offload(**options)
        left = options.pop("exclude_modules", None) or ()
        memory.offload_to_disk(self, Path(place), [left] if isinstance(left, str) else left, **options)

    def _part(self, name: str) -> Any:
        part = getattr(self, name)
        if part is None:
            raise InputError(
                f"This pipeline has no {name}: give `from_pipe` a FaceSnap checkpoint as its model, or {name}=."
            )
        return part

    def compile(self, **options: Any) -> None:
        """UNet and FFRNet through torch.compile, block by block; never done unless asked for.

        The first picture of every size then takes a minute or more. Not bit-exact: compiled kernels round
        otherwise. With `identity_scale` or `landmark_scale` other than 1 FFRNet runs uncompiled.

        Args:
            options: of `torch.compile`, such as mode="max-autotune".
        """
        self.unet.compile_repeated_blocks(**options)
        if self.ffrnet is not None and self.ffrnet._repeated_blocks:  # a stock ControlNet names none
            self.ffrnet.compile_repeated_blocks(**options)


def _beside(unet: nn.Module | None, ours: dict[str, Any]) -> None:
    """Bring our parts to the device where the UNet lies."""
    for module in ours.values():
        if isinstance(module, nn.Module) and unet is not None:
            module.to(unet.device)


def _refuse_strangers(components: dict[str, Any]) -> None:
    for name, part in components.items():
        if name in (*BASE_PARTS, *OUR_PARTS) and isinstance(part, str | os.PathLike):
            raise InputError(f"The {name} was given as a path; load it first, and give what that returns.")
        if name in (*BASE_CLASSES, *WEIGHTS) and not isinstance(part, nn.Module | None):
            raise InputError(f"The {name} must be a torch module, not {type(part).__name__}.")
        if name in DOES and part is not None and not hasattr(part, DOES[name]):
            raise InputError(f"The {name} must have a method {DOES[name]!r}, which {type(part).__name__} has not.")

"""What a plan names → a ready pipeline."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel, DPMSolverSinglestepScheduler, StableDiffusionXLPipeline
from safetensors import SafetensorError, safe_open
from transformers import CLIPVisionModel

from facesnap.checkpoints import sources, verify
from facesnap.checkpoints.plans import Plan, fetch, plan
from facesnap.errors import InputError, reading
from facesnap.face_adapter import FaceAdapter
from facesnap.faces import FaceAnalyser, check_providers
from facesnap.folder import KINDS, Settings, read_weights
from facesnap.heads import from_pretrained as read_head
from facesnap.heads import gnm
from facesnap.instantid import InstantIDPipeline
from facesnap.memory import check_mode, device_of
from facesnap.pipeline import FaceSnapPipeline

PIPELINES: dict[str, type[FaceSnapPipeline]] = {made.kind: made for made in (FaceSnapPipeline, InstantIDPipeline)}


def load(
    name: str | Path | None = None,
    *,
    base: str | Path | None = None,
    memory: str | None = None,
    device: str | torch.device | None = None,
    lora: str | Path | None = None,
    face_pack: str | Path | None = None,
    head: str | Path | None = None,
    yes: bool = False,
    providers: tuple[str, ...] = ("CPUExecutionProvider",),
) -> FaceSnapPipeline:
    """A ready pipeline, float16 on a GPU and float32 on a CPU, whatever the files hold.

    Args:
        name: "mini", "instantid", or a folder or Hub id with FaceSnap weights. None: what FACESNAP_MODEL names,
            else the mini; FACESNAP_BASE and FACESNAP_LORA then count too, and what they name is fetched unasked.
        base: the SDXL to stand on: a folder, a safetensors file or a Hub id. By default the checkpoint's own,
            else Lykon/dreamshaper-xl-v2-turbo.
        memory: "full", "balanced" or "low" (`facesnap.memory`); by default FACESNAP_MEMORY, else what fits.
        device: by default CUDA, Apple's GPU or the CPU, whichever there is.
        lora: a LoRA for the base model: a safetensors file, its folder or a Hub id.
        face_pack, head: folders to use instead of the checkpoint's, or of antelopev2 and GNM v3; by default
            FACESNAP_FACE_PACK and FACESNAP_HEAD.
        yes: whether more than 100 MB may be fetched unasked.
        providers: ONNX Runtime's, for the face pack and the scorer.

    Raises:
        InputError: a name, file or mode is wrong, something cannot be fetched or read, parts do not fit.
    """
    if name is None:
        name, yes = os.environ.get("FACESNAP_MODEL") or "mini", True
        base = base or os.environ.get("FACESNAP_BASE")
        lora = lora or os.environ.get("FACESNAP_LORA")
    face_pack = face_pack or os.environ.get("FACESNAP_FACE_PACK")
    head = head or os.environ.get("FACESNAP_HEAD")
    memory = memory or os.environ.get("FACESNAP_MEMORY")
    target = device_of(device)
    check_providers(providers)
    if memory is not None:
        check_mode(memory, target)  # before gigabytes are read
    wanted = plan(name, base=base, lora=lora, face_pack=face_pack, head=head)
    fetch(wanted, yes)

    dtype = torch.float32 if target.type == "cpu" else torch.float16
    stock = read_base(wanted, dtype)
    given = read_parts(wanted, stock, dtype, providers)
    pipeline_class = PIPELINES[wanted.kind]
    if wanted.is_public_instantid:
        pipe = pipeline_class.from_pipe(stock, **given)
        about = {"license": sources.INSTANTID.licence}
        pipe.settings = Settings(name="InstantID", kind="instantid", steps=30, guidance=5.0, about=about)
    else:
        pipe = pipeline_class.from_pipe(stock, wanted.place("weights"), providers=providers, **given)
    if wanted.base_was_chosen or wanted.is_public_instantid:
        sample_as(pipe, wanted.base)
    if "lora" in wanted.places or "lora" in wanted.sources:
        load_lora(pipe, wanted.place("lora"))
    pipe.set_memory(memory, target)
    return pipe


def sample_as(pipe: FaceSnapPipeline, base: str | None) -> None:
    """Steps, guidance and scheduler as a known base wants them."""
    if base not in sources.BASES:
        return
    how = sources.BASES[base]
    pipe.settings = replace(pipe.settings, steps=how.steps, guidance=how.guidance)
    if how.turbo:  # "DPM++ SDE Karras" as diffusers has it: one call of the UNet a step
        pipe.scheduler = DPMSolverSinglestepScheduler.from_config(
            pipe.scheduler.config, algorithm_type="dpmsolver++", use_karras_sigmas=True, final_sigmas_type="zero"
        )


def read_base(wanted: Plan, dtype: torch.dtype) -> StableDiffusionXLPipeline:
    part = "base" if "base" in wanted.places | wanted.sources else "weights"
    place = wanted.place(part)
    if place.is_file():
        _check_single_file(place)
        with reading(f"The base model {place.name} of the checkpoint '{wanted.name}'"):
            return StableDiffusionXLPipeline.from_single_file(
                str(place), config=str(wanted.place("base_configs")), dtype=dtype, local_files_only=True
            )
    ours = {}
    if "ffrnet" in wanted.places | wanted.sources:
        ours["ffrnet"] = ffrnet_place(wanted)
    elif wanted.is_public_instantid:
        ours["ffrnet"] = wanted.place("weights") / "ControlNetModel"
    elif "weights" in wanted.places | wanted.sources:
        names = KINDS[wanted.kind]
        ours = {name: wanted.place("weights") / name for name in names if (wanted.place("weights") / name).is_dir()}
    problems = verify.before_loading(place, ours)
    if problems:
        raise InputError(f"'{wanted.name}' cannot be loaded: {' '.join(problems)}")
    variant = "fp16" if any((place / "unet").glob("*.fp16.*")) else None
    with reading(f"The base model of the checkpoint '{wanted.name}'"):
        return StableDiffusionXLPipeline.from_pretrained(
            place, dtype=dtype, variant=variant, use_safetensors=True, local_files_only=True
        )


def _check_single_file(path: Path) -> None:
    """Only the header is read: whether the file is whole, and an SDXL by the names of its text encoders."""
    try:
        with safe_open(path, framework="pt") as tensors:
            keys = set(tensors.keys())
    except (SafetensorError, OSError) as error:
        raise InputError(f"The base model '{path.name}' is truncated or damaged; fetch it again.") from error
    if any(key.startswith("cond_stage_model.") for key in keys):
        raise InputError(f"The base model '{path.name}' is a Stable Diffusion 1 or 2, and FaceSnap needs SDXL.")
    if not any(key.startswith("conditioner.embedders.1.") for key in keys):
        raise InputError(f"The file '{path.name}' is no SDXL checkpoint with UNet, VAE and both text encoders.")


def read_parts(wanted: Plan, stock: Any, dtype: torch.dtype, providers: tuple[str, ...]) -> dict[str, Any]:
    """The components that do not lie in the folder of the weights."""
    given: dict[str, Any] = {}
    if wanted.is_public_instantid:
        place = wanted.place("weights")
        given["mixer"] = FaceAdapter.from_instantid(place / "ip-adapter.bin", stock.unet).to(dtype)
        with reading(f"The ControlNetModel of the checkpoint '{wanted.name}'"):
            given["ffrnet"] = read_weights(ControlNetModel, place / "ControlNetModel", dtype)
    if "face_encoder" in wanted.places | wanted.sources:
        with reading(f"The face encoder of the checkpoint '{wanted.name}'"):
            given["face_encoder"] = read_weights(CLIPVisionModel, wanted.place("face_encoder"), dtype)
    if "face_pack" in wanted.places | wanted.sources:
        given["face_analyser"] = FaceAnalyser.from_pretrained(wanted.place("face_pack"), providers=providers)
    if "head" in wanted.places:
        with reading(f"The head model of the checkpoint '{wanted.name}'"):
            given["head_model"] = read_head(wanted.place("head"))
    elif "head" in wanted.sources:
        landmarks = wanted.place("head_landmarks") / Path(sources.HEAD_LANDMARKS.files[0].path).name
        given["head_model"] = gnm.read(wanted.place("head") / sources.HEAD.files[0].path, landmarks)
    return given


def load_lora(pipe: Any, place: Path) -> None:
    """A LoRA, one safetensors file or the folder of one, into an SDXL pipeline; InputError where it is none or does not
    fit."""
    files = [place] if place.is_file() else sorted(place.glob("*.safetensors"))
    if len(files) != 1 or files[0].suffix != ".safetensors":
        raise InputError(f"'{place.name}' is no LoRA: one safetensors file is needed, {len(files)} were found.")
    try:
        pipe.load_lora_weights(str(files[0].parent), weight_name=files[0].name, local_files_only=True)
    except Exception as error:  # peft and diffusers raise what they like for a LoRA of another model
        raise InputError(
            f"The LoRA '{files[0].name}' does not fit this base model or is damaged ({type(error).__name__})."
        ) from error
    if not pipe.get_list_adapters():  # diffusers says so in its log only
        raise InputError(
            f"The LoRA '{files[0].name}' does not fit this base model: no layer of it has that name. It was made for "
            "another architecture; use one for SDXL."
        )


def ffrnet_place(wanted: Plan) -> Path:
    """The folder of the FFRNet that an untrained FaceSnap begins with."""
    place = wanted.place("ffrnet")
    nested = place / ("ControlNetModel" if "ffrnet" in wanted.sources else "ffrnet")
    return nested if nested.is_dir() else place

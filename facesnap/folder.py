"""What a checkpoint folder holds, and how it is read and written. Safetensors and ONNX only, never pickles.

A checkpoint is a stock SDXL folder (`model_index.json` names the base model's parts only, so that diffusers'
`StableDiffusionXLPipeline` loads it too) with our parts beside them:

    facesnap.json   the checkpoint's defaults (`Settings`)
    mixer/ ffrnet/ face_encoder/ head/   config.json + safetensors
    face_pack/      detector, landmark net and recogniser as ONNX files in InsightFace's layout
    scorer/         the recogniser that only scores, and the nets of the evaluation; may be absent
"""

from __future__ import annotations

import copy
import glob
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeAlias

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.utils.peft_utils import recurse_remove_peft_layers
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import RemoteEntryNotFoundError
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPVisionModel

import facesnap
from facesnap import headers
from facesnap.errors import InputError, did_you_mean, reading, shown
from facesnap.face_adapter import FaceAdapter
from facesnap.faces import FaceAnalyser, Recogniser
from facesnap.ffrnet import VARIANTS, FFRNet, Variant
from facesnap.heads import from_pretrained as read_head
from facesnap.mixer import FacialAttributeMixer

SETTINGS_NAME = "facesnap.json"
SCORER_NAME = "recogniser.onnx"
BASE_PARTS = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet", "scheduler")
BASE_CLASSES: dict[str, Any] = {  # of the base model's parts that have weights
    "unet": UNet2DConditionModel,
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModel,
    "text_encoder_2": CLIPTextModelWithProjection,
}
KINDS: dict[str, dict[str, Any]] = {  # the kinds of checkpoint, and the classes of our parts that have weights
    "facesnap": {"mixer": FacialAttributeMixer, "ffrnet": FFRNet, "face_encoder": CLIPVisionModel},
    "instantid": {"mixer": FaceAdapter, "ffrnet": ControlNetModel},
}
WEIGHTS = ("mixer", "ffrnet", "face_encoder")
OUR_PARTS = (*WEIGHTS, "face_analyser", "head_model", "scorer")
Dtypes: TypeAlias = (
    torch.dtype | dict[str, torch.dtype] | None
)  # of all parts, float32 where None; or by part, "default"
HUB_ID = r"[\w-][\w.-]*/[\w.-]+"
HUB_ARGUMENTS = ("revision", "token", "cache_dir", "local_files_only", "force_download")


@dataclass(frozen=True)
class Settings:
    """What a checkpoint wants when the caller does not say: facesnap.json.

    kind: of its pipeline, one of KINDS; `facesnap.checkpoints.load` reads any.
    size: side of its portraits in pixels. steps, guidance: of its sampler. variant: the row of Table 3 it was
    trained as. prompt: what is asked for where nothing is. same_person: cosine of two embeddings below which they are
    taken for different people. saturation: how much of their colour the face encoder is shown of the references, 1
    for all of it: photographs are more vivid than rendered people, and an encoder that knows only these takes the
    warm gloss on black hair for brown.
    about: whatever its maker notes (data version, licence), kept and not read.
    """

    name: str = "FaceSnap"
    kind: str = "facesnap"
    size: int = 1024
    steps: int = 8
    guidance: float = 2.0
    variant: Variant = "predicted"
    prompt: str = "a photo of a person"
    same_person: float = 0.25
    saturation: float = 1.0
    about: dict[str, Any] = field(default_factory=dict)


def place_of(folder: Path, part: str) -> Path:
    """Where a part lies in a checkpoint folder."""
    return folder / {"face_analyser": "face_pack", "head_model": "head"}.get(part, part)


def local_folder(model: str | Path, **hub: Any) -> Path:
    """The folder of a checkpoint, or the snapshot of a Hub id "owner/name", taken with `hub` (HUB_ARGUMENTS)."""
    if not isinstance(model, str | os.PathLike):
        raise InputError(f"A checkpoint is named by its folder or its Hub id, not by a {type(model).__name__}.")
    if os.path.isdir(model):  # Path's own falls over a name that is too long
        return Path(model)
    problem = f"There is no folder '{shown(model, 200)}'"
    if re.fullmatch(HUB_ID, str(model)):
        try:
            hf_hub_download(str(model), SETTINGS_NAME, **hub)  # what is no FaceSnap is not fetched for nothing
            return Path(snapshot_download(str(model), **hub))
        except RemoteEntryNotFoundError:
            raise InputError(
                f"The repository '{model}' has no {SETTINGS_NAME}, so it holds no FaceSnap; load a plain SDXL with "
                "diffusers and give it to FaceSnapPipeline.from_pipe with a FaceSnap checkpoint."
            ) from None
        except (OSError, ValueError) as error:  # Hub errors and those of the network are OSErrors
            problem += f", and the Hub gave none of that name ({type(error).__name__})"
            raise InputError(f"{problem}; give the folder of a FaceSnap checkpoint or its Hub id.") from error
    raise InputError(f"{problem}; give the folder of a FaceSnap checkpoint or its Hub id.")


# ---------------------------------------------------------------------- reading


def read_settings(folder: Path, name: str | Path | None = None, kind: str | None = None) -> Settings:
    """facesnap.json of a checkpoint that errors call `name`; it must be of that kind where one is given."""
    name, path = name or folder, folder / SETTINGS_NAME
    if not path.is_file():
        if (folder / "model_index.json").is_file():
            raise InputError(
                f"'{name}' is a plain SDXL checkpoint without FaceSnap's parts; load it with diffusers "
                "and give it to FaceSnapPipeline.from_pipe with a FaceSnap checkpoint."
            )
        raise incomplete(name, SETTINGS_NAME)
    with reading(f"The {SETTINGS_NAME} of the checkpoint '{name}'"):
        values = {**json.loads(path.read_text(encoding="utf-8"))}  # an error where it is none of names
        written_by = values.pop("facesnap", None)
        unknown = [repr(key) for key in sorted(values.keys() - {known.name for known in fields(Settings)})]
        for key, choices in (("kind", KINDS), ("variant", VARIANTS)):
            if key in values and values[key] not in choices:
                unknown.append(f"the {key} {values[key]!r}")
        if unknown:
            by = f", written by facesnap {written_by}" if written_by else ""
            raise InputError(
                f"The {SETTINGS_NAME} of the checkpoint '{name}'{by} has {unknown[0]}, which facesnap "
                f"{facesnap.__version__} does not know; update facesnap."
            )
        settings = Settings(**values)
        for key, default in asdict(Settings()).items():
            value, fits = values.get(key, default), (int, float) if isinstance(default, float) else type(default)
            if isinstance(value, bool) or not isinstance(value, fits):
                said = f"The {SETTINGS_NAME} of the checkpoint '{name}' has {value!r} as its {key}"
                raise InputError(f"{said}, where something like {default!r} belongs.")
    if kind not in (None, settings.kind):
        raise InputError(
            f"The checkpoint '{name}' is of kind '{settings.kind}', not '{kind}'; "
            "facesnap.checkpoints.load opens every kind."
        )
    return settings


def check_dtype(dtype: Any) -> None:
    """InputError for what is neither torch's, nor that by part; the libraries would take float32 instead."""
    for part, kind in dtype.items() if isinstance(dtype, dict) else [(None, dtype)]:
        if part is not None and part not in (known := (*BASE_PARTS, *OUR_PARTS, "image_encoder", "default")):
            raise InputError(f"There is no part {part!r} to have a dtype; {did_you_mean(part, known)}")
        if not isinstance(kind, torch.dtype | None):
            raise InputError(f"The dtype is {kind!r}; give one of torch's, such as torch.bfloat16.")


def check_variant(folder: Path, name: str | Path, variant: str | None, given: Iterable[str] = ()) -> None:
    """InputError unless every part of the checkpoint has files of that variant, save for those `given`."""
    for part in (*BASE_CLASSES, *WEIGHTS):
        place = place_of(folder, part)
        if part in given or not place.is_dir():
            continue
        if variant is not None and not any(place.glob(f"*.{glob.escape(str(variant))}[.-]*")):
            raise InputError(
                f"The {part} of the checkpoint '{name}' has no files of variant {variant!r}; leave it out."
            )
        if variant is None and (others := _only_variants(place)):
            raise InputError(
                f"The {part} of the checkpoint '{name}' has files of variant {', '.join(map(repr, others))} only; "
                f"load it with variant={others[0]!r}."
            )


def _only_variants(place: Path) -> list[str]:
    """Of what variants a folder holds weights; none where it holds plain ones too."""
    files = [re.sub(r"-\d{5}-of-\d{5}", "", file.name) for file in place.glob("*.safetensors")]
    variants = {name.removesuffix(".safetensors").partition(".")[2] for name in files}
    return sorted(variants) if "" not in variants else []


def incomplete(model: str | Path, part: str) -> InputError:
    return InputError(f"The checkpoint '{model}' has no {part}; fetch or build it again.")


def read_weights(model_class: Any, place: Path, dtype: torch.dtype | None = None, **options: Any) -> Any:
    """A torch part, ready to use, float32 unless a dtype is given; ValueError where tensors are missing, which the
    libraries would fill with random numbers."""
    module, report = model_class.from_pretrained(
        place, dtype=dtype or torch.float32, use_safetensors=True, output_loading_info=True, **options
    )
    if report["missing_keys"]:
        raise ValueError(f"{len(report['missing_keys'])} tensors are missing")
    return module.eval()


def read_base(folder: Path, name: str | Path, dtype: Dtypes = None, **options: Any) -> StableDiffusionXLPipeline:
    """The base model of a checkpoint folder that errors call `name`; components among the `options` are not read."""
    for part in BASE_PARTS:
        place = folder / part
        if part in options:
            continue
        if not place.is_dir():
            raise incomplete(name, part)
        if part in BASE_CLASSES:
            found, damage = headers.read(place)
            if not damage and (gaps := headers.gaps(place, BASE_CLASSES[part], found)):
                raise InputError(f"The checkpoint '{name}' is damaged: {part}: {gaps[0]} Fetch or build it again.")
    dtypes = dtype or torch.float32
    if isinstance(dtypes, dict):  # diffusers warns of parts that it does not know
        dtypes = {part: kind for part, kind in dtypes.items() if part in (*BASE_PARTS, "default")}
    others = [option for option, value in options.items() if option not in BASE_PARTS and value is not None]
    advice = "fetch or build it again" + (f", or leave out {', '.join(others)}" if others else "")
    with reading(f"The base model of the checkpoint '{name}'", advice):
        return StableDiffusionXLPipeline.from_pretrained(
            folder, dtype=dtypes, use_safetensors=True, **{"add_watermarker": False} | options
        )


def read_parts(
    folder: Path,
    name: str | Path,
    settings: Settings,
    dtype: Dtypes = None,
    *,
    providers: tuple[str, ...] = ("CPUExecutionProvider",),
    given: dict[str, Any] | None = None,
    variant: str | None = None,
) -> dict[str, Any]:
    """Our parts of a checkpoint folder that errors call `name`, by their names; those `given` are not read."""

    def weights(part: str, model_class: Any) -> Callable[[Path], Any]:
        own = dtype.get(part, dtype.get("default")) if isinstance(dtype, dict) else dtype
        return lambda place: read_weights(model_class, place, own, variant=variant)

    given = given or {}
    readers: dict[str, Callable[[Path], Any]] = {
        **{part: weights(part, model_class) for part, model_class in KINDS[settings.kind].items()},
        "face_analyser": lambda place: FaceAnalyser.from_pretrained(place, providers=providers),
        "head_model": read_head,
        "scorer": lambda place: Recogniser(place / SCORER_NAME, providers),
    }
    parts: dict[str, Any] = dict.fromkeys(WEIGHTS)
    for part, read in readers.items():
        place = place_of(folder, part)
        optional = part == "scorer" or (part == "ffrnet" and settings.variant == "none")
        if part in given or (optional and not place.is_dir()):
            parts[part] = given.get(part)
            continue
        if not place.is_dir():
            raise incomplete(name, place.name)
        with reading(f"The {place.name} of the checkpoint '{name}'"):
            parts[part] = read(place)
    return parts


# ---------------------------------------------------------------------- writing


def write(
    folder: Path,
    parts: dict[str, Any],
    settings: Settings,
    *,
    dtype: torch.dtype | None = None,
    force_zeros_for_empty_prompt: bool = True,
    **options: Any,
) -> None:
    """Write a checkpoint folder.

    Args:
        parts: components by their names, BASE_PARTS and OUR_PARTS; None where there is none.
        dtype: of the saved weights, by default as they are. The text encoders are float32 whatever it is: loaded
            without a dtype, transformers keeps a file's own while diffusers takes float32, and half-precision
            encoders would meet a float32 UNet.
        options: of diffusers' `save_pretrained`: max_shard_size, variant.

    Raises:
        InputError: a LoRA lies over a part, so that its file could not be read again; there can be no such folder.
    """
    check_dtype(dtype)
    variant = options.get("variant")
    _check_names(variant, options.get("max_shard_size"))
    ready = {name: _to_save(name, part, dtype) for name, part in parts.items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"There can be no folder '{folder}' ({type(error).__name__}); choose another place."
        ) from error
    is_checkpoint = (folder / SETTINGS_NAME).is_file()  # any other folder may have things of such names
    for name in (*BASE_CLASSES, *WEIGHTS):  # of weights in pieces that lie there; what is in one would not be found
        for index in place_of(folder, name).glob(f"*.index.{variant}.json" if variant else "*.safetensors.index.json"):
            index.unlink()
    stock = StableDiffusionXLPipeline(
        **{name: ready[name] for name in BASE_PARTS},
        force_zeros_for_empty_prompt=force_zeros_for_empty_prompt,
        add_watermarker=False,
    )
    stock.save_pretrained(folder, **options)
    for name in OUR_PARTS:
        part, place = ready.get(name), place_of(folder, name)
        if part is None:
            if is_checkpoint and place.is_dir():
                shutil.rmtree(place)
            continue
        if name in WEIGHTS:
            part.save_pretrained(place, **options)
        elif name != "scorer":
            part.save_pretrained(place)
        elif part.path.resolve() != (place / SCORER_NAME).resolve():
            place.mkdir(exist_ok=True)
            shutil.copyfile(part.path, place / SCORER_NAME)
            for file in part.path.parent.glob("attributes*"):  # the evaluation's own nets lie beside it
                shutil.copyfile(file, place / file.name)
    values = {"facesnap": facesnap.__version__} | asdict(settings)
    (folder / SETTINGS_NAME).write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _check_names(variant: Any, max_shard_size: Any) -> None:
    if variant is not None and not re.fullmatch(r"[\w.-]+", str(variant)):
        raise InputError(f"A variant is a word in the names of files, such as 'fp16', and cannot be {variant!r}.")
    if max_shard_size is not None and not re.fullmatch(r"(?i)\d+|[\d.]+ *[KMGT]I?B", str(max_shard_size)):
        raise InputError(f"max_shard_size is {shown(max_shard_size)}; give bytes, or words such as '5GB'.")


def _to_save(name: str, part: Any, dtype: torch.dtype | None) -> Any:
    """A part as it is written; the one in use stays as it is."""
    if not isinstance(part, nn.Module):
        return part
    from peft.tuners.tuners_utils import BaseTunerLayer  # slow to import

    layers = [module for module in part.modules() if isinstance(module, BaseTunerLayer)]
    if layers and not all(layer.merged for layer in layers):
        raise InputError(
            f"A LoRA lies over the {name}, and its folder could not be read again: fuse_lora() puts it into the "
            "weights that are saved, unload_lora_weights() leaves it out."
        )
    wanted = torch.float32 if name.startswith("text_encoder") else dtype or part.dtype
    if not layers and part.dtype == wanted:
        return part
    copied = copy.deepcopy(part).to(wanted)
    if layers:
        recurse_remove_peft_layers(copied)
        del copied.peft_config
        copied._hf_peft_config_loaded = False  # else transformers saves adapters only
    return copied

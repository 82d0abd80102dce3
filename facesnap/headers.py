"""The tensors of a folder's safetensors files, by their headers, against those that its config.json asks for.

Nothing is loaded: the models are built on torch's meta device, so a part of 5 GB is compared in a second.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

Shape = tuple[int, ...]
Headers = dict[str, tuple[Shape, str]]  # name → shape and dtype, such as "F16"

# Names that transformers gives or takes on loading, and what it computes anew
PREFIXES = ("text_model.", "vision_model.")
COMPUTED = "position_ids"
# of a VAE's attention, before diffusers 0.17, which still reads them
OLD_NAMES = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


def read(place: Path) -> tuple[Headers, list[str]]:
    """Every tensor of a part, and sentences on what is wrong with its files."""
    found: Headers = {}
    try:
        files, missing = weight_files(place)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # JSON of any form
        return found, ["the index of its files is damaged."]
    problems = [f"the shard {file} is missing." for file in missing]
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118
                    part = tensors.get_slice(key)
                    found[key] = (tuple(part.get_shape()), part.get_dtype())
        except (SafetensorError, OSError):
            problems.append(f"{file.name} is truncated or damaged.")
    if not files and not missing:
        problems.append("there are no safetensors files.")
    return found, problems


def weight_files(place: Path) -> tuple[list[Path], list[str]]:
    """The safetensors files of a part that a loader takes (half precision first), and the names of missing shards."""
    for variant in (".fp16", ""):
        index = next(iter(place.glob(f"*.safetensors.index{variant}.json")), None)
        if index is not None:
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            files = [place / shard for shard in shards]
            return [file for file in files if file.is_file()], [file.name for file in files if not file.is_file()]
        single = [place / f"{stem}{variant}.safetensors" for stem in ("model", "diffusion_pytorch_model")]
        if files := [file for file in single if file.is_file()]:
            return files, []
    return [], []


def expected(place: Path, model_class: Any) -> dict[str, Shape]:
    """What the model described by `place`/config.json holds, under the names that files of all versions share.

    Raises whatever that class raises for a config that no such model can be made of.
    """
    with torch.device("meta"):
        if hasattr(model_class, "load_config"):
            model = model_class.from_config(model_class.load_config(place))
        else:
            model = model_class(model_class.config_class.from_pretrained(place))
    return {bare(key): tuple(tensor.shape) for key, tensor in model.state_dict().items() if not key.endswith(COMPUTED)}


def bare(key: str) -> str:
    """A tensor's name without what versions of the libraries add or call otherwise."""
    for old, new in OLD_NAMES.items():
        key = key.replace(old, new)
    return key.removeprefix(PREFIXES[0]).removeprefix(PREFIXES[1])


def missing(found: Headers, wanted: dict[str, Shape]) -> list[str]:
    return sorted(wanted.keys() - {bare(key) for key in found})


def gaps(place: Path, model_class: Any, found: Headers) -> list[str]:
    """A sentence, if tensors are missing that diffusers and transformers would fill with random numbers, saying so in
    their logs only. A config that no model can be made of has none: whoever loads it says so."""
    try:
        lost = missing(found, expected(place, model_class))
    except Exception:
        return []
    return [f"{len(lost)} tensors are missing, such as {lost[0]}."] if lost else []

"""What is wrong with a checkpoint folder, found without loading it: keys, shapes, dtypes, and whether parts fit.

Only the headers of the safetensors files are read, so that a checkpoint of 14 GB is checked in seconds. The ONNX files
are the exception: onnxruntime opens them.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import CLIPTokenizer, CLIPVisionModel

from facesnap import headers
from facesnap.checkpoints.sources import CLIP, FACE_PACK, HEAD
from facesnap.errors import InputError, shown
from facesnap.faces import FaceAnalyser, Recogniser
from facesnap.folder import BASE_CLASSES, BASE_PARTS, KINDS, SCORER_NAME, place_of, read_settings
from facesnap.heads import from_pretrained as read_head

FROM_ELSEWHERE = {  # parts that need not be in a folder: what `load` takes instead
    **dict.fromkeys(BASE_PARTS, "the base model"),
    "face_encoder": CLIP.repo,
    "face_analyser": FACE_PACK.repo,
    "head_model": HEAD.repo,
    "scorer": "none: portraits get no identity score",
}
EVALUATED_WITH = (SCORER_NAME, "attributes.json", "attributes_face.onnx", "attributes_whole.onnx")  # in scorer/


@dataclass(frozen=True)
class Part:
    """A component as it lies on the disk: tensors, bytes, dtype ("F16"), and what is wrong with it."""

    name: str
    tensors: int
    size: int
    dtype: str
    problems: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """parts that are there; absent ones with where they come from; problems of them and between them; unevaluated:
    files of scorer/ without which `facesnap.evaluation` cannot judge this checkpoint."""

    kind: str
    parts: tuple[Part, ...]
    absent: dict[str, str]
    problems: tuple[str, ...]
    unevaluated: tuple[str, ...] = ()


def check(folder: str | Path) -> Report:
    """Verify a checkpoint folder; raises InputError where there is none (no facesnap.json)."""
    if not os.path.isdir(folder):  # Path's own falls over a name that is too long
        raise InputError(f"There is no folder '{shown(folder, 200)}'.")
    folder = Path(folder)
    settings = read_settings(folder)
    classes = BASE_CLASSES | KINDS[settings.kind]
    names = (*BASE_PARTS, *KINDS[settings.kind], "face_analyser", "head_model", "scorer")
    parts, absent, problems = [], {}, []
    for name in names:
        place = place_of(folder, name)
        if place.is_dir():
            parts.append(weights(name, place, classes[name]) if name in classes else _other(name, place))
        elif name in FROM_ELSEWHERE or (name == "ffrnet" and settings.variant == "none"):
            absent[name] = FROM_ELSEWHERE.get(name, "not needed")
        else:
            problems.append(f"{name} is missing.")
    if "unet" in absent and len({"unet", "vae", "text_encoder", "scheduler"} & set(absent)) < 4:
        lacking = sorted(set(absent) & set(BASE_PARTS))
        problems.append(f"The base model is there in part only; it lacks {', '.join(lacking)}.")
    problems += [problem for part in parts for problem in part.problems]
    problems += mismatches({name: _config(place_of(folder, name)) for name in classes})
    unevaluated = tuple(name for name in EVALUATED_WITH if not (folder / "scorer" / name).is_file())
    return Report(settings.kind, tuple(parts), absent, tuple(problems), unevaluated)


def before_loading(folder: Path, parts: dict[str, Path]) -> list[str]:
    """The quick half of `check`, for what `load` is about to read: files there and whole, parts that fit.

    folder: of the base model; parts: folders of our own torch components.
    """
    index = _config(folder, "model_index.json")
    if index is None:
        return ["it has no model_index.json, so it is no diffusers folder"]
    if "text_encoder_2" not in index:
        made_by = index.get("_class_name", "unknown")
        return [f"it is a {made_by}, of Stable Diffusion 1 or 2, and FaceSnap needs SDXL"]
    places = {name: folder / name for name in BASE_CLASSES} | parts
    problems = mismatches({name: _config(place) for name, place in places.items()})
    problems += [f"{name} is missing." for name in BASE_PARTS if not (folder / name).is_dir()]
    for name, place in places.items():
        if place.is_dir():
            found, wrong = headers.read(place)
            if not wrong and name in BASE_CLASSES:
                wrong = headers.gaps(place, BASE_CLASSES[name], found)
            problems += [f"{name}: {problem}" for problem in wrong]
    return problems


def weights(name: str, place: Path, model_class: Any) -> Part:
    """Compare the files of a torch component with the model that its config.json describes."""
    found, problems = headers.read(place)
    if not problems:
        problems += _against_config(found, place, model_class)
    dtypes = {dtype for shape, dtype in found.values() if dtype not in ("I64", "I32")}
    if len(dtypes) > 1:
        problems.append(f"its tensors are of several dtypes, {', '.join(sorted(dtypes))}.")
    if dtypes - {"F16", "BF16", "F32"}:
        problems.append(f"its tensors are {', '.join(sorted(dtypes))}; float32, float16 or bfloat16 is needed.")
    size = sum(file.stat().st_size for file in headers.weight_files(place)[0]) if found else 0
    named = tuple(f"{name}: {problem}" for problem in problems)
    return Part(name, len(found), size, "/".join(sorted(dtypes)), named)


def _against_config(found: headers.Headers, place: Path, model_class: Any) -> Iterator[str]:
    try:
        expected = headers.expected(place, model_class)
    except Exception as error:  # a config that a model cannot be made of fails in that model's own way
        yield f"its config.json describes no {model_class.__name__} ({type(error).__name__}: {error})."
        return
    have = {headers.bare(key): shape for key, (shape, dtype) in found.items()}
    if missing := headers.missing(found, expected):
        yield f"{len(missing)} tensors are missing, such as {missing[0]}."
    others = {key: shape for key, shape in have.items() if key in expected and shape != expected[key]}
    if others:
        key = min(others)
        yield f"{len(others)} tensors have other shapes, such as {key}: {others[key]}, not {expected[key]}."
    spare = sorted(key for key in have.keys() - expected.keys() if not key.endswith(headers.COMPUTED))
    if spare and model_class is not CLIPVisionModel:  # which may lie in the file of a whole CLIP
        yield f"{len(spare)} tensors belong to no such model, such as {spare[0]}."


def _other(name: str, place: Path) -> Part:
    """Tokenizers, scheduler, face pack, head and scorer: whether their own loaders take them."""
    problems: list[str] = []
    try:
        if name.startswith("tokenizer"):
            CLIPTokenizer.from_pretrained(place)
        elif name == "scheduler":
            json.loads((place / "scheduler_config.json").read_text(encoding="utf-8"))
        elif name == "face_analyser":
            FaceAnalyser.from_pretrained(place)
        elif name == "head_model":
            read_head(place)
        else:
            Recogniser(place / SCORER_NAME)
    except InputError as error:
        problems.append(f"{place.name}: {error}")
    except Exception as error:  # each library has its own
        problems.append(f"{place.name} cannot be read ({type(error).__name__}).")
    return Part(name, 0, sum(file.stat().st_size for file in place.rglob("*") if file.is_file()), "", tuple(problems))


def mismatches(configs: dict[str, dict[str, Any] | None]) -> list[str]:
    """Sentences on components that do not go together, by their configurations; None: not there."""
    unet, ffrnet, mixer = (configs.get(name) for name in ("unet", "ffrnet", "mixer"))
    encoder, problems = configs.get("face_encoder"), []

    def differ(what: str, ours: Any, theirs: Any, of: str) -> None:
        ours, theirs = (tuple(x) if isinstance(x, list) else x for x in (ours, theirs))
        if ours is not None and theirs is not None and ours != theirs:
            problems.append(f"{what} is {ours}, {of} {theirs}: they belong to different models.")

    if unet and unet.get("addition_embed_type") != "text_time":
        width = unet.get("cross_attention_dim")
        return [f"The UNet (cross-attention width {width}) is that of Stable Diffusion 1 or 2; use an SDXL base."]
    if unet and ffrnet:
        if ffrnet.get("addition_embed_type") != "text_time":
            problems.append("The ControlNet is for Stable Diffusion 1 or 2, not for SDXL.")
        for key in ("cross_attention_dim", "block_out_channels", "transformer_layers_per_block"):
            differ(f"The ControlNet's {key}", ffrnet.get(key), unet.get(key), "the UNet's")
        dimension = "projection_class_embeddings_input_dim"
        differ(f"The ControlNet's {dimension}", ffrnet.get(dimension), unet.get(dimension), "the UNet's")
    if unet and mixer:
        differ("The width of the face tokens", mixer.get("token_dim"), unet.get("cross_attention_dim"), "the UNet's")
    if encoder and mixer and mixer.get("variant") != "id":
        encoder = encoder.get("vision_config", encoder)
        width = "The face encoder's width"
        differ(width, encoder.get("hidden_size"), mixer.get("clip_dim"), "what the mixer was trained with")
    if unet and (vae := configs.get("vae")) and ffrnet:
        differ("The VAE's latent channels", vae.get("latent_channels"), ffrnet.get("in_channels"), "the ControlNet's")
        reduction = 2 ** (len(vae.get("block_out_channels", ())) - 1)
        widths = ffrnet.get("conditioning_embedding_out_channels")
        drawing = 2 ** (len(widths) - 1) if widths else reduction
        differ("The VAE's reduction", reduction, drawing, "that of the ControlNet's picture")
    return problems


def _config(place: Path, name: str = "config.json") -> dict[str, Any] | None:
    try:
        config = json.loads((place / name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return config if isinstance(config, dict) else None


def table(report: Report) -> str:
    """The report for a terminal."""
    rows = [("part", "tensors", "dtype", "MB", "")]
    for part in report.parts:
        verdict = "ok" if not part.problems else "DAMAGED"
        rows.append((part.name, str(part.tensors or ""), part.dtype, f"{part.size / 1e6:.1f}", verdict))
    widths = [max(len(row[k]) for row in rows) for k in range(5)]
    lines = [
        f"{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:<{widths[2]}}  {row[3]:>{widths[3]}}  {row[4]}".rstrip()
        for row in rows
    ]
    total = math.fsum(part.size for part in report.parts) / 1e6
    lines += [f"kind {report.kind}, {total:.1f} MB in all"]
    lines += [f"not there, taken from elsewhere: {name} ({source})" for name, source in report.absent.items()]
    if report.unevaluated:
        lines.append(f"python -m facesnap.evaluation would miss of scorer/: {', '.join(report.unevaluated)}")
    lines += [f"PROBLEM: {problem}" for problem in report.problems] or ["no problems found"]
    return "\n".join(lines)

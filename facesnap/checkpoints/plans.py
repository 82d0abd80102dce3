"""A name, a folder or a Hub id → what it stands for and needs, and fetching what is not here yet."""

from __future__ import annotations

import errno
import os
import re
import shutil
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download

from facesnap.checkpoints import sources as known
from facesnap.checkpoints.sources import DEFAULT_BASE, KNOWN_BASES, SDXL, SDXL_SMALL, File, Source
from facesnap.errors import InputError, did_you_mean, shown
from facesnap.folder import BASE_PARTS, HUB_ID, SETTINGS_NAME, Settings, read_settings

MINI = Path(__file__).parents[2] / "assets" / "mini"
ASK_ABOVE = 100e6  # bytes


@dataclass(frozen=True)
class Plan:
    """What a name stands for. Each part is a local place, or a source that has to be on this machine first.

    Parts: weights (a folder with facesnap.json, or InstantID's own repository), base (a folder or one file),
    base_configs (for one file), face_encoder, face_pack, head, head_landmarks, lora.
    """

    name: str
    kind: str
    places: dict[str, Path]
    sources: dict[str, Source] = field(default_factory=dict)
    base: str | None = None
    base_was_chosen: bool = False
    is_start: bool = False  # of training: what `init` puts together

    @property
    def is_public_instantid(self) -> bool:
        """Whether the weights are in InstantID's layout rather than in ours."""
        weights = self.sources.get("weights")
        return weights is not None and weights.repo == known.INSTANTID.repo

    def place(self, part: str) -> Path:
        return self.places[part] if part in self.places else self.sources[part].folder

    def missing(self, *, sized: bool = False) -> list[tuple[Source, list[File]]]:
        """What has to be fetched, source by source; `sized` asks the Hub for the sizes."""
        wanted = [(s, [f for f in s.files if s.cached(f) is None]) for s in self.sources.values()]
        if sized:
            wanted = [(s, [f for f in s.sized().files if s.cached(f) is None]) for s, files in wanted if files]
        return [(source, files) for source, files in wanted if files]


def plan(
    name: str | Path,
    *,
    base: str | Path | None = None,
    lora: str | Path | None = None,
    face_pack: str | Path | None = None,
    head: str | Path | None = None,
) -> Plan:
    """What `name` stands for and needs. Downloads nothing but, of a Hub id, its list of files and facesnap.json.

    Raises:
        InputError: there is no such name, folder or repository.
    """
    given_names = {"model": name, "base model": base, "LoRA": lora, "face pack": face_pack, "head": head}
    for what, given in given_names.items():
        if not isinstance(given, str | os.PathLike | None):
            raise InputError(f"The {what} is named by a text or a path, not by a {type(given).__name__}.")
    places: dict[str, Path] = {}
    sources: dict[str, Source] = {}
    kind, own = _find_weights(name, places, sources)
    if base is not None or not set(BASE_PARTS) <= own:
        find_base(str(base or DEFAULT_BASE), places, sources)
    if kind == "facesnap" and "face_encoder" not in own:
        sources["face_encoder"] = known.CLIP
    for part, given, source in (("face_pack", face_pack, known.FACE_PACK), ("head", head, known.HEAD)):
        if given is not None:
            places[part] = existing_folder(given, part)
        elif part not in own:
            sources[part] = source
    if "head" in sources:
        sources["head_landmarks"] = known.HEAD_LANDMARKS
    if lora is not None:
        if os.path.exists(lora):  # Path's own falls over a name that is too long
            places["lora"] = Path(lora)
        elif re.fullmatch(HUB_ID, str(lora)):
            sources["lora"] = listing(str(lora), "LoRA")
        else:
            raise InputError(
                f"There is no LoRA '{shown(lora, 200)}'; give its safetensors file, its folder or its Hub id."
            )
    chosen = str(base or DEFAULT_BASE) if "base" in (places | sources) else None
    return Plan(str(name), kind, places, sources, chosen, base is not None)


def _find_weights(name: str | Path, places: dict[str, Path], sources: dict[str, Source]) -> tuple[str, set[str]]:
    """The kind of the checkpoint of that name, and the folders it brings; its place or source is noted."""
    if str(name) == "instantid":
        sources["weights"] = known.INSTANTID
        return "instantid", {"mixer", "ffrnet"}
    folder = MINI if str(name) == "mini" else Path(name)
    if os.path.isdir(folder):
        places["weights"] = folder
        return read_settings(folder, name).kind, {place.name for place in folder.iterdir()}
    if re.fullmatch(HUB_ID, str(name)):
        source = sources["weights"] = listing(str(name), "FaceSnap weights")
        return _remote_settings(source).kind, {file.path.split("/")[0] for file in source.files}
    if str(name) == "mini":
        raise InputError("The mini lies in assets/mini of the repository; run from a checkout, or give its folder.")
    raise _unknown(name)


def _unknown(name: str | Path) -> InputError:
    names = ["mini", "instantid", *(place.name for place in MINI.parent.glob("*") if (place / SETTINGS_NAME).is_file())]
    hint = did_you_mean(name, names, "there are mini, instantid, folders and Hub ids owner/name.")
    return InputError(f"There is no model '{shown(name, 200)}'; {hint}")


def existing_folder(given: str | Path, part: str) -> Path:
    if not os.path.isdir(given):
        raise InputError(
            f"There is no folder '{shown(given, 200)}' for the {part.replace('_', ' ')}; give an existing one."
        )
    return Path(given)


def find_base(base: str, places: dict[str, Path], sources: dict[str, Source]) -> None:
    path = MINI if base == "mini" else Path(base)
    if os.path.isdir(path):
        places["base"] = path
    elif os.path.isfile(path):
        if path.suffix != ".safetensors":
            raise InputError(f"The base model '{path.name}' is no safetensors file; convert it first.")
        places["base"] = path
        sources["base_configs"] = replace(SDXL, part="base model's configuration", files=SDXL_SMALL)
    elif base in KNOWN_BASES:
        sources["base"] = KNOWN_BASES[base]
    elif re.fullmatch(HUB_ID, base):
        sources["base"] = listing(base, "base model")
    else:
        raise InputError(f"There is no base model '{shown(base, 200)}'; give a folder, a safetensors file or a Hub id.")


def listing(repo: str, part: str) -> Source:
    """The files of a Hub repository that a loader would read, at its present commit; offline, as cached."""
    try:
        info = HfApi().model_info(repo, files_metadata=True)
        found = {file.rfilename: file.size for file in info.siblings or ()}
        revision, card = info.sha or "main", info.card_data
        licence = str(card.get("license", "not stated")) if card else "not stated"
    except Exception as error:  # the Hub's errors, those of the network, a repository that is gone
        try:
            folder = Path(snapshot_download(repo, local_files_only=True))
        except Exception:
            raise InputError(
                f"The Hub gave no repository '{repo}' ({type(error).__name__}), and nothing of it is on this machine; "
                "check the name and the network, or give a folder."
            ) from error
        found = {p.relative_to(folder).as_posix(): p.stat().st_size for p in folder.rglob("*") if p.is_file()}
        revision, licence = folder.name, "as cached; see its page"
    files = [File(path, found[path]) for path in sorted(found) if _is_read(path, found)]
    if not any(file.path.endswith(".safetensors") for file in files):
        raise InputError(f"The repository '{repo}' holds no safetensors weights; pickles are not opened.")
    return Source(part, repo, revision, licence, tuple(files))


def _is_read(path: str, others: Iterable[str]) -> bool:
    """Configurations, tokenizers and safetensors, of two precisions the half one; ONNX files where they are ours."""
    is_base = "model_index.json" in others and SETTINGS_NAME not in others
    if is_base and path != "model_index.json" and path.rpartition("/")[0] not in BASE_PARTS:
        return False  # such as a single file of the same weights
    if path.endswith(".safetensors"):
        half = path.removesuffix(".safetensors") + ".fp16.safetensors"
        return ".non_ema" not in path and half not in others
    return path.endswith((".json", ".txt")) or (path.endswith(".onnx") and not is_base)


def _remote_settings(source: Source) -> Settings:
    if SETTINGS_NAME not in {file.path for file in source.files}:
        raise InputError(
            f"'{source.repo}' has no {SETTINGS_NAME}, so it holds no FaceSnap weights; "
            f"if it is a base model, give it as --base {source.repo}."
        )
    try:
        path = Path(hf_hub_download(source.repo, SETTINGS_NAME, revision=source.revision))
    except Exception as error:
        raise _cannot_fetch([(source, [File(SETTINGS_NAME)])], source.repo, error) from error
    return read_settings(path.parent, source.repo)


def show(wanted: Plan) -> str:
    """A table of every file that `load` reads: repository, size, licence, and whether it is here already."""
    lines = [f"{wanted.name}: kind {wanted.kind}" + (f", base model {wanted.base}" if wanted.base else "")]
    for part, place in wanted.places.items():
        size = sum(file.stat().st_size for file in (place, *place.rglob("*")) if file.is_file())
        about = read_settings(place).about if part == "weights" else {}
        licence = about.get("license", "that of its source")
        lines.append(f"\n{part.replace('_', ' ')}: here, {shown_size(size)}, nothing to fetch\n  licence: {licence}")
    every: list[File] = []
    absent: list[File] = []
    for source in (source.sized() for source in wanted.sources.values()):
        pinned = source.revision if source.revision != "main" else "main, NOT PINNED"
        lines.append(f"\n{source.part}: {source.repo} @ {pinned}")
        lines.append(f"  licence: {source.licence}" + ("" if source.commercial else "  ** NO COMMERCIAL USE **"))
        for file in source.files:
            here = source.cached(file) is not None
            size_or_not = "size unknown" if file.size is None else shown_size(file.size)
            lines.append(f"  {'cached' if here else 'fetch '}  {size_or_not:>12}  {file.path}")
            every.append(file)
            absent += [] if here else [file]
    lines.append(f"\n{amount(every)} from elsewhere, {amount(absent)} of it still to be fetched")
    return "\n".join(lines)


# ---------------------------------------------------------------------- fetching


def fetch(wanted: Plan, yes: bool = False) -> None:
    """Bring what a plan lacks to this machine.

    Args:
        yes: whether more than 100 MB, or files of unknown size, may be fetched unasked; else a terminal is asked, and
            a script refused.

    Raises:
        InputError: it may not be fetched, there is no room or no network; the sentence names the files.
    """
    missing = wanted.missing()
    if not missing:
        return
    if constants.HF_HUB_OFFLINE:
        raise _cannot_fetch(missing, wanted.name, "HF_HUB_OFFLINE is set")
    missing = wanted.missing(sized=True)
    every = [file for _, files in missing for file in files]
    total = sum(file.size or 0 for file in every)
    if not yes and (total > ASK_ABOVE or any(file.size is None for file in every)):
        _ask(wanted, f"'{wanted.name}' needs {amount(every)} from {', '.join(s.repo for s, files in missing)}")
    _check_room(total)
    for k, (source, files) in enumerate(missing):
        try:
            source.fetch(files)
        except InputError:
            raise
        except Exception as error:  # each client has errors of its own
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                raise InputError(f"The disk is full; '{wanted.name}' needs {amount(every)}.") from error
            raise _cannot_fetch(missing[k:], wanted.name, error) from error
        lost = [file for file in files if source.cached(file) is None]
        if lost:
            raise _cannot_fetch([(source, lost)], wanted.name, "it did not arrive")


def _ask(wanted: Plan, question: str) -> None:
    """InputError unless somebody at a terminal says yes."""
    if not sys.stdin.isatty():
        if wanted.is_start:
            raise InputError(f"{question}; to fetch it give --yes.")
        raise InputError(
            f"{question}; to fetch it run `python -m facesnap.checkpoints fetch {wanted.name} --yes`, "
            "or name the model in FACESNAP_MODEL."
        )
    if input(f"{question}. Fetch it? [y/N] ").strip().lower() not in ("y", "yes"):
        hint = "" if wanted.is_start else f"; facesnap.checkpoints show {wanted.name} lists the files"
        raise InputError(f"Nothing was fetched{hint}.")


def _check_room(total: int) -> None:
    cache = Path(constants.HF_HUB_CACHE)
    while not cache.exists():
        cache = cache.parent
    free = shutil.disk_usage(cache).free
    if total > free:
        raise InputError(
            f"There is no room: {shown_size(total)} are to be fetched and {shown_size(free)} are free where the Hub's "
            "cache lies; make room, or set HF_HOME to a larger disk."
        )


def _cannot_fetch(missing: list[tuple[Source, list[File]]], name: str, error: Exception | str) -> InputError:
    """The one error of a machine without a network: the files, and where each belongs."""
    why = error if isinstance(error, str) else type(error).__name__
    lines = [f"'{name}' lacks files that could not be fetched ({why}). To place them by hand:"]
    for source, files in missing:
        lines.append(f"- {source.part}, {len(files)} files of {source.repo}: {source.how_to_place(files)}.")
    return InputError("\n".join(lines))


def shown_size(count: float) -> str:
    for unit, name, digits in ((1e9, "GB", 2), (1e6, "MB", 1)):
        if count >= unit:
            return f"{count / unit:.{digits}f} {name}"
    return f"{count / 1e3:.1f} kB"


def amount(files: Sequence[File]) -> str:
    """How much files are, in words; of some nobody may have said the size."""
    unknown = sum(file.size is None for file in files)
    parts = [f"{unknown} files of unknown size"] if unknown else []
    if unknown < len(files) or not files:
        parts.append(shown_size(sum(file.size or 0 for file in files)))
    return " and ".join(parts)

"""A name, a folder or a Hub id → a ready pipeline. The only room that downloads, and only what was asked for.

    python -m facesnap.checkpoints show instantid      what it would fetch: repository, size, licence, cached or not
    python -m facesnap.checkpoints fetch instantid     fetch it now (asks first; --yes for scripts)
    python -m facesnap.checkpoints check assets/mini   keys, shapes and dtypes of a folder, and what is missing
    python -m facesnap.checkpoints init --out START    an untrained FaceSnap on a base model, for facesnap.training

| name | what it is |
|---|---|
| mini | the model in this repository; nothing is fetched |
| instantid | InstantID's public weights with our Landmark Predictor, until FaceSnap weights for SDXL exist |
| a folder, or a Hub id | FaceSnap weights; what they lack is taken from the sources below |

The weights lie on a base model: any SDXL in diffusers' folders, on the Hub or in one safetensors file.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import os
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel, DPMSolverSinglestepScheduler, StableDiffusionXLPipeline
from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download, try_to_load_from_cache
from insightface.utils.storage import download as insightface_download
from transformers import CLIPVisionModel

from facesnap import checks
from facesnap.errors import InputError, did_you_mean, reading
from facesnap.faces import FaceAnalyser, Recogniser, _pack_folder
from facesnap.ffrnet import VARIANTS, FFRNet, Variant
from facesnap.heads import from_pretrained as read_head
from facesnap.heads import gnm
from facesnap.instantid import FaceAdapter, InstantIDPipeline
from facesnap.memory import check_mode, default_device
from facesnap.mixer import VARIANTS as MIXERS
from facesnap.mixer import FacialAttributeMixer
from facesnap.mixer import Variant as MixerVariant
from facesnap.pipeline import (
    BASE_PARTS,
    SCORER_NAME,
    SETTINGS_NAME,
    FaceSnapPipeline,
    Settings,
    _read_settings,
)

MINI = Path(__file__).parents[1] / "assets" / "mini"
ASK_ABOVE = 100e6  # bytes
GITHUB = "https://raw.githubusercontent.com"
HUB_ID = r"[\w-][\w.-]*/[\w.-]+"
KINDS: dict[str, type[FaceSnapPipeline]] = {"facesnap": FaceSnapPipeline, "instantid": InstantIDPipeline}


@dataclass(frozen=True)
class File:
    """A file of a source: its path there, and its bytes (of known sources as published, to show)."""

    path: str
    size: int
    sha256: str = ""


@dataclass(frozen=True)
class Source:
    """Files of one Hub repository at one revision. A revision that is no commit is not pinned; `show` says so."""

    part: str
    repo: str
    revision: str
    licence: str
    files: tuple[File, ...]
    commercial: bool = True

    def cached(self, file: File) -> Path | None:
        """Where the file lies on this machine, if it does."""
        found = try_to_load_from_cache(self.repo, file.path, revision=self.revision)
        return Path(found) if isinstance(found, str) else None

    def fetch(self, files: Sequence[File]) -> None:
        snapshot_download(self.repo, revision=self.revision, allow_patterns=[file.path for file in files])

    @property
    def folder(self) -> Path:
        """The snapshot that holds the files, once they are all there."""
        first = self.files[0]
        found = self.cached(first)
        assert found is not None, f"{self.repo} has not been fetched"
        return found.parents[first.path.count("/")]

    def how_to_place(self, files: Sequence[File]) -> str:
        pin = f"--revision {self.revision} " if self.revision != "main" else ""
        names = " ".join(file.path for file in files)
        return (
            f"on a machine with a network run `hf download {self.repo} {pin}{names}`, then copy the folder "
            f"models--{self.repo.replace('/', '--')} of its Hub cache into {constants.HF_HUB_CACHE}"
        )


class FacePackSource(Source):
    """InsightFace's release: one archive, which the library unpacks into its own folder."""

    @property
    def folder(self) -> Path:
        return Path.home() / ".insightface" / "models" / self.repo

    def cached(self, file: File) -> Path | None:
        for place in (self.folder, self.folder / self.repo):  # the archive nests a folder
            if (place / file.path).is_file() and (place / file.path).stat().st_size == file.size:
                return place / file.path
        return None

    def fetch(self, files: Sequence[File]) -> None:
        insightface_download("models", self.repo, force=True)
        for file in files:
            path = self.cached(file)
            if path is None or _sha256(path) != file.sha256:
                raise InputError(f"{file.path} of {self.repo} did not arrive whole; fetch it again.")

    def how_to_place(self, files: Sequence[File]) -> str:
        names = ", ".join(file.path for file in files)
        return (
            f"unpack InsightFace's {self.repo}.zip into {self.folder}, so that {names} lie there, "
            "or name a folder of such a pack in FACESNAP_FACE_PACK"
        )


class UrlSource(Source):
    """A file on GitHub, at a commit; kept beside the Hub's cache."""

    @property
    def folder(self) -> Path:
        return Path(constants.HF_HOME) / "facesnap" / self.repo.replace("/", "--") / self.revision

    def cached(self, file: File) -> Path | None:
        path = self.folder / Path(file.path).name
        return path if path.is_file() and path.stat().st_size > 0 else None

    def fetch(self, files: Sequence[File]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for file in files:
            url = f"{GITHUB}/{self.repo}/{self.revision}/{file.path}"
            torch.hub.download_url_to_file(url, str(self.folder / Path(file.path).name), hash_prefix=file.sha256)

    def how_to_place(self, files: Sequence[File]) -> str:
        return f"put {files[0].path} of github.com/{self.repo} into {self.folder}, or name a folder in FACESNAP_HEAD"


# ---------------------------------------------------------------------- what is known of the public files

SDXL_SMALL = (
    File("model_index.json", 609),
    File("scheduler/scheduler_config.json", 479),
    File("text_encoder/config.json", 565),
    File("text_encoder_2/config.json", 575),
    File("tokenizer/merges.txt", 524_619),
    File("tokenizer/special_tokens_map.json", 472),
    File("tokenizer/tokenizer_config.json", 737),
    File("tokenizer/vocab.json", 1_059_962),
    File("tokenizer_2/merges.txt", 524_619),
    File("tokenizer_2/special_tokens_map.json", 460),
    File("tokenizer_2/tokenizer_config.json", 725),
    File("tokenizer_2/vocab.json", 1_059_962),
    File("unet/config.json", 1_680),
    File("vae/config.json", 642),
)
SDXL_WEIGHTS = (
    File("text_encoder/model.fp16.safetensors", 246_144_152),
    File("text_encoder_2/model.fp16.safetensors", 1_389_382_176),
    File("unet/diffusion_pytorch_model.fp16.safetensors", 5_135_149_760),
    File("vae/diffusion_pytorch_model.fp16.safetensors", 167_335_342),
)
SDXL = Source(
    "base model",
    "stabilityai/stable-diffusion-xl-base-1.0",
    "462165984030d82259a11f4367a4eed129e94a7b",
    "CreativeML Open RAIL++-M",
    SDXL_SMALL + SDXL_WEIGHTS,
)
# Its commit could not be verified when this was written, hence "main"; its sizes are those of SDXL's own files, to
# which it has the same shapes. Pin it by `--base` with a folder.
DREAMSHAPER = replace(SDXL, repo="Lykon/dreamshaper-xl-v2-turbo", revision="main")
INSTANTID = Source(
    "InstantID",
    "InstantX/InstantID",
    "57b32dfee076092ad2930c71fd6d439c2c3b1820",
    "code Apache-2.0; its authors release the weights for research only",
    (
        File("ControlNetModel/config.json", 1_380),
        File("ControlNetModel/diffusion_pytorch_model.safetensors", 2_502_139_136),
        File("ip-adapter.bin", 1_691_134_141),
    ),
    commercial=False,
)
CLIP = Source(
    "face encoder",
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    "1c2b8495b28150b8a4922ee1c8edee224c284c0c",
    "MIT",
    (File("config.json", 4_000), File("model.safetensors", 3_944_517_836)),
)
FACE_PACK = FacePackSource(
    "face pack",
    "antelopev2",
    "InsightFace model zoo",
    "non-commercial research only",
    (
        File(
            "scrfd_10g_bnkps.onnx",
            16_923_827,
            "5838f7fe053675b1c7a08b633df49e7af5495cee0493c7dcf6697200b85b5b91",
        ),
        File("1k3d68.onnx", 143_607_619, "df5c06b8a0c12e422b2ed8947b8869faa4105387f199c477af038aa01f9a45cc"),
        File("glintr100.onnx", 260_665_334, "4ab1d6435d639628a6f3e5008dd4f929edf4c4124b1a7169e1048f9fef534cdf"),
    ),
    commercial=False,
)
HEAD = Source(
    "head model",
    "google/gnm-v3",
    "c01e90d298d82301f9fd18f54806be751775cb7c",
    "Apache-2.0",
    (File("v3_0/gnm_head.npz", 53_328_601),),
)
HEAD_LANDMARKS = UrlSource(  # which the Hub's repository lacks
    "head model",
    "google/GNM",
    "9c9419f191edd68644ef5cb6572e238248e9a81c",
    "Apache-2.0",
    (
        File(
            "gnm/shape/data/landmarks/head_sparse_68.txt",
            4_000,
            "8b4b759042cae8b67062794306dae9d60fc7ba11ddad60461ba3e2bfaaeac222",
        ),
    ),
)


@dataclass(frozen=True)
class Base:
    """How a base model wants to be sampled."""

    steps: int
    guidance: float
    turbo: bool = False


DEFAULT_BASE = DREAMSHAPER.repo
BASES = {DREAMSHAPER.repo: Base(steps=8, guidance=2.0, turbo=True), SDXL.repo: Base(steps=30, guidance=5.0)}
KNOWN_BASES = {source.repo: source for source in (DREAMSHAPER, SDXL)}


# ---------------------------------------------------------------------- names → what is needed


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
        return self.sources.get("weights") is INSTANTID

    def place(self, part: str) -> Path:
        return self.places[part] if part in self.places else self.sources[part].folder

    def missing(self) -> list[tuple[Source, list[File]]]:
        """What has to be fetched, source by source."""
        wanted = [(s, [f for f in s.files if s.cached(f) is None]) for s in self.sources.values()]
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
    places: dict[str, Path] = {}
    sources: dict[str, Source] = {}
    if str(name) == "instantid":
        kind, own = "instantid", {"mixer", "ffrnet"}
        sources["weights"] = INSTANTID
    else:
        folder = MINI if str(name) == "mini" else Path(name)
        if folder.is_dir():
            places["weights"] = folder
            own = {place.name for place in folder.iterdir()}
            kind = _kind(name, _read_settings(name, folder))
        elif re.fullmatch(HUB_ID, str(name)):
            sources["weights"] = listing(str(name), "FaceSnap weights")
            own = {file.path.split("/")[0] for file in sources["weights"].files}
            kind = _kind(name, _remote_settings(sources["weights"]))
        elif str(name) == "mini":
            raise InputError("The mini lies in assets/mini of the repository; run from a checkout, or give its folder.")
        else:
            raise _unknown(name)

    if base is not None or not set(BASE_PARTS) <= own:
        _find_base(str(base or DEFAULT_BASE), places, sources)
    if kind == "facesnap" and "face_encoder" not in own:
        sources["face_encoder"] = CLIP
    for part, given, source in (("face_pack", face_pack, FACE_PACK), ("head", head, HEAD)):
        if given is not None:
            places[part] = _existing(given, part)
        elif part not in own:
            sources[part] = source
    if "head" in sources:
        sources["head_landmarks"] = HEAD_LANDMARKS
    if lora is not None:
        if Path(lora).exists():
            places["lora"] = Path(lora)
        elif re.fullmatch(HUB_ID, str(lora)):
            sources["lora"] = listing(str(lora), "LoRA")
        else:
            raise InputError(f"There is no LoRA '{lora}'; give its safetensors file, its folder or its Hub id.")
    chosen = str(base or DEFAULT_BASE) if "base" in (places | sources) else None
    return Plan(str(name), kind, places, sources, chosen, base is not None)


def _kind(name: str | Path, settings: Settings) -> str:
    if settings.kind not in KINDS:
        raise InputError(f"The checkpoint '{name}' is of kind '{settings.kind}', which is not known; update facesnap.")
    return settings.kind


def _unknown(name: str | Path) -> InputError:
    names = ["mini", "instantid", *(place.name for place in MINI.parent.glob("*") if (place / SETTINGS_NAME).is_file())]
    hint = did_you_mean(name, names, "there are mini, instantid, folders and Hub ids owner/name.")
    return InputError(f"There is no model '{name}'; {hint}")


def _existing(given: str | Path, part: str) -> Path:
    if not Path(given).is_dir():
        raise InputError(f"There is no folder '{given}' for the {part.replace('_', ' ')}; give an existing one.")
    return Path(given)


def _find_base(base: str, places: dict[str, Path], sources: dict[str, Source]) -> None:
    path = MINI if base == "mini" else Path(base)
    if path.is_dir():
        places["base"] = path
    elif path.is_file():
        if path.suffix != ".safetensors":
            raise InputError(f"The base model '{path.name}' is no safetensors file; convert it first.")
        places["base"] = path
        sources["base_configs"] = replace(SDXL, part="base model's configuration", files=SDXL_SMALL)
    elif base in KNOWN_BASES:
        sources["base"] = KNOWN_BASES[base]
    elif re.fullmatch(HUB_ID, base):
        sources["base"] = listing(base, "base model")
    else:
        raise InputError(f"There is no base model '{base}'; give a folder, a safetensors file or a Hub id.")


def listing(repo: str, part: str) -> Source:
    """The files of a Hub repository that a loader would read, at its present commit; offline, as cached."""
    try:
        info = HfApi().model_info(repo, files_metadata=True)
        found = {file.rfilename: file.size or 0 for file in info.siblings or ()}
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


def _is_read(path: str, others: dict[str, int]) -> bool:
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
        raise _cannot_fetch([(source, [File(SETTINGS_NAME, 0)])], source.repo, error) from error
    return _read_settings(source.repo, path.parent)


# ---------------------------------------------------------------------- fetching


def fetch(wanted: Plan, yes: bool = False) -> None:
    """Bring what a plan lacks to this machine.

    Args:
        yes: whether more than 100 MB may be fetched unasked; else a terminal is asked, and a script refused.

    Raises:
        InputError: it may not be fetched, there is no room or no network; the sentence names the files.
    """
    missing = wanted.missing()
    if not missing:
        return
    total = sum(file.size for source, files in missing for file in files)
    if total > ASK_ABOVE and not yes:
        question = f"'{wanted.name}' needs {_size(total)} from {', '.join(s.repo for s, files in missing)}"
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
    _check_room(total)
    for k, (source, files) in enumerate(missing):
        if constants.HF_HUB_OFFLINE:
            raise _cannot_fetch(missing[k:], wanted.name, "HF_HUB_OFFLINE is set")
        try:
            source.fetch(files)
        except InputError:
            raise
        except Exception as error:  # each client has errors of its own
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                raise InputError(f"The disk is full; '{wanted.name}' needs {_size(total)}.") from error
            raise _cannot_fetch(missing[k:], wanted.name, error) from error
        lost = [file for file in files if source.cached(file) is None]
        if lost:
            raise _cannot_fetch([(source, lost)], wanted.name, "it did not arrive")


def _check_room(total: int) -> None:
    cache = Path(constants.HF_HUB_CACHE)
    while not cache.exists():
        cache = cache.parent
    free = shutil.disk_usage(cache).free
    if total > free:
        raise InputError(
            f"There is no room: {_size(total)} are to be fetched and {_size(free)} are free where the Hub's cache "
            "lies; make room, or set HF_HOME to a larger disk."
        )


def _cannot_fetch(missing: list[tuple[Source, list[File]]], name: str, error: Exception | str) -> InputError:
    """The one error of a machine without a network: the files, and where each belongs."""
    why = error if isinstance(error, str) else type(error).__name__
    lines = [f"'{name}' lacks files that could not be fetched ({why}). To place them by hand:"]
    for source, files in missing:
        size = _size(sum(file.size for file in files))
        lines.append(f"- {source.part}, {len(files)} files of {source.repo}, {size}: {source.how_to_place(files)}.")
    return InputError("\n".join(lines))


def _size(count: float) -> str:
    for unit, name, digits in ((1e9, "GB", 2), (1e6, "MB", 1)):
        if count >= unit:
            return f"{count / unit:.{digits}f} {name}"
    return f"{count / 1e3:.1f} kB"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------------- loading


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
        name, yes = os.environ.get("FACESNAP_MODEL", "mini"), True
        base = base or os.environ.get("FACESNAP_BASE")
        lora = lora or os.environ.get("FACESNAP_LORA")
    face_pack = face_pack or os.environ.get("FACESNAP_FACE_PACK")
    head = head or os.environ.get("FACESNAP_HEAD")
    memory = memory or os.environ.get("FACESNAP_MEMORY")
    target = torch.device(device or default_device())
    if memory is not None:
        check_mode(memory, target)  # before gigabytes are read
    wanted = plan(name, base=base, lora=lora, face_pack=face_pack, head=head)
    fetch(wanted, yes)

    dtype = torch.float32 if target.type == "cpu" else torch.float16
    stock = _load_base(wanted, dtype)
    given = _load_parts(wanted, stock, dtype, providers)
    pipeline_class = KINDS[wanted.kind]
    if wanted.is_public_instantid:
        pipe = pipeline_class.from_pipe(stock, **given)
        about = {"license": INSTANTID.licence}
        pipe.settings = Settings(name="InstantID", kind="instantid", steps=30, guidance=5.0, about=about)
    else:
        pipe = pipeline_class.from_pipe(stock, wanted.place("weights"), providers=providers, **given)
    if wanted.base_was_chosen or wanted.is_public_instantid:
        _sample_as(pipe, wanted.base)
    if "lora" in wanted.places or "lora" in wanted.sources:
        _load_lora(pipe, wanted.place("lora"))
    pipe.set_memory(memory, target)
    return pipe


def _sample_as(pipe: FaceSnapPipeline, base: str | None) -> None:
    """Steps, guidance and scheduler as a known base wants them."""
    if base not in BASES:
        return
    how = BASES[base]
    pipe.settings = replace(pipe.settings, steps=how.steps, guidance=how.guidance)
    if how.turbo:  # "DPM++ SDE Karras" as diffusers has it: one call of the UNet a step
        pipe.scheduler = DPMSolverSinglestepScheduler.from_config(
            pipe.scheduler.config, algorithm_type="dpmsolver++", use_karras_sigmas=True, final_sigmas_type="zero"
        )


def _load_base(wanted: Plan, dtype: torch.dtype) -> StableDiffusionXLPipeline:
    part = "base" if "base" in wanted.places | wanted.sources else "weights"
    place = wanted.place(part)
    if place.is_file():
        _check_single_file(place)
        with reading(f"The base model {place.name} of the checkpoint '{wanted.name}'"):
            return StableDiffusionXLPipeline.from_single_file(
                str(place), config=str(wanted.place("base_configs")), torch_dtype=dtype, local_files_only=True
            )
    ours = {}
    if "ffrnet" in wanted.places | wanted.sources:
        ours["ffrnet"] = _ffrnet_place(wanted)
    elif wanted.is_public_instantid:
        ours["ffrnet"] = wanted.place("weights") / "ControlNetModel"
    elif "weights" in wanted.places | wanted.sources:
        names = checks.OUR_CLASSES[wanted.kind]
        ours = {name: wanted.place("weights") / name for name in names if (wanted.place("weights") / name).is_dir()}
    problems = checks.before_loading(place, ours)
    if problems:
        raise InputError(f"'{wanted.name}' cannot be loaded: {' '.join(problems)}")
    variant = "fp16" if any(place.glob("unet/*.fp16.*")) else None
    with reading(f"The base model of the checkpoint '{wanted.name}'"):
        return StableDiffusionXLPipeline.from_pretrained(
            place, torch_dtype=dtype, variant=variant, use_safetensors=True, local_files_only=True
        )


def _check_single_file(path: Path) -> None:
    """Only the header is read: whether the file is whole, and an SDXL by the names of its text encoders."""
    try:
        with checks.safe_open(path, framework="pt") as tensors:
            keys = set(tensors.keys())
    except (checks.SafetensorError, OSError) as error:
        raise InputError(f"The base model '{path.name}' is truncated or damaged; fetch it again.") from error
    if any(key.startswith("cond_stage_model.") for key in keys):
        raise InputError(f"The base model '{path.name}' is a Stable Diffusion 1 or 2, and FaceSnap needs SDXL.")
    if not any(key.startswith("conditioner.embedders.1.") for key in keys):
        raise InputError(f"The file '{path.name}' is no SDXL checkpoint with UNet, VAE and both text encoders.")


def _load_parts(wanted: Plan, stock: Any, dtype: torch.dtype, providers: tuple[str, ...]) -> dict[str, Any]:
    """The components that do not lie in the folder of the weights."""
    given: dict[str, Any] = {}
    if wanted.is_public_instantid:
        place = wanted.place("weights")
        given["mixer"] = FaceAdapter.from_instantid(place / "ip-adapter.bin", stock.unet).to(dtype)
        with reading(f"The ControlNetModel of the checkpoint '{wanted.name}'"):
            controlnet = ControlNetModel.from_pretrained(place / "ControlNetModel", torch_dtype=dtype)
        given["ffrnet"] = controlnet.eval()
    if "face_encoder" in wanted.places | wanted.sources:
        with reading(f"The face encoder of the checkpoint '{wanted.name}'"):
            encoder = CLIPVisionModel.from_pretrained(wanted.place("face_encoder"), torch_dtype=dtype)
        given["face_encoder"] = encoder.eval()
    if "face_pack" in wanted.places | wanted.sources:
        pack = _pack_folder(wanted.place("face_pack"))
        given["face_analyser"] = FaceAnalyser.from_pretrained(pack, providers=providers)
    if "head" in wanted.places:
        with reading(f"The head model of the checkpoint '{wanted.name}'"):
            given["head_model"] = read_head(wanted.place("head"))
    elif "head" in wanted.sources:
        landmarks = wanted.place("head_landmarks") / Path(HEAD_LANDMARKS.files[0].path).name
        given["head_model"] = gnm.read(wanted.place("head") / HEAD.files[0].path, landmarks)
    return given


def _load_lora(pipe: Any, place: Path) -> None:
    files = [place] if place.is_file() else sorted(place.glob("*.safetensors"))
    if len(files) != 1 or files[0].suffix != ".safetensors":
        raise InputError(f"'{place.name}' is no LoRA: one safetensors file is needed, {len(files)} were found.")
    try:
        pipe.load_lora_weights(str(files[0].parent), weight_name=files[0].name, local_files_only=True)
    except Exception as error:  # peft and diffusers raise what they like for a LoRA of another model
        raise InputError(
            f"The LoRA '{files[0].name}' does not fit this base model or is damaged ({type(error).__name__})."
        ) from error


# ---------------------------------------------------------------------- an untrained FaceSnap

NEW_MIXER = "the mixer, with random weights"
FROM_UNET = (
    "the base UNet's encoder, its timestep and size embeddings included",
    "the drawing's embedding; the outputs, which are zero: nothing changes until it is trained",
)
FROM_INSTANTID = (
    "InstantID's encoder, attention to face tokens and outputs",
    "the drawing's embedding, which adds nothing until it is trained (InstantID drew five points, we draw 72); a "
    "projection of the face where InstantID took the pooled text",
)
FROM_FOLDER = "all of its weights"


def init(
    out: str | Path,
    *,
    base: str | Path | None = None,
    ffrnet: str | Path = "unet",
    mixer: MixerVariant = "full",
    variant: Variant = "predicted",
    face_pack: str | Path | None = None,
    head: str | Path | None = None,
    seed: int = 0,
    yes: bool = False,
) -> FaceSnapPipeline:
    """Write an untrained FaceSnap folder for a base model, whole and in half precision: what training starts from.

    The mixer is new, as wide as the face encoder's states. What was kept of what is noted in the settings,
    under `about["start"]`.

    Args:
        out: the folder to write; it must not exist yet, or be empty.
        base: as in `load`. A FaceSnap folder lends its face encoder, face pack, head and scorer too, which are
            otherwise those of `load`.
        ffrnet: "unet": FFRNet begins as the base UNet's encoder. "instantid": as InstantID's public ControlNet, for
            SDXL bases; research only. Else a folder with an FFRNet, with a ControlNet, or a FaceSnap folder.
        mixer: a row of Table 2: "full", "id", "clip" or "concat".
        variant: a row of Table 3: "predicted", "driver", "black", or "none" (no FFRNet).
        face_pack, head: folders to use instead.
        seed: of what is new.
        yes: whether more than 100 MB may be fetched unasked.

    Raises:
        InputError: a name is wrong, something cannot be fetched, read or written, parts do not fit.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"'{out}' is there already and not empty; give another folder.")
    for what, value, known in (("mixer", mixer, MIXERS), ("variant", variant, VARIANTS)):
        if value not in known:
            raise InputError(f"There is no {what} '{value}'; choose {', '.join(known)}.")
    wanted = _start_plan(base, None if variant == "none" else ffrnet, face_pack, head)
    fetch(wanted, yes)

    dtype = torch.float16  # as it is saved; nothing is computed here
    stock = _load_base(wanted, dtype)
    latents = stock.vae.config.latent_channels
    if stock.unet.config.in_channels != latents:
        raise InputError(
            f"The base's UNet takes {stock.unet.config.in_channels} channels, {latents} of them latents, so it is one "
            "for inpainting; begin with the base it was made of, what is trained there serves both."
        )
    given = _load_parts(wanted, stock, dtype, ("CPUExecutionProvider",))
    lender = wanted.places.get("base")
    scorer = lender / "scorer" / SCORER_NAME if lender else None
    if scorer is not None and scorer.is_file():
        given["scorer"] = Recogniser(scorer)
    kept, new = "nothing: there is no FFRNet", NEW_MIXER
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        given["mixer"] = _new_mixer(stock, given["face_encoder"], mixer).to(dtype)
        if variant != "none":
            made, kept, also = _first_ffrnet(wanted, stock, ffrnet)
            given["ffrnet"], new = made.to(dtype), f"{new}; {also}" if also else new
    pipe = FaceSnapPipeline.from_pipe(stock, **given)
    start = {"base": wanted.base, "ffrnet": Path(ffrnet).name, "mixer": mixer, "seed": seed, "kept": kept, "new": new}
    about: dict[str, Any] = {"start": start}
    if any(not source.commercial for source in wanted.sources.values()):
        names = ", ".join(source.repo for source in wanted.sources.values() if not source.commercial)
        about["license"] = f"no commercial use, because of {names}"
    pipe.settings = _first_settings(wanted, stock, variant, about)
    if lender is None or not (lender / SETTINGS_NAME).is_file():
        _sample_as(pipe, wanted.base)
    _write_whole(pipe, out, dtype)
    return pipe


def _start_plan(
    base: str | Path | None, ffrnet: str | Path | None, face_pack: str | Path | None, head: str | Path | None
) -> Plan:
    """What an untrained FaceSnap is made of; ffrnet None: there will be none."""
    places: dict[str, Path] = {}
    sources: dict[str, Source] = {}
    chosen = str(base or DEFAULT_BASE)
    _find_base(chosen, places, sources)
    lender = places.get("base")
    lends = lender is not None and (lender / SETTINGS_NAME).is_file()
    for part, given, source in (
        ("face_encoder", None, CLIP),
        ("face_pack", face_pack, FACE_PACK),
        ("head", head, HEAD),
    ):
        if given is not None:
            places[part] = _existing(given, part)
        elif lender is not None and lends and (lender / part).is_dir():
            places[part] = lender / part
        else:
            sources[part] = source
    if "head" in sources:
        sources["head_landmarks"] = HEAD_LANDMARKS
    if str(ffrnet) == "instantid":
        files = tuple(file for file in INSTANTID.files if file.path.startswith("ControlNetModel/"))
        sources["ffrnet"] = replace(INSTANTID, files=files)
    elif ffrnet is not None and str(ffrnet) != "unet":
        if not Path(ffrnet).is_dir():
            hint = did_you_mean(ffrnet, ("unet", "instantid"), "give unet, instantid or the folder of one.")
            raise InputError(f"There is no FFRNet '{ffrnet}'; {hint}")
        places["ffrnet"] = Path(ffrnet)
    name = chosen if lender is None else lender.name
    known = chosen if chosen in BASES else name
    return Plan(f"FaceSnap on {name}", "facesnap", places, sources, known, base_was_chosen=True, is_start=True)


def _ffrnet_place(wanted: Plan) -> Path:
    place = wanted.place("ffrnet")
    nested = place / ("ControlNetModel" if "ffrnet" in wanted.sources else "ffrnet")
    return nested if nested.is_dir() else place


def _new_mixer(stock: Any, encoder: CLIPVisionModel, variant: MixerVariant) -> FacialAttributeMixer:
    """A mixer that takes the encoder's states and gives what the UNet takes; for ViT-H and SDXL, our default sizes."""
    width = encoder.config.hidden_size
    return FacialAttributeMixer(
        clip_dim=width,
        width=width,
        heads=width // 64 if width % 64 == 0 else encoder.config.num_attention_heads,
        token_dim=stock.unet.config.cross_attention_dim,
        pooled_dim=stock.text_encoder_2.config.projection_dim,
        variant=variant,
    )


def _first_ffrnet(wanted: Plan, stock: Any, ffrnet: str | Path) -> tuple[FFRNet, str, str]:
    """An FFRNet for the base; what of it was kept, and what is new."""
    if "ffrnet" not in wanted.places | wanted.sources:
        return FFRNet.from_unet(stock.unet, vae_scale_factor=stock.vae_scale_factor), *FROM_UNET
    place = _ffrnet_place(wanted)
    with reading(f"The FFRNet {place.name} of the checkpoint '{wanted.name}'"):
        made, report = FFRNet.from_pretrained(place, output_loading_info=True)
        if report["missing_keys"]:
            raise ValueError(f"{len(report['missing_keys'])} tensors are missing")
    if "ffrnet" in wanted.places:
        return made, f"{FROM_FOLDER}, of {wanted.place('ffrnet').name}", ""
    widths = made.config.conditioning_embedding_out_channels
    fresh = FFRNet.from_unet(
        stock.unet, vae_scale_factor=stock.vae_scale_factor, conditioning_embedding_out_channels=tuple(widths),
        load_weights_from_unet=False,
    )  # fmt: skip
    made.controlnet_cond_embedding = fresh.controlnet_cond_embedding
    return made, *FROM_INSTANTID


def _first_settings(wanted: Plan, stock: Any, variant: Variant, about: dict[str, Any]) -> Settings:
    lender = wanted.places.get("base")
    if lender is not None and (lender / SETTINGS_NAME).is_file():
        settings = _read_settings(lender, lender)
    else:
        side = stock.unet.config.sample_size
        size = stock.vae_scale_factor * side if isinstance(side, int) else Settings.size
        settings = Settings(size=size, steps=30, guidance=5.0)  # what SDXL wants, unless it is a base we know
    about = settings.about | about
    return replace(
        settings, name=f"FaceSnap on {wanted.base}, untrained", kind="facesnap", variant=variant, about=about
    )


def _write_whole(pipe: FaceSnapPipeline, out: Path, dtype: torch.dtype) -> None:
    """The folder, or nothing of it."""
    draft = out.with_name(f"{out.name}.tmp")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        pipe.save_pretrained(draft, dtype=dtype)
        if out.is_dir():
            out.rmdir()  # it is empty
        draft.rename(out)
    except (OSError, checks.SafetensorError) as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise InputError(f"'{out}' could not be written ({error}); make room on the disk, or give another.") from error


# ---------------------------------------------------------------------- the command line


def show(wanted: Plan) -> str:
    """A table of every file that `load` reads: repository, size, licence, and whether it is here already."""
    lines = [f"{wanted.name}: kind {wanted.kind}" + (f", base model {wanted.base}" if wanted.base else "")]
    for part, place in wanted.places.items():
        size = sum(file.stat().st_size for file in (place, *place.rglob("*")) if file.is_file())
        about = _read_settings(place, place).about if part == "weights" else {}
        licence = about.get("license", "that of its source")
        lines.append(f"\n{part.replace('_', ' ')}: here, {_size(size)}, nothing to fetch\n  licence: {licence}")
    total, needed = 0, 0
    for source in wanted.sources.values():
        pinned = source.revision if source.revision != "main" else "main, NOT PINNED"
        lines.append(f"\n{source.part}: {source.repo} @ {pinned}")
        lines.append(f"  licence: {source.licence}" + ("" if source.commercial else "  ** NO COMMERCIAL USE **"))
        for file in source.files:
            here = source.cached(file) is not None
            total, needed = total + file.size, needed + (0 if here else file.size)
            lines.append(f"  {'cached' if here else 'fetch '}  {_size(file.size):>10}  {file.path}")
    lines.append(f"\n{_size(total)} from elsewhere, {_size(needed)} of it still to be fetched")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m facesnap.checkpoints", description="Names, files, checks.")
    commands = parser.add_subparsers(dest="command", required=True)
    for command, text in (("show", "list every file a model needs"), ("fetch", "fetch what is not here yet")):
        sub = commands.add_parser(command, help=text)
        sub.add_argument("name", help="mini, instantid, a folder or a Hub id")
        sub.add_argument("--base", help="the SDXL to stand on: a folder, a safetensors file or a Hub id")
        sub.add_argument("--lora", help="a LoRA: a safetensors file, its folder or a Hub id")
        if command == "fetch":
            sub.add_argument("--yes", action="store_true", help="do not ask")
    commands.add_parser("check", help="verify a checkpoint folder").add_argument("folder", type=Path)
    sub = commands.add_parser("init", help="write an untrained FaceSnap for a base model")
    sub.add_argument("--base", help=f"the SDXL to stand on: a folder, a safetensors file or a Hub id ({DEFAULT_BASE})")
    begins = "what FFRNet begins as: the UNet's encoder, InstantID's ControlNet, or a folder's (%(default)s)"
    sub.add_argument("--ffrnet", default="unet", metavar="unet|instantid|PATH", help=begins)
    sub.add_argument("--mixer", default="full", choices=MIXERS, help="the row of Table 2 (%(default)s)")
    sub.add_argument("--variant", default="predicted", choices=VARIANTS, help="the row of Table 3 (%(default)s)")
    sub.add_argument("--face-pack", help="a folder to use instead of antelopev2")
    sub.add_argument("--head", help="a folder to use instead of GNM v3")
    sub.add_argument("--seed", type=int, default=0, help="of what is new (%(default)s)")
    sub.add_argument("--out", type=Path, required=True, help="the folder to write")
    sub.add_argument("--yes", action="store_true", help="do not ask before fetching")
    given = parser.parse_args(arguments)
    try:
        if given.command == "init":
            options = {name: value for name, value in vars(given).items() if name != "command"}
            made = init(**options)
            print(f"{given.out}: {made.settings.name}, {made.settings.size}², {made.settings.variant}")
            for what in ("kept", "new"):
                print(f"{what}: {made.settings.about['start'][what]}")
            return
        if given.command == "check":
            report = checks.check(given.folder)
            print(checks.table(report))
            sys.exit(1 if report.problems else 0)
        wanted = plan(given.name, base=given.base, lora=given.lora)
        if given.command == "fetch":
            fetch(wanted, given.yes)
        print(show(wanted))
    except InputError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()

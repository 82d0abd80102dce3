"""The public files that checkpoints are made of: repository, revision, licence and size, and how each is fetched."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.request import Request, urlopen

import torch
from huggingface_hub import HfApi, constants, snapshot_download, try_to_load_from_cache
from insightface.utils.storage import download as insightface_download

from facesnap.errors import InputError

GITHUB = "https://raw.githubusercontent.com"


@dataclass(frozen=True)
class File:
    """A file of a source: its path there, and its bytes where they are known."""

    path: str
    size: int | None = None
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

    def sized(self) -> Source:
        """The source with the sizes of its files: of those here, as they are; of the others, as the Hub says, if it
        can be asked."""
        places = [self.cached(file) for file in self.files]
        known = {file.path: place.stat().st_size for file, place in zip(self.files, places, strict=True) if place}
        if any(file.path not in known and file.size is None for file in self.files):
            known = self._published() | known
        return replace(self, files=tuple(replace(file, size=known.get(file.path, file.size)) for file in self.files))

    def _published(self) -> dict[str, int]:
        try:
            info = HfApi().model_info(self.repo, revision=self.revision, files_metadata=True)
        except Exception:  # the Hub's errors and those of the network: then nobody knows, and it is said so
            return {}
        return {file.rfilename: file.size for file in info.siblings or () if file.size}

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
            if path is None or digest(path) != file.sha256:
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

    def _url(self, file: File) -> str:
        return f"{GITHUB}/{self.repo}/{self.revision}/{file.path}"

    def _published(self) -> dict[str, int]:
        try:
            asked = [(file, Request(self._url(file), method="HEAD")) for file in self.files]
            return {file.path: int(urlopen(head, timeout=10).headers["Content-Length"]) for file, head in asked}
        except (OSError, TypeError):  # no network, or no such line in the answer
            return {}

    def fetch(self, files: Sequence[File]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for file in files:
            place = str(self.folder / Path(file.path).name)
            torch.hub.download_url_to_file(self._url(file), place, hash_prefix=file.sha256)

    def how_to_place(self, files: Sequence[File]) -> str:
        return f"put {files[0].path} of github.com/{self.repo} into {self.folder}, or name a folder in FACESNAP_HEAD"


# ---------------------------------------------------------------------- what is known of the public files

SDXL_SMALL = (
    File("model_index.json"),
    File("scheduler/scheduler_config.json"),
    File("text_encoder/config.json"),
    File("text_encoder_2/config.json"),
    *(
        File(f"{tokenizer}/{name}")
        for tokenizer in ("tokenizer", "tokenizer_2")
        for name in ("merges.txt", "special_tokens_map.json", "tokenizer_config.json", "vocab.json")
    ),
    File("unet/config.json"),
    File("vae/config.json"),
)
SDXL_WEIGHTS = (
    File("text_encoder/model.fp16.safetensors"),
    File("text_encoder_2/model.fp16.safetensors"),
    File("unet/diffusion_pytorch_model.fp16.safetensors"),
    File("vae/diffusion_pytorch_model.fp16.safetensors"),
)
SDXL = Source(
    "base model",
    "stabilityai/stable-diffusion-xl-base-1.0",
    "462165984030d82259a11f4367a4eed129e94a7b",
    "CreativeML Open RAIL++-M",
    SDXL_SMALL + SDXL_WEIGHTS,
)
# Its commit could not be verified when this was written, hence "main". Pin it by `--base` with a folder.
DREAMSHAPER = replace(SDXL, repo="Lykon/dreamshaper-xl-v2-turbo", revision="main")
INSTANTID = Source(
    "InstantID",
    "InstantX/InstantID",
    "57b32dfee076092ad2930c71fd6d439c2c3b1820",
    "code Apache-2.0; its authors release the weights for research only",
    (
        File("ControlNetModel/config.json"),
        File("ControlNetModel/diffusion_pytorch_model.safetensors"),
        File("ip-adapter.bin"),
    ),
    commercial=False,
)
CLIP = Source(
    "face encoder",
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    "1c2b8495b28150b8a4922ee1c8edee224c284c0c",
    "MIT",
    (File("config.json"), File("model.safetensors")),
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
    (File("v3_0/gnm_head.npz"),),
)
HEAD_LANDMARKS = UrlSource(  # which the Hub's repository lacks
    "head model",
    "google/GNM",
    "9c9419f191edd68644ef5cb6572e238248e9a81c",
    "Apache-2.0",
    (
        File(
            "gnm/shape/data/landmarks/head_sparse_68.txt",
            sha256="8b4b759042cae8b67062794306dae9d60fc7ba11ddad60461ba3e2bfaaeac222",
        ),
    ),
)


SCORER = Source(  # trained on other photographs than antelopev2, which reads, and buffalo_l, which teaches
    "scorer",
    "fal/AuraFace-v1",
    "af6d057c9b0ec4071d4c49c80e3539258798b609",
    "Apache-2.0",
    (
        File(
            "glintr100.onnx",
            260_694_151,
            "a7933ea5330113b01c9b60351d8f4c33003f145d8470ac5f0e52ee2effe25c60",
        ),
    ),
)


@dataclass(frozen=True)
class Base:
    """How a base model wants to be sampled."""

    steps: int
    guidance: float
    turbo: bool = False


DEFAULT_BASE = TURBO = DREAMSHAPER.repo  # what portraits are made with
START_BASE = SDXL.repo  # what training starts from
BASES = {DREAMSHAPER.repo: Base(steps=8, guidance=2.0, turbo=True), SDXL.repo: Base(steps=30, guidance=5.0)}
KNOWN_BASES = {source.repo: source for source in (DREAMSHAPER, SDXL)}


def is_distilled(base: str | None) -> bool:
    """Whether a base was taught to need few steps: a known one, or by what its name says."""
    known = base is not None and base in BASES and BASES[base].turbo
    return known or re.search(r"turbo|lightning|hyper|lcm", str(base), re.IGNORECASE) is not None


def digest(path: Path) -> str:
    """The file's SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""A Hub cache and folders of tiny checkpoints, made by hand: nothing here reaches a network.

Fixtures; conftest.py makes them known to all tests."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from fake_hub import MINI, put, tiny_sdxl, write_base, write_clip, write_pack
from huggingface_hub import constants
from tiny_instantid import write_instantid

from facesnap import checkpoints
from facesnap.checkpoints import sources

HEAD = MINI / "head"


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """The folders that the tests copy from: a tiny base, InstantID's files, FaceSnap weights, a CLIP."""
    root = tmp_path_factory.mktemp("made")
    pipe = tiny_sdxl()
    write_base(root / "base", pipe)
    write_instantid(root / "instantid", pipe.unet)
    write_clip(root / "clip", pipe.face_encoder)
    (root / "scorer").mkdir()
    shutil.copyfile(MINI / "scorer" / "recogniser.onnx", root / "scorer" / "glintr100.onnx")
    for name in ("mixer", "ffrnet"):
        getattr(pipe, name).save_pretrained(root / "slim" / name)
    settings = {"name": "slim", "size": 64, "steps": 2, "guidance": 2.0}
    (root / "slim" / "facesnap.json").write_text(json.dumps(settings))
    return root


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty Hub cache and an empty home, without a network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("MODEL", "BASE", "LORA", "MEMORY", "FACE_PACK", "HEAD"):
        monkeypatch.delenv(f"FACESNAP_{name}", raising=False)
    return tmp_path / "hub"


SIZES = {  # of some files, as the Hub might give them
    "unet/diffusion_pytorch_model.fp16.safetensors": 5_135_149_760,
    "ip-adapter.bin": 1_691_134_141,
    "model_index.json": 609,
}


@pytest.fixture
def online(monkeypatch):
    """A Hub that answers what is in its repositories, and lets nothing be fetched."""

    def model_info(self, repo, revision=None, files_metadata=False):
        files = [SimpleNamespace(rfilename=path, size=SIZES.get(path, 1_000_000)) for path in ALL_FILES]
        return SimpleNamespace(siblings=files)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("facesnap.checkpoints.sources.HfApi.model_info", model_info)
    monkeypatch.setattr(
        "facesnap.checkpoints.sources.urlopen", lambda *a, **k: SimpleNamespace(headers={"Content-Length": 900})
    )


ALL_FILES = [
    file.path for source in (sources.SDXL, sources.INSTANTID, sources.CLIP, sources.HEAD) for file in source.files
]


@pytest.fixture
def pack(monkeypatch):
    """antelopev2 where InsightFace unpacks it; its files are the mini's, so their sizes are those."""
    folder = write_pack(Path.home() / ".insightface" / "models" / "antelopev2")
    files = tuple(
        replace(file, size=(folder / "antelopev2" / file.path).stat().st_size) for file in sources.FACE_PACK.files
    )
    monkeypatch.setattr(sources, "FACE_PACK", replace(sources.FACE_PACK, files=files))
    return folder


@pytest.fixture
def full_hub(hub, made, pack):
    """All that instantid needs but its head, which the tests give."""
    for source, folder in (
        (sources.DREAMSHAPER, "base"),
        (sources.SDXL, "base"),
        (sources.INSTANTID, "instantid"),
        (sources.CLIP, "clip"),
        (sources.SCORER, "scorer"),
    ):
        put(hub, source.repo, source.revision, made / folder)
    return hub


def copied(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


def load_on(base, made):
    return checkpoints.load(made / "slim", base=base, device="cpu", head=HEAD)

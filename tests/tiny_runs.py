"""Short runs of the trainer on a tiny FaceSnap. Fixtures and helpers; conftest.py makes them known to all tests."""

import json
from pathlib import Path

import pytest
import tiny
import torch

from facesnap.mini.nets.recogniser import RecogniserNet, export_recogniser


@pytest.fixture(scope="session")
def start(tmp_path_factory) -> Path:
    """An untrained FaceSnap folder, and φ beside it."""
    folder = tmp_path_factory.mktemp("start")
    tiny.tiny_pipeline().save_pretrained(folder / "model")
    torch.manual_seed(0)
    export_recogniser(RecogniserNet((8, 8, 8, 8, 8), (1, 1, 1, 1)), folder / "phi.onnx")
    return folder


def words(start: Path, out: Path, **changes) -> list[str]:
    values = {
        "model": start / "model", "shards": "none", "out": out, "steps": 4, "lr": 1e-2, "warmup": 1, "ema": 0.5,
        "device": "cpu", "precision": "fp32", "gradient_checkpointing": "false", "log_every": 1, "checkpoint_every": 2,
        "sheet_every": 0, "save_dtype": "fp32",
    }  # fmt: skip
    return [f"{key.replace('__', '.')}={value}" for key, value in (values | changes).items()]


def with_identity(start: Path) -> dict:
    return {"identity__recogniser": start / "phi.onnx", "identity__steps": 2, "identity__margin": 1}


def losses(out: Path) -> list[tuple]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [tuple(line.get(key) for key in ("step", "loss", "masked", "identity", "norm")) for line in lines]


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}

"""The whole way of docs/training.md, by its commands: plain image files → shards → training → a portrait."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import photo_folder
import torch

from facesnap.pipeline import FaceSnapPipeline

ROOT = Path(__file__).parent.parent
MINI = ROOT / "assets" / "mini"


def python(*words: object) -> str:
    """`python …` from the repository's root, as the docs say it; what it printed."""
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_from_pictures_to_a_portrait(tmp_path):
    photos, shards, out = tmp_path / "photos", tmp_path / "shards", tmp_path / "run"
    photo_folder.write(photos, people=2, pictures=2)
    python("-m", "facesnap.training.prepare", photos, shards, "--resolution", 256, "--identities", "folder",
           "--workers", 1)  # fmt: skip
    python(
        "-m", "facesnap.training.train", "--config", "configs/mini.yaml", f"model={MINI}", f"shards={shards}",
        f"out={out}", "steps=3", "data.batch_size=2", "log_every=1", "sheet_every=3", "validation_samples=2",
        # the recogniser that conditions stands in for B, which is not shipped
        f"identity.recogniser={MINI / 'face_pack' / 'recogniser.onnx'}", "identity.steps=1", "identity.samples=1",
    )  # fmt: skip
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3]
    assert all(0 < line["identity"] < 2 and np.isfinite(line["loss"]) for line in lines if "loss" in line)
    assert lines[-1]["val_identity_true"] > lines[-1]["val_strangers"]
    assert (out / "sheet.png").is_file()

    pipe, began = FaceSnapPipeline.from_pretrained(out / "model"), FaceSnapPipeline.from_pretrained(MINI)
    pipe.set_progress_bar_config(disable=True)
    assert not torch.equal(pipe.mixer.w_out.weight, began.mixer.w_out.weight)
    assert torch.equal(pipe.unet.conv_in.weight, began.unet.conv_in.weight)
    photo = next(photos.rglob("*.png"))
    told = pipe("a photo of a person, plain background", reference=photo, seed=0, num_inference_steps=2)
    assert told.images[0].size == (256, 256) and np.asarray(told.images[0]).std() > 10

"""What must not change while the code is rebuilt: fingerprints of portraits by the mini, and what the commands say.

    python benchmarks/pins.py --out before.json      # in one checkout
    python benchmarks/pins.py --out after.json       # in another, on the same machine
    diff before.json after.json

Two machines round differently, so the files are compared on one; the mean of each portrait is there to tell rounding
from another picture.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # so that the file runs as it is, installed or not

from facesnap import checkpoints  # noqa: E402

PERSON, OTHER = ROOT / "assets/examples/avery.png", ROOT / "assets/examples/devon.png"
PROMPT = "a photo of a person, wearing a red shirt, a plain blue background"
CALLS: dict[str, dict[str, Any]] = {
    "as in the photo": {},
    "a template": {"pose": "three-quarter-left"},
    "another photo": {"pose": OTHER},
    "fast": {"pose": "front", "preset": "fast"},
    "black": {"pose": "front", "variant": "black"},
    "driver": {"pose": OTHER, "variant": "driver"},
    "none": {"pose": "front", "variant": "none"},
    "Euler, unguided, wide": {"pose": "front", "scheduler": "Euler", "guidance_scale": 1.0, "width": 320},
    "two photos, two prompts": {"reference": [PERSON, OTHER], "prompt": [PROMPT, "a watercolor of a person"]},
    "scales": {"pose": "front", "identity_scale": 1.5, "landmark_scale": 0.5, "ffrnet_scale": 0.8},
}
COMMANDS = (("show", "mini"), ("show", "instantid"), ("check", "assets/mini"))


def fingerprint(pipe: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    out = pipe(**{"prompt": PROMPT, "reference": PERSON, "seed": 7, "num_inference_steps": 4} | arguments)
    pixels = np.stack([np.asarray(image) for image in out.images])
    return {
        "sha256": hashlib.sha256(pixels.tobytes()).hexdigest()[:16],
        "mean": round(float(pixels.mean()), 3),
        "landmarks": round(float(out.landmarks.mean()), 3),
        "scores": [None if score is None else round(score, 3) for score in out.identity_scores],
        "notes": list(out.notes),
    }


def said(command: tuple[str, ...]) -> str:
    run = [sys.executable, "-m", "facesnap.checkpoints", *command]
    return subprocess.run(run, cwd=ROOT, check=True, capture_output=True, text=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    torch.set_num_threads(1)
    pins: dict[str, Any] = {" ".join(command): said(command) for command in COMMANDS}
    for lora in (None, ROOT / "assets/lora/blueprint"):
        pipe = checkpoints.load("mini", lora=lora, device="cpu")
        pipe.set_progress_bar_config(disable=True)
        calls = CALLS if lora is None else {"LoRA": {"pose": "front"}}
        pins |= {name: fingerprint(pipe, arguments) for name, arguments in calls.items()}
    out.write_text(json.dumps(pins, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Fills a method's folder from a plan (docs/evaluation.md). Needs nothing but Pillow, in any environment.

`fill(make, name)` reads the arguments PLAN OUT, calls `make(row, reference)` for every row that has no picture yet,
and notes seconds, peak memory and failures where `python -m facesnap.evaluation score` looks for them.

A script that uses it must not be called like a package it imports: Python looks in the script's own folder first.
"""

import argparse
import csv
import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path

from PIL import Image


def fill(make: Callable[[dict, Image.Image], Image.Image], name: str) -> None:
    """make: a row of manifest.csv (file, reference, driver, prompt, seed, size) and its reference → a picture."""
    parser = argparse.ArgumentParser()
    parser.add_argument("plan", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    plan, out = arguments.plan, arguments.out
    out.mkdir(parents=True, exist_ok=True)
    files = json.loads((plan / "plan.json").read_text(encoding="utf-8"))["files"]
    digest = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:12]
    told, noted = out / "method.json", out / "made.jsonl"
    if told.exists() and json.loads(told.read_text(encoding="utf-8"))["plan"] != digest:
        raise SystemExit(f"'{out.name}' holds the pictures of another plan: give another folder.")
    told.write_text(json.dumps({"method": name, "plan": digest}), encoding="utf-8")
    if noted.exists():  # its last line may have been cut short by a kill
        text = noted.read_text(encoding="utf-8")
        noted.write_text(text[: text.rfind("\n") + 1], encoding="utf-8")
    with (plan / "manifest.csv").open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if not (out / row["file"]).exists()]
    for k, row in enumerate(rows):
        line, start = {"file": row["file"]}, time.perf_counter()
        try:
            picture = make(row, Image.open(plan / row["reference"]).convert("RGB"))
        except ValueError as error:  # no face in the reference, or the like
            line["failed"] = str(error)
        else:
            line["seconds"] = round(time.perf_counter() - start, 3)
            size = int(row["size"])
            draft = out / f".{row['file']}.part"  # so that a kill leaves no half picture under its name
            picture.resize((size, size), Image.Resampling.LANCZOS).save(draft, format="PNG")
            draft.replace(out / row["file"])
        if (peak := peak_gb()) is not None:
            line["peak_memory_gb"] = peak
        with noted.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{k + 1} of {len(rows)}: {line}", flush=True)


def peak_gb() -> float | None:
    try:
        import torch
    except ImportError:
        return None
    return round(torch.cuda.max_memory_allocated() / 1e9, 2) if torch.cuda.is_available() else None

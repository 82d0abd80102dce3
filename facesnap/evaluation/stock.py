"""The checkpoint as stock diffusers sees it: an SDXL folder, no face and no landmarks, only the sentence."""

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionXLPipeline
from tqdm import tqdm

from facesnap import metrics
from facesnap.evaluation import protocol, report
from facesnap.evaluation.protocol import Witness
from facesnap.evaluation.scorer import visible
from facesnap.folder import read_settings
from facesnap.images import open_image
from facesnap.provenance import fingerprint


def run(arguments: argparse.Namespace) -> dict:
    """`--prompts` pictures by `StableDiffusionXLPipeline`; is there a face, and is it what was asked for?"""
    model, out = Path(arguments.model), Path(arguments.out)
    settings = {"what": "stock", "model": fingerprint(model)}
    settings |= {n: getattr(arguments, n) for n in ("prompts", "seed", "size", "steps", "guidance")}
    ledger, work = report.Ledger(out.with_suffix(".jsonl"), settings), out.with_suffix(".work")
    work.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([arguments.seed, 2])
    drawn = [protocol.draw_prompt(rng) for _ in range(arguments.prompts)]
    defaults = read_settings(model)
    waiting = [n for n in range(len(drawn)) if ledger.get(f"picture {n}") is None]
    if waiting:
        pipe = StableDiffusionXLPipeline.from_pretrained(model, use_safetensors=True).to(
            arguments.device
        )  # no dtype: as a stranger would
        pipe.set_progress_bar_config(disable=True)
        witness = Witness(model)
        for number in tqdm(waiting, desc="stock pictures", unit="picture"):
            image = pipe(
                drawn[number][0],
                height=arguments.size,
                width=arguments.size,
                num_inference_steps=arguments.steps or defaults.steps,
                guidance_scale=arguments.guidance or defaults.guidance,
                generator=torch.Generator().manual_seed(1000 * arguments.seed + number),
            ).images[0]
            path = work / f"picture_{number:03d}.png"
            image.save(path)
            ledger.put(f"picture {number}", witness.look(path))

    rows = [ledger.rows[f"picture {n}"] for n in range(len(drawn))]
    if arguments.sheet:
        shown = [open_image(work / f"picture_{n:03d}.png") for n in range(len(drawn) // 5 * 5)]
        report.contact_sheet([shown[k : k + 5] for k in range(0, len(shown), 5)], [""] * 5, Path(arguments.sheet))
    wanted = [visible(attributes, style) for _, style, attributes in drawn]
    results = {
        "pictures": len(rows),
        "faces_found": float(np.mean([row["found"] for row in rows])),
        "text_accuracy": metrics.attribute_accuracy([row["attributes"] for row in rows], wanted),
    }
    return {"settings": settings, "results": results}


def lines(results: dict) -> list[tuple[str, object, str]]:
    """The report for the terminal: name, value, remark."""
    text = results["text_accuracy"]
    return [
        ("faces_found", results["faces_found"], f"of {results['pictures']} prompts"),
        ("text_accuracy", text["score"], "chance-corrected"),
        *((f"  {name}", a["score"], f"of {a['pictures']}") for name, a in text["attributes"].items()),
    ]

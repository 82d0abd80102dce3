"""What the VAE alone takes away: true renders, encoded and decoded, by the same judge as the portraits.

No denoiser can do better than this, and all softness that shows here is the VAE's.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio
from tqdm import tqdm

from facesnap import metrics
from facesnap.evaluation import portraits, protocol, report
from facesnap.evaluation.methods import through_vae
from facesnap.evaluation.protocol import Witness
from facesnap.images import open_image
from facesnap.landmarks import GROUPS
from facesnap.provenance import fingerprint

EYES = [*GROUPS["left_eye"], *GROUPS["right_eye"]]
MARGIN = 0.2  # eye distances around the eyes' landmarks


def run(arguments: argparse.Namespace) -> dict:
    """The true pictures of the main evaluation's requests through the VAE; the report without its provenance."""
    model, out, size = Path(arguments.model), Path(arguments.out), arguments.size
    settings = {"what": "vae", "model": fingerprint(model)}
    settings |= {n: getattr(arguments, n) for n in ("people", "poses", "seed", "size")}
    ledger, work = report.Ledger(out.with_suffix(".jsonl"), settings), out.with_suffix(".work")
    witness = Witness(model)
    requests = protocol.requests(arguments.seed, arguments.people, arguments.poses)
    people = list(dict.fromkeys(request.person for request in requests))
    vae = (
        AutoencoderKL.from_pretrained(model / "vae", torch_dtype=torch.float32, use_safetensors=True)
        .to(arguments.device)
        .eval()
    )
    for person in tqdm(people, desc="references", unit="person"):
        portraits.look_at_person(person, ledger, witness, work, size)
    for number, request in enumerate(tqdm(requests, desc="pictures", unit="picture")):
        portraits.look_at_truth(number, request, ledger, witness, work, size)
        if ledger.get(f"decoded {number}") is None:
            picture, path = open_image(portraits.truth_path(work, number)), work / f"decoded_{number:04d}.png"
            decoded = through_vae(vae, picture)
            Image.fromarray(decoded).save(path)
            points = np.array(ledger.rows[f"truth {number}"]["exact"])
            near = around_eyes(points, ledger.rows[f"truth {number}"]["eye_distance"], size)
            row = {"psnr": psnr(picture, decoded), "psnr_eyes": psnr(picture[near], decoded[near])}
            ledger.put(f"decoded {number}", {**row, **witness.look(path)})
    if arguments.sheet:
        shown = [[portraits.truth_path(work, n), work / f"decoded_{n:04d}.png"] for n in range(min(6, len(requests)))]
        pictures = [[open_image(path) for path in row] for row in shown]
        report.contact_sheet(pictures, ["true render", "through the VAE"], Path(arguments.sheet))
    return {"settings": settings, "results": summary(ledger, requests, people)}


def summary(ledger: report.Ledger, requests: list[protocol.Request], people: list[int]) -> dict:
    """Retention on the scale from strangers to the true render, sharpness as a share of it, and PSNR (dB)."""
    decoded, truths = ([ledger.rows[f"{what} {n}"] for n in range(len(requests))] for what in ("decoded", "truth"))
    references = portraits.embeddings([ledger.rows[f"reference {p}"] for p in people])
    own = np.array([people.index(request.person) for request in requests])
    rows = np.arange(len(requests))
    similarity, ceiling = (metrics.cosines(portraits.embeddings(some), references) for some in (decoded, truths))
    others = np.ones_like(ceiling, bool)
    others[rows, own] = False
    strangers = float(ceiling[others].mean()) if others.any() else 0.0
    sharp = portraits.sharpness_ratios(decoded, truths)

    def within(statistic):
        return metrics.interval(statistic, own)

    def retention(i: np.ndarray) -> float:
        return metrics.retention(similarity[i, own[i]], ceiling[i, own[i]], strangers)

    return {
        "pictures": len(requests),
        "retention": retention(rows),
        "retention_95": within(retention),
        "psnr": float(np.mean([row["psnr"] for row in decoded])),
        "psnr_eyes": float(np.mean([row["psnr_eyes"] for row in decoded])),
        "sharpness": float(np.nanmedian(sharp)),
        "faces_found": float(np.mean([row["found"] for row in decoded])),
    }


def around_eyes(points: np.ndarray, eye_distance: float, size: int) -> tuple[slice, slice]:
    """The part of a picture around the eyes of 72 landmarks (72, 2), as slices of rows and columns."""
    margin = MARGIN * eye_distance
    low = np.clip(np.floor(points[EYES].min(0) - margin), 0, size - 8).astype(int)
    high = np.clip(np.ceil(points[EYES].max(0) + margin), low + 8, size).astype(int)
    return slice(low[1], high[1]), slice(low[0], high[0])


def psnr(picture: np.ndarray, other: np.ndarray) -> float:
    """Peak signal to noise ratio of two uint8 pictures, dB; 99 for equal ones."""
    return 99.0 if np.array_equal(picture, other) else float(peak_signal_noise_ratio(picture, other))


def lines(results: dict) -> list[tuple[str, object, str]]:
    """The report for the terminal: name, value, remark."""
    return [
        ("retention", results["retention"], "95 % {:.3f} to {:.3f}".format(*results["retention_95"])),
        ("psnr", results["psnr"], "dB"),
        ("psnr around the eyes", results["psnr_eyes"], "dB"),
        ("sharpness", results["sharpness"], "of the true render's, median"),
        ("faces_found", results["faces_found"], f"of {results['pictures']}"),
    ]

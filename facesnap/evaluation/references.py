"""Do references help each other? One good photograph and three poor ones, fused by the mixer and averaged.

Fused: the four photographs are one set, as a visitor's are. Averaged: each goes through the mixer alone, and the mean
of their tokens makes the portrait. The paper names averaging as its own gap. Beside both stands the good one alone.
"""

import argparse
import copy
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from facesnap import metrics
from facesnap.errors import InputError
from facesnap.evaluation import portraits, protocol, report
from facesnap.evaluation.protocol import Witness
from facesnap.faces import Face
from facesnap.images import open_image
from facesnap.mixer import MixerOutput
from facesnap.provenance import fingerprint
from facesnap.synthetic.people import sample_person, sample_picture
from facesnap.synthetic.render import render

WAYS = ("fused", "averaged", "good alone")
PROFILE = 1.0  # radians of yaw: of the eyes one is hardly seen
BLUR, DARK, NOISE = 0.012, 0.18, 9.0  # deviation in sides of the picture; share of the light; deviation in grey values


def poor_pictures(person: int, size: int) -> dict[str, np.ndarray]:
    """A profile, a blurred and a dark photograph of a person, RGB uint8 (size, size, 3)."""
    rng = np.random.default_rng([person, 30])
    side = float(rng.choice([-1, 1]))

    def photo(index: int, **options: Any) -> np.ndarray:
        return render(sample_picture(sample_person(person), index, style="photo", **options), size).image

    dark = photo(52) * DARK + rng.normal(0, NOISE, (size, size, 1))
    return {
        "profile": photo(50, pose=(side * PROFILE, 0.0, 0.0)),
        "blurred": cv2.GaussianBlur(photo(51), (0, 0), BLUR * size),
        "dark": np.clip(dark, 0, 255).astype(np.uint8),
    }


def averaging(pipe: Any) -> Any:
    """The same pipeline, but the tokens of several references are the mean of each one's own."""
    other = copy.copy(pipe)

    def mix(faces: list[Face]) -> MixerOutput:
        each = [pipe.mix([face]) for face in faces]
        return MixerOutput(*(torch.stack([getattr(one, n) for one in each]).mean(0) for n in ("tokens", "pooled")))

    other.mix = mix
    return other


def run(arguments: argparse.Namespace) -> dict:
    """`--poses` portraits of each of `--people` people in each way; the report without its provenance."""
    model, out, size = Path(arguments.model), Path(arguments.out), arguments.size
    settings = {"what": "references", "model": fingerprint(model)}
    settings |= {n: getattr(arguments, n) for n in ("people", "poses", "seed", "size", "steps", "guidance")}
    ledger, work = report.Ledger(out.with_suffix(".jsonl"), settings), out.with_suffix(".work")
    witness, pipe = Witness(model), None
    requests = protocol.requests(arguments.seed, arguments.people, arguments.poses)
    people = list(dict.fromkeys(request.person for request in requests))
    for person in tqdm(people, desc="references", unit="person"):
        portraits.look_at_person(person, ledger, witness, work, size)
        for name, picture in poor_pictures(person, size).items():
            Image.fromarray(picture).save(work / f"{name}_{person}.png")
    options = {"num_inference_steps": arguments.steps, "guidance_scale": arguments.guidance}
    for number, request in enumerate(tqdm(requests, desc="portraits", unit="row")):
        portraits.look_at_truth(number, request, ledger, witness, work, size)
        for way in WAYS:
            if ledger.get(f"{way} {number}") is None:
                pipe = pipe or protocol.load_pipeline(model, arguments.device)
                path = work / f"{way.replace(' ', '_')}_{number:04d}.png"
                row = make(averaging(pipe) if way == "averaged" else pipe, way, number, request, work, path, options)
                ledger.put(f"{way} {number}", {**row, **(witness.look(path) if "refused" not in row else {})})
    if arguments.sheet:
        sheet(requests, work, Path(arguments.sheet), arguments.sheet_rows)
    return {"settings": settings, "results": summary(ledger, requests, people)}


def make(pipe: Any, way: str, number: int, request: protocol.Request, work: Path, path: Path, options: dict) -> dict:
    """One portrait of the good and the readable poor references; {"read": how many}, or {"refused": why}."""
    photos = [portraits.reference_path(work, request.person)]
    if way != "good alone":
        photos += [work / f"{name}_{request.person}.png" for name in ("profile", "blurred", "dark")]
    faces = []
    for photo in photos:
        try:
            faces.append(pipe.analyse(photo))
        except InputError:  # so poor that no face is found: the page would refuse it, and its owner leave it out
            continue
    if not faces:
        return {"found": False, "embedding": None, "refused": "no reference could be read"}
    try:
        driver = portraits.driver_path(work, number)
        made = pipe(request.prompt, reference=faces, pose=driver, seed=request.seed, score=False, **options)
    except InputError as error:
        return {"found": False, "embedding": None, "refused": str(error)}
    made.images[0].save(path)
    return {"read": len(faces)}


def summary(ledger: report.Ledger, requests: list[protocol.Request], people: list[int]) -> dict:
    """Cosine to a further picture that no way was shown, by way, and fused minus averaged with an interval.

    The judge compares with the true render of the request: the good reference itself would favour its copy.
    """
    groups = np.array([request.person for request in requests])
    truth = portraits.embeddings([ledger.rows[f"truth {n}"] for n in range(len(requests))])
    found: dict[str, Any] = {"portraits": len(requests)}
    cosines = {}
    for way in WAYS:
        rows = [ledger.rows[f"{way} {n}"] for n in range(len(requests))]
        cosines[way] = np.diag(metrics.cosines(portraits.embeddings(rows), truth))
        found[way] = {
            "cosine": float(cosines[way].mean()),
            "faces_found": float(np.mean([row["found"] for row in rows])),
            "references_read": float(np.mean([row.get("read", 0) for row in rows])),
            "refused": sum("refused" in row for row in rows),
        }
    for other in ("averaged", "good alone"):
        gain, name = cosines["fused"] - cosines[other], f"fused_minus_{other.replace(' ', '_')}"
        found[name] = float(gain.mean())
        found[f"{name}_95"] = metrics.interval(partial(_mean, gain), groups)
    return found


def _mean(values: np.ndarray, rows: np.ndarray) -> float:
    return float(values[rows].mean())


def sheet(requests: list[protocol.Request], work: Path, path: Path, rows: int) -> None:
    """The four references, the three portraits and the true render, one person a row."""
    shown: list[list[np.ndarray]] = []
    seen = set()
    for number, request in enumerate(requests):
        places = [portraits.reference_path(work, request.person)]
        places += [work / f"{name}_{request.person}.png" for name in ("profile", "blurred", "dark")]
        places += [work / f"{way.replace(' ', '_')}_{number:04d}.png" for way in WAYS]
        places.append(portraits.truth_path(work, number))
        if request.person not in seen and len(shown) < rows and all(place.is_file() for place in places):
            seen.add(request.person)
            shown.append([open_image(place) for place in places])
    titles = ["good reference", "profile", "blurred", "dark", *WAYS, "true render"]
    report.contact_sheet(shown, titles, path)


def lines(results: dict) -> list[tuple[str, object, str]]:
    """The report for the terminal: name, value, remark."""
    rows: list[tuple[str, object, str]] = []
    for way in WAYS:
        told = results[way]
        remark = f"cosine; {told['references_read']:.2f} references read, {told['refused']} refused"
        rows.append((way, told["cosine"], remark))
    for name in ("fused_minus_averaged", "fused_minus_good_alone"):
        rows.append((name, results[name], "95 % {:.3f} to {:.3f}".format(*results[f"{name}_95"])))
    return rows

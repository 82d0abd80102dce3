"""What speed costs in likeness: the main evaluation's portraits made once in each way, of the same people.

The ways are the presets, and every option that is not exact alone. Gallery, true pictures, requests and seeds are
shared, so that the ways differ in nothing else, and the difference of two is given with an interval of its own (a
bootstrap over people), which is narrower than theirs.
"""

import argparse
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from tqdm import tqdm

from facesnap import metrics
from facesnap.errors import InputError
from facesnap.evaluation import portraits, protocol, report
from facesnap.evaluation.protocol import Witness
from facesnap.memory import set_memory
from facesnap.provenance import fingerprint
from facesnap.speed import PRESETS

FIGURES = ("identity_retention", "rank1", "landmark_error", "faces_found", "seconds")

# Arguments of the pipeline's call; the last two change the pipeline itself, for good.
WAYS: dict[str, dict[str, Any]] = {
    "best": {"preset": "best"},
    "fast": {"preset": "fast"},
    "ffrnet_every=2": {"ffrnet_every": 2},
    "ffrnet_end=0.5": {"ffrnet_end": 0.5},
    "guidance_end=0.5": {"guidance_end": 0.5},
    "low": {},
    "compiled": {},
}


def changed(pipe: Any, way: str, device: str) -> Any:
    """A checkpoint as a way wants it: in 8-bit floats, or compiled (which needs a C++ compiler)."""
    if way == "low":
        set_memory(pipe, "low", device)
    elif way == "compiled":
        pipe.compile()
    return pipe


def run(arguments: argparse.Namespace) -> dict:
    """Makes and measures the portraits of every way, or the rest of them; the report without provenance."""
    model, out, size = Path(arguments.model), Path(arguments.out), arguments.size
    ways = arguments.ways or list(WAYS)
    if "best" not in ways or not set(ways) <= set(WAYS):
        raise InputError(f"--ways {' '.join(ways)}: choose best, with which all are compared, and of {', '.join(WAYS)}")
    settings = {"what": "speed", "model": fingerprint(model), "presets": {p: repr(PRESETS[p]) for p in PRESETS}}
    settings |= {n: getattr(arguments, n) for n in ("people", "poses", "gallery", "seed", "size", "steps", "guidance")}
    ledger, work = report.Ledger(out.with_suffix(".jsonl"), settings), out.with_suffix(".work")
    witness = Witness(model)
    requests = protocol.requests(arguments.seed, arguments.people, arguments.poses)
    if not arguments.people <= arguments.gallery <= protocol.GALLERY:
        raise InputError(f"--gallery {arguments.gallery}: choose {arguments.people} (--people) to {protocol.GALLERY}")
    gallery = protocol.people(arguments.seed)[0][: arguments.gallery]

    for person in tqdm(gallery, desc="gallery", unit="person"):
        portraits.look_at_person(person, ledger, witness, work, size)
    for number, request in enumerate(tqdm(requests, desc="true pictures", unit="picture")):
        portraits.look_at_truth(number, request, ledger, witness, work, size)
    plain: Any = None  # serves all ways that only change the call
    options = {"num_inference_steps": arguments.steps, "guidance_scale": arguments.guidance}
    for way in ways:
        waiting = [n for n in range(len(requests)) if ledger.get(f"{way} {n}") is None]
        if not waiting:
            continue
        if WAYS[way]:
            pipe = plain = plain or protocol.load_pipeline(model, arguments.device)
        else:
            pipe = changed(protocol.load_pipeline(model, arguments.device), way, arguments.device)
        portraits.make(pipe, 0, requests[0], work, {**options, **WAYS[way]})  # unmeasured: the first call is slower
        for number in tqdm(waiting, desc=way, unit="portrait"):
            made = portraits.make(pipe, number, requests[number], work, {**options, **WAYS[way]})
            path = portraits.portrait_path(work, number)
            seen = witness.look(path) if "refused" not in made else {"found": False}
            if "refused" not in made:
                path.replace(path.with_stem(f"{way}_{number:04d}"))
            ledger.put(f"{way} {number}", {**made, **seen, "peak_memory_gb": report.peak_memory_gb()})

    if arguments.sheet:
        contact_sheet(ledger, requests, work, Path(arguments.sheet), ways, rows=arguments.sheet_rows)
    return {"settings": settings, "results": summary(ledger, requests, gallery, ways)}


def summary(ledger: report.Ledger, requests: list[protocol.Request], gallery: list[int], ways: list[str]) -> dict:
    """The main evaluation's figures for each way, and each one's difference to "best"."""
    results: dict = {}
    for way in ways:
        made = {f"portrait {n}": ledger.rows[f"{way} {n}"] for n in range(len(requests))}
        results[way] = portraits.summary(SimpleNamespace(rows=ledger.rows | made), requests, gallery)  # type: ignore[arg-type]
    references = portraits.embeddings([ledger.rows[f"reference {r.person}"] for r in requests])
    people = np.array([r.person for r in requests])
    strangers = results["best"]["cosine"]["strangers"]

    def likeness(name: str) -> np.ndarray:
        rows = portraits.embeddings([ledger.rows[f"{name} {n}"] for n in range(len(requests))])
        return np.diag(metrics.cosines(rows, references))

    best, truth = likeness("best"), likeness("truth")
    for way in ways:
        rows = likeness(way)

        def difference(i: np.ndarray, rows: np.ndarray = rows) -> float:
            return metrics.retention(rows[i], truth[i], strangers) - metrics.retention(best[i], truth[i], strangers)

        results[way]["retention_minus_best"] = difference(np.arange(len(requests)))
        results[way]["retention_minus_best_95"] = metrics.interval(difference, people)
    return results


def lines(results: dict) -> list[tuple[str, object, str]]:
    """The report for the terminal: name, value, remark."""
    rows: list[tuple[str, object, str]] = []
    for way, found in results.items():
        rows += [(f"{way}: {name}", found[name], "") for name in FIGURES]
        rows.append((f"{way}: text_accuracy", found["text_accuracy"]["score"], ""))
        between = "95 % {:.3f} to {:.3f}".format(*found["retention_minus_best_95"])
        if way != "best":
            rows.append((f"{way}: identity_retention minus best's", found["retention_minus_best"], between))
    return rows


def contact_sheet(
    ledger: report.Ledger, requests: list[protocol.Request], work: Path, path: Path, ways: list[str], *, rows: int
) -> None:
    """reference | the portrait in each way | true render: the first ones, not the best."""
    made = [n for n in range(len(requests)) if all("asked" in ledger.rows[f"{p} {n}"] for p in ways)][:rows]
    pictures = [
        [
            portraits.open_image(place)
            for place in (
                portraits.reference_path(work, requests[n].person),
                *(work / f"{way}_{n:04d}.png" for way in ways),
                portraits.truth_path(work, n),
            )
        ]
        for n in made
    ]
    captions = [requests[n].prompt for n in made]
    report.contact_sheet(pictures, ["reference photo", *ways, "true render"], path, captions=captions)

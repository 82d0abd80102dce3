"""What a preset costs in likeness: the main evaluation's portraits made once by each, of the same people.

Gallery, true pictures, requests and seeds are shared, so that the presets differ in nothing else, and the
difference of two is given with an interval of its own (a bootstrap over people), which is narrower than theirs.
"""

import argparse
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from tqdm import tqdm

from facesnap.evaluation import metrics, portraits, protocol, report
from facesnap.evaluation.protocol import Witness
from facesnap.speed import PRESETS

FIGURES = ("identity_retention", "rank1", "landmark_error", "faces_found", "seconds")


def run(arguments: argparse.Namespace) -> dict:
    """Makes and measures the portraits of every preset, or the rest of them; the report without provenance."""
    model, out, size = Path(arguments.model), Path(arguments.out), arguments.size
    settings = {"what": "speed", "model": report.fingerprint(model), "presets": {p: repr(PRESETS[p]) for p in PRESETS}}
    settings |= {n: getattr(arguments, n) for n in ("people", "poses", "gallery", "seed", "size", "steps", "guidance")}
    ledger, work = report.Ledger(out.with_suffix(".jsonl"), settings), out.with_suffix(".work")
    witness = Witness(model)
    requests = protocol.requests(arguments.seed, arguments.people, arguments.poses)
    if not arguments.people <= arguments.gallery <= protocol.GALLERY:
        raise ValueError(f"--gallery {arguments.gallery}: choose {arguments.people} (--people) to {protocol.GALLERY}")
    gallery = protocol.people(arguments.seed)[0][: arguments.gallery]

    for person in tqdm(gallery, desc="gallery", unit="person"):
        portraits.look_at_person(person, ledger, witness, work, size)
    for number, request in enumerate(tqdm(requests, desc="true pictures", unit="picture")):
        portraits.look_at_truth(number, request, ledger, witness, work, size)
    waiting = [(n, p) for n in range(len(requests)) for p in PRESETS if ledger.get(f"{p} {n}") is None]
    if waiting:
        pipe = protocol.load_pipeline(model, arguments.device)
        options = {"num_inference_steps": arguments.steps, "guidance_scale": arguments.guidance}
        portraits.make(pipe, 0, requests[0], work, options)  # unmeasured: the first call is slower
        for number, preset in tqdm(waiting, desc="portraits", unit="portrait"):
            made = portraits.make(pipe, number, requests[number], work, {**options, "preset": preset})
            path = portraits.portrait_path(work, number)
            seen = witness.look(path) if "refused" not in made else {"found": False}
            if "refused" not in made:
                path.replace(path.with_stem(f"{preset}_{number:04d}"))
            ledger.put(f"{preset} {number}", {**made, **seen, "peak_memory_gb": report.peak_memory_gb()})

    if arguments.sheet:
        contact_sheet(ledger, requests, work, Path(arguments.sheet), rows=arguments.sheet_rows)
    return {"settings": settings, "results": summary(ledger, requests, gallery)}


def summary(ledger: report.Ledger, requests: list[protocol.Request], gallery: list[int]) -> dict:
    """The main evaluation's figures for each preset, and each one's difference to "best"."""
    results: dict = {}
    for preset in PRESETS:
        made = {f"portrait {n}": ledger.rows[f"{preset} {n}"] for n in range(len(requests))}
        results[preset] = portraits.summary(SimpleNamespace(rows=ledger.rows | made), requests, gallery)  # type: ignore[arg-type]
    references = portraits.embeddings([ledger.rows[f"reference {r.person}"] for r in requests])
    people = np.array([r.person for r in requests])
    strangers = results["best"]["cosine"]["strangers"]

    def likeness(name: str) -> np.ndarray:
        rows = portraits.embeddings([ledger.rows[f"{name} {n}"] for n in range(len(requests))])
        return np.diag(metrics.cosines(rows, references))

    best, truth = likeness("best"), likeness("truth")
    for preset in PRESETS:
        rows = likeness(preset)

        def difference(i: np.ndarray, rows: np.ndarray = rows) -> float:
            return metrics.retention(rows[i], truth[i], strangers) - metrics.retention(best[i], truth[i], strangers)

        results[preset]["retention_minus_best"] = difference(np.arange(len(requests)))
        results[preset]["retention_minus_best_95"] = metrics.interval(difference, people)
    return results


def lines(results: dict) -> list[tuple[str, object, str]]:
    """The report for the terminal: name, value, remark."""
    rows: list[tuple[str, object, str]] = []
    for preset, found in results.items():
        rows += [(f"{preset}: {name}", found[name], "") for name in FIGURES]
        rows.append((f"{preset}: text_accuracy", found["text_accuracy"]["score"], ""))
        between = "95 % {:.3f} to {:.3f}".format(*found["retention_minus_best_95"])
        if preset != "best":
            rows.append((f"{preset}: identity_retention minus best's", found["retention_minus_best"], between))
    return rows


def contact_sheet(
    ledger: report.Ledger, requests: list[protocol.Request], work: Path, path: Path, *, rows: int
) -> None:
    """reference | the portrait by each preset | true render: the first ones, not the best."""
    made = [n for n in range(len(requests)) if all("asked" in ledger.rows[f"{p} {n}"] for p in PRESETS)][:rows]
    pictures = [
        [
            portraits.open_image(place)
            for place in (
                portraits.reference_path(work, requests[n].person),
                *(work / f"{preset}_{n:04d}.png" for preset in PRESETS),
                portraits.truth_path(work, n),
            )
        ]
        for n in made
    ]
    captions = [requests[n].prompt for n in made]
    report.contact_sheet(pictures, ["reference photo", *PRESETS, "true render"], path, captions=captions)

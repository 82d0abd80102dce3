"""The main evaluation: portraits of held-out people in poses and prompts that nobody ever drew of them.

Three passes over pictures, each a file in the work folder and a line in the ledger: the gallery (which also
measures the recogniser itself), the true picture of every portrait (the ceiling), and the portraits.
"""

import argparse
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

from facesnap import landmarks, metrics
from facesnap.errors import InputError
from facesnap.evaluation import protocol, report
from facesnap.evaluation.protocol import Request, Witness, rendered
from facesnap.evaluation.report import Ledger
from facesnap.images import open_image
from facesnap.pipeline import FaceSnapPipeline
from facesnap.provenance import fingerprint

RENDERS = 2  # of each person of the gallery beside the reference, drawn as the world draws them


def run(arguments: argparse.Namespace) -> dict:
    """Makes and measures the portraits, or the rest of them; the report without its provenance."""
    model, out, size = Path(arguments.model), Path(arguments.out), arguments.size
    settings = {"what": "portraits", "model": fingerprint(model)}
    settings |= {n: getattr(arguments, n) for n in ("people", "poses", "seed", "size", "steps", "guidance")}
    ledger, work = Ledger(out.with_suffix(".jsonl"), settings), out.with_suffix(".work")
    witness = Witness(model)
    requests = protocol.requests(arguments.seed, arguments.people, arguments.poses)
    gallery, _ = protocol.people(arguments.seed)

    for person in tqdm(gallery, desc="gallery", unit="person"):
        look_at_person(person, ledger, witness, work, size)
    for number, request in enumerate(tqdm(requests, desc="true pictures", unit="picture")):
        look_at_truth(number, request, ledger, witness, work, size)
    waiting = [n for n in range(len(requests)) if ledger.get(f"portrait {n}") is None]
    if waiting:
        pipe = protocol.load_pipeline(model, arguments.device)
        options = {"num_inference_steps": arguments.steps, "guidance_scale": arguments.guidance}
        make(pipe, waiting[0], requests[waiting[0]], work, options)  # unmeasured: the first call is slower
        for number in tqdm(waiting, desc="portraits", unit="portrait"):
            made = make(pipe, number, requests[number], work, options)
            seen = witness.look(portrait_path(work, number)) if "refused" not in made else {"found": False}
            ledger.put(f"portrait {number}", {**made, **seen, "peak_memory_gb": report.peak_memory_gb()})

    if arguments.sheet:
        contact_sheet(ledger, requests, work, Path(arguments.sheet), rows=arguments.sheet_rows)
    return {"settings": settings, "results": summary(ledger, requests, gallery)}


# ---------------------------------------------------------------------------------------- the pictures


def reference_path(work: Path, person: int) -> Path:
    return work / f"reference_{person}.png"


def driver_path(work: Path, number: int) -> Path:
    return work / f"driver_{number:04d}.png"


def truth_path(work: Path, number: int) -> Path:
    return work / f"truth_{number:04d}.png"


def portrait_path(work: Path, number: int) -> Path:
    return work / f"portrait_{number:04d}.png"


def look_at_person(person: int, ledger: Ledger, witness: Witness, work: Path, size: int) -> None:
    """The reference of a person of the gallery, and some pictures of theirs as the world draws them."""
    paths = {"reference": reference_path(work, person)}
    pictures = {"reference": protocol.reference_picture(person)}
    for k in range(RENDERS):
        paths[f"render {k}"] = work / f"render_{person}_{k}.png"
        pictures[f"render {k}"] = protocol.world_picture(person, k)
    for name, picture in pictures.items():
        if ledger.get(f"{name} {person}") is None:
            seen = witness.look(rendered(picture, paths[name], size))
            row = {**seen, "style": picture.style, "wanted": protocol.judged(picture)}
            ledger.put(f"{name} {person}", row)


def look_at_truth(number: int, request: Request, ledger: Ledger, witness: Witness, work: Path, size: int) -> None:
    """The true picture that a portrait is compared with, and what is exactly known of it."""
    if ledger.get(f"truth {number}") is not None:
        return
    driver = protocol.driver_picture(request.driver)
    rendered(driver, driver_path(work, number), size)
    truth = protocol.truth_picture(request.person, driver, style=request.style, attributes=request.attributes)
    row = {
        **witness.look(rendered(truth, truth_path(work, number), size)),
        "exact": np.round(protocol.exact_landmarks(truth, size), 2).tolist(),
        "eye_distance": protocol.frontal_eye_distance(truth, size),
        "wanted": protocol.judged(truth),
    }
    ledger.put(f"truth {number}", row)


def make(pipe: FaceSnapPipeline, number: int, request: Request, work: Path, options: dict) -> dict:
    """One portrait, from PNG files through the pipeline into its file; a refusal is an outcome, not an
    end."""
    start = time.perf_counter()
    try:
        result = pipe(
            request.prompt,
            reference=reference_path(work, request.person),
            pose=driver_path(work, number),
            seed=request.seed,
            score=False,
            **options,
        )
    except InputError as error:
        return {"refused": str(error)}
    seconds = time.perf_counter() - start
    result.images[0].save(portrait_path(work, number))
    return {"seconds": seconds, "asked": np.round(result.landmarks, 2).tolist()}


# ----------------------------------------------------------------------------------------- the figures


def summary(ledger: Ledger, requests: list[Request], gallery: list[int]) -> dict:
    """All figures, from the ledger alone."""
    portraits = [ledger.rows[f"portrait {n}"] for n in range(len(requests))]
    truths = [ledger.rows[f"truth {n}"] for n in range(len(requests))]
    references = [ledger.rows[f"reference {p}"] for p in gallery]
    renders = [(p, ledger.rows[f"render {k} {p}"]) for p in gallery for k in range(RENDERS)]
    people = np.array([r.person for r in requests])
    everybody = np.array(gallery + [p for p, _ in renders])
    seconds = [p["seconds"] for p in portraits if "seconds" in p]
    return {
        "portraits": len(requests),
        **identity_figures(portraits, truths, references, people, gallery),
        **landmark_figures(portraits, truths, people),
        **sharpness_figures(portraits, truths, people),
        **judges_figures(portraits, truths, references + [row for _, row in renders], everybody),
        "seconds": float(np.median(seconds)) if seconds else None,
        "seconds_slowest": float(np.max(seconds)) if seconds else None,
        "peak_memory_gb": max(p["peak_memory_gb"] for p in portraits),
    }


def identity_figures(
    portraits: list[dict], truths: list[dict], references: list[dict], people: np.ndarray, gallery: list[int]
) -> dict:
    """How like the references (one for each of `gallery`) the portraits of `people` (N,) are."""
    own, rows = np.array([gallery.index(p) for p in people]), np.arange(len(people))
    found = np.array([p["found"] for p in portraits])
    similarity = metrics.cosines(embeddings(portraits), embeddings(references))
    true_similarity = metrics.cosines(embeddings(truths), embeddings(references))
    generated, ceiling = similarity[rows, own], true_similarity[rows, own]
    others = np.ones_like(similarity, bool)
    others[rows, own] = False
    strangers = float(true_similarity[others].mean())
    return {
        "identity_retention": metrics.retention(generated, ceiling, strangers),
        "identity_retention_95": metrics.interval(
            lambda i: metrics.retention(generated[i], ceiling[i], strangers), people
        ),
        "cosine": {
            "generated": float(generated.mean()),
            "true_render": float(ceiling.mean()),
            "strangers": strangers,
            "generated_to_strangers": float(similarity[others].mean()),
        },
        "rank1": metrics.rank1(similarity, own, found),
        "rank1_95": metrics.interval(lambda i: metrics.rank1(similarity[i], own[i], found[i]), people),
        "rank1_true_render": metrics.rank1(true_similarity, own, np.array([t["found"] for t in truths])),
    }


def landmark_figures(portraits: list[dict], truths: list[dict], people: np.ndarray) -> dict:
    """How far the portraits' landmarks are from those asked for, and what the net and the predictor share in it."""
    eyes = [t["eye_distance"] for t in truths]
    errors = np.array([landmark_error(p, p.get("asked"), e) for p, e in zip(portraits, eyes, strict=True)])
    net_errors = [landmark_error(t, t["exact"], t["eye_distance"]) for t in truths]
    asked = [
        metrics.landmark_error(np.array(p["asked"]), np.array(t["exact"]), t["eye_distance"])
        for p, t in zip(portraits, truths, strict=True)
        if "asked" in p
    ]
    return {
        "landmark_error": float(errors.mean()),
        "landmark_error_median": float(np.median(errors)),
        "landmark_error_95": metrics.interval(lambda i: float(errors[i].mean()), people),
        "landmark_net_error": float(np.mean(net_errors)),
        "asked_against_truth": float(np.mean(asked)) if asked else None,
    }


def sharpness_figures(portraits: list[dict], truths: list[dict], people: np.ndarray) -> dict:
    ratios = sharpness_ratios(portraits, truths)
    seen = ~np.isnan(ratios)
    if not seen.any():
        return {"sharpness": None, "sharpness_95": None}
    ratios, people = ratios[seen], people[seen]
    return {
        "sharpness": float(np.median(ratios)),
        "sharpness_95": metrics.interval(lambda i: float(np.median(ratios[i])), people),
    }


def judges_figures(portraits: list[dict], truths: list[dict], renders: list[dict], people: np.ndarray) -> dict:
    """What was asked for and is seen; and how far the judges themselves can be trusted, on `renders` of `people`."""
    photos = np.array([row["style"] == "photo" for row in renders])
    known = embeddings(renders)
    wanted = [t["wanted"] for t in truths]
    return {
        "text_accuracy": metrics.attribute_accuracy([p.get("attributes", {}) for p in portraits], wanted),
        "scorer_accuracy": metrics.attribute_accuracy([t["attributes"] for t in truths], wanted),
        "scorer_accuracy_world": metrics.attribute_accuracy(
            [row["attributes"] for row in renders], [row["wanted"] for row in renders]
        ),
        "faces_found": float(np.mean([p["found"] for p in portraits])),
        "faces_found_true_render": float(np.mean([t["found"] for t in truths])),
        "faces_found_renders": float(np.mean([row["found"] for row in renders])),
        "refused": [p["refused"] for p in portraits if "refused" in p],
        "tar_at_far_1e-3": metrics.tar_at_far(*metrics.same_and_different(known, people)),
        "tar_at_far_1e-3_photos": metrics.tar_at_far(*metrics.same_and_different(known[photos], people[photos])),
    }


def sharpness_ratios(portraits: list[dict], truths: list[dict]) -> np.ndarray:
    """(N,) sharpness of each portrait as a share of its true render's; NaN where one of them has no face."""
    pairs = zip(portraits, truths, strict=True)
    return np.array([a["sharpness"] / b["sharpness"] if a["found"] and b["found"] else np.nan for a, b in pairs])


def embeddings(rows: list[dict]) -> np.ndarray:
    """(N, 512); a row of zeros, whose cosines are 0, where no face was found."""
    return np.stack([np.zeros(512) if r.get("embedding") is None else np.array(r["embedding"]) for r in rows])


def landmark_error(row: dict, wanted: list | None, eye_distance: float) -> float:
    if not row["found"] or wanted is None:
        return metrics.MISSED_LANDMARK_ERROR
    return metrics.landmark_error(np.array(row["points"]), np.array(wanted), eye_distance)


def lines(results: dict) -> list[tuple[str, object, str]]:
    """The report for the terminal: name, value, remark."""

    def between(name: str) -> str:
        return "95 % {:.3f} to {:.3f}".format(*results[name])

    cosine, text = results["cosine"], results["text_accuracy"]
    rows: list[tuple[str, object, str]] = [
        (
            "identity_retention",
            results["identity_retention"],
            f"{between('identity_retention_95')}; cosines: generated {cosine['generated']:.3f}, "
            f"true render {cosine['true_render']:.3f}, strangers {cosine['strangers']:.3f}",
        ),
        (
            "rank1",
            results["rank1"],
            f"{between('rank1_95')}; of {protocol.GALLERY}; true renders {results['rank1_true_render']:.3f}",
        ),
        (
            "landmark_error",
            results["landmark_error"],
            f"{between('landmark_error_95')}; the net on true renders {results['landmark_net_error']:.3f}",
        ),
        (
            "text_accuracy",
            text["score"],
            f"scorer on the true renders {results['scorer_accuracy']['score']:.3f}",
        ),
    ]
    truth = results["scorer_accuracy"]["attributes"]
    for name, a in text["attributes"].items():
        rows.append((f"  {name}", a["score"], f"of {a['pictures']}; true renders {truth[name]['score']:.3f}"))
    rows += [
        ("sharpness", results["sharpness"], "of the true render's (Laplacian), median"),
        ("faces_found", results["faces_found"], f"true renders {results['faces_found_true_render']:.3f}"),
        (
            "TAR at FAR 1e-3",
            results["tar_at_far_1e-3"],
            f"photos only {results['tar_at_far_1e-3_photos']:.3f}",
        ),
        ("seconds", results["seconds"], "a portrait, median"),
        ("peak_memory_gb", results["peak_memory_gb"], "of the whole evaluation"),
    ]
    return rows


# ------------------------------------------------------------------------------------------- the sheet


def contact_sheet(ledger: Ledger, requests: list[Request], work: Path, path: Path, *, rows: int) -> None:
    """reference | pose | control drawing | portrait | true render, one person a row: the first ones, not
    the best."""
    chosen, seen = [], set()
    for number, request in enumerate(requests):
        if request.person not in seen and "asked" in ledger.rows[f"portrait {number}"]:
            seen.add(request.person)
            chosen.append(number)
    pictures, captions, notes = [], [], []
    for number in chosen[:rows]:
        request, row = requests[number], ledger.rows[f"portrait {number}"]
        reference = open_image(reference_path(work, request.person))
        drawing = landmarks.draw(np.array(row["asked"], np.float32), reference.shape[:2])
        others = [driver_path(work, number), portrait_path(work, number), truth_path(work, number)]
        driver, portrait, truth = (open_image(p) for p in others)
        pictures.append([reference, driver, drawing, portrait, truth])
        captions.append(request.prompt)
        own = embeddings([ledger.rows[f"reference {request.person}"]])
        made, true = (metrics.cosines(embeddings([r]), own)[0, 0] for r in (row, ledger.rows[f"truth {number}"]))
        notes.append(["", "", "", f"identity {made:.2f}", f"identity {true:.2f}"])
    titles = ["reference photo", "pose photo", "control drawing", "FaceSnap portrait", "true render"]
    report.contact_sheet(pictures, titles, path, captions=captions, notes=notes)

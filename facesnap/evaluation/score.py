"""`score`: the folders of one or several methods, judged against a plan; the paper's Table 1 for any method.

A picture that is missing, or shows no face, counts as a failure: FaceSim and CLIP-face 0, landmarks one eye distance
off. Nothing is left out of a mean but where the report says so (pose and expression can only be read from a face; a
method's FID is that of the pictures it made).
"""

import argparse
import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from PIL import Image

from facesnap import metrics
from facesnap.errors import InputError
from facesnap.evaluation import fid, html, report
from facesnap.evaluation import plan as plans
from facesnap.evaluation.looks import Examiner, look_at_all, vectors
from facesnap.evaluation.methods import METHOD, made
from facesnap.evaluation.plan import Plan
from facesnap.images import ENDINGS
from facesnap.provenance import fingerprint


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("plan", type=Path, help="a plan's folder")
    parser.add_argument("folders", type=Path, nargs="+", help="the methods' folders")
    parser.add_argument("--model", required=True, help="checkpoint folder: its face pack finds the faces")
    parser.add_argument("--out", required=True, type=Path, help="folder of the report")
    parser.add_argument("--judge", nargs="+", default=["C"], help="FaceSim by C, facenet, dlib")
    parser.add_argument("--facenet", type=Path, help="20180402-114759-vggface2.pt")
    parser.add_argument("--clip", nargs="*", default=[], help="folders or Hub ids, for example laion/CLIP-ViT-H-14-…")
    parser.add_argument("--inception", type=Path, help="pt_inception-2015-12-05-6726825d.pth; else FD-mini, KD-mini")
    parser.add_argument("--real", type=Path, help="folder of real pictures for FID; the true pictures by default")
    parser.add_argument("--missing", choices=("refuse", "failed"), default="refuse", help="of pictures not there")
    parser.add_argument("--worst", type=int, default=24, help="rows of each contact sheet")
    parser.add_argument("--device", default="cpu")


def run(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """Looks at all pictures and writes report.json, .md and .html and rows.csv; None in all processes but the first."""
    plan = plans.read(arguments.plan)
    failures, made_by, notes = {}, {}, {}
    pictures: dict[str, Path] = {}
    names = [folder.name for folder in arguments.folders]
    if len(set(names)) < len(names):
        raise InputError("Two of the folders have the same name, which is the method's: rename one.")
    if reserved := {"plan", "real"} & set(names):
        raise InputError(f"No method can be called '{min(reserved)}': rename its folder.")
    for folder in arguments.folders:
        failures[folder.name], notes[folder.name] = check(folder, plan, arguments.missing)
        made_by[folder.name] = made(folder)
        there = [row.file for row in plan.rows if row.file not in failures[folder.name]]
        pictures |= {f"{folder.name}/{file}": folder / file for file in there}
    own = {p for row in plan.rows for p in (row.reference, row.driver, row.truth) if p}
    pictures |= {f"plan/{path}": plan.folder / path for path in sorted(own)}
    pictures |= real_pictures(arguments.real)

    state = PartialState(cpu=arguments.device == "cpu")
    device = str(state.device) if arguments.device == "cuda" else arguments.device
    examiner = Examiner(arguments, device)
    settings = {"model": fingerprint(Path(arguments.model)), **examiner.about}
    looks = look_at_all(pictures, lambda: examiner, settings, arguments.out / "looks")
    if not state.is_main_process:
        return None
    texts = {
        clip.name: {prompt: clip.text(prompt) for prompt in {row.prompt for row in plan.rows}}
        for clip in examiner.clips
    }
    each = {name: samples(plan, name, looks, texts, failures[name]) for name in names}
    real = real_looks(looks)[0]
    found = {
        "plan": {"digest": plan.digest, **plan.settings, "rows": len(plan.rows), "faceless": faceless(plan, looks)},
        "settings": settings | {"real": arguments.real.name if arguments.real else real},
        "methods": {
            name: summary(plan, name, looks, each[name], made_by[name], examiner.extractor.names)
            | {"failures": failures[name], "notes": notes[name]}
            for name in names
        },
    }
    found = {**report.provenance(arguments.model), **found}
    report.write(arguments.out / "report.json", found)
    write_rows(arguments.out / "rows.csv", plan, each)
    report.write_whole(arguments.out / "report.md", markdown(found))
    page = html.page(found, plan, arguments.folders, each, looks, markdown(found), worst=arguments.worst)
    report.write_whole(arguments.out / "report.html", page)
    return found


def write_rows(path: Path, plan: Plan, each: dict[str, dict[str, np.ndarray]]) -> None:
    """Every figure of every picture: method, file, person, then the figures, empty where they cannot be said."""
    figures = list(dict.fromkeys(key for told in each.values() for key in told))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "file", "person", *figures])
        for name, told in each.items():
            for k, row in enumerate(plan.rows):
                values = [told[key][k] if key in told else np.nan for key in figures]
                cells = ["" if np.isnan(value) else f"{value:.6g}" for value in values]
                writer.writerow([name, row.file, row.person, *cells])


def real_pictures(folder: Path | None) -> dict[str, Path]:
    """The pictures of --real by their keys; InputError where there is none."""
    if folder is None:
        return {}
    if not folder.is_dir():
        raise InputError(f"There is no folder '{folder.name}' of real pictures.")
    found = {f"real/{path.name}": path for path in sorted(folder.iterdir()) if path.suffix.lower() in ENDINGS}
    if not found:
        raise InputError(f"The folder '{folder.name}' holds no real pictures.")
    return found


def check(folder: Path, plan: Plan, missing: str) -> tuple[dict[str, str], list[str]]:
    """(the rows without a picture and why, sentences for the report) of a method's folder.

    Raises InputError where it is missing, empty or partly filled without a word, made for another plan, or has
    pictures of another size.
    """
    if not folder.is_dir():
        raise InputError(f"There is no folder '{folder.name}' of a method's pictures.")
    named = folder / METHOD
    if named.is_file() and json.loads(named.read_text(encoding="utf-8")).get("plan") != plan.digest:
        raise InputError(f"The pictures in '{folder.name}' were made for another plan: make them again.")
    told = {file: row["failed"] for file, row in made(folder).items() if "failed" in row}
    files = [row.file for row in plan.rows]
    absent = [file for file in files if not (folder / file).is_file()]
    if len(absent) == len(files):
        raise InputError(f"None of the plan's pictures is in '{folder.name}': they are named in {plans.MANIFEST}.")
    untold = [file for file in absent if file not in told]
    if untold and missing == "refuse":
        raise InputError(
            f"'{folder.name}' lacks {len(untold)} of {len(files)} pictures, such as {untold[0]}: make the rest, or "
            "count them as failures with --missing failed."
        )
    wrong = [(row.file, size) for row in plan.rows if (size := _size(folder / row.file)) not in (None, (row.size,) * 2)]
    if wrong:
        file, size = wrong[0]
        raise InputError(
            f"{len(wrong)} pictures in '{folder.name}' have another size than the plan asks for, such as {file}: "
            f"{size} instead of {plan.rows[0].size} x {plan.rows[0].size}. Make a plan of that --size, or resize them."
        )
    others = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in ENDINGS and path.name not in files)
    notes = []
    if others:
        notes = [f"{len(others)} pictures that the plan does not name were not scored, such as {others[0]}"]
    return {file: told.get(file, "not there") for file in absent}, notes


def _size(path: Path) -> str | tuple[int, int] | None:
    if not path.is_file():
        return None
    try:
        with Image.open(path) as picture:
            return picture.size
    except (OSError, ValueError):
        return "no picture"


# ------------------------------------------------------------------------------------------------- the figures


def samples(plan: Plan, name: str, looks: dict, texts: dict, failures: dict) -> dict[str, np.ndarray]:
    """Each figure of each row, (N,), NaN where it cannot be said; what has no face is as bad as can be."""
    rows = plan.rows
    own = [None if row.file in failures else looks[f"{name}/{row.file}"] for row in rows]
    references, drivers = ([looks[f"plan/{getattr(row, key)}"] for row in rows] for key in ("reference", "driver"))
    truths = [looks[f"plan/{row.truth}"] if row.truth else None for row in rows]
    found = np.array([bool(look and look["found"]) for look in own])
    exact = np.array([row.exact is not None for row in rows])
    told: dict[str, np.ndarray] = {"found": found.astype(float)}
    for clip, encoded in texts.items():
        prompts = np.stack([encoded[row.prompt] for row in rows])
        told[f"CLIP-T {clip}"] = 100 * paired(vectors(own, f"clip {clip}"), prompts)
        faces = [vectors(some, f"clip-face {clip}") for some in (own, references)]
        told[f"CLIP-face {clip}"] = 100 * paired(*faces)
    for kind in sorted({kind for look in references for kind in look["vectors"] if kind.startswith("face ")}):
        judge = kind.removeprefix("face ")
        made_, reference, truth = (vectors(some, kind) for some in (own, references, truths))
        told[f"FaceSim {judge}"] = 100 * paired(made_, reference)
        if any(truths):
            pairs = zip(truths, references, strict=True)
            known = found & np.array([bool(a and a["found"] and b["found"]) for a, b in pairs])
            told[f"ceiling {judge}"] = np.where([bool(t) for t in truths], 100 * paired(truth, reference), np.nan)
            told[f"copy-paste {judge}"] = np.where(known, metrics.copy_paste(made_, truth, reference), np.nan)
    told["landmark_error"] = np.array([_landmark_error(look, row) for look, row in zip(own, rows, strict=True)])
    told["landmark_error"][~exact] = np.nan

    def difference(key: str) -> np.ndarray:
        pairs = zip(own, drivers, strict=True)
        unknown = np.full(3 if key == "angles" else 1, np.nan)
        return np.stack([
            np.abs(np.subtract(a[key], b[key])).ravel() if a and a["found"] and b["found"] else unknown
            for a, b in pairs
        ])  # fmt: skip

    told["pose_error"] = difference("angles").mean(1)
    for key in ("mouth", "brows"):
        told[f"{key}_error"] = difference(key)[:, 0]
        told[key], told[f"driver_{key}"] = (
            np.array([look[key] if look and look["found"] else np.nan for look in some]) for some in (own, drivers)
        )
    told["sharpness"] = np.array([_ratio(look, truth) for look, truth in zip(own, truths, strict=True)])
    return told


def paired(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosines (N,) of corresponding rows of (N, D) and (N, D); 0 where one of them is zeros."""
    if a.shape[1] != b.shape[1]:  # not one face was found on one side, so its width is unknown
        return np.zeros(len(a))
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.divide((a * b).sum(1), lengths, out=np.zeros(len(a)), where=lengths > 0)


def _landmark_error(look: dict | None, row: plans.Row) -> float:
    if row.exact is None or row.eye_distance is None or not look or not look["found"]:
        return metrics.MISSED_LANDMARK_ERROR
    return metrics.landmark_error(np.array(look["points"]), np.array(row.exact), row.eye_distance)


def _ratio(look: dict | None, truth: dict | None) -> float:
    if not look or not truth or not look["found"] or not truth["found"] or truth["sharpness"] <= 0:
        return np.nan
    if look["size"] != truth["size"]:  # a photograph of another size: what a pixel is differs
        return np.nan
    return look["sharpness"] / truth["sharpness"]


def summary(
    plan: Plan, name: str, looks: dict, told: dict[str, np.ndarray], made_by: dict, names: tuple[str, str]
) -> dict[str, Any]:
    """{figure: {"value", "95": its interval over people, "of": how many rows it is of}} and what has no interval."""
    people = np.array([row.person for row in plan.rows])
    found: dict[str, Any] = {}

    def put(figure: str, statistic: Any, rows: np.ndarray) -> None:
        if len(rows) == 0:
            found[figure] = {"value": None, "of": 0}
            return
        value = statistic(rows)
        low, high = metrics.interval(lambda i: statistic(rows[i]), people[rows])
        found[figure] = {"value": value, "95": [low, high], "of": len(rows)}

    for figure, values in told.items():
        if not figure.startswith(("ceiling", "driver_")) and figure not in ("mouth", "brows"):
            rows = np.flatnonzero(~np.isnan(values))
            middle = np.median if figure == "sharpness" else np.mean
            put(figure, lambda i, v=values, m=middle: float(m(v[i])), rows)
    for judge in (key.removeprefix("FaceSim ") for key in told if key.startswith("FaceSim ")):
        if f"ceiling {judge}" in told:
            generated, ceiling = told[f"FaceSim {judge}"], told[f"ceiling {judge}"]
            between = strangers(plan, looks, judge)
            put(
                f"retention {judge}",
                lambda i, g=generated, c=ceiling, s=between: metrics.retention(g[i], c[i], s),
                np.flatnonzero(~np.isnan(ceiling)),
            )
            found[f"strangers {judge}"] = between
    for key in ("mouth", "brows"):
        x, y = told[key], told[f"driver_{key}"]
        rows = np.flatnonzero(~np.isnan(x) & ~np.isnan(y))
        rows = rows if len(rows) > 2 else rows[:0]
        put(f"{key}_correlation", lambda i, x=x, y=y: metrics.correlation(x[i], y[i]), rows)
    own = [looks[key] for row in plan.rows if (key := f"{name}/{row.file}") in looks]
    wanted = [row.wanted or {} for row in plan.rows]
    asked = {key for row in wanted for key in row}
    if any("attributes" in look for look in own) and any(
        len({row.get(key) for row in wanted} - {None}) > 1 for key in asked
    ):
        seen = [looks.get(f"{name}/{row.file}", {}).get("attributes", {}) for row in plan.rows]
        found["text_accuracy"] = metrics.attribute_accuracy(seen, wanted)
    distance = fid.distances(vectors(real_looks(looks)[1], "features"), vectors(own, "features"))
    found |= {names[0]: distance[0], names[1]: {"value": distance[1], "deviation": distance[2]}}
    for key, statistic in (("seconds", np.median), ("peak_memory_gb", np.max)):
        noted = [row[key] for row in made_by.values() if key in row]
        found[key] = float(statistic(noted)) if noted else None
    return found


def real_looks(looks: dict[str, dict]) -> tuple[str, list[dict]]:
    """What FID compares with, in words, and its looks: --real, else the true pictures, else the references."""
    for kind, words in (("real/", "a folder"), ("plan/truths/", "the plan's true pictures")):
        some = [look for key, look in looks.items() if key.startswith(kind)]
        if len(some) > 1 or some and kind == "real/":
            return words, some
    return "the plan's references", [look for key, look in looks.items() if key.startswith("plan/references/")]


def faceless(plan: Plan, looks: dict[str, dict]) -> list[str]:
    """The references in which no face was found: no method can do anything for their rows."""
    return sorted({row.reference for row in plan.rows if not looks[f"plan/{row.reference}"]["found"]})


def strangers(plan: Plan, looks: dict, judge: str) -> float:
    """Mean FaceSim of two references of different people; 0 where faces of two were not found."""
    own = {row.person: looks[f"plan/{row.reference}"] for row in plan.rows}
    faces = [look for look in own.values() if look["found"]]
    if len(faces) < 2:
        return 0.0
    cosines = metrics.cosines(*(vectors(faces, f"face {judge}"),) * 2)
    return 100 * float(cosines[np.triu_indices(len(cosines), 1)].mean())


# --------------------------------------------------------------------------------------------------- the table


def markdown(found: dict[str, Any]) -> str:
    """The report as a page of Markdown: one row a method, then what the figures are of."""
    methods = found["methods"]
    figures = list(dict.fromkeys(key for told in methods.values() for key in told))
    hidden = ("failures", "notes", "text_accuracy")
    shown = [key for key in figures if key not in hidden and not key.startswith("strangers ")]
    lines = [f"# {len(methods)} methods on plan {found['plan']['digest']}", ""]
    lines += ["| | " + " | ".join(methods) + " |", "|---" * (1 + len(methods)) + "|"]
    for key in shown:
        cells = [cell(told.get(key), found["plan"]["rows"]) for told in methods.values()]
        lines.append(f"| {key} | " + " | ".join(cells) + " |")
    if any("text_accuracy" in told for told in methods.values()):
        texts = [told.get("text_accuracy", {}).get("score") for told in methods.values()]
        lines.append("| text_accuracy | " + " | ".join(cell(value) for value in texts) + " |")
    lines += ["", "In brackets: 95 % intervals by a bootstrap over people; “of”: how many rows, where not all.", ""]
    if blind := found["plan"]["faceless"]:
        lines.append(f"- in {len(blind)} references, such as {blind[0]}, no face was found: failures of every method")
    for name, told in methods.items():
        reasons = told["failures"]
        if reasons:
            lines.append(f"- {name}: {len(reasons)} rows failed, such as {min(reasons)}: {reasons[min(reasons)]}")
        lines += [f"- {name}: {note}" for note in told["notes"]]
    settings = found["settings"]
    lines += [f"- FaceSim {name}: {about}" for name, about in settings["judges"].items()]
    lines += [f"- CLIP {name}: {about}" for name, about in settings["clips"].items()]
    names, of = " and ".join(settings["features"]["names"]), settings["features"]["of"]
    lines += [f"- {names}: {of}, against {settings['real']}"]
    plan = found["plan"]
    lines += [f"- {plan['rows']} rows of {plan['identities']} people, seed {plan['seed']}, {plan['size']} pixels", ""]
    return "\n".join(lines)


def cell(told: Any, rows: int | None = None) -> str:
    """One figure for a table; of how many rows it is, where those are not all `rows`."""
    if isinstance(told, dict):
        value = cell(told["value"])
        if "95" in told:
            fewer = "" if rows is None or told["of"] == rows else f" of {told['of']}"
            return f"{value} ({cell(told['95'][0])} to {cell(told['95'][1])}){fewer}"
        return f"{value} ± {cell(told['deviation'])}" if "deviation" in told else value
    if told is None:
        return "–"
    return f"{told:.1f}" if abs(told) >= 10 else f"{told:.3f}"


def lines(found: dict[str, Any] | None) -> list[tuple[str, object, str]]:
    """For the terminal: the likeness of each method; all else is in the report."""
    if found is None:
        return [("done", "", "the first process writes the report")]
    return [
        (name, cell(next((told[key] for key in told if key.startswith("FaceSim")), None)), "FaceSim")
        for name, told in found["methods"].items()
    ]

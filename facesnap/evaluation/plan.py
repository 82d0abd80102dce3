"""`plan`: what every method is asked for, in a folder that anybody can fill and `score` can judge.

    manifest.csv    file, reference, driver, prompt, seed, size: all that a method may know. `file` is what the
                    picture must be called; the others are paths in the plan's folder
    facts.jsonl     a line a row: the person, the template, the true picture and what is exactly known of it
    references/ drivers/ truths/   the pictures
    plan.json       the settings, and a digest of every file above, by which `score` sees whether one was changed

The protocol is the paper's: 200 identities x 10 pose templates, prompts from a fixed list, seeds fixed. The rendered
gallery (people whom no training has seen) has a true picture for every row: that person in that pose, expression and
prompt. A folder of photographs has one only where a person has a second photograph, and its pose is another one.
"""

import argparse
import csv
import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from facesnap.errors import InputError, check_number
from facesnap.evaluation import protocol, report
from facesnap.images import ENDINGS, open_image
from facesnap.synthetic.people import Picture, sample_person, sample_picture
from facesnap.templates import TEMPLATES, PoseTemplate

MANIFEST, FACTS, PLAN = "manifest.csv", "facts.jsonl", "plan.json"
BEGUN = "begun.json"  # the settings, until the plan is whole
VERSION = 1
RENDERED_PROMPTS = 40  # drawn once, by a seed of their own: the list is the same for every seed of the plan

# For photographs; what PhotoMaker's, InstantID's and PuLID's readers try: clothes, places, light, styles.
PROMPTS = (
    "a photo of a person",
    "a photo of a person, wearing a red jacket, a blue studio background",
    "a photo of a person, wearing a white shirt, in an office",
    "a photo of a person, wearing a hat and a coat, in a snowy street",
    "a photo of a person, in a garden, morning light",
    "a photo of a person, on a beach at sunset",
    "a photo of a person, reading in a library, warm light",
    "a photo of a person, in the kitchen, wearing an apron",
    "a photo of a person, at night in a city, neon light",
    "a photo of a person, wearing round glasses, a grey background",
    "a photo of a person in a space suit",
    "a photo of a person as a chef, hard light from one side",
    "a black and white portrait of a person",
    "a black and white photo of a person, wearing a scarf, in the rain",
    "a watercolor of a person, hills behind",
    "an oil painting of a person, wearing a dark coat",
    "an oil painting of a person in the style of the Dutch masters",
    "a pencil sketch of a person",
    "a comic drawing of a person, bright colours",
    "a bronze bust of a person in a museum",
)


@dataclass(frozen=True)
class Row:
    """One portrait to make, and what is known of the true one.

    reference, driver: paths in the plan's folder. truth: the true picture, or None. exact: its 72 landmarks (72, 2) in
    pixels, eye_distance: between the outer eye corners of that head held frontally, both None for photographs, as is
    wanted, the attributes that the true picture shows.
    """

    file: str
    reference: str
    driver: str
    prompt: str
    seed: int
    size: int
    person: str
    template: str
    truth: str | None = None
    exact: list | None = None
    eye_distance: float | None = None
    wanted: dict | None = None


ASKED = ("file", "reference", "driver", "prompt", "seed", "size")  # columns of the manifest


@dataclass(frozen=True)
class Plan:
    folder: Path
    settings: dict[str, Any]
    digest: str
    rows: tuple[Row, ...]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", required=True, type=Path, help="the plan's folder")
    parser.add_argument("--identities", type=Path, help="folder of photographs, a file or a subfolder a person")
    parser.add_argument("--templates", type=Path, help="folder of pose photos instead of the ten rendered ones")
    parser.add_argument("--prompts", type=Path, help="a text file, a prompt a line (with --identities)")
    parser.add_argument("--people", type=int, help="the first so many; by default 200, or all of the folder")
    parser.add_argument("--poses", type=int, default=len(TEMPLATES), help="the first so many templates")
    parser.add_argument("--seed", type=int, default=0, help="of people, prompts and noise")
    parser.add_argument("--size", type=int, default=256, help="side of the portraits, pixels")


def run(arguments: argparse.Namespace) -> Plan:
    """Writes the plan, or the rest of it."""
    check_number("number of poses", arguments.poses, 1, 1000, whole=True)
    check_number("size", arguments.size, 64, 4096, whole=True)
    out = arguments.out
    settings = {
        "version": VERSION,
        "identities": "rendered" if arguments.identities is None else "photographs",
        "templates": "rendered" if arguments.templates is None else "photographs",
        **{name: getattr(arguments, name) for name in ("people", "poses", "seed", "size")},
    }
    given = {name: getattr(arguments, name) for name in ("identities", "templates", "prompts")}
    if any(given.values()):
        settings["given"] = {name: _digest_of(place) for name, place in given.items() if place is not None}
    for name in (PLAN, BEGUN):  # of a plan that was begun and killed the pictures are taken over
        if (out / name).exists() and _told(out / name)["settings"] != settings:
            raise InputError(f"The folder '{out.name}' holds another plan: give another --out, or delete it.")
    if (out / PLAN).exists():
        return read(out)
    out.mkdir(parents=True, exist_ok=True)
    report.write_whole(out / BEGUN, json.dumps({"settings": settings}) + "\n")
    rows = list(_rendered(out, arguments) if arguments.identities is None else _photographed(out, arguments))
    with (out / MANIFEST).open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(ASKED)
        writer.writerows([getattr(row, name) for name in ASKED] for row in rows)
    facts = [{k: v for k, v in asdict(row).items() if k == "file" or k not in ASKED} for row in rows]
    (out / FACTS).write_text("".join(json.dumps(line) + "\n" for line in facts), encoding="utf-8")
    used = {MANIFEST, FACTS} | {p for row in rows for p in (row.reference, row.driver, row.truth) if p}
    files = {name: _digest(out / name) for name in sorted(used)}
    report.write_whole(out / PLAN, json.dumps({"settings": settings, "files": files}, indent=1) + "\n")
    (out / BEGUN).unlink()
    return read(out)


def read(folder: Path) -> Plan:
    """A plan, every file of it as it was when it was written.

    Raises InputError where there is none, or where one of its files is missing or was changed.
    """
    if not (folder / PLAN).is_file():
        raise InputError(f"There is no plan in '{folder.name}': make one with `python -m facesnap.evaluation plan`.")
    known = _told(folder / PLAN)
    lost = [name for name in known["files"] if not (folder / name).is_file()]
    if lost:
        raise InputError(f"The plan '{folder.name}' lacks {len(lost)} of its files, such as '{lost[0]}': plan again.")
    changed = [name for name, digest in known["files"].items() if _digest(folder / name) != digest]
    if changed:
        raise InputError(
            f"The plan '{folder.name}' was changed after it was made ({len(changed)} files, such as '{changed[0]}'): "
            "what was made for it cannot be scored. Plan again, into another folder."
        )
    with (folder / MANIFEST).open(newline="", encoding="utf-8") as file:
        asked = list(csv.DictReader(file))
    facts = [json.loads(line) for line in (folder / FACTS).read_text(encoding="utf-8").splitlines()]
    rows = []
    for one, more in zip(asked, facts, strict=True):
        numbers = {name: int(one[name]) for name in ("seed", "size")}
        rows.append(Row(**{**one, **numbers, **more}))
    whole = json.dumps(known["files"], sort_keys=True).encode()
    return Plan(folder, known["settings"], hashlib.sha256(whole).hexdigest()[:12], tuple(rows))


# ---------------------------------------------------------------------------------------------- rendered people


def template_picture(template: PoseTemplate, driver: int, size: int) -> Picture:
    """A person, bare-headed, in the pose, size and place of a template; the expression is a drawn one."""
    pose = tuple(np.radians([template.yaw, template.pitch, template.roll]))
    bare = {"glasses": "none", "hat": "none"}

    def drawn(scale: float, shift: tuple[float, float], pose: tuple[float, ...]) -> Picture:
        options: dict[str, Any] = {"style": "photo", "pose": pose, "attributes": bare}
        return sample_picture(sample_person(driver), 1, scale=scale, shift=shift, **options)

    frontal = protocol.exact_landmarks(drawn(1.0, (0, 0), (0, 0, 0)), size)
    scale = template.head_size * size / float(np.ptp(frontal[:, 1]))
    placed = protocol.exact_landmarks(drawn(scale, (0, 0), pose), size)
    # the middle of the face where LandmarkPredictor.from_numbers puts it; shifts are in half pictures, y upwards
    wanted = np.array([0.5, 0.58]) * size - 0.5
    moved = (wanted - (placed.min(0) + placed.max(0)) / 2) / (size / 2)
    return drawn(scale, (float(moved[0]), -float(moved[1])), pose)


def _rendered(out: Path, arguments: argparse.Namespace) -> Iterator[Row]:
    if arguments.prompts:
        raise InputError("--prompts is for photographs: rendered people have prompts whose true picture is known.")
    people = protocol.GALLERY if arguments.people is None else arguments.people
    check_number("number of people", people, 1, protocol.GALLERY, whole=True)
    gallery, drivers = protocol.people(arguments.seed)
    rng = np.random.default_rng([18, 0])
    prompts = [protocol.draw_prompt(rng) for _ in range(RENDERED_PROMPTS)]
    size, poses = arguments.size, {}
    for k, (name, path) in enumerate(_driver_pictures(out, arguments, drivers)):
        poses[name] = path, None if arguments.templates else template_picture(TEMPLATES[k], drivers[k], size)
    for i, person in enumerate(tqdm(gallery[:people], desc="people", unit="person")):
        reference = f"references/{person}.png"
        protocol.rendered(protocol.reference_picture(person), out / reference, size)
        for prompt, seed, (name, (driver, pose)) in zip(*_draws(arguments, i, prompts), poses.items(), strict=False):
            number = i * len(poses) + list(poses).index(name)
            words, style, attributes = prompt
            row = Row(f"{number:05d}.png", reference, driver, words, seed, size, str(person), name)
            if pose is not None:
                row = _with_truth(row, out, protocol.truth_picture(person, pose, style=style, attributes=attributes))
            yield row


def _with_truth(row: Row, out: Path, truth: Picture) -> Row:
    path = f"truths/{row.file}"
    protocol.rendered(truth, out / path, row.size)
    return replace(
        row,
        truth=path,
        exact=np.round(protocol.exact_landmarks(truth, row.size), 2).tolist(),
        eye_distance=round(protocol.frontal_eye_distance(truth, row.size), 3),
        wanted=protocol.judged(truth),
    )


def _draws(arguments: argparse.Namespace, number: int, prompts: list) -> tuple[list, list[int]]:
    """Prompts and seeds of one person: the same however many people a plan has."""
    rng = np.random.default_rng([arguments.seed, 18, number])
    order = np.concatenate([rng.permutation(len(prompts)) for _ in range(1 + arguments.poses // len(prompts))])
    chosen = [prompts[k] for k in order[: arguments.poses]]
    return chosen, rng.integers(2**31, size=arguments.poses).tolist()


# -------------------------------------------------------------------------------------------------- photographs


def _photographed(out: Path, arguments: argparse.Namespace) -> Iterator[Row]:
    people = identities(arguments.identities)
    count = len(people) if arguments.people is None else arguments.people
    check_number("number of people", count, 1, len(people), whole=True)
    prompts = list(PROMPTS)
    if arguments.prompts:
        if not arguments.prompts.is_file():
            raise InputError(f"There is no file '{arguments.prompts.name}' of prompts.")
        lines = [line.strip() for line in arguments.prompts.read_text(encoding="utf-8").splitlines()]
        prompts = [line for line in lines if line]
        if not prompts:
            raise InputError(f"The file '{arguments.prompts.name}' holds no prompt: write one a line.")
    drivers = protocol.people(arguments.seed)[1]
    poses = dict(_driver_pictures(out, arguments, drivers))
    for i, (name, pictures) in enumerate(tqdm(people[:count], desc="people", unit="person")):
        reference, truth = f"references/{i:04d}.png", None
        _copy(pictures[0], out / reference)
        if len(pictures) > 1:
            truth = f"truths/{i:04d}.png"
            _copy(pictures[1], out / truth)
        for prompt, seed, (template, driver) in zip(*_draws(arguments, i, prompts), poses.items(), strict=False):
            number = i * len(poses) + list(poses).index(template)
            yield Row(f"{number:05d}.png", reference, driver, prompt, seed, arguments.size, name, template, truth=truth)


def identities(folder: Path) -> list[tuple[str, list[Path]]]:
    """(name, pictures) of each person: a subfolder each, or else a file each.

    Raises InputError where there is no picture, a person's subfolder is empty, or it is not clear who is who.
    """
    if not folder.is_dir():
        raise InputError(f"There is no folder '{folder.name}' of identities.")
    people = [(place.name, _pictures(place)) for place in sorted(folder.iterdir()) if place.is_dir()]
    loose = _pictures(folder)
    if people and loose:
        raise InputError(
            f"The folder '{folder.name}' holds subfolders and {len(loose)} pictures beside them, such as "
            f"'{loose[0].name}': give each person a subfolder, or each a file."
        )
    people = people or [(path.stem, [path]) for path in loose]
    _check_once([name for name, _ in people], folder)
    if not people:
        raise InputError(f"The folder '{folder.name}' holds no pictures: one file, or one subfolder, a person.")
    empty = [name for name, pictures in people if not pictures]
    if empty:
        raise InputError(f"There are no pictures of '{empty[0]}' ({len(empty)} empty subfolders): remove or fill them.")
    return people


def _pictures(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in ENDINGS)


def _check_once(names: list[str], folder: Path) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise InputError(f"Two pictures in '{folder.name}' are called '{twice[0]}': rename one.")


def _driver_pictures(out: Path, arguments: argparse.Namespace, drivers: list[int]) -> Iterator[tuple[str, str]]:
    """(template, path in the plan's folder) of the pose photos."""
    if arguments.templates is None:
        check_number("number of poses", arguments.poses, 1, len(TEMPLATES), whole=True)
        for template, person in zip(TEMPLATES[: arguments.poses], drivers, strict=False):
            place = f"drivers/{template.name}.png"
            protocol.rendered(template_picture(template, person, arguments.size), out / place, arguments.size)
            yield template.name, place
        return
    if not arguments.templates.is_dir():
        raise InputError(f"There is no folder '{arguments.templates.name}' of pose photos.")
    found = _pictures(arguments.templates)[: arguments.poses]
    if not found:
        raise InputError(f"The folder '{arguments.templates.name}' holds no pose photos.")
    _check_once([path.stem for path in found], arguments.templates)
    for k, path in enumerate(found):
        _copy(path, out / f"drivers/{k:02d}.png")
        yield path.stem, f"drivers/{k:02d}.png"


def _copy(path: Path, target: Path) -> None:
    """The picture as the page would read it: turned upright, its metadata gone."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        Image.fromarray(open_image(path)).save(target)
    except InputError as error:
        raise InputError(f"'{path.name}' cannot be used: {error}") from error


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _digest_of(place: Path) -> str:
    """Of a file, or of all pictures in a folder and in its subfolders, with their names."""
    if not place.is_dir():
        return _digest(place) if place.is_file() else ""
    pictures = sorted(path for path in place.rglob("*") if path.suffix.lower() in ENDINGS and path.is_file())
    told = [f"{path.relative_to(place).as_posix()} {_digest(path)}" for path in pictures]
    return hashlib.sha256("\n".join(told).encode()).hexdigest()[:16]


def _told(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise InputError(f"'{path.name}' in '{path.parent.name}' is damaged: delete it and plan again.") from error


def lines(plan: Plan) -> list[tuple[str, object, str]]:
    """What was planned, for the terminal."""
    people = len({row.person for row in plan.rows})
    truths = sum(row.truth is not None for row in plan.rows)
    return [
        ("pictures to make", len(plan.rows), f"named in {MANIFEST}"),
        ("people", people, plan.settings["identities"]),
        ("true pictures", truths, ""),
        ("plan", plan.digest, "its digest, which every report of it names"),
    ]

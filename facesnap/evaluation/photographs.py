"""Photographs: the mini knows rendered people only, so how does it take to real ones, and to pictures of nobody?

Seven faces that every installation already has: scikit-image's `astronaut()` (NASA, public domain) and the
six people of InsightFace's bundled picture `t1`. Only the marks below, made by hand on the enlarged
pictures, are part of this project; neither the photographs nor anything made from them is ever committed.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from insightface.data import get_image
from PIL import Image
from tqdm import tqdm

from facesnap import landmarks, metrics
from facesnap.errors import InputError
from facesnap.evaluation import faceless, protocol, report, traits
from facesnap.faces import FaceAnalyser
from facesnap.geometry import moved
from facesnap.heads import from_pretrained
from facesnap.provenance import fingerprint

PROMPT = "a photo of a person, wearing a gray shirt, a blue studio background, soft light"


@dataclass(frozen=True)
class Marked:
    """A face marked by hand: pixels (x, y) of the whole picture; `box` (left, top, right, bottom) is cut
    out of it.

    marks: middle of the left and of the right eye (the picture's left), nose tip, left and right corner of
    the mouth, chin. Where a turned head hides one, the mark is where it would be seen.
    """

    name: str
    picture: str
    box: tuple[int, int, int, int]
    marks: tuple[tuple[float, float], ...]

    def points(self) -> np.ndarray:
        """(6, 2) in pixels of the cut-out."""
        return np.array(self.marks) - self.box[:2]


# fmt: off
MARKED = (
    Marked("astronaut", "astronaut", (0, 0, 512, 512),
           ((202.5, 101), (247.5, 103), (223.5, 126.5), (203.5, 140.5), (245, 140.5), (223, 177.5))),
    Marked("t1, first from the left", "t1", (0, 200, 245, 445),
           ((86.5, 328), (130.5, 308.5), (118, 337), (115, 371), (150, 351), (145, 391.5))),
    Marked("t1, second", "t1", (215, 70, 445, 300),
           ((292, 211), (321, 195), (303.5, 227), (313, 245), (340, 233), (333, 263))),
    Marked("t1, third", "t1", (415, 195, 655, 435),
           ((492, 320), (539.5, 332.5), (510.5, 360), (483, 367), (541, 378), (500, 413))),
    Marked("t1, fourth", "t1", (690, 270, 920, 500),
           ((760, 397), (803, 404), (777, 427), (769, 439), (808, 441), (784, 477))),
    Marked("t1, fifth", "t1", (855, 0, 1085, 250),
           ((918, 121), (943, 114), (920, 150), (931, 169), (961, 168), (957, 204))),
    Marked("t1, sixth", "t1", (1070, 215, 1280, 445),
           ((1149.5, 327), (1195, 324.5), (1165, 347), (1155, 366.5), (1198, 364), (1177, 398))),
)
# fmt: on


def marked_of(points: np.ndarray) -> np.ndarray:
    """The six marked places of the 72 landmarks: (72, D) → (6, D)."""
    eyes = [points[list(landmarks.GROUPS[name])].mean(axis=0) for name in ("left_eye", "right_eye")]
    return np.stack([*eyes, points[30], points[52], points[57], points[8]])


def cut_out(marked: Marked) -> np.ndarray:
    """The photograph of one person, RGB uint8."""
    if marked.picture == "astronaut":
        from skimage.data import astronaut  # a development dependency

        whole = astronaut()
    else:
        whole = get_image(marked.picture)[..., ::-1]
    left, top, right, bottom = marked.box
    return np.ascontiguousarray(whole[top:bottom, left:right])


def run(arguments: argparse.Namespace) -> dict:
    """Finds the seven faces, compares with the marks, and with `--sheet` makes a portrait of each; of a folder with
    labels, what the avatars show (`traits`)."""
    if arguments.folder:
        return traits.run(arguments)
    model = Path(arguments.model)
    settings = {"what": "photographs", "model": fingerprint(model), "seed": arguments.seed}
    analyser = FaceAnalyser(model / "face_pack")
    mean = from_pretrained(model / "head").mean
    rows = [look(marked, analyser, mean) for marked in MARKED]
    if arguments.sheet:
        portraits_sheet(model, analyser, arguments, rows)
    found = [row for row in rows if row["found_by"] is not None]
    turned = [reads_turned(marked, turns, analyser) for marked in MARKED for turns in (1, 2, 3)]
    taken = {name: shows_person(picture, analyser) for name, picture in tqdm(faceless.pictures(), desc="faceless")}
    return {
        "settings": settings,
        "results": {
            "faces": len(rows),
            "found": len(found),
            "found_without_haar": sum(row["found_by"] != "haar" for row in found),
            "median_error": float(np.median([row["error"] for row in found])) if found else None,
            "turned": len(turned),
            "turned_right": sum(turned),
            "faceless": len(taken),
            "refused": len(taken) - sum(taken.values()),
            "taken_for_people": [name for name, wrong in taken.items() if wrong],
            "each": rows,
        },
    }


def reads_turned(marked: Marked, turns: int, analyser: FaceAnalyser) -> bool:
    """Whether a photograph that was turned by quarter turns counter-clockwise is turned back."""
    try:
        return analyser.analyse(np.ascontiguousarray(np.rot90(cut_out(marked), turns))).turned == 90 * turns
    except InputError:
        return False


def shows_person(picture: np.ndarray, analyser: FaceAnalyser) -> bool:
    try:
        analyser.analyse(picture)
    except InputError:
        return False
    return True


def look(marked: Marked, analyser: FaceAnalyser, mean: np.ndarray) -> dict:
    """What is found in one photograph, and how far from the marks: {"found_by", "error" in eye distances,
    …}.

    The eye distance is that of the mean head at the scale of the *marks*, so it neither depends on what was
    found nor shrinks with the turn of the head.
    """
    row = {"name": marked.name, "found_by": None}
    try:
        face = analyser.analyse(cut_out(marked))
    except InputError as error:
        return {**row, "refused": str(error)}
    wanted = marked.points()
    if face.straightening is not None:
        wanted = moved(wanted, face.straightening)
    scale = metrics.orthographic_scale(marked_of(mean), wanted)
    eyes = metrics.frontal_eye_distance(mean, scale)
    found = marked_of(landmarks.from_68(face.landmarks[:, :2]))
    each = np.linalg.norm(found - wanted, axis=1) / eyes
    names = ("left eye", "right eye", "nose tip", "mouth left", "mouth right", "chin")
    return {
        **row,
        "found_by": face.found_by,
        "error": float(each.mean()),
        "errors": dict(zip(names, each.tolist(), strict=True)),
        "eye_distance": eyes,
    }


def portraits_sheet(model: Path, analyser: FaceAnalyser, arguments: argparse.Namespace, rows: list[dict]) -> None:
    """photograph | found landmarks | control drawing | portrait | facing front, for the eye; never to be committed.

    The last shows a person large whose face is small in the photograph.
    """
    pipe = protocol.load_pipeline(model, arguments.device)
    work = Path(arguments.out).with_suffix(".work")
    work.mkdir(parents=True, exist_ok=True)
    shown, captions = [], []
    for number, (marked, row) in enumerate(zip(tqdm(MARKED, desc="portraits", unit="portrait"), rows, strict=True)):
        photo = cut_out(marked)
        path = work / f"photograph_{number}.png"
        Image.fromarray(photo).save(path)
        if row["found_by"] is None:
            shown.append([photo])
            captions.append(f"{marked.name}: no face found")
            continue
        face = analyser.analyse(photo)
        drawn = landmarks.draw(landmarks.from_68(face.landmarks[:, :2]), photo.shape[:2])
        over = np.where(drawn.any(axis=-1, keepdims=True), drawn, photo)
        as_there, front = (
            pipe(PROMPT, preview=preview, seed=arguments.seed, score=False)
            for preview in (pipe.preview(path), pipe.preview(path, "front", expression="reference"))
        )
        shown.append([photo, over, as_there.drawing, *(np.asarray(made.images[0]) for made in (as_there, front))])
        captions.append(f"{marked.name}: {row['found_by']}, error {row['error']:.2f} eye distances")
    titles = ["photograph", "landmarks found", "control drawing", "portrait", "facing front"]
    report.contact_sheet(shown, titles, Path(arguments.sheet), captions=captions)


def lines(results: dict) -> list[tuple[str, object, str]]:
    """The report for the terminal: name, value, remark."""
    if "traits" in results:
        return traits.lines(results)
    rows: list[tuple[str, object, str]] = [
        ("faces found", results["found"], f"of {results['faces']}"),
        ("without Haar", results["found_without_haar"], ""),
        ("median error", results["median_error"], "eye distances, of those found"),
        ("read upright", results["turned_right"], f"of {results['turned']} that were turned by 90, 180 and 270°"),
        ("refused", results["refused"], f"of {results['faceless']} pictures without a face"),
    ]
    rows += [(f"  taken for a person: {name}", "", "") for name in results["taken_for_people"]]
    for row in results["each"]:
        rows.append((f"  {row['name']}", row.get("error", "none"), row.get("refused", row["found_by"])))
    return rows

"""`judge`: does a recogniser tell people apart on photographs, before FaceSim is believed of it?

A folder of photographs of different people (one each), and where scikit-image is installed the seven faces that come
with the dependencies. Every photograph is compared with itself mirrored, halved and as a JPEG of quality 40, which
must stay near, and with all the others, which must stay far.
"""

import argparse
import io
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from facesnap.errors import InputError
from facesnap.evaluation import photographs, report
from facesnap.evaluation.facesim import judges
from facesnap.evaluation.plan import identities
from facesnap.faces import FaceAnalyser
from facesnap.images import open_image

NEAR, FAR = 0.45, 0.6  # Euclidean: dlib's own limit for one person is 0.6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="photographs of different people, one each")
    parser.add_argument("--judge", default="dlib", help="C, facenet or dlib")
    parser.add_argument("--facenet", type=Path, help="20180402-114759-vggface2.pt")
    parser.add_argument("--model", default="assets/mini", help="checkpoint folder: its face pack finds the faces")
    parser.add_argument("--out", type=Path, help="the report, a .json file")


def run(arguments: argparse.Namespace) -> dict:
    """Distances of the same picture changed, and of strangers; cosines of strangers beside them."""
    model = Path(arguments.model)
    judge, analyser = judges([arguments.judge], model, arguments.facenet, "cpu")[0], FaceAnalyser(model / "face_pack")
    people = [(name, open_image(pictures[0])) for name, pictures in identities(arguments.folder)]
    people += [(marked.name, photographs.cut_out(marked)) for marked in photographs.MARKED]
    own: list[np.ndarray] = []
    changed: dict[str, list[float]] = {name: [] for name in ("mirror", "half size", "JPEG 40")}
    lost = []
    for name, picture in tqdm(people, desc="people", unit="person"):
        try:
            embedding = judge.embed(picture, analyser.analyse(picture))
            others = {how: judge.embed(other, analyser.analyse(other)) for how, other in variants(picture)}
        except InputError as error:
            lost.append(f"{name}: {error}")
            continue
        own.append(embedding)
        for how, other in others.items():
            changed[how].append(float(np.linalg.norm(embedding - other)))
    if len(own) < 2:
        raise InputError(f"A face was found in {len(own)} of {len(people)} photographs; two people are needed.")
    apart = np.array([np.linalg.norm(a - b) for a, b in combinations(own, 2)])
    cosines = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in combinations(own, 2)]
    results = {
        "judge": judge.about,
        "people": len(own),
        "lost": lost,
        "changed": {how: {"mean": np.mean(d), "most": np.max(d)} for how, d in changed.items()},
        "strangers": {"pairs": len(apart), "least": apart.min(), f"above {FAR}": np.mean(apart > FAR)},
        "strangers_cosine": float(np.mean(cosines)),
    }
    if arguments.out:
        report.write(arguments.out, {**report.provenance(arguments.model), "results": results})
    return results


def variants(picture: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """The same picture, changed in ways that leave the person."""
    whole = Image.fromarray(picture)
    yield "mirror", np.ascontiguousarray(picture[:, ::-1])
    yield "half size", np.asarray(whole.resize((whole.width // 2, whole.height // 2), Image.Resampling.BOX))
    stream = io.BytesIO()
    whole.save(stream, "JPEG", quality=40)
    yield "JPEG 40", np.asarray(Image.open(stream).convert("RGB"))


def lines(results: dict) -> list[tuple[str, object, str]]:
    """The report for the terminal: name, value, remark."""
    rows: list[tuple[str, object, str]] = [("people", results["people"], "; ".join(results["lost"]))]
    for how, told in results["changed"].items():
        rows.append((how, float(told["most"]), f"most; mean {told['mean']:.3f}; goal below {NEAR}"))
    apart = results["strangers"]
    rows.append((f"strangers above {FAR}", float(apart[f"above {FAR}"]), f"of {apart['pairs']} pairs; goal 0.98"))
    rows.append(("strangers, cosine", results["strangers_cosine"], "mean"))
    return rows

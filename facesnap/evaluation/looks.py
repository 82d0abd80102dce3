"""What is seen in single pictures: one look at each, shared among processes, resumed where it stopped.

A look knows the picture only, never what was asked. It holds vectors (base64 of float32, so that a look is one line of
a ledger) and a few numbers; `score` then computes every figure from looks alone.
"""

import argparse
import base64
import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from tqdm import tqdm

from facesnap import landmarks, metrics
from facesnap.errors import InputError
from facesnap.evaluation import report
from facesnap.evaluation.clip import Clip, face_region
from facesnap.evaluation.facesim import FaceJudge, judges
from facesnap.evaluation.fid import EncoderFeatures, Extractor, InceptionFeatures
from facesnap.evaluation.scorer import AttributeScorer
from facesnap.faces import Face, FaceAnalyser
from facesnap.heads import HeadModel
from facesnap.heads import from_pretrained as read_head
from facesnap.images import open_image

# iBUG-68: inner lips, middle above and below; brows; eyes
LIPS, BROWS, EYES = ([61, 62, 63], [67, 66, 65]), slice(17, 27), slice(36, 48)


class Examiner:
    """All that looks at a picture. about: what each part is, for the report and against mixing two runs."""

    def __init__(self, arguments: argparse.Namespace, device: str = "cpu"):
        model = Path(arguments.model)
        if not (model / "face_pack").is_dir():
            raise InputError(f"'{model.name}' has no face_pack: give the folder of a checkpoint with --model.")
        self.analyser = FaceAnalyser(model / "face_pack")
        self.head: HeadModel = read_head(model / "head")
        self.judges: list[FaceJudge] = judges(arguments.judge, model, arguments.facenet, device)
        self.clips = [Clip(name, device) for name in arguments.clip]
        self.extractor: Extractor = (
            InceptionFeatures(arguments.inception, device)
            if arguments.inception
            else EncoderFeatures(model / "face_encoder", device)
        )
        known = (model / "scorer" / "attributes.json").is_file()
        self.scorer = AttributeScorer(model / "scorer") if known else None

    @property
    def about(self) -> dict[str, Any]:
        return {
            "judges": {judge.name: judge.about for judge in self.judges},
            "clips": {clip.name: clip.about for clip in self.clips},
            "features": {"names": list(self.extractor.names), "of": self.extractor.about},
        }

    def look(self, picture: np.ndarray) -> dict[str, Any]:
        """RGB uint8 (H, W, 3) → {"found", "vectors": {name: text}, and of a face its points, angles, …}."""
        seen: dict[str, Any] = {"found": False, "size": list(picture.shape[:2])}
        vectors = {"features": self.extractor.features(picture)}
        for clip in self.clips:
            vectors[f"clip {clip.name}"] = clip.image(picture)
        face = self._face(picture, seen)
        if self.scorer:
            seen["attributes"] = self.scorer.classify(picture, face.keypoints if face else None)
        if face:
            seen |= {"found": True, **measured(face, self.head, picture)}
            for judge in self.judges:
                vectors[f"face {judge.name}"] = judge.embed(picture, face)
            region = face_region(picture, face.box)
            for clip in self.clips:
                vectors[f"clip-face {clip.name}"] = clip.image(region)
        return {**seen, "vectors": {name: packed(vector) for name, vector in vectors.items()}}

    def _face(self, picture: np.ndarray, seen: dict[str, Any]) -> Face | None:
        try:
            face = self.analyser.analyse(picture)
        except InputError as error:
            seen["reason"] = str(error)
            return None
        if face.found_by == "haar":  # that is for visitors' photographs: where it must help, little is a face
            seen["reason"] = "found by the Haar cascade only"
            return None
        return face


def measured(face: Face, head_model: HeadModel, picture: np.ndarray) -> dict[str, Any]:
    """Points (72, 2) in pixels; angles (yaw, pitch, roll) in degrees; mouth opening and brow height in eye distances
    of the head held frontally, both measured in the head's own frame; sharpness of the face."""
    head = head_model.reconstruct([face])[0]
    # pixels, y down → the head's frame, whose rotation is about any point
    points = (face.landmarks * [1, -1, 1]) @ head.rotation / (head.scale * head_model.eye_distance)
    gap = np.linalg.norm(points[LIPS[0]] - points[LIPS[1]], axis=1).mean()
    return {
        "points": np.round(landmarks.from_68(face.landmarks[:, :2]), 2).tolist(),
        "angles": np.round(head.angles, 2).tolist(),
        "mouth": round(float(gap), 4),
        "brows": round(float(points[BROWS, 1].mean() - points[EYES, 1].mean()), 4),
        "sharpness": round(metrics.sharpness(picture, face.box), 3),
    }


# ------------------------------------------------------------------------------------------- many pictures


def look_at_all(
    pictures: dict[str, Path], examiner_of: Callable[[], Examiner], settings: dict[str, Any], work: Path
) -> dict[str, dict]:
    """A look at each picture by its key; those of earlier runs, in any number of processes, are kept.

    A look is known by the digest of the picture's file: a picture that was changed is looked at anew, and equal ones
    only once. examiner_of: makes the `Examiner`, where something is left to see.

    Raises InputError where a picture cannot be opened, or another process has left some unseen.
    """
    state = PartialState()
    work.mkdir(parents=True, exist_ok=True)
    digests = {key: digest(path) for key, path in pictures.items()}
    keys = {digests[key]: key for key in pictures}  # one of each content
    known = known_looks(work, settings)
    state.wait_for_everyone()  # nobody may write a look that another still counts as waiting
    waiting = [one for one in keys if one not in known]
    if mine := waiting[state.process_index :: state.num_processes]:
        ledger = report.Ledger(work / f"looks.{state.process_index}.jsonl", settings)
        examiner = examiner_of()
        for one in tqdm(mine, desc="looking", unit="picture", disable=not state.is_main_process):
            path = pictures[keys[one]]
            try:
                picture = open_image(path)
            except InputError as error:
                raise InputError(f"{keys[one]} is no picture: {error}") from error
            ledger.put(one, examiner.look(picture))
    state.wait_for_everyone()
    known = known_looks(work, settings)
    unseen = [key for key, one in digests.items() if one not in known]
    if unseen:
        raise InputError(
            f"{len(unseen)} of {len(pictures)} pictures were not looked at, such as {unseen[0]}: a process was ended. "
            "Give the same command again; it goes on from there."
        )
    return {key: known[one] for key, one in digests.items()}


def known_looks(work: Path, settings: dict[str, Any]) -> dict[str, dict]:
    """The looks that all processes have written so far, by the digests of their pictures."""
    found: dict[str, dict] = {}
    for path in sorted(work.glob("looks.*.jsonl")):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines(True) if line.endswith("\n")]
        if rows and rows[0] != settings:
            differing = sorted(k for k in {*rows[0], *settings} if rows[0].get(k) != settings.get(k))
            raise InputError(
                f"'{work.name}' holds looks by other means (different: {', '.join(differing)}): "
                "give another --out, or delete it."
            )
        found |= {row.pop("key"): row for row in rows[1:]}
    return found


def packed(vector: np.ndarray) -> str:
    return base64.b64encode(np.asarray(vector, "<f4").tobytes()).decode()


def vectors(looks: Iterable[dict | None], name: str) -> np.ndarray:
    """(N, D) of one kind; a row of zeros, whose cosines are 0, where there was no picture or no face."""
    found = [look["vectors"].get(name) if look else None for look in looks]
    rows = [None if text is None else np.frombuffer(base64.b64decode(text), "<f4") for text in found]
    width = next((len(row) for row in rows if row is not None), 1)
    return np.stack([np.zeros(width, np.float32) if row is None else row for row in rows])


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]

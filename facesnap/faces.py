"""A picture → a `Face`: box, points, identity embedding and the crop for the CLIP-form encoder.

Everything goes through the InsightFace library and a pack of ONNX files given by its folder: the mini's own,
or antelopev2 where a user has it. A detector that finds nothing is tried at other sizes and on a larger grey
canvas (a face that fills the picture is missed by most), then OpenCV's Haar cascade is asked. What stays is
an `InputError` that says so.
"""

import hashlib
import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from insightface.app import FaceAnalysis
from insightface.app.common import Face as InsightFace
from insightface.model_zoo import get_model
from insightface.utils.face_align import norm_crop

from facesnap.errors import InputError
from facesnap.geometry import square_crop

SMALLEST = 32  # pixels: below this, an embedding says little about the person
WEAKEST = 0.8  # of the best score in the picture: false alarms may be large, but they are weak
CASCADES = (  # of OpenCV, and whether the picture is mirrored: there is one cascade for profiles
    ("frontalface_alt2", False),
    ("frontalface_default", False),
    ("profileface", False),
    ("profileface", True),
)
TASKS = {"detection": "face detector", "landmark_3d_68": "3D landmark net", "recognition": "recogniser"}


@dataclass(frozen=True)
class Face:
    """The largest face of a picture. Points are pixels of that picture, x right, y down.

    box (4,) x0 y0 x1 y1; score of the detector, 0 for Haar; keypoints (5, 2) of the landmarks: eyes, nose
    tip, mouth corners; landmarks (68, 3): iBUG-68, z towards the camera in pixels, its zero meaningless;
    embedding (512,) not normalised; crop (224, 224, 3) RGB uint8; size (height, width) of the picture; count
    of faces seen; found_by "detector", "resized", "padded" or "haar"; image (H, W, 3), the analysed picture itself
    and no copy of it, for a head model that reads pictures (DECA)."""

    box: np.ndarray
    score: float
    keypoints: np.ndarray
    landmarks: np.ndarray
    embedding: np.ndarray
    crop: np.ndarray
    size: tuple[int, int]
    count: int
    found_by: str
    image: np.ndarray | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Found:
    """Boxes (N, 4) in the picture's pixels, scores (N,) of the detector, and which attempt saw them (`Face`)."""

    boxes: np.ndarray
    scores: np.ndarray
    by: str


NOTHING = Found(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), "nothing")


class FaceAnalyser:
    """InsightFace on a pack of one's own, with second chances.

    `pack_dir` holds the ONNX files of an SCRFD-form detector, a 3D-68 landmark net and a recogniser, under
    any names. `sizes` are the detector's input sizes: a picture is first searched at the smallest and, where
    it is larger than that, at the second; the others are for when nothing was found."""

    def __init__(
        self,
        pack_dir: str | Path,
        providers: tuple[str, ...] = ("CPUExecutionProvider",),
        *,
        sizes: tuple[int, ...] = (256, 640, 384, 160),
        threshold: float = 0.5,
    ):
        self.pack_dir = _pack_folder(Path(pack_dir))
        self.sizes, self.threshold = sizes, threshold
        try:
            analysis = FaceAnalysis(name=str(self.pack_dir), allowed_modules=list(TASKS), providers=list(providers))
        except AssertionError:  # InsightFace's way of saying that no file looks like a detector
            raise InputError(_lacks(pack_dir, "detection")) from None
        except Exception as error:  # onnxruntime's and protobuf's errors share no ancestor but this
            raise InputError(
                f"The face pack {str(pack_dir)!r} cannot be loaded, a file in it is damaged: fetch it again."
            ) from error
        for task in TASKS:
            if task not in analysis.models:
                raise InputError(_lacks(pack_dir, task))
        analysis.prepare(ctx_id=0, det_thresh=threshold, det_size=(sizes[0], sizes[0]))
        self._models: dict[str, Any] = analysis.models

    @classmethod
    def from_pretrained(cls, folder: str | Path, **options: Any) -> "FaceAnalyser":
        return cls(folder, **options)

    def save_pretrained(self, folder: str | Path) -> None:
        """Copy the pack's three ONNX files to `folder`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for model in self._models.values():
            target = folder / Path(model.model_file).name
            if target.resolve() != Path(model.model_file).resolve():
                shutil.copyfile(model.model_file, target)

    @property
    def recogniser_digest(self) -> str:
        """Twelve digits that tell this pack's recogniser from others: embeddings of two cannot be compared."""
        return hashlib.sha256(Path(self._models["recognition"].model_file).read_bytes()).hexdigest()[:12]

    def analyse(self, image: np.ndarray, *, hard: AbstractContextManager[Any] | None = None) -> Face:
        """The largest face of an RGB uint8 picture (H, W, 3), as `facesnap.images.open_image` returns it.

        hard: is entered around the searches of a picture in which the first search, a tenth of the work, found
        nothing: a server can let these wait for others.

        Raises `InputError` where no face is found, or the largest is under 32 pixels."""
        found = self.find(image, hard=hard)
        if not len(found.boxes):
            raise InputError("No face was found in the picture: use one that shows a face from the front, well lit.")
        sides = found.boxes[:, 2:] - found.boxes[:, :2]
        largest = int(sides.prod(axis=1).argmax())
        box = found.boxes[largest]
        if found.by == "haar":
            box = self._settle(image, box)
        side = (box[2:] - box[:2]).max()
        if side < SMALLEST:
            raise InputError(
                f"The largest face is only {math.floor(side)} pixels large, at least {SMALLEST} are needed: "
                "use a larger or closer picture."
            )
        return self.describe(image, box, float(found.scores[largest]), count=len(found.boxes), found_by=found.by)

    def find(self, image: np.ndarray, *, hard: AbstractContextManager[Any] | None = None) -> "Found":
        """All faces of an RGB uint8 picture (H, W, 3), of any size, Haar's as rough squares; none is no error.
        `hard` as in `analyse`."""
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"expected RGB uint8 (H, W, 3), got {image.dtype} {image.shape}: use open_image")
        bgr = np.ascontiguousarray(image[..., ::-1])
        attempts = self._attempts(bgr)
        if len((first := next(attempts)).boxes):
            return first
        with hard or nullcontext():
            return next((found for found in attempts if len(found.boxes)), NOTHING)

    def describe(
        self, image: np.ndarray, box: np.ndarray, score: float, *, count: int = 1, found_by: str = "detector"
    ) -> Face:
        """The face in a box (4,) of an RGB uint8 picture (H, W, 3); the rest is noted as given."""
        bgr = np.ascontiguousarray(image[..., ::-1])
        face = InsightFace(bbox=box, det_score=score)
        landmarks = np.asarray(self._models["landmark_3d_68"].get(bgr, face), np.float32)
        # The landmark net looks at the face alone, larger than the detector saw it: its eyes, nose and mouth
        # are twice as exact as the detector's five points, and a recogniser lives on its alignment.
        face.kps = five_points(landmarks)
        embedding = self._models["recognition"].get(bgr, face)
        return Face(
            box=box.astype(np.float32),
            score=score,
            keypoints=face.kps,
            landmarks=landmarks,
            embedding=np.asarray(embedding, np.float32),
            crop=square_crop(image, box),
            size=(image.shape[0], image.shape[1]),
            count=count,
            found_by=found_by,
            image=image,
        )

    def _attempts(self, bgr: np.ndarray) -> Iterator[Found]:
        """From the likeliest to the last resort; each is computed only if those before it found nothing."""
        longer = max(bgr.shape[:2])
        first = [size for size in self.sizes[:2] if size == self.sizes[0] or longer > size / 2]
        yield self._detect(bgr, first, "detector")
        yield self._detect(bgr, [size for size in self.sizes if size not in first], "resized")
        border = longer // 2
        grey = cv2.copyMakeBorder(bgr, *[border] * 4, cv2.BORDER_CONSTANT, value=(127, 127, 127))
        padded = self._detect(grey, list(self.sizes), "padded")
        yield Found(padded.boxes - border, padded.scores, "padded")
        boxes = haar(bgr)
        yield Found(boxes, np.zeros(len(boxes), np.float32), "haar")

    def _detect(self, bgr: np.ndarray, sizes: list[int], by: str) -> Found:
        """All faces seen at several input sizes, without doubles and without those much weaker than the best.

        InsightFace shrinks with plain bilinear sampling; shrinking by area first spares small faces the
        aliasing."""
        detector = self._models["detection"]
        rows = [np.zeros((0, 5), np.float32)]
        for size in sizes:
            ratio = min(1.0, size / max(bgr.shape[:2]))
            shape = [max(1, round(side * ratio)) for side in bgr.shape[1::-1]]
            small = bgr if ratio == 1 else cv2.resize(bgr, shape, interpolation=cv2.INTER_AREA)
            found, _ = detector.detect(small, input_size=(size, size), det_thresh=self.threshold)
            scale = np.array(bgr.shape[1::-1]) / shape
            rows.append(found * np.r_[scale, scale, 1].astype(np.float32))
        row = np.concatenate(rows)
        kept = np.array(detector.nms(row), dtype=int)
        kept = kept[row[kept, 4] >= WEAKEST * row[:, 4].max(initial=0)]
        return Found(row[kept, :4], row[kept, 4], by)

    def _settle(self, image: np.ndarray, box: np.ndarray) -> np.ndarray:
        """From Haar's rough square to a box of our kind: what the landmark net's first answer spans."""
        bgr = np.ascontiguousarray(image[..., ::-1])
        landmarks = self._models["landmark_3d_68"].get(bgr, InsightFace(bbox=box, det_score=0.0))
        return box_around(landmarks)


class Recogniser:
    """A recogniser that stands alone (C, which scores): ONNX, 112² → 512, loaded by InsightFace."""

    def __init__(self, onnx_path: str | Path, providers: tuple[str, ...] = ("CPUExecutionProvider",)):
        self.path = Path(onnx_path)
        if not self.path.is_file():
            raise InputError(f"There is no recogniser at {str(onnx_path)!r}: give the path of its ONNX file.")
        self._model = get_model(str(self.path), providers=list(providers))
        if self._model is None or self._model.taskname != "recognition":
            raise InputError(f"{str(onnx_path)!r} is no recogniser: its input must be 112 × 112, its output 512.")

    def embed(self, image: np.ndarray, keypoints: np.ndarray) -> np.ndarray:
        """RGB uint8 (H, W, 3) and five points (5, 2) in its pixels → embedding (512,), not normalised."""
        return self.embed_crops([align(image, keypoints)])[0]

    def embed_crops(self, crops: Sequence[np.ndarray]) -> np.ndarray:
        """RGB uint8 crops (112, 112, 3), as `align` makes them → embeddings (N, 512), not normalised."""
        told = self._model.get_feat([np.ascontiguousarray(crop[..., ::-1]) for crop in crops])
        return np.asarray(told, np.float32).reshape(len(crops), -1)


def align(image: np.ndarray, keypoints: np.ndarray, size: int = 112) -> np.ndarray:
    """ArcFace's crop (size, size, 3): the picture turned and scaled so that the five points come to rest
    where recognisers expect them; black where the picture ends."""
    return norm_crop(image, landmark=np.asarray(keypoints, np.float32), image_size=size)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Cosine of two embeddings: 1 the same direction, about 0 for strangers."""
    return float(np.dot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b)))


def box_around(landmarks: np.ndarray) -> np.ndarray:
    """A detector's box (4,) for landmarks (N, 2+): it begins on the forehead, they begin with the brows."""
    low, high = landmarks[:, :2].min(axis=0), landmarks[:, :2].max(axis=0)
    return np.array([low[0], low[1] - 0.35 * (high[1] - low[1]), high[0], high[1]], np.float32)


def five_points(landmarks: np.ndarray) -> np.ndarray:
    """Eye centres, nose tip and mouth corners (…, 5, 2) of iBUG-68 (…, 68, 2+)."""
    flat = landmarks[..., :2]
    eyes = [flat[..., 36:42, :].mean(-2), flat[..., 42:48, :].mean(-2)]
    return np.stack([*eyes, flat[..., 30, :], flat[..., 48, :], flat[..., 54, :]], axis=-2)


def haar(bgr: np.ndarray) -> np.ndarray:
    """Boxes (N, 4) by OpenCV's Haar cascades (Viola and Jones, 2001): frontal faces, else profiles of both
    sides.

    Their squares reach from the brows to the mouth; they are moved down a little, to be about the face."""
    ratio = min(1.0, 640 / max(bgr.shape[:2]))
    grey = cv2.cvtColor(bgr, cv2.COLOR_BGR2GRAY)
    shape = [max(1, round(side * ratio)) for side in grey.shape[::-1]]
    grey = cv2.equalizeHist(cv2.resize(grey, shape, interpolation=cv2.INTER_AREA))
    smallest = max(20, round(SMALLEST * ratio))
    for name, mirrored in CASCADES:
        cascade = cv2.CascadeClassifier(str(Path(cv2.data.haarcascades) / f"haarcascade_{name}.xml"))
        seen = cascade.detectMultiScale(
            np.ascontiguousarray(grey[:, ::-1]) if mirrored else grey, 1.1, 5, minSize=(smallest, smallest)
        )
        if len(seen):
            squares = np.array(seen, np.float32)
            if mirrored:
                squares[:, 0] = grey.shape[1] - squares[:, 0] - squares[:, 2]
            side = squares[:, 2:]
            low = squares[:, :2] + side * [0.08, 0.05]
            return (np.concatenate([low, low + side * [0.84, 1.0]], axis=1) / ratio).astype(np.float32)
    return np.zeros((0, 4), np.float32)


def _pack_folder(folder: Path) -> Path:
    """The folder that has the ONNX files: antelopev2's archive nests one of the same name."""
    for candidate in (folder, folder / folder.name):
        if any(candidate.glob("*.onnx")):
            return candidate
    raise InputError(f"There is no face pack in {str(folder)!r}: give a folder with the pack's ONNX files.")


def _lacks(folder: str | Path, task: str) -> str:
    return f"The face pack {str(folder)!r} has no {TASKS[task]}: give a folder with all its ONNX files."

"""A picture → a `Face`: box, points, identity embedding and the crop for the CLIP-form encoder.

Everything goes through the InsightFace library and a pack of ONNX files given by its folder: the mini's own,
or antelopev2 where a user has it. `facesnap.finding` says where the face is and which way is up; where it sees
none, an `InputError` says what was seen instead.
"""

import hashlib
import math
import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnxruntime
from insightface.app.common import Face as InsightFace
from insightface.model_zoo import get_model
from insightface.utils.face_align import norm_crop

from facesnap.errors import InputError, did_you_mean
from facesnap.finding import SMALLEST, Finder, Found, Sight, is_drawn
from facesnap.geometry import moved, square_crop

MOST_TILT = 25.0  # degrees: a head tilted further is straightened before it is read
ADVICE = "use a photograph that shows a person's face from the front, well lit."
TASKS = {"detection": "face detector", "landmark_3d_68": "3D landmark net", "recognition": "recogniser"}


@dataclass(frozen=True)
class Face:
    """The face of a picture: the largest of those that are certainly faces. Points are pixels of `image`, x right, y
    down.

    box (4,) x0 y0 x1 y1; score of the detector, 0 for Haar; keypoints (5, 2) of the landmarks: eyes, nose
    tip, mouth corners; landmarks (68, 3): iBUG-68, z towards the camera in pixels, its zero meaningless;
    embedding (512,) not normalised; crop (224, 224, 3) RGB uint8; size (height, width) of the picture; count
    of faces seen; found_by "detector", "resized", "padded" or "haar"; image (H, W, 3), the analysed picture itself
    and no copy of it, for a head model that reads pictures (DECA). turned: degrees, 90, 180 or 270, by which the
    picture was turned clockwise to be upright; tilt: degrees by which the head was tilted counter-clockwise in it
    before the picture was turned about the face, 0 where it was read as it is, and straightening (2, 3) the turn
    itself, points before → after. After either, `image` and all points are those of the turned picture."""

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
    turned: int = 0
    tilt: float = 0.0
    straightening: np.ndarray | None = field(default=None, repr=False)


class FaceAnalyser:
    """InsightFace on a pack of one's own, with second chances and a check.

    `pack_dir` holds the ONNX files of an SCRFD-form detector, a 3D-68 landmark net and a recogniser, under
    any names. `sizes` are the detector's input sizes: a picture is first searched at the smallest and, where
    it is larger than that, at the second; the others are for when nothing was found, the largest of them for small
    faces in large pictures."""

    def __init__(
        self,
        pack_dir: str | Path,
        providers: tuple[str, ...] = ("CPUExecutionProvider",),
        *,
        sizes: tuple[int, ...] = (256, 640, 384, 160, 1280),
        threshold: float = 0.5,
    ):
        check_providers(providers)
        self.pack_dir = _pack_folder(Path(pack_dir))
        self.sizes, self.threshold = sizes, threshold
        try:
            # One by one: InsightFace's own `FaceAnalysis` takes brackets in a path for a pattern.
            loaded = [get_model(str(file), providers=list(providers)) for file in sorted(self.pack_dir.glob("*.onnx"))]
        except Exception as error:  # onnxruntime's and protobuf's errors share no ancestor but this
            raise InputError(
                f"The face pack {str(pack_dir)!r} cannot be loaded, a file in it is damaged: fetch it again."
            ) from error
        self._models: dict[str, Any] = {}
        for model in loaded:
            if model is not None and model.taskname in TASKS:
                self._models.setdefault(model.taskname, model)
        for task in TASKS:
            if task not in self._models:
                raise InputError(_lacks(pack_dir, task))
        self._models["detection"].prepare(0, det_thresh=threshold, input_size=(sizes[0], sizes[0]))
        self._finder = Finder(self._models["detection"], self._models["landmark_3d_68"], sizes, threshold)

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

    def analyse(
        self, image: np.ndarray, *, hard: AbstractContextManager[Any] | None = None, portrait: bool = False
    ) -> Face:
        """The largest face of an RGB uint8 picture (H, W, 3), as `facesnap.images.open_image` returns it.

        hard: is entered around the searches of a picture in which the first search, a tenth of the work, found
        no face for certain: a server can let these wait for others. portrait: a picture made here, so upright, no
        quarter turn of it is tried, and its face needs no embedding (zeros), as it is compared by another recogniser.

        Raises `InputError` where no face is found, a drawn one, or none of 32 pixels."""
        bgr = _bgr(image)
        sight = self._finder.look(bgr, hard, upright=portrait)
        if not sight.faces:
            raise InputError(_refusal(bgr, sight))
        face = sight.faces[0]
        turned, tilt, straightening, box = sight.turns, 0.0, None, face.box
        landmarks: np.ndarray | None = face.landmarks
        if turned:
            image = np.ascontiguousarray(np.rot90(image, turned))
        if face.by == "haar":
            box, landmarks = self._settled(image, box), None
        side = (box[2:] - box[:2]).max()
        if side < SMALLEST:
            largest = "The only face" if sight.count == 1 else f"The largest of the {sight.count} faces"
            raise InputError(
                f"{largest} is only {math.floor(side)} pixels large, at least {SMALLEST} are needed: "
                "use a larger or closer picture."
            )
        if is_drawn(image, box):
            raise InputError(f"What was seen {_where(image, box)} is a drawing: {ADVICE}")
        if abs(face.roll) > MOST_TILT:
            tilt, landmarks = face.roll, None
            image, box, straightening = self._straightened(image, face.landmarks, -tilt)
        if landmarks is None:
            landmarks = self._finder.landmarks(_bgr(image), box)
        read = self._described(image, box, face.score, landmarks, sight.count, face.by, embedded=not portrait)
        return replace(read, turned=-90 * turned % 360, tilt=tilt, straightening=straightening)

    def find(self, image: np.ndarray, *, hard: AbstractContextManager[Any] | None = None) -> Found:
        """All faces of an RGB uint8 picture (H, W, 3) as it stands, of any size and by the detector's word alone,
        Haar's as rough squares; none is no error. `hard` as in `analyse`."""
        return self._finder.find(_bgr(image), hard)

    def describe(
        self, image: np.ndarray, box: np.ndarray, score: float, *, count: int = 1, found_by: str = "detector"
    ) -> Face:
        """The face in a box (4,) of an RGB uint8 picture (H, W, 3); the rest is noted as given."""
        landmarks = self._finder.landmarks(_bgr(image), box)
        return self._described(image, box, score, landmarks, count, found_by)

    def _described(
        self,
        image: np.ndarray,
        box: np.ndarray,
        score: float,
        landmarks: np.ndarray,
        count: int,
        found_by: str,
        *,
        embedded: bool = True,
    ) -> Face:
        # The landmark net looks at the face alone, larger than the detector saw it: its eyes, nose and mouth
        # are twice as exact as the detector's five points, and a recogniser lives on its alignment.
        keypoints = five_points(landmarks)
        embedding = np.zeros(512, np.float32)
        if embedded:
            seen = InsightFace(bbox=box, kps=keypoints, det_score=score)
            embedding = self._models["recognition"].get(_bgr(image), seen)
        return Face(
            box=box.astype(np.float32),
            score=score,
            keypoints=keypoints,
            landmarks=landmarks,
            embedding=np.asarray(embedding, np.float32),
            crop=square_crop(image, box),
            size=(image.shape[0], image.shape[1]),
            count=count,
            found_by=found_by,
            image=image,
        )

    def _settled(self, image: np.ndarray, box: np.ndarray) -> np.ndarray:
        """From a rough square to a box of our kind: what the landmark net's first answer spans."""
        return box_around(self._finder.landmarks(np.ascontiguousarray(image[..., ::-1]), box))

    def _straightened(
        self, image: np.ndarray, landmarks: np.ndarray, angle: float
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The picture, turned by so many degrees counter-clockwise about the middle of the face; the face's box; and
        the turn (2, 3)."""
        middle = (landmarks[:, :2].min(axis=0) + landmarks[:, :2].max(axis=0)) / 2
        matrix = cv2.getRotationMatrix2D([float(v) for v in middle], angle, 1.0)
        upright = cv2.warpAffine(image, matrix, image.shape[1::-1], borderMode=cv2.BORDER_REPLICATE)
        return upright, self._settled(upright, box_around(moved(landmarks, matrix))), matrix


class Recogniser:
    """A recogniser that stands alone (C, which scores): ONNX, 112² → 512, loaded by InsightFace."""

    def __init__(self, onnx_path: str | Path, providers: tuple[str, ...] = ("CPUExecutionProvider",)):
        check_providers(providers)
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


def check_providers(providers: Any) -> None:
    """InputError unless they are a list of ONNX Runtime's own: InsightFace would print of others, and take the CPU."""
    known = onnxruntime.get_all_providers()
    for provider in [providers] if isinstance(providers, str) else providers:
        name = provider[0] if isinstance(provider, tuple) else provider  # with options of its own
        if name not in known:
            raise InputError(f"ONNX Runtime has no provider {name!r}; {did_you_mean(name, known)}")
    if isinstance(providers, str):
        raise InputError(f"The providers must be a list: give [{providers!r}].")


def align(image: np.ndarray, keypoints: np.ndarray, size: int = 112) -> np.ndarray:
    """ArcFace's crop (size, size, 3): the picture turned and scaled so that the five points come to rest
    where recognisers expect them; black where the picture ends."""
    return norm_crop(image, landmark=np.asarray(keypoints, np.float32), image_size=size)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Cosine of two embeddings: 1 the same direction, about 0 for strangers."""
    return float(np.dot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b)))


def mean_direction(embeddings: Sequence[np.ndarray]) -> np.ndarray:
    """The mean of some embeddings (d,), each of length 1. InputError where there are none."""
    if not embeddings:
        raise InputError("There is no reference to compare with; give one photo or face at least.")
    return np.mean([embedding / np.linalg.norm(embedding) for embedding in embeddings], axis=0)


def box_around(landmarks: np.ndarray) -> np.ndarray:
    """A detector's box (4,) for landmarks (N, 2+): it begins on the forehead, they begin with the brows."""
    low, high = landmarks[:, :2].min(axis=0), landmarks[:, :2].max(axis=0)
    return np.array([low[0], low[1] - 0.35 * (high[1] - low[1]), high[0], high[1]], np.float32)


def five_points(landmarks: np.ndarray) -> np.ndarray:
    """Eye centres, nose tip and mouth corners (…, 5, 2) of iBUG-68 (…, 68, 2+)."""
    flat = landmarks[..., :2]
    eyes = [flat[..., 36:42, :].mean(-2), flat[..., 42:48, :].mean(-2)]
    return np.stack([*eyes, flat[..., 30, :], flat[..., 48, :], flat[..., 54, :]], axis=-2)


def _pack_folder(folder: Path) -> Path:
    """The folder that has the ONNX files: antelopev2's archive nests one of the same name."""
    for candidate in (folder, folder / folder.name):
        if any(candidate.glob("*.onnx")):
            return candidate
    raise InputError(f"There is no face pack in {str(folder)!r}: give a folder with the pack's ONNX files.")


def _lacks(folder: str | Path, task: str) -> str:
    return f"The face pack {str(folder)!r} has no {TASKS[task]}: give a folder with all its ONNX files."


def _bgr(image: np.ndarray) -> np.ndarray:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"expected RGB uint8 (H, W, 3), got {image.dtype} {image.shape}: use open_image")
    return np.ascontiguousarray(image[..., ::-1])


def _refusal(bgr: np.ndarray, sight: Sight) -> str:
    """Why a picture without a face is none, in words: what was seen instead."""
    if not sight.others:
        return f"No face was found in the picture: {ADVICE}"
    likeliest = sight.others[0].box
    if is_drawn(bgr, likeliest):
        return f"What was seen {_where(bgr, likeliest)} is a drawing, no face: {ADVICE}"
    return (
        f"No face was found in the picture; what was seen {_where(bgr, likeliest)} does not hold as one (a pattern, "
        f"a drawing, an animal, a face that is covered or blurred): {ADVICE}"
    )


def _where(picture: np.ndarray, box: np.ndarray) -> str:
    """Where a box (4,) is in a picture, as people say it."""
    x, y = (box[:2] + box[2:]) / 2 / picture.shape[1::-1] * 3
    down = "at the top" if y < 1 else "at the bottom" if y > 2 else ""
    across = "left" if x < 1 else "right" if x > 2 else ""
    if not down:
        return f"on the {across}" if across else "in the middle"
    return f"{down} {across}".strip()

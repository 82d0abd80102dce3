"""FaceSim: recognisers that were neither condition nor loss, each behind the same two lines.

    C        the recogniser that only scores, of a FaceSnap checkpoint: for rendered people
    facenet  FaceNet's public VGGFace2 weights, where the user has them: what the paper scores by
    dlib     dlib's ResNet, which two packages of PyPI bring (`pip install ".[dlib]"`): offline, free of licence doubts

FaceSim is 100 times the cosine of two embeddings. How high strangers score differs by recogniser (dlib's are all
positive), so the report also gives FaceSim on the scale from strangers to the true picture (`metrics.retention`).
"""

import hashlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from facesnap.errors import InputError
from facesnap.evaluation.inception import FaceNet, read_weights
from facesnap.faces import Face, Recogniser

DLIB_WEIGHTS = "dlib_face_recognition_resnet_model_v1.dat"


class FaceJudge(Protocol):
    """name: how the report calls it; about: which weights, so that two reports can be compared."""

    name: str
    about: str

    def embed(self, image: np.ndarray, face: Face) -> np.ndarray:
        """RGB uint8 (H, W, 3) and the face found in it → an embedding (D,), of any length."""
        ...


class ScoringRecogniser:
    """C of a checkpoint folder."""

    name = "C"

    def __init__(self, model: Path):
        path = model / "scorer" / "recogniser.onnx"
        if not path.is_file():
            raise InputError(f"The checkpoint '{model.name}' has no scoring recogniser: judge by facenet or dlib.")
        self.recogniser = Recogniser(path)
        self.about = f"scorer of {model.name}, {_digest(path)}"

    def embed(self, image: np.ndarray, face: Face) -> np.ndarray:
        return self.recogniser.embed(image, face.keypoints)


class FaceNetJudge:
    """FaceNet sees the detector's box, made 160 x 160 as facenet-pytorch does: stretched, without a margin."""

    name = "facenet"

    def __init__(self, weights: Path, device: str = "cpu"):
        self.net = read_weights(FaceNet(), weights, "FaceNet's VGGFace2 weights").to(device)
        self.device = device
        self.about = f"{weights.name}, {_digest(weights)}"

    @torch.no_grad()
    def embed(self, image: np.ndarray, face: Face) -> np.ndarray:
        cut = Image.fromarray(image).crop(tuple(face.box.round().astype(int).tolist()))
        pixels = np.asarray(cut.resize((FaceNet.size, FaceNet.size), Image.Resampling.BILINEAR))
        tensor = torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1)[None]
        return self.net((tensor.to(self.device) - 127.5) / 128)[0].cpu().numpy()


class DlibJudge:
    """dlib's ResNet (King 2017) on our 68 points: (128,), pairs of one person lie nearer than 0.6.

    The points come from the same face analysis as all else, so that a face is found for every judge or for none.
    """

    name = "dlib"
    same = 0.6  # Euclidean distance below which dlib's author takes two faces for one person

    def __init__(self) -> None:
        try:
            import dlib
        except ImportError as error:
            raise InputError('Judging by dlib needs two packages: pip install ".[dlib]"') from error
        self.dlib: Any = dlib
        # found, not imported: the package's own module wants setuptools' pkg_resources, which is gone
        spec = importlib.util.find_spec("face_recognition_models")
        places = list(spec.submodule_search_locations or []) if spec else []
        path = Path(places[0]) / "models" / DLIB_WEIGHTS if places else Path(DLIB_WEIGHTS)
        if not path.is_file():
            raise InputError('Judging by dlib needs its weights: pip install ".[dlib]"')
        self.net = dlib.face_recognition_model_v1(str(path))
        self.about = f"{DLIB_WEIGHTS}, {_digest(path)}"

    def embed(self, image: np.ndarray, face: Face) -> np.ndarray:
        left, top, right, bottom = (round(float(value)) for value in face.box)
        points = [self.dlib.point(round(float(x)), round(float(y))) for x, y in face.landmarks[:, :2]]
        shape = self.dlib.full_object_detection(self.dlib.rectangle(left, top, right, bottom), points)
        return np.array(self.net.compute_face_descriptor(np.ascontiguousarray(image), shape))


def judges(names: list[str], model: Path, facenet: Path | None, device: str) -> list[FaceJudge]:
    """The recognisers of those names, each once.

    Raises InputError for a name that is not known, and where a judge's weights or packages are missing.
    """
    if "facenet" in names and facenet is None:
        raise InputError("Judging by facenet needs its weights: give --facenet FILE (20180402-114759-vggface2.pt).")
    makers: dict[str, Callable[[], FaceJudge]] = {
        "C": lambda: ScoringRecogniser(model),
        "facenet": lambda: FaceNetJudge(facenet or Path(), device),
        "dlib": DlibJudge,
    }
    unknown = [name for name in names if name not in makers]
    if unknown:
        raise InputError(f"There is no judge '{unknown[0]}'; choose among {', '.join(makers)}.")
    return [makers[name]() for name in dict.fromkeys(names)]


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]

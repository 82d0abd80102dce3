"""One photograph → its samples: faces, masks, landmarks, embeddings and captions; what `prepare` does to each photo."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from facesnap.errors import InputError
from facesnap.faces import FaceAnalyser
from facesnap.geometry import CROP_SCALE, crop_window, resized
from facesnap.heads import from_pretrained as read_head
from facesnap.images import open_image
from facesnap.landmarks import eye_distance, from_68, mirror
from facesnap.predictor import LandmarkPredictor
from facesnap.training.prepare.headmask import grab_hair, landmark_mask
from facesnap.training.prepare.options import Options, Rejected
from facesnap.training.prepare.sources import Photo, given_caption
from facesnap.training.prepare.worse import worse


@dataclass
class Sample:
    """One face, ready to be written; `about` becomes the .json."""

    about: dict[str, Any]
    picture: np.ndarray
    mask: np.ndarray
    crop: np.ndarray
    worse: np.ndarray
    arrays: dict[str, np.ndarray]

    def members(self, picture_format: str) -> dict[str, bytes]:
        arrays = io.BytesIO()
        np.savez(arrays, **dict[str, Any](self.arrays))
        return {
            picture_format: encoded(self.picture, picture_format),
            "mask.png": encoded(self.mask, "png"),
            "crop.jpg": encoded(self.crop, "jpg"),
            "worse.jpg": encoded(self.worse, "jpg"),
            "npz": arrays.getvalue(),
        }


class Preparer:
    """Photographs → samples, with the nets that takes. One to a process."""

    def __init__(self, options: Options, providers: Sequence[str]) -> None:
        self.options = options
        self.analyser = FaceAnalyser(options.pack, tuple(providers))
        self.predictor = options.head and LandmarkPredictor(read_head(options.head))

    def photo(self, photo: Photo, rejects: list[dict[str, Any]]) -> list[Sample]:
        """The samples of one photograph, the largest face first; what falls out is added to `rejects`."""

        def reject(why: Rejected, face: int | None) -> None:
            rejects.append({"source": photo.name, "face": face, "reason": why.reason, "figure": why.figure})

        try:
            image = open_image(photo.read("picture"), max_pixels=150_000_000, max_side=4096)
        except FileNotFoundError as error:  # it was there when the photographs were listed
            raise InputError(f"{photo.name} is gone, or this machine does not see the photographs") from error
        except (InputError, OSError) as error:
            reject(Rejected("unreadable picture", str(error)), None)
            return []
        try:
            caption = given_caption(photo) if self.options.captions == "given" else ""
        except (ValueError, OSError) as error:
            reject(Rejected("unreadable caption", str(error)), None)
            return []
        found = self.analyser.find(image)
        if not len(found.boxes):
            reject(Rejected("no face", None), None)
        areas = (found.boxes[:, 2:] - found.boxes[:, :2]).prod(axis=1)
        samples = []
        for face, i in enumerate(np.argsort(-areas, kind="stable")):
            try:
                sample = self.face(image, found.boxes[i], float(found.scores[i]), found.by)
            except Rejected as why:
                reject(why, face)
            else:
                sample.about |= {"source": photo.name, "face": face, "caption": caption}
                samples.append(sample)
        return samples

    def face(self, photo: np.ndarray, box: np.ndarray, score: float, found_by: str) -> Sample:
        """One face of a photo; raises Rejected."""
        options = self.options
        if score < options.min_score:  # what Haar's cascade found has none, and is always weak
            raise Rejected("weak detection", round(score, 3))
        side = float(max(box[2:] - box[:2]))
        if side < options.min_face:
            raise Rejected("small face", round(side, 1))
        picture, corner, scale = cut(photo, box, options.context, options.max_side)
        box = resized(box, scale, np.tile(corner, 2)).astype(np.float32)
        face = self.analyser.describe(picture, box, score, found_by=found_by)
        width = picture.shape[1]
        flipped = np.ascontiguousarray(picture[:, ::-1])
        twin = self.analyser.describe(
            flipped, np.array([width - 1 - box[2], box[1], width - 1 - box[0], box[3]]), score
        )
        landmarks = from_68(face.landmarks[:, :2])
        # A net that sees a face finds the same points in the mirror; on a badge or a tree it guesses anew.
        apart = np.linalg.norm(mirror(from_68(twin.landmarks[:, :2]), width) - landmarks, axis=1).mean()
        unsteadiness = float(apart / max(eye_distance(landmarks), 1e-6))
        if unsteadiness > options.max_unsteadiness:
            raise Rejected("unsteady landmarks", round(unsteadiness, 3))
        sharp = sharpness(face.crop)
        if sharp < options.min_sharpness:
            raise Rejected("blurred", round(sharp, 1))
        arrays = {
            "embeddings": np.stack([face.embedding, twin.embedding]),
            "landmarks68": face.landmarks,
            "landmarks": landmarks,
            "box": box,
            "keypoints": face.keypoints,
            "crop_box": np.hstack(crop_window(box)),
        }
        if self.predictor:
            head = self.predictor.reconstruct(face)[0]
            arrays["fitted"] = self.predictor.predict(head, head, face.size)
        about = {
            "size": list(face.size),
            "original_size": [round(side / scale) for side in face.size],
            "score": round(score, 4),
            "sharpness": round(sharp, 1),
            "unsteadiness": round(unsteadiness, 4),
            "found_by": found_by,
            "hash": f"{perceptual_hash(face.crop):016x}",
        }
        bad, about["worse"] = worse(picture, box, f"{options.seed} {about['hash']}")
        seen = self.analyser.describe(bad, box, score)
        arrays["worse_embedding"] = seen.embedding
        mask = landmark_mask(face.landmarks, face.size)
        if not options.parser:  # else that one will look at the picture later
            mask = grab_hair(picture, face.landmarks, mask)
        return Sample(
            about, picture, mask, face.crop, seen.crop, {k: np.asarray(v, np.float32) for k, v in arrays.items()}
        )


def cut(photo: np.ndarray, box: np.ndarray, context: float, max_side: int) -> tuple[np.ndarray, np.ndarray, float]:
    """The part of a photo around a face, `context` boxes wide where the photo reaches so far, its longer side at most
    `max_side`; with its corner (2,) in the photo and its scale: pixels of the part for a pixel of the photo."""
    height, width = photo.shape[:2]
    half = context * float(max(box[2:] - box[:2])) / 2
    centre = (box[:2] + box[2:]) / 2
    x0, y0 = np.maximum(np.floor(centre - half), 0).astype(int)
    x1, y1 = np.minimum(np.ceil(centre + half), [width, height]).astype(int)
    part = np.ascontiguousarray(photo[y0:y1, x0:x1])
    scale = min(1.0, max_side / max(part.shape[:2]))
    if scale < 1:
        size = [max(1, round(side * scale)) for side in part.shape[1::-1]]
        part = cv2.resize(part, size, interpolation=cv2.INTER_AREA)
    return part, np.array([x0, y0], np.float32), scale


def sharpness(crop: np.ndarray) -> float:
    """The variance of the Laplacian over the face in a (224, 224, 3) crop: some 100 to 1500 for sharp faces."""
    grey = cv2.cvtColor(crop, cv2.COLOR_RGB2GRAY)
    edge = round(grey.shape[0] * (1 - 1 / CROP_SCALE) / 2)
    return float(cv2.Laplacian(grey[edge:-edge, edge:-edge], cv2.CV_64F).var())


def perceptual_hash(crop: np.ndarray) -> int:
    """64 bits that like pictures share: the signs of the lowest frequencies of 32 × 32 grey pixels."""
    grey = cv2.resize(cv2.cvtColor(crop, cv2.COLOR_RGB2GRAY), (32, 32), interpolation=cv2.INTER_AREA)
    low = cv2.dct(grey.astype(np.float32))[:8, :8].ravel()
    return int.from_bytes(np.packbits(low > np.median(low[1:])).tobytes(), "big")


def encoded(image: np.ndarray, kind: str) -> bytes:
    options = [cv2.IMWRITE_JPEG_QUALITY, 95] if kind == "jpg" else [cv2.IMWRITE_PNG_COMPRESSION, 6]
    bgr = image[..., ::-1] if image.ndim == 3 else image
    return cv2.imencode(f".{kind}", np.ascontiguousarray(bgr), options)[1].tobytes()

"""Photographs → training shards: `python -m facesnap.training.prepare SOURCE OUT`.

SOURCE is a folder of photographs (searched below too), or WebDataset shards (a folder with `*.tar`, one such file, or
a brace pattern). OUT gets `shard-000000.tar`, … for `facesnap.training.photos`, each with a `.json` that lists its
samples, and `report.json`: how many came through, and why the others did not. One face is one sample:

    .jpg or .png   the picture: the photo around the face, longer side at most --max-side
    .mask.png      uint8 (H, W), 255 on the head with its hair, 0 elsewhere
    .crop.jpg      (224, 224, 3), `faces.square_crop` of the face, for the CLIP-form encoder
    .npz           float32: embeddings (2, 512), raw, of the picture and of its mirror image; landmarks68 (68, 3);
                   landmarks (72, 2); fitted (72, 2), the head model's (not with --head none); box (4,); keypoints
                   (5, 2); crop_box (3,): x0, y0 and side of the crop. Pixels of the picture, x right, y down
    .json          key, identity, source, face, caption, size and original_size (height, width), score, sharpness,
                   steadiness, found_by, hash

The samples of one identity lie next to each other, so that a reader of one shard finds another picture of the same
person for reference. Work is done in parts that are written whole or not at all: a run that was killed goes on where
it was when the same command is given again.
"""

import argparse
import csv
import hashlib
import io
import json
import multiprocessing
import os
import re
import shutil
import sys
import tarfile
import threading
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import braceexpand
import cv2
import numpy as np
import webdataset
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from tqdm import tqdm

from facesnap.faces import CROP_SCALE, Face, FaceAnalyser
from facesnap.heads import LinearHeadModel
from facesnap.images import InputError, open_image
from facesnap.landmarks import eye_distance, from_68, mirror
from facesnap.predictor import LandmarkPredictor
from facesnap.training.headmask import FaceParser, grab_hair, landmark_mask

PICTURES = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "avif", "gif")
CAPTION_KEYS = ("caption", "text", "prompt")  # in a .json beside a photo, the first that is there
PHOTOS_PER_PART = 32
MINI = Path("assets/mini")
BLIP2 = "Salesforce/blip2-opt-2.7b"

REASONS = (  # why a photo or a face is no sample, in the order in which they are looked at
    "unreadable picture",
    "unreadable caption",
    "no face",
    "weak detection",
    "small face",
    "unsteady landmarks",
    "blurred",
    "no mask",
    "near-duplicate",
)


@dataclass(frozen=True)
class Options:
    """Everything that decides what the shards will hold."""

    pack: str = str(MINI / "face_pack")
    head: str | None = str(MINI / "head")
    parser: str | None = None
    captions: str = "given"
    caption_model: str = BLIP2
    identities: str = "embedding"
    same_person: float = 0.5
    resolution: int = 1024
    max_side: int = 1536
    context: float = 4.0
    format: str = "jpg"
    min_score: float = 0.6
    min_face: int = 128
    max_unsteadiness: float = 0.1
    min_sharpness: float = 20.0
    duplicate_bits: int = 4
    duplicate_cosine: float = 0.9
    samples_per_shard: int = 500
    seed: int = 0


# ---- where photographs come from ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Photo:
    """One photograph: its name in SOURCE (`people/anna/1.jpg`, `shard.tar/key`), and where its bytes lie.

    `parts` {"picture" | "txt" | "json": (file, offset, length)}; a length of None is a whole file.
    """

    name: str
    parts: dict[str, tuple[str, int, int | None]]

    def read(self, kind: str) -> bytes:
        file, offset, length = self.parts[kind]
        with open(file, "rb") as stream:
            stream.seek(offset)
            return stream.read() if length is None else stream.read(length)


def list_photos(source: str, out: Path) -> tuple[list[Photo], dict[str, str]]:
    """All photographs of SOURCE in the order of their names, and {shard: what is wrong} for unreadable shards."""
    if re.match(r"^[a-z0-9]+:", source):
        raise SystemExit(f"prepare reads local files, not {source!r}: copy the shards here first")
    folder = Path(source)
    photos: list[Photo] = []
    if folder.is_dir():
        files = sorted(f for f in folder.rglob("*") if f.is_file() and out.resolve() not in f.resolve().parents)
        shards = [f for f in files if f.suffix == ".tar"]
        photos = [_photo(f, folder) for f in files if f.suffix.lower()[1:] in PICTURES]
    else:
        shards = [Path(f) for f in braceexpand.braceexpand(source)]
        missing = [str(f) for f in shards if not f.is_file()]
        if missing:
            raise SystemExit(f"there is no {missing[0]!r}: give a folder of photographs or WebDataset shards (*.tar)")
    broken = {}
    for shard in shards:
        name = str(shard.relative_to(folder)) if folder.is_dir() else shard.name
        try:
            photos += _members(shard, name)
        except (tarfile.TarError, OSError, EOFError) as error:
            broken[name] = str(error)
            print(f"{name} cannot be read ({error}): it is left out, and noted in the report", file=sys.stderr)
    if not photos:
        kinds = ", ".join(PICTURES)
        raise SystemExit(f"there are no photographs in {source!r}: give a folder with files ({kinds}) or with *.tar")
    return photos, broken


def _photo(file: Path, folder: Path) -> Photo:
    parts: dict[str, tuple[str, int, int | None]] = {"picture": (str(file), 0, None)}
    for kind in ("txt", "json"):
        if file.with_suffix(f".{kind}").is_file():
            parts[kind] = (str(file.with_suffix(f".{kind}")), 0, None)
    return Photo(file.relative_to(folder).as_posix(), parts)


def _members(shard: Path, name: str) -> list[Photo]:
    samples: dict[str, dict[str, tuple[str, int, int | None]]] = defaultdict(dict)
    with tarfile.open(shard, "r:") as tar:  # not compressed: members are read where they lie
        for member in tar:
            key, _, kind = member.name.rpartition("/")[2].partition(".")
            key = f"{member.name.rpartition('/')[0]}/{key}".lstrip("./")
            kind = "picture" if kind.lower() in PICTURES else kind.lower()
            if member.isfile() and kind in ("picture", "txt", "json"):
                samples[key][kind] = (str(shard), member.offset_data, member.size)
    return [Photo(f"{name}/{key}", parts) for key, parts in sorted(samples.items()) if "picture" in parts]


def given_caption(photo: Photo) -> str:
    """What stands beside the photo in a .txt, or in a .json under `caption`, `text` or `prompt`; else ""."""
    if "txt" in photo.parts:
        return photo.read("txt").decode("utf-8", "replace").strip()
    if "json" in photo.parts:
        try:
            told = json.loads(photo.read("json"))
        except ValueError as error:
            raise Rejected("unreadable caption", str(error)) from error
        for key in CAPTION_KEYS:
            if isinstance(told, dict) and isinstance(told.get(key), str):
                return told[key].strip()
    return ""


def read_table(path: str, column: str, photos: Sequence[Photo]) -> dict[str, str]:
    """{name of the photo: value} from a CSV with the columns `file` (as in SOURCE) and `column`."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError) as error:
        raise SystemExit(f"the table {path!r} cannot be read ({error}): give a CSV file") from error
    if not rows or not {"file", column} <= set(rows[0]):
        raise SystemExit(f"the table {path!r} needs the columns 'file' and {column!r}, with a row for each photo")
    table = {row["file"]: row[column] or "" for row in rows}
    if not any(photo.name in table for photo in photos):
        raise SystemExit(
            f"the table {path!r} names none of the photographs: write them as in SOURCE, like {photos[0].name!r}"
        )
    return table


def labelled_identities(photos: Sequence[Photo], how: str) -> dict[str, str] | None:
    """{name of the photo: who it shows} as --identities says; None where faces themselves must tell."""
    if how == "embedding":
        return None
    if how == "none":
        return {}
    if how == "folder":
        return {photo.name: photo.name.rpartition("/")[0] for photo in photos if "/" in photo.name}
    if how == "prefix":
        return {p.name: p.name.rpartition("_")[0] for p in photos if "_" in p.name.rpartition("/")[2]}
    return {name: who for name, who in read_table(how, "identity", photos).items() if who}


# ---- one photograph -------------------------------------------------------------------------------------------


class Captioner:
    """BLIP-2 through transformers; `model` is its folder or its id on the Hub."""

    def __init__(self, model: str, device: str = "cpu", batch_size: int = 8) -> None:
        import torch
        from transformers import AutoImageProcessor, AutoTokenizer, Blip2ForConditionalGeneration

        self.dtype = torch.float32 if device == "cpu" else torch.float16
        self.model = Blip2ForConditionalGeneration.from_pretrained(model, dtype=self.dtype).to(device).eval()
        self.processor = AutoImageProcessor.from_pretrained(model, backend="pil")  # the other needs torchvision
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.batch_size = batch_size

    def __call__(self, pictures: Sequence[np.ndarray]) -> list[str]:
        """A caption for each RGB uint8 picture (H, W, 3)."""
        import torch

        captions: list[str] = []
        for start in range(0, len(pictures), self.batch_size):
            batch = list(pictures[start : start + self.batch_size])
            pixels = self.processor(images=batch, return_tensors="pt")["pixel_values"]
            with torch.inference_mode():
                ids = self.model.generate(
                    pixel_values=pixels.to(self.model.device, self.dtype), max_new_tokens=40, do_sample=False
                )
            captions += [text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]
        return captions


class Rejected(Exception):
    """A photo or a face that is no sample: one of REASONS, and the figure that decided."""

    def __init__(self, reason: str, figure: object) -> None:
        super().__init__(reason)
        self.reason, self.figure = reason, figure


@dataclass
class Sample:
    """One face, ready to be written; `about` becomes the .json."""

    about: dict[str, Any]
    picture: np.ndarray
    mask: np.ndarray
    crop: np.ndarray
    arrays: dict[str, np.ndarray]

    def members(self, picture_format: str) -> dict[str, bytes]:
        arrays = io.BytesIO()
        np.savez(arrays, **self.arrays)
        return {
            picture_format: _encoded(self.picture, picture_format),
            "mask.png": _encoded(self.mask, "png"),
            "crop.jpg": _encoded(self.crop, "jpg"),
            "npz": arrays.getvalue(),
        }


class Preparer:
    """Photographs → samples, with the nets that takes. One to a process."""

    def __init__(self, options: Options, device: str, providers: Sequence[str]) -> None:
        self.options = options
        self.analyser = FaceAnalyser(options.pack, tuple(providers))
        self.predictor = options.head and LandmarkPredictor(LinearHeadModel.from_pretrained(options.head))
        self.parser = options.parser and FaceParser(options.parser, device)
        self.captioner = Captioner(options.caption_model, device) if options.captions == "blip2" else None

    def photo(self, photo: Photo, rejects: list[dict[str, Any]]) -> list[Sample]:
        """The samples of one photograph, the largest face first; what falls out is added to `rejects`."""

        def reject(why: Rejected, face: int | None) -> None:
            rejects.append({"source": photo.name, "face": face, "reason": why.reason, "figure": why.figure})

        try:
            image = open_image(photo.read("picture"), max_pixels=150_000_000, max_side=4096)
            caption = given_caption(photo) if self.options.captions == "given" else ""
        except (InputError, OSError) as error:
            reject(Rejected("unreadable picture", str(error)), None)
            return []
        except Rejected as why:
            reject(why, None)
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
        box = ((box - np.tile(corner, 2) + 0.5) * scale - 0.5).astype(np.float32)
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
            "crop_box": crop_box(box),
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
        mask = self.mask(picture, face)
        return Sample(about, picture, mask, face.crop, {k: np.asarray(v, np.float32) for k, v in arrays.items()})

    def mask(self, picture: np.ndarray, face: Face) -> np.ndarray:
        hull = landmark_mask(face.landmarks, face.size)
        if not self.parser:
            return grab_hair(picture, face.landmarks, hull)
        mask = self.parser.mask(picture, face.box, face.landmarks)
        covered = float((mask & hull).sum() / max(hull.sum(), 1))
        if covered < 0.5:  # it took the head for something else
            raise Rejected("no mask", round(covered, 2))
        return mask


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


def crop_box(box: np.ndarray) -> np.ndarray:
    """x0, y0 and side of what `faces.square_crop` cuts out."""
    side = CROP_SCALE * float(max(box[2] - box[0], box[3] - box[1]))
    corner = ((box[:2] + box[2:]) / 2 - side / 2).round()
    return np.array([*corner, max(2, round(side))], np.float32)


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


def _encoded(image: np.ndarray, kind: str) -> bytes:
    options = [cv2.IMWRITE_JPEG_QUALITY, 95] if kind == "jpg" else [cv2.IMWRITE_PNG_COMPRESSION, 6]
    bgr = image[..., ::-1] if image.ndim == 3 else image
    return cv2.imencode(f".{kind}", np.ascontiguousarray(bgr), options)[1].tobytes()


# ---- parts: the unit that is done, or done again ---------------------------------------------------------------


def part_files(out: Path, number: int) -> tuple[Path, Path, Path]:
    """(samples, embeddings, list): the list is written last, so where it is, the part is whole."""
    return tuple(out / "work" / f"part-{number:06d}.{kind}" for kind in ("tar", "npy", "json"))  # type: ignore


def make_part(preparer: Preparer, out: Path, number: int, photos: Sequence[Photo], captions: dict[str, str]) -> int:
    """Prepare some photographs and write what they gave; returns how many faces that is."""
    samples: list[Sample] = []
    rejects: list[dict[str, Any]] = []
    for photo in photos:
        try:
            samples += preparer.photo(photo, rejects)
        except Exception as error:
            raise RuntimeError(f"{photo.name}: {type(error).__name__}: {error}") from error
    for sample in samples:
        sample.about["caption"] = captions.get(sample.about["source"], sample.about["caption"])
    if preparer.captioner:
        for sample, caption in zip(samples, preparer.captioner([s.picture for s in samples]), strict=True):
            sample.about["caption"] = caption

    tar_path, embeddings_path, list_path = part_files(out, number)
    members = [sample.members(preparer.options.format) for sample in samples]
    with _replacing(tar_path) as draft:
        with draft.open("wb") as stream, webdataset.TarWriter(stream, encoder=False, mtime=0) as tar:
            for i, files in enumerate(members):
                tar.write({"__key__": f"{i:04d}"} | files)
        places: dict[str, dict[str, tuple[int, int]]] = defaultdict(dict)
        with tarfile.open(draft, "r:") as written:
            for member in written:
                key, _, kind = member.name.partition(".")
                places[key][kind] = (member.offset_data, member.size)
    embeddings = [unit(unit(s.arrays["embeddings"]).sum(axis=0)) for s in samples]
    with _replacing(embeddings_path) as draft, draft.open("wb") as stream:
        np.save(stream, np.reshape(embeddings, (len(samples), -1)).astype(np.float16))
    listed = [
        sample.about | {"box_side": float(max(sample.arrays["box"][2:] - sample.arrays["box"][:2])), "places": place}
        for sample, place in zip(samples, places.values(), strict=True)
    ]
    with _replacing(list_path) as draft:
        draft.write_text(json.dumps({"photos": len(photos), "samples": listed, "rejects": rejects}), encoding="utf-8")
    return len(samples)


class _replacing:
    """A file to write that takes its name only when it is whole."""

    def __init__(self, path: Path) -> None:
        self.path, self.draft = path, path.with_name(f"{path.name}.{os.getpid()}.tmp")

    def __enter__(self) -> Path:
        return self.draft

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is None:
            os.replace(self.draft, self.path)
        else:
            self.draft.unlink(missing_ok=True)


_preparer: Preparer  # of this process


def _start_worker(options: Options, device: str, providers: Sequence[str]) -> None:
    global _preparer
    number = multiprocessing.current_process()._identity[-1]
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:  # if the parent is killed, nobody else would end us
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[number % len(cores)]})  # so that ONNX Runtime and torch start one thread each
    cv2.setNumThreads(1)
    if device == "cuda":
        import torch

        device = f"cuda:{number % torch.cuda.device_count()}"
    _preparer = Preparer(options, device, providers)


def _work(*job: Any) -> int:
    return make_part(_preparer, *job)


def make_parts(args: argparse.Namespace, options: Options, out: Path, photos: Sequence[Photo]) -> None:
    """All parts that are not there yet, in `args.workers` processes."""
    captions: dict[str, str] = {}
    if options.captions not in ("none", "given", "blip2"):
        captions = read_table(options.captions, "caption", photos)
    starts = range(0, len(photos), PHOTOS_PER_PART)
    todo = [i for i in range(len(starts)) if not part_files(out, i)[2].is_file()]
    done = len(photos) - sum(len(photos[starts[i] : starts[i] + PHOTOS_PER_PART]) for i in todo)
    jobs = []
    for i in todo:
        some = photos[starts[i] : starts[i] + PHOTOS_PER_PART]
        jobs.append((out, i, some, {p.name: captions[p.name] for p in some if p.name in captions}))
    with tqdm(total=len(photos), initial=done, unit="photo", smoothing=0.05) as bar:
        if args.workers == 1 and jobs:
            preparer = Preparer(options, args.device, args.providers)
            for job in jobs:
                make_part(preparer, *job)
                bar.update(len(job[2]))
        elif jobs:
            pool = ProcessPoolExecutor(
                min(args.workers, len(jobs)),
                multiprocessing.get_context("spawn"),
                _start_worker,
                (options, args.device, args.providers),
            )
            try:
                waiting: dict[Future[int], int] = {pool.submit(_work, *job): len(job[2]) for job in jobs}
                while waiting:
                    for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                        future.result()
                        bar.update(waiting.pop(future))
            finally:
                pool.shutdown(cancel_futures=True)


# ---- all samples together --------------------------------------------------------------------------------------


def unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors (..., D) at length 1."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def near_duplicates(hashes: np.ndarray, embeddings: np.ndarray, bits: int, cosine: float) -> np.ndarray:
    """(N,) numbers of groups of like pictures: hashes (N,) uint64 that differ in at most `bits` bits, and embeddings
    (N, D) of at least this cosine.

    Hashes that differ in so few bits agree in one of `bits` + 1 stretches: only those are compared.
    """
    pairs = []
    edges = np.linspace(0, 64, bits + 2).astype(int)
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        stretch = (hashes >> np.uint64(low)) & np.uint64((1 << int(high - low)) - 1)
        order = np.argsort(stretch, kind="stable")
        _, starts = np.unique(stretch[order], return_index=True)
        for rows in np.split(order, starts[1:]):
            for k in range(1, len(rows)):
                near = rows[:k][np.bitwise_count(hashes[rows[:k]] ^ hashes[rows[k]]) <= bits]
                like = near[(embeddings[near].astype(np.float32) @ embeddings[rows[k]].astype(np.float32)) >= cosine]
                pairs.append(np.stack([np.full(len(like), rows[k]), like]))
    return _groups(pairs, len(hashes))


def same_people(embeddings: np.ndarray, cosine: float, device: str = "cpu", block: int = 4096) -> np.ndarray:
    """(N,) numbers of groups of unit embeddings (N, D): chains of pairs of at least this cosine, less the members
    that are farther than that from their group's mean."""
    import torch

    whole = torch.from_numpy(embeddings.astype(np.float32)).to(device)
    pairs = []
    for start in range(0, len(whole), block):
        near = (whole[start : start + block] @ whole[: start + block].T >= cosine).nonzero().cpu().numpy().T
        pairs.append(near + np.array([[start], [0]]))
    groups = _groups(pairs, len(whole))
    means = np.zeros((groups.max(initial=-1) + 1, embeddings.shape[1]), np.float32)
    np.add.at(means, groups, embeddings.astype(np.float32))
    alone = (unit(means)[groups] * embeddings).sum(axis=1) < cosine
    return np.unique(np.where(alone, len(means) + np.arange(len(groups)), groups), return_inverse=True)[1]


def _groups(pairs: Iterable[np.ndarray], count: int) -> np.ndarray:
    a, b = np.concatenate([np.zeros((2, 0), int), *pairs], axis=1)
    return connected_components(coo_matrix((np.ones(len(a), bool), (a, b)), shape=(count, count)), directed=False)[1]


def identities_of(samples: Sequence[dict[str, Any]], labels: dict[str, str] | None, groups: np.ndarray) -> np.ndarray:
    """(N,) identities, numbered from 0 in the order of their first sample.

    A label belongs to the largest face of its photo; the others, and photos without a label, stand for themselves.
    With `labels` None the `groups` (N,) are taken, but nobody is twice in one photo: the second stands for itself.
    """
    numbers: dict[Any, int] = {}
    seen: set[tuple[Any, str]] = set()
    out = []
    for i, sample in enumerate(samples):
        source, face = sample["source"], sample["face"]
        name: Any = groups[i] if labels is None else labels.get(source) if face == 0 else None
        if name is None or (name, source) in seen:
            name = (source, face)
        seen.add((name, source))
        out.append(numbers.setdefault(name, len(numbers)))
    return np.array(out, int)


def plan_shards(identities: np.ndarray, samples_per_shard: int, seed: int) -> list[list[int]]:
    """Rows of each shard: identities in random order, each whole in one shard where it fits."""
    members: dict[int, list[int]] = defaultdict(list)
    for row, identity in enumerate(identities):
        members[int(identity)].append(row)
    shards: list[list[int]] = [[]]
    for i in np.random.default_rng(seed).permutation(len(members)):
        rows = members[int(i)]
        for start in range(0, len(rows), samples_per_shard):
            some = rows[start : start + samples_per_shard]
            if shards[-1] and len(shards[-1]) + len(some) > samples_per_shard:
                shards.append([])
            shards[-1] += some
    return [shard for shard in shards if shard]


def write_shards(out: Path, options: Options, samples: Sequence[dict[str, Any]], identities: np.ndarray) -> int:
    """All shards that are not there yet; returns their number. Each is a function of the parts and the options."""
    shards = plan_shards(identities, options.samples_per_shard, options.seed)
    seen: Counter[int] = Counter()  # of each identity, over the shards: the number of a picture is in its key
    for number, rows in enumerate(tqdm(shards, unit="shard")):
        keys = []
        for row in rows:
            keys.append(f"{identities[row]:08d}_{seen[identities[row]]:04d}")
            seen[identities[row]] += 1
        path = out / f"shard-{number:06d}.tar"
        if path.is_file():
            continue
        listed = [
            {
                "key": key,
                "identity": int(identities[row]),
                "source": samples[row]["source"],
                "size": samples[row]["size"],
            }
            for key, row in zip(keys, rows, strict=True)
        ]
        with _replacing(path) as draft:
            with draft.open("wb") as stream, webdataset.TarWriter(stream, encoder=False, mtime=0) as tar:
                for about, row in zip(listed, rows, strict=True):
                    tar.write({"__key__": about["key"]} | _shard_members(out, samples[row], about))
            with _replacing(path.with_suffix(".json")) as list_draft:  # before the tar has its name, so never without
                list_draft.write_text(json.dumps({"samples": listed}), encoding="utf-8")
    return len(shards)


def _shard_members(out: Path, sample: dict[str, Any], about: dict[str, Any]) -> dict[str, bytes]:
    members = {}
    with part_files(out, sample["part"])[0].open("rb") as stream:
        for kind, (offset, length) in sample["places"].items():
            stream.seek(offset)
            members[kind] = stream.read(length)
    told = about | {k: v for k, v in sample.items() if k not in ("part", "places", "box_side")}
    return members | {"json": json.dumps(told, ensure_ascii=False).encode()}


def finish(
    args: argparse.Namespace, options: Options, out: Path, photos: Sequence[Photo], broken: dict[str, str]
) -> dict[str, Any]:
    """The parts → shards and the report, which is returned."""
    samples: list[dict[str, Any]] = []
    rejects: list[dict[str, Any]] = []
    vectors = []
    for number in range(-(-len(photos) // PHOTOS_PER_PART)):
        _, embeddings_path, list_path = part_files(out, number)
        part = json.loads(list_path.read_text(encoding="utf-8"))
        samples += [{"part": number} | sample for sample in part["samples"]]
        rejects += part["rejects"]
        if part["samples"]:
            vectors.append(np.load(embeddings_path))
    faces = len(samples) + sum(reject["face"] is not None for reject in rejects)
    identities = np.zeros(0, int)
    shards = 0
    if samples:
        embeddings = np.concatenate(vectors)
        hashes = np.array([int(sample["hash"], 16) for sample in samples], np.uint64)
        alike = near_duplicates(hashes, embeddings, options.duplicate_bits, options.duplicate_cosine)
        best: dict[int, int] = {}  # of each group, the row with the largest face, the first of equals
        for row in sorted(range(len(samples)), key=lambda row: -samples[row]["box_side"]):
            best.setdefault(int(alike[row]), row)
        for row, sample in enumerate(samples):
            if best[int(alike[row])] != row:
                twin = samples[best[int(alike[row])]]["source"]
                rejects.append(
                    {"source": sample["source"], "face": sample["face"], "reason": "near-duplicate", "figure": twin}
                )
        rows = sorted(best.values())
        labels = labelled_identities(photos, options.identities)
        groups = same_people(embeddings[rows], options.same_person, args.device) if labels is None else np.zeros(0)
        samples = [samples[row] for row in rows]
        identities = identities_of(samples, labels, groups)
        shards = write_shards(out, options, samples, identities)
    pictures = np.bincount(identities)
    counted = Counter(reject["reason"] for reject in rejects)
    report = {
        "photos": len(photos),
        "faces": faces,
        "samples": len(samples),
        "identities": len(pictures),
        "identities_with_several_pictures": int((pictures > 1).sum()),
        "rejected": {reason: counted[reason] for reason in REASONS},
        "unreadable_shards": broken,
        "shards": shards,
        "bytes": sum((out / f"shard-{i:06d}.tar").stat().st_size for i in range(shards)),
        "options": asdict(options),
    }
    with _replacing(out / "rejected.jsonl") as draft:
        draft.write_text("".join(json.dumps(reject) + "\n" for reject in rejects), encoding="utf-8")
    with _replacing(out / "report.json") as draft:
        draft.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


# ---- the command -----------------------------------------------------------------------------------------------


def parse(words: Sequence[str] | None = None) -> tuple[argparse.Namespace, Options]:
    default = Options()
    p = argparse.ArgumentParser(prog="python -m facesnap.training.prepare", description=__doc__.split("\n")[0])
    p.add_argument("source", help="a folder of photographs, or WebDataset shards (a folder, a *.tar, a brace pattern)")
    p.add_argument("out", type=Path, help="folder for the shards")
    p.add_argument("--pack", default=default.pack, help="face pack: detector, 3D landmarks, recogniser (%(default)s)")
    p.add_argument("--head", default=default.head, help="head model fitted to the landmarks, or none (%(default)s)")
    p.add_argument("--parser", help="face-parsing model for the masks, folder or Hub id, for example "
                   "jonathandinu/face-parsing (default: landmarks and colours)")  # fmt: skip
    p.add_argument("--captions", default=default.captions, metavar="given|blip2|none|CSV",
                   help="those beside the photos, BLIP-2's, or a table file,caption (%(default)s)")  # fmt: skip
    p.add_argument("--caption-model", default=default.caption_model, help="folder or Hub id (%(default)s)")
    p.add_argument("--identities", default=default.identities, metavar="embedding|folder|prefix|none|CSV",
                   help="who is who: by the faces, the subfolder, the name up to the last _, nobody twice, or a table "
                   "file,identity (%(default)s)")  # fmt: skip
    p.add_argument("--same-person", type=float, default=default.same_person,
                   help="cosine from which two faces are one person, by the faces (%(default)s)")  # fmt: skip
    p.add_argument("--resolution", type=int, default=default.resolution,
                   help="side of the pictures to be trained on; sets the next two (%(default)s)")  # fmt: skip
    p.add_argument("--max-side", type=int, help="longer side of what is stored (1.5 times the resolution)")
    p.add_argument("--min-face", type=int, help="longer side of a face's box in the photo (an eighth of it)")
    p.add_argument("--context", type=float, default=default.context,
                   help="how much of the photo is stored, in boxes of the face (%(default)s)")  # fmt: skip
    p.add_argument("--format", choices=("jpg", "png"), default=default.format)
    p.add_argument("--min-score", type=float, default=default.min_score, help="of the detector (%(default)s)")
    p.add_argument("--max-unsteadiness", type=float, default=default.max_unsteadiness,
                   help="of the landmarks under mirroring, in eye distances (%(default)s)")  # fmt: skip
    p.add_argument("--min-sharpness", type=float, default=default.min_sharpness,
                   help="variance of the Laplacian over the face at 124 pixels (%(default)s)")  # fmt: skip
    p.add_argument("--duplicate-bits", type=int, default=default.duplicate_bits,
                   help="of 64: perceptual hashes this near are one picture, (%(default)s) …")  # fmt: skip
    p.add_argument("--duplicate-cosine", type=float, default=default.duplicate_cosine,
                   help="… if the embeddings are this near too (%(default)s)")  # fmt: skip
    p.add_argument("--samples-per-shard", type=int, default=default.samples_per_shard, help="(%(default)s)")
    p.add_argument("--seed", type=int, default=default.seed, help="of the order of identities")
    p.add_argument("--workers", type=int, default=1, help="processes")
    p.add_argument("--device", default="cpu", help="of --parser, BLIP-2 and grouping: cpu or cuda")
    p.add_argument("--providers", nargs="+", default=["CPUExecutionProvider"], help="of ONNX Runtime, for the pack")
    p.add_argument("--keep-work", action="store_true", help="do not delete OUT/work at the end")
    args = p.parse_args(words)
    if args.resolution < 64 or args.workers < 1 or args.samples_per_shard < 1 or args.context < 1:
        p.error("--resolution must be at least 64; --workers, --samples-per-shard and --context at least 1")
    if not 0 <= args.duplicate_bits <= 16:
        p.error("--duplicate-bits must be between 0 and 16")
    args.max_side = args.max_side or args.resolution * 3 // 2
    args.min_face = args.min_face or args.resolution // 8
    args.head = None if args.head == "none" else args.head
    return args, Options(**{name: getattr(args, name) for name in Options.__dataclass_fields__})


def begin(out: Path, source: str, options: Options, photos: Sequence[Photo]) -> None:
    """Note what is being done, or check that the same was begun before."""
    names = hashlib.sha256("\n".join(photo.name for photo in photos).encode()).hexdigest()
    now = {"source": Path(source).name, "photos": len(photos), "names": names, "options": asdict(options)}
    path = out / "prepare.json"
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        flat = [entry | entry["options"] for entry in (before, now)]
        changed = sorted(key for key in flat[0].keys() | flat[1].keys() if flat[0].get(key) != flat[1].get(key))
        if changed := [key for key in changed if key != "options"]:
            raise SystemExit(
                f"{out} was begun with other {', '.join(changed)}: give the same command to go on, or another folder"
            )
        return
    (out / "work").mkdir(parents=True, exist_ok=True)
    with _replacing(path) as draft:
        draft.write_text(json.dumps(now, indent=2) + "\n", encoding="utf-8")


def main(words: Sequence[str] | None = None) -> None:
    args, options = parse(words)
    out: Path = args.out
    photos, broken = list_photos(args.source, out)
    for how, column in ((options.identities, "identity"), (options.captions, "caption")):
        if how not in ("embedding", "folder", "prefix", "none", "given", "blip2"):
            read_table(how, column, photos)  # before the work, not after it
    begin(out, args.source, options, photos)
    if not (out / "report.json").is_file():
        try:
            make_parts(args, options, out, photos)
        except InputError as error:  # of the pack
            raise SystemExit(str(error)) from error
        finish(args, options, out, photos, broken)
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    if not args.keep_work:
        shutil.rmtree(out / "work", ignore_errors=True)
    why = ", ".join(f"{count} {reason}" for reason, count in report["rejected"].items() if count) or "none"
    if not report["samples"]:
        raise SystemExit(f"none of the {report['photos']} photographs has a face that can be used ({why})")
    several = report["identities_with_several_pictures"]
    print(
        f"{report['samples']} samples of {report['identities']} people, {several} of them with several, from "
        f"{report['photos']} photographs, in {report['shards']} shards; rejected: {why}"
    )


if __name__ == "__main__":
    main()

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
                   unsteadiness, found_by, hash

The samples of one identity lie next to each other, so that a reader of one shard finds another picture of the same
person for reference. Work is done in parts that are written whole or not at all: a run that was killed goes on where
it was when the same command is given again.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import shutil
import tarfile
import threading
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import webdataset
from tqdm import tqdm

from facesnap.errors import InputError
from facesnap.faces import FaceAnalyser
from facesnap.training.grouping import identities_of, near_duplicates, same_people, unit
from facesnap.training.samples import REASONS, Options, Preparer, Sample
from facesnap.training.sources import Photo, labelled_identities, list_photos, read_table

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
    with _replacing(embeddings_path) as draft, draft.open("wb") as stream:
        np.save(stream, np.array([unit(unit(s.arrays["embeddings"]).sum(axis=0)) for s in samples], np.float16))
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


def load(options: Options, device: str, providers: Sequence[str]) -> Preparer:
    """The nets; raises InputError where one cannot be loaded."""
    try:
        return Preparer(options, device, providers)
    except (ValueError, OSError) as error:  # of transformers, and our own
        raise InputError(str(error)) from error


_settings: tuple[Options, str, Sequence[str]]  # of this process
_preparer: Preparer | None = None


def _start_worker(options: Options, device: str, providers: Sequence[str]) -> None:
    global _settings
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
    _settings = options, device, providers


def _work(*job: Any) -> int:
    global _preparer
    if _preparer is None:  # here and not above, where an error would only break the pool
        _preparer = load(*_settings)
    return make_part(_preparer, *job)


def make_parts(args: argparse.Namespace, options: Options, out: Path, photos: Sequence[Photo]) -> None:
    """All parts that are not there yet, in `args.workers` processes."""
    captions: dict[str, str] = {}
    if options.captions not in ("none", "given", "blip2"):
        captions = read_table(options.captions, "caption", photos)
    parts = [photos[i : i + options.photos_per_part] for i in range(0, len(photos), options.photos_per_part)]
    jobs = [
        (out, number, some, {photo.name: captions[photo.name] for photo in some if photo.name in captions})
        for number, some in enumerate(parts)
        if number % args.share[1] == args.share[0] and not part_files(out, number)[2].is_file()
    ]
    total = sum(len(some) for some in parts[args.share[0] :: args.share[1]])
    with tqdm(total=total, initial=total - sum(len(job[2]) for job in jobs), unit="photo", smoothing=0.05) as bar:
        if args.workers == 1 and jobs:
            preparer = load(options, args.device, args.providers)
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


def write_shards(
    out: Path, options: Options, samples: Sequence[dict[str, Any]], identities: np.ndarray, recogniser: str
) -> int:
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
                list_draft.write_text(json.dumps({"recogniser": recogniser, "samples": listed}), encoding="utf-8")
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
    for number in range(-(-len(photos) // options.photos_per_part)):
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
        recogniser = FaceAnalyser(options.pack).recogniser_digest  # the trainer asks whose embeddings it gets
        shards = write_shards(out, options, samples, identities, recogniser)
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


def _share(word: str) -> tuple[int, int]:
    i, _, n = word.partition("/")
    if not (i.isdigit() and n.isdigit() and 1 <= int(i) <= int(n)):
        raise argparse.ArgumentTypeError(f"{word!r} is no share: write 1/4 for the first of four")
    return int(i) - 1, int(n)


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
    p.add_argument("--photos-per-part", type=int, default=default.photos_per_part,
                   help="done, or done again after a break, as a whole (%(default)s)")  # fmt: skip
    p.add_argument("--seed", type=int, default=default.seed, help="of the order of identities")
    p.add_argument("--workers", type=int, default=1, help="processes")
    p.add_argument("--share", type=_share, default=(0, 1), metavar="I/N",
                   help="do only the I-th of N shares of the work: for several machines that see the same OUT; then "
                   "run once without it")  # fmt: skip
    p.add_argument("--device", default="cpu", help="of --parser, BLIP-2 and grouping: cpu or cuda")
    p.add_argument("--providers", nargs="+", default=["CPUExecutionProvider"], help="of ONNX Runtime, for the pack")
    p.add_argument("--keep-work", action="store_true", help="do not delete OUT/work at the end")
    args = p.parse_args(words)
    if args.resolution < 64 or min(args.workers, args.samples_per_shard, args.photos_per_part, args.context) < 1:
        p.error("--resolution must be at least 64, --workers, --context, --samples- and --photos-per-… at least 1")
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
            if args.share != (0, 1):
                return
            finish(args, options, out, photos, broken)
        except (InputError, OSError) as error:  # of the models' folders, of the disk
            raise SystemExit(str(error)) from error
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    for draft in out.glob("shard-*.tmp"):  # of a run that was killed
        draft.unlink()
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

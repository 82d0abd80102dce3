"""The command: what is asked, and the tasks that do it, one kind after the other."""

import argparse
import hashlib
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from facesnap.errors import InputError
from facesnap.training.prepare import __doc__ as about
from facesnap.training.prepare.engines import ENGINES, Engine, run, start
from facesnap.training.prepare.looks import look
from facesnap.training.prepare.options import Options
from facesnap.training.prepare.parts import PartJob, find, replacing
from facesnap.training.prepare.shards import ShardJob, plan, report, write_shard
from facesnap.training.prepare.sources import Photo, list_photos, read_table


def parse(words: Sequence[str] | None = None) -> tuple[argparse.Namespace, Options]:
    default = Options()
    p = argparse.ArgumentParser(prog="python -m facesnap.training.prepare", description=(about or "").split("\n")[0])
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
    p.add_argument("--engine", choices=ENGINES, default="local",
                   help="ray: on the cluster at RAY_ADDRESS, else on one of this machine (%(default)s)")  # fmt: skip
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of --parser and BLIP-2 (%(default)s)")
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
    args.out = args.out.absolute()  # a task may run in another folder
    return args, Options(**{name: getattr(args, name) for name in Options.__dataclass_fields__})


def begin(out: Path, source: str, options: Options, photos: Sequence[Photo]) -> str:
    """Note what is being done, or check that the same was begun before; returns a name for it."""
    names = hashlib.sha256("\n".join(photo.name for photo in photos).encode()).hexdigest()
    now: dict[str, Any] = {
        "source": Path(source).name,
        "photos": len(photos),
        "names": names,
        "options": asdict(options),
    }
    path = out / "prepare.json"
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        flat = [entry | entry["options"] for entry in (before, now)]
        changed = sorted(key for key in flat[0].keys() | flat[1].keys() if flat[0].get(key) != flat[1].get(key))
        if changed := [key for key in changed if key != "options"]:
            raise SystemExit(
                f"{out} was begun with other {', '.join(changed)}: give the same command to go on, or another folder"
            )
    elif next(out.glob("shard-*.tar"), None):
        raise SystemExit(f"{out} holds shards, but not how they were made (prepare.json): give another folder")
    else:
        (out / "work").mkdir(parents=True, exist_ok=True)
        with replacing(path) as draft:
            draft.write_text(json.dumps(now, indent=2) + "\n", encoding="utf-8")
    del now["options"]["photos_per_part"]  # which decides nothing of the shards
    return hashlib.sha256(json.dumps(now).encode()).hexdigest()[:16]


def part_jobs(args: argparse.Namespace, options: Options, photos: Sequence[Photo]) -> list[PartJob]:
    captions: dict[str, str] = {}
    if options.captions not in ("none", "given", "blip2"):
        captions = read_table(options.captions, "caption", photos)
    jobs: list[PartJob] = []
    for start_at in range(0, len(photos), options.photos_per_part):
        some = tuple(photos[start_at : start_at + options.photos_per_part])
        own = {photo.name: captions[photo.name] for photo in some if photo.name in captions}
        jobs.append(PartJob(args.out, len(jobs), some, own, options.absolute(), tuple(args.providers), args.device))
    return jobs


def make_parts(engine: Engine, jobs: Sequence[PartJob]) -> None:
    """All parts that are not there yet."""
    left = [job for job in jobs if not job.done]
    total = sum(len(job.photos) for job in jobs)
    steps = [(engine.many, find)]
    if jobs[0].options.looks:
        steps.append((engine.few, look))
    with tqdm(total=total, initial=total - sum(len(job.photos) for job in left), unit="photo", smoothing=0.05) as bar:
        for job in run(steps, left, engine.slots):
            bar.update(len(job.photos))


def make_shards(engine: Engine, jobs: Sequence[ShardJob]) -> None:
    """All shards that are not there yet."""
    left = [job for job in jobs if not job.done]
    for _ in tqdm(run([(engine.many, write_shard)], left, engine.slots), total=len(left), unit="shard"):
        pass


def main(words: Sequence[str] | None = None) -> None:
    args, options = parse(words)
    out: Path = args.out
    photos, broken = list_photos(args.source, out)
    for how, column in ((options.identities, "identity"), (options.captions, "caption")):
        if how not in ("embedding", "folder", "prefix", "none", "given", "blip2"):
            table = read_table(how, column, photos)  # before the work, not after it
            if absent := [photo.name for photo in photos if photo.name not in table]:
                some = f"{len(absent)} of {len(photos)} photographs, such as {absent[0]}"
                print(f"{some}, have no row in the table {how!r}", file=sys.stderr)
    try:
        options.absolute()  # before anything is noted down
    except InputError as error:
        raise SystemExit(str(error)) from error
    prepared = begin(out, args.source, options, photos)
    if not (out / "report.json").is_file():
        small_on_gpu = any(provider != "CPUExecutionProvider" for provider in args.providers)
        try:
            with start(args.engine, args.workers, device=args.device, small_on_gpu=small_on_gpu) as engine:
                make_parts(engine, part_jobs(args, options, photos))
                told = plan(out, options, photos, prepared)
                make_shards(engine, [ShardJob(out, number) for number in range(told["shards"])])
            report(out, options, len(photos), told, broken)
        except (InputError, OSError) as error:  # of the models' folders, of the disk
            raise SystemExit(str(error)) from error
    for draft in out.glob("shard-*.tmp"):  # of a run that was killed
        draft.unlink()
    if not args.keep_work:
        shutil.rmtree(out / "work", ignore_errors=True)
    tell(json.loads((out / "report.json").read_text(encoding="utf-8")))


def tell(report: dict) -> None:
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

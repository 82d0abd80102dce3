"""Render people into shards: `python -m facesnap.synthetic --out DIR --people N --per-person K --size 256 --seed S`.

Shards that are already there are kept, so a run that was stopped goes on where it was. Their content: shards.py.
"""

import argparse
import multiprocessing
from pathlib import Path

from tqdm import tqdm

from facesnap.synthetic.people import EVALUATION_PEOPLE, VERSION
from facesnap.synthetic.shards import PEOPLE_PER_SHARD, write_shard


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m facesnap.synthetic", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the shards")
    parser.add_argument("--people", type=int, default=1000)
    parser.add_argument("--per-person", type=int, default=5)
    parser.add_argument("--size", type=int, default=256, help="side of the pictures in pixels")
    parser.add_argument(
        "--seed", type=int, default=0,
        help=f"seed of the first person; {EVALUATION_PEOPLE.start} to {EVALUATION_PEOPLE.stop - 1} are held out",
    )  # fmt: skip
    parser.add_argument("--wide", action="store_true", help="pictures from afar, with small heads")
    parser.add_argument("--varied", action="store_true", help="people with hair beyond the usual proportions")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    args = parser.parse_args(argv)
    if args.people < 1 or args.per_person < 1 or args.size < 32 or args.seed < 0:
        parser.error("--people and --per-person must be at least 1, --size at least 32, --seed at least 0")
    args.out.mkdir(parents=True, exist_ok=True)
    kind = "-wide" * args.wide + "-varied" * args.varied
    jobs = []
    for start in range(args.seed, args.seed + args.people, PEOPLE_PER_SHARD):
        count = min(PEOPLE_PER_SHARD, args.seed + args.people - start)
        name = f"people-{start:07d}-{count}x{args.per_person}-{args.size}-v{VERSION}{kind}.tar"
        jobs.append((args.out / name, start, count, args.per_person, args.size, args.wide, args.varied))
    with tqdm(total=args.people * args.per_person, unit="picture", smoothing=0.05) as bar:
        if args.workers > 1:
            with multiprocessing.get_context("spawn").Pool(args.workers) as pool:
                for done in pool.imap_unordered(write_shard, jobs):
                    bar.update(done * args.per_person)
        else:
            for job in jobs:
                bar.update(write_shard(job) * args.per_person)


if __name__ == "__main__":
    main()

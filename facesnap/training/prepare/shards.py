"""Parts → shards. One process plans them, by small lists and embeddings; each is then a task of its own.

OUT/work/plan.npy     a row for each sample, in the order of the shards: `ROW`
OUT/work/plan.json    what the report and the shards' lists say of the whole; written last, so where it is, the
                      plan is whole
"""

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import webdataset

from facesnap.faces import FaceAnalyser
from facesnap.training.prepare.grouping import identities_of, near_duplicates, same_people
from facesnap.training.prepare.options import REASONS, Options
from facesnap.training.prepare.parts import PartFiles, explained, read_members, replacing
from facesnap.training.prepare.sources import Photo, labelled_identities

ROW = np.dtype(
    [("shard", "i4"), ("part", "i4"), ("index", "i4"), ("identity", "i4"), ("picture", "i4")]
)  # index: in the part; picture: which of the identity's it is


@dataclass(frozen=True)
class ShardJob:
    """One shard to be written, wherever that is done."""

    out: Path
    number: int

    @property
    def path(self) -> Path:
        return self.out / f"shard-{self.number:06d}.tar"

    @property
    def done(self) -> bool:
        return self.path.is_file()


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


def plan(out: Path, options: Options, photos: Sequence[Photo], prepared: str) -> dict[str, Any]:
    """Near-duplicates fall out, people are told apart, and each sample gets its shard; returns `plan.json`.

    `prepared` names this prepare: shards of two do not mix.
    """
    path = out / "work" / "plan.json"
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    samples, vectors, rejects = gather(out, options, len(photos))
    told: dict[str, Any] = {"prepared": prepared, "faces": len(samples), "identities": [], "shards": 0}
    told["faces"] += sum(reject["face"] is not None for reject in rejects)
    rows = np.zeros(0, ROW)
    if samples:
        kept, twins = without_duplicates(samples, vectors, options)
        rejects += twins
        labels = labelled_identities(photos, options.identities)
        groups = same_people(vectors[kept], options.same_person) if labels is None else np.zeros(0)
        samples = [samples[row] for row in kept]
        identities = identities_of(samples, labels, groups)
        shards = plan_shards(identities, options.samples_per_shard, options.seed)
        rows = table(samples, identities, shards)
        # the trainer asks whose embeddings it gets
        told |= {"recogniser": FaceAnalyser(options.absolute().pack).recogniser_digest, "shards": len(shards)}
        told["identities"] = np.bincount(np.bincount(identities)).tolist()  # how many have 0, 1, 2 … pictures
    counted = Counter(reject["reason"] for reject in rejects)
    told |= {"samples": len(rows), "rejected": {reason: counted[reason] for reason in REASONS}}
    with replacing(out / "rejected.jsonl") as draft:
        draft.write_text("".join(json.dumps(reject) + "\n" for reject in rejects), encoding="utf-8")
    with replacing(out / "work" / "plan.npy") as draft, draft.open("wb") as stream:
        np.save(stream, rows)
    with replacing(path) as draft:
        draft.write_text(json.dumps(told), encoding="utf-8")
    return told


def gather(out: Path, options: Options, photos: int) -> tuple[list[dict[str, Any]], np.ndarray, list[dict[str, Any]]]:
    """Of all parts: what the plan must know of each sample, the embeddings (N, 512), and what fell out."""
    samples, rejects, vectors = [], [], [np.zeros((0, 512), np.float16)]
    for number in range(-(-photos // options.photos_per_part)):
        files = PartFiles.of(out, number)
        part = files.read()
        for index, sample in enumerate(part["samples"]):
            known = {key: sample[key] for key in ("source", "face", "box_side")}
            samples.append(known | {"hash": int(sample["hash"], 16), "part": number, "index": index})
        rejects += part["rejects"]
        if part["samples"]:
            vectors.append(np.load(files.embeddings))
    return samples, np.concatenate(vectors), rejects


def without_duplicates(
    samples: Sequence[dict[str, Any]], vectors: np.ndarray, options: Options
) -> tuple[list[int], list[dict[str, Any]]]:
    """The rows of the samples that stay, of each group of like pictures the one with the largest face, and why the
    others fell out."""
    hashes = np.array([sample["hash"] for sample in samples], np.uint64)
    alike = near_duplicates(hashes, vectors, options.duplicate_bits, options.duplicate_cosine)
    best: dict[int, int] = {}
    for row in sorted(range(len(samples)), key=lambda row: -samples[row]["box_side"]):  # the first of equals
        best.setdefault(int(alike[row]), row)
    rejects = [
        {"source": sample["source"], "face": sample["face"], "reason": "near-duplicate",
         "figure": samples[best[int(alike[row])]]["source"]}
        for row, sample in enumerate(samples)
        if best[int(alike[row])] != row
    ]  # fmt: skip
    return sorted(best.values()), rejects


def table(samples: Sequence[dict[str, Any]], identities: np.ndarray, shards: Sequence[Sequence[int]]) -> np.ndarray:
    """(N,) of `ROW`, in the order of the shards."""
    rows = np.zeros(len(samples), ROW)
    seen: Counter[int] = Counter()  # of each identity, over the shards
    placed = ((number, row) for number, some in enumerate(shards) for row in some)
    for k, (number, row) in enumerate(placed):
        identity, sample = int(identities[row]), samples[row]
        rows[k] = (number, sample["part"], sample["index"], identity, seen[identity])
        seen[identity] += 1
    return rows


def write_shard(job: ShardJob) -> None:
    """A shard and the list beside it: a function of the plan and the parts."""
    if job.done:
        return
    with explained(job.out):
        told = json.loads((job.out / "work" / "plan.json").read_text(encoding="utf-8"))
        rows = np.load(job.out / "work" / "plan.npy", mmap_mode="r")
        first, last = np.searchsorted(rows["shard"], [job.number, job.number + 1])
        parts: dict[int, dict[str, Any]] = {}
        listed = []
        with replacing(job.path) as draft:
            with draft.open("wb") as stream, webdataset.TarWriter(stream, encoder=False, mtime=0) as tar:
                for row in rows[first:last]:
                    number = int(row["part"])
                    files = PartFiles.of(job.out, number)
                    if number not in parts:
                        parts[number] = files.read()
                    sample = parts[number]["samples"][row["index"]]
                    key, identity = f"{row['identity']:08d}_{row['picture']:04d}", int(row["identity"])
                    about = {"key": key, "identity": identity, "source": sample["source"], "size": sample["size"]}
                    listed.append(about)
                    more = {name: value for name, value in sample.items() if name not in ("places", "box_side")}
                    members = read_members(files, sample)
                    members["json"] = json.dumps(about | more, ensure_ascii=False).encode()
                    tar.write({"__key__": key} | members)
            whole = {"recogniser": told["recogniser"], "prepared": told["prepared"], "samples": listed}
            with replacing(job.path.with_suffix(".json")) as list_draft:  # before the tar has its name: never without
                list_draft.write_text(json.dumps(whole), encoding="utf-8")


def report(out: Path, options: Options, photos: int, told: dict[str, Any], broken: dict[str, str]) -> dict[str, Any]:
    """`report.json`, written once all shards are there."""
    pictures = told["identities"]
    whole = {
        "photos": photos,
        "faces": told["faces"],
        "samples": told["samples"],
        "identities": sum(pictures[1:]),
        "identities_with_several_pictures": sum(pictures[2:]),
        "rejected": told["rejected"],
        "unreadable_shards": broken,
        "shards": told["shards"],
        "bytes": sum(ShardJob(out, i).path.stat().st_size for i in range(told["shards"])),
        "options": asdict(options),
    }
    with replacing(out / "report.json") as draft:
        draft.write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
    return whole

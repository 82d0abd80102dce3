"""Parts: what some photographs give, the unit that is done, or done again after a break.

    OUT/work/part-000003.tar    the samples' files, but for .json
    OUT/work/part-000003.npy    (N, 512) float16: unit means of an embedding and its mirror image's
    OUT/work/part-000003.json   {"photos", "samples", "rejects"}; written last, so where it is, the part is whole

Where large models look at the pictures afterwards (`looks`), `found-000003.*` comes first and goes again.
"""

import contextlib
import json
import os
import socket
import tarfile
import uuid
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnxruntime
import webdataset

from facesnap.errors import InputError
from facesnap.training.prepare.grouping import unit
from facesnap.training.prepare.options import Options
from facesnap.training.prepare.samples import Preparer, Sample
from facesnap.training.prepare.sources import Photo


@dataclass(frozen=True)
class PartFiles:
    """Where a part lies; `kind` is "part" or "found"."""

    samples: Path
    embeddings: Path
    list: Path

    @classmethod
    def of(cls, out: Path, number: int, kind: str = "part") -> "PartFiles":
        return cls(*(out / "work" / f"{kind}-{number:06d}.{ending}" for ending in ("tar", "npy", "json")))

    def read(self) -> dict[str, Any]:
        return json.loads(self.list.read_text(encoding="utf-8"))


@dataclass(frozen=True)
class PartJob:
    """What makes one part, wherever it is made: folders are absolute."""

    out: Path
    number: int
    photos: tuple[Photo, ...]
    captions: dict[str, str]  # of a table, by the photos' names
    options: Options
    providers: tuple[str, ...]
    device: str

    @property
    def done(self) -> bool:
        return PartFiles.of(self.out, self.number).list.is_file()


def find(job: PartJob) -> None:
    """The faces of some photographs, written as a part, or as what `looks.look` makes one of."""
    files = PartFiles.of(job.out, job.number, "found" if job.options.looks else "part")
    if job.done or files.list.is_file():
        return
    with explained(job.out):
        preparer = load_preparer(job.options, job.providers)
        samples: list[Sample] = []
        rejects: list[dict[str, Any]] = []
        for photo in job.photos:
            try:
                samples += preparer.photo(photo, rejects)
            except InputError:
                raise
            except Exception as error:
                raise RuntimeError(f"{photo.name}: {type(error).__name__}: {error}") from error
        for sample in samples:
            sample.about["caption"] = job.captions.get(sample.about["source"], sample.about["caption"])
        write_part(
            files,
            members=[sample.members(job.options.format) for sample in samples],
            embeddings=[unit(unit(s.arrays["embeddings"]).sum(axis=0)) for s in samples],
            abouts=[s.about | {"box_side": float(max(s.arrays["box"][2:] - s.arrays["box"][:2]))} for s in samples],
            photos=len(job.photos),
            rejects=rejects,
        )


@lru_cache(1)
def load_preparer(options: Options, providers: tuple[str, ...]) -> Preparer:
    """The nets of this process; raises InputError where one cannot be loaded, or would run elsewhere than asked."""
    cv2.setNumThreads(1)
    has = onnxruntime.get_available_providers()
    if absent := [name for name in providers if name not in has]:  # it would take the CPU, and say nothing
        raise InputError(
            f"ONNX Runtime has no {absent[0]} here, but {', '.join(has)}: for a GPU install onnxruntime-gpu in place "
            "of onnxruntime (docs/gpu.md), or leave out --providers"
        )
    try:
        with one_core():
            return Preparer(options, providers)
    except (ValueError, OSError) as error:  # of transformers, and our own
        raise InputError(str(error)) from error


def write_part(
    files: PartFiles,
    *,
    members: Sequence[dict[str, bytes]],
    embeddings: Sequence[np.ndarray],
    abouts: Sequence[dict[str, Any]],
    photos: int,
    rejects: Sequence[dict[str, Any]],
) -> None:
    """A part of N samples; the list gets the `places` (offset, length) of each sample's files in the tar."""
    with replacing(files.samples) as draft:
        with draft.open("wb") as stream, webdataset.TarWriter(stream, encoder=False, mtime=0) as tar:
            for i, parts in enumerate(members):
                tar.write({"__key__": f"{i:04d}"} | parts)
        places: dict[str, dict[str, tuple[int, int]]] = defaultdict(dict)
        with tarfile.open(draft, "r:") as written:
            for member in written:
                key, _, kind = member.name.partition(".")
                places[key][kind] = (member.offset_data, member.size)
    with replacing(files.embeddings) as draft, draft.open("wb") as stream:
        np.save(stream, np.array(embeddings, np.float16))
    samples = [about | {"places": place} for about, place in zip(abouts, places.values(), strict=True)]
    with replacing(files.list) as draft:
        told = {"photos": photos, "samples": samples, "rejects": list(rejects)}
        draft.write_text(json.dumps(told), encoding="utf-8")


def read_members(files: PartFiles, sample: dict[str, Any]) -> dict[str, bytes]:
    """A sample's files, by what its list says."""
    members = {}
    with files.samples.open("rb") as stream:
        for kind, (offset, length) in sample["places"].items():
            stream.seek(offset)
            members[kind] = stream.read(length)
    return members


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write that takes its name only when it is whole; several processes may try at once."""
    draft = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield draft
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


@contextlib.contextmanager
def explained(out: Path) -> Iterator[None]:
    """Names the machine where a folder is not seen, or its disk is full: with many it is one of them."""
    machine = socket.gethostname()
    if not (out / "prepare.json").is_file():
        raise InputError(f"the machine {machine} does not see {out}: it must lie on storage that all machines share")
    try:
        yield
    except OSError as error:
        raise InputError(
            f"on the machine {machine} a file could not be read or written ({error}); what is done is kept: mend that, "
            "and give the same command again"
        ) from error
    except InputError as error:
        raise InputError(f"{error} (on the machine {machine})") from error


@contextlib.contextmanager
def one_core() -> Iterator[None]:
    """Nets that are loaded here start one thread: ONNX Runtime and torch count the cores they may use."""
    if not hasattr(os, "sched_setaffinity"):  # macOS
        yield
        return
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)

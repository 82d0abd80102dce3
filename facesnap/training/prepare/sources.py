"""Where `facesnap.training.prepare` finds photographs, and what is told about them: captions, and who is who."""

import csv
import json
import re
import sys
import tarfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import braceexpand

from facesnap.images import ENDINGS
from facesnap.synthetic.people import EVALUATION_PEOPLE

PICTURES = tuple(ending[1:] for ending in ENDINGS)
CAPTION_KEYS = ("caption", "text", "prompt")  # in a .json beside a photo, the first that is there


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
    parts: dict[str, tuple[str, int, int | None]] = {"picture": (str(file.absolute()), 0, None)}
    for kind in ("txt", "json"):
        if file.with_suffix(f".{kind}").is_file():
            parts[kind] = (str(file.with_suffix(f".{kind}").absolute()), 0, None)
    return Photo(file.relative_to(folder).as_posix(), parts)


def _members(shard: Path, name: str) -> list[Photo]:
    samples: dict[str, dict[str, tuple[str, int, int | None]]] = defaultdict(dict)
    with tarfile.open(shard, "r:") as tar:  # not compressed: members are read where they lie
        for member in tar:
            key, _, kind = member.name.rpartition("/")[2].partition(".")
            key = f"{member.name.rpartition('/')[0]}/{key}".lstrip("./")
            person = re.fullmatch(r"(\d{7})_\d+", key) if kind == "mask.png" else None  # of a render
            if person and int(person[1]) in EVALUATION_PEOPLE:
                raise SystemExit(f"{name} holds people held out for evaluation ({person[1]}): train on others")
            kind = "picture" if kind.lower() in PICTURES else kind.lower()
            if member.isfile() and kind in ("picture", "txt", "json"):
                samples[key][kind] = (str(shard.absolute()), member.offset_data, member.size)
    return [Photo(f"{name}/{key}", parts) for key, parts in sorted(samples.items()) if "picture" in parts]


def given_caption(photo: Photo) -> str:
    """What stands beside the photo in a .txt, or in a .json under `caption`, `text` or `prompt`; else "".

    Raises ValueError for a .json that is none."""
    if "txt" in photo.parts:
        return photo.read("txt").decode("utf-8", "replace").strip()
    if "json" in photo.parts:
        told = json.loads(photo.read("json"))
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
    if how in ("folder", "prefix"):
        mark = "/" if how == "folder" else "_"
        places = {photo.name: re.sub(r"^.*\.tar/", "", photo.name) for photo in photos}  # a person may be in two shards
        return {name: place.rpartition(mark)[0] for name, place in places.items() if place.rpartition(mark)[0]}
    return {name: who for name, who in read_table(how, "identity", photos).items() if who}

"""Rendered people as plain image files, as a user's photographs would lie in a folder."""

from dataclasses import dataclass
from pathlib import Path

import cv2

from facesnap.synthetic.people import sample_person, sample_picture
from facesnap.synthetic.render import Rendered, render
from facesnap.training.prepare import __main__ as prepare

FIRST = 1006  # the seed of the first person: long, short and bobbed hair; a hull of landmarks knows no great curls
MINI = Path(__file__).parent.parent / "assets" / "mini"
OPTIONS = ["--pack", str(MINI / "face_pack"), "--head", str(MINI / "head"), "--resolution", "256"]
SHARDS = ["--identities", "folder", "--samples-per-shard", "3"]


def write(folder: Path, people: int = 3, pictures: int = 3, size: int = 256) -> dict[str, Rendered]:
    """`folder/person/k.png` with a caption beside it in `.txt`; {name: how it was rendered}."""
    written = {}
    for seed in range(FIRST, FIRST + people):
        person = sample_person(seed)
        (folder / str(seed)).mkdir(parents=True, exist_ok=True)
        for index in range(pictures):
            rendered = render(sample_picture(person, index), size)
            file = folder / str(seed) / f"{index}.png"
            cv2.imwrite(str(file), rendered.image[..., ::-1])
            file.with_suffix(".txt").write_text(f"person {seed}, picture {index}\n", encoding="utf-8")
            written[f"{seed}/{index}.png"] = rendered
    return written


@dataclass(frozen=True)
class Prepared:
    """Photographs, how they were rendered, and the shards made of them (three samples each)."""

    photos: Path
    rendered: dict[str, Rendered]
    out: Path


def prepare_once(folder: Path) -> Prepared:
    rendered = write(folder / "photos")
    prepare.main([str(folder / "photos"), str(folder / "out"), *OPTIONS, *SHARDS])
    return Prepared(folder / "photos", rendered, folder / "out")

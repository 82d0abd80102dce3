"""Rendered people as plain image files, as a user's photographs would lie in a folder."""

from pathlib import Path

import cv2
import numpy as np

from facesnap.synthetic.people import sample_person, sample_picture
from facesnap.synthetic.render import render

FIRST = 1000  # the seed of the first person


def write(folder: Path, people: int = 3, pictures: int = 3, size: int = 256) -> dict[str, np.ndarray]:
    """`folder/person/k.png` with a caption beside it in `.txt`; {name: labels of its pixels (H, W)}."""
    labels = {}
    for seed in range(FIRST, FIRST + people):
        person = sample_person(seed)
        (folder / str(seed)).mkdir(parents=True, exist_ok=True)
        for index in range(pictures):
            rendered = render(sample_picture(person, index), size)
            file = folder / str(seed) / f"{index}.png"
            cv2.imwrite(str(file), rendered.image[..., ::-1])
            file.with_suffix(".txt").write_text(f"person {seed}, picture {index}\n", encoding="utf-8")
            labels[f"{seed}/{index}.png"] = rendered.mask
    return labels

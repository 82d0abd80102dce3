"""Portraits by every scheduler that fits, at few steps, beside those of the checkpoint's own.

    python benchmarks/schedulers.py --sheet schedulers.png

Each is made as diffusers' users make it, by `from_config` of the pipeline's own. Prints the mean cosine to the
reference by the recogniser that only scores, and the mean contrast (the standard deviation of a portrait's pixels,
0–255), of the portraits of the example people.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # so that the file runs as it is, installed or not

from facesnap import FaceSnapPipeline  # noqa: E402
from facesnap.evaluation.report import contact_sheet  # noqa: E402
from facesnap.request import FEWEST_STEPS  # noqa: E402

PROMPT = "a photo of a person, wearing a red shirt, a plain blue background"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=ROOT / "assets/mini", type=Path)
    parser.add_argument("--steps", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--only", nargs="+", help="names of schedulers; all that fit by default")
    parser.add_argument("--sheet", type=Path, help="a picture of all portraits; a row for each scheduler")
    options = parser.parse_args()

    pipe = FaceSnapPipeline.from_pretrained(options.model)
    pipe.set_progress_bar_config(disable=True)
    people = [pipe.analyse(path) for path in sorted((ROOT / "assets/examples").glob("*.png"))]
    own = pipe.scheduler
    others = sorted({kind for kind in own.compatibles if kind is not type(own)}, key=lambda kind: kind.__name__)
    rows: list[list[np.ndarray]] = []
    print("| scheduler |" + "".join(f" {steps} steps: identity | contrast |" for steps in options.steps))
    kinds = [kind for kind in (type(own), *others) if not options.only or kind.__name__ in options.only]
    for kind in kinds:
        cells, row = [], []
        try:
            pipe.scheduler = kind.from_config(own.config)
        except TypeError as error:  # diffusers' own: a configuration that this kind cannot read
            print(f"| {kind.__name__} | cannot be made: {error} |", flush=True)
            rows.append([])
            continue
        for steps in options.steps:
            if steps < FEWEST_STEPS.get(kind.__name__, 1):
                cells += ["refused", ""]
                row += [np.zeros((1, 1, 3), np.uint8)] * len(people)
                continue
            made = [pipe(PROMPT, reference=face, pose="front", seed=7, num_inference_steps=steps) for face in people]
            row += [np.asarray(out.images[0]) for out in made]
            scores = [out.identity_scores[0] or 0.0 for out in made]  # no face counts as no likeness
            contrast = np.mean([np.std(picture) for picture in row[-len(people) :]])
            cells += [f"{np.mean(scores):.2f}", f"{contrast:.0f}"]
        print(f"| {kind.__name__} | " + " | ".join(cells) + " |", flush=True)
        rows.append(row)
    if options.sheet:
        titles = [f"{steps} steps" for steps in options.steps for _ in people]
        contact_sheet(rows, titles, options.sheet, captions=[kind.__name__ for kind in kinds])


if __name__ == "__main__":
    main()

"""The mini's recipe: a whole FaceSnap from nothing, stage by stage, on rendered people.

    python -m facesnap.mini --all --work DIR --out assets/mini            # everything, about 20 hours on 2 cores
    python -m facesnap.mini --stage joint --work DIR --minutes 60         # one stage; what is done is kept
    python -m facesnap.mini --all --work DIR --minutes 50 --device cuda   # a budget shared by the stages

| stage        | learns                                                       | needs                   |
|--------------|--------------------------------------------------------------|-------------------------|
| people       | nothing: renders the shards                                  |                         |
| faces        | detector, landmark net, recognisers A, B and C               | people                  |
| scorer       | the evaluation's judges of what a prompt asks for            | people                  |
| head         | the head model and its regressor (least squares)             | faces                   |
| face_encoder | face encoder and the second text encoder                     | people                  |
| vae          | the VAE                                                      | faces, face_encoder     |
| features     | nothing: latents, faces as `faces.py` finds them             | head, vae, face_encoder |
| decoder      | the VAE's decoder alone, the latents stay                    | features                |
| joint        | base UNet, text encoders, mixer, FFRNet together             | features                |
| facesnap     | mixer and FFRNet, base frozen: the paper's training          | joint                   |
| identity     | the same with the identity loss, by recogniser B             | facesnap                |
| consistency  | face encoder and mixer, to see past the camera               | identity                |
| assemble     | nothing: writes the checkpoint folder                        | consistency             |

Every stage that learns resumes from its last checkpoint in `--work`. `--stage unpack` fills a new work folder from a
finished checkpoint (`--out`), so that training goes on from weights that were shipped: people, unpack, features, and
the stages from joint on. Where recogniser A, the face encoder and the VAE were trained anew in between, `adopt` comes
before joint: it teaches the shipped mixer, UNet and FFRNet to read them. `--stage faces --nets B` trains one net.

Several GPUs, or the cores of a CPU, share joint, facesnap, identity or consistency as processes; they count steps, not
minutes:
    torchrun --nproc-per-node 2 -m facesnap.mini --stage joint --work DIR --steps 1200
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import torch

from facesnap.errors import InputError
from facesnap.mini import checkpoint, portraits, recipe
from facesnap.mini.joint import WIDTHS
from facesnap.mini.recipe import NETS, Run

Stage = Callable[[Run, float], None]
# What is part of --all: the share of a budget that each stage gets, and its minutes without one (on two cores)
ALL: dict[Stage, tuple[float, float]] = {
    recipe.people: (0, 0),
    recipe.faces: (0.14, 140),
    recipe.scorer: (0.02, 16),
    recipe.head: (0, 0),
    recipe.face_encoder: (0.05, 60),
    recipe.vae: (0.18, 210),
    recipe.features: (0, 0),
    recipe.decoder: (0.03, 30),
    portraits.joint: (0.36, 600),
    portraits.facesnap: (0.04, 40),
    portraits.identity: (0.14, 180),
    portraits.consistency: (0.04, 40),
    checkpoint.assemble: (0, 0),
}
STAGES: dict[str, Stage] = {stage.__name__: stage for stage in (*ALL, checkpoint.unpack, checkpoint.adopt)}
BY_STEPS = ("joint", "facesnap", "identity", "consistency")  # those that several processes can share


def minutes_of(stage: Stage, budget: float | None, *, alone: bool) -> float:
    """What a stage gets: the whole budget `alone`, its share of it beside the others, its own minutes without one."""
    share, minutes = ALL.get(stage, (0, 0))
    if budget is None or not share:
        return minutes
    return budget if alone else budget * share


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m facesnap.mini", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--stage", choices=STAGES)
    what.add_argument("--all", action="store_true")
    parser.add_argument("--work", type=Path, required=True, help="checkpoints and everything between the stages")
    parser.add_argument("--out", type=Path, default=Path("assets/mini"), help="the finished checkpoint")
    parser.add_argument("--data", type=Path, help="shards (default: WORK/people)")
    parser.add_argument("--minutes", type=float, help="budget of the stage, or with --all of everything that learns")
    parser.add_argument(
        "--steps", type=int, help=f"of {', '.join(BY_STEPS[:-1])} or {BY_STEPS[-1]}, instead of minutes"
    )
    parser.add_argument("--nets", nargs="+", choices=NETS, default=NETS, help="of stage faces")
    parser.add_argument("--widths", nargs="+", type=int, default=WIDTHS, help="of the UNet of stage joint")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=2, help="processes for rendering and face analysis")
    parser.add_argument("--people", type=int, default=4000)
    parser.add_argument("--per-person", type=int, default=5)
    args = parser.parse_args(argv)
    if args.steps is not None and args.stage not in BY_STEPS:
        parser.error(f"--steps is for --stage {', '.join(BY_STEPS[:-1])} or {BY_STEPS[-1]}")
    cv2.setNumThreads(1)
    run = Run(
        work=args.work, out=args.out, data=args.data or args.work / "people", device=args.device, people=args.people,
        per_person=args.per_person, workers=args.workers, steps=args.steps, nets=tuple(args.nets),
        widths=tuple(args.widths),
    )  # fmt: skip
    for stage in ALL if args.all else [STAGES[args.stage]]:
        started = time.monotonic()
        try:
            stage(run, minutes_of(stage, args.minutes, alone=not args.all))
        except InputError as error:
            parser.exit(1, f"stage {stage.__name__}: {error}\n")
        print(f"stage {stage.__name__}: {(time.monotonic() - started) / 60:.1f} minutes", flush=True)


if __name__ == "__main__":
    main()

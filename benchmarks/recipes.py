"""What each part of the training recipe gives: the mini fine-tuned by recipes that differ in one thing.

    python benchmarks/recipes.py --work WORK --out recipes --steps 100 --seeds 0 1 2
    torchrun --nproc-per-node 2 benchmarks/recipes.py --work WORK --out recipes …       # two processes share each run

WORK is a work folder of the mini's recipe (features, recogniser B, stage joint). All runs of a seed begin from the
parts of stage joint and see the same people, noise and timesteps; the base is frozen. Then each makes the same plan,
which is scored by recogniser C, never by B. A killed run goes on when the same command is given again. OUT/report says
everything, and a table what the arms differ by from the recipe as it is.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that the file runs as it is, installed or not

from facesnap.evaluation import methods, plan, score  # noqa: E402
from facesnap.evaluation.__main__ import parse  # noqa: E402
from facesnap.mini.joint import load_parts  # noqa: E402
from facesnap.mini.portraits import IDENTITY, JOINT, latest, portrait_stage  # noqa: E402
from facesnap.mini.recipe import Run  # noqa: E402
from facesnap.mini.tables import begun_with, train_parts, write_model  # noqa: E402
from facesnap.training.identity import IdentityConfig  # noqa: E402
from facesnap.training.trainer import TrainerConfig  # noqa: E402

FIGURES = ("retention C", "copy-paste C", "FaceSim C", "landmark_error", "text_accuracy")


@dataclass(frozen=True)
class Arm:
    """What is different: of `IdentityConfig` (None: no identity loss), `LossConfig` and `KeptConfig`."""

    identity: dict[str, Any] | None = field(default_factory=dict)
    loss: dict[str, Any] = field(default_factory=dict)
    drawn: dict[str, Any] = field(default_factory=dict)


ARMS = {
    "recipe": Arm(),
    # as it was: the identity loss counted once where it is computed every k-th step, the face alone, all references as
    # rendered (that it saw drawings too is not repeated)
    "old": Arm(
        {"weight": IDENTITY["weight"] / IDENTITY["every"]},
        {"branch": 0.0, "background": 0.0},
        {"photographed": 0.0, "poor": 0.0},
    ),
    "without-identity": Arm(identity=None, loss={"background": JOINT.background}),
    "background-0": Arm(loss={"background": 0.0}),
    "background-0.1": Arm(loss={"background": 0.1}),
    "ffrnet-off-0.15": Arm(drawn={"without_ffrnet": 0.15}),
    "face-never-dropped": Arm(drawn={"drop_face": 0.0}),
}


def fine_tune(run: Run, arm: Arm, seed: int, place: Path, steps: int, batch: int) -> None:
    """Mixer and FFRNet of stage joint, trained on, into `place`/parts."""
    torch.manual_seed(seed)
    options = {}
    if arm.identity is not None:
        recogniser = str(run.work / "faces" / "recogniser_B.onnx")
        options["identity"] = IdentityConfig(recogniser, **IDENTITY | arm.identity)
    stage = portrait_stage(run, load_parts(latest(run, "joint", "start")), batch_size=batch, **options)
    stage.config = replace(stage.config, **arm.loss)
    stage.source.config = replace(stage.source.config, **arm.drawn)
    config = TrainerConfig(
        place / "run", steps=steps, optimiser="muon", lr=5e-4, betas=(0.9, 0.98), weight_decay=0.01, ema=0.99,
        warmup=20, hold=0.5, seed=seed, device=run.device, log_every=20, checkpoint_every=100, sheet_every=0,
    )  # fmt: skip
    train_parts(stage, config, place / "parts")


def value(found: dict[str, Any], figure: str) -> float:
    told = found[figure]
    return told["score"] if "score" in told else told["value"]


def table(found: dict[str, dict], arms: Iterable[str], seeds: list[int]) -> str:
    """A row an arm: the mean over the seeds, in brackets how far it lies from the recipe's, lowest and highest seed."""
    lines = ["| | " + " | ".join(FIGURES) + " |", "|---" * (1 + len(FIGURES)) + "|"]
    for arm in arms:
        cells = []
        for figure in FIGURES:
            own = np.array([value(found[f"{arm}-{seed}"], figure) for seed in seeds])
            apart = own - np.array([value(found[f"recipe-{seed}"], figure) for seed in seeds])
            between = "" if arm == "recipe" else f" ({apart.min():+.3f} to {apart.max():+.3f})"
            cells.append(f"{own.mean():.3f}{between}")
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="work folder of the mini's recipe")
    parser.add_argument("--data", type=Path, help="the people's shards (default: WORK/people)")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of batches and noise")
    parser.add_argument("--batch", type=int, default=32, help="of each process")
    parser.add_argument("--people", type=int, default=40)
    parser.add_argument("--poses", type=int, default=2)
    parser.add_argument("--draw", type=int, default=0, help="the plan's seed: people, prompts, noise")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(1)
    run = Run(work=args.work, out=args.out, data=args.data or args.work / "people", device=args.device)
    arms, state = ["recipe", *(arm for arm in args.arms if arm != "recipe")], PartialState(cpu=args.device == "cpu")
    if state.is_main_process:
        asked = ["--people", str(args.people), "--poses", str(args.poses), "--seed", str(args.draw)]
        plan.run(parse(["plan", "--out", str(args.out / "plan"), *asked]))
        settings = {name: getattr(args, name) for name in ("steps", "batch", "people", "poses", "draw")}
        begun_with(args.out / "recipes.json", settings | {"processes": state.num_processes})
    state.wait_for_everyone()
    folders, model = [], args.out
    for seed in args.seeds:
        for name in arms:
            place, model = (args.out / kind / f"{name}-{seed}" for kind in ("trainings", "models"))
            if not (place / "parts").is_dir():
                fine_tune(run, ARMS[name], seed, place, args.steps, args.batch)
            if state.is_main_process and not (model / "facesnap.json").is_file():
                write_model(run, place / "parts", model, name)
            state.wait_for_everyone()
            folders.append(args.out / "pictures" / f"{name}-{seed}")
            options = ["--method", "facesnap", "--model", str(model), "--out", str(folders[-1])]
            methods.run(parse(["make", str(args.out / "plan"), *options, "--device", args.device]))
    report = args.out / "report"
    score.run(parse(["score", str(args.out / "plan"), *map(str, folders), "--model", str(model), "--out", str(report)]))
    if state.is_main_process:
        print(table(json.loads((report / "report.json").read_text())["methods"], arms, args.seeds))


if __name__ == "__main__":
    main()

"""Does the identity loss help? The mini fine-tuned with it against the mini fine-tuned without it, for as many steps.

    python -m facesnap.mini --stage features --work WORK --data PEOPLE          # what training reads, once
    python benchmarks/identity_loss.py --work WORK --data PEOPLE --model assets/mini \
        --recogniser WORK/faces/recogniser_B.onnx --steps 600 --seeds 0 1 2 --out identity_loss

For each seed both runs start from the same weights and see the same batches, noise and timesteps: what the identity
branch draws, it draws last. Then each is evaluated on held-out people, by recogniser C and never by B. A killed run
goes on when the same command is given again. OUT/report.json and a table say what came of it.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that the file runs as it is, installed or not

from facesnap.mini.joint import load_parts  # noqa: E402
from facesnap.mini.portraits import portrait_stage  # noqa: E402
from facesnap.mini.recipe import Run  # noqa: E402
from facesnap.pipeline import FaceSnapPipeline  # noqa: E402
from facesnap.provenance import commit, fingerprint, machine  # noqa: E402
from facesnap.training.identity import IdentityConfig  # noqa: E402
from facesnap.training.trainer import Trainer, TrainerConfig  # noqa: E402

ARMS = ("without", "with")


def fine_tune(args: argparse.Namespace, arm: str, seed: int, folder: Path) -> dict[str, float]:
    """Mixer and FFRNet of the model, trained on; written as a whole checkpoint. Returns the last logged figures."""
    run = Run(args.work, folder, args.data or args.work / "people", args.device)
    identity = IdentityConfig(
        str(args.recogniser), weight=args.weight, steps=args.branch_steps, every=args.every, samples=args.samples
    )
    options = {"identity": identity} if arm == "with" else {}
    stage = portrait_stage(run, load_parts(args.model), batch_size=args.batch, **options)
    config = TrainerConfig(
        folder / "run", steps=args.steps, optimiser="muon", lr=args.lr, betas=(0.9, 0.98), ema=0.99, warmup=30,
        hold=0.5, seed=seed, device=args.device, log_every=max(1, min(20, args.steps)), sheet_every=0,
    )  # fmt: skip
    trainer = Trainer(stage, config)
    trainer.train()
    pipe = FaceSnapPipeline.from_pretrained(args.model)
    with trainer.averaged():
        for name, module in stage.modules().items():
            getattr(pipe, name).load_state_dict(module.state_dict())
    pipe.save_pretrained(folder / "model", dtype=torch.float16)
    for file in (args.model / "scorer").glob("attributes*"):  # the evaluation's judges of the text
        (folder / "model" / "scorer" / file.name).write_bytes(file.read_bytes())
    return json.loads((folder / "run" / "log.jsonl").read_text().splitlines()[-1])


def evaluate(args: argparse.Namespace, model: Path, report: Path) -> dict:
    if not report.exists():
        work, first = report.with_suffix(".work"), args.out / "start.work"
        if first.is_dir() and not work.exists():
            # the true pictures are the same for all, and so is what face pack and scorer, which no arm changes, see
            work.mkdir()
            for picture in first.glob("*.png"):
                if not picture.name.startswith("portrait"):
                    os.link(picture, work / picture.name)
            settings, *rows = (args.out / "start.jsonl").read_text().splitlines(keepends=True)
            own = json.dumps(json.loads(settings) | {"model": fingerprint(model)}) + "\n"
            seen = [row for row in rows if not json.loads(row)["key"].startswith("portrait")]
            report.with_suffix(".jsonl").write_text("".join([own, *seen]))
        command = [sys.executable, "-m", "facesnap.evaluation", "--model", str(model), "--out", str(report)]
        command += ["--people", str(args.people), "--poses", str(args.poses), "--seed", "0", "--device", args.device]
        subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    return json.loads(report.read_text())["results"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="with features/ and vae/, of facesnap.mini")
    parser.add_argument("--data", type=Path, help="the people's shards (default: WORK/people)")
    parser.add_argument("--model", type=Path, default=Path("assets/mini"))
    parser.add_argument("--recogniser", type=Path, required=True, help="φ: recogniser B, an ONNX file")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--weight", type=float, default=0.25, help="λ")
    parser.add_argument("--branch-steps", type=int, default=4)
    parser.add_argument("--every", type=int, default=2)
    parser.add_argument("--samples", type=int, default=8, help="of each batch that the identity loss sees")
    parser.add_argument("--people", type=int, default=40)
    parser.add_argument("--poses", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(1)

    def figures(results: dict) -> dict[str, float]:
        return {
            "identity_retention": results["identity_retention"],
            "cosine_c": results["cosine"]["generated"],
            "landmark_error": results["landmark_error"],
            "text_accuracy": results["text_accuracy"]["score"],
        }

    args.out.mkdir(parents=True, exist_ok=True)
    found: dict = {"start": figures(evaluate(args, args.model, args.out / "start.json"))}
    for seed in args.seeds:
        for arm in ARMS:
            folder = args.out / f"{arm}-{seed}"
            if not (folder / "model" / "facesnap.json").exists():
                fine_tune(args, arm, seed, folder)
            found[f"{arm} {seed}"] = figures(evaluate(args, folder / "model", args.out / f"{arm}-{seed}.json"))
    means = {}
    for arm in ARMS:
        for key in found["start"]:
            values = [found[f"{arm} {seed}"][key] for seed in args.seeds]
            means[f"{arm} {key}"] = [float(np.mean(values)), float(np.std(values))]
    gains = [found[f"with {s}"]["identity_retention"] - found[f"without {s}"]["identity_retention"] for s in args.seeds]
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    report = {
        "commit": commit(), "machine": machine(), "settings": settings, "runs": found, "means": means,
        "retention_gain_by_seed": gains,
    }  # fmt: skip
    (args.out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    print(f"{'':14}" + "".join(f"{key:>20}" for key in found["start"]))
    for name, row in found.items():
        print(f"{name:14}" + "".join(f"{value:20.4f}" for value in row.values()))
    print("gain in identity_retention by seed: " + ", ".join(f"{gain:+.4f}" for gain in gains))


if __name__ == "__main__":
    main()

"""The paper's Tables 2 and 3 in small: the mini's base frozen, mixer and FFRNet from nothing, everything else equal.

    python -m facesnap.mini.tables --table 2 --work WORK --out OUT       # or --table 3; two processes:
    torchrun --nproc-per-node 2 -m facesnap.mini.tables --table 2 --work WORK --out OUT

WORK is a work folder of the mini's recipe with its features and a trained base (stage joint, or unpack). Six trainings
of each seed serve both tables, since the rows "driver's" and "predicted landmarks" share weights. Each sees the same
number of samples in the same order, from FFRNet as a copy of the base's encoder (as a ControlNet begins; its outputs
are zero) and a random mixer. All rows then make the same plan, which is scored as any method's is. What is done is
kept: the same command goes on. At last the table between the marks of docs/paper.md is written anew.
"""

import argparse
import csv
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from diffusers import AutoencoderKL
from transformers import CLIPVisionModel

from facesnap import metrics
from facesnap.errors import InputError
from facesnap.evaluation import methods, plan, score
from facesnap.evaluation.__main__ import parse
from facesnap.faces import FaceAnalyser, Recogniser
from facesnap.ffrnet import FFRNet, Variant
from facesnap.heads import from_pretrained as read_head
from facesnap.mini.joint import CONTROL_WIDTHS, load_parts, make_pipe, save_parts
from facesnap.mini.portraits import latest, portrait_stage
from facesnap.mini.recipe import FACTOR, Run
from facesnap.mixer import FacialAttributeMixer
from facesnap.training.checkpointing import write_whole
from facesnap.training.portraits import PortraitStage
from facesnap.training.processes import make_accelerator
from facesnap.training.trainer import Trainer, TrainerConfig

BATCH = 32
PAGE = Path("docs/paper.md")
FIGURES = ("CLIP-face", "FaceSim", "FID")  # the columns of both tables; of the last, less is better


@dataclass(frozen=True)
class TableRow:
    """A row of the paper: its name, what is trained, how it is used, and the paper's three figures."""

    name: str
    mixer: str
    variant: Variant
    paper: tuple[float, float, float]

    @property
    def trained_as(self) -> Variant:
        return "predicted" if self.variant == "driver" else self.variant

    @property
    def training(self) -> str:
        return f"{self.mixer}-{self.trained_as}"


TABLES: dict[int, tuple[TableRow, ...]] = {
    2: (
        TableRow("identity only", "id", "predicted", (74.4, 67.2, 216.9)),
        TableRow("CLIP only", "clip", "predicted", (76.4, 66.1, 217.2)),
        TableRow("concatenation", "concat", "predicted", (77.6, 68.8, 214.8)),
        TableRow("mixer", "full", "predicted", (79.2, 70.6, 212.3)),
    ),
    3: (
        TableRow("no FFRNet", "full", "none", (70.2, 59.8, 225.2)),
        TableRow("no landmarks", "full", "black", (72.6, 61.3, 218.5)),
        TableRow("driver's landmarks", "full", "driver", (77.8, 69.3, 213.7)),
        TableRow("predicted landmarks", "full", "predicted", (79.2, 70.6, 212.3)),
    ),
}


# ---------------------------------------------------------------------------------------------- the trainings


def train(run: Run, row: TableRow, seed: int, place: Path, samples: int) -> None:
    """One training, into `place`/parts; goes on where a killed one stopped."""
    torch.manual_seed(seed)
    parts = fresh(load_parts(latest(run, "joint", "start")), row.mixer)
    stage = portrait_stage(run, parts, variant=row.trained_as, keep_controls=False, batch_size=BATCH)
    steps = max(1, samples // (BATCH * PartialState().num_processes))
    config = TrainerConfig(
        place / "run", steps=steps, optimiser="muon", lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01, ema=0.999,
        warmup=60, hold=0.5, seed=seed, device=run.device, log_every=20, checkpoint_every=200, sheet_every=1000,
    )  # fmt: skip
    train_parts(stage, config, place / "parts")


def train_parts(stage: PortraitStage, config: TrainerConfig, out: Path) -> None:
    """Train a stage to its end; the first of the processes writes its averaged parts into `out`."""
    trainer = Trainer(stage, config, make_accelerator(config, find_unused=True))
    trainer.train()
    if trainer.accelerator.is_main_process:
        with trainer.averaged():
            write_whole(out, lambda draft: save_parts(stage.pipe, draft))
    trainer.accelerator.wait_for_everyone()


def fresh(parts: dict[str, Any], mixer: str) -> dict[str, Any]:
    """The base's parts with a mixer of that variant and an FFRNet that have learned nothing of faces."""
    ffrnet = FFRNet.from_unet(
        parts["unet"], vae_scale_factor=FACTOR, conditioning_embedding_out_channels=CONTROL_WIDTHS
    )
    return parts | {"mixer": FacialAttributeMixer.from_config(parts["mixer"].config, variant=mixer), "ffrnet": ffrnet}


def write_model(run: Run, trained: Path, out: Path, name: str, variant: Variant = "predicted") -> None:
    """A FaceSnap folder of the parts that a training left; the rest is the work folder's."""
    vae = AutoencoderKL.from_pretrained(run.work / "vae", use_safetensors=True)
    pipe = make_pipe(
        vae,
        load_parts(trained),
        face_encoder=CLIPVisionModel.from_pretrained(
            run.work / "face_encoder", dtype=torch.float32, use_safetensors=True
        ),
        face_analyser=FaceAnalyser(run.work / "face_pack"),
        head_model=read_head(run.work / "head"),
        scorer=Recogniser(run.work / "scorer" / "recogniser.onnx"),
    )
    pipe.settings = replace(pipe.settings, name=name, variant=variant)

    def save(draft: Path) -> None:
        pipe.save_pretrained(draft, dtype=torch.float16)
        for file in (run.work / "scorer").glob("attributes*"):
            shutil.copy(file, draft / "scorer" / file.name)

    write_whole(out, save)


# ------------------------------------------------------------------------------------------------- the table


def table(
    rows: Sequence[TableRow], seeds: Sequence[int], figures: list[dict], distances: dict[str, float], name: str
) -> str:
    """The rows beside the paper's, means over the seeds, and a sentence wherever the order differs.

    figures: the lines of score's rows.csv; distances: FD of each folder; name: what that is called.
    """
    clip = next((key for key in figures[0] if key.startswith("CLIP-face")), None)
    sim = next(key for key in figures[0] if key.startswith("FaceSim"))
    lines = [f"| | CLIP-face | {sim} | {name} | the paper: CLIP-face, FaceSim, FID |", "|---|---|---|---|---|"]
    told: dict[str, dict[str, tuple[float, str]]] = {}
    for row in rows:
        folders = [folder_of(row, seed) for seed in seeds]
        each = [distances[folder] for folder in folders]
        told[row.name] = {"FID": (float(np.mean(each)), f"{np.mean(each):.2f} ({min(each):.2f} to {max(each):.2f})")}
        for figure, key in (("CLIP-face", clip), ("FaceSim", sim)):
            if key is not None:
                told[row.name][figure] = _mean([line for line in figures if line["method"] in folders], key)
        cells = [told[row.name].get(figure, (0, "–"))[1] for figure in FIGURES]
        lines.append(f"| {row.name} | {' | '.join(cells)} | {', '.join(map(str, row.paper))} |")
    brackets = f"in brackets 95 % intervals over people, of {name} the seeds' range."
    lines += ["", f"Means of {len(seeds)} seeds; {brackets}", ""]
    return "\n".join(lines + [f"- {sentence}" for sentence in differences(rows, told)])


def _mean(lines: list[dict], key: str) -> tuple[float, str]:
    values, people = np.array([float(line[key]) for line in lines]), np.array([line["person"] for line in lines])
    low, high = metrics.interval(lambda i: float(values[i].mean()), people)
    return float(values.mean()), f"{values.mean():.1f} ({low:.1f} to {high:.1f})"


def differences(rows: Sequence[TableRow], told: dict[str, dict[str, tuple[float, str]]]) -> list[str]:
    """A sentence for every two rows, neighbours in the paper's order, that stand the other way round here."""
    sentences = []
    for k, figure in enumerate(FIGURES):
        if figure not in told[rows[0].name]:
            continue
        order = sorted(rows, key=lambda row: row.paper[k])
        for low, high in zip(order, order[1:], strict=False):
            ours = told[low.name][figure], told[high.name][figure]
            if ours[0][0] >= ours[1][0]:
                sentences.append(
                    f"{figure}: “{high.name}” is not above “{low.name}” here ({ours[1][1]} and {ours[0][1]}), as it is "
                    f"in the paper ({high.paper[k]} and {low.paper[k]})."
                )
    return sentences or ["The order of the rows is the paper's in every column."]


def folder_of(row: TableRow, seed: int) -> str:
    return f"{row.mixer}-{row.variant}-{seed}"


def put(page: Path, number: int, text: str) -> None:
    """Writes the text between the page's marks of that table."""
    first, last = f"<!-- table {number} -->\n", f"<!-- end of table {number} -->"
    whole = page.read_text(encoding="utf-8")
    if first not in whole or last not in whole:
        raise InputError(f"'{page.name}' has no marks of table {number}: {first.strip()} and {last}.")
    before, after = whole.split(first)[0], whole.split(last)[1]
    page.write_text(f"{before}{first}{text}\n{last}{after}", encoding="utf-8")


# ----------------------------------------------------------------------------------------------------- the run


def run(arguments: argparse.Namespace) -> str | None:
    """Trains, makes, scores and writes what is not there yet; the table, None in all processes but the first."""
    rows, out = TABLES[arguments.table], arguments.out
    work = Run(work=arguments.work, out=out, data=arguments.data or arguments.work / "people", device=arguments.device)
    state = PartialState(cpu=arguments.device == "cpu")
    common = ["--people", str(arguments.people), "--poses", str(arguments.poses), "--seed", str(arguments.draw)]
    if state.is_main_process:
        plan.run(parse(["plan", "--out", str(out / "plan"), *common]))
        settings = {name: getattr(arguments, name) for name in ("samples", "people", "poses", "draw")}
        begun_with(out / "tables.json", settings | {"processes": state.num_processes})
    state.wait_for_everyone()
    folders = []
    for seed in arguments.seeds:
        for row in rows:
            place, model = (out / kind / f"{row.training}-{seed}" for kind in ("trainings", "models"))
            if not (place / "parts").is_dir():
                train(work, row, seed, place, arguments.samples)
            if state.is_main_process and not (model / "facesnap.json").is_file():
                write_model(work, place / "parts", model, row.training, row.trained_as)
            state.wait_for_everyone()
            folders.append(out / "pictures" / folder_of(row, seed))
            method = "facesnap-driver" if row.variant == "driver" else "facesnap"
            options = ["--method", method, "--model", str(model), "--out", str(folders[-1])]
            methods.run(parse(["make", str(out / "plan"), *options, "--device", arguments.device]))
    judging = ["--model", str(out / "models" / f"full-predicted-{arguments.seeds[0]}")]
    judging += ["--clip", *arguments.clip] if arguments.clip else []
    report = out / f"report{arguments.table}"
    score.run(parse(["score", str(out / "plan"), *map(str, folders), "--out", str(report), *judging]))
    if not state.is_main_process:
        return None
    with (report / "rows.csv").open(newline="", encoding="utf-8") as file:
        figures = list(csv.DictReader(file))
    found = json.loads((report / "report.json").read_text(encoding="utf-8"))
    name = found["settings"]["features"]["names"][0]
    told = table(rows, arguments.seeds, figures, {k: m[name] for k, m in found["methods"].items()}, name)
    command = f"python -m facesnap.mini.tables --table {arguments.table} --samples {arguments.samples}"
    command += f" --seeds {' '.join(map(str, arguments.seeds))} {' '.join(common[:4])} --draw {arguments.draw}"
    put(arguments.page, arguments.table, f"`{command}`, commit {found['commit'][:12]}:\n\n{told}")
    return told


def begun_with(path: Path, settings: dict[str, Any]) -> None:
    """Note the settings of what is begun; InputError where it was begun with others."""
    if path.exists() and (known := json.loads(path.read_text())) != settings:
        differing = sorted(k for k in {*known, *settings} if known.get(k) != settings.get(k))
        raise InputError(f"'{path.parent.name}' was begun with other {', '.join(differing)}: give another --out.")
    path.write_text(json.dumps(settings))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m facesnap.mini.tables", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--table", type=int, choices=TABLES, required=True)
    parser.add_argument("--work", type=Path, required=True, help="work folder of the mini's recipe")
    parser.add_argument("--data", type=Path, help="shards (default: WORK/people)")
    parser.add_argument("--out", type=Path, required=True, help="trainings, models, pictures and reports")
    parser.add_argument("--samples", type=int, default=150_000, help="of each training")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="of weights, batches and noise")
    parser.add_argument("--draw", type=int, default=0, help="the plan's seed: people, prompts, noise")
    parser.add_argument("--people", type=int, default=100)
    parser.add_argument("--poses", type=int, default=5)
    parser.add_argument("--clip", nargs="*", default=[], help="CLIPs for CLIP-face, as in score")
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    try:
        told = run(parser.parse_args(argv))
    except InputError as error:
        parser.exit(1, f"{error}\n")
    if told is not None:
        print(told)


if __name__ == "__main__":
    main()

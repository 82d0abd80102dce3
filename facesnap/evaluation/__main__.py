"""`python -m facesnap.evaluation COMMAND --model DIR --out FILE`, where COMMAND is portraits unless it is said.

Every run writes a JSON report (figures, settings, command, commit, model version, machine, library
versions); beside it lie the results of the single pictures (.jsonl) and the pictures themselves (.work/). A
run that was killed goes on from there when the same command is given again.

`plan`, `make`, `score`, `study` and `judge` are the paper's evaluation, of any method: docs/evaluation.md.
"""

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any

from facesnap.errors import InputError
from facesnap.evaluation import report

COMMANDS = {
    "portraits": "identity, pose and text of portraits of held-out people",
    "speed": "the same portraits by each preset and option: what speed costs in likeness",
    "stock": "the base model through diffusers' own SDXL pipeline",
    "predictor": "predicted landmarks from detected ones, against the driver's copied",
    "vae": "what encoding and decoding alone take away from true renders",
    "references": "one good reference and three poor ones: fused, and averaged",
    "probes": "what the face encoder's features tell of held-out people, linearly",
    "photographs": "detection in seven photographs that every installation has; or, of a folder, what avatars show",
}
MODULES = {"predictor": "pixels"}  # where the file has another name than the command
# Those of a module of their own arguments: the paper's evaluation, of any method (docs/evaluation.md)
PAPER = {
    "plan": ("plan", "what every method is asked for, in a folder"),
    "make": ("methods", "a built-in method fills a folder"),
    "score": ("score", "the folders of methods, judged against a plan"),
    "study": ("study", "people judge the pictures of methods in pairs, without names"),
    "judge": ("judgecheck", "does a recogniser tell people apart on photographs?"),
}


def parse(words: list[str]) -> argparse.Namespace:
    """The arguments; without a command the first of them is meant."""
    parser = argparse.ArgumentParser(prog="python -m facesnap.evaluation", description=__doc__.split("\n\n")[1])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (module, help_) in PAPER.items():
        command = commands.add_parser(name, help=help_)
        if words[:1] == [name]:  # only the wanted one is imported
            importlib.import_module(f"facesnap.evaluation.{module}").add_arguments(command)
    for name, help_ in COMMANDS.items():
        command = commands.add_parser(name, help=help_)
        command.add_argument("--model", required=True, help="checkpoint folder, for example assets/mini")
        command.add_argument("--out", required=True, help="the report, a .json file")
        command.add_argument("--seed", type=int, default=0, help="of all draws")
        command.add_argument("--device", default="cpu", help="where the model runs")
        if name != "probes":
            command.add_argument("--sheet", help="also write a contact sheet (.jpg or .png)")
        if name == "photographs":
            command.add_argument("folder", nargs="?", help="photographs and labels.csv: what do their avatars show?")
            command.add_argument("--renders", help="shards of rendered people, from which traits are learned")
            continue
        command.add_argument("--size", type=int, default=256, help="side of the rendered pictures, pixels")
        if name == "predictor":
            command.add_argument("--pairs", type=int, default=200)
            continue
        if name == "probes":
            command.add_argument("--people", type=int, default=450)
            continue
        if name != "vae":
            command.add_argument("--steps", type=int, help="of the sampler; the checkpoint's own by default")
            command.add_argument("--guidance", type=float, help="the checkpoint's own by default")
        if name == "stock":
            command.add_argument("--prompts", type=int, default=50)
        else:
            command.add_argument("--people", type=int, default=40)
            command.add_argument("--poses", type=int, default=3, help="portraits of each person")
            command.add_argument("--sheet-rows", type=int, default=6)
        if name == "speed":
            command.add_argument("--gallery", type=int, default=200, help="people among whom rank1 is counted")
            command.add_argument("--ways", nargs="+", help="best, and which of the others; all by default")
    if not words or (words[0] not in (*COMMANDS, *PAPER) and words[0] not in ("-h", "--help")):
        words = ["portraits", *words]
    return parser.parse_args(words)


def main() -> None:
    arguments = parse(sys.argv[1:])
    name = arguments.command
    try:
        if name in PAPER:
            task: Any = importlib.import_module(f"facesnap.evaluation.{PAPER[name][0]}")
            print(report.table(task.lines(task.run(arguments))))
            return
        # Imported late: each command loads the model code only when it is known to be wanted.
        task = importlib.import_module(f"facesnap.evaluation.{MODULES.get(name, name)}")
        out = Path(arguments.out)
        out.parent.mkdir(parents=True, exist_ok=True)
        found = task.run(arguments)
    except InputError as error:
        sys.exit(str(error))
    report.write(out, {**report.provenance(arguments.model), **found})
    print(report.table(task.lines(found["results"])))


if __name__ == "__main__":
    main()

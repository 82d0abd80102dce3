"""The commands; see `python -m facesnap.checkpoints --help`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from facesnap.checkpoints.plans import fetch, plan, show
from facesnap.checkpoints.sources import START_BASE
from facesnap.checkpoints.start import init
from facesnap.checkpoints.verify import check, table
from facesnap.errors import InputError
from facesnap.ffrnet import VARIANTS
from facesnap.mixer import VARIANTS as MIXERS


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m facesnap.checkpoints", description="Names, files, checks.")
    commands = parser.add_subparsers(dest="command", required=True)
    for command, text in (("show", "list every file a model needs"), ("fetch", "fetch what is not here yet")):
        sub = commands.add_parser(command, help=text)
        sub.add_argument("name", help="mini, instantid, a folder or a Hub id")
        sub.add_argument("--base", help="the SDXL to stand on: a folder, a safetensors file or a Hub id")
        sub.add_argument("--lora", help="a LoRA: a safetensors file, its folder or a Hub id")
        if command == "fetch":
            sub.add_argument("--yes", action="store_true", help="do not ask")
    commands.add_parser("check", help="verify a checkpoint folder").add_argument("folder", type=Path)
    sub = commands.add_parser("init", help="write an untrained FaceSnap for a base model")
    sub.add_argument("--base", help=f"the SDXL to stand on: a folder, a safetensors file or a Hub id ({START_BASE})")
    begins = "what FFRNet begins as: the UNet's encoder, InstantID's ControlNet, or a folder's (%(default)s)"
    sub.add_argument("--ffrnet", default="unet", metavar="unet|instantid|PATH", help=begins)
    sub.add_argument("--mixer", default="full", choices=MIXERS, help="the row of Table 2 (%(default)s)")
    sub.add_argument("--variant", default="predicted", choices=VARIANTS, help="the row of Table 3 (%(default)s)")
    sub.add_argument("--face-pack", help="a folder to use instead of antelopev2")
    sub.add_argument("--head", help="a folder to use instead of GNM v3")
    sub.add_argument("--scorer", help="an ONNX recogniser to use instead of AuraFace's; it only scores")
    sub.add_argument("--seed", type=int, default=0, help="of what is new (%(default)s)")
    sub.add_argument("--out", type=Path, required=True, help="the folder to write")
    sub.add_argument("--yes", action="store_true", help="do not ask before fetching")
    given = parser.parse_args(arguments)
    try:
        if given.command == "init":
            options = {name: value for name, value in vars(given).items() if name != "command"}
            made = init(**options)
            print(f"{given.out}: {made.settings.name}, {made.settings.size}², {made.settings.variant}")
            for what in ("kept", "new"):
                print(f"{what}: {made.settings.about['start'][what]}")
            return
        if given.command == "check":
            report = check(given.folder)
            print(table(report))
            sys.exit(1 if report.problems else 0)
        wanted = plan(given.name, base=given.base, lora=given.lora)
        if given.command == "fetch":
            fetch(wanted, given.yes)
        print(show(wanted))
    except InputError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()

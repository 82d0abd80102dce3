"""`python -m facesnap.heads convert gnm|ict|flame … --out DIR`: from the files that a head model's authors publish to
a head folder of FaceSnap (config.json and safetensors), once.

Nothing is downloaded: docs/heads.md says where the files are and on what terms. Pickles are read without running
what they name.
"""

import argparse
import sys
from pathlib import Path

from facesnap.errors import InputError
from facesnap.heads import HeadModel, from_pretrained

TERMS = {
    "gnm": "GNM Head is Apache-2.0.",
    "ict": "ICT-FaceKit is MIT.",
    "flame": "FLAME and DECA are for non-commercial research only: do not hand the folder on.",
}


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m facesnap.heads", description="Head models of others.")
    commands = parser.add_subparsers(dest="command", required=True)
    convert = commands.add_parser("convert", help="make a head folder of a model's files")
    kinds = convert.add_subparsers(dest="kind", required=True)
    gnm = kinds.add_parser("gnm", help="GNM Head v3")
    gnm.add_argument("--model", type=Path, required=True, help="gnm_head.npz")
    gnm.add_argument("--landmarks", type=Path, required=True, help="head_sparse_68.txt")
    ict = kinds.add_parser("ict", help="ICT-FaceKit Light")
    ict.add_argument("--model", type=Path, required=True, help="the folder FaceXModel")
    flame = kinds.add_parser("flame", help="FLAME 2020, with DECA's encoder where it is given")
    flame.add_argument("--model", type=Path, required=True, help="generic_model.pkl")
    flame.add_argument("--embedding", type=Path, required=True, help="landmark_embedding.npy")
    flame.add_argument("--deca", type=Path, help="deca_model.tar")
    flame.add_argument(
        "--contour",
        choices=("fixed", "moving"),
        default="fixed",
        help="points of the head (default, as FFRNet is trained), or the silhouette's, by yaw",
    )
    for kind in (gnm, ict, flame):
        kind.add_argument("--out", type=Path, required=True, help="the head folder to write")
    return parser.parse_args(words)


def convert(arguments: argparse.Namespace) -> HeadModel:
    """Reads the files that the arguments name, writes the folder, and reads that back."""
    for name in ("model", "landmarks", "embedding", "deca"):
        path = getattr(arguments, name, None)
        if path is not None and not path.exists():
            raise InputError(f"There is no {str(path)!r}: give --{name} the file's path.")
    if arguments.out.exists() and (not arguments.out.is_dir() or any(arguments.out.iterdir())):
        raise InputError(f"{str(arguments.out)!r} exists and is not empty: give --out a new folder.")
    read(arguments).save_pretrained(arguments.out)
    return from_pretrained(arguments.out)


def read(arguments: argparse.Namespace) -> HeadModel:
    # Imported late: only DECA needs torch.
    if arguments.kind == "gnm":
        from facesnap.heads import gnm

        return gnm.read(arguments.model, arguments.landmarks)
    if arguments.kind == "ict":
        from facesnap.heads import ict

        return ict.read(arguments.model)
    from dataclasses import replace

    from facesnap.heads import flame

    head = replace(flame.read(arguments.model, arguments.embedding), contour=arguments.contour)
    if arguments.deca is None:
        return head
    from facesnap.heads import deca

    return deca.DecaHeadModel.around(head, deca.read_encoder(arguments.deca))


def main(words: list[str] | None = None) -> None:
    arguments = parse(sys.argv[1:] if words is None else words)
    try:
        head = convert(arguments)
    except (InputError, OSError) as error:
        raise SystemExit(f"{error}") from error
    print(f"{head.name}: {head.num_identity} coefficients of identity, {head.num_expression} of expression")
    print(f"written to {arguments.out}; {TERMS[arguments.kind]}")


if __name__ == "__main__":
    main()

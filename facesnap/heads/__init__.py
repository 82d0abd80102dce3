"""Head models: coefficients of identity and expression ↔ the 72 landmarks.

    model.py    what all of them share: `Head`, cameras, the fit to landmarks
    linear.py   any linear model: the mini's own, GNM (gnm.py), ICT-FaceKit (ict.py)
    flame.py    FLAME: linear blend skinning, with a jaw that turns
    deca.py     FLAME's coefficients read from pictures, as in the paper

`python -m facesnap.heads convert` makes a head folder of what a model's authors publish.
"""

import json
from pathlib import Path

from facesnap.errors import InputError
from facesnap.heads.flame import FlameHeadModel
from facesnap.heads.linear import LinearHeadModel
from facesnap.heads.model import CONFIG_NAME, Head, HeadModel, euler_from_rotation, rotation_from_euler

__all__ = [
    "FlameHeadModel",
    "Head",
    "HeadModel",
    "LinearHeadModel",
    "euler_from_rotation",
    "from_pretrained",
    "rotation_from_euler",
]


def from_pretrained(folder: str | Path) -> HeadModel:
    """The head model that a `save_pretrained` or the convert command wrote; its config.json says of which kind.

    Raises InputError where there is none, or of a kind that is not known.
    """
    path = Path(folder) / CONFIG_NAME
    if not path.is_file():
        raise InputError(f"There is no head model in {str(folder)!r}: give a folder with {CONFIG_NAME} in it.")
    kind = json.loads(path.read_text()).get("_class_name")
    if kind == "LinearHeadModel":
        return LinearHeadModel.from_pretrained(folder)
    if kind == "FlameHeadModel":
        return FlameHeadModel.from_pretrained(folder)
    if kind == "DecaHeadModel":
        from facesnap.heads.deca import DecaHeadModel  # the only one that needs torch

        return DecaHeadModel.from_pretrained(folder)
    raise InputError(f"{str(path)!r} asks for a head model of the kind {kind!r}, which this version does not know.")

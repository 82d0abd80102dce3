"""ICT-FaceKit Light (USC ICT, MIT) as a linear head model.

Its folder `FaceXModel` holds `generic_neutral_mesh.obj`, 100 `identityNNN.obj` and an .obj for each expression that
`vertex_indices.json` names. All of them are whole meshes of 26719 vertices; a direction is the difference to the
neutral one. Unit: centimetres; frame: x right, y up, z to the camera. Identity directions are one standard
deviation long, expressions are ARKit's blendshapes, 0 to 1.

`vertex_indices.json` has the 68 points with a contour of Multi-PIE's kind, the outline of a frontal picture. 3D
landmark nets follow the jaw itself, whose vertices the README of ICT-FaceKit gives: 0.15 eye distances from
InsightFace's mean shape, where the outline is 0.22 (means over the contour, the rest aligned). So the jaw's are taken.
"""

import json
from itertools import islice
from pathlib import Path

import numpy as np

from facesnap.errors import InputError
from facesnap.heads.linear import LinearHeadModel
from facesnap.heads.model import check_frame

NEUTRAL, INDICES = "generic_neutral_mesh.obj", "vertex_indices.json"
LEFT_JAW = (1278, 1272, 12, 1834, 243, 781, 2199, 1447)  # the picture's left; points 0–7
RIGHT_JAW = (3661, 4390, 3022, 2484, 4036, 2253, 3490, 3496)  # points 9–16
EXPRESSION_STD = 0.3  # our choice: most blendshapes are at rest in most pictures


def read(folder: Path) -> LinearHeadModel:
    """The folder FaceXModel → a head model. Raises InputError where a file is missing or damaged."""
    config = _config(folder)
    rows = np.array(config["idx_to_landmark_verts"])
    rows[0:8], rows[9:17] = LEFT_JAW, RIGHT_JAW
    identities = sorted(folder.glob("identity*.obj"))
    if not identities:
        raise InputError(f"{str(folder)!r} has no identity000.obj: give the folder FaceXModel of ICT-FaceKit.")
    names = tuple(config["expressions"])
    neutral = vertices(folder / NEUTRAL, rows)
    identity = np.stack([vertices(path, rows) - neutral for path in identities])
    expression = np.stack([vertices(folder / f"{name}.obj", rows) - neutral for name in names])
    head = LinearHeadModel.from_points68(
        neutral.astype(np.float32),
        identity.astype(np.float32),
        expression.astype(np.float32),
        np.ones(len(identity), dtype=np.float32),
        np.full(len(expression), EXPRESSION_STD, dtype=np.float32),
        name="ICT-FaceKit Light",
        expression_names=names,
        nonnegative_expression=True,
    )
    check_frame(head.mean, NEUTRAL)
    return head


def vertices(path: Path, rows: np.ndarray) -> np.ndarray:
    """Some vertices (N, 3) of an .obj file; what comes after the last of them is not read."""
    if not path.is_file():
        raise InputError(f"There is no {path.name} in {str(path.parent)!r}: give the whole folder FaceXModel.")
    with path.open(encoding="utf-8", errors="replace") as file:
        lines = list(islice((line for line in file if line.startswith("v ")), int(rows.max()) + 1))
    if len(lines) <= rows.max():
        raise InputError(f"{path.name} has {len(lines)} vertices, its landmarks want {rows.max() + 1}: get it again.")
    try:
        return np.array([[float(number) for number in lines[row].split()[1:4]] for row in rows]).reshape(-1, 3)
    except ValueError as error:
        raise InputError(f"{path.name} is damaged, a vertex in it is no three numbers: get it again.") from error


def _config(folder: Path) -> dict:
    path = folder / INDICES
    if not path.is_file():
        raise InputError(f"There is no {INDICES} in {str(folder)!r}: give the folder FaceXModel of ICT-FaceKit.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        complete = len(config["idx_to_landmark_verts"]) == 68 and len(config["expressions"]) > 0
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{INDICES} cannot be read ({type(error).__name__}): get it again.") from error
    if not complete:
        raise InputError(f"{INDICES} does not name 68 landmarks and the expressions: get it again.")
    return config

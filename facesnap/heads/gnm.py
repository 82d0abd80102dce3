"""GNM Head v3 (Google, Apache-2.0) as a linear head model.

`gnm_head.npz` is on the Hub (google/gnm-v3, v3_0/), `head_sparse_68.txt` in the GitHub repository google/GNM
(gnm/shape/data/landmarks/): a line for each of the 68 points, three vertices and their weights, i w i w i w. In
version 3.0 the left jaw's lines 2–6 run from the chin upwards while all others run along the jaw; `jaw_order` finds
that out from the mirror. Unit: metres; frame: x right, y up, z to the camera. Coefficients are within ±3, so of
standard deviation 1. GNM turns neck and eyes by joints, which landmarks do not need: the camera turns the head.
"""

import zipfile
from pathlib import Path

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

from facesnap.errors import InputError
from facesnap.heads.linear import LinearHeadModel
from facesnap.heads.model import check_frame

_KEYS = ("template_vertex_positions", "vertex_identity_basis", "expression_basis", "expression_names")


def read(model: Path, landmarks_file: Path) -> LinearHeadModel:
    """gnm_head.npz and head_sparse_68.txt → a head model with all of GNM's coefficients, in GNM's order.

    Raises InputError where a file is damaged or not of this form.
    """
    template, identity, expression, names = _arrays(model)
    vertices, weights = _landmarks(landmarks_file, len(template))

    def marks(values: np.ndarray) -> np.ndarray:
        """Vertices or their moves (..., V, 3) → of the 68 points (..., 68, 3)."""
        return np.einsum("lc,...lca->...la", weights, values[..., vertices, :].astype(np.float64)).astype(np.float32)

    mean = marks(template)
    order = jaw_order(mean)
    head = LinearHeadModel.from_points68(
        mean[order],
        marks(identity)[:, order],
        marks(expression)[:, order],
        np.ones(len(identity), dtype=np.float32),
        np.ones(len(expression), dtype=np.float32),
        name="GNM Head v3",
        expression_names=names,
    )
    check_frame(head.mean, model.name)
    return head


def jaw_order(points: np.ndarray) -> np.ndarray:
    """The 68 points (68, 3) in the file's order → (68,), the file's row of each of iBUG's points.

    The right jaw (16…9) tells: each of its points, mirrored at the bridge of the nose, lies on that of the left
    jaw (0…7) which is its partner.
    """
    mirrored = points[16:8:-1] * [-1, 1, 1] + [2 * points[27:31, 0].mean(), 0, 0]
    _, rows = linear_sum_assignment(cdist(mirrored, points[:8], "sqeuclidean"))
    return np.concatenate([rows, np.arange(8, 68)])


def _arrays(model: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, tuple[str, ...]]:
    try:
        with np.load(model, allow_pickle=False) as file:
            missing = [key for key in _KEYS if key not in file]
            if missing:
                raise InputError(f"{model.name} has no {missing[0]}: give the gnm_head.npz of GNM Head v3.")
            template, identity, expression, names = (file[key] for key in _KEYS)
    except InputError:
        raise
    except (ValueError, EOFError, KeyError, AttributeError, zipfile.BadZipFile) as error:
        raise InputError(f"{model.name} cannot be read ({type(error).__name__}): get it again.") from error
    for key, basis in zip(_KEYS[1:3], (identity, expression), strict=True):
        if basis.ndim != 3 or basis.shape[1:] != template.shape:
            raise InputError(f"{model.name}: {key} is {basis.shape}, which does not go with {template.shape} vertices.")
    return template, identity, expression, tuple(str(name) for name in names)


def _landmarks(path: Path, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(68, 3) vertices and (68, 3) weights."""
    try:
        rows = np.loadtxt(path)
    except ValueError as error:
        raise InputError(f"{path.name} is not a table of numbers: give GNM's head_sparse_68.txt.") from error
    if rows.shape != (68, 6):
        raise InputError(f"{path.name} has {rows.shape} numbers, expected 68 lines of three vertices and weights.")
    vertices, weights = rows[:, ::2].astype(np.int64), rows[:, 1::2]
    if vertices.min() < 0 or vertices.max() >= count or not np.allclose(weights.sum(axis=1), 1, atol=1e-2):
        raise InputError(f"{path.name} does not go with the model: it names vertices past {count}, or odd weights.")
    return vertices, weights

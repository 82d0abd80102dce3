"""FLAME (Li et al., SIGGRAPH Asia 2017): a head of 5023 vertices that is bent by linear blend skinning.

    rest   = template + Σ β_k basis_k + Σ (R_j − I) · correctives        j: neck, jaw, eyes
    vertex = Σ_j weight_j · A_j(R, joints) · rest                        joints = regressor · (template + Σ β_k basis_k)

β are shape and expression, the rest of an expression is the jaw's turn. Head orientation is not among the
coefficients: here as in every head model it is the camera's (`Head.rotation`), and neck and eyes stay at rest, as
in DECA. Unit: metres. All of it but the jaw's turn is linear, and that is nearly linear near where it stands.

The model's files are FLAME's authors' and may not be handed on; `python -m facesnap.heads convert flame` makes a
head folder of one's own copy.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors.numpy import load_file, save_file
from scipy.spatial.transform import Rotation

from facesnap import landmarks
from facesnap.errors import InputError
from facesnap.heads.model import CONFIG_NAME, WEIGHTS_NAME, Head, HeadModel, check_frame
from facesnap.heads.unpickle import array, load_npy, load_pickle

ROOT, NECK, JAW, LEFT_EYE, RIGHT_EYE = range(5)
NUM_SHAPE, NUM_EXPRESSION = 100, 50  # as many as DECA knows, of FLAME's 300 and 100
EXPRESSION_START = 300  # in FLAME's shapedirs
JAW_STD = (0.12, 0.02, 0.02)  # radians about x (opens), y, z: our choice
FURTHEST = 39  # degrees of yaw that the moving contour knows, to either side

Contour = Literal["fixed", "moving"]


@dataclass(frozen=True, eq=False)
class Skin:
    """Linear blend skinning of some vertices.

    template (V, 3), basis (K, V, 3) of shape and expression, correctives (36, V, 3) of the pose, weights (V, 5);
    joints (5, 3) at rest and joint_basis (K, 5, 3); parents (5,), the root's is −1.
    """

    template: np.ndarray
    basis: np.ndarray
    correctives: np.ndarray
    weights: np.ndarray
    joints: np.ndarray
    joint_basis: np.ndarray
    parents: np.ndarray

    def __call__(self, betas: np.ndarray, pose: np.ndarray) -> np.ndarray:
        """Coefficients (K,) and axis-angles (5, 3) of root, neck, jaw and eyes, in radians → vertices (V, 3)."""
        rotations = _rotations(pose)
        rest = self.template + np.tensordot(betas, self.basis, 1) + self._corrections(rotations)
        return self._bend(rotations, rest, self.joints + np.tensordot(betas, self.joint_basis, 1))

    def directions(self, pose: np.ndarray) -> np.ndarray:
        """How the vertices move with each coefficient, (K, V, 3): exact, since in these skinning is linear."""
        return self._bend(_rotations(pose), self.basis, self.joint_basis)

    def part(self, vertices: np.ndarray) -> "Skin":
        """The skin of these vertices alone."""
        return replace(
            self,
            template=self.template[vertices],
            basis=self.basis[:, vertices],
            correctives=self.correctives[:, vertices],
            weights=self.weights[vertices],
        )

    def _corrections(self, rotations: np.ndarray) -> np.ndarray:
        return np.tensordot((rotations[1:] - np.eye(3)).ravel(), self.correctives, 1)

    def _bend(self, rotations: np.ndarray, rest: np.ndarray, joints: np.ndarray) -> np.ndarray:
        """Vertices at rest (..., V, 3) and joints (..., 5, 3) → bent vertices; linear in both together."""
        turns: list[np.ndarray] = []  # of each joint in the model's frame, and where it takes the origin
        shifts: list[np.ndarray] = []
        for joint, parent in enumerate(self.parents):
            at = joints[..., joint, :]
            if parent < 0:
                turn, place = rotations[joint], at
            else:
                turn = turns[parent] @ rotations[joint]
                place = at @ turns[parent].T + shifts[parent]
            turns.append(turn)
            shifts.append(place - at @ turn.T)
        turn = np.einsum("vj,jab->vab", self.weights, np.stack(turns))
        shift = np.einsum("vj,...ja->...va", self.weights, np.stack(shifts, axis=-2))
        return np.einsum("vab,...vb->...va", turn, rest) + shift


@dataclass(frozen=True, eq=False)
class FlameHeadModel(HeadModel):
    """FLAME behind the interface of a head model. Identity: shape (I,). Expression: expression (E − 3,), then the
    jaw's axis-angle (3,) in radians.

    v_template (V, 3), shapedirs (V, 3, I + E − 3), posedirs (V, 3, 36), J_regressor (5, V), weights (V, 5), parents
    (5,) and faces (F, 3) are FLAME's. Landmarks are points of triangles, (triangle, weights of its corners): full_*
    (68,), (68, 3) all of iBUG-68; static_* (51,), (51, 3) those inside the face; dynamic_* (79, 17), (79, 17, 3) a
    contour for each degree of yaw, 0…39, then −1…−39.

    contour: "fixed" takes iBUG's contour as points of the head, as FFRNet's training does with every head model;
    "moving" takes the silhouette's at the yaw of the picture, as DECA does for its 2D landmarks. A fit takes the
    fixed one.
    """

    v_template: np.ndarray
    shapedirs: np.ndarray
    posedirs: np.ndarray
    J_regressor: np.ndarray
    weights: np.ndarray
    parents: np.ndarray
    faces: np.ndarray
    full_faces: np.ndarray
    full_weights: np.ndarray
    static_faces: np.ndarray
    static_weights: np.ndarray
    dynamic_faces: np.ndarray
    dynamic_weights: np.ndarray
    num_shape: int = NUM_SHAPE
    contour: Contour = "fixed"
    name: str = "FLAME"
    distance: float = math.inf

    nonnegative_expression = False

    # ------------------------------------------------------------------ folders

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "FlameHeadModel":
        """Reads what save_pretrained wrote."""
        return cls(**cls._saved(Path(folder)))

    @classmethod
    def _saved(cls, folder: Path) -> dict[str, Any]:
        config = json.loads((folder / CONFIG_NAME).read_text())
        return {
            **load_file(folder / WEIGHTS_NAME),
            "num_shape": config["num_shape"],
            "contour": config["contour"],
            "name": config["name"],
            "distance": config["distance"] or math.inf,
        }

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes config.json and model.safetensors."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        config = {
            "_class_name": type(self).__name__,
            "name": self.name,
            "num_shape": self.num_shape,
            "contour": self.contour,
            "distance": self.distance if math.isfinite(self.distance) else None,  # JSON has no infinity
        }
        (Path(folder) / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n")
        tensors = {name: np.ascontiguousarray(getattr(self, name)) for name in _TENSORS}
        save_file(tensors, Path(folder) / WEIGHTS_NAME)

    # ------------------------------------------------------------------ coefficients

    @cached_property
    def identity_std(self) -> np.ndarray:  # type: ignore[override]
        return np.ones(self.num_shape, dtype=np.float32)  # FLAME's components are one standard deviation long

    @cached_property
    def expression_std(self) -> np.ndarray:  # type: ignore[override]
        count = self.shapedirs.shape[2] - self.num_shape
        return np.array([*np.ones(count), *JAW_STD], dtype=np.float32)

    @cached_property
    def expression_names(self) -> tuple[str, ...]:  # type: ignore[override]
        count = self.num_expression - 3
        return (*(f"expression_{k:02d}" for k in range(count)), "jaw_open", "jaw_turn", "jaw_roll")

    # ------------------------------------------------------------------ from coefficients to points

    @cached_property
    def skin(self) -> Skin:
        """The whole head's."""
        template = self.v_template.astype(np.float64)
        basis = np.moveaxis(self.shapedirs, 2, 0).astype(np.float64)
        return Skin(
            template=template,
            basis=basis,
            correctives=np.moveaxis(self.posedirs, 2, 0).astype(np.float64),
            weights=self.weights.astype(np.float64),
            joints=self.J_regressor @ template,
            joint_basis=np.einsum("jv,kva->kja", self.J_regressor, basis),
            parents=self.parents,
        )

    @cached_property
    def mean(self) -> np.ndarray:  # type: ignore[override]
        return self.points(np.zeros(self.num_identity), np.zeros(self.num_expression))

    def vertices(self, identity: np.ndarray, expression: np.ndarray) -> np.ndarray:
        """Coefficients (I,), (E,) → the whole mesh (V, 3) in the model's frame."""
        return self.skin(*_coefficients(identity, expression))

    def points(self, identity: np.ndarray, expression: np.ndarray) -> np.ndarray:
        return self._landmarks(self._face(*_coefficients(identity, expression)))

    def tangent(self, identity: np.ndarray, expression: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        betas, pose = _coefficients(identity, expression)
        directions = self._landmarks(self._face.directions(pose))
        step = 1e-4 * np.eye(len(expression))[-3:]  # of the jaw, radians
        turns = [self.points(identity, expression + s) - self.points(identity, expression - s) for s in step]
        identity_basis = directions[: self.num_shape]
        expression_basis = np.concatenate([directions[self.num_shape :], np.stack(turns) / 2e-4])
        moved = np.tensordot(identity, identity_basis, 1) + np.tensordot(expression, expression_basis, 1)
        return self.points(identity, expression) - moved, identity_basis, expression_basis

    def project(self, head: Head) -> np.ndarray:
        if self.contour == "fixed":
            return super().project(head)
        face = self._face(*_coefficients(head.identity, head.expression))
        return self._place(self._landmarks(face, yaw=head.angles[0]), head)

    def root(self, identity: np.ndarray, expression: np.ndarray) -> np.ndarray:
        """The joint (3,) about which FLAME itself would turn the whole head."""
        betas, _ = _coefficients(identity, expression)
        return self.skin.joints[ROOT] + np.tensordot(betas, self.skin.joint_basis[:, ROOT], 1)

    # ------------------------------------------------------------------ landmarks

    @cached_property
    def _corners(self) -> dict[str, np.ndarray]:
        """The corners of the landmarks' triangles, (68, 3), (51, 3), (79, 17, 3)."""
        kinds = {"full": self.full_faces, "static": self.static_faces, "dynamic": self.dynamic_faces}
        return {kind: self.faces[triangles] for kind, triangles in kinds.items()}

    @cached_property
    def _used(self) -> np.ndarray:
        """The few hundred vertices on which a landmark depends."""
        return np.unique(np.concatenate([corners.ravel() for corners in self._corners.values()]))

    @cached_property
    def _face(self) -> Skin:
        return self.skin.part(self._used)

    def _landmarks(self, vertices: np.ndarray, yaw: float | None = None) -> np.ndarray:
        """Vertices of `_face` (..., U, 3) → the 72 points (..., 72, 3): the contour fixed, or that of a yaw."""

        def of(corners: np.ndarray, weights: np.ndarray) -> np.ndarray:
            picked = vertices[..., np.searchsorted(self._used, corners), :]
            return np.einsum("lc,...lca->...la", weights, picked)

        if yaw is None:
            return landmarks.from_68(of(self._corners["full"], self.full_weights))
        row = contour_row(yaw)
        parts = [
            of(self._corners["dynamic"][row], self.dynamic_weights[row]),
            of(self._corners["static"], self.static_weights),
        ]
        return landmarks.from_68(np.concatenate(parts, axis=-2))


_TENSORS = (
    *("v_template", "shapedirs", "posedirs", "J_regressor", "weights", "parents", "faces", "full_faces"),
    *("full_weights", "static_faces", "static_weights", "dynamic_faces", "dynamic_weights"),
)


def contour_row(yaw: float) -> int:
    """The row of FLAME's table of contours for a yaw in degrees: 0…39 as they are, −1…−39 behind them.

    Further than that the head shows nothing new, so the last row stays."""
    whole = int(np.rint(np.clip(yaw, -FURTHEST, FURTHEST)))
    return whole if whole >= 0 else FURTHEST - whole


def read(model: Path, embedding: Path) -> FlameHeadModel:
    """FLAME's generic_model.pkl and DECA's landmark_embedding.npy → a head model.

    Raises InputError where a file is damaged, lacks an entry or names what such a file must not.
    """
    entries = _entries(load_pickle(model), model, _MODEL_SHAPES)
    vertices = len(entries["v_template"])
    marks = _entries(load_npy(embedding), embedding, _EMBEDDING_SHAPES)
    directions = entries["shapedirs"]
    if directions.shape[2] < EXPRESSION_START + NUM_EXPRESSION:
        raise InputError(
            f"{model.name} has {directions.shape[2]} shape directions, FLAME's has 300 of shape and up to 100 of "
            "expression: give the generic_model.pkl of FLAME 2020."
        )
    sizes = {name: len(entries[name]) for name in ("shapedirs", "posedirs", "weights")}
    sizes |= {"J_regressor": entries["J_regressor"].shape[1], "f": int(entries["f"].max()) + 1}
    for name, size in sizes.items():
        if size > vertices or (size < vertices and name != "f"):
            raise InputError(f"{model.name}: {name} is of {size} vertices, the template of {vertices}.")
    triangles = len(entries["f"])
    for name in ("full_lmk_faces_idx", "static_lmk_faces_idx", "dynamic_lmk_faces_idx"):
        if marks[name].min() < 0 or marks[name].max() >= triangles:
            raise InputError(
                f"{embedding.name} and {model.name} do not belong together: {name} goes past its {triangles} triangles."
            )
    parents = entries["kintree_table"][0].astype(np.int64)
    parents[0] = -1  # stored as the largest unsigned number
    kept = [*range(NUM_SHAPE), *range(EXPRESSION_START, EXPRESSION_START + NUM_EXPRESSION)]
    head = FlameHeadModel(
        v_template=entries["v_template"].astype(np.float32),
        shapedirs=directions[:, :, kept].astype(np.float32),
        posedirs=entries["posedirs"].astype(np.float32),
        J_regressor=entries["J_regressor"].astype(np.float32),
        weights=entries["weights"].astype(np.float32),
        parents=parents,
        faces=entries["f"].astype(np.int64),
        full_faces=marks["full_lmk_faces_idx"].reshape(68).astype(np.int64),
        full_weights=marks["full_lmk_bary_coords"].reshape(68, 3).astype(np.float32),
        static_faces=marks["static_lmk_faces_idx"].astype(np.int64),
        static_weights=marks["static_lmk_bary_coords"].astype(np.float32),
        dynamic_faces=marks["dynamic_lmk_faces_idx"].astype(np.int64),
        dynamic_weights=marks["dynamic_lmk_bary_coords"].astype(np.float32),
    )
    check_frame(head.mean, model.name)
    return head


_MODEL_SHAPES = {
    "v_template": (None, 3),
    "shapedirs": (None, 3, None),
    "posedirs": (None, 3, 36),
    "J_regressor": (5, None),
    "weights": (None, 5),
    "kintree_table": (2, 5),
    "f": (None, 3),
}
_EMBEDDING_SHAPES = {
    "full_lmk_faces_idx": (1, 68),
    "full_lmk_bary_coords": (1, 68, 3),
    "static_lmk_faces_idx": (51,),
    "static_lmk_bary_coords": (51, 3),
    "dynamic_lmk_faces_idx": (2 * FURTHEST + 1, 17),
    "dynamic_lmk_bary_coords": (2 * FURTHEST + 1, 17, 3),
}


def _entries(loaded: Any, source: Path, shapes: Mapping[str, tuple[int | None, ...]]) -> dict[str, np.ndarray]:
    if not isinstance(loaded, dict):
        raise InputError(f"{source.name} holds a {type(loaded).__name__} where a dictionary was expected.")
    found = {}
    for name, shape in shapes.items():
        if name not in loaded:
            raise InputError(f"{source.name} has no {name}: it is not the file that was asked for.")
        value = found[name] = array(loaded[name], source, name)
        fits = len(value.shape) == len(shape) and all(w in (None, n) for w, n in zip(shape, value.shape, strict=True))
        if not fits:
            wanted = " × ".join("n" if want is None else str(want) for want in shape)
            raise InputError(f"{source.name}: {name} is {' × '.join(map(str, value.shape))}, expected {wanted}.")
    return found


def _rotations(pose: np.ndarray) -> np.ndarray:
    return Rotation.from_rotvec(pose).as_matrix()


def _coefficients(identity: np.ndarray, expression: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A head's coefficients → FLAME's: betas (K,), and pose (5, 3), in which only the jaw turns."""
    pose = np.zeros((5, 3))
    pose[JAW] = expression[-3:]
    return np.concatenate([identity, expression[:-3]]), pose

"""The files in which the authors of GNM, ICT-FaceKit, FLAME and DECA publish their models, in small: same names,
same entries and dtypes, same pickled classes; another head (simulated_heads) with few vertices."""

import io
import json
import pickle
import struct
import sys
import types
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
import scipy.sparse
import simulated_heads
import torch

from facesnap.heads.deca import DecaEncoder
from facesnap.landmarks import to_68

CORNERS = np.array([[1, 0.2, -0.1], [-0.8, 0.7, 0.1], [-0.2, -0.9, 0.05]])  # of a triangle about its landmark
BARYCENTRIC = np.array([0.3, 0.45, 0.25])
METRES = 0.045  # per unit of simulated_heads
VERTICES = 3 * 68 + 5  # three for each landmark, and one at each joint of FLAME
JOINTS = np.array([[0, -2.5, -1.5], [0, -1.5, -1.2], [0, -0.6, -0.9], [-0.68, 0, -0.2], [0.68, 0, -0.2]])


def mesh(points72: np.ndarray) -> np.ndarray:
    """Points (..., 72, 3) → vertices (..., 209, 3) whose triangles have them at BARYCENTRIC."""
    points = to_68(points72)
    corners = 0.02 * (CORNERS - BARYCENTRIC @ CORNERS)
    spread = (points[..., None, :] + corners).reshape(*points.shape[:-2], 204, 3)
    return np.concatenate([spread, np.broadcast_to(JOINTS, (*points.shape[:-2], 5, 3))], axis=-2)


def moves(count: int, seed: int) -> np.ndarray:
    """Ways (count, 209, 3) in which people differ, of which the joints know nothing."""
    people = simulated_heads.people(count + 1, seed)
    return mesh(people[1:]) - mesh(people[:1])


# ---------------------------------------------------------------------- GNM


def write_gnm(folder: Path, *, jaw_backwards: bool = True, identities: int = 6, **changes) -> tuple[Path, Path]:
    """gnm_head.npz and head_sparse_68.txt; changes replace entries of the first, None leaves one out."""
    entries = {
        "template_vertex_positions": (METRES * mesh(simulated_heads.mean_head())).astype(np.float32),
        "vertex_identity_basis": (METRES * moves(identities, 1)).astype(np.float32),
        "expression_basis": (METRES * expression_moves()).astype(np.float32),
        "expression_names": np.array([f"lower_face_region_{k:03d}" for k in range(4)]),
        "skinning_weights": np.full((4, VERTICES), 0.25, np.float32),
        "mirror_indices": np.arange(VERTICES),
    }
    entries = {name: value for name, value in (entries | changes).items() if value is not None}
    model, marks = folder / "gnm_head.npz", folder / "head_sparse_68.txt"
    np.savez_compressed(model, **entries)
    rows = [[(3 * point + corner, BARYCENTRIC[corner]) for corner in range(3)] for point in range(68)]
    if jaw_backwards:
        rows[2:7] = rows[6:1:-1]
    marks.write_text("\n".join(" ".join(f"{i} {w:.6f}" for i, w in row) for row in rows) + "\n")
    return model, marks


def expression_moves() -> np.ndarray:
    mean = simulated_heads.mean_head()
    return mesh(mean + simulated_heads.expression_offsets()) - mesh(mean)


# ---------------------------------------------------------------------- ICT-FaceKit


def write_ict(folder: Path, *, identities: int = 3) -> np.ndarray:
    """FaceXModel; returns where the 68 points of the neutral head are, (68, 3)."""
    from facesnap.heads.ict import LEFT_JAW, RIGHT_JAW

    folder.mkdir()
    rows = np.arange(5000, 5068)  # past the jaw's vertices, which ICT's topology fixes
    used = rows.copy()
    used[0:8], used[9:17] = LEFT_JAW, RIGHT_JAW
    mean = simulated_heads.mean_head()
    expressions = {"browDown_L": 0, "jawOpen": 1, "mouthSmile_L": 2}
    people = simulated_heads.people(identities, seed=4)
    meshes = {"generic_neutral_mesh": mean}
    meshes |= {f"identity{k:03d}": head for k, head in enumerate(people)}
    meshes |= {name: mean + simulated_heads.expression_offsets()[k] for name, k in expressions.items()}
    for name, points in meshes.items():
        vertices = np.zeros((5100, 3))
        vertices[used] = 4.5 * to_68(points)
        lines = ["# ICT FaceKit", "mtllib ICTFaceModelMaterial.mtl"]
        lines += [f"v {x:.6g} {y:.6g} {z:.6g}" for x, y, z in vertices]
        lines += ["vt 0.5 0.5", "usemtl M_Face", "f 1/1 2/1 3/1 4/1"]
        (folder / f"{name}.obj").write_text("\n".join(lines) + "\n")
    config = {
        "expressions": list(expressions),
        "fitting_expressions": list(expressions),
        "idx_to_landmark_verts": rows.tolist(),
        "idx_to_rigid_landmark_idx": [0, 36, 39],
    }
    (folder / "vertex_indices.json").write_text(json.dumps(config))
    return 4.5 * to_68(mean)


# ---------------------------------------------------------------------- FLAME


def flame_entries(seed: int = 0) -> dict[str, np.ndarray]:
    """What generic_model.pkl holds, as arrays: six ways to differ and three expressions that mean something."""
    rng = np.random.default_rng(seed)
    template = METRES * mesh(simulated_heads.mean_head())
    shapedirs = np.zeros((VERTICES, 3, 400))
    shapedirs[..., :6] = METRES * np.moveaxis(moves(6, 2), 0, -1)
    shapedirs[-5:, :, :6] = 0.001 * rng.standard_normal((5, 3, 6))  # joints move with the shape, too
    shapedirs[..., 300:303] = METRES * np.moveaxis(expression_moves()[[0, 2, 3]], 0, -1)
    regressor = np.zeros((5, VERTICES))
    regressor[np.arange(5), 204 + np.arange(5)] = 0.9
    regressor[:, 90] = 0.1
    y = np.repeat(to_68(simulated_heads.mean_head())[:, 1], 3)
    jaw = np.append(np.clip(-1.15 - y, 0, 0.2) / 0.2, np.zeros(5))  # what is below the lips hangs on the jaw
    weights = np.stack([0.1 * (1 - jaw), 0.9 * (1 - jaw), jaw, 0 * jaw, 0 * jaw], axis=1)
    triangles = np.arange(204).reshape(68, 3)
    return {
        "v_template": template,
        "shapedirs": shapedirs,
        "posedirs": 0.0005 * rng.standard_normal((VERTICES, 3, 36)),
        "J_regressor": regressor,
        "weights": weights,
        "kintree_table": np.array([[2**32 - 1, 0, 1, 1, 1], range(5)], dtype=np.uint32),
        "f": triangles.astype(np.uint32),
    }


def write_flame(path: Path, **changes) -> Path:
    """generic_model.pkl: pickled as Python 2 did, arrays inside chumpy's objects; None leaves an entry out."""
    entries = flame_entries() | changes
    with chumpy():
        stored = {name: value for name, value in entries.items() if value is not None}
        for name in ("v_template", "weights"):
            if isinstance(stored.get(name), np.ndarray):
                stored[name] = Ch(stored[name])
        if isinstance(stored.get("shapedirs"), np.ndarray):
            dirs = stored["shapedirs"]
            stored["shapedirs"] = Select(Ch(dirs[..., ::-1]), np.arange(dirs.size).reshape(dirs.shape)[..., ::-1])
        if isinstance(stored.get("J_regressor"), np.ndarray):
            stored["J_regressor"] = scipy.sparse.csc_matrix(stored["J_regressor"])
        stored |= {"bs_style": "lbs", "bs_type": "lrotmin"}
        with path.open("wb") as file:
            Python2Pickler(file, protocol=2).dump(stored)
    return path


class Python2Pickler(pickle._Pickler):
    """Writes bytes as Python 2 wrote its strings."""

    dispatch = dict(pickle._Pickler.dispatch)

    def save_bytes(self, value: bytes) -> None:
        self.write(pickle.BINSTRING + struct.pack("<i", len(value)) + value)

    dispatch[bytes] = save_bytes


class Ch:
    """As chumpy's class of that name is pickled."""

    def __init__(self, x):
        self.x, self._dirty_vars, self._itr = x, {"x"}, None


class Select:
    """As chumpy's: some entries of another object, in a shape."""

    def __init__(self, a, idxs):
        self.a, self.idxs, self.preferred_shape = a, idxs.ravel(), idxs.shape


@contextmanager
def chumpy():
    """While it lasts, pickle takes Ch and Select for chumpy's."""
    homes = {"chumpy": None, "chumpy.ch": Ch, "chumpy.reordering": Select}
    for name, kind in homes.items():
        module = sys.modules[name] = types.ModuleType(name)
        if kind is not None:
            kind.__module__ = name
            setattr(module, kind.__name__, kind)
    try:
        yield
    finally:
        for name in homes:
            del sys.modules[name]


def write_embedding(path: Path, **changes) -> Path:
    """landmark_embedding.npy: a dictionary pickled in an array, two of its entries torch tensors."""
    rng = np.random.default_rng(3)
    moving = rng.dirichlet([3, 3, 3], (79, 17)).astype(np.float32)
    every = np.broadcast_to(BARYCENTRIC.astype(np.float32), (1, 68, 3)).copy()
    entries = {
        "static_lmk_faces_idx": np.arange(17, 68),
        "static_lmk_bary_coords": every[0, 17:].astype(np.float64),
        "dynamic_lmk_faces_idx": torch.arange(17).repeat(79, 1),
        "dynamic_lmk_bary_coords": torch.from_numpy(moving),
        "full_lmk_faces_idx": np.arange(68)[None],
        "full_lmk_bary_coords": every,
    }
    np.save(path, entries | changes, allow_pickle=True)
    return path


def tiny_encoder(seed: int = 0) -> DecaEncoder:
    """DECA's encoder, 1/32 as wide, whose codes of `soft_picture`s are of the size of real ones."""
    torch.manual_seed(seed)
    encoder = DecaEncoder(width=2, blocks=(1, 2, 1, 1), hidden=16).eval()
    pictures = torch.stack([torch.from_numpy(soft_picture(k, (224, 224))) for k in range(8)]).permute(0, 3, 1, 2) / 255
    last = encoder.layers[2]
    with torch.no_grad():
        encoder.train()(pictures)  # gives the normalisations their statistics
        encoder.eval()
        last.bias.zero_()
        codes = encoder.layers(encoder.encoder(pictures))
        size = torch.ones(236)
        size[200:206], size[206:209] = 0.15, 0.02  # pose in radians, camera
        last.weight *= (size / codes.std(dim=0))[:, None]
        last.bias -= codes.mean(dim=0) * size / codes.std(dim=0)
        last.bias[206] += 8.0  # scale
    return encoder.requires_grad_(False)


def soft_picture(seed: int, size: tuple[int, int]) -> np.ndarray:
    """A smooth random RGB picture (h, w, 3) uint8."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return cv2.resize(coarse, size[::-1], interpolation=cv2.INTER_CUBIC)


def write_deca(path: Path, encoder: DecaEncoder, **changes) -> Path:
    """deca_model.tar: a torch.save of three state dicts."""
    state = {name: value.clone() for name, value in encoder.state_dict().items()}
    torch.save({"E_flame": state, "E_detail": {}, "D_detail": {}} | changes, path)
    return path


# ---------------------------------------------------------------------- a pickle that would do something


class Payload:
    """Creates the file `path` where it is unpickled without restraint."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


class StorageWithPayload:
    """A tensor's storage, as torch pickles it inside other pickles, that is no storage but a payload."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        inner = io.BytesIO()
        torch.save(Payload(self.path), inner)
        return torch.storage._load_from_bytes, (inner.getvalue(),)

"""Every head backend as the convert command makes it of its authors' files (head_files.py). Fixtures; conftest.py makes
them known to all tests."""

from types import SimpleNamespace

import head_files as files
import numpy as np
import pytest

from facesnap.heads import FlameHeadModel, Head, from_pretrained, rotation_from_euler
from facesnap.heads.__main__ import main as command
from facesnap.heads.deca import DecaHeadModel

SIZE = (300, 400)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Every backend as the convert command makes it of its authors' files."""
    raw, out = tmp_path_factory.mktemp("raw"), tmp_path_factory.mktemp("heads")
    model, marks = files.write_gnm(raw)
    files.write_ict(raw / "FaceXModel")
    pickled, embedding = files.write_flame(raw / "generic_model.pkl"), files.write_embedding(raw / "embedding.npy")
    tar = files.write_deca(raw / "deca_model.tar", files.tiny_encoder())
    flame = ["flame", "--model", pickled, "--embedding", embedding]
    for name, words in {
        "gnm": ["gnm", "--model", model, "--landmarks", marks],
        "ict": ["ict", "--model", raw / "FaceXModel"],
        "flame": flame,
        "moving": [*flame, "--contour", "moving"],
        "deca": [*flame, "--deca", tar],
    }.items():
        command(["convert", *map(str, words), "--out", str(out / name)])
    return out


@pytest.fixture(scope="session")
def flame(folders) -> FlameHeadModel:
    return from_pretrained(folders / "flame")


@pytest.fixture(scope="session")
def deca(folders) -> DecaHeadModel:
    return from_pretrained(folders / "deca")


def some_head(model, seed: int, **parts) -> Head:
    """A head that uses the first coefficients, which are those of the files that mean something."""
    rng = np.random.default_rng(seed)
    identity, expression = np.zeros(model.num_identity), np.zeros(model.num_expression)
    identity[:6] = rng.standard_normal(6)[: model.num_identity]
    expression[:3] = rng.uniform(0, 0.8, 3)
    rotation = rotation_from_euler(*rng.uniform(-20, 20, 3))
    rest = {"scale": 90 / model.eye_distance, "translation": np.array([200.0, 140]), "size": SIZE}
    return Head(**{"identity": identity, "expression": expression, "rotation": rotation, **rest, **parts})


def face(seed: int, span: float = 120, corner=(150, 80)) -> SimpleNamespace:
    """What DECA needs of a face: a picture, and landmarks that say where to look."""
    rng = np.random.default_rng(seed)
    image = files.soft_picture(seed, SIZE)
    points = np.column_stack([rng.uniform(0, span, (68, 2)) + corner, np.zeros(68)])
    return SimpleNamespace(image=image, landmarks=points, size=SIZE)

"""GNM and ICT-FaceKit read from files of their authors' formats; one predictor for all kinds of head."""

import json
from dataclasses import replace
from types import SimpleNamespace

import head_files as files
import numpy as np
import pytest
import simulated_heads
from converted_heads import SIZE, face, some_head

from facesnap import landmarks
from facesnap.errors import InputError
from facesnap.heads import FlameHeadModel, from_pretrained, gnm, ict
from facesnap.heads.__main__ import main as command
from facesnap.predictor import LandmarkPredictor


def test_gnm_has_the_heads_of_its_file(folders):
    head = from_pretrained(folders / "gnm")
    mean = files.METRES * simulated_heads.mean_head()
    assert np.allclose(landmarks.to_68(head.mean), landmarks.to_68(mean), atol=1e-5)
    people = simulated_heads.people(7, seed=1)
    second = landmarks.to_68(files.METRES * (people[2] - people[0]))
    assert np.allclose(landmarks.to_68(head.identity_basis[1]), second, atol=1e-5)
    assert head.expression_names[1] == "lower_face_region_001"
    assert head.num_identity == 6 and (head.identity_std == 1).all()


def test_gnm_jaw_is_put_in_order_whichever_way_the_file_has_it(tmp_path):
    heads = []
    for backwards in (True, False):
        (tmp_path / str(backwards)).mkdir()
        heads.append(gnm.read(*files.write_gnm(tmp_path / str(backwards), jaw_backwards=backwards)))
    assert np.array_equal(heads[0].mean, heads[1].mean)
    assert np.array_equal(heads[0].identity_basis, heads[1].identity_basis)
    backwards = np.r_[0, 1, 6:1:-1, 7:68]
    points = landmarks.to_68(simulated_heads.mean_head())
    assert gnm.jaw_order(points[backwards]).tolist() == backwards.tolist()


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"expression_basis": None}, "gnm_head.npz has no expression_basis"),
        ({"vertex_identity_basis": np.zeros((4, 30, 3), np.float32)}, r"vertex_identity_basis is \(4, 30, 3\)"),
        ({"template_vertex_positions": np.zeros((files.VERTICES, 3))}, "not iBUG's of an upright head"),
        ({"expression_names": np.array([{}], dtype=object)}, "cannot be read"),  # a pickle inside
    ],
)
def test_gnm_of_another_form_is_refused(tmp_path, changes, said):
    with pytest.raises(InputError, match=said):
        gnm.read(*files.write_gnm(tmp_path, **changes))


def test_gnm_landmarks_that_do_not_fit_are_refused(tmp_path):
    model, marks = files.write_gnm(tmp_path)
    lines = marks.read_text().splitlines()
    for text, said in (
        ("\n".join(lines[:60]), "68 lines"),
        ("\n".join(["99999 1 0 0 0 0", *lines[1:]]), "vertices past"),
        ("index weight", "no table|not a table"),
    ):
        marks.write_text(text)
        with pytest.raises(InputError, match=said):
            gnm.read(model, marks)


def test_ict_meshes_are_absolute_and_expressions_are_blendshapes(tmp_path, folders):
    neutral = files.write_ict(tmp_path / "FaceXModel")
    head = ict.read(tmp_path / "FaceXModel")
    assert np.allclose(landmarks.to_68(head.mean), neutral, atol=1e-4)
    opened = landmarks.to_68(4.5 * simulated_heads.expression_offsets()[1])
    assert np.allclose(landmarks.to_68(head.expression_basis[1]), opened, atol=1e-4)
    assert head.expression_names == ("browDown_L", "jawOpen", "mouthSmile_L") and head.nonnegative_expression
    assert np.array_equal(from_pretrained(folders / "ict").identity_basis, head.identity_basis)


def test_ict_folders_with_something_missing_are_refused(tmp_path):
    folder = tmp_path / "FaceXModel"
    files.write_ict(folder)
    mesh = folder / "jawOpen.obj"
    whole = mesh.read_text()
    mesh.write_text(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"jawOpen.obj has \d+ vertices, its landmarks want 5068"):
        ict.read(folder)
    mesh.write_text(whole.replace("v 0 0 0\n", "v 0 0\n", 1).replace("v ", "v x", 5068))
    with pytest.raises(InputError, match="jawOpen.obj is damaged"):
        ict.read(folder)
    mesh.unlink()
    with pytest.raises(InputError, match="no jawOpen.obj"):
        ict.read(folder)
    (folder / "vertex_indices.json").write_text('{"expressions": []}')
    with pytest.raises(InputError, match="vertex_indices.json cannot be read"):
        ict.read(folder)


# one predictor for all ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gnm", "ict", "flame", "moving", "deca"])
def test_shape_of_one_pose_and_expression_of_another(folders, kind):
    predictor = LandmarkPredictor(from_pretrained(folders / kind))
    model = predictor.model
    if kind == "deca":
        faces = [face(1), face(2)]
    else:
        heads = [some_head(model, seed) for seed in (1, 2)]
        faces = [SimpleNamespace(landmarks=landmarks.to_68(model.project(head)), size=SIZE) for head in heads]
    shape, driver = (predictor.reconstruct(one)[0] for one in faces)
    points = predictor.predict(shape, driver, SIZE)
    assert points.shape == (72, 2) and points.dtype == np.float32 and np.isfinite(points).all()
    assert np.allclose(points, model.project(replace(driver, identity=shape.identity)), atol=1e-3)
    copied = model.project(driver)
    assert np.abs(points - copied).max() > 1  # the shape is the reference's
    assert np.linalg.norm(points.mean(0) - copied.mean(0)) < 25  # at the driver's place


@pytest.mark.parametrize("kind", ["gnm", "ict", "flame", "deca"])
def test_numbers_drive_every_model(folders, kind):
    predictor = LandmarkPredictor(from_pretrained(folders / kind))
    name = predictor.model.expression_names[-1]
    head = predictor.from_numbers(yaw=20, head_size=0.4, size=(512, 512), expression={name: 0.1})
    points = predictor.model.project(head)
    assert np.ptp(points[:, 1]) == pytest.approx(0.4 * 512, rel=0.2)
    assert ((points > 0) & (points < 512)).all()


def test_a_checkpoint_brings_its_own_kind_of_head(folders, flame, tmp_path, tiny_readers):
    from tiny import photo, tiny_pipeline

    from facesnap.pipeline import FaceSnapPipeline

    pipe = tiny_pipeline(head_model=flame)
    pipe.save_pretrained(tmp_path / "checkpoint")
    again = FaceSnapPipeline.from_pretrained(tmp_path / "checkpoint")
    assert type(again.head_model) is FlameHeadModel
    for pose in (None, "three-quarter-left", photo(2)):
        before, after = (p.preview(photo(1), pose).landmarks for p in (pipe, again))
        assert np.array_equal(before, after) and np.isfinite(after).all()


def test_a_head_folder_says_its_kind(folders, tmp_path):
    with pytest.raises(InputError, match="no head model in"):
        from_pretrained(tmp_path)
    config = json.loads((folders / "ict" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"_class_name": "Basel"}))
    with pytest.raises(InputError, match="kind 'Basel'"):
        from_pretrained(tmp_path)


def test_convert_says_what_is_missing_or_in_the_way(folders, tmp_path):
    words = ["convert", "ict", "--model", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="There is no .*nowhere"):
        command(words)
    files.write_ict(tmp_path / "FaceXModel")
    words[3], words[5] = str(tmp_path / "FaceXModel"), str(folders / "ict")
    with pytest.raises(SystemExit, match="not empty"):
        command(words)

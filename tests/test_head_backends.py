"""GNM, ICT-FaceKit, FLAME and DECA: read from files of their authors' formats, and used by the predictor."""

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import head_files as files
import numpy as np
import pytest
import simulated_heads
import torch
from scipy.linalg import expm
from scipy.ndimage import map_coordinates

from facesnap import landmarks
from facesnap.errors import InputError
from facesnap.heads import FlameHeadModel, Head, from_pretrained, gnm, ict, rotation_from_euler
from facesnap.heads import deca as deca_module
from facesnap.heads import flame as flame_module
from facesnap.heads.__main__ import main as command
from facesnap.heads.deca import DecaHeadModel
from facesnap.heads.flame import JAW, contour_row
from facesnap.predictor import LandmarkPredictor

SIZE = (300, 400)


@pytest.fixture(scope="module")
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


@pytest.fixture(scope="module")
def flame(folders) -> FlameHeadModel:
    return from_pretrained(folders / "flame")


@pytest.fixture(scope="module")
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


# ---------------------------------------------------------------- linear models


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


# ---------------------------------------------------------------- FLAME


def test_flame_is_read_from_chumpys_objects_without_chumpy(flame):
    entries = files.flame_entries()
    assert "chumpy" not in sys.modules
    assert np.allclose(flame.v_template, entries["v_template"])
    assert np.allclose(flame.J_regressor, entries["J_regressor"])
    assert np.allclose(flame.shapedirs[..., :100], entries["shapedirs"][..., :100])
    assert np.allclose(flame.shapedirs[..., 100:], entries["shapedirs"][..., 300:350])
    assert flame.parents.tolist() == [-1, 0, 1, 1, 1]
    assert (flame.num_identity, flame.num_expression) == (100, 53)


def test_skinning_is_a_chain_of_rigid_motions(flame):
    """Said again, slowly: for each vertex the weighted sum of 4 × 4 matrices that undo the rest pose and follow
    the joints from the root."""
    entries, rng = files.flame_entries(), np.random.default_rng(0)
    betas, pose = rng.standard_normal(150), 0.4 * rng.standard_normal((5, 3))
    dirs = np.concatenate([entries["shapedirs"][..., :100], entries["shapedirs"][..., 300:350]], axis=-1)
    shaped = entries["v_template"] + dirs @ betas
    joints = entries["J_regressor"] @ shaped
    rotations = [expm(np.cross(np.eye(3), axis)) for axis in pose]
    feature = np.concatenate([(r - np.eye(3)).ravel() for r in rotations[1:]])
    rest = shaped + entries["posedirs"] @ feature

    def motion(joint: int) -> np.ndarray:
        about = np.eye(4)
        about[:3, :3] = rotations[joint]
        about[:3, 3] = joints[joint] - rotations[joint] @ joints[joint]
        parent = {0: None, 1: 0, 2: 1, 3: 1, 4: 1}[joint]
        return about if parent is None else motion(parent) @ about

    motions = np.stack([motion(joint) for joint in range(5)])
    expected = [
        (np.tensordot(weight, motions, 1) @ np.append(vertex, 1))[:3]
        for weight, vertex in zip(entries["weights"], rest, strict=True)
    ]
    assert np.allclose(flame.skin(betas, pose), expected, atol=1e-7)  # float32 on the disk


def test_landmarks_are_points_of_the_mesh(flame):
    head = some_head(flame, 1)
    head.expression[-3:] = 0.2, 0.05, -0.03
    vertices = flame.vertices(head.identity, head.expression)
    by_hand = np.einsum("lca,c->la", vertices[:204].reshape(68, 3, 3), files.BARYCENTRIC)
    assert np.allclose(landmarks.to_68(flame.points(head.identity, head.expression)), by_hand, atol=1e-7)


def test_the_jaw_opens_the_mouth_and_moves_nothing_above_it(flame):
    closed, opened = np.zeros(53), np.zeros(53)
    opened[flame.expression_names.index("jaw_open")] = 0.25
    moved = flame.points(np.zeros(100), opened) - flame.mean
    still = replace(flame, posedirs=np.zeros_like(flame.posedirs))
    assert moved[8, 1] < -0.05 * flame.face_height  # the chin goes down
    lifted = still.points(np.zeros(100), opened) - still.points(np.zeros(100), closed)
    assert np.abs(lifted[17:52]).max() < 1e-12  # brows, eyes, nose
    assert np.abs(moved[17:52]).max() > 0  # save for the pose correctives


def test_the_tangent_touches(flame):
    head = some_head(flame, 2)
    head.expression[-3:] = 0.3, 0.02, 0.01
    mean, identity_basis, expression_basis = flame.tangent(head.identity, head.expression)

    def linear(identity, expression):
        return mean + np.tensordot(identity, identity_basis, 1) + np.tensordot(expression, expression_basis, 1)

    there = flame.points(head.identity, head.expression)
    assert np.allclose(linear(head.identity, head.expression), there, atol=1e-12)
    rng = np.random.default_rng(2)
    for step in (0.1, 0.05):
        identity, expression = head.identity + step, head.expression + step * rng.standard_normal(53)
        expression[-3:] = head.expression[-3:]
        assert np.allclose(linear(identity, expression), flame.points(identity, expression), atol=1e-9)
    errors = []
    for step in (0.04, 0.02):  # of the jaw the tangent is the first order only
        expression = head.expression + step * np.eye(53)[50]
        errors.append(np.abs(linear(head.identity, expression) - flame.points(head.identity, expression)).max())
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.1)


def test_flame_is_fitted_to_landmarks_jaw_included(flame):
    true = some_head(flame, 3)
    true.expression[-3:] = 0.3, 0, 0
    found = flame.fit(flame.project(true), SIZE, noise=1e-4, iterations=12)[0]
    error = np.linalg.norm(flame.project(found) - flame.project(true), axis=1).mean() / 90
    assert error < 0.003
    assert np.allclose(found.angles, true.angles, atol=1.5)
    shift = flame.points(found.identity, found.expression) - flame.points(true.identity, true.expression)
    shift -= shift.mean(axis=0)
    assert np.linalg.norm(shift, axis=1).mean() < 0.05 * flame.eye_distance


@pytest.mark.parametrize(
    "yaw, row", [(0, 0), (0.4, 0), (7.6, 8), (39, 39), (70, 39), (-0.6, 40), (-39, 78), (-38.4, 77), (-80, 78)]
)
def test_rows_of_the_moving_contour(yaw, row):
    assert contour_row(yaw) == row


def test_the_moving_contour_moves_the_contour_only(folders, flame):
    moving = from_pretrained(folders / "moving")
    assert moving.contour == "moving"
    head = some_head(flame, 4, rotation=rotation_from_euler(yaw=-25.3, pitch=5))
    fixed_points, moving_points = flame.project(head), moving.project(head)
    inside = np.setdiff1d(np.arange(72), landmarks.GROUPS["contour"])
    assert np.allclose(fixed_points[inside], moving_points[inside], atol=1e-3)
    vertices = flame.vertices(head.identity, head.expression)[:51].reshape(17, 3, 3)
    by_hand = np.einsum("lca,lc->la", vertices, flame.dynamic_weights[39 + 25])
    expected = head.scale * (by_hand @ head.rotation.T)[:, :2] * [1, -1] + head.translation
    assert np.allclose(moving_points[list(landmarks.GROUPS["contour"])], expected, atol=1e-3)


# ---------------------------------------------------------------- DECA


def test_the_encoders_layout_is_decas():
    """Names and sizes of the published E_flame, 50 layers and 236 codes."""
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in deca_module.DecaEncoder().state_dict().items()}
    assert shapes["encoder.conv1.weight"] == (64, 3, 7, 7)
    assert shapes["encoder.layer1.0.downsample.0.weight"] == (256, 64, 1, 1)
    assert shapes["encoder.layer4.2.conv3.weight"] == (2048, 512, 1, 1)
    assert shapes["encoder.layer3.5.bn2.running_var"] == (256,)
    assert shapes["layers.0.weight"] == (1024, 2048) and shapes["layers.2.bias"] == (236,)
    assert sum("conv" in name for name in shapes) == 49
    assert not any("fc" in name for name in shapes)
    assert list(deca_module.CODES.items())[:4] == [("shape", 100), ("tex", 50), ("exp", 50), ("pose", 6)]


def test_strides_are_in_the_middle_convolution():
    """torchvision's form of ResNet-50, which DECA's weights are of: the 3 × 3 convolution strides."""
    block = deca_module.Bottleneck(8, 4, 2)
    assert block.conv1.stride == (1, 1) and block.conv2.stride == (2, 2)


@pytest.mark.parametrize("corner, span", [((150, 80), 120), ((-40, 200), 150)])
def test_deca_reads_a_picture_as_its_formulas_say(deca, corner, span):
    """Window, codes, FLAME turned about its root, camera and way back to the picture, said again."""
    seen = face(5, span, corner)
    low, high = seen.landmarks[:, :2].min(0), seen.landmarks[:, :2].max(0)
    side = int((high - low).mean() * 1.1 * 1.25)
    start = (low + high) / 2 - side / 2
    y, x = np.mgrid[:224, :224] * side / 223
    channels = np.moveaxis(seen.image / 255.0, -1, 0)
    crop = [map_coordinates(c, [y + start[1], x + start[0]], order=1, mode="grid-constant") for c in channels]
    with torch.no_grad():
        flat = deca.encoder.layers(deca.encoder.encoder(torch.tensor(np.stack(crop))[None].float()))[0].double().numpy()
    shape, expression, pose, camera = flat[:100], flat[150:200], flat[200:206], flat[206:209]
    turned = np.zeros((5, 3))
    turned[0], turned[JAW] = pose[:3], pose[3:]
    vertices = deca.skin(np.concatenate([shape, expression]), turned)
    points = np.einsum("lca,c->la", vertices[:204].reshape(68, 3, 3), files.BARYCENTRIC)
    projected = camera[0] * (points[:, :2] + camera[1:]) * [1, -1]
    in_picture = (projected + 1) * 112 * side / 223 + start
    head = deca.reconstruct([seen])[0]
    assert head.size == SIZE
    assert np.abs(landmarks.to_68(deca.project(head)) - in_picture).max() < 0.01
    assert np.ptp(in_picture) > 20  # the codes are of a head that fills some of the window


def test_several_pictures_have_one_identity(deca):
    faces = [face(6), face(7)]
    heads, alone = deca.reconstruct(faces), [deca.reconstruct([one])[0] for one in faces]
    assert np.array_equal(heads[0].identity, heads[1].identity)
    assert np.allclose(heads[0].identity, (alone[0].identity + alone[1].identity) / 2, atol=0.01)
    assert np.allclose(heads[1].expression, alone[1].expression, atol=0.01)
    assert not np.allclose(alone[0].expression, alone[1].expression, atol=0.1)


def test_deca_asks_for_the_picture(deca):
    seen = face(8)
    seen.image = None
    with pytest.raises(InputError, match="kept without one"):
        deca.reconstruct([seen])


def test_an_encoder_with_other_keys_is_refused(tmp_path):
    encoder = files.tiny_encoder()
    state = dict(encoder.state_dict())
    one = state.pop("encoder.layer2.1.bn3.running_mean")
    for changed, said in (
        (state, "layer2.1.bn3.running_mean"),
        (encoder.state_dict() | {"encoder.fc.weight": one}, "encoder.fc.weight"),
        (encoder.state_dict() | {"layers.2.bias": torch.zeros(235)}, "layers.2.bias"),
        ({}, "encoder.conv1.weight"),
    ):
        with pytest.raises(InputError, match=f"deca_model.tar does not hold DECA's encoder.*{said}"):
            deca_module.read_encoder(files.write_deca(tmp_path / "deca_model.tar", encoder, E_flame=changed))
    with pytest.raises(InputError, match="has no E_flame"):
        deca_module.read_encoder(files.write_deca(tmp_path / "deca_model.tar", encoder, E_flame=None))


# ---------------------------------------------------------------- pickles


def forbidden(tmp_path, payload, victim):
    """The four places where a pickle comes in, each with a payload → what reads it."""
    embedding, tar, model = tmp_path / "embedding.npy", tmp_path / "deca_model.tar", tmp_path / "generic_model.pkl"
    if victim == "model":
        files.write_flame(model, bs_hidden=payload)
        return lambda: flame_module.read(model, files.write_embedding(embedding))
    if victim == "embedding":
        files.write_embedding(embedding, extra=payload)
        return lambda: flame_module.read(files.write_flame(model), embedding)
    files.write_deca(tar, files.tiny_encoder(), extra=payload)
    return lambda: deca_module.read_encoder(tar)


@pytest.mark.parametrize(
    "victim, kind",
    [
        ("model", files.Payload),
        ("embedding", files.Payload),
        ("embedding", files.StorageWithPayload),  # a pickle in a pickle
        ("tar", files.Payload),
        ("tar", files.StorageWithPayload),
    ],
)
def test_what_a_pickle_must_not_name_is_refused_by_name_and_not_run(tmp_path, victim, kind):
    made = tmp_path / "made"
    read = forbidden(tmp_path, kind(made), victim)
    name = r"(io|_io|builtins|__builtin__)\.open|torch\.storage\._load_from_bytes"
    with pytest.raises(InputError, match=f"was refused: it names ({name}), which is none"):
        read()
    assert not made.exists()


def test_the_payload_would_have_run(tmp_path):
    """Else the test above proves nothing."""
    import pickle

    for kind in (files.Payload, files.StorageWithPayload):
        made = tmp_path / kind.__name__
        stored = pickle.dumps(kind(made))
        assert not made.exists()
        pickle.loads(stored)
        assert made.exists()


def test_convert_refuses_a_forbidden_pickle_and_writes_nothing(tmp_path):
    model = files.write_flame(tmp_path / "generic_model.pkl", bs_hidden=files.Payload(tmp_path / "made"))
    embedding = files.write_embedding(tmp_path / "embedding.npy")
    words = ["convert", "flame", "--model", model, "--embedding", embedding, "--out", tmp_path / "head"]
    with pytest.raises(SystemExit, match=r"generic_model.pkl was refused: it names \w+\.open"):
        command(list(map(str, words)))
    assert not (tmp_path / "made").exists() and not (tmp_path / "head").exists()


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"posedirs": None}, "generic_model.pkl has no posedirs"),
        ({"shapedirs": np.zeros((files.VERTICES, 3, 310))}, "has 310 shape directions"),
        ({"weights": np.zeros((files.VERTICES, 4))}, "weights is 209 × 4, expected n × 5"),
        ({"posedirs": np.zeros((9, 3, 36))}, "posedirs is of 9 vertices, the template of 209"),
        ({"f": np.full((68, 3), 500, np.uint32)}, "f is of 501 vertices"),
        ({"f": np.zeros((20, 3), np.uint32)}, "do not belong together"),
        ({"v_template": -files.flame_entries()["v_template"]}, "not iBUG's of an upright head"),
        ({"v_template": {"x": 1}}, "holds v_template as objects"),
    ],
)
def test_flame_of_another_form_is_refused(tmp_path, changes, said):
    model = files.write_flame(tmp_path / "generic_model.pkl", **changes)
    with pytest.raises(InputError, match=said):
        flame_module.read(model, files.write_embedding(tmp_path / "embedding.npy"))


def test_damaged_files_are_refused(tmp_path):
    model, embedding = files.write_flame(tmp_path / "generic_model.pkl"), files.write_embedding(tmp_path / "marks.npy")
    whole = model.read_bytes()
    model.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="generic_model.pkl cannot be read"):
        flame_module.read(model, embedding)
    model.write_bytes(whole)
    embedding.write_bytes(b"no array")
    with pytest.raises(InputError, match="marks.npy cannot be read"):
        flame_module.read(model, embedding)
    np.save(embedding, np.zeros(3))
    with pytest.raises(InputError, match="marks.npy holds a ndarray where a dictionary"):
        flame_module.read(model, embedding)
    tar = tmp_path / "deca_model.tar"
    tar.write_bytes(b"no tensors")
    with pytest.raises(InputError, match="deca_model.tar cannot be read"):
        deca_module.read_encoder(tar)


def test_unknown_objects_of_chumpy_are_named(tmp_path):
    strange = files.Ch(np.zeros(3))
    del strange.x
    model = files.write_flame(tmp_path / "generic_model.pkl", posedirs=strange)
    with pytest.raises(InputError, match="holds posedirs as a chumpy.ch.Ch"):
        flame_module.read(model, files.write_embedding(tmp_path / "embedding.npy"))


# ---------------------------------------------------------------- one predictor for all


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

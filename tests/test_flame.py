"""FLAME and DECA: read from files of their authors' formats, posed, fitted, and driven by a picture."""

import sys
from dataclasses import replace

import head_files as files
import numpy as np
import pytest
import torch
from converted_heads import SIZE, face, some_head
from scipy.linalg import expm
from scipy.ndimage import map_coordinates

from facesnap import landmarks
from facesnap.errors import InputError
from facesnap.heads import deca as deca_module
from facesnap.heads import from_pretrained, rotation_from_euler
from facesnap.heads.flame import JAW, contour_row

# FLAME --------------------------------------------------------------------------------------------------


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


# DECA ---------------------------------------------------------------------------------------------------


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

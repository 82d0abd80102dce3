"""The shaded head: its surface and shading, which need no PyTorch3D, and what is said without it."""

import numpy as np
import pytest
from PIL import Image
from tiny import SIZE, photo

from facesnap import shaded, templates
from facesnap.errors import InputError
from facesnap.geometry import letterbox
from facesnap.heads import LinearHeadModel
from facesnap.web import views
from facesnap.web.request import PortraitRequest
from facesnap.web.studio import Studio

NOSE_TIP, LEFT_TEMPLE, RIGHT_TEMPLE = 30, 0, 16


@pytest.fixture(scope="module")
def model():
    from fake_hub import MINI

    return LinearHeadModel.from_pretrained(MINI / "head")


def test_surface_spans_the_face_and_faces_the_camera(model):
    faces = shaded.triangles(model)
    inner_lip = {55, 56, 63, 61, 60, 64, 70, 67}  # a closed mouth's lie on each other, and one of two is enough
    assert set(range(72)) - set(faces.ravel()) <= inner_lip
    front = shaded.vertices(model, templates.get("front").head(model, (96, 96)), (96, 96))
    assert (shaded.normals(front, faces)[:, 2] > 0).mean() > 0.9


def test_vertices_lie_on_the_landmarks_and_turn_with_the_head(model):
    size = (64, 96)
    head = templates.get("three-quarter-right").head(model, (128, 128))
    points = shaded.vertices(model, head, size)
    np.testing.assert_allclose(points[:, :2], letterbox(model.project(head), (128, 128), size))
    straight = shaded.vertices(model, templates.get("front").head(model, size), size)
    assert straight[NOSE_TIP, 2] == pytest.approx(straight[:, 2].max(), rel=0.05)
    # turned to the picture's right, the temple on the left comes nearer
    assert points[LEFT_TEMPLE, 2] > points[RIGHT_TEMPLE, 2]


def test_screen_of_pytorch3d_runs_left_and_up(model):
    corners = np.array([[-0.5, -0.5, 0.0], [95.5, 63.5, 5.0]])
    screen = shaded.to_ndc(corners, (64, 96))
    np.testing.assert_allclose(screen[:, :2], [[1.5, 1], [-1.5, -1]])
    assert screen[0, 2] > screen[1, 2] > 0  # what is near has the smaller depth


def test_preview_knows_the_head_behind_its_landmarks(pipe):
    preview = pipe.preview(photo(1), photo(2), expression_strength=0.5)
    points = shaded.vertices(pipe.head_model, preview.head, (SIZE, SIZE))
    np.testing.assert_allclose(points[:, :2], preview.landmarks, atol=1e-3)
    assert pipe.preview(photo(1), preview.landmarks).head is None


def test_the_pages_preview_shows_it_where_it_can(pipe, tmp_path, monkeypatch):
    Image.fromarray(photo(1)).save(tmp_path / "me.png")
    studio, sitting = Studio(pipe), PortraitRequest(reference=str(tmp_path / "me.png"), pose="front")
    without = studio.look(sitting)
    asked = []

    def picture(model, head, size):
        asked.append((model, head, size))
        return np.zeros((*size, 3), np.uint8)

    monkeypatch.setattr(shaded, "available", lambda: True)
    monkeypatch.setattr(shaded, "picture", picture)
    with_ = studio.look(sitting)
    assert asked == [(pipe.head_model, with_.result.head, with_.result.drawing.shape[:2])]
    assert "the head behind it" in views.preview(with_, "front")
    if without.head is None:  # PyTorch3D is not installed
        assert "the head behind it" not in views.preview(without, "front")


@pytest.mark.skipif(shaded.available(), reason="PyTorch3D is installed")
def test_without_pytorch3d_it_says_so(model):
    with pytest.raises(InputError, match="needs PyTorch3D, which is not installed"):
        shaded.picture(model, templates.get("front").head(model, (64, 64)), (64, 64))


@pytest.mark.skipif(not shaded.available(), reason="PyTorch3D is not installed")
def test_picture_covers_the_face_and_nothing_else(model):
    head = templates.get("front").head(model, (64, 64))
    seen = (shaded.picture(model, head, (64, 64)) != shaded.BACKGROUND).any(-1)
    x, y = model.project(head)[NOSE_TIP].round().astype(int)
    assert seen[y, x] and not seen[0].any() and 0.05 < seen.mean() < 0.5

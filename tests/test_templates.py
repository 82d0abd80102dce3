"""The ten pose templates."""

import io

import numpy as np
import pytest
from PIL import Image
from simulated_heads import model

from facesnap import templates
from facesnap.errors import InputError
from facesnap.web import views


@pytest.fixture(scope="module")
def heads():
    return model()


def test_there_are_ten_different_poses():
    assert len(templates.TEMPLATES) == 10
    assert len({t.name for t in templates.TEMPLATES}) == len({t.title for t in templates.TEMPLATES}) == 10
    assert len({(t.yaw, t.pitch, t.roll, t.head_size) for t in templates.TEMPLATES}) == 10


def test_names_say_what_is_drawn(heads):
    def nose(name):
        points = heads.project(templates.get(name).head(heads, (256, 256)))
        return points[30] - points[[0, 9]].mean(axis=0)

    assert nose("three-quarter-left")[0] < nose("quarter-left")[0] < -3  # towards the picture's left
    assert nose("three-quarter-right")[0] > nose("quarter-right")[0] > 3
    assert nose("looking-up")[1] < nose("front")[1] < nose("looking-down")[1]
    sizes = [np.ptp(heads.project(templates.get(n).head(heads, (256, 256))), axis=0)[1]
             for n in ("front-far", "front", "front-close")]  # fmt: skip
    assert sizes == sorted(sizes)


@pytest.mark.parametrize("size", [(256, 256), (1216, 832), (832, 1216), (1536, 512)])
def test_every_template_fits_into_any_frame(heads, size):
    for template in templates.TEMPLATES:
        points = heads.project(template.head(heads, size))
        assert (points > 0).all() and (points < size[::-1]).all(), template.name


def test_unknown_template_names_the_nearest():
    with pytest.raises(InputError, match="no pose template 'quater-left'; did you mean 'quarter-left'?"):
        templates.get("quater-left")
    with pytest.raises(InputError, match="choose front-close, front, "):
        templates.get("§")


def test_thumbnails_are_small_and_show_the_landmarks(heads):
    for template in templates.TEMPLATES[:4]:
        picture = templates.thumbnail(template, heads)
        assert picture.shape == (192, 192, 3)
        assert (picture.max(-1).astype(int) - picture.min(-1) > 100).sum() > 100  # coloured strokes
        png = io.BytesIO()
        Image.fromarray(picture).save(png, "PNG", optimize=True)
        assert len(png.getvalue()) < 10_000


def test_the_committed_thumbnails_are_those_of_the_templates():
    folder = views.THUMBNAILS
    assert {path.stem for path in folder.glob("*.png")} == {template.name for template in templates.TEMPLATES}

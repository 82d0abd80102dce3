"""The rendered people: the same seed gives the same picture, and what is said of a picture is true of it."""

import json
import re
import subprocess
import sys
import tarfile

import numpy as np
import pytest

from facesnap.landmarks import MIRROR, eye_distance
from facesnap.synthetic import captions, sample_person, sample_picture
from facesnap.synthetic.dataset import CLOTHES as CLOTHES_LABEL
from facesnap.synthetic.dataset import HAIR as HAIR_LABEL
from facesnap.synthetic.head import landmarks
from facesnap.synthetic.people import (
    BACKDROPS,
    CLOTHES,
    GLASSES,
    HATS,
    IDENTITY,
    STYLES,
)
from facesnap.synthetic.render import render

SIZE = 128
FRONT = {"pose": (0.0, 0.0, 0.0), "scale": 0.9, "shift": (0.0, 0.0)}


def plain(seed: int = 3, **attributes: str):
    """A front view without hat or glasses, as a photo."""
    attributes = {"hat": "none", "glasses": "none"} | attributes
    return sample_picture(sample_person(seed), 0, style="photo", attributes=attributes, **FRONT)


@pytest.fixture(scope="module")
def front():
    return render(plain(), SIZE)


def test_a_seed_is_a_picture() -> None:
    one, two = (render(sample_picture(sample_person(5), 2), SIZE) for _ in range(2))
    assert np.array_equal(one.image, two.image)
    assert np.array_equal(one.landmarks, two.landmarks)


def test_a_person_stays_the_same_in_every_picture() -> None:
    person = sample_person(8)
    a, b = (sample_picture(person, index).parameters for index in (0, 1))
    assert all(np.array_equal(a[name], b[name]) for name in IDENTITY)
    assert a["yaw"] != b["yaw"]


def test_giving_one_thing_leaves_the_rest_as_it_was() -> None:
    person = sample_person(8)
    drawn = sample_picture(person, 0)
    given = sample_picture(person, 0, expression="surprised", style="watercolor", attributes={"hat": "cap"})
    changed = {"smile", "mouth_open", "eyelids", "brow_raise", "hat"}
    for name in set(drawn.parameters.dtype.names) - changed:
        assert np.array_equal(drawn.parameters[name], given.parameters[name]), name


def test_landmarks_lie_on_the_face(front) -> None:
    x, y = np.round(front.landmarks).astype(int).T
    inner = np.r_[17:72]  # the contour runs along the edge of the face
    assert (front.mask[y[inner], x[inner]] == 1).mean() > 0.9
    # eyes are darker in the middle (iris) than the skin between them
    eye = front.landmarks[44:52].mean(0).round().astype(int)
    between = front.landmarks[[36 + 4, 44]].mean(0).round().astype(int)
    assert front.image[eye[1], eye[0]].sum() < front.image[between[1], between[0]].sum()


def test_a_front_view_has_mirror_symmetric_landmarks(front) -> None:
    mirrored = front.landmarks[MIRROR] * [-1, 1] + [SIZE - 1, 0]
    assert np.abs(mirrored - front.landmarks).max() < 0.02 * eye_distance(front.landmarks)


def test_yaw_turns_the_nose_to_the_pictures_right() -> None:
    person = sample_person(3)
    tips = [
        render(sample_picture(person, 0, pose=(yaw, 0.0, 0.0), shift=(0, 0), scale=0.9), SIZE).landmarks
        for yaw in (-0.5, 0.5)
    ]
    offset = [points[30, 0] - points[[36, 48], 0].mean() for points in tips]
    assert offset[0] < 0 < offset[1]


def test_expression_moves_what_it_should() -> None:
    p = plain().parameters.copy()
    p["mouth_open"], p["smile"], p["brow_raise"] = 0.0, 0.0, 0.0
    rest = landmarks(p[()])
    p["mouth_open"] = 0.8
    opened = landmarks(p[()])
    assert opened[66, 1] < rest[66, 1] - 0.05  # the lower lip sinks
    p["mouth_open"], p["brow_raise"] = 0.0, 1.0
    raised = landmarks(p[()])
    assert (raised[17:27, 1] > rest[17:27, 1] + 0.02).all()
    assert np.allclose(raised[52:], rest[52:])


def test_hats_and_glasses_are_where_the_mask_says() -> None:
    bare = render(plain(), SIZE)
    dressed = render(plain(hat="beanie", hat_color="red", glasses="square"), SIZE)
    assert not np.isin([4, 5], bare.mask).any()
    assert (dressed.mask == 5).mean() > 0.02 and (dressed.mask == 4).mean() > 0.002
    red = dressed.image[dressed.mask == 5].astype(int)
    assert (red[:, 0] > red[:, 1] + 30).mean() > 0.8


@pytest.mark.parametrize("style", STYLES)
def test_styles_change_the_picture_and_nothing_else(style, front) -> None:
    picture = sample_picture(sample_person(3), 0, style=style, attributes={"hat": "none", "glasses": "none"}, **FRONT)
    styled = render(picture, SIZE)
    assert np.array_equal(styled.landmarks, front.landmarks) and np.array_equal(styled.mask, front.mask)
    assert np.array_equal(styled.image, front.image) == (style == "photo")
    grey = np.ptp(styled.image.astype(int), axis=-1).mean()
    assert (grey < 15) == (style in ("pencil sketch", "black and white"))


def test_prompts_name_what_they_control_and_nothing_of_the_face() -> None:
    face_words = re.compile(r"\b(skin|eyes|hair|beard|moustache|goatee|stubble|freckles|bald|bob|old)\b")
    for seed in range(60):
        person = sample_person(seed)
        picture = sample_picture(person, 0)
        prompt, rich = captions(picture, 0)
        assert not face_words.search(prompt), prompt
        assert face_words.search(rich), rich
        a = picture.attributes
        assert ("glasses" in prompt) == (a["glasses"] != "none")
        assert (a["hat"] in prompt) == (a["hat"] != "none")
        if "shirt" in prompt or "jacket" in prompt:
            assert a["clothes_color"] in prompt


def test_every_attribute_of_a_picture_can_be_asked_for() -> None:
    person = sample_person(1)
    for key, values in {
        "glasses": GLASSES, "hat": HATS, "clothes_color": CLOTHES, "background_color": BACKDROPS,
    }.items():  # fmt: skip
        for value in values:
            assert sample_picture(person, 0, attributes={key: value}).attributes[key] == value


def test_the_command_writes_shards_and_goes_on_where_it_stopped(tmp_path) -> None:
    command = [
        sys.executable, "-m", "facesnap.synthetic", "--out", tmp_path, "--people", "2", "--per-person", "2",
        "--size", "64", "--seed", "7",
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    (shard,) = tmp_path.iterdir()
    with tarfile.open(shard) as tar:
        names = tar.getnames()
        told = json.load(tar.extractfile("0000008_01.json"))
    assert len(names) == 2 * 2 * 3 and told["person"] == 8 and len(told["landmarks"]) == 72
    before = shard.stat().st_mtime_ns
    subprocess.run(command, check=True, capture_output=True)
    assert shard.stat().st_mtime_ns == before


def test_pictures_from_afar_show_the_same_scene_with_a_small_head_on_a_whole_body() -> None:
    for seed in range(40, 48):
        person = sample_person(seed)
        near, far = (sample_picture(person, 0, wide=wide) for wide in (False, True))
        assert near.attributes == far.attributes and near.style == far.style
        assert near.parameters["yaw"] == far.parameters["yaw"]
        rendered = render(far, 96)
        assert 0.13 * 96 < np.ptp(rendered.landmarks[:, 1]) < 0.42 * 96
        assert (rendered.landmarks >= 0).all() and (rendered.landmarks < 96).all()
        assert (rendered.mask[-1] == CLOTHES_LABEL).any()  # the body does not end within the picture


def test_varied_people_have_hair_that_the_others_never_have_and_are_otherwise_drawn_alike() -> None:
    usual, varied = ([sample_person(seed, varied=v) for seed in range(300)] for v in (False, True))
    for name in ("hairline", "hair_volume"):
        low, high = (pick(p.parameters[name] for p in usual) for pick in (min, max))
        assert sum(not low <= p.parameters[name] <= high for p in varied) > 20
    for a, b in zip(usual, varied, strict=True):
        assert a.attributes["skin"] == b.attributes["skin"] and a.attributes["hair"] in (b.attributes["hair"], "none")
    short = [p for p in varied if p.attributes["haircut"] == "short"]
    assert len(short) > 1.3 * sum(p.attributes["haircut"] == "short" for p in usual)
    assert all(p.parameters["bun"] == 0 for p in short)
    tall, flat = (max(short, key=lambda p: sign * p.parameters["hair_volume"]) for sign in (1, -1))
    bare = {"hat": "none", "glasses": "none"}
    shown = [render(sample_picture(p, 0, style="photo", attributes=bare, **FRONT), SIZE).mask for p in (tall, flat)]
    assert (shown[0] == HAIR_LABEL).sum() > 1.2 * (shown[1] == HAIR_LABEL).sum()  # in the picture too

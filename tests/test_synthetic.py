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
from facesnap.synthetic.captions import face_words
from facesnap.synthetic.dataset import CLOTHES as CLOTHES_LABEL
from facesnap.synthetic.dataset import HAIR as HAIR_LABEL
from facesnap.synthetic.hair import grey_share
from facesnap.synthetic.head import landmarks
from facesnap.synthetic.parameters import EXPOSURES
from facesnap.synthetic.people import (
    BACKDROPS,
    CLOTHES,
    GLASSES,
    HATS,
    IDENTITY,
    STYLES,
)
from facesnap.synthetic.render import render
from facesnap.synthetic.shards import write_shard

SIZE = 128
FRONT = {"pose": (0.0, 0.0, 0.0), "scale": 0.9, "shift": (0.0, 0.0)}


def plain(seed: int = 3, **attributes: str | bool):
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
    words_of_the_face = re.compile(
        r"\b(skin|eyes|hair|beard|moustache|goatee|stubble|freckles|bald|bob|old|mature|graying|pepper|curly)\b"
    )
    for seed in range(60):
        person = sample_person(seed)
        picture = sample_picture(person, 0)
        prompt, rich = captions(picture, 0)
        assert not words_of_the_face.search(prompt), prompt
        assert words_of_the_face.search(rich), rich
        a = picture.attributes
        assert ("glasses" in prompt) == (a["glasses"] != "none")
        assert (a["hat"] in prompt) == (a["hat"] != "none")
        if "shirt" in prompt or "jacket" in prompt:
            assert a["clothes_color"] in prompt
        words = {"dark": r"dim|underexposed", "bright": r"bright|overexposed"}
        for exposure, named in words.items():
            assert bool(re.search(named, prompt)) == (a["exposure"] == exposure), prompt
        assert bool(re.search("hard|harsh", prompt)) == (a["shadows"] == "hard"), prompt


def test_every_attribute_of_a_picture_can_be_asked_for() -> None:
    person = sample_person(1)
    for key, values in {
        "glasses": GLASSES, "hat": HATS, "clothes_color": CLOTHES, "background_color": BACKDROPS,
        "exposure": EXPOSURES,
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


@pytest.fixture(scope="module")
def crowd():
    return [sample_person(seed) for seed in range(400)]


def test_the_number_of_workers_changes_no_picture(tmp_path) -> None:
    jobs = [(tmp_path / f"{k}.tar", start, count, 1, 64, False, False) for k, (start, count) in enumerate(
        [(20, 3), (22, 1), (20, 2)]
    )]  # fmt: skip
    for job in reversed(jobs):
        write_shard(job)
    whole, *parts = ({m.name: t.extractfile(m).read() for m in t} for t in (tarfile.open(job[0]) for job in jobs))
    assert whole == {**parts[0], **parts[1]}


def proportions(person) -> np.ndarray:
    """Of a neutral front view: the eyes' distance and the nose's length, against brow to chin, and where the eyes lie
    between crown and chin."""
    p = person.parameters.copy()
    p["eyelids"] = 1.0
    points = landmarks(p[()])
    face = points[17:27, 1].mean() - points[:17, 1].min()
    eyes, tip = points[36:52, 1].mean(), points[30, 1]
    crown, chin = float(p["upper_height"]), points[:17, 1].min()
    return np.array([eye_distance(points[:, :2]) / face, (eyes - tip) / face, (eyes - chin) / (crown - chin)])


def test_a_child_has_a_childs_proportions(crowd) -> None:
    children = [p for p in crowd if p.attributes["age"] == "child"]
    grown = [p for p in crowd if p.attributes["age"] == "adult"]
    assert 0.06 < len(children) / len(crowd) < 0.20
    a, b = (np.array([proportions(p) for p in group]) for group in (children, grown))
    apart = (a.mean(0) - b.mean(0)) / np.sqrt((a.var(0) + b.var(0)) / 2)
    assert apart[0] > 1.5 and apart[1] < -1 and apart[2] < -1.5  # wide eyes, a short nose, a high forehead
    for child in children:
        assert child.attributes["hair"] not in ("gray", "white") and child.attributes["beard"] == "none"
        assert child.parameters["wrinkles"] == 0 and child.parameters["stubble"] == 0


def test_men_and_women_differ_in_brow_jaw_and_neck(crowd) -> None:
    grown = [p for p in crowd if p.attributes["age"] != "child"]
    men, women = ([p.parameters for p in grown if p.attributes["gender"] == g] for g in ("man", "woman"))
    for name, sign in {
        "brow_thickness": 1,
        "brow_ridge": 1,
        "jaw_ratio": 1,
        "neck_width": 1,
        "brow_height": -1,
    }.items():
        low, high = (np.array([p[name] for p in group]) * sign for group in (women, men))
        assert np.quantile(high, 0.2) > np.quantile(low, 0.8), name


def test_grey_comes_with_age_and_from_the_temples(crowd) -> None:
    young = [p for p in crowd if p.parameters["age"] < 0.3]
    assert all(p.attributes["graying"] == "none" for p in young)
    assert all(p.parameters["grey"] == 0 for p in young if p.attributes["hair"] != "gray")
    temples = next(p for p in crowd if p.attributes["graying"] == "temples" and p.attributes["haircut"] == "short")
    p = temples.parameters[()]
    assert grey_share(0.9, 0.2, p) > grey_share(0.0, 1.3, p) + 0.3
    assert "graying at the temples" in ", ".join(face_words(temples.attributes))


def test_exposure_runs_over_four_stops_while_the_scene_keeps_its_names(crowd) -> None:
    pictures = [sample_picture(person, index, style="photo") for person in crowd for index in (0, 1)]
    stops = np.log2([p.parameters["exposure"] / 0.9 for p in pictures])
    assert -2.2 < stops.min() < -1.5 and 1.0 < stops.max() < 2.2
    assert (np.abs(stops) < 0.7).mean() > 0.7  # extremes are the few
    dark, bright = (
        render(plain(seed=5, exposure=e, shadows="soft", background="plain"), SIZE) for e in ("dark", "bright")
    )
    face = dark.mask == 1
    assert bright.image[face].mean() > 1.3 * dark.image[face].mean()
    wall = dark.mask == 0
    assert bright.image[wall].mean() < 1.3 * dark.image[wall].mean()


def test_sunglasses_and_a_hand_hide_the_face_only_where_asked_for(front) -> None:
    hidden = render(plain(sunglasses=True, hand=True), SIZE)
    assert np.array_equal(hidden.landmarks, front.landmarks)
    eyes, mouth = (front.landmarks[s].round().astype(int) for s in (slice(36, 52), slice(52, 72)))
    assert (hidden.mask[eyes[:, 1], eyes[:, 0]] == 4).mean() > 0.9
    assert (hidden.mask[mouth[:, 1], mouth[:, 0]] == CLOTHES_LABEL).mean() > 0.5
    drawn = [sample_picture(sample_person(3), k) for k in range(30)]
    assert not any(p.parameters["hand"] or p.parameters["sunglasses"] for p in drawn)

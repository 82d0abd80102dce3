"""The predictor: a reference's shape under a driver's pose, from pictures and from numbers."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from simulated_heads import expression_offsets, model, people

from facesnap import landmarks
from facesnap.errors import InputError
from facesnap.heads import Head, rotation_from_euler
from facesnap.predictor import LandmarkPredictor

SIZE = (600, 600)


@pytest.fixture(scope="module")
def predictor() -> LandmarkPredictor:
    return LandmarkPredictor(model())


def pose(rng: np.random.Generator, yaw: float) -> dict:
    angles = rng.uniform(-1, 1, 3) * [yaw, 15, 12]
    return {"rotation": rotation_from_euler(*angles), "scale": rng.uniform(80, 120)}


def held(rng: np.random.Generator, yaw: float) -> Head:
    """A random person, held at random, calm."""
    place = {"translation": np.array([300.0, 260]), "size": SIZE}
    return Head(identity=rng.standard_normal(30), expression=np.zeros(4), **pose(rng, yaw), **place)


def photograph(head: np.ndarray, weights: np.ndarray, rotation: np.ndarray, scale: float) -> np.ndarray:
    """A person's neutral head (72, 3) → the true landmarks (72, 3) of a picture of them."""
    turned = scale * (head + np.tensordot(weights, expression_offsets(), 1)) @ rotation.T
    return turned * [1, -1, 1] + [300, 260, 0]


def detected(points: np.ndarray, noise: float, rng: np.random.Generator) -> SimpleNamespace:
    found = landmarks.to_68(points) + noise * rng.standard_normal((68, 3))
    return SimpleNamespace(landmarks=found.astype(np.float32), size=SIZE)


def test_identity_survives_a_pose_swap(predictor):
    """The same known person in two poses: the shape that is found again moves < 2 % of the eye distance."""
    heads, rng = predictor.model, np.random.default_rng(0)
    moved = []
    for _ in range(6):
        true, driver = held(rng, 15), held(rng, 30)
        swapped = predictor.predict(true, driver, SIZE)
        before = heads.fit(heads.project(true), SIZE, noise=1e-3, iterations=8)[0]
        after = heads.fit(swapped, SIZE, noise=1e-3, iterations=8)[0]
        shapes = [heads.points(head.identity, np.zeros(4)) for head in (before, after)]
        shapes = [(shape - shape.mean(0)) / landmarks.eye_distance(shape) for shape in shapes]
        moved.append(np.linalg.norm(shapes[0] - shapes[1], axis=-1).mean())
    assert np.mean(moved) < 0.02


def test_prediction_beats_copying_and_the_mean_face(predictor):
    """Reference and driver are detected with noise; the truth is the reference's head in the driver's pose.

    What no picture tells, how large a head is and where its origin lies, is taken out of the people.
    """
    rng = np.random.default_rng(1)
    crowd = people(40, seed=99)
    crowd -= crowd.mean(axis=1, keepdims=True)
    crowd /= np.linalg.norm(crowd, axis=(1, 2), keepdims=True) / 10
    copied, averaged, predicted = [], [], []
    for person, other in zip(crowd[::2], crowd[1::2], strict=True):
        smile = np.array([rng.uniform(0, 1), 0, rng.uniform(0, 1), 0])
        reference = detected(photograph(person, np.zeros(4), **pose(rng, 10)), 3, rng)
        how = pose(rng, 30)
        driver = detected(photograph(other, smile, **how), 3, rng)
        truth = photograph(person, smile, **how)[:, :2]
        shape = predictor.reconstruct(reference)[0]
        driven = predictor.reconstruct(driver)[0]
        mean = replace(shape, identity=np.zeros(30))
        for errors, points in (
            (copied, landmarks.from_68(driver.landmarks)[:, :2]),
            (averaged, predictor.predict(mean, driven, SIZE)),
            (predicted, predictor.predict(shape, driven, SIZE)),
        ):
            errors.append(np.linalg.norm(points - truth, axis=-1).mean() / (2 * how["scale"]))
    assert np.mean(predicted) < 0.7 * np.mean(copied)
    assert np.mean(predicted) < 0.85 * np.mean(averaged)


def test_driver_gives_pose_place_and_expression_reference_gives_shape(predictor):
    heads, rng = predictor.model, np.random.default_rng(2)
    shape = held(rng, 10)
    driver = replace(held(rng, 30), expression=np.full(4, 0.3))
    expected = heads.project(replace(driver, identity=shape.identity))
    assert np.allclose(predictor.predict(shape, driver, SIZE), expected, atol=1e-3)
    calm = heads.project(replace(driver, identity=shape.identity, expression=np.zeros(4)))
    assert np.allclose(predictor.predict(shape, driver, SIZE, strength=0), calm, atol=1e-3)
    assert np.allclose(predictor.predict(driver, driver, SIZE), heads.project(driver), atol=1e-3)


def test_several_references_are_one_head(predictor):
    rng = np.random.default_rng(3)
    person = people(1, seed=5)[0]
    faces = [detected(photograph(person, np.zeros(4), **pose(rng, 20)), 2, rng) for _ in range(3)]
    heads = predictor.reconstruct(faces)
    assert len(heads) == 3 and all(np.array_equal(head.identity, heads[0].identity) for head in heads)


def test_numbers_in_pose_out(predictor):
    head = predictor.from_numbers(yaw=25, pitch=-8, roll=4, head_size=0.4, size=(768, 512), centre=(0.4, 0.6))
    assert np.allclose(head.angles, (25, -8, 4))
    assert head.size == (768, 512)
    found = predictor.model.fit(predictor.model.project(head), head.size)[0]
    assert np.allclose(found.angles, (25, -8, 4), atol=1)
    front = predictor.from_numbers(head_size=0.4, size=(768, 512), centre=(0.4, 0.6))
    points = predictor.model.project(front)
    assert np.ptp(points[:, 1]) == pytest.approx(0.4 * 512, rel=1e-4)  # of the shorter side
    middle = (points.min(axis=0) + points.max(axis=0)) / 2
    assert np.allclose(middle, [0.4 * 512 - 0.5, 0.6 * 768 - 0.5], atol=0.01)


def test_a_turning_head_stays_in_its_place(predictor):
    for yaw, pitch in [(40, 0), (-40, 10), (0, -20)]:
        points = predictor.model.project(predictor.from_numbers(yaw=yaw, pitch=pitch, size=(1000, 1000)))
        assert (points > 150).all() and (points < 850).all()


def test_a_pose_is_turned_further_and_resized_in_its_place(predictor):
    """Angles add up, the size multiplies, the face stays; and turning back gives the head again."""
    head = predictor.from_numbers(yaw=10, pitch=-5, roll=8, size=(1000, 1000))
    turned = predictor.turned(head, yaw=20, pitch=5, roll=-3, head_size=0.8)
    assert np.allclose(turned.angles, [30, 0, 5], atol=1e-4)
    assert turned.scale == pytest.approx(0.8 * head.scale)
    same = predictor.from_numbers(yaw=30, pitch=0, roll=5, head_size=0.8 * 0.37, size=(1000, 1000))
    assert np.allclose(predictor.model.project(turned), predictor.model.project(same), atol=0.5)
    back = predictor.turned(turned, yaw=-20, pitch=-5, roll=3, head_size=1.25)
    assert np.allclose(predictor.model.project(back), predictor.model.project(head), atol=1e-2)


def test_expressions_by_name_and_strength(predictor):
    half = predictor.from_numbers(expression={"smile": 1.0, "blink": 0.5}, strength=0.5)
    assert np.allclose(half.expression, [0.5, 0, 0, 0.25])
    assert np.allclose(predictor.from_numbers(expression=np.full(4, 0.2)).expression, 0.2)
    assert not predictor.from_numbers().expression.any()


def test_unknown_expression_names_the_nearest(predictor):
    with pytest.raises(InputError, match="no expression 'smiles'; did you mean 'smile'?"):
        predictor.from_numbers(expression={"smiles": 1.0})
    with pytest.raises(InputError, match="it knows smile, mouth_open, brows_up, blink"):
        predictor.from_numbers(expression={"zzz": 1.0})

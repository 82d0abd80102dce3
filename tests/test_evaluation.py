"""Metrics against cases worked out by hand, and the ledger that lets a killed evaluation continue."""

import json

import numpy as np
import pytest
from PIL import Image

from facesnap.evaluation import metrics, report


def test_cosines_by_hand_and_no_face_is_zero():
    a = np.array([[3.0, 4.0], [0.0, 0.0]])
    b = np.array([[1.0, 0.0], [0.0, -2.0]])
    assert np.allclose(metrics.cosines(a, b), [[0.6, -0.8], [0.0, 0.0]])


def test_retention_ends_are_strangers_and_truth():
    truth = np.array([0.8, 0.6])
    assert metrics.retention(truth, truth, 0.1) == pytest.approx(1)
    assert metrics.retention(np.array([0.1, 0.1]), truth, 0.1) == pytest.approx(0)
    assert metrics.retention(np.array([0.0, 0.8]), truth, 0.1) == pytest.approx(
        0.5
    )  # (0.4 - 0.1) / (0.7 - 0.1)


def test_rank1_counts_ties_and_missing_faces_as_misses():
    similarity = np.array([[0.9, 0.1], [0.5, 0.5], [0.2, 0.7], [0.1, 0.8]])
    own = np.array([0, 1, 0, 1])  # right, a tie, wrong, right
    assert metrics.rank1(similarity, own, np.ones(4, bool)) == 0.5
    assert metrics.rank1(similarity, own, np.array([True, True, True, False])) == 0.25


def test_tar_at_far():
    different = np.arange(10) / 10  # 0.0 … 0.9
    same = np.array([0.95, 0.85, 0.75, 0.15])
    assert metrics.tar_at_far(same, different, far=0.1) == 0.5  # one impostor may pass: above 0.8
    assert metrics.tar_at_far(same, different, far=0.0) == 0.25


def test_same_and_different_pairs():
    embeddings = np.array([[1.0, 0], [1.0, 0], [0, 1.0]])
    same, different = metrics.same_and_different(embeddings, np.array([7, 7, 8]))
    assert same.tolist() == [1.0] and different.tolist() == [0.0, 0.0]


def test_landmark_error_is_in_eye_distances():
    points = np.zeros((4, 2))
    wanted = np.array([[3.0, 4.0], [0, 0], [0, 0], [0, 5.0]])
    assert metrics.landmark_error(points, wanted, 10.0) == pytest.approx(0.25)


def test_eye_distance_of_the_frontal_head_does_not_shrink_with_yaw():
    head = np.random.default_rng(0).normal(size=(72, 3))
    head[36], head[48] = (-1.5, 0, 0), (1.5, 0, 0)
    assert metrics.frontal_eye_distance(head, 20.0) == pytest.approx(60)


def test_orthographic_scale_is_found_at_any_yaw():
    eyes_nose_mouth_chin = np.array(
        [[-30, 0, 0], [30, 0, 0], [0, -40, 35], [-25, -70, 5], [25, -70, 5], [0, -110, 8.0]]
    )
    for degrees in (0, 25, 50):
        c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
        turned = eyes_nose_mouth_chin @ np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]]).T
        found = metrics.orthographic_scale(eyes_nose_mouth_chin, turned[:, :2] * 1.7 * [1, -1] + [300, 200])
        assert found == pytest.approx(1.7, rel=0.02)


def test_balanced_accuracy_by_hand():
    wanted = ["red"] * 8 + ["blue"] * 2
    recall, corrected = metrics.balanced_accuracy(["red"] * 10, wanted)
    assert (recall, corrected) == (0.5, 0.0)  # the frequent class alone is worth nothing
    recall, corrected = metrics.balanced_accuracy(["red"] * 8 + ["blue", "red"], wanted)
    assert (recall, corrected) == (0.75, 0.5)
    recall, corrected = metrics.balanced_accuracy(["blue"] * 8 + ["red"] * 2, wanted)
    assert (recall, corrected) == (0.0, -1.0)
    with pytest.raises(ValueError, match="one class only"):
        metrics.balanced_accuracy(["a"], ["a"])


def test_attribute_accuracy_averages_attributes_and_a_missing_face_is_wrong():
    wanted = [{"hat": True, "style": "photo"}, {"hat": False, "style": "oil"}, {"hat": True}, {"hat": False}]
    found = [{"hat": True, "style": "photo"}, {"hat": False, "style": "oil"}, {}, {"hat": False}]
    result = metrics.attribute_accuracy(found, wanted)
    assert result["attributes"]["style"] == {"score": 1.0, "recall": 1.0, "pictures": 2}
    assert result["attributes"]["hat"]["recall"] == 0.75  # 1 of 2 and 2 of 2
    assert result["score"] == 0.75  # (1.0 + 0.5) / 2


def test_bootstrap_draws_people_not_rows():
    values = np.array([0.0, 0.0, 1.0, 1.0])
    people = np.array([1, 1, 2, 2])
    low, high = metrics.interval(lambda rows: float(values[rows].mean()), people, draws=200)
    assert (low, high) == (0.0, 1.0)  # two people: a draw of one of them twice is common


def test_ledger_continues_after_a_kill(tmp_path):
    path = tmp_path / "report.jsonl"
    settings = {"seed": 0, "model": "abc"}
    ledger = report.Ledger(path, settings)
    ledger.put("a", {"x": 1})
    ledger.put("b", {"x": 2})
    with path.open("a") as file:
        file.write('{"key": "c", "x"')  # the kill came in the middle of a line
    again = report.Ledger(path, settings)
    assert again.get("a") == {"x": 1} and again.get("b") == {"x": 2} and again.get("c") is None
    again.put("c", {"x": 3})
    assert [json.loads(line) for line in path.read_text().splitlines()][1:] == [
        {"key": "a", "x": 1}, {"key": "b", "x": 2}, {"key": "c", "x": 3}
    ]  # fmt: skip
    with pytest.raises(ValueError, match="another run .different: seed."):
        report.Ledger(path, {"seed": 1, "model": "abc"})


def test_fingerprint_follows_the_weights(tmp_path):
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "w.safetensors").write_bytes(b"one")
    before = report.fingerprint(tmp_path)
    assert report.fingerprint(tmp_path) == before
    (tmp_path / "unet" / "w.safetensors").write_bytes(b"two")
    assert report.fingerprint(tmp_path) != before
    with pytest.raises(FileNotFoundError, match="no model in"):
        report.fingerprint(tmp_path / "nothing")


def test_provenance_names_what_a_repetition_needs(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    found = report.provenance(str(tmp_path))
    assert set(found) == {"command", "commit", "model", "machine", "libraries"}
    assert found["machine"]["cores"] >= 1 and found["libraries"]["torch"] != "absent"


def test_contact_sheet_never_stretches(tmp_path):
    red = np.zeros((40, 20, 3), np.uint8)
    red[..., 0] = 255
    path = tmp_path / "sheet.png"
    report.contact_sheet([[red, red]], ["a", "b"], path, captions=["x" * 500], notes=[["0.5", ""]], cell=64)
    sheet = np.array(Image.open(path)).astype(int)
    is_red = (sheet[..., 0] > 200) & (sheet[..., 1] < 60)
    assert abs(int(is_red.sum()) - 2 * 64 * 32) < 300

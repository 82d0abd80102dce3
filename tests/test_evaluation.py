"""Metrics against cases worked out by hand, a ledger that survives a kill, what the protocol promises."""

import json
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from tiny import photo

from facesnap import metrics
from facesnap.errors import InputError
from facesnap.evaluation import photographs, portraits, probes, protocol, references, report, vae
from facesnap.evaluation.__main__ import parse
from facesnap.evaluation.scorer import visible
from facesnap.provenance import fingerprint
from facesnap.synthetic.people import EVALUATION_PEOPLE


def test_cosines_by_hand_and_no_face_is_zero():
    a = np.array([[3.0, 4.0], [0.0, 0.0]])
    b = np.array([[1.0, 0.0], [0.0, -2.0]])
    assert np.allclose(metrics.cosines(a, b), [[0.6, -0.8], [0.0, 0.0]])


def test_retention_ends_are_strangers_and_truth():
    truth = np.array([0.8, 0.6])
    assert metrics.retention(truth, truth, 0.1) == pytest.approx(1)
    assert metrics.retention(np.array([0.1, 0.1]), truth, 0.1) == pytest.approx(0)
    assert metrics.retention(np.array([0.0, 0.8]), truth, 0.1) == pytest.approx(0.5)  # (0.4 - 0.1) / (0.7 - 0.1)


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


def test_a_linear_probe_finds_what_is_there_and_nothing_where_nothing_is():
    rng = np.random.default_rng(0)
    labels = rng.choice(["blue", "brown", "green"], 300)
    held = np.arange(300) >= 200
    noise = rng.standard_normal((300, 40))
    told = noise + 6 * (labels[:, None] == np.array(["blue", "brown", "green"])) @ rng.standard_normal((3, 40))
    known = metrics.linear_probe(told, labels, held, ridge=0.1)
    assert known["balanced_accuracy"] > 0.9 and known["chance"] == pytest.approx(1 / 3)
    assert metrics.linear_probe(noise, labels, held)["balanced_accuracy"] < 0.5
    rare = labels.copy()
    rare[-1] = "grey"  # never seen by the probe, so not asked
    assert metrics.linear_probe(told, rare, held, ridge=0.1)["chance"] == pytest.approx(1 / 3)


def test_probes_ask_only_held_out_people(tmp_path, monkeypatch):
    monkeypatch.setattr(probes, "PHOTOS", (40,))

    class Whole:  # a crop of any kind will do: not the face pack is tested
        def __init__(self, folder):
            pass

        def analyse(self, image):
            return SimpleNamespace(crop=cv2.resize(image, (224, 224)))

    monkeypatch.setattr(probes, "FaceAnalyser", Whole)
    out = tmp_path / "probes.json"
    arguments = parse(f"probes --model assets/mini --people 60 --size 96 --out {out}".split())
    results = probes.run(arguments)["results"]
    seeds = {int(p.name.split("_")[1]) for p in out.with_suffix(".work").iterdir()}
    assert len(seeds) == 60 and all(seed in EVALUATION_PEOPLE for seed in seeds)
    assert set(results["probes"]) == {"eyes", "hair", "beard"} and results["tested"] <= 20
    assert all(0 <= p["balanced_accuracy"] <= 1 for p in results["probes"].values())


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
    wanted[0]["light"] = "soft"  # asked for once only, so nothing can be said of it
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
    before = fingerprint(tmp_path)
    assert fingerprint(tmp_path) == before
    (tmp_path / "unet" / "w.safetensors").write_bytes(b"two")
    assert fingerprint(tmp_path) != before
    with pytest.raises(InputError, match="There is no model in"):
        fingerprint(tmp_path / "nothing")


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


# ---------------------------------------------------------------- the protocol


def test_people_are_held_out_disjoint_and_the_same_every_time():
    gallery, drivers = protocol.people(0)
    assert len(set(gallery)) == protocol.GALLERY and not set(gallery) & set(drivers)
    assert set(gallery) | set(drivers) <= set(EVALUATION_PEOPLE)
    assert protocol.people(0)[0] == gallery != protocol.people(1)[0]


def test_requests_of_a_short_run_are_the_first_of_a_long_one():
    assert protocol.requests(0, 5, 3) == protocol.requests(0, 40, 3)[:15]
    with pytest.raises(ValueError, match="--people 201"):
        protocol.requests(0, 201, 3)


def test_a_prompt_names_what_is_judged_and_nothing_of_the_person():
    for request in protocol.requests(0, 40, 3):
        asked, prompt = request.attributes, request.prompt
        assert f" {asked['clothes_color']} " in prompt and asked["background_color"] in prompt
        for name in ("glasses", "hat"):
            assert asked[name] == "none" or f"{asked[name]} " in prompt.replace(",", " ") + " "
        assert "a person" in prompt and " man" not in prompt and " woman" not in prompt
        assert not any(word in prompt for word in ("smiling", "laughing", "surprised", "serious"))


def test_what_cannot_be_seen_is_not_judged():
    attributes = {
        "light": "warm", "background": "hills", "background_color": "red", "clothes_color": "blue",
        "pattern": "plain", "glasses": "none", "hat": "none", "hat_color": "green", "expression": "smiling",
    }  # fmt: skip
    assert set(visible(attributes, "photo")) == {
        "style", "light", "clothes_color", "glasses", "hat"
    }  # fmt: skip
    assert "clothes_color" not in visible({**attributes, "pattern": "striped"}, "photo")  # which of its two?
    assert not {"clothes_color", "light"} & set(visible(attributes, "pencil sketch"))
    studio = {**attributes, "background": "studio", "hat": "cap"}
    assert {"background_color", "hat_color"} <= set(visible(studio, "photo"))


def test_the_true_picture_is_the_person_before_the_drivers_camera():
    person, driver_person = 1_000_001, 1_000_002
    driver = protocol.driver_picture(driver_person)
    truth = protocol.truth_picture(person, driver, style="watercolor", attributes={"hat": "cap"})
    p, d = truth.parameters, driver.parameters
    assert all(p[n] == d[n] for n in ("yaw", "pitch", "roll", "scale", "smile", "mouth_open", "eyelids"))
    assert p["nose_length"] == protocol.sample_person(person).parameters["nose_length"] != d["nose_length"]
    assert truth.style == "watercolor" and truth.attributes["hat"] == "cap"
    itself = protocol.truth_picture(driver_person, driver)
    assert np.allclose(protocol.exact_landmarks(itself, 256), protocol.exact_landmarks(driver, 256))


def test_clothes_below_the_frame_are_not_judged():
    person = protocol.sample_person(1_000_004)
    near, far = (protocol.sample_picture(person, 0, scale=s, shift=(0, 0), style="photo") for s in (1.1, 0.75))
    assert "clothes_color" in protocol.judged(far) and "clothes_color" not in protocol.judged(near)


def test_frontal_eye_distance_does_not_depend_on_the_pose():
    straight = protocol.sample_picture(protocol.sample_person(1_000_003), 0, pose=(0, 0, 0), scale=1.0)
    turned = protocol.sample_picture(protocol.sample_person(1_000_003), 0, pose=(0.7, 0.1, 0.2), scale=1.0)
    assert protocol.frontal_eye_distance(turned, 256) == pytest.approx(protocol.frontal_eye_distance(straight, 256))


def ledger_of(model_is: str) -> tuple[dict, list, list]:
    """Rows as a run would leave them: three people, each in two prompts, made perfectly or not at all."""
    gallery = [1, 2, 3]
    requests = [
        protocol.Request(p, 9, "", s, {**ANY, "clothes_color": c, "glasses": g, "light": li}, 0)
        for p in gallery
        for s, c, g, li in (("photo", "red", "none", "soft"), ("watercolor", "blue", "round", "left"))
    ]
    faces = {p: np.eye(512)[p].tolist() for p in gallery}
    rows: dict[str, dict] = {}

    def seen(person: int, request: protocol.Request) -> dict:
        return {
            "found": True, "sharpness": 5.0, "embedding": faces[person], "points": np.full((72, 2), 7.0).tolist(),
            "attributes": visible(request.attributes, request.style),
        }  # fmt: skip

    for p in gallery:
        mine = [r for r in requests if r.person == p]
        for name, request in zip(["reference", *(f"render {k}" for k in range(2))], mine * 2, strict=False):
            row = seen(p, request)
            rows[f"{name} {p}"] = {**row, "style": request.style, "wanted": row["attributes"]}
    for n, request in enumerate(requests):
        truth = seen(request.person, request)
        rows[f"truth {n}"] = {
            **truth, "exact": [[7.0, 7.0]] * 72, "eye_distance": 10, "wanted": truth["attributes"]
        }  # fmt: skip
        made = {"seconds": 2.0, "asked": [[7.0, 8.0]] * 72, "peak_memory_gb": 1.0}
        if model_is == "perfect":
            rows[f"portrait {n}"] = {**made, **seen(request.person, request)}
        else:
            rows[f"portrait {n}"] = {
                **made,
                "found": False,
                "embedding": None,
                "points": None,
                "attributes": {},
            }
    return rows, requests, gallery


ANY = {
    "background": "studio",
    "background_color": "red",
    "pattern": "plain",
    "hat": "none",
    "hat_color": "red",
}


def test_summary_of_a_perfect_model_and_of_one_that_draws_no_faces():
    class Rows:
        def __init__(self, rows):
            self.rows = rows

    for model_is in ("perfect", "faceless"):
        rows, requests, gallery = ledger_of(model_is)
        for row in rows.values():
            if "wanted" in row:
                row["wanted"] = {k: row["wanted"][k] for k in ("style", "clothes_color")}  # what varies here
        result = portraits.summary(Rows(rows), requests, gallery)
        perfect = model_is == "perfect"
        assert result["identity_retention"] == pytest.approx(1.0 if perfect else 0.0)
        assert result["rank1"] == (1.0 if perfect else 0.0)
        assert result["landmark_error"] == pytest.approx(0.1 if perfect else 1.0)  # one pixel of ten
        assert result["text_accuracy"]["score"] == (1.0 if perfect else -1.0)
        assert result["landmark_net_error"] == 0 and result["scorer_accuracy"]["score"] == 1
        assert result["sharpness"] == (1.0 if perfect else None)
        assert result["tar_at_far_1e-3"] == 1 and result["seconds"] == 2.0
        assert "identity_retention" in report.table(portraits.lines(result))


def test_the_command_of_the_readme_means_portraits():
    arguments = parse("--model assets/mini --people 40 --poses 3 --seed 0 --out report.json".split())
    assert (arguments.command, arguments.people, arguments.poses) == ("portraits", 40, 3)
    assert parse(["stock", "--model", "m", "--out", "o"]).prompts == 50


def test_hand_marks_lie_in_their_cut_outs_and_in_order():
    assert len(photographs.MARKED) == 7
    for marked in photographs.MARKED:
        left, top, right, bottom = marked.box
        points = marked.points()
        assert (points > 0).all() and (points < [right - left, bottom - top]).all()
        assert points[0, 0] < points[1, 0] and points[3, 0] < points[4, 0]  # left is the picture's
        assert points[:2, 1].max() < points[3:5, 1].min() < points[5, 1]


def test_the_six_marks_are_these_of_the_72():
    points = np.zeros((72, 2))
    points[[36, 40]] = (-30, 0), (-10, 0)
    points[[30, 52, 57, 8]] = (1, 2), (3, 4), (5, 6), (7, 8)
    assert photographs.marked_of(points).tolist() == [[-5, 0], [0, 0], [1, 2], [3, 4], [5, 6], [7, 8]]


# ---------------------------------------------------------------- the VAE alone, and several references


def test_sharpness_falls_with_blur_and_is_of_the_box_alone():
    image = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    image[20:] = 128
    box = np.array([0, 0, 40, 18])
    blurred = cv2.GaussianBlur(image, (0, 0), 1.0)
    assert metrics.sharpness(image, box) > 3 * metrics.sharpness(blurred, box) > 0
    for empty in ([2, 24, 38, 38], [50, 50, 60, 60]):
        assert metrics.sharpness(image, np.array(empty)) == 0


def test_psnr_by_hand_and_the_part_around_the_eyes():
    flat = np.full((8, 8, 3), 100, np.uint8)
    assert vae.psnr(flat, flat + 5) == pytest.approx(20 * np.log10(255 / 5)) and vae.psnr(flat, flat) == 99
    points = protocol.exact_landmarks(protocol.driver_picture(1_000_005), 128)
    rows, columns = vae.around_eyes(points, 40.0, 128)
    eyes, mouth = points[vae.EYES], points[52:]
    assert (rows.start <= eyes[:, 1]).all() and (eyes[:, 1] < rows.stop).all()
    assert (columns.start <= eyes[:, 0]).all() and (mouth[:, 1] > rows.stop).all()


def test_averaged_tokens_are_the_mean_of_each_references_own(pipe):
    faces = [pipe.analyse(photo(1, number)) for number in (0, 1)]
    other, each = references.averaging(pipe), [pipe.mix([face]) for face in faces]
    averaged = other.mix(faces)
    assert torch.allclose(averaged.tokens, (each[0].tokens + each[1].tokens) / 2, atol=1e-6)
    assert torch.equal(other.mix(faces[:1]).pooled, each[0].pooled)
    assert not torch.allclose(pipe.mix(faces).tokens, averaged.tokens, atol=1e-3)  # the shared pipeline still fuses


def test_poor_references_are_poor_and_the_same_every_time():
    poor, again = (references.poor_pictures(1_000_006, 64) for _ in range(2))
    assert set(poor) == {"profile", "blurred", "dark"}
    assert all(np.array_equal(poor[name], again[name]) for name in poor)
    assert poor["dark"].mean() < 0.4 * poor["profile"].mean()

"""From a picture to a Face through InsightFace itself, on a pack of toy nets that see coloured squares
(toy_pack)."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path

import cv2
import numpy as np
import pytest
import skimage.data
import toy_pack
from insightface.utils.face_align import arcface_dst

from facesnap.errors import InputError
from facesnap.faces import FaceAnalyser, Recogniser, align, cosine, five_points
from facesnap.finding import distinct
from facesnap.synthetic.people import sample_person, sample_picture
from facesnap.synthetic.render import render

GREEN, BLUE = (0, 255, 0), (0, 0, 255)


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    return toy_pack.write(tmp_path_factory.mktemp("pack"))


@pytest.fixture(scope="module")
def analyser(pack):
    return FaceAnalyser(pack)


def canvas(height=256, width=256, **spots):
    """A dark, noisy picture with squares: name=(x, y, side, colour)."""
    image = np.random.default_rng(0).integers(12, 28, (height, width, 3), dtype=np.uint8)  # what is even is a drawing
    for x, y, side, colour in spots.values():
        image[y : y + side, x : x + side] = colour
    return image


def same(a, b):
    return all(np.array_equal(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))


def test_face_is_where_the_detector_sees_it(analyser):
    face = analyser.analyse(canvas(face=(120, 96, 8, GREEN)))
    assert np.allclose(face.box, [120 - 32, 96 - 32, 120 + 32, 96 + 32], atol=0.01)
    assert face.score > 0.9 and face.count == 1 and face.found_by == "detector" and face.size == (256, 256)
    assert np.array_equal(face.keypoints, five_points(face.landmarks))
    assert face.keypoints.shape == (5, 2) and face.landmarks.shape == (68, 3)
    assert face.embedding.shape == (512,) and face.crop.shape == (224, 224, 3)
    # the toy landmark net's face spans 0.6 of the 1.5-fold box
    assert np.abs(face.landmarks[:, :2] - [123.5, 99.5]).max() == pytest.approx(0.6 * 48, abs=2.5)


def test_largest_face_wins_and_all_are_counted(analyser):
    image = canvas(a=(40, 40, 8, GREEN), b=(176, 160, 16, BLUE), c=(40, 200, 8, GREEN))
    face = analyser.analyse(image)
    assert face.count == 3
    assert np.allclose((face.box[:2] + face.box[2:]) / 2, [176, 160], atol=0.01)
    assert face.box[2] - face.box[0] == pytest.approx(128, abs=0.01)


@pytest.mark.parametrize("shape", [(1024, 1024), (1024, 768), (640, 1024)])
def test_coordinates_are_those_of_the_given_picture(analyser, shape):
    factor = 1024 // 256
    face = analyser.analyse(canvas(*shape, face=(100 // 8 * 8 * factor, 80 * factor, 8 * factor, GREEN)))
    assert face.size == shape
    assert np.allclose((face.box[:2] + face.box[2:]) / 2, [96 * factor, 80 * factor], atol=2)


def test_other_sizes_are_tried(analyser):
    """A mark of 3 pixels fills no cell until the picture is enlarged 2.5 times."""
    face = analyser.analyse(canvas(face=(96, 128, 3, BLUE)))
    assert face.found_by == "resized"
    assert np.allclose((face.box[:2] + face.box[2:]) / 2, [96, 128], atol=8)


def test_face_that_fills_the_picture_is_found_with_a_border(analyser):
    """All green: no cell is greener than its surroundings until there is something around."""
    found = analyser.find(np.full((200, 200, 3), GREEN, np.uint8))
    assert found.by == "padded"
    centres = (found.boxes[:, :2] + found.boxes[:, 2:]) / 2
    assert (centres > -40).all() and (centres < 240).all()


def test_haar_is_the_last_resort_and_the_landmarks_give_the_points(analyser):
    grey = skimage.data.astronaut().mean(axis=2).astype(np.uint8)  # nothing green, nothing blue
    image = np.stack([grey] * 3, axis=2)
    image[109:121, 216:228] = (255, 0, 255)  # on her nose, for the landmark net
    face = analyser.analyse(image)
    assert face.found_by == "haar" and face.score == 0
    centre = (face.box[:2] + face.box[2:]) / 2
    assert np.linalg.norm(centre - [222, 115]) < 40  # her face
    assert np.isfinite(face.embedding).all()


RED = (255, 0, 0)  # what the detector takes for a face and the landmark net does not


def test_what_is_unsteady_is_no_face_however_large(analyser):
    image = canvas(512, 512, clothes=(320, 320, 16, RED), face=(96, 96, 16, GREEN))
    face = analyser.analyse(image)
    assert face.count == 1 and np.allclose((face.box[:2] + face.box[2:]) / 2, [96 + 8, 96 + 8], atol=9)
    with pytest.raises(InputError, match="what was seen at the bottom right does not hold"):
        analyser.analyse(canvas(512, 512, clothes=(400, 400, 16, RED)))


@pytest.fixture(scope="module")
def shown():
    """The mini's own analyser, a rendered person, and what it reads of her."""
    analyser = FaceAnalyser(Path(__file__).parent.parent / "assets" / "mini" / "face_pack")
    image = render(sample_picture(sample_person(1_005_002), 3, style="photo"), 256).image
    return analyser, image, analyser.analyse(image)


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_a_picture_that_lies_or_stands_on_its_head_is_read_upright(shown, turns):
    analyser, image, upright = shown
    face = analyser.analyse(np.ascontiguousarray(np.rot90(image, turns)))
    assert face.turned == 90 * turns and upright.turned == 0
    assert np.array_equal(face.image, image) and np.allclose(face.landmarks, upright.landmarks)
    assert np.allclose(face.embedding, upright.embedding)


def test_a_portrait_is_read_as_it_stands_and_for_another_recogniser(shown):
    analyser, image, upright = shown
    face = analyser.analyse(image, portrait=True)
    for name in ("box", "keypoints", "landmarks", "crop"):
        assert np.array_equal(getattr(face, name), getattr(upright, name))
    assert not face.embedding.any()
    with pytest.raises(InputError):
        analyser.analyse(np.ascontiguousarray(np.rot90(image, 2)), portrait=True)


def test_a_tilted_picture_is_read_upright(shown):
    analyser, image, upright = shown
    tilted = cv2.warpAffine(image, cv2.getRotationMatrix2D((128, 128), 35, 1.0), (256, 256), borderValue=(90, 90, 90))
    face = analyser.analyse(tilted)
    flat = face.keypoints[1] - face.keypoints[0]
    assert abs(np.degrees(np.arctan2(flat[1], flat[0]))) < 12 and face.tilt == pytest.approx(35, abs=12)
    assert cosine(face.embedding, upright.embedding) > 0.7
    assert face.size == (256, 256) and face.image is not tilted


def test_a_box_inside_another_is_the_same_face():
    boxes = np.array([[0, 0, 100, 100], [30, 30, 70, 70], [80, 80, 180, 180], [300, 0, 340, 40]], np.float32)
    assert distinct(boxes, np.array([0.8, 0.9, 0.7, 0.6])).tolist() == [1, 2, 3]
    assert distinct(boxes, np.array([0.9, 0.8, 0.7, 0.6])).tolist() == [0, 2, 3]
    assert distinct(np.zeros((0, 4)), np.zeros(0)).tolist() == []


def test_thirty_faces_are_counted_and_tiny_ones_refused_in_words(analyser):
    spots = {f"f{i}{j}": (96 + 160 * i, 96 + 160 * j, 16, GREEN) for i in range(6) for j in range(5)}
    assert analyser.analyse(canvas(1024, 1024, **spots)).count == 30
    tiny = {f"f{i}": (16 + 24 * i, 60, 2, GREEN) for i in range(3)}
    with pytest.raises(InputError, match=r"largest of the 3 faces is only \d+ pixels large, at least 32"):
        analyser.analyse(canvas(96, 96, **tiny))


def test_a_drawing_is_refused_in_words(analyser):
    image = np.full((256, 256, 3), 220, np.uint8)
    image[40:48, 40:48] = GREEN
    with pytest.raises(InputError, match="What was seen at the top left is a drawing: use a photograph"):
        analyser.analyse(image)


def test_no_face_is_an_error_in_words(analyser):
    with pytest.raises(InputError, match="No face was found"):
        analyser.analyse(canvas())


@pytest.mark.parametrize("shape", [(1, 2048, 3), (1, 1, 3)])
def test_a_picture_a_pixel_thin_has_no_face(analyser, shape):
    with pytest.raises(InputError, match="No face"):
        analyser.analyse(np.zeros(shape, np.uint8))


def test_too_small_a_face_is_an_error_with_its_size(analyser):
    with pytest.raises(InputError, match="The only face is only 16 pixels.*at least 32"):
        analyser.analyse(canvas(64, 64, face=(32, 32, 2, GREEN)))


def test_not_rgb_bytes_is_the_programmers_error(analyser):
    with pytest.raises(ValueError, match="uint8"):
        analyser.analyse(np.zeros((64, 64, 3), np.float32))


def test_save_then_load_gives_the_same_face(analyser, tmp_path):
    image = canvas(face=(120, 96, 8, GREEN))
    analyser.save_pretrained(tmp_path / "again")
    assert len(list((tmp_path / "again").glob("*.onnx"))) == 3
    assert same(FaceAnalyser.from_pretrained(tmp_path / "again").analyse(image), analyser.analyse(image))
    analyser.save_pretrained(analyser.pack_dir)  # over itself: nothing is lost
    assert same(FaceAnalyser(analyser.pack_dir).analyse(image), analyser.analyse(image))


def test_threads_do_not_disturb_each_other(analyser):
    images = [canvas(face=(40 + 16 * k, 96, 8, GREEN)) for k in range(6)]
    images += [canvas(512, 512, face=(80 + 32 * k, 96, 16, GREEN)) for k in range(6)]
    alone = [analyser.analyse(image) for image in images]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(analyser.analyse, images))
    assert all(same(a, b) for a, b in zip(alone, together, strict=True))


def test_the_picture_is_not_changed(analyser):
    image = canvas(face=(120, 96, 8, GREEN))
    before = image.copy()
    face = analyser.analyse(image)
    assert np.array_equal(image, before)
    assert face.image is image  # for head models that read pictures; not copied


def test_scorer_sees_what_the_pack_sees(analyser, pack):
    image = canvas(face=(120, 96, 8, GREEN))
    face = analyser.analyse(image)
    assert np.allclose(Recogniser(pack / "recogniser.onnx").embed(image, face.keypoints), face.embedding, atol=1e-4)
    assert cosine(face.embedding, face.embedding) == pytest.approx(1)
    assert cosine(face.embedding, -2 * face.embedding) == pytest.approx(-1)


def test_align_brings_the_points_home():
    """A white dot at each of the five points, turned and scaled, comes to lie on ArcFace's template."""
    turn = 1.7 * np.array([[np.cos(0.4), -np.sin(0.4)], [np.sin(0.4), np.cos(0.4)]])
    points = (arcface_dst @ turn.T + [60, 40]).astype(np.float32)
    image = np.zeros((300, 300, 3), np.uint8)
    for x, y in points.round().astype(int):
        image[y - 3 : y + 4, x - 3 : x + 4] = 255
    crop = align(image, points)
    assert crop.shape == (112, 112, 3)
    assert all(crop[round(float(y)), round(float(x))].min() > 200 for x, y in arcface_dst)
    assert five_points(np.repeat(points[:1], 68, axis=0)).shape == (5, 2)


@pytest.mark.parametrize(
    ("missing", "said"),
    [("detector", "face detector"), ("landmarks", "3D landmark net"), ("recogniser", "recogniser")],
)
def test_incomplete_pack_names_what_it_lacks(tmp_path, missing, said):
    toy_pack.write(tmp_path, leave_out=missing)
    with pytest.raises(InputError, match=f"has no {said}"):
        FaceAnalyser(tmp_path)


def test_missing_or_damaged_files_are_named(tmp_path, pack):
    with pytest.raises(InputError, match="no face pack in '.*nowhere'"):
        FaceAnalyser(tmp_path / "nowhere")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "detector.onnx").write_bytes(b"cut short")
    with pytest.raises(InputError, match="damaged"):
        FaceAnalyser(tmp_path / "broken")
    with pytest.raises(InputError, match="no recogniser at"):
        Recogniser(tmp_path / "none.onnx")
    with pytest.raises(InputError, match="is no recogniser"):
        Recogniser(pack / "landmarks.onnx")


def test_archive_that_nests_its_folder_is_understood(tmp_path):
    toy_pack.write(tmp_path / "antelopev2" / "antelopev2")
    assert FaceAnalyser(tmp_path / "antelopev2").analyse(canvas(face=(120, 96, 8, GREEN))).count == 1

"""The order of the 72, its mirror, and the drawing."""

import numpy as np
import pytest

from facesnap import landmarks


@pytest.fixture
def face_68() -> np.ndarray:
    return np.random.default_rng(0).uniform(0, 256, (2, 68, 3)).astype(np.float32)


def test_68_to_72_and_back_is_exact(face_68):
    face = landmarks.from_68(face_68)
    assert face.shape == (2, 72, 3) and face.dtype == np.float32
    assert np.array_equal(landmarks.to_68(face), face_68)


def test_order_follows_the_table(face_68):
    face = landmarks.from_68(face_68)
    assert np.array_equal(face[:, 9:17], face_68[:, 16:8:-1])  # the right contour begins at the temple
    assert np.array_equal(face[:, [36, 40, 44, 48]], face_68[:, [36, 39, 42, 45]])  # eye corners
    assert np.array_equal(face[:, [52, 57]], face_68[:, [48, 54]])  # mouth corners
    assert np.allclose(face[:, 38], (face_68[:, 37] + face_68[:, 38]) / 2)  # a new upper lid point
    assert np.allclose(face[:, 50], (face_68[:, 46] + face_68[:, 47]) / 2)  # a new lower lid point


def test_mirror_is_an_involution(face_68):
    face = landmarks.from_68(face_68)
    once = landmarks.mirror(face, width=200)
    assert not np.allclose(once, face)
    assert np.allclose(landmarks.mirror(once, width=200), face, atol=1e-4)


def test_mirror_maps_strokes_to_strokes():
    def edges(part):
        strokes = [s for name, s in landmarks.STROKES if name == part]
        return {frozenset(edge) for s in strokes for edge in zip(s, s[1:], strict=False)}

    for part in landmarks.GROUPS:
        other = part.replace("left", "#").replace("right", "left").replace("#", "right")
        mirrored = {frozenset(landmarks.MIRROR[list(edge)].tolist()) for edge in edges(part)}
        assert mirrored == edges(other), part


def test_groups_partition_the_72():
    assert sorted(i for group in landmarks.GROUPS.values() for i in group) == list(range(landmarks.NUM))


def test_every_landmark_is_drawn():
    points = np.full((72, 2), -1000.0)
    for index in range(landmarks.NUM):
        # Alone in the frame, a point shows only by the lines that end in it.
        points[:] = [-1000, -1000]
        points[index] = [32, 32]
        drawing = landmarks.draw(points, (64, 64))
        assert drawing[32, 32].any(), f"landmark {index} is not drawn"


def test_parts_have_their_colours():
    points = np.zeros((72, 2))
    for row, (_, group) in enumerate(landmarks.GROUPS.items()):
        points[list(group), 0] = np.linspace(20, 230, len(group))
        points[list(group), 1] = 20 + 30 * row
    drawing = landmarks.draw(points, (256, 256))
    for row, part in enumerate(landmarks.GROUPS):
        assert tuple(drawing[20 + 30 * row, 125]) == landmarks.COLOURS[part]


def test_drawing_scales_with_the_picture():
    points = np.full((72, 2), -5000.0)  # one brow, so that lines do not cover each other
    points[17:22] = np.stack([np.linspace(40, 200, 5), np.linspace(50, 150, 5)], axis=1)
    small = landmarks.draw(points, (256, 256)).astype(float)
    large = landmarks.draw((points + 0.5) * 4 - 0.5, (1024, 1024)).astype(float)
    shrunk = large.reshape(256, 4, 256, 4, 3).mean(axis=(1, 3))
    assert abs(shrunk.mean() / small.mean() - 1) < 0.2
    assert np.corrcoef(small.ravel(), shrunk.ravel())[0, 1] > 0.95


def test_drawing_is_antialiased_below_a_pixel(face_68):
    points = landmarks.from_68(face_68)[0, :, :2]
    assert (landmarks.draw(points, (256, 256)) != landmarks.draw(points + 0.25, (256, 256))).any()


def test_drawing_shows_after_sixteenfold_shrinking():
    points = np.full((72, 2), -1000.0)
    points[17:22] = np.stack([np.linspace(60, 100, 5), np.full(5, 90)], axis=1)
    drawing = landmarks.draw(points, (256, 256)).reshape(16, 16, 16, 16, 3).mean(axis=(1, 3))
    assert drawing[..., 0].max() > 30


def test_outside_the_frame_falls_off(face_68):
    points = landmarks.from_68(face_68)[0, :, :2]
    assert not landmarks.draw(points + 5000, (256, 256)).any()
    assert landmarks.draw(points, (100, 160)).shape == (100, 160, 3)


def test_mirrored_points_draw_the_mirrored_picture(face_68):
    points = landmarks.from_68(face_68)[0, :, :2]
    # The two sides have different colours, so only what is covered is compared.
    covered = landmarks.draw(points, (256, 256)).max(-1) > 100
    flipped = landmarks.draw(landmarks.mirror(points, 256), (256, 256)).max(-1) > 100
    assert (covered[:, ::-1] != flipped).mean() < 0.01

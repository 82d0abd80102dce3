"""One pixel convention: points stay on what they mark, whatever is done to the picture."""

import numpy as np
import pytest

from facesnap.geometry import in_crop, letterbox, moved, resized, similarity, square_crop, warp


@pytest.mark.parametrize(
    "source, target", [((600, 600), (832, 1216)), ((300, 900), (512, 512)), ((64, 48), (768, 1024))]
)
def test_letterbox_never_stretches(source, target):
    corners = np.array([[-0.5, -0.5], [source[1] - 0.5, -0.5], [source[1] - 0.5, source[0] - 0.5]])
    placed = letterbox(corners, source, target)
    across, down = np.linalg.norm(np.diff(placed, axis=0), axis=1)
    assert across / down == pytest.approx(source[1] / source[0], rel=1e-4)
    assert (placed > -0.51).all() and (placed < np.array(target[::-1]) - 0.49).all()  # the whole picture is in
    assert across == pytest.approx(target[1]) or down == pytest.approx(target[0])  # and touches two sides
    middle = placed[[0, 2]].mean(axis=0)
    assert np.allclose(middle, (np.array(target[::-1]) - 1) / 2, atol=1e-3)


def test_crop_is_square_centred_and_continues_the_edge():
    image = np.zeros((100, 200, 3), np.uint8)
    image[:, :100] = (10, 20, 30)
    image[40:60, 90:110] = 255
    crop = square_crop(image, np.array([80, 40, 120, 60], np.float32))  # 72 pixels wide, inside
    assert (crop[112, 112] == 255).all() and (crop[112, 10] == (10, 20, 30)).all() and (crop[112, 213] == 0).all()
    tall = square_crop(image, np.array([-20, -60, 80, 60], np.float32))  # mostly outside
    assert tall.shape == (224, 224, 3) and (tall[0, 0] == (10, 20, 30)).all()


def ramps(height, width):
    """A picture whose red says the column and whose green the row of every pixel."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x, y, 0 * x], axis=-1).astype(np.uint8)


def read(picture, points):
    """Red and green at points (N, 2), between pixels as well."""
    x, y = np.floor(points.astype(float)).astype(int).T
    u, v = (points - np.floor(points)).T[..., None]
    p = picture[..., :2].astype(float)
    return (1 - v) * ((1 - u) * p[y, x] + u * p[y, x + 1]) + v * ((1 - u) * p[y + 1, x] + u * p[y + 1, x + 1])


@pytest.mark.parametrize("side", [20.3, 40.0, 41.6, 73.9, 120.2])
def test_points_in_a_crop_mark_the_pixels_they_marked_in_the_picture(side):
    """The crop begins at whole pixels wherever the box lies: at a face of 40 pixels, leaving that out costs one."""
    rng = np.random.default_rng(0)
    picture = ramps(250, 250)
    for corner in rng.uniform(60, 70, (20, 2)):
        box = np.array([*corner, *(corner + side * np.array([0.8, 1.0]))])
        points = corner + side * rng.uniform(0.1, 0.7, (5, 2))
        assert np.abs(read(square_crop(picture, box), in_crop(points, box)) - points).max() < 0.6  # and rounding


def test_a_warp_that_shrinks_moves_nothing():
    matrix = np.array([[0.3, 0.1, 5.2], [-0.1, 0.3, 20.7]])
    points = np.array([[60.0, 70.5], [80.2, 100.0], [101.7, 55.1]])
    assert np.abs(read(warp(ramps(200, 200), matrix, 80), moved(points, matrix)) - points).max() < 1


def test_resizing_takes_corners_to_corners():
    assert np.array_equal(resized(np.array([[-0.5, 9.5]]), 4), [[-0.5, 39.5]])
    assert np.array_equal(resized(np.array([[3.0, 4.0]]), 1, np.array([3.0, 4.0])), [[0, 0]])


def test_similarity_finds_the_matrix_of_every_row_and_no_mirror():
    rng = np.random.default_rng(1)
    source = rng.normal(size=(4, 5, 2))
    matrices = similarity(source, target := rng.normal(size=(5, 2)))
    for points, matrix in zip(source, matrices, strict=True):
        assert np.allclose(matrix, similarity(points, target)) and np.linalg.det(matrix[:, :2]) > 0
        best = np.square(points @ matrix[:, :2].T + matrix[:, 2] - target).sum()
        for change in 1e-3 * rng.normal(size=(8, 4)):  # of turn, scale and shift
            a, b, x, y = np.array([*matrix[:, 0], *matrix[:, 2]]) + change
            other = points @ np.array([[a, -b], [b, a]]).T + [x, y]
            assert np.square(other - target).sum() > best
    exact = np.array([[0.9, -0.2, 3.0], [0.2, 0.9, -1.0]])
    assert np.allclose(similarity(source[0], source[0] @ exact[:, :2].T + exact[:, 2]), exact)

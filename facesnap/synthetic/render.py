"""Rendering: meshes -> z-buffer -> shadows -> paint and light -> style, with exact landmarks and masks.

`render(picture, size)` is the whole of it. The z-buffer has 2 x 2 samples a pixel. All four are shaded at edges and
where the face has fine features, two on hair and other patterned surfaces, one on plain ones.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from facesnap.synthetic.hair import BUN_GRID, bun_mesh, curtain_mesh, hair_mesh
from facesnap.synthetic.head import landmarks
from facesnap.synthetic.light import key_vectors, shade
from facesnap.synthetic.meshes import (
    HAND_GRID,
    LENS_GRID,
    NECK_GRID,
    TORSO_GRID,
    ear_mesh,
    glasses_meshes,
    grid_triangles,
    hand_meshes,
    hat_mesh,
    head_mesh,
    lens_mesh,
    lift,
    neck_mesh,
    rotation,
    torso_mesh,
    visor_mesh,
)
from facesnap.synthetic.parameters import Picture
from facesnap.synthetic.raster import SHADOW_EXTENT, vertex_normals, z_buffer
from facesnap.synthetic.styles import apply_style

PIVOT = np.array([0.0, -0.75, -0.15])  # where the neck turns

HEAD, NECK, EAR, HAIR, CLOTHES, GLASSES, HAT, CURTAIN, HAND = range(1, 10)
# labels of the mask: 0 background, 1 face skin, 2 hair, 3 neck, hand and clothes, 4 glasses, 5 hat
LABELS = np.array([0, 1, 3, 1, 2, 3, 4, 5, 2, 3], np.uint8)

CAMERA = 6.5  # distance of the camera, in head units
SHADOW_MAP = 160
HEAD_GRID, HAIR_GRID, CURTAIN_GRID, HAT_GRID, VISOR_GRID = (124, 104), (96, 72), (60, 36), (72, 30), (24, 10)
EAR_GRID = (18, 12)


@dataclass(frozen=True)
class Rendered:
    """A rendered picture and what is known of it exactly."""

    image: np.ndarray  # (S, S, 3) uint8 RGB
    mask: np.ndarray  # (S, S) uint8, see LABELS
    landmarks: np.ndarray  # (72, 2) float32, pixels
    landmarks3d: np.ndarray  # (72, 3) float32, head frame


triangles = lru_cache(maxsize=None)(grid_triangles)


def project(points, p, size):
    """World points (N, 3) -> (N, 3): x and y in pixels (x right, y down) and a depth that grows towards the camera."""
    focal = size / 3.0 * p["scale"]
    depth = CAMERA / (CAMERA - points[:, 2])
    x = size / 2 + focal * points[:, 0] * depth + size / 2 * p["shift_x"]
    y = size / 2 - focal * (points[:, 1] + 0.06) * depth - size / 2 * p["shift_y"]
    return np.stack([x, y, depth], 1)


def head_rotation(p):
    return rotation(float(p["yaw"]), float(p["pitch"]), float(p["roll"]))


def to_world(points, p):
    """Head frame -> world: the head turns about the neck."""
    return (points - PIVOT) @ head_rotation(p).T + PIVOT


def build(p):
    """All surfaces of one picture in the world frame: a list of (V, C, triangles, part), the face first."""
    on_head = [(to_world(V, p), C, T, part) for V, C, T, part in (*head_and_hair(p), *worn(p))]
    torso = rotation(float(p["torso_yaw"]), 0.0, float(p["roll"]) * 0.15)
    top, bottom = to_world(np.array([[0, -0.55, -0.12]]), p)[0], torso @ np.array([0, -1.75 + lift(p), -0.28])
    neck = (*neck_mesh(p, top, bottom), triangles(*NECK_GRID, True), NECK)
    V, C = torso_mesh(p)
    return [*on_head, neck, (V @ torso.T, C, triangles(*TORSO_GRID, True), CLOTHES)]


def head_and_hair(p):
    """Face, ears and hair in the head frame, as in `build`."""
    yield shell(head_mesh, HEAD_GRID, HEAD, p)
    for side in (-1.0, 1.0):
        V, C = np.empty((2, EAR_GRID[0] * EAR_GRID[1], 3))
        ear_mesh(p, side, *EAR_GRID, V, C)
        yield V, C, triangles(*EAR_GRID, side < 0), EAR
    if p["hair_thickness"] > 0.012:
        yield shell(hair_mesh, HAIR_GRID, HAIR, p)
    if p["curtain_length"] > 0:
        yield shell(curtain_mesh, CURTAIN_GRID, CURTAIN, p)
    if p["bun"] > 0 and p["hat"] == 0:
        yield *bun_mesh(p, *BUN_GRID), triangles(*BUN_GRID), HAIR


def worn(p):
    """Hat, glasses and a hand at the face in the head frame, as in `build`."""
    if p["hat"] > 0:
        yield shell(hat_mesh, HAT_GRID, HAT, p)
    if p["hat"] == 2:
        yield shell(visor_mesh, VISOR_GRID, HAT, p)
    if p["glasses"] > 0:
        for V, n in glasses_meshes(p):
            yield V, np.ones_like(V), triangles(6, n), GLASSES
    if p["sunglasses"] > 0:
        for side in (-1.0, 1.0):
            yield *lens_mesh(p, side), triangles(*LENS_GRID), GLASSES
    if p["hand"] > 0:
        for V, C in hand_meshes(p):
            yield V, C, triangles(*HAND_GRID), HAND


def shell(mesh, grid, part, p):
    """A surface that is a grid of points."""
    V, C = np.empty((2, grid[0] * grid[1], 3))
    mesh(p, *grid, V, C)
    return V, C, triangles(*grid, False), part


def fine_features(C, p):
    """Which points of the face, by their paint coordinates (N, 3), carry eyes, brows, mouth, nostrils or beard."""
    x, y, z = np.abs(C[:, 0]), C[:, 1], C[:, 2]
    brows = p["eye_y"] + p["brow_height"] + 0.16  # raised and arched ones too
    eyes = (y > p["eye_y"] - 0.15) & (y < brows) & (x < 0.64)
    mouth = (y < p["eye_y"] - p["nose_length"] + 0.03) & (x < p["mouth_width"] * 1.45) & (y > p["mouth_y"] - 0.35)
    bearded = p["beard"] + p["goatee"] + p["stubble"] > 0.4
    return (z > 0) & (eyes | mouth | (bearded & (y < p["eye_y"] - 0.15)))


def render(picture: Picture, size: int = 256) -> Rendered:
    """Render one picture at size x size pixels."""
    p = picture.parameters[()]
    meshes = build(p)
    starts = np.cumsum([0] + [len(m[0]) for m in meshes])
    V = np.concatenate([m[0] for m in meshes])
    C = np.concatenate([m[1] for m in meshes])
    N = np.empty_like(V)
    for (_, _, T, _), start, end in zip(meshes, starts, starts[1:], strict=False):
        vertex_normals(V[start:end], T, N[start:end])
    T = np.concatenate([m[2] + np.int32(start) for m, start in zip(meshes, starts, strict=False)])
    part = np.concatenate([np.full(len(m[2]), m[3], np.int32) for m in meshes])

    n = size * 2
    S = project(V, p, n)
    S[:, :2] -= 0.5  # sample centres
    closed = (part == HEAD) | (part == HAIR) | (part == NECK)
    _, which, b0, b1 = z_buffer(S, T, closed, 1.0, n, 0.0)

    vectors = key_vectors(p)
    light = vectors[:3]
    side = np.cross((0.0, 1.0, 0.0), light)
    side /= np.linalg.norm(side)
    frame = np.stack([side, np.cross(light, side)])
    half = (SHADOW_MAP - 1) / 2
    L = np.concatenate([half + half / SHADOW_EXTENT * (V @ frame.T), V @ light[:, None]], 1)
    casts = (part != GLASSES) & (part != CLOTHES)
    shadow = z_buffer(L, T[casts], closed[casts], -1.0, SHADOW_MAP, -9.0)[0]

    image, mask = np.empty((size, size, 3), np.uint8), np.empty((size, size), np.uint8)
    up = np.ascontiguousarray(head_rotation(p)[:, 1])
    fine = np.zeros(len(T), bool)
    face = meshes[0][2]  # the head comes first
    fine[: len(face)] = fine_features(C[: starts[1]], p)[face[:, 0]]
    shade(which, b0, b1, V, N, C, T, part, fine, p, vectors, frame, shadow, up, image, LABELS, mask)
    points = landmarks(p)
    xy = project(to_world(points, p), p, size)[:, :2] - 0.5
    image = apply_style(image, picture.style, seed=picture.person.seed)
    return Rendered(image, mask, xy.astype(np.float32), points.astype(np.float32))

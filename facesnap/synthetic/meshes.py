"""Surfaces of the rendered people beside their hair: head, ears, hats, glasses, hand, neck and torso.

Each mesh fills V, its vertices (n, 3), and C, the coordinates that the paint needs (n, 3).
"""

import math

import numpy as np

from facesnap.synthetic.hair import beard_density, hat_line
from facesnap.synthetic.head import azimuth, front_point, relief, skull
from facesnap.synthetic.numerics import jit, smoothstep


@jit
def head_mesh(p, columns, rows, V, C):
    k = 0
    for j in range(rows):
        phi = -math.pi / 2 + math.pi * j / (rows - 1)
        for i in range(columns):
            x, y, z = skull(azimuth(i, columns), phi, p)
            dy, dz = relief(x, y, z, p)
            thick = p.beard_length * beard_density(x, y, z, p) if p.beard_length > 0 else 0.0
            V[k, 0] = x + x * thick * 0.5
            V[k, 1] = y + dy - thick * 0.5 * smoothstep(-0.4, -0.9, y)
            V[k, 2] = z + dz + thick * 0.6 * smoothstep(0.0, 0.4, z)
            C[k, 0] = x
            C[k, 1] = y
            C[k, 2] = z
            k += 1


@jit
def hat_mesh(p, columns, rows, V, C):
    """A beanie (hat 1, knitted, with a turned-up band) or the crown of a cap (hat 2): a shell over skull and hair."""
    k = 0
    lift = 0.055 + min(p.hair_thickness, 0.12) * 0.45
    for j in range(rows):
        v = j / (rows - 1.0)
        for i in range(columns):
            u = -math.pi + 2 * math.pi * i / (columns - 1)
            low = math.asin(min(hat_line(u) / p.upper_height, 0.99))
            x, y, z = skull(u, low + (math.pi / 2 - low) * v, p)
            r = math.sqrt(x * x + y * y + z * z) + 1e-6
            out = lift + 0.05 * smoothstep(0.5, 1.0, v)
            if p.hat == 1:
                out += 0.045 * (1 - smoothstep(0.22, 0.27, v)) + 0.012 * math.sin(u * 30) * smoothstep(0.0, 0.05, v)
            out -= 0.05 * (1 - smoothstep(0.0, 0.035, v))  # the edge curls in to the head
            V[k, 0] = x + out * x / r
            V[k, 1] = y + out * (y / r + 0.2)
            V[k, 2] = z + out * z / r
            C[k, 0] = u
            C[k, 1] = v
            C[k, 2] = 0.0
            k += 1


@jit
def visor_mesh(p, columns, rows, V, C):
    """The visor of a cap."""
    k = 0
    lift = 0.04 + min(p.hair_thickness, 0.12) * 0.45
    for j in range(rows):
        v = j / (rows - 1.0)
        for i in range(columns):
            t = -1 + 2.0 * i / (columns - 1)
            u = 1.0 * t
            low = math.asin(min(hat_line(u) / p.upper_height, 0.99))
            x, y, z = skull(u, low, p)
            reach = 0.42 * v * math.cos(t * math.pi / 2) ** 0.6
            V[k, 0] = x * (1.05 + 0.04 * v)
            V[k, 1] = y + 0.02 - 0.30 * reach - 0.10 * t * t * v
            V[k, 2] = z + lift + reach
            C[k, 0] = t
            C[k, 1] = v
            C[k, 2] = 1.0
            k += 1


@jit
def ear_mesh(p, side, columns, rows, V, C):
    k = 0
    for j in range(rows):
        a = math.pi * j / (rows - 1)
        for i in range(columns):
            b = 2 * math.pi * i / (columns - 1)
            lx = math.sin(a) * math.cos(b)
            ly = math.sin(a) * math.sin(b)
            lz = math.cos(a)
            dish = 0.065 * math.exp(-(lx * lx + ly * ly) * 4) if lz > 0 else 0.0
            out = lz * 0.05 - dish + 0.03 * abs(ly)
            depth = lx * 0.11 * p.ear_size * (1 + 0.25 * ly)
            V[k, 0] = side * (p.face_width * 0.985 + 0.03 + out * math.cos(0.5) - depth * math.sin(0.5))
            V[k, 1] = p.eye_y - 0.10 + ly * 0.19 * p.ear_size
            V[k, 2] = out * math.sin(0.5) + depth * math.cos(0.5) - 0.12
            C[k, 0] = lx
            C[k, 1] = ly
            C[k, 2] = lz
            k += 1


def tube(path, radius, sides=6):
    """A tube around a path (n, 3): vertices (n * sides, 3)."""
    tangent = np.gradient(path, axis=0)
    tangent /= np.linalg.norm(tangent, axis=1, keepdims=True) + 1e-9
    a = np.cross(tangent, (0.01, 0.03, 1.0))
    a /= np.linalg.norm(a, axis=1, keepdims=True) + 1e-9
    b = np.cross(tangent, a)
    angle = np.linspace(0, 2 * np.pi, sides)[None, :, None]
    return (path[:, None] + radius * (np.cos(angle) * a[:, None] + np.sin(angle) * b[:, None])).reshape(-1, 3)


GLASSES = {
    1: (0.225, 0.195, 2.0, 0.016),
    2: (0.25, 0.165, 4.0, 0.024),
}  # round, square: half sizes, exponent, wire


def glasses_meshes(p):
    """Rims, bridge and temples as tubes: a list of (vertices, points along the path)."""
    half_w, half_h, power, wire = GLASSES[int(p["glasses"])]
    ex, ey = max(float(p["eye_spacing"]), half_w + 0.05), float(p["eye_y"])
    front = front_point(float(p["eye_spacing"]), ey, p)[2] + 0.15

    def bent(x):
        return front - 0.22 * np.maximum(np.abs(x) - 0.1, 0) ** 1.6

    def corner(v):
        return np.sign(v) * np.abs(v) ** (2 / power)

    t = np.linspace(0, 2 * np.pi, 36)
    out = []
    for side in (-1, 1):
        x = side * ex + half_w * corner(np.cos(t))
        out.append((tube(np.stack([x, ey - 0.015 + half_h * corner(np.sin(t)), bent(x)], 1), wire), len(t)))
        hinge = side * (ex + half_w)
        k = np.linspace(0, 1, 8)[:, None]
        start, end = (
            np.array([hinge, ey + 0.03, bent(hinge)]),
            np.array([side * (p["face_width"] + 0.06), ey + 0.02, -0.1]),
        )
        out.append((tube((1 - k) * start + k * end, wire), 8))
    k = np.linspace(-1, 1, 8)
    x = k * (ex - half_w)
    out.append((tube(np.stack([x, ey + 0.04 + 0.03 * (1 - k * k), np.full(8, front) + 0.02], 1), wire), 8))
    return out


LENS_GRID = (36, 4)


def lens_mesh(p, side):
    """A dark lens within the rim of one eye, in the grid LENS_GRID; C is 2 to tell it from the frame."""
    half_w, half_h, power, _ = GLASSES[int(p["glasses"])]
    ex, ey = max(float(p["eye_spacing"]), half_w + 0.05), float(p["eye_y"])
    front = front_point(float(p["eye_spacing"]), ey, p)[2] + 0.15
    r, t = np.meshgrid(np.linspace(0.02, 1, LENS_GRID[1]), np.linspace(0, 2 * np.pi, LENS_GRID[0]), indexing="ij")
    across, along = (np.sign(v) * np.abs(v) ** (2 / power) for v in (np.cos(t), np.sin(t)))
    x = side * ex + half_w * r * across
    z = front - 0.22 * np.maximum(np.abs(x) - 0.1, 0) ** 1.6
    V = np.stack([x, ey - 0.015 + half_h * r * along, z], -1).reshape(-1, 3)
    return V, np.full_like(V, 2.0)


HAND_GRID = (16, 12)


def hand_meshes(p):
    """A hand before the mouth: a palm, four fingers and a thumb as long rounded bodies, a list of (V, C)."""
    along, around = np.meshgrid(np.linspace(0, 1, HAND_GRID[1]), np.linspace(0, 2 * np.pi, HAND_GRID[0]), indexing="ij")
    x, y = float(p["hand_x"]), float(p["mouth_y"] + p["hand_y"])
    place = np.array([x, y, front_point(0.0, float(p["mouth_y"]), p)[2] + 0.20])
    turn = rotation(0.0, 0.0, float(p["hand_turn"]))
    bodies = [((0.0, -0.42, 0.0), (0.0, 0.10, 0.0), 0.23, 0.09)]  # start, end, half width, half depth
    for k in range(4):
        bodies.append(
            ((-0.165 + 0.11 * k, 0.02, 0.02), (-0.19 + 0.127 * k, 0.46 - 0.05 * abs(k - 1.4), -0.03), 0.062, 0.06)
        )
    bodies.append(((0.17, -0.25, 0.03), (0.36, 0.08, 0.0), 0.068, 0.066))
    out = []
    for first, last, half_w, half_d in bodies:
        start, end = np.array(first), np.array(last)
        axis = (end - start) / np.linalg.norm(end - start)
        across = np.cross(axis, (0.0, 0.0, 1.0))
        swell = np.sin(np.pi * (0.02 + 0.96 * along)) ** 0.35
        V = start + along[..., None] * (end - start)
        V = V + (np.cos(around) * swell * half_w)[..., None] * across
        V = V + (np.sin(around) * swell * half_d)[..., None] * np.array([0.0, 0.0, 1.0])
        C = np.stack([along, around, 0 * along], -1)
        out.append(((V.reshape(-1, 3) @ turn.T) + place, C.reshape(-1, 3)))
    return out


NECK_GRID, TORSO_GRID = (32, 12), (52, 26)


def neck_mesh(p, top, bottom):
    """A tube from `top` in the head to `bottom` in the chest, both (3,) in the world frame."""
    s, u = np.meshgrid(np.linspace(0, 1, NECK_GRID[1]), np.linspace(-np.pi, np.pi, NECK_GRID[0]), indexing="ij")
    r = float(p["neck_width"]) * (1 + 0.75 * np.maximum(s - 0.6, 0) ** 1.5)
    V = top + (bottom - top) * s[..., None] + np.stack([r * np.sin(u), 0 * u, r * 0.92 * np.cos(u)], -1)
    return V.reshape(-1, 3), np.stack([u, s, 0 * u], -1).reshape(-1, 3)


def lift(p):
    """How much higher than a long head's the shoulders of a short one are: necks are about equally long."""
    return 0.75 * (1.0 - float(p["lower_height"]))


def torso_mesh(p):
    """Shoulders and chest, before the torso turns. A short face stands lower between them."""
    width, shoulders = float(p["neck_width"]), float(p["shoulders"])
    s, u = np.meshgrid(np.linspace(0, 1, TORSO_GRID[1]), np.linspace(-np.pi, np.pi, TORSO_GRID[0]), indexing="ij")
    su, cu, rise = np.sin(u), np.cos(u), np.clip(s / 0.5, 0, 1)
    half_w = width * 1.05 + (shoulders - width * 1.05) * rise**0.8
    half_d = width + (0.20 + 0.30 * shoulders - width) * rise**0.9
    y = (
        -1.38
        + lift(p)
        - 0.38 * rise**1.9 * (0.5 + 0.5 * np.abs(su))
        - 0.10 * rise * (1 - np.abs(su))
        - np.clip(s - 0.45, 0, 1) * 3.2
        - 6.0 * (s == 1)  # the last ring, far down: a picture from afar must not show where the body ends
    )
    z = half_d * cu - 0.25 + 0.12 * np.clip(s - 0.3, 0, 1) * np.maximum(cu, 0)
    V = np.stack([half_w * np.sign(su) * np.abs(su) ** 0.9, y, z], -1).reshape(-1, 3)
    return V, np.stack([V[:, 0], V[:, 1] + 1.45 - lift(p), cu.ravel()], -1)


def grid_triangles(columns, rows, flip=False):
    """Two triangles a cell of a (rows, columns) grid of vertices."""
    j, i = np.meshgrid(np.arange(rows - 1), np.arange(columns - 1), indexing="ij")
    a = (j * columns + i).ravel()
    b, c, d = a + 1, a + columns, a + columns + 1
    T = np.concatenate([np.stack([a, b, d], 1), np.stack([a, d, c], 1)]).astype(np.int32)
    return T[:, [0, 2, 1]] if flip else T


def rotation(yaw, pitch, roll):
    """R = Rz(roll) Ry(yaw) Rx(pitch), radians."""
    cy, sy, cp, sp, cr, sr = (
        np.cos(yaw),
        np.sin(yaw),
        np.cos(pitch),
        np.sin(pitch),
        np.cos(roll),
        np.sin(roll),
    )
    ry = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    rx = np.array([[1, 0, 0], [0, cp, -sp], [0, sp, cp]])
    return np.array([[cr, -sr, 0], [sr, cr, 0], [0, 0, 1]]) @ ry @ rx

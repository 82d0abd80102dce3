"""Rendering: meshes -> z-buffer -> shadows -> paint and light -> style, with exact landmarks and masks.

`render(picture, size)` is the whole of it. The z-buffer has 2 x 2 samples a pixel. All four are shaded at edges and
where the face has fine features, two on hair and other patterned surfaces, one on plain ones.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from facesnap.synthetic import paint
from facesnap.synthetic.head import (
    PIVOT,
    bun_mesh,
    curtain_mesh,
    ear_mesh,
    glasses_meshes,
    grid_triangles,
    hair_mesh,
    hat_mesh,
    head_mesh,
    jit,
    landmarks,
    rotation,
    smoothstep,
    visor_mesh,
)
from facesnap.synthetic.people import Picture
from facesnap.synthetic.styles import apply_style

HEAD, NECK, EAR, HAIR, CLOTHES, GLASSES, HAT, CURTAIN = range(1, 9)
# labels of the mask: 0 background, 1 face skin, 2 hair, 3 neck and clothes, 4 glasses, 5 hat
LABELS = np.array([0, 1, 3, 1, 2, 3, 4, 5, 2], np.uint8)

CAMERA = 6.5  # distance of the camera, in head units
SHADOW_MAP, SHADOW_EXTENT = 160, 2.1
HEAD_GRID, HAIR_GRID, CURTAIN_GRID, HAT_GRID, VISOR_GRID = (124, 104), (96, 72), (60, 36), (72, 30), (24, 10)
EAR_GRID, BUN_GRID, NECK_GRID, TORSO_GRID = (18, 12), (24, 14), (32, 12), (52, 26)


def display_curve(n=4096):
    """Linear light 0..2 -> 8 bit: a filmic shoulder, then display gamma, as a table because powers are slow."""
    v = np.linspace(0, 2, n)
    v = v * (2.51 * v + 0.03) / (v * (2.43 * v + 0.59) + 0.14)
    return (np.clip(v, 0, 1) ** 0.4545 * 255 + 0.5).astype(np.uint8)


DISPLAY = display_curve()


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
    """All surfaces of one picture in the world frame: a list of (V, C, triangles, part)."""
    head, body = [], []

    def shell(mesh, grid, part, flip=False):
        V, C = np.empty((2, grid[0] * grid[1], 3))
        mesh(p, *grid, V, C)
        head.append((V, C, triangles(*grid, flip), part))

    shell(head_mesh, HEAD_GRID, HEAD)
    for side in (-1.0, 1.0):
        V, C = np.empty((2, EAR_GRID[0] * EAR_GRID[1], 3))
        ear_mesh(p, side, *EAR_GRID, V, C)
        head.append((V, C, triangles(*EAR_GRID, side < 0), EAR))
    if p["hair_thickness"] > 0.012:
        shell(hair_mesh, HAIR_GRID, HAIR)
    if p["curtain_length"] > 0:
        shell(curtain_mesh, CURTAIN_GRID, CURTAIN)
    if p["bun"] > 0 and p["hat"] == 0:
        head.append((*bun_mesh(p, *BUN_GRID), triangles(*BUN_GRID), HAIR))
    if p["hat"] > 0:
        shell(hat_mesh, HAT_GRID, HAT)
    if p["hat"] == 2:
        shell(visor_mesh, VISOR_GRID, HAT)
    if p["glasses"] > 0:
        for V, n in glasses_meshes(p):
            head.append((V, np.ones_like(V), triangles(6, n), GLASSES))
    head = [(to_world(V, p), C, T, part) for V, C, T, part in head]

    torso = rotation(float(p["torso_yaw"]), 0.0, float(p["roll"]) * 0.15)
    width = float(p["neck_width"])
    s, u = np.meshgrid(np.linspace(0, 1, NECK_GRID[1]), np.linspace(-np.pi, np.pi, NECK_GRID[0]), indexing="ij")
    r = width * (1 + 0.75 * np.maximum(s - 0.6, 0) ** 1.5)
    top, bottom = to_world(np.array([[0, -0.55, -0.12]]), p)[0], torso @ np.array([0, -1.75, -0.28])
    V = top + (bottom - top) * s[..., None] + np.stack([r * np.sin(u), 0 * u, r * 0.92 * np.cos(u)], -1)
    C = np.stack([u, s, 0 * u], -1)
    body.append((V.reshape(-1, 3), C.reshape(-1, 3), triangles(*NECK_GRID, True), NECK))

    s, u = np.meshgrid(np.linspace(0, 1, TORSO_GRID[1]), np.linspace(-np.pi, np.pi, TORSO_GRID[0]), indexing="ij")
    su, cu, rise = np.sin(u), np.cos(u), np.clip(s / 0.5, 0, 1)
    half_w = width * 1.05 + (1.42 - width * 1.05) * rise**0.8
    half_d = width + (0.62 - width) * rise**0.9
    y = (
        -1.38
        - 0.38 * rise**1.9 * (0.5 + 0.5 * np.abs(su))
        - 0.10 * rise * (1 - np.abs(su))
        - np.clip(s - 0.45, 0, 1) * 3.2
        - 6.0 * (s == 1)  # the last ring, far down: a picture from afar must not show where the body ends
    )
    z = half_d * cu - 0.25 + 0.12 * np.clip(s - 0.3, 0, 1) * np.maximum(cu, 0)
    V = np.stack([half_w * np.sign(su) * np.abs(su) ** 0.9, y, z], -1).reshape(-1, 3)
    C = np.stack([V[:, 0], V[:, 1] + 1.45, cu.ravel()], -1)
    body.append((V @ torso.T, C, triangles(*TORSO_GRID, True), CLOTHES))
    return head + body


@jit
def vertex_normals(V, T, N):
    N[:] = 0.0
    for t in range(T.shape[0]):
        a = T[t, 0]
        b = T[t, 1]
        c = T[t, 2]
        e0 = V[b, 0] - V[a, 0]
        e1 = V[b, 1] - V[a, 1]
        e2 = V[b, 2] - V[a, 2]
        f0 = V[c, 0] - V[a, 0]
        f1 = V[c, 1] - V[a, 1]
        f2 = V[c, 2] - V[a, 2]
        n0 = e1 * f2 - e2 * f1
        n1 = e2 * f0 - e0 * f2
        n2 = e0 * f1 - e1 * f0
        for q in (a, b, c):
            N[q, 0] += n0
            N[q, 1] += n1
            N[q, 2] += n2
    for i in range(N.shape[0]):
        length = math.sqrt(N[i, 0] ** 2 + N[i, 1] ** 2 + N[i, 2] ** 2) + 1e-9
        for k in range(3):
            N[i, k] /= length


@jit
def rasterise(S, T, closed, depth, which, b0, b1):
    """Fill the z-buffer: nearest triangle of every sample and its first two barycentric weights.

    Triangles of closed surfaces that face away are skipped.
    """
    H, W = depth.shape
    for t in range(T.shape[0]):
        a = T[t, 0]
        b = T[t, 1]
        c = T[t, 2]
        x0 = S[a, 0]
        y0 = S[a, 1]
        x1 = S[b, 0]
        y1 = S[b, 1]
        x2 = S[c, 0]
        y2 = S[c, 1]
        area = (x1 - x0) * (y2 - y0) - (x2 - x0) * (y1 - y0)
        if abs(area) < 1e-9 or (closed[t] and area > 0):
            continue
        left = max(int(math.ceil(min(x0, x1, x2))), 0)
        right = min(int(math.floor(max(x0, x1, x2))), W - 1)
        up = max(int(math.ceil(min(y0, y1, y2))), 0)
        down = min(int(math.floor(max(y0, y1, y2))), H - 1)
        inverse = 1.0 / area
        for py in range(up, down + 1):
            for px in range(left, right + 1):
                w1 = ((px - x0) * (y2 - y0) - (x2 - x0) * (py - y0)) * inverse
                w2 = ((x1 - x0) * (py - y0) - (px - x0) * (y1 - y0)) * inverse
                w0 = 1 - w1 - w2
                if w0 < -1e-5 or w1 < -1e-5 or w2 < -1e-5:
                    continue
                z = w0 * S[a, 2] + w1 * S[b, 2] + w2 * S[c, 2]
                if z > depth[py, px]:
                    depth[py, px] = z
                    which[py, px] = t
                    b0[py, px] = w0
                    b1[py, px] = w1


@jit
def lit(shadow, sx, sy, sz):
    """Share of the key light that arrives: 3 x 3 taps in the light's depth map."""
    H, W = shadow.shape
    ix = int(sx + 0.5)
    iy = int(sy + 0.5)
    if ix < 1 or iy < 1 or ix >= W - 1 or iy >= H - 1:
        return 1.0
    total = 0.0
    for j in range(-1, 2):
        for i in range(-1, 2):
            total += min(max(1.0 - (shadow[iy + j, ix + i] - sz) * 20.0, 0.0), 1.0)
    return total / 9.0


@jit
def shade_sample(t, w0, w1, V, N, C, T, part, p, light, frame, shadow, up, c):
    """Linear RGB of one sample of triangle t into c."""
    a = T[t, 0]
    b = T[t, 1]
    d = T[t, 2]
    w2 = 1 - w0 - w1
    nx = w0 * N[a, 0] + w1 * N[b, 0] + w2 * N[d, 0]
    ny = w0 * N[a, 1] + w1 * N[b, 1] + w2 * N[d, 1]
    nz = w0 * N[a, 2] + w1 * N[b, 2] + w2 * N[d, 2]
    length = math.sqrt(nx * nx + ny * ny + nz * nz) + 1e-9
    nx /= length
    ny /= length
    nz /= length
    kind = part[t]
    if nz < 0 and kind != 1:  # shells are seen from both sides
        nx = -nx
        ny = -ny
        nz = -nz
    if kind == 5 and ny < 0:  # a shoulder's far side
        ny = -ny
    x = w0 * C[a, 0] + w1 * C[b, 0] + w2 * C[d, 0]
    y = w0 * C[a, 1] + w1 * C[b, 1] + w2 * C[d, 1]
    z = w0 * C[a, 2] + w1 * C[b, 2] + w2 * C[d, 2]
    gloss = 0.2
    shine = 22.0
    eye = 0.0
    reach = 1.0  # of ambient light
    skin = False
    strand = -1.0
    if kind == 1:
        gloss, eye = paint.face(x, y, z, p, c)
        skin = True
        reach = 1 - 0.35 * smoothstep(-0.1, -0.8, ny) * smoothstep(-0.75, -0.98, y / p.lower_height)
    elif kind == 2:
        c[0] = p.skin[0] * 0.97
        c[1] = p.skin[1] * 0.95
        c[2] = p.skin[2] * 0.94
        skin = True
        reach = 0.55 + 0.45 * smoothstep(0.0, 0.6, y)
    elif kind == 3:
        c[0] = p.skin[0]
        c[1] = p.skin[1] * 0.9
        c[2] = p.skin[2] * 0.88
        skin = True
        reach = 0.55 + 0.45 * smoothstep(0.15, 0.6, math.hypot(x * 0.9, y - 0.02))
    elif kind == 4 or kind == 8:
        strand = paint.hair(x, y, p, c)
        gloss = 0.0
        reach = 0.85 if kind == 8 else 0.6 + 0.4 * smoothstep(0.0, 0.12, z)
        if kind == 8:
            reach *= 0.6 + 0.4 * smoothstep(0.0, 0.2, z)
    elif kind == 5:
        skin = paint.clothes(x, y, z, p, c) > 0
        gloss = 0.15 if skin else 0.04
        reach = 0.8 if skin else 1.0
    elif kind == 6:
        c[0] = p.glasses_colour[0]
        c[1] = p.glasses_colour[1]
        c[2] = p.glasses_colour[2]
        gloss = 0.8
        shine = 40.0
    else:
        knit = 1.0
        if p.hat == 1:
            knit = 0.80 + 0.2 * abs(math.sin(x * 26)) + 0.08 * math.sin(y * 120)
            knit *= 1 - 0.35 * smoothstep(0.02, 0.0, abs(y - 0.245))
        elif z < 0.5:
            knit = 1 - 0.25 * smoothstep(0.03, 0.0, abs(abs(x) % 1.05 - 0.02))
        for k in range(3):
            c[k] = p.hat_colour[k] * knit
        gloss = 0.05
    lx = light[0]
    ly = light[1]
    lz = light[2]
    facing = nx * lx + ny * ly + nz * lz
    # where the light's camera sees this point, pushed off the surface so that it does not shade itself
    wx = w0 * V[a, 0] + w1 * V[b, 0] + w2 * V[d, 0] + 0.045 * nx
    wy = w0 * V[a, 1] + w1 * V[b, 1] + w2 * V[d, 1] + 0.045 * ny
    wz = w0 * V[a, 2] + w1 * V[b, 2] + w2 * V[d, 2] + 0.045 * nz
    half = (shadow.shape[0] - 1) / 2
    sx = half + half / 2.1 * (frame[0, 0] * wx + frame[0, 1] * wy + frame[0, 2] * wz)
    sy = half + half / 2.1 * (frame[1, 0] * wx + frame[1, 1] * wy + frame[1, 2] * wz)
    key = p.key * (0.42 + 0.58 * lit(shadow, sx, sy, wx * lx + wy * ly + wz * lz))
    hx = lx
    hy = ly
    hz = lz + 1.0
    length = math.sqrt(hx * hx + hy * hy + hz * hz)
    hx /= length
    hy /= length
    hz /= length
    if skin:  # light bleeds under skin, red furthest
        dr = max((facing + 0.40) / 1.40, 0.0)
        dg = max((facing + 0.24) / 1.24, 0.0)
        db = max((facing + 0.18) / 1.18, 0.0)
    else:
        dr = max((facing + 0.15) / 1.15, 0.0)
        dg = dr
        db = dr
    dr *= dr * 0.3 + 0.7
    dg *= dg * 0.3 + 0.7
    db *= db * 0.3 + 0.7
    if strand >= 0:  # hair shines in a band across its strands (Kajiya and Kay)
        along = up[0] * nx + up[1] * ny + up[2] * nz
        tx = up[0] - along * nx
        ty = up[1] - along * ny
        tz = up[2] - along * nz
        length = math.sqrt(tx * tx + ty * ty + tz * tz) + 1e-6
        s = (tx * hx + ty * hy + tz * hz) / length + 0.35 * (strand - 0.5)
        band = max(1 - s * s, 0.0) ** 24
        sp = band * (0.10 + 0.25 * strand) * key * 0.35 * max(facing + 0.2, 0.0)
        sr = sp * (0.35 + 1.6 * p.hair[0])
        sg = sp * (0.35 + 1.6 * p.hair[1])
        sb = sp * (0.35 + 1.6 * p.hair[2])
    else:
        sp = gloss * max(nx * hx + ny * hy + nz * hz, 0.0) ** shine * key * 0.55 * (1.0 if facing > 0 else 0.0)
        sr = sp
        sg = sp
        sb = sp
    grazing = max(1 - abs(nz), 0.0) ** 3
    rim = (
        p.rim * grazing * max(nx * math.sin(p.rim_azimuth) * 0.9 + ny * 0.25 - 0.1, 0.0) * 1.5
        + 0.08 * grazing * p.ambient
    )
    if eye > 0:  # wet and round: flatter than the lids around it
        dr = 0.35 + 0.6 * dr
        dg = 0.35 + 0.6 * dg
        db = 0.35 + 0.6 * db
        sr = 0.0
        sg = 0.0
        sb = 0.0
        if eye > 1.5:
            dr = 1.0
            dg = 1.0
            db = 1.0
    ambient = p.ambient * (0.62 + 0.38 * ny) * reach
    k = key * (0.45 + 0.55 * reach)
    c[0] = (
        c[0] * (ambient * (0.63 + 0.3 * p.back_a[0]) + dr * k * p.key_colour[0])
        + sr * p.key_colour[0]
        + rim * (0.25 + c[0])
    )
    c[1] = (
        c[1] * (ambient * (0.63 + 0.3 * p.back_a[1]) + dg * k * p.key_colour[1])
        + sg * p.key_colour[1]
        + rim * (0.25 + c[1])
    )
    c[2] = (
        c[2] * (ambient * (0.66 + 0.3 * p.back_a[2]) + db * k * p.key_colour[2])
        + sb * p.key_colour[2]
        + rim * (0.25 + c[2])
    )


@jit
def shade(which, b0, b1, V, N, C, T, part, fine, p, light, frame, shadow, up, out, labels, mask, curve):
    """Colour every pixel from its 2 x 2 samples; `mask` gets one sample's label, `fine` marks detailed triangles."""
    H, W = out.shape[:2]
    c = np.zeros(3)
    total = np.zeros(3)
    for py in range(H):
        for px in range(W):
            t00 = which[2 * py, 2 * px]
            t01 = which[2 * py, 2 * px + 1]
            t10 = which[2 * py + 1, 2 * px]
            t11 = which[2 * py + 1, 2 * px + 1]
            k00 = part[t00] if t00 >= 0 else 0
            k01 = part[t01] if t01 >= 0 else 0
            k10 = part[t10] if t10 >= 0 else 0
            k11 = part[t11] if t11 >= 0 else 0
            mask[py, px] = labels[k11]
            total[:] = 0.0
            same = k00 == k01 and k00 == k10 and k00 == k11
            if same and k00 == 0:
                paint.background(2 * (px + 0.5) / W - 1, 1 - 2 * (py + 0.5) / H, p, total)
            else:
                n = 4
                if same and (k00 == 2 or (k00 == 5 and p.pattern == 0)):
                    n = 1
                elif same and not (k00 == 1 and fine[t00]):
                    n = 2
                for j in range(2):
                    for i in range(2):
                        if (n == 1 and i + j > 0) or (n == 2 and i != j):
                            continue
                        sy = 2 * py + j
                        sx = 2 * px + i
                        t = which[sy, sx]
                        if t < 0:
                            paint.background(2 * (px + 0.5) / W - 1, 1 - 2 * (py + 0.5) / H, p, c)
                        else:
                            shade_sample(t, b0[sy, sx], b1[sy, sx], V, N, C, T, part, p, light, frame, shadow, up, c)
                        for k in range(3):
                            total[k] += min(c[k], 2.0) / n
            for k in range(3):
                v = max(total[k] * p.exposure, 0.0)
                out[py, px, k] = curve[min(int(v * (len(curve) - 1) / 2.0), len(curve) - 1)]


def z_buffer(S, T, closed, size, far):
    """Depth (size, size), nearest triangle (-1: none) and barycentric weights of every sample."""
    depth, which = np.full((size, size), far), np.full((size, size), -1, np.int32)
    b0, b1 = np.empty((2, size, size))
    rasterise(S, T, closed, depth, which, b0, b1)
    return depth, which, b0, b1


def fine_features(C, p):
    """Which face triangles, by their paint coordinates (N, 3), carry eyes, brows, mouth, nostrils or beard."""
    x, y, z = np.abs(C[:, 0]), C[:, 1], C[:, 2]
    eyes = (y > p["eye_y"] - 0.15) & (y < p["eye_y"] + 0.42) & (x < 0.72)
    mouth = (y < p["eye_y"] - p["nose_length"] + 0.03) & (x < p["mouth_width"] * 1.45) & (y > p["mouth_y"] - 0.35)
    bearded = p["beard"] + p["goatee"] + p["stubble"] > 0
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
    T = np.concatenate([m[2] + start for m, start in zip(meshes, starts, strict=False)]).astype(np.int32)
    part = np.concatenate([np.full(len(m[2]), m[3], np.int32) for m in meshes])

    n = size * 2
    S = project(V, p, n)
    S[:, :2] -= 0.5  # sample centres
    closed = (part == HEAD) | (part == HAIR) | (part == NECK)
    _, which, b0, b1 = z_buffer(S, T, closed, n, 0.0)

    ce = math.cos(p["light_elevation"])
    light = np.array(
        [ce * math.sin(p["light_azimuth"]), math.sin(p["light_elevation"]), ce * math.cos(p["light_azimuth"])]
    )
    side = np.cross((0.0, 1.0, 0.0), light)
    side /= np.linalg.norm(side)
    frame = np.stack([side, np.cross(light, side)])
    half = (SHADOW_MAP - 1) / 2
    L = np.concatenate([half + half / SHADOW_EXTENT * (V @ frame.T), V @ light[:, None]], 1)
    casts = (part != GLASSES) & (part != CLOTHES)
    shadow = z_buffer(L, T[casts], np.zeros(casts.sum(), bool), SHADOW_MAP, -9.0)[0]

    image, mask = np.empty((size, size, 3), np.uint8), np.empty((size, size), np.uint8)
    up = np.ascontiguousarray(head_rotation(p)[:, 1])
    fine = fine_features(C[T[:, 0]], p)
    shade(which, b0, b1, V, N, C, T, part, fine, p, light, frame, shadow, up, image, LABELS, mask, DISPLAY)
    points = landmarks(p)
    xy = project(to_world(points, p), p, size)[:, :2] - 0.5
    image = apply_style(image, picture.style, seed=picture.person.seed)
    return Rendered(image, mask, xy.astype(np.float32), points.astype(np.float32))

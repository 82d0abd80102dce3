"""Light on the painted surfaces: key light with shadows, ambient light, a rim light; then exposure and display.

The key light bleeds red under skin, shines on hair in bands (Kajiya and Kay) and on other surfaces by Blinn's half
vector.
"""

import math

import numpy as np

from facesnap.synthetic import paint, scene
from facesnap.synthetic.numerics import jit, smoothstep
from facesnap.synthetic.raster import SHADOW_EXTENT


def display_curve(brightest: float = 8.0, entries: int = 16384) -> np.ndarray:
    """Linear light 0..8 -> 8 bit: a filmic shoulder, then display gamma, as a table because powers are slow."""
    v = np.linspace(0, brightest, entries)
    v = v * (2.51 * v + 0.03) / (v * (2.43 * v + 0.59) + 0.14)
    return (np.clip(v, 0, 1) ** 0.4545 * 255 + 0.5).astype(np.uint8)


DISPLAY = display_curve()
DISPLAY_STEPS = (len(DISPLAY) - 1) / 8.0  # entries for one unit of light


def key_vectors(p) -> np.ndarray:
    """What of the light is the same everywhere, (7,): direction to the key light, half vector, the rim light's x."""
    ce = math.cos(p["light_elevation"])
    azimuth = p["light_azimuth"]
    light = np.array([ce * math.sin(azimuth), math.sin(p["light_elevation"]), ce * math.cos(azimuth)])
    half = light + (0.0, 0.0, 1.0)
    return np.concatenate([light, half / np.linalg.norm(half), [0.9 * math.sin(p["rim_azimuth"])]])


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
def accessory(kind, x, y, z, p, c):
    """Paint glasses, lenses, hat or hand; returns (gloss, shine)."""
    if kind == 6:
        if x > 1.5:  # a dark lens
            c[0] = 0.012
            c[1] = 0.012
            c[2] = 0.014
            return 0.5, 60.0
        c[0] = p.glasses_colour[0]
        c[1] = p.glasses_colour[1]
        c[2] = p.glasses_colour[2]
        return 0.8, 40.0
    if kind == 9:
        c[0] = p.skin[0]
        c[1] = p.skin[1] * 0.93
        c[2] = p.skin[2] * 0.92
        return 0.15, 22.0
    knit = 1.0
    if p.hat == 1:
        knit = 0.80 + 0.2 * abs(math.sin(x * 26)) + 0.08 * math.sin(y * 120)
        knit *= 1 - 0.35 * smoothstep(0.02, 0.0, abs(y - 0.245))
    elif z < 0.5:
        knit = 1 - 0.25 * smoothstep(0.03, 0.0, abs(abs(x) % 1.05 - 0.02))
    for k in range(3):
        c[k] = p.hat_colour[k] * knit
    return 0.05, 22.0


@jit
def material(kind, x, y, z, ny, p, c):
    """Paint a point into c. Returns (gloss, shine, eye, reach of ambient light, is it skin, strand of hair or -1)."""
    if kind == 1:
        gloss, eye = paint.face(x, y, z, p, c)
        reach = 1 - 0.35 * smoothstep(-0.1, -0.8, ny) * smoothstep(-0.75, -0.98, y / p.lower_height)
        return gloss, 22.0, eye, reach, True, -1.0
    if kind == 2:
        paint.neck(x, y, p, c)
        return 0.2, 22.0, 0.0, 0.55 + 0.45 * smoothstep(0.0, 0.6, y), True, -1.0
    if kind == 3:
        c[0] = p.skin[0]
        c[1] = p.skin[1] * 0.9
        c[2] = p.skin[2] * 0.88
        return 0.2, 22.0, 0.0, 0.55 + 0.45 * smoothstep(0.15, 0.6, math.hypot(x * 0.9, y - 0.02)), True, -1.0
    if kind == 4:
        strand = paint.hair(x, y, p, c)
        return 0.0, 22.0, 0.0, 0.6 + 0.4 * smoothstep(0.0, 0.12, z), False, strand
    if kind == 8:
        strand = paint.hair(x, y, p, c)
        return 0.0, 22.0, 0.0, 0.85 * (0.6 + 0.4 * smoothstep(0.0, 0.2, z)), False, strand
    if kind == 5:
        if scene.clothes(x, y, z, p, c) > 0:
            return 0.15, 22.0, 0.0, 0.8, True, -1.0
        return 0.04, 22.0, 0.0, 1.0, False, -1.0
    gloss, shine = accessory(kind, x, y, z, p, c)
    return gloss, shine, 0.0, 1.0, kind == 9, -1.0


@jit
def strand_shine(strand, nx, ny, nz, hx, hy, hz, up):
    """Hair shines in a band across its strands, which run along `up`."""
    along = up[0] * nx + up[1] * ny + up[2] * nz
    tx = up[0] - along * nx
    ty = up[1] - along * ny
    tz = up[2] - along * nz
    length = math.sqrt(tx * tx + ty * ty + tz * tz) + 1e-6
    s = (tx * hx + ty * hy + tz * hz) / length + 0.35 * (strand - 0.5)
    return max(1 - s * s, 0.0) ** 24 * (0.10 + 0.25 * strand) * 0.35


@jit
def key_light(x, y, z, nx, ny, nz, p, light, frame, shadow):
    """Strength of the key light at a world point, in its shadows p.fill of it."""
    wx = x + 0.045 * nx  # pushed off the surface so that it does not shade itself
    wy = y + 0.045 * ny
    wz = z + 0.045 * nz
    half = (shadow.shape[0] - 1) / 2
    sx = half + half / SHADOW_EXTENT * (frame[0, 0] * wx + frame[0, 1] * wy + frame[0, 2] * wz)
    sy = half + half / SHADOW_EXTENT * (frame[1, 0] * wx + frame[1, 1] * wy + frame[1, 2] * wz)
    arrives = lit(shadow, sx, sy, wx * light[0] + wy * light[1] + wz * light[2])
    return p.key * (p.fill + (1 - p.fill) * arrives)


@jit
def illuminate(nx, ny, nz, key, gloss, shine, eye, reach, skin, strand, p, light, up, c):
    """Turn the paint in c into light towards the camera. `light`: see `key_vectors`."""
    facing = nx * light[0] + ny * light[1] + nz * light[2]
    hx = light[3]
    hy = light[4]
    hz = light[5]
    dr = max((facing + 0.15) / 1.15, 0.0)
    dg = dr
    db = dr
    if skin:  # light bleeds under skin, red furthest
        dr = max((facing + 0.40) / 1.40, 0.0)
        dg = max((facing + 0.24) / 1.24, 0.0)
        db = max((facing + 0.18) / 1.18, 0.0)
    dr *= dr * 0.3 + 0.7
    dg *= dg * 0.3 + 0.7
    db *= db * 0.3 + 0.7
    sr = 0.0
    sg = 0.0
    sb = 0.0
    if strand >= 0:
        sp = strand_shine(strand, nx, ny, nz, hx, hy, hz, up) * key * max(facing + 0.2, 0.0)
        sr = sp * (0.35 + 1.6 * c[0])
        sg = sp * (0.35 + 1.6 * c[1])
        sb = sp * (0.35 + 1.6 * c[2])
    elif eye == 0 and facing > 0:
        aligned = nx * hx + ny * hy + nz * hz
        if aligned > 0.7:  # elsewhere the highlight is below a thousandth
            sr = gloss * aligned**shine * key * 0.55
            sg = sr
            sb = sr
    if eye > 1.5:
        dr = 1.0
        dg = 1.0
        db = 1.0
    elif eye > 0:  # wet and round: flatter than the lids around it
        dr = 0.35 + 0.6 * dr
        dg = 0.35 + 0.6 * dg
        db = 0.35 + 0.6 * db
    grazing = max(1 - abs(nz), 0.0) ** 3
    rim = p.rim * grazing * max(nx * light[6] + ny * 0.25 - 0.1, 0.0) * 1.5
    rim += 0.08 * grazing * p.ambient
    ambient = p.ambient * (0.62 + 0.38 * ny) * reach
    k = key * (0.45 + 0.55 * reach)
    red = ambient * (0.63 + 0.3 * p.back_a[0]) + dr * k * p.key_colour[0]
    green = ambient * (0.63 + 0.3 * p.back_a[1]) + dg * k * p.key_colour[1]
    blue = ambient * (0.66 + 0.3 * p.back_a[2]) + db * k * p.key_colour[2]
    c[0] = c[0] * (red + rim) + sr * p.key_colour[0] + rim * 0.25
    c[1] = c[1] * (green + rim) + sg * p.key_colour[1] + rim * 0.25
    c[2] = c[2] * (blue + rim) + sb * p.key_colour[2] + rim * 0.25


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
    gloss, shine, eye, reach, skin, strand = material(kind, x, y, z, ny, p, c)
    wx = w0 * V[a, 0] + w1 * V[b, 0] + w2 * V[d, 0]
    wy = w0 * V[a, 1] + w1 * V[b, 1] + w2 * V[d, 1]
    wz = w0 * V[a, 2] + w1 * V[b, 2] + w2 * V[d, 2]
    key = p.key
    if eye > 0 or nx * light[0] + ny * light[1] + nz * light[2] > -0.4:  # others get none of it
        key = key_light(wx, wy, wz, nx, ny, nz, p, light, frame, shadow)
    illuminate(nx, ny, nz, key, gloss, shine, eye, reach, skin, strand, p, light, up, c)


@jit
def shade_pixel(py, px, n, which, b0, b1, V, N, C, T, part, p, light, frame, shadow, up, total, c):
    """The mean of n of a pixel's 2 x 2 samples into `total`."""
    H = which.shape[0] // 2
    W = which.shape[1] // 2
    for j in range(2):
        for i in range(2):
            if (n == 1 and i + j > 0) or (n == 2 and i != j):
                continue
            sy = 2 * py + j
            sx = 2 * px + i
            t = which[sy, sx]
            if t < 0:
                scene.background(2 * (px + 0.5) / W - 1, 1 - 2 * (py + 0.5) / H, p, c)
            else:
                shade_sample(t, b0[sy, sx], b1[sy, sx], V, N, C, T, part, p, light, frame, shadow, up, c)
            for k in range(3):
                total[k] += min(c[k], 2.0) / n


@jit
def shade(which, b0, b1, V, N, C, T, part, fine, p, light, frame, shadow, up, out, labels, mask):
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
                scene.background(2 * (px + 0.5) / W - 1, 1 - 2 * (py + 0.5) / H, p, total)
            else:
                n = 4
                if same and (k00 == 2 or (k00 == 5 and p.pattern == 0)):
                    n = 1
                elif same and not (k00 == 1 and fine[t00]):
                    n = 2
                shade_pixel(py, px, n, which, b0, b1, V, N, C, T, part, p, light, frame, shadow, up, total, c)
            for k in range(3):
                step = int(max(total[k] * p.exposure, 0.0) * DISPLAY_STEPS)
                out[py, px, k] = DISPLAY[min(step, len(DISPLAY) - 1)]

"""The parametric head of the rendered people: surfaces and the 72 landmarks, from named parameters.

Head frame: x right in the picture, y up, z towards the camera; the skull is about 2 units high and its centre is
the origin. A head is a stack of rounded slices (`skull`) with smooth bumps for the features (`relief`); hair, hats
and the neck are shells over it. Eyes, brows, lips and beard are painted (paint.py) along the very curves that give
the landmarks, so the landmarks are exact.

All kernels take one record `p` of `people.PARAMETERS` (numba reads its fields like attributes).
"""

import math

import numpy as np
from numba import njit

jit = njit(cache=True, fastmath=True)

PIVOT = np.array([0.0, -0.75, -0.15])  # where the neck turns
BROW_SPAN = np.linspace(0.0, 1.0, 5)


@jit
def smoothstep(a, b, x):
    t = (x - a) / (b - a)
    t = min(max(t, 0.0), 1.0)
    return t * t * (3 - 2 * t)


@jit
def bump(dx, dy, sx, sy):
    """A Gaussian bump of height one."""
    return math.exp(-0.5 * ((dx / sx) ** 2 + (dy / sy) ** 2))


@jit
def lattice(i, j):
    n = (i * 374761393 + j * 668265263) & 0x7FFFFFFF
    n = ((n ^ (n >> 13)) * 1274126177) & 0x7FFFFFFF
    return ((n ^ (n >> 16)) & 0xFFFF) / 65535.0


@jit
def noise(x, y):
    """Value noise in [0, 1], one feature a unit."""
    xi = math.floor(x)
    yi = math.floor(y)
    fx = x - xi
    fy = y - yi
    fx = fx * fx * (3 - 2 * fx)
    fy = fy * fy * (3 - 2 * fy)
    i = int(xi)
    j = int(yi)
    a = lattice(i, j)
    b = lattice(i + 1, j)
    c = lattice(i, j + 1)
    d = lattice(i + 1, j + 1)
    return a + (b - a) * fx + (c - a) * fy + (a - b - c + d) * fx * fy


# ---------------------------------------------------------------- the skull and its relief


@jit
def skull(u, phi, p):
    """The bare head at azimuth u (0 = front) and latitude phi (pi/2 = crown, -pi/2 = chin)."""
    s = math.sin(phi)
    c = max(math.cos(phi), 0.0)
    cu = math.cos(u)
    su = math.sin(u)
    if s >= 0:
        y = s * p.upper_height
        width = p.face_width * c**0.82 * (1 + 0.05 * s)
        front = 0.80 * c**0.72
        back = 0.98 * c**0.75
        centre = 0.0
    else:
        t = -s
        y = -t * p.lower_height
        taper = math.sqrt(max(1 - t**p.chin_roundness, 0.0))
        width = p.face_width * (1 - (1 - p.jaw_ratio) * smoothstep(0.1, 0.85, t)) * taper
        width *= 1 + p.cheek_fullness * 0.06 * bump(t - 0.45, 0, 0.2, 1)
        centre = 0.30 * smoothstep(0.4, 1.0, t)  # the jaw lies forward of the neck
        front = centre + (0.80 + 0.02 * t - centre) * math.sqrt(max(1 - t**5.0, 0.0))
        back = 0.98 * (1 - 0.85 * smoothstep(-0.1, 0.75, t)) * taper
    x = width * (1.0 if su > 0 else -1.0) * abs(su) ** 0.92
    if cu > 0:
        z = centre + (front - centre) * cu**0.82
    else:
        z = centre - back * (-cu) ** 0.9
    return x, y, z


@jit
def relief(x, y, z, p):
    """What nose, sockets, cheeks, lips and chin add to a skull point: (dy, dz)."""
    facing = smoothstep(0.05, 0.35, z)
    if facing <= 0:
        return 0.0, 0.0
    dz = 0.0
    ax = abs(x)
    ex = p.eye_spacing
    ey = p.eye_y
    my = p.mouth_y
    mw = p.mouth_width
    top = ey + 0.06
    tip = ey - p.nose_length
    smile = max(p.smile, 0.0)
    if tip - 0.25 < y < top + 0.2:  # nose
        t = min(max((top - y) / (top - tip), 0.0), 1.0)
        height = p.nose_bridge * 0.09 + (p.nose_projection - p.nose_bridge * 0.09) * t**1.5
        sx = 0.055 + 0.045 * t * p.nose_width / 0.115
        under = 1 - smoothstep(0.0, 0.13, tip - 0.015 - p.nose_upturn * 0.03 - y)
        dz += height * math.exp(-0.5 * (x / sx) ** 2) * under * smoothstep(top + 0.14, top - 0.05, y)
        dz += 0.045 * p.nose_width / 0.115 * bump(ax - p.nose_width, y - tip, 0.045, 0.05)
        dz += 0.03 * bump(x, y - (tip + 0.02), 0.06, 0.055)
    dz -= 0.085 * bump(ax - ex, y - ey - 0.02, 0.15, 0.085)  # sockets, then the eyeballs in them
    dz += 0.055 * bump(ax - ex, y - ey + 0.005, 0.085, 0.06)
    dz += (0.02 + 0.045 * p.brow_ridge) * bump(ax - ex * 0.95, y - (ey + p.brow_height * 0.9), 0.17, 0.06)
    dz += (0.02 + 0.05 * p.cheekbone) * bump(ax - 0.44, y - (ey - 0.24), 0.13, 0.11)
    dz += 0.06 * smile * bump(ax - 0.36, y - (ey - 0.30), 0.12, 0.10)
    dz += 0.06 * bump(x, y - my, 0.22, 0.14)  # muzzle, lips, the seam between them
    drop = 0.13 * p.mouth_open
    dz += (0.012 + p.upper_lip * 0.5) * bump(x, y - (my + p.upper_lip * 0.55), mw * 0.6, 0.035)
    dz += (0.012 + p.lower_lip * 0.5) * bump(x, y - (my - p.lower_lip * 0.55 - drop), mw * 0.55, 0.04)
    dz -= 0.03 * bump(x, y - (my - 0.03 - 0.06 * p.mouth_open), mw * 0.8, 0.018 + 0.03 * p.mouth_open)
    dz -= 0.035 * bump(x, y - (my - p.lower_lip - 0.075 - drop), 0.13, 0.04)
    dz -= 0.012 * bump(x, y - (my + p.upper_lip + 0.05), 0.025, 0.04)
    dz += p.chin_projection * bump(x, y + p.lower_height * 0.88, 0.15, 0.10)
    dz -= p.chin_cleft * 0.03 * bump(x, y + p.lower_height * 0.88, 0.025, 0.07)
    dz -= (0.010 * p.age + 0.03 * smile) * fold(ax, y, p, 0.03) * smoothstep(my - 0.12, my, y)
    dy = -0.14 * p.mouth_open * smoothstep(my - 0.12, my - 0.42, y)  # the jaw drops
    return dy * facing, dz * facing


@jit
def fold(ax, y, p, width):
    """The line from the nose's wing past the corner of the mouth."""
    tip = p.eye_y - p.nose_length
    smile = max(p.smile, 0.0)
    x = p.mouth_width * 0.66 + 0.5 * (tip - y) + 0.025 + 0.06 * smile
    return math.exp(-0.5 * ((ax - x) / width) ** 2) * smoothstep(tip + 0.03, tip - 0.05, y)


@jit
def front_point(x, y, p):
    """The point of the face surface above canonical (x, y)."""
    if y >= 0:
        phi = math.asin(min(y / p.upper_height, 0.999))
    else:
        phi = -math.asin(min(-y / p.lower_height, 0.9995))
    edge, _, _ = skull(math.pi / 2, phi, p)
    u = math.asin(min(abs(x) / max(edge, 1e-6), 0.9999) ** (1 / 0.92))
    if x < 0:
        u = -u
    bx, by, bz = skull(u, phi, p)
    dy, dz = relief(bx, by, bz, p)
    return bx, by + dy, bz + dz


# ---------------------------------------------------------------- curves shared by paint and landmarks


@jit
def brow_line(t, p):
    """Height of the brow's middle line; t runs from the inner end (0) to the outer (1)."""
    arch = p.brow_arch * 0.10 * (1 - ((t - 0.62) / 0.62) ** 2)
    return p.eye_y + p.brow_height + p.brow_raise * 0.05 + p.brow_tilt * (t - 0.5) * 0.12 + arch


@jit
def lids(t, p):
    """Heights of the lower and upper lid over the eye's axis; t from the inner corner (-1) to the outer (1)."""
    upper_arc = max(1 - abs(t) ** 2.2, 0.0) ** 0.8 * (1 - 0.25 * t)
    lower_arc = max(1 - t * t, 0.0)
    upper = p.eye_open * p.eyelids * upper_arc
    lower = -p.eye_open * 0.62 * lower_arc * (0.35 + 0.65 * min(p.eyelids, 1.0))
    lower += 0.2 * p.eye_open * max(p.smile, 0.0) * lower_arc
    return lower, max(upper, lower + 0.004)


@jit
def lips(t, p):
    """Heights of the lip lines (top, seam, lower edge of the opening, bottom); t from corner (-1) to corner (1)."""
    arc = max(1 - t * t, 0.0)
    smile = max(p.smile, 0.0)
    seam = p.mouth_y + p.smile * 0.085 * (t * t - 0.35) - 0.007 * math.cos(t * 7)
    gap = p.mouth_open * 0.17 * arc**0.6 + 0.07 * max(p.smile - 0.55, 0.0) * arc
    bow = 1.0 - p.cupid_bow * 0.28 * math.cos(t * 6.2) * math.exp(-t * t * 5)
    top = seam + p.upper_lip * (1 - 0.15 * smile) * arc**0.75 * bow
    return top, seam, seam - gap, seam - gap - p.lower_lip * (1 - 0.1 * smile) * arc**0.6


@jit
def lip_width(p):
    return p.mouth_width * (1 + 0.16 * p.smile - 0.10 * p.mouth_open)


@jit
def landmarks(p):
    """The 72 landmarks (method: Face2Face-rho's order) in the head frame, (72, 3)."""
    out = np.empty((72, 3))
    n = 0
    for k in range(17):  # the contour: 0..8 from the left temple to the chin, then 9..16 back from the right temple
        a = (k - 8) / 8.0 if k < 9 else (17 - k) / 8.0
        s = 0.05 + 0.91 * math.sin((1 - abs(a)) * math.pi / 2) ** 0.8
        u = 1.42 * (1.0 if a > 0 else -1.0) * abs(a) ** 0.5
        x, y, z = skull(u, -math.asin(min(s, 0.9995)), p)
        dy, dz = relief(x, y, z, p)
        out[n, 0] = x
        out[n, 1] = y + dy
        out[n, 2] = z + dz
        n += 1
    xy = np.empty((55, 2))
    m = 0
    for k in range(10):  # brows: left from its outer end inwards, right from its inner end outwards
        t = (4 - k) / 4.0 if k < 5 else (k - 5) / 4.0
        xy[m, 0] = (-1.0 if k < 5 else 1.0) * (p.eye_spacing - 0.17 + t * p.brow_length)
        xy[m, 1] = brow_line(t, p)
        m += 1
    tip = p.eye_y - p.nose_length
    for k in range(4):  # nose bridge
        xy[m, 0] = 0.0
        xy[m, 1] = p.eye_y + 0.03 + (tip - p.eye_y) * k / 3.0 * 0.98
        m += 1
    for k in range(5):  # nose base
        a = -1 + k / 2.0
        xy[m, 0] = a * p.nose_width * 1.15
        xy[m, 1] = tip - 0.05 - 0.02 * (1 - abs(a))
        m += 1
    ct = math.cos(p.eye_tilt * 0.6)
    st = math.sin(p.eye_tilt * 0.6)
    for k in range(16):  # eyes: from the image-left corner over the upper lid and back under the lower
        side = -1.0 if k < 8 else 1.0
        a = -math.cos((k % 8) / 8.0 * 2 * math.pi)  # -1 at the image-left corner
        t = a * side  # -1 at the inner corner
        lower, upper = lids(t, p)
        ly = upper if (k % 8) < 4 else lower
        if k % 4 == 0:
            ly = 0.0
        lx = t * p.eye_width
        xy[m, 0] = side * (p.eye_spacing + lx * ct - ly * st)
        xy[m, 1] = p.eye_y + lx * st + ly * ct
        m += 1
    w = lip_width(p)
    order = (
        52,
        54,
        53,
        62,
        58,
        59,
        57,
        65,
        66,
        71,
        69,
        68,
        55,
        56,
        63,
        61,
        60,
        64,
        70,
        67,
    )  # 68-point order of the mouth
    mouth = np.empty((20, 2))
    for k in range(20):
        if k < 7:
            t, line = -1 + k / 3.0, 0
        elif k < 12:
            t, line = (9 - k) / 3.0, 3
        elif k < 17:
            t, line = -0.8 + (k - 12) * 0.4, 1
        else:
            t, line = 0.4 * (18 - k), 2
        mouth[order[k] - 52, 0] = t * w
        mouth[order[k] - 52, 1] = lips(t, p)[line]
    for k in range(20):
        xy[m, 0] = mouth[k, 0]
        xy[m, 1] = mouth[k, 1]
        m += 1
    for k in range(55):
        x, y, z = front_point(xy[k, 0], xy[k, 1], p)
        out[n, 0] = x
        out[n, 1] = y
        out[n, 2] = z
        n += 1
    return out


# ---------------------------------------------------------------- hair, beard and hat lines


@jit
def hairline(u, p):
    """Height at which the hair begins at azimuth u."""
    a = abs(u)
    y = p.hairline
    if p.fringe > 0:
        y -= p.fringe * (0.8 + 0.2 * math.cos((u - p.hair_part) * 2.2))
    y += 0.04 * math.cos((u - p.hair_part * 0.8) * 3.0) * (1 - smoothstep(0.4, 0.9, a))
    y += (p.temple - y) * smoothstep(0.45, 0.95, a)
    y += (p.hair_side - y) * smoothstep(1.0, 1.35, a)
    return y + (p.hair_back - y) * smoothstep(1.55, 2.2, a)


@jit
def hat_line(u):
    """Height of a hat's edge: low on the forehead, lower at the back."""
    return 0.27 + 0.21 * math.cos(u)


@jit
def beard_density(x, y, z, p):
    """How much beard grows at a canonical point, 0..1, soft at its edges."""
    ax = abs(x)
    my = p.mouth_y
    tip = p.eye_y - p.nose_length
    ragged = (noise(x * 16 + 5, y * 16) - 0.5) * 0.06
    density = 0.0
    if p.beard > 0:
        line = my + 0.03 + (ax / p.face_width) ** 2.2 * 0.60
        full = smoothstep(line + 0.09, line - 0.16, y + ragged) * smoothstep(-0.15, 0.15, z)
        full *= 1 - 0.95 * bump(x, y - (my - 0.03), p.mouth_width * 0.85, 0.065)
        density = p.beard * full
    if p.goatee > 0:
        chin = smoothstep(0.27, 0.14, ax + ragged) * smoothstep(my - 0.06, my - 0.14, y + ragged)
        density = max(density, p.goatee * chin)
    if p.moustache > 0:
        lip = my + p.upper_lip * 0.7 - 0.10 * ax / p.mouth_width
        strip = smoothstep(p.mouth_width * 1.35, p.mouth_width * 0.9, ax + ragged)
        strip *= smoothstep(tip - 0.035, tip - 0.085, y + 0.25 * ax * ax + ragged * 0.4) * smoothstep(
            lip, lip + 0.035, y
        )
        density = max(density, p.moustache * strip)
    return density


# ---------------------------------------------------------------- meshes: vertices V and paint coordinates C


@jit
def azimuth(i, columns):
    """Columns lie closer together at the front, where the detail is."""
    t = -1 + 2.0 * i / (columns - 1)
    return math.pi * (0.55 * t + 0.45 * t * t * t)


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
def hair_mesh(p, columns, rows, V, C):
    """The cap of hair: the skull pushed outwards above the hairline and hidden inside it below."""
    k = 0
    for j in range(rows):
        phi = -math.pi / 2 + math.pi * j / (rows - 1)
        for i in range(columns):
            u = azimuth(i, columns)
            x, y, z = skull(u, phi, p)
            h = hairline(u, p)
            ragged = noise(u * 14 + 31, phi * 3 + 7) * 0.6 + noise(u * 30, phi * 5) * 0.4
            h += (ragged - 0.5) * 0.07 * (1 - smoothstep(0.7, 0.95, y))
            full = smoothstep(h - 0.02, h + 0.16, y)
            thick = p.hair_thickness * (0.25 + 0.75 * full) + p.hair_volume * smoothstep(0.2, 1.0, y) * full
            thick += 0.012 * (noise(u * 22 + 3, phi * 2 + 9) - 0.5) * full  # locks
            if p.curl > 0:
                lump = noise(u * 6.5 + 3, phi * 8 + p.hair_seed * 9) - 0.35 + 0.5 * (noise(u * 15, phi * 18) - 0.5)
                thick += p.curl * 0.15 * full * lump * (0.6 + p.hair_thickness * 3)
            parting = math.exp(-0.5 * ((u - p.hair_part * 1.2) / 0.10) ** 2)
            thick -= 0.03 * parting * smoothstep(0.3, 0.7, y) * smoothstep(-0.3, 0.3, z)
            if p.hat > 0:  # pressed flat under a hat
                under = smoothstep(hat_line(u) - 0.06, hat_line(u) + 0.02, y)
                thick += (min(thick, 0.035) - thick) * under
            offset = -0.06 + (0.06 + thick) * smoothstep(h - 0.015, h + 0.03, y)
            r = math.sqrt(x * x + y * y * 0.6 + z * z) + 1e-6
            V[k, 0] = x + offset * x / r * 1.05
            V[k, 1] = y + offset * (y * 0.8 + 0.15) / r
            V[k, 2] = z + offset * z / r
            C[k, 0] = u
            C[k, 1] = phi
            C[k, 2] = y - h
            k += 1


@jit
def curtain_mesh(p, columns, rows, V, C):
    """Long hair that hangs around the back and the sides."""
    k = 0
    for j in range(rows):
        s = j / (rows - 1.0)
        for i in range(columns):
            u = p.curtain_opening + (2 * math.pi - 2 * p.curtain_opening) * i / (columns - 1.0)
            w = p.face_width + p.hair_thickness * 0.9 + p.curtain_width * smoothstep(0.0, 0.6, s)
            w *= 1 - 0.18 * smoothstep(0.7, 1.0, s)
            if s < 0.25:
                w *= 0.92 + 0.32 * s
            lock = 0.035 * (noise(u * 9, s * 2.5) - 0.5) + 0.02 * (noise(u * 21, s * 4) - 0.5)
            wave = p.curtain_wave * math.sin(s * 14 + 3 * math.sin(u * 2)) * smoothstep(0.1, 0.5, s) + lock
            V[k, 0] = (w + wave) * math.sin(u)
            V[k, 1] = 0.45 - s * (p.curtain_length + 0.45) - 0.12 * (noise(u * 11, 2.0) - 0.5) * smoothstep(0.6, 1.0, s)
            V[k, 2] = (0.95 + wave * 0.5) * math.cos(u) * (0.75 if math.cos(u) > 0 else 0.85) - 0.05
            C[k, 0] = u
            C[k, 1] = 1.0 - s * 2.2
            C[k, 2] = 0.5 - 0.5 * smoothstep(0.8, 1.0, s)
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


def bun_mesh(p, columns=24, rows=14):
    a, b = np.meshgrid(np.linspace(0, np.pi, rows), np.linspace(0, 2 * np.pi, columns), indexing="ij")
    r = 0.33 * p["bun"] * (1 + 0.06 * np.sin(b * 6 + a * 4))
    V = np.stack(
        [
            r * np.sin(a) * np.cos(b),
            1.05 * p["upper_height"] + 0.14 + r * np.cos(a) * 0.85,
            -0.35 + r * np.sin(a) * np.sin(b),
        ],
        -1,
    )
    return V.reshape(-1, 3), np.stack([b, a, 0.5 + 0 * a], -1).reshape(-1, 3)


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

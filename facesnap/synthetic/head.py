"""The parametric head of the rendered people: its surface and the 72 landmarks, from named parameters.

Head frame: x right in the picture, y up, z towards the camera; the skull is about 2 units high and its centre is
the origin. A head is a stack of rounded slices (`skull`) with smooth bumps for the features (`relief`); hair (hair.py),
hats and the neck (meshes.py) are shells over it. Eyes, brows, lips and beard are painted (paint.py) along the very
curves that give the landmarks, so the landmarks are exact.

All kernels take one record `p` of `parameters.PARAMETERS` (numba reads its fields like attributes).
"""

import math

import numpy as np

from facesnap.synthetic.numerics import bump, jit, smoothstep

# ---------------------------------------------------------------- the skull and its relief


@jit
def azimuth(i, columns):
    """Azimuth of a mesh's column: they lie closer together at the front, where the detail is."""
    t = -1 + 2.0 * i / (columns - 1)
    return math.pi * (0.55 * t + 0.45 * t * t * t)


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
        width *= 1 + p.jaw_angle * 0.045 * bump(t - 0.58, 0, 0.13, 1) + p.jowls * 0.05 * bump(t - 0.70, 0, 0.12, 1)
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
    dz += (0.02 + 0.055 * p.brow_ridge) * bump(ax - ex * 0.95, y - (ey + p.brow_height * 0.9), 0.17, 0.06)
    dz += (0.02 + 0.05 * p.cheekbone) * bump(ax - 0.44, y - (ey - 0.24), 0.13, 0.11)
    dz += 0.06 * smile * bump(ax - 0.36, y - (ey - 0.30), 0.12, 0.10)
    dz += 0.06 * bump(x, y - my, 0.22, 0.14)  # muzzle, lips, the seam between them
    drop = 0.13 * p.mouth_open
    dz += (0.012 + p.upper_lip * 0.5) * bump(x, y - (my + p.upper_lip * 0.55), mw * 0.6, 0.035)
    dz += (0.012 + p.lower_lip * 0.5) * bump(x, y - (my - p.lower_lip * 0.55 - drop), mw * 0.55, 0.04)
    dz -= 0.03 * bump(x, y - (my - 0.03 - 0.06 * p.mouth_open), mw * 0.8, 0.018 + 0.03 * p.mouth_open)
    dz -= 0.035 * bump(x, y - (my - p.lower_lip - 0.075 - drop), 0.13, 0.04)
    dz -= 0.012 * bump(x, y - (my + p.upper_lip + 0.05), 0.025, 0.04)
    dz += p.chin_projection * bump(x, y + p.lower_height * 0.88, 0.15 + 0.05 * p.jaw_angle, 0.10)
    dz -= p.chin_cleft * 0.03 * bump(x, y + p.lower_height * 0.88, 0.025, 0.07)
    dz -= (0.022 * p.wrinkles + 0.03 * smile) * fold(ax, y, p, 0.03) * smoothstep(my - 0.12, my, y)
    if p.wrinkles > 0:  # bags under the eyes, hollow cheeks
        dz += 0.020 * p.wrinkles * bump(ax - ex, y - (ey - 0.12), 0.10, 0.03)
        dz -= 0.030 * p.wrinkles * bump(ax - 0.42, y - (ey - 0.52), 0.10, 0.13)
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


MOUTH_ORDER = np.array(  # where the 68-point order of the mouth's points lies among the 72
    [52, 54, 53, 62, 58, 59, 57, 65, 66, 71, 69, 68, 55, 56, 63, 61, 60, 64, 70, 67]
)


@jit
def contour_landmarks(p, out):
    """0..8 from the left temple to the chin, then 9..16 back from the right temple; writes out (17, 3)."""
    for k in range(17):
        a = (k - 8) / 8.0 if k < 9 else (17 - k) / 8.0
        s = 0.05 + 0.91 * math.sin((1 - abs(a)) * math.pi / 2) ** 0.8
        u = 1.42 * (1.0 if a > 0 else -1.0) * abs(a) ** 0.5
        x, y, z = skull(u, -math.asin(min(s, 0.9995)), p)
        dy, dz = relief(x, y, z, p)
        out[k, 0] = x
        out[k, 1] = y + dy
        out[k, 2] = z + dz


@jit
def mouth_landmarks(p, xy):
    """The 20 points of the mouth in the order of the 72; writes xy (20, 2)."""
    w = lip_width(p)
    for k in range(20):
        if k < 7:
            t, line = -1 + k / 3.0, 0
        elif k < 12:
            t, line = (9 - k) / 3.0, 3
        elif k < 17:
            t, line = -0.8 + (k - 12) * 0.4, 1
        else:
            t, line = 0.4 * (18 - k), 2
        xy[MOUTH_ORDER[k] - 52, 0] = t * w
        xy[MOUTH_ORDER[k] - 52, 1] = lips(t, p)[line]


@jit
def inner_landmarks(p, xy):
    """Brows, nose, eyes and mouth; writes xy (55, 2)."""
    for k in range(10):  # brows: left from its outer end inwards, right from its inner end outwards
        t = (4 - k) / 4.0 if k < 5 else (k - 5) / 4.0
        xy[k, 0] = (-1.0 if k < 5 else 1.0) * (p.eye_spacing - 0.17 + t * p.brow_length)
        xy[k, 1] = brow_line(t, p)
    tip = p.eye_y - p.nose_length
    for k in range(4):  # nose bridge
        xy[10 + k, 0] = 0.0
        xy[10 + k, 1] = p.eye_y + 0.03 + (tip - p.eye_y) * k / 3.0 * 0.98
    for k in range(5):  # nose base
        a = -1 + k / 2.0
        xy[14 + k, 0] = a * p.nose_width * 1.15
        xy[14 + k, 1] = tip - 0.05 - 0.02 * (1 - abs(a))
    ct = math.cos(p.eye_tilt * 0.6)
    st = math.sin(p.eye_tilt * 0.6)
    for k in range(16):  # eyes: from the image-left corner over the upper lid and back under the lower
        side = -1.0 if k < 8 else 1.0
        t = -math.cos((k % 8) / 8.0 * 2 * math.pi) * side  # -1 at the inner corner
        lower, upper = lids(t, p)
        ly = upper if (k % 8) < 4 else lower
        if k % 4 == 0:
            ly = 0.0
        lx = t * p.eye_width
        xy[19 + k, 0] = side * (p.eye_spacing + lx * ct - ly * st)
        xy[19 + k, 1] = p.eye_y + lx * st + ly * ct
    mouth_landmarks(p, xy[35:])


@jit
def landmarks(p):
    """The 72 landmarks (method: Face2Face-rho's order) in the head frame, (72, 3)."""
    out = np.empty((72, 3))
    contour_landmarks(p, out)
    xy = np.empty((55, 2))
    inner_landmarks(p, xy)
    for k in range(55):
        x, y, z = front_point(xy[k, 0], xy[k, 1], p)
        out[17 + k, 0] = x
        out[17 + k, 1] = y
        out[17 + k, 2] = z
    return out

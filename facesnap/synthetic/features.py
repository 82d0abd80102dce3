"""Brows, eyes and mouth of the rendered people, painted along the curves that give the landmarks (head.py).

Kernels write linear RGB into `c` (3,) at canonical face coordinates.
"""

import math

from facesnap.synthetic.head import brow_line, lids, lip_width, lips
from facesnap.synthetic.numerics import blend, jit, noise, smoothstep, tint


@jit
def brow(ax, y, p, c):
    t = (ax - (p.eye_spacing - 0.17)) / p.brow_length
    if -0.1 < t < 1.1:
        thick = p.brow_thickness * (1 - 0.72 * smoothstep(0.35, 1.05, t)) * smoothstep(-0.10, 0.14, t)
        distance = abs(y - brow_line(t, p)) / max(thick, 1e-3)
        hairs = 0.7 + 0.6 * noise(ax * 46 + y * 60, y * 22)
        edge = smoothstep(1.35, 0.55, distance + 0.25 * (hairs - 1))
        tint(c, p.brow, hairs, 0.92 * edge * (1 - smoothstep(0.92, 1.1, t)))


@jit
def eyeball(lx, ly, t, side, upper, p, c):
    """Paint the open eye at (lx, ly) of its own frame. Returns 1, or 2 in its highlight."""
    c[0] = 0.78
    c[1] = 0.765
    c[2] = 0.755
    gaze = p.gaze_x * 0.045
    ix = lx * side - gaze
    iy = ly - 0.15 * p.eye_open - p.gaze_y * 0.03
    r = math.hypot(ix, iy) / p.iris_radius
    if r < 1.12:
        rays = 0.8 + 0.35 * noise(math.atan2(iy, ix) * 7 + 20, r * 2)
        glow = 0.55 + 0.75 * smoothstep(0.3, 0.95, r) * (0.75 - 0.45 * iy / p.iris_radius)
        cover = smoothstep(1.10, 0.98, r)
        tint(c, p.iris, rays * glow, cover)
        tint(c, p.iris, 0.12, cover * smoothstep(0.78, 0.98, r) * 0.85)
        blend(c, 0.008, 0.008, 0.01, smoothstep(0.50, 0.42, r))
    shadow = 0.45 + 0.55 * smoothstep(0.0, 0.055, upper - ly)
    rim = 0.85 + 0.15 * smoothstep(1.0, 0.7, abs(t))
    c[0] *= shadow * rim
    c[1] *= shadow * rim * 0.97
    c[2] *= shadow * rim * 0.97
    hx = lx * side + 0.30 * p.iris_radius - gaze * 0.6
    spark = math.hypot(hx, iy - 0.36 * p.iris_radius) / (p.iris_radius * 0.27)
    if spark < 1.2:
        blend(c, 2.0, 2.0, 2.0, smoothstep(1.15, 0.7, spark))
        return 2.0
    return 1.0


@jit
def eyes(x, y, p, c, gloss):
    """Eyeballs, lashes and the crease of the lid. Returns (gloss, eye)."""
    ax = abs(x)
    side = 1.0 if x > 0 else -1.0
    ct = math.cos(p.eye_tilt * 0.6)
    st = math.sin(p.eye_tilt * 0.6)
    dx = ax - p.eye_spacing
    dy = y - p.eye_y
    lx = dx * ct + dy * st
    ly = -dx * st + dy * ct
    t = lx / p.eye_width
    if abs(t) > 1.35 or abs(ly) > 0.25:
        return gloss, 0.0
    eye = 0.0
    lower, upper = lids(max(min(t, 1.0), -1.0), p)
    inside = abs(t) < 1.0 and lower < ly < upper
    if inside:
        gloss = 0.0
        eye = eyeball(lx, ly, t, side, upper, p, c)
    lash = (0.012 + 0.024 * p.lashes) * (0.6 + 0.5 * smoothstep(-1, 1.1, t))
    if abs(t) < 1.16:
        top = upper if abs(t) < 1 else 0.0
        if t > 0.8:
            top += (t - 0.8) * 0.10 * p.lashes
        d = abs(ly - top - lash * 0.4) / lash
        ends = smoothstep(1.16, 0.98, abs(t))
        if not inside or d < 1:
            blend(c, 0.03, 0.02, 0.018, smoothstep(1.2, 0.5, d) * (0.60 + 0.40 * p.lashes) * ends)
        if not inside:
            d = abs(ly - lower + 0.004) / 0.010
            tint(c, p.skin, 0.30, smoothstep(1.3, 0.4, d) * 0.5 * smoothstep(1.0, 0.85, abs(t)))
    if not inside:
        crease = p.eye_open * (0.55 + 0.45 * p.eyelids) * max(1 - (t * 0.9) ** 2, 0.0) ** 0.7 + 0.045
        d = abs(ly - crease) / 0.011
        tint(c, p.skin, 0.38, smoothstep(1.5, 0.3, d) * 0.5 * smoothstep(1.1, 0.8, abs(t)))
    return gloss, eye


@jit
def mouth(x, y, p, c, gloss):
    if abs(x) > p.mouth_width * 1.35 or abs(y - p.mouth_y) > 0.4:
        return gloss
    t = x / lip_width(p)
    if abs(t) > 1.08:
        return gloss
    top, seam, gap_bottom, bottom = lips(max(min(t, 1.0), -1.0), p)
    gap = seam - gap_bottom
    if bottom < y < top and abs(t) < 1:
        if gap_bottom < y < seam:
            c[0] = 0.085
            c[1] = 0.018
            c[2] = 0.018
            gloss = 0.05
            # one even row of upper teeth that rounds off and darkens towards the corners
            row = min(0.050, gap * 0.62) * (1 - min(abs(t) / 0.88, 1.0) ** 4)
            lit = smoothstep(0.86, 0.45, abs(t)) * smoothstep(row + 0.006, row - 0.008, seam - y)
            between = 1 - 0.10 * smoothstep(0.12, 0.0, abs(math.sin(x * math.pi / 0.058)))
            under_lip = 0.72 + 0.28 * smoothstep(0.0, 0.022, seam - y)
            f = between * under_lip
            blend(c, 0.82 * f, 0.79 * f, 0.73 * f, lit)
            tongue = smoothstep(0.55, 1.0, (seam - y) / max(gap, 1e-3)) * smoothstep(0.7, 0.3, abs(t)) * p.mouth_open
            blend(c, 0.42, 0.11, 0.11, min(tongue * 1.2, 0.9) * (1 - lit))
        else:
            shade = (0.82 if y >= seam else 1.0) * (0.94 + 0.12 * noise(x * 30, y * 4))
            edge = max(min((top - y) / 0.014, (y - bottom) / 0.014, 1.0), 0.0)
            tint(c, p.lip, shade, edge * 0.95)
            gloss = 0.5
    d = min(abs(y - seam), abs(y - gap_bottom)) / 0.010
    blend(
        c,
        p.lip[0] * 0.25,
        p.lip[1] * 0.16,
        p.lip[2] * 0.16,
        smoothstep(1.4, 0.3, d) * 0.8 * smoothstep(1.08, 0.95, abs(t)),
    )
    return gloss

"""What a point of the rendered people looks like before light: skin, eyes, brows, lips, beard, cloth, background.

Kernels write linear RGB into `c` (3,) at canonical face coordinates (head frame, expression not applied to x).
"""

import math

from facesnap.synthetic.head import (
    beard_density,
    brow_line,
    bump,
    fold,
    hairline,
    jit,
    lattice,
    lids,
    lip_width,
    lips,
    noise,
    smoothstep,
)


@jit
def blend(c, r, g, b, t):
    c[0] += (r - c[0]) * t
    c[1] += (g - c[1]) * t
    c[2] += (b - c[2]) * t


@jit
def tint(c, colour, f, t):
    """Blend towards `colour` (3,) times f."""
    blend(c, colour[0] * f, colour[1] * f, colour[2] * f, t)


@jit
def face(x, y, z, p, c):
    """Paint the head at (x, y, z). Returns (gloss, eye): eye is 1 on an eyeball, 2 in its highlight."""
    skin = p.skin
    c[0] = skin[0]
    c[1] = skin[1]
    c[2] = skin[2]
    ax = abs(x)
    mottle = 1 + 0.07 * (noise(x * 5 + 9, y * 5) * 0.5 + noise(x * 13, y * 13 + 4) * 0.5 - 0.5)
    for k in range(3):
        c[k] *= mottle
    if z < 0.0:
        scalp(x, y, z, p, c)
        return 0.2, 0.0
    gloss = 0.20
    ex = p.eye_spacing
    ey = p.eye_y
    my = p.mouth_y
    tip = ey - p.nose_length
    smile = max(p.smile, 0.0)
    red = p.blush * bump(ax - 0.40, y - (ey - 0.27), 0.13, 0.10) + 0.25 * p.blush * bump(x, y - tip, 0.09, 0.07)
    blend(c, skin[0] * 1.05, skin[1] * 0.72, skin[2] * 0.72, min(red, 0.8))
    if p.freckles > 0:
        area = bump(ax - 0.24, y - (ey - 0.22), 0.24, 0.13)
        blend(c, skin[0] * 0.62, skin[1] * 0.42, skin[2] * 0.30, 0.9 * p.freckles * freckle(x, y, p) * area)
    # what little light reaches: corners of the eyes, wings of the nose, under the lip, wrinkles
    dark = 0.30 * bump(ax - (ex - 0.13), y - (ey + 0.02), 0.06, 0.07)
    dark += 0.20 * bump(ax - ex, y - (ey + 0.07), 0.16, 0.045)
    dark += 0.30 * bump(ax - p.nose_width * 1.25, y - (tip - 0.015), 0.03, 0.05)
    dark += 0.26 * bump(x, y - (tip - 0.085), 0.10, 0.03)
    dark += 0.20 * bump(x, y - (my - p.lower_lip - 0.06 - 0.13 * p.mouth_open), 0.10, 0.03)
    dark += 0.10 * bump(ax - ex, y - (ey - 0.10), 0.12, 0.03) * (0.5 + p.age)
    dark += (0.18 * smile + 0.22 * p.age) * fold(ax, y, p, 0.022) * smoothstep(my - 0.10, my + 0.02, y)
    if p.age > 0.35 and y > ey + 0.25:
        wave = abs(math.sin((y - ey) * 38 + math.sin(x * 4)))
        line = (1 - smoothstep(0.0, 0.35, wave)) * smoothstep(0.55, 0.3, ax) * smoothstep(0.3, 0.38, y - ey)
        dark += 0.18 * (p.age - 0.35) * line
    if p.age > 0.35:  # crow's feet
        feet = abs(math.sin((y - ey) * 60))
        dark += 0.22 * (p.age - 0.35) * (1 - smoothstep(0.0, 0.5, feet)) * bump(ax - ex - 0.27, y - ey, 0.06, 0.07)
    light = max(1 - dark, 0.1)
    c[0] *= light
    c[1] *= light**1.25
    c[2] *= light**1.3
    if p.mole > 0:
        spot = smoothstep(0.036, 0.020, math.hypot(x - p.mole_x, y - p.mole_y))
        blend(c, skin[0] * 0.3, skin[1] * 0.2, skin[2] * 0.17, spot)
    gloss = beard(x, y, z, p, c, gloss)
    nostril = ((ax - p.nose_width * 0.55) / 0.038) ** 2 + ((y - (tip - 0.055 + p.nose_upturn * 0.02)) / 0.020) ** 2
    blend(c, skin[0] * 0.16, skin[1] * 0.08, skin[2] * 0.07, 0.85 * smoothstep(1.6, 0.4, nostril))
    brow(ax, y, p, c)
    gloss, eye = eyes(x, y, p, c, gloss)
    gloss = mouth(x, y, p, c, gloss)
    scalp(x, y, z, p, c)
    return gloss, eye


@jit
def freckle(x, y, p):
    """Cover at (x, y) by round dots of unequal sizes, at most one in each cell of a grid."""
    gx = x * 15 + 40
    gy = y * 15 + 40
    cover = 0.0
    for j in range(int(gy) - 1, int(gy) + 2):
        for i in range(int(gx) - 1, int(gx) + 2):
            s = lattice(i * 3 + 1 + int(p.hair_seed * 1000), j * 3 + 2)
            dx = gx - i - 0.15 - 0.7 * lattice(i * 5 + 7, j * 3)
            dy = gy - j - 0.15 - 0.7 * lattice(i * 3, j * 5 + 9)
            r = 0.10 + 0.24 * s
            if s > 0.35:
                cover = max(cover, smoothstep(r + 0.12, r - 0.10, math.hypot(dx, dy)))
    return cover


@jit
def scalp(x, y, z, p, c):
    """Hair roots and the soft shade at the hairline, so that the hair grows out of the skin."""
    if p.hair_thickness < 0.012:
        return
    u = math.atan2(x, z)
    below = hairline(u, p) - y  # > 0 below the hairline
    for k in range(3):
        c[k] *= 1 - 0.22 * smoothstep(0.14, 0.0, below)
    strands = noise(u * 55 + 3, y * 9) * 0.7 + noise(u * 110, y * 16) * 0.3
    tint(c, p.hair, 1.1, smoothstep(0.35, 0.75, smoothstep(0.085, -0.03, below) * 0.9 + (strands - 0.5) * 0.7))


@jit
def beard(x, y, z, p, c, gloss):
    if p.stubble > 0:
        line = p.mouth_y + 0.06 + (abs(x) / p.face_width) ** 2.0 * 0.55
        area = smoothstep(line + 0.08, line - 0.10, y)
        tip = p.eye_y - p.nose_length
        lip = smoothstep(p.mouth_width * 1.3, p.mouth_width * 0.9, abs(x)) * smoothstep(tip - 0.04, tip - 0.09, y)
        area = max(area, lip)
        shade = p.stubble * 0.62 * area * (0.55 + 0.8 * noise(x * 42, y * 42))
        blend(c, p.brow[0] * 0.8 + 0.04, p.brow[1] * 0.8 + 0.04, p.brow[2] * 0.8 + 0.045, min(shade, 0.8))
    density = beard_density(x, y, z, p)
    if density > 0:
        strands = noise(x * 48 + 7, y * 14) * 0.6 + noise(x * 85, y * 30) * 0.4
        cover = 0.94 * smoothstep(0.05, 0.95, density * 1.15 - 0.35 * (1 - density) * strands)
        tint(c, p.hair, 0.55 + 0.9 * strands, cover)
        gloss *= 1 - 0.8 * cover
    return gloss


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
def eyes(x, y, p, c, gloss):
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
        c[0] = 0.84
        c[1] = 0.82
        c[2] = 0.81
        gaze = p.gaze_x * 0.045
        ix = lx * side - gaze
        iy = ly - 0.15 * p.eye_open - p.gaze_y * 0.03
        r = math.hypot(ix, iy) / p.iris_radius
        gloss = 0.0
        eye = 1.0
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
            eye = 2.0
    lash = (0.014 + 0.020 * p.lashes) * (0.6 + 0.5 * smoothstep(-1, 1.1, t))
    if abs(t) < 1.16:
        top = upper if abs(t) < 1 else 0.0
        if t > 0.8:
            top += (t - 0.8) * 0.06 * p.lashes
        d = abs(ly - top - lash * 0.4) / lash
        ends = smoothstep(1.16, 0.98, abs(t))
        if not inside or d < 1:
            blend(c, 0.03, 0.02, 0.018, smoothstep(1.2, 0.5, d) * (0.65 + 0.35 * p.lashes) * ends)
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


@jit
def hair(u, v, p, c):
    """Strands that run along v. Returns the strand's value in [0, 1], which also shifts the highlight."""
    warp = 1.2 * noise(u * 5 + p.hair_seed * 50, v * 1.6) + p.curl * 1.6 * noise(u * 9, v * 7)
    fine = noise(u * 38 + warp * 6, v * 3.0 + warp)
    finest = noise(u * 85 + warp * 9, v * 5.0)
    lock = noise(u * 11 + warp * 2, v * 1.2 + 5)
    strand = 0.45 * fine + 0.25 * finest + 0.30 * lock
    tint(c, p.hair, 0.42 + 1.05 * strand, 1.0)
    return strand


@jit
def clothes(x, y, z, p, c):
    """Shirt, stripes or an open jacket. Returns 1 where the neckline leaves skin."""
    c[0] = p.clothes[0]
    c[1] = p.clothes[1]
    c[2] = p.clothes[2]
    folds = 0.90 + 0.2 * noise(x * 3.5, y * 2.2 + 3)
    for k in range(3):
        c[k] *= folds
    if p.pattern == 1:
        stripe = abs(((y * 5.0) % 1.0) - 0.5)
        tint(c, p.clothes_b, folds, smoothstep(0.22, 0.28, stripe))
    elif p.pattern == 2 and z > 0:
        lapel = 0.30 * smoothstep(-1.1, 0.0, y) + 0.02
        tint(c, p.clothes_b, folds, smoothstep(lapel + 0.01, lapel - 0.01, abs(x)))
        seam = smoothstep(0.035, 0.01, abs(abs(x) - lapel - 0.02))
        for k in range(3):
            c[k] *= 1 - 0.45 * seam
    if z > 0:
        line = -0.06 - p.neckline * 0.35 + abs(x) * p.neckline * 0.8
        if y > line + 0.02 and abs(x) < 0.62:
            c[0] = p.skin[0]
            c[1] = p.skin[1] * 0.96
            c[2] = p.skin[2] * 0.95
            return 1.0
        hem = smoothstep(line - 0.06, line - 0.02, y) * (1.0 if abs(x) < 0.64 else 0.0)
        for k in range(3):
            c[k] *= 1 - 0.28 * hem
    return 0.0


@jit
def background(x, y, p, c):
    """The backdrop at picture coordinates in [-1, 1], y up."""
    kind = int(p.background)
    s = p.back_seed
    if kind == 0:  # studio: a soft spot of light
        m = smoothstep(1.5, 0.1, math.hypot(x - 0.2 * math.sin(s * 6), y - 0.1))
    elif kind == 1:  # plain: a slow vertical gradient
        m = 0.25 + 0.5 * (0.5 + 0.5 * y)
    elif kind == 2:  # bokeh: discs of light, out of focus
        m = 0.2 + 0.15 * y
        for i in range(12):
            bx = (i * 0.618 + s * 7.3) % 1.0 * 2.4 - 1.2
            by = (i * 0.381 + s * 3.1 + i * i * 0.07) % 1.0 * 2.4 - 1.2
            r = 0.14 + 0.18 * ((i * 0.27 + s) % 1.0)
            m += 0.32 * smoothstep(r, r - 0.06, math.hypot(x - bx, y - by))
    else:  # hills under a sky
        horizon = -0.12 + 0.18 * math.sin(x * 2 + s * 6) + 0.06 * math.sin(x * 6 + s * 3)
        m = smoothstep(horizon - 0.03, horizon + 0.03, y)
    for k in range(3):
        c[k] = p.back_a[k] + (p.back_b[k] - p.back_a[k]) * m

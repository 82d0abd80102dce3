"""What a point of the head of the rendered people looks like before light: skin, wrinkles, beard, hair.

Kernels write linear RGB into `c` (3,) at canonical face coordinates (head frame, expression not applied to x).
"""

import math

from facesnap.synthetic.features import brow, eyes, mouth
from facesnap.synthetic.hair import beard_density, covered, grey_share, hairline
from facesnap.synthetic.head import fold
from facesnap.synthetic.numerics import blend, bump, jit, lattice, noise, smoothstep, tint


@jit
def face(x, y, z, p, c):
    """Paint the head at (x, y, z). Returns (gloss, eye): eye is 1 on an eyeball, 2 in its highlight."""
    skin = p.skin
    c[0] = skin[0]
    c[1] = skin[1]
    c[2] = skin[2]
    ax = abs(x)
    mottle = 1 + (0.07 + 0.08 * p.wrinkles) * (noise(x * 5 + 9, y * 5) * 0.5 + noise(x * 13, y * 13 + 4) * 0.5 - 0.5)
    for k in range(3):
        c[k] *= mottle
    if z < 0.0:
        scalp(x, y, z, p, c)
        return 0.2, 0.0
    gloss = 0.20
    ey = p.eye_y
    my = p.mouth_y
    tip = ey - p.nose_length
    smile = max(p.smile, 0.0)
    red = p.blush * bump(ax - 0.40, y - (ey - 0.27), 0.13, 0.10) + 0.25 * p.blush * bump(x, y - tip, 0.09, 0.07)
    blend(c, skin[0] * 1.05, skin[1] * 0.72, skin[2] * 0.72, min(red, 0.8))
    if p.freckles > 0:
        area = bump(ax - 0.24, y - (ey - 0.22), 0.24, 0.13)
        blend(c, skin[0] * 0.62, skin[1] * 0.42, skin[2] * 0.30, 0.9 * p.freckles * freckle(x, y, p) * area)
    dark = shaded_corners(ax, y, p)
    if smile > 0 and my - 0.10 < y < tip + 0.03:
        dark += 0.18 * smile * fold(ax, y, p, 0.022) * smoothstep(my - 0.10, my + 0.02, y)
    if p.wrinkles > 0:
        dark += lines_of_age(x, y, p)
    light = max(1 - dark, 0.1)
    c[0] *= light
    c[1] *= light * (0.75 + 0.25 * light)
    c[2] *= light * (0.70 + 0.30 * light)
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
def shaded_corners(ax, y, p):
    """Where little light reaches: corners of the eyes, wings of the nose, under the lip."""
    ex = p.eye_spacing
    ey = p.eye_y
    tip = ey - p.nose_length
    dark = 0.30 * bump(ax - (ex - 0.13), y - (ey + 0.02), 0.06, 0.07)
    dark += (0.20 + 0.06 * p.brow_ridge) * bump(ax - ex, y - (ey + 0.07), 0.16, 0.045)
    dark += 0.30 * bump(ax - p.nose_width * 1.25, y - (tip - 0.015), 0.03, 0.05)
    dark += 0.26 * bump(ax, y - (tip - 0.085), 0.10, 0.03)
    dark += 0.20 * bump(ax, y - (p.mouth_y - p.lower_lip - 0.06 - 0.13 * p.mouth_open), 0.10, 0.03)
    return dark + 0.05 * bump(ax - ex, y - (ey - 0.10), 0.12, 0.03)


@jit
def lines_of_age(x, y, p):
    """How much wrinkles darken the skin at (x, y)."""
    ax = abs(x)
    ex = p.eye_spacing
    up = y - p.eye_y
    my = p.mouth_y
    w = p.wrinkles
    deep = max(w - 0.3, 0.0)
    dark = 0.0
    if my - 0.10 < y < p.eye_y - p.nose_length + 0.03:
        dark += 0.36 * w * fold(ax, y, p, 0.020) * smoothstep(my - 0.10, my + 0.02, y)
    if w <= 0.3:
        return dark + 0.42 * w * bump(up + 0.155 - 1.4 * (ax - ex) ** 2, ax - ex, 0.014, 0.11)
    if up > 0.10:  # the forehead's lines and the two between the brows
        if up > 0.26 and ax < 0.62:
            wave = abs(math.sin(up * 34 + 0.8 * math.sin(x * 4 + 1) + 3 * noise(x * 2 + 7, up * 3)))
            line = (1 - smoothstep(0.0, 0.42, wave)) * smoothstep(0.62, 0.30, ax) * smoothstep(0.26, 0.36, up)
            dark += 0.55 * deep * line
        dark += 0.50 * deep * bump(ax - 0.045, up - 0.17, 0.011, 0.06)
    elif up > -0.42:  # crow's feet, bags under the eyes
        dx = ax - ex - 0.17
        if 0.02 < dx < 0.27:
            angle = math.atan2(up, dx)
            feet = (1 - smoothstep(0.0, 0.55, abs(math.sin(angle * 4.5 + 0.6)))) * smoothstep(0.02, 0.07, dx)
            dark += 0.75 * deep * feet * smoothstep(0.27, 0.12, math.hypot(dx, up))
        arc = up + 0.155 - 1.4 * (ax - ex) ** 2
        dark += 0.42 * w * bump(arc, ax - ex, 0.014, 0.11)
        dark += 0.22 * w * bump(up + 0.105, ax - ex + 0.02, 0.014, 0.10)
    else:  # from the corners of the mouth down, and fine lines about the lips
        dark += 0.50 * deep * bump(ax - p.mouth_width * 1.08 - 0.03, y - (my - 0.12), 0.014, 0.075)
        lips = (1 - smoothstep(0.0, 0.6, abs(math.sin(x * 48)))) * bump(ax, y - (my + p.upper_lip + 0.035), 0.15, 0.022)
        dark += 0.35 * deep * lips
    if ax < 0.25:
        return dark
    spots = noise(x * 7 + 11 + p.hair_seed * 9, y * 7) * noise(x * 17, y * 17 + p.hair_seed * 20)
    dark += 0.45 * deep * smoothstep(0.50, 0.64, spots) * smoothstep(0.25, 0.45, ax)
    creases = noise(ax * 9 + 3 * up, up * 42 + 9 * ax)  # fine, along the cheeks
    return dark + 0.28 * deep * smoothstep(0.62, 0.92, creases) * smoothstep(0.30, 0.42, ax)


@jit
def neck(u, s, p, c):
    """The neck at azimuth u and share s of the way down: darker than the face, creased with age."""
    c[0] = p.skin[0] * 0.97
    c[1] = p.skin[1] * 0.95
    c[2] = p.skin[2] * 0.94
    if p.wrinkles > 0.3:
        crease = abs(math.sin(s * 26 + 1.5 * noise(u * 2, s * 4))) + abs(u) * 0.25
        cords = bump(abs(u) - 0.42, 0.0, 0.07, 1.0)
        dark = (p.wrinkles - 0.3) * (0.40 * (1 - smoothstep(0.0, 0.5, crease)) + 0.30 * cords)
        for k in range(3):
            c[k] *= 1 - dark


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
    if p.hair_thickness < 0.012 or (z > 0.45 and y < 0.0):
        return
    u = math.atan2(x, z)
    below = hairline(u, p) - y  # > 0 below the hairline
    if below > 0.14:
        return
    for k in range(3):
        c[k] *= 1 - 0.22 * smoothstep(0.14, 0.0, below) * covered(y, u, p)
    strands = noise(u * 55 + 3, y * 9) * 0.7 + noise(u * 110, y * 16) * 0.3
    roots = smoothstep(0.35, 0.75, smoothstep(0.085, -0.03, below) * 0.9 + (strands - 0.5) * 0.7)
    tint(c, p.hair, 1.1, roots * covered(y, u, p))


@jit
def beard(x, y, z, p, c, gloss):
    if p.stubble > 0:
        line = p.mouth_y + 0.06 + (abs(x) / p.face_width) ** 2.0 * 0.55
        area = smoothstep(line + 0.08, line - 0.10, y)
        tip = p.eye_y - p.nose_length
        lip = smoothstep(p.mouth_width * 1.3, p.mouth_width * 0.9, abs(x)) * smoothstep(tip - 0.04, tip - 0.09, y)
        area = max(area, lip)
        if area > 0:
            shade = p.stubble * 0.62 * area * (0.55 + 0.8 * noise(x * 42, y * 42))
            grey = 0.5 * p.grey_beard
            blend(
                c,
                p.beard_hair[0] * 0.8 + 0.04 + grey * (p.grey_hair[0] - p.beard_hair[0]),
                p.beard_hair[1] * 0.8 + 0.04 + grey * (p.grey_hair[1] - p.beard_hair[1]),
                p.beard_hair[2] * 0.8 + 0.045 + grey * (p.grey_hair[2] - p.beard_hair[2]),
                min(shade, 0.8),
            )
    density = beard_density(x, y, z, p) if p.beard + p.goatee + p.moustache > 0 else 0.0
    if density > 0:
        strands = noise(x * 48 + 7, y * 14) * 0.6 + noise(x * 85, y * 30) * 0.4
        cover = 0.94 * smoothstep(0.05, 0.95, density * 1.15 - 0.35 * (1 - density) * strands)
        tint(c, p.beard_hair, 0.55 + 0.9 * strands, cover)
        if p.grey_beard > 0:  # the chin's first
            share = p.grey_beard * (0.65 + 0.5 * bump(x, y + p.lower_height * 0.9, 0.22, 0.3))
            white = cover * smoothstep(-0.35, 0.35, share - 1.4 * (strands - 0.15))
            tint(c, p.grey_hair, 0.55 + 0.7 * strands, white)
        gloss *= 1 - 0.8 * cover
    return gloss


@jit
def hair(u, v, p, c):
    """Strands that run along v. Returns the strand's value in [0, 1], which also shifts the highlight."""
    warp = 1.2 * noise(u * 5 + p.hair_seed * 50, v * 1.6)
    if p.curl > 0:
        warp += p.curl * 1.6 * noise(u * 9, v * 7)
    fine = noise(u * 38 + warp * 6, v * 3.0 + warp)
    finest = noise(u * 85 + warp * 9, v * 5.0)
    lock = noise(u * 11 + warp * 2, v * 1.2 + 5)
    strand = 0.45 * fine + 0.25 * finest + 0.30 * lock
    c[0] = p.hair[0] * (0.42 + 1.05 * strand)
    c[1] = p.hair[1] * (0.42 + 1.05 * strand)
    c[2] = p.hair[2] * (0.42 + 1.05 * strand)
    if p.grey + p.grey_temple > 0:  # strand by strand, so that it looks like salt and pepper
        grey = smoothstep(-0.38, 0.38, grey_share(u, v, p) - 0.8 * finest - 0.7 * fine + 0.25)
        tint(c, p.grey_hair, 0.50 + 0.75 * strand, 0.9 * grey)
    return strand

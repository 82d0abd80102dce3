"""Hair and beard of the rendered people: where they grow, how far they have gone grey, and their shells."""

import math

import numpy as np

from facesnap.synthetic.head import azimuth, skull
from facesnap.synthetic.numerics import bump, jit, noise, smoothstep


@jit
def hat_line(u):
    """Height of a hat's edge: low on the forehead, lower at the back."""
    return 0.27 + 0.21 * math.cos(u)


@jit
def hairline(u, p):
    """Height at which the hair begins at azimuth u."""
    a = abs(u)
    y = p.hairline
    if p.fringe > 0:
        y -= p.fringe * (0.8 + 0.2 * math.cos((u - p.hair_part) * 2.2))
    y += 0.04 * math.cos((u - p.hair_part * 0.8) * 3.0) * (1 - smoothstep(0.4, 0.9, a))
    if p.recede > 0:  # bare corners above the temples
        y += 0.17 * p.recede * bump(a - 0.55, 0.0, 0.20, 1.0)
    y += (p.temple - y) * smoothstep(0.45 + 0.12 * p.recede, 0.95, a)
    y += (p.hair_side - y) * smoothstep(1.0, 1.35, a)
    return y + (p.hair_back - y) * smoothstep(1.55, 2.2, a)


@jit
def covered(y, u, p):
    """1 where hair may grow, 0 on a bald crown, for the height y and azimuth u."""
    if p.bald_top <= 0:
        return 1.0
    top = p.bald_top + 0.10 * smoothstep(1.2, 2.6, abs(u)) + 0.05 * (noise(u * 9 + 2, 4.0) - 0.5)
    front = smoothstep(0.75, 1.05, abs(u))
    return smoothstep(top + 0.05, top - 0.07, y) * front


@jit
def grey_share(u, v, p):
    """Share of grey strands at azimuth u and latitude v: the temples go first, the top keeps its colour longest."""
    side = smoothstep(0.40, 0.85, abs(u)) * smoothstep(1.05, 0.35, v)
    return min(p.grey + p.grey_temple * side, 1.0)


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


@jit
def hair_mesh(p, columns, rows, V, C):
    """The cap of hair: the skull pushed outwards where hair grows and hidden inside it elsewhere."""
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
            if p.hair_fade > 0:  # cut closer at the sides and the back
                thick *= 1 - p.hair_fade * smoothstep(0.75, 0.20, y) * smoothstep(0.55, 0.95, abs(u))
            thick += 0.012 * (noise(u * 22 + 3, phi * 2 + 9) - 0.5) * full  # locks
            if p.curl > 0:
                lump = noise(u * 6.5 + 3, phi * 8 + p.hair_seed * 9) - 0.35 + 0.5 * (noise(u * 15, phi * 18) - 0.5)
                thick += p.curl * 0.15 * full * lump * (0.6 + p.hair_thickness * 3)
            parting = math.exp(-0.5 * ((u - p.hair_part * 1.2) / 0.10) ** 2)
            thick -= 0.03 * parting * smoothstep(0.3, 0.7, y) * smoothstep(-0.3, 0.3, z)
            if p.hat > 0:  # pressed flat under a hat
                under = smoothstep(hat_line(u) - 0.06, hat_line(u) + 0.02, y)
                thick += (min(thick, 0.035) - thick) * under
            grown = smoothstep(h - 0.015, h + 0.03, y) * covered(y, u, p)
            offset = -0.06 + (0.06 + thick) * grown
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
            if p.curtain_curl > 0:
                lump = 0.22 * (noise(u * 7 + p.hair_seed * 30, s * 9) - 0.45) + 0.12 * (noise(u * 14, s * 19 + 4) - 0.5)
                lock += p.curtain_curl * lump * smoothstep(0.0, 0.25, s)
            wave = p.curtain_wave * math.sin(s * 14 + 3 * math.sin(u * 2)) * smoothstep(0.1, 0.5, s) + lock
            V[k, 0] = (w + wave) * math.sin(u)
            V[k, 1] = 0.45 - s * (p.curtain_length + 0.45) - 0.12 * (noise(u * 11, 2.0) - 0.5) * smoothstep(0.6, 1.0, s)
            V[k, 2] = (0.95 + wave * 0.5) * math.cos(u) * (0.75 if math.cos(u) > 0 else 0.85) - 0.05
            C[k, 0] = u
            C[k, 1] = 1.0 - s * 2.2
            C[k, 2] = 0.5 - 0.5 * smoothstep(0.8, 1.0, s)
            k += 1


BUN_GRID = (24, 14)


def bun_mesh(p, columns=BUN_GRID[0], rows=BUN_GRID[1]):
    """A knot of hair on top of the head."""
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

"""Small numeric kernels that the surfaces and the paint share."""

import math

from numba import njit

jit = njit(cache=True, fastmath=True)


@jit
def smoothstep(a, b, x):
    t = (x - a) / (b - a)
    t = min(max(t, 0.0), 1.0)
    return t * t * (3 - 2 * t)


@jit
def bump(dx, dy, sx, sy):
    """A Gaussian bump of height one, cut off where it is below 0.002: most points lie far from most bumps."""
    q = (dx / sx) ** 2 + (dy / sy) ** 2
    return math.exp(-0.5 * q) if q < 12.5 else 0.0


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


@jit
def blend(c, r, g, b, t):
    c[0] += (r - c[0]) * t
    c[1] += (g - c[1]) * t
    c[2] += (b - c[2]) * t


@jit
def tint(c, colour, f, t):
    """Blend towards `colour` (3,) times f."""
    blend(c, colour[0] * f, colour[1] * f, colour[2] * f, t)

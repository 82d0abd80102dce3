"""What clothes and background of the rendered people look like before light. Kernels write linear RGB into `c` (3,)."""

import math

from facesnap.synthetic.numerics import jit, noise, smoothstep, tint


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
        c[k] = (p.back_a[k] + (p.back_b[k] - p.back_a[k]) * m) * p.back_level

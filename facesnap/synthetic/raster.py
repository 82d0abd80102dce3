"""Which triangle each sample of a picture sees: normals and the z-buffer."""

import math

import numpy as np

from facesnap.synthetic.numerics import jit

SHADOW_EXTENT = 2.1  # half the width of the light's depth map, in head units


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
def rasterise(S, T, closed, handed, depth, which, b0, b1):
    """Fill the z-buffer: nearest triangle of every sample and its first two barycentric weights.

    Triangles of closed surfaces that face away are skipped. handed: 1 where y points down, -1 where it points up.
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
        if abs(area) < 1e-9 or (closed[t] and area * handed > 0):
            continue
        left = max(int(math.ceil(min(x0, x1, x2))), 0)
        right = min(int(math.floor(max(x0, x1, x2))), W - 1)
        up = max(int(math.ceil(min(y0, y1, y2))), 0)
        down = min(int(math.floor(max(y0, y1, y2))), H - 1)
        if left > right or up > down:
            continue
        inverse = 1.0 / area
        x1 = (x1 - x0) * inverse
        y1 = (y1 - y0) * inverse
        x2 = (x2 - x0) * inverse
        y2 = (y2 - y0) * inverse
        for py in range(up, down + 1):
            for px in range(left, right + 1):
                w1 = (px - x0) * y2 - x2 * (py - y0)
                w2 = x1 * (py - y0) - (px - x0) * y1
                w0 = 1 - w1 - w2
                if w0 < -1e-5 or w1 < -1e-5 or w2 < -1e-5:
                    continue
                z = w0 * S[a, 2] + w1 * S[b, 2] + w2 * S[c, 2]
                if z > depth[py, px]:
                    depth[py, px] = z
                    which[py, px] = t
                    b0[py, px] = w0
                    b1[py, px] = w1


def z_buffer(S, T, closed, handed, size, far):
    """Depth (size, size), nearest triangle (-1: none) and barycentric weights of every sample."""
    depth, which = np.full((size, size), far), np.full((size, size), -1, np.int32)
    b0, b1 = np.empty((2, size, size))
    rasterise(S, T, closed, handed, depth, which, b0, b1)
    return depth, which, b0, b1

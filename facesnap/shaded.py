"""A shaded picture of the reconstructed head, where PyTorch3D is installed. Nothing else needs it.

A landmark drawing says where the points go; the shaded surface shows what was reconstructed: whose shape, how it is
turned, what it expresses. The surface is spanned between the 72 landmarks, as a mask.
"""

from __future__ import annotations

import importlib.util

import numpy as np
from scipy.spatial import Delaunay

from facesnap.errors import InputError
from facesnap.geometry import letterbox
from facesnap.heads import Head, HeadModel

LIGHT = np.array([-0.4, 0.5, 0.77])  # from the upper left, towards the camera; x right, y up, z to the camera
AMBIENT = 0.25
COLOUR = np.array([196, 178, 164])
BACKGROUND = 24


def available() -> bool:
    """Whether PyTorch3D can be imported."""
    return importlib.util.find_spec("pytorch3d") is not None


def triangles(model: HeadModel) -> np.ndarray:
    """The surface (F, 3) between the 72 landmarks, by their indices, counter-clockwise seen from the camera."""
    mean = model.mean[:, :2]
    faces = Delaunay(mean).simplices
    first, second = mean[faces[:, 1]] - mean[faces[:, 0]], mean[faces[:, 2]] - mean[faces[:, 0]]
    clockwise = first[:, 0] * second[:, 1] - first[:, 1] * second[:, 0] < 0
    return np.where(clockwise[:, None], faces[:, ::-1], faces)


def vertices(model: HeadModel, head: Head, size: tuple[int, int]) -> np.ndarray:
    """The 72 landmarks (72, 3) in a picture of size (height, width): pixels, x right, y down, z to the camera."""
    flat = letterbox(model.project(head), head.size, size)
    scale = head.scale * min(size[0] / head.size[0], size[1] / head.size[1])
    depth = scale * (model.points(head.identity, head.expression) @ head.rotation.T)[:, 2]
    return np.concatenate([flat, depth[:, None]], axis=1)


def normals(points: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """Unit normals (V, 3) of vertices (V, 3) in pixels, x right, y *up*: means of their faces', by area."""
    upright = points * [1, -1, 1]
    a, b, c = (upright[faces[:, k]] for k in range(3))
    areas = np.cross(b - a, c - a)
    summed = np.zeros_like(upright)
    for k in range(3):
        np.add.at(summed, faces[:, k], areas)
    return summed / np.linalg.norm(summed, axis=1, keepdims=True).clip(1e-9)


def to_ndc(points: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Pixels (V, 3), x right, y down, z to the camera → PyTorch3D's screen: x left, y up, z away, all positive.

    Its shorter side runs from −1 to 1, and whole numbers are the centres of our pixels, hence the halves.
    """
    height, width = size
    half = min(size) / 2
    depth = points[:, 2].max() - points[:, 2] + 1
    x, y = (width / 2 - points[:, 0] - 0.5) / half, (height / 2 - points[:, 1] - 0.5) / half
    return np.stack([x, y, depth / half], axis=1)


def picture(model: HeadModel, head: Head, size: tuple[int, int]) -> np.ndarray:
    """The head of a preview (`PreviewResult.head`) as a shaded surface, RGB uint8 (height, width, 3).

    Raises:
        InputError: PyTorch3D is not installed.
    """
    if not available():
        raise InputError("A shaded head needs PyTorch3D, which is not installed; docs/gpu.md says how.")
    import torch
    from pytorch3d.renderer.mesh.rasterize_meshes import rasterize_meshes
    from pytorch3d.structures import Meshes

    points, faces = vertices(model, head, size), triangles(model)
    screen = torch.from_numpy(to_ndc(points, size)).float()
    mesh = Meshes([screen], [torch.from_numpy(faces.astype(np.int64))])
    hit, _, barycentric, _ = rasterize_meshes(mesh, image_size=size, faces_per_pixel=1)
    hit, barycentric = hit[0, ..., 0].numpy(), barycentric[0, ..., 0, :].numpy()

    canvas = np.full((*size, 3), BACKGROUND, np.uint8)
    seen = hit >= 0
    facing = np.einsum("pk,pkc->pc", barycentric[seen], normals(points, faces)[faces[hit[seen]]])
    light = AMBIENT + (1 - AMBIENT) * (facing @ (LIGHT / np.linalg.norm(LIGHT))).clip(0, 1)
    canvas[seen] = (COLOUR * light[:, None]).astype(np.uint8)
    return canvas

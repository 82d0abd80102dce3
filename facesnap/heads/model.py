"""Any 3D head model of the 72 landmarks, and its fit to the landmarks of one or several pictures.

    X        = points(α, δ)                   model frame: x right, y up, z to the camera
    landmark = s · Π · w · R · X + t          picture frame: pixels, x right, y down

α is the identity, δ the expression. A model is linear in both (`LinearHeadModel`), or nearly so near where it
stands (`FlameHeadModel`, whose jaw turns).

Π drops z and turns y over. w = d / (d − z) is the perspective of a camera at distance d from the model's
origin; at d = ∞ it is 1 and the camera scaled-orthographic. Portraits are taken from nearby: measured on
rendered people seen from 6.5 units, d = 10 leaves 0.75 of the error that d = ∞ leaves.

The fit is a maximum a posteriori one: landmark noise, measured as it goes, on one side, the spread of people and
of expressions on the other. The camera, and a model that is not linear, enter linearised
(Gauss-Newton), so that camera, identity and expression are solved together, where alternation lets each keep the
others' errors. The identity is one for all pictures of a person.

Head size: a picture cannot tell a large head from a near one. Nothing restrains the scale, while everything
that makes a head larger costs by its spread; so what only enlarges a head is left to the camera, and every
head comes out at the size that its shape suggests. This is the normalisation without which a driver's large
head would become scale. (Dividing each head by its measured size instead forgets what shape says of size:
on rendered people the predictions were a tenth worse.)

Angles, for someone who looks at the picture (R = Rz(roll) · Ry(yaw) · Rx(pitch), degrees):
    yaw   > 0: the head turns to the picture's right
    pitch > 0: it looks down
    roll  > 0: it tilts counter-clockwise, the top of the head towards the picture's left
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from scipy.linalg import cho_factor, cho_solve, solve_triangular
from scipy.optimize import nnls

from facesnap import landmarks
from facesnap.errors import InputError

if TYPE_CHECKING:
    from facesnap.faces import Face

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"

# Landmark noise, in eye distances. The errors of a landmark net go together in neighbouring points and so pass
# for shape: only part of them is left over by a fit, hence the factor (measured on errors of both kinds).
FIRST_NOISE, LEAST_NOISE, NEIGHBOURS_AGREE = 0.025, 0.002, 1.7

_FLIP_Y = np.array([1.0, -1.0])
_LEFT_JAW, _RIGHT_JAW = np.arange(0, 8), np.arange(9, 17)


def rotation_from_euler(yaw: float = 0.0, pitch: float = 0.0, roll: float = 0.0) -> np.ndarray:
    """Degrees → rotation (3, 3) = Rz(roll) · Ry(yaw) · Rx(pitch); the signs stand at the top of this file."""
    (sy, sp, sr), (cy, cp, cr) = (f(np.radians([yaw, pitch, roll])) for f in (np.sin, np.cos))
    rx = np.array([[1, 0, 0], [0, cp, -sp], [0, sp, cp]])
    ry = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    rz = np.array([[cr, -sr, 0], [sr, cr, 0], [0, 0, 1]])
    return rz @ ry @ rx


def euler_from_rotation(rotation: np.ndarray) -> tuple[float, float, float]:
    """Rotation (3, 3) → (yaw, pitch, roll) in degrees, yaw within ±90."""
    yaw = np.arcsin(np.clip(-rotation[2, 0], -1, 1))
    pitch = np.arctan2(rotation[2, 1], rotation[2, 2])
    roll = np.arctan2(rotation[1, 0], rotation[0, 0])
    return float(np.degrees(yaw)), float(np.degrees(pitch)), float(np.degrees(roll))


@dataclass(frozen=True, eq=False)
class Head:
    """One head in one picture.

    identity (I,) and expression (E,) are coefficients of the model; rotation (3, 3) turns its frame into the
    camera's; scale is pixels per model unit; translation (2,) is where the model's origin falls, in pixels;
    size is (height, width) of the picture.
    """

    identity: np.ndarray
    expression: np.ndarray
    rotation: np.ndarray
    scale: float
    translation: np.ndarray
    size: tuple[int, int]

    @property
    def angles(self) -> tuple[float, float, float]:
        """(yaw, pitch, roll) in degrees."""
        return euler_from_rotation(self.rotation)


class HeadModel(ABC):
    """What the predictor needs of a head model; `points` and `tangent` are the model's own.

    mean (72, 3): the average head, expressionless, in the model's unit. The standard deviations (I,) and (E,)
    are those of the coefficients among people; expression_names name the E expressions where they mean
    something (else they are empty). With nonnegative_expression the coefficients are blendshape weights, never
    below 0. distance is that of the camera, in model units.
    """

    mean: np.ndarray
    identity_std: np.ndarray
    expression_std: np.ndarray
    name: str
    expression_names: tuple[str, ...]
    nonnegative_expression: bool
    distance: float
    reads_pictures: ClassVar[bool] = False  # and not only landmarks: then faces must keep theirs (`Face.image`)

    # ------------------------------------------------------------------ a model's own

    @abstractmethod
    def points(self, identity: np.ndarray, expression: np.ndarray) -> np.ndarray:
        """Coefficients (I,), (E,) → the 72 points (72, 3) in the model's frame."""

    @abstractmethod
    def tangent(self, identity: np.ndarray, expression: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The linear model that touches this one at the coefficients (I,), (E,): its mean (72, 3), identity
        basis (I, 72, 3) and expression basis (E, 72, 3)."""

    @abstractmethod
    def save_pretrained(self, folder: str | Path) -> None:
        """Writes config.json and safetensors, for `facesnap.heads.from_pretrained`."""

    # ------------------------------------------------------------------ from coefficients to points

    @property
    def num_identity(self) -> int:
        return len(self.identity_std)

    @property
    def num_expression(self) -> int:
        return len(self.expression_std)

    @cached_property
    def eye_distance(self) -> float:
        """Between the outer eye corners of the mean head, in model units."""
        return float(landmarks.eye_distance(self.mean))

    @cached_property
    def face_height(self) -> float:
        """From brows to chin of the mean head, in model units."""
        return float(np.ptp(self.mean[:, 1]))

    def project(self, head: Head) -> np.ndarray:
        """The landmarks (72, 2) of a head in its own picture, in pixels."""
        return self._place(self.points(head.identity, head.expression), head)

    def _place(self, points: np.ndarray, head: Head) -> np.ndarray:
        """Points (N, 3) in the model's frame → pixels (N, 2) of the head's picture."""
        turned = points @ head.rotation.T
        seen = turned[:, :2] * _perspective(turned[:, 2], self.distance)[:, None]
        return (head.scale * seen * _FLIP_Y + head.translation).astype(np.float32)

    # ------------------------------------------------------------------ from faces to heads

    def reconstruct(self, faces: "Sequence[Face]") -> list[Head]:
        """Faces, all of one person, → a Head for each with one common identity."""
        return self.fit([face.landmarks for face in faces], [face.size for face in faces])

    def fit(
        self,
        points: np.ndarray | Sequence[np.ndarray],
        sizes: tuple[int, int] | Sequence[tuple[int, int]],
        *,
        noise: float | None = None,
        expression_noise: float = 1.5,
        identity_prior: tuple[np.ndarray, np.ndarray] | None = None,
        iterations: int = 6,
    ) -> list[Head]:
        """Landmarks of one or several pictures of ONE person → a Head for each, all of the same identity.

        points: an array or a list of them, (68, 2), (68, 3), (72, 2) or (72, 3), in pixels of their picture,
            x right, y down. z is in the same unit, from any origin, towards the camera as in InsightFace's
            landmark_3d_68 (its mean shape has the nose at +0.6, the temples at −0.3) or away from it: the
            nose tells.
        sizes: (height, width) of each picture.
        noise: standard deviation of a landmark, in eye distances; None measures it from what the fit leaves.
        expression_noise: the factor by which expressions are held closer to neutral than their spread says;
            what is taken for expression too easily is the driver's identity.
        identity_prior: mean (I,) and precision (I, I) of the identity, where more is known than how people
            spread; by default the average head and identity_std.
        """
        arrays = [points] if isinstance(points, np.ndarray) else points
        pictures = [_Picture(array, self.mean) for array in arrays]
        prior = identity_prior or (np.zeros(self.num_identity), np.diag(1 / self.identity_std**2))
        identity = prior[0]
        expressions = np.zeros((len(pictures), self.num_expression))
        level = FIRST_NOISE if noise is None else noise
        for step in range(iterations):
            identity, expressions, left = self._step(pictures, identity, expressions, level, expression_noise, prior)
            if noise is None and step > 0:  # the first step still has the first camera's error in it
                level = max(NEIGHBOURS_AGREE * left, LEAST_NOISE)
        return [
            Head(
                identity=identity.astype(np.float32),
                expression=expression.astype(np.float32),
                rotation=picture.rotation,
                scale=float(picture.scale),
                translation=picture.translation[:2] * _FLIP_Y,
                size=(int(size[0]), int(size[1])),
            )
            for picture, expression, size in zip(pictures, expressions, np.reshape(sizes, (-1, 2)), strict=True)
        ]

    def _step(
        self,
        pictures: "list[_Picture]",
        identity: np.ndarray,
        expressions: np.ndarray,
        noise: float,
        expression_noise: float,
        identity_prior: tuple[np.ndarray, np.ndarray],
    ) -> tuple[np.ndarray, np.ndarray, float]:
        """One Gauss-Newton step: moves the pictures' cameras, returns the new coefficients (I,), (K, E) and
        the noise that this solution leaves, in eye distances.

        Unknowns in order: identity, a camera for each picture, an expression for each picture. The rows of
        a picture are divided by its scale, so that all pictures are measured in model units.
        """
        count, dims = self.num_identity, pictures[0].dims
        camera = 3 + 1 + dims  # rotation, log scale, translation
        free = count + len(pictures) * camera
        total = free + len(pictures) * self.num_expression
        normal, right = np.zeros((total, total)), np.zeros(total)
        sigma = noise * self.eye_distance
        energy, rows = 0.0, 0  # of the weighted target
        for k, picture in enumerate(pictures):
            shape = self.points(identity, expressions[k])
            mean, identity_basis, expression_basis = self.tangent(identity, expressions[k])
            columns = np.r_[
                0:count,
                count + k * camera : count + (k + 1) * camera,
                free + k * self.num_expression : free + (k + 1) * self.num_expression,
            ]
            jacobian = np.concatenate(
                [
                    picture.turn(identity_basis),
                    picture.camera_jacobian(shape),
                    picture.turn(expression_basis),
                ]
            )
            target = picture.target(shape, self.distance) - picture.turn(mean)
            weights = picture.weights() / sigma
            jacobian = (jacobian * weights).reshape(len(columns), -1)
            target = (target * weights).ravel()
            normal[np.ix_(columns, columns)] += jacobian @ jacobian.T
            right[columns] += jacobian @ target
            energy += target @ target
            rows += len(target)
        likely, precision = identity_prior
        prior, pull = np.zeros((total, total)), np.zeros(total)
        prior[:count, :count], pull[:count] = precision, precision @ likely
        prior[range(free, total), range(free, total)] = np.tile(
            (expression_noise / self.expression_std) ** 2, len(pictures)
        )
        solution = _ridge(normal + prior, right + pull, free, self.nonnegative_expression)
        # Squared residual over degrees of freedom; an unknown that its prior holds uses up less than one.
        residual = max(energy - 2 * solution @ right + solution @ normal @ solution, 0.0)
        held = np.trace(np.linalg.solve(normal + prior, prior))
        left = noise * math.sqrt(residual / (rows - total + held))
        for k, picture in enumerate(pictures):
            picture.move(solution[count + k * camera : count + (k + 1) * camera])
        return solution[:count], solution[free:].reshape(len(pictures), self.num_expression), left


class _Picture:
    """The landmarks of one picture and, while a fit runs, its camera.

    Camera frame: x right, y up, z to the viewer, pixels. A camera maps X to scale · rotation · X +
    translation (and perspective); the first `dims` coordinates of that were seen.
    """

    def __init__(self, points: np.ndarray, mean: np.ndarray) -> None:
        """points (68 | 72, 2 | 3) as `fit` takes them; mean (72, 3) gives the first camera."""
        self.rows = landmarks.TO_68 if len(points) == 68 else np.arange(landmarks.NUM)
        self.dims = points.shape[1]
        self.points = points * np.array([1.0, -1.0, 1.0])[: self.dims]
        if self.dims == 3:
            depth = self.points[:, 2]
            self.points[:, 2] *= np.sign(depth[30] - depth[np.isin(self.rows, (0, 9))].mean())
        # An affine camera by least squares, whose first two rows are then made orthonormal.
        shape = mean[self.rows].astype(np.float64)
        centre, middle = shape.mean(axis=0), self.points.mean(axis=0)
        affine = np.linalg.lstsq(shape - centre, self.points - middle, rcond=None)[0].T[:2]
        u, singular, vt = np.linalg.svd(affine, full_matrices=False)
        across = u @ vt
        self.rotation = np.stack([*across, np.cross(*across)])
        self.scale = singular.mean()
        self.translation = middle - self.scale * (self.rotation @ centre)[: self.dims]

    def turn(self, vectors: np.ndarray) -> np.ndarray:
        """Model vectors (..., 72, 3) → what the camera sees of them, (..., n, dims), still in model units."""
        return vectors[..., self.rows, :] @ self.rotation[: self.dims].T

    def target(self, shape: np.ndarray, distance: float) -> np.ndarray:
        """The seen points (n, dims) in model units about the model's origin, without their perspective."""
        seen = (self.points - self.translation) / self.scale
        depth = shape[self.rows] @ self.rotation[2]
        seen[:, :2] /= _perspective(depth, distance)[:, None]
        return seen

    def camera_jacobian(self, shape: np.ndarray) -> np.ndarray:
        """(3 + 1 + dims, n, dims): small turns about the model's axes, log scale, translation over scale."""
        x, y, z = shape.T
        none = np.zeros_like(x)
        turns = np.array([[none, -z, y], [z, none, -x], [-y, x, none]]).transpose(0, 2, 1)
        shifts = np.broadcast_to(np.eye(self.dims)[:, None], (self.dims, len(self.rows), self.dims))
        return np.concatenate([self.turn(turns), self.turn(shape)[None], shifts])

    def move(self, step: np.ndarray) -> None:
        """Applies a solved step, in the order of camera_jacobian."""
        x, y, z = step[:3]
        turned = self.rotation @ np.array([[1, -z, y], [z, 1, -x], [-y, x, 1]])
        u, _, vt = np.linalg.svd(turned)  # the nearest rotation
        self.rotation = u @ vt
        self.translation = self.translation + self.scale * step[4:]
        self.scale *= np.exp(step[3])

    def weights(self) -> np.ndarray:
        """How far each coordinate is believed, (n, dims).

        The contour less than the features, depth less than the plane; and the far jaw fades out from 15° to
        45° of yaw, where detectors slide it to the silhouette.
        """
        yaw = euler_from_rotation(self.rotation)[0]
        of_72 = np.ones(landmarks.NUM)
        of_72[list(landmarks.GROUPS["contour"])] = 0.5
        far = _RIGHT_JAW if yaw > 0 else _LEFT_JAW
        of_72[far] *= np.interp(abs(yaw), [15, 45], [1, 0.1])
        return of_72[self.rows, None] * np.array([1, 1, 0.5])[: self.dims]


def check_frame(points: np.ndarray, source: str) -> None:
    """InputError unless the 72 points (72, 3) are a head's in the model frame: x right, y up, z to the camera.

    Catches files with other axes and landmarks in another order than iBUG's, which a fit would only find hard.
    """
    if not np.isfinite(points).all():
        raise InputError(f"{source}: the landmarks hold values that are not numbers.")
    eyes, mouth = points[list(landmarks.GROUPS["left_eye"] + landmarks.GROUPS["right_eye"])], points[[52, 57]]
    upright = eyes[:, 1].min() > mouth[:, 1].max() > points[8, 1]
    to_the_right = points[36, 0] < points[40, 0] < points[44, 0] < points[48, 0]
    to_the_camera = points[30, 2] > points[[0, 9], 2].max()
    down = np.diff(points[list(landmarks.GROUPS["contour"]), 1]) * np.repeat([1, -1], 8)  # to the chin from both ends
    ordered = (down < 0.05 * np.ptp(points[:, 1])).all()  # a square chin is nearly level
    if not (upright and to_the_right and to_the_camera and ordered):
        raise InputError(
            f"{source}: the landmarks are not iBUG's of an upright head that looks along z (x right, y up); the file "
            "is of another model or another version."
        )


def _perspective(depth: np.ndarray, distance: float) -> np.ndarray:
    """How much larger a point looks for being `depth` nearer to the camera than the model's origin."""
    return 1 / (1 - depth / distance)


def _ridge(normal: np.ndarray, right: np.ndarray, free: int, nonnegative: bool) -> np.ndarray:
    """Solves normal · x = right; with nonnegative, for x[free:] ≥ 0 as well.

    The free unknowns are then eliminated (Schur complement), which leaves a small non-negative least squares.
    """
    if not nonnegative:
        return cho_solve(cho_factor(normal), right)
    factor = cho_factor(normal[:free, :free])
    coupling = normal[:free, free:]
    lower = np.linalg.cholesky(normal[free:, free:] - coupling.T @ cho_solve(factor, coupling))
    reduced = right[free:] - coupling.T @ cho_solve(factor, right[:free])
    bounded, _ = nnls(lower.T, solve_triangular(lower, reduced, lower=True))
    return np.concatenate([cho_solve(factor, right[:free] - coupling @ bounded), bounded])

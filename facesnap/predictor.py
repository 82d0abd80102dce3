"""The Landmark Predictor: the shape of one head, pose and expression of another → the 72 landmarks to draw.

    L = s_d · Π · R_d · (M + B_id α_src + B_exp δ_drv) + t_d

Shape α comes from the reference; pose R, scale s, place t and expression δ from the driver: a picture, or
numbers. Only the model's reconstruction of the driver is used. What the fit could not explain of the driver's
landmarks is mostly the driver's own face, so it is not added back.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from facesnap.errors import InputError, did_you_mean
from facesnap.geometry import letterbox
from facesnap.heads import Head, HeadModel, rotation_from_euler

if TYPE_CHECKING:
    from facesnap.faces import Face


PORTRAIT_SIZE = 0.37  # brows to chin over the picture's shorter side: a face box then takes about half of it
PORTRAIT_CENTRE = (0.5, 0.58)  # of the face, over the picture's width and height: the hair needs room above


class LandmarkPredictor:
    """Predicts landmarks with a head model. Holds nothing else, so it may be made and dropped at will."""

    def __init__(self, model: HeadModel) -> None:
        self.model = model

    def reconstruct(self, faces: "Face | Sequence[Face]") -> list[Head]:
        """The faces, all of one person, → a Head for each with one common identity."""
        several = faces if isinstance(faces, Sequence) else [faces]
        return self.model.reconstruct(several)

    def predict(self, shape: Head, driver: Head, size: tuple[int, int], *, strength: float = 1.0) -> np.ndarray:
        """The landmarks (72, 2), float32, of `shape`'s face held as `driver` is, in a new picture.

        The driver's picture is fitted whole into the new one, of size (height, width), and centred; it is
        never stretched. strength multiplies the driver's expression.
        """
        head = replace(driver, identity=shape.identity, expression=strength * driver.expression)
        return letterbox(self.model.project(head), driver.size, size)

    def from_numbers(
        self,
        *,
        yaw: float = 0.0,
        pitch: float = 0.0,
        roll: float = 0.0,
        head_size: float = PORTRAIT_SIZE,
        expression: Mapping[str, float] | np.ndarray | None = None,
        strength: float = 1.0,
        centre: tuple[float, float] = PORTRAIT_CENTRE,
        size: tuple[int, int] = (1024, 1024),
    ) -> Head:
        """A driver from numbers, with the mean identity, in a picture of size (height, width).

        yaw, pitch, roll: degrees; yaw > 0 turns to the picture's right, pitch > 0 looks down, roll > 0 tilts
            counter-clockwise.
        head_size: from brows to chin of the mean face, held frontally, over the picture's shorter side.
        expression: {name: weight} of the model's expression_names, or coefficients (E,); times strength.
        centre: where the middle of the face falls, as fractions of the picture's width and height.

        Raises InputError for an expression that the model does not know.
        """
        head = Head(
            identity=np.zeros(self.model.num_identity, dtype=np.float32),
            expression=strength * self.expression(expression),
            rotation=rotation_from_euler(yaw, pitch, roll),
            scale=1.0,
            translation=np.zeros(2),
            size=size,
        )
        return self.framed(head, size, head_size=head_size, centre=centre)

    def framed(
        self,
        head: Head,
        size: tuple[int, int],
        *,
        head_size: float = PORTRAIT_SIZE,
        centre: tuple[float, float] = PORTRAIT_CENTRE,
    ) -> Head:
        """The head, held as it is, in a picture of size (height, width), as large and where a portrait has it; the
        arguments are those of `from_numbers`."""
        height, width = size
        scale = head_size * min(size) / self.model.face_height
        place = np.array([centre[0] * width - 0.5, centre[1] * height - 0.5])
        return replace(
            head, scale=scale, translation=place - scale * self._middle(head)[:2] * [1, -1], size=(height, width)
        )

    def _middle(self, head: Head) -> np.ndarray:
        """(3,) The middle of the mean face as the head is turned: between brows and chin, temple and temple, nose tip
        and ears. About it a head turns in its place."""
        mean = self.model.mean
        return head.rotation @ (mean.min(axis=0) + mean.max(axis=0)) / 2

    def turned(
        self, head: Head, *, yaw: float = 0.0, pitch: float = 0.0, roll: float = 0.0, head_size: float = 1.0
    ) -> Head:
        """The head turned further by so many degrees (signs as in `from_numbers`) and `head_size` times as
        large, about the middle of its face, which stays where it is in the picture."""
        angles = np.array(head.angles) + (yaw, pitch, roll)
        rotation, scale = rotation_from_euler(*angles), head_size * head.scale
        there = replace(head, rotation=rotation, scale=scale)
        moved = head.scale * self._middle(head) - scale * self._middle(there)
        return replace(there, translation=head.translation + moved[:2] * [1, -1])

    def expression(self, expression: Mapping[str, float] | np.ndarray | None) -> np.ndarray:
        """{name: weight} of the model's expression_names, or coefficients (E,) → coefficients (E,), float32.

        Raises InputError for a name that the model does not know."""
        coefficients = np.zeros(self.model.num_expression, dtype=np.float32)
        if isinstance(expression, Mapping):
            names = self.model.expression_names
            for name, weight in expression.items():
                if name not in names:
                    hint = did_you_mean(name, names, f"it knows {', '.join(names) or 'none'}.")
                    raise InputError(f"The head model has no expression {name!r}; {hint}")
                coefficients[names.index(name)] = weight
        elif expression is not None:
            coefficients[:] = expression
        return coefficients

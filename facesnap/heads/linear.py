"""A linear 3D head model of the 72 landmarks:  X(α, δ) = M + B_id α + B_exp δ."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors.numpy import load_file, save_file

from facesnap import landmarks
from facesnap.heads.model import CONFIG_NAME, WEIGHTS_NAME, Head, HeadModel
from facesnap.heads.regressor import ShapeRegressor

if TYPE_CHECKING:
    from facesnap.faces import Face

# Beside a regressed shape: the landmarks' noise in eye distances, and expressions as free as their spread says, since
# they are no longer taken for the shape. A fit that measures its own noise believes landmarks too much then: measured
# on rendered people whom no part has met, 0.78 of the error of copied landmarks against 0.67.
REGRESSED_NOISE, REGRESSED_EXPRESSION_NOISE = 0.04, 1.0


@dataclass(frozen=True, eq=False)
class LinearHeadModel(HeadModel):
    """A linear head: mean (72, 3), identity_basis (I, 72, 3), expression_basis (E, 72, 3), in any unit. What the
    other fields mean stands in `HeadModel`.

    regressor: reads the shape from the embedding of the recogniser that it was made with, so it belongs into a
    checkpoint with that recogniser.
    """

    mean: np.ndarray
    identity_basis: np.ndarray
    expression_basis: np.ndarray
    identity_std: np.ndarray
    expression_std: np.ndarray
    name: str = "head"
    expression_names: tuple[str, ...] = ()
    nonnegative_expression: bool = False
    distance: float = math.inf
    regressor: ShapeRegressor | None = None

    # ------------------------------------------------------------------ where models come from

    @classmethod
    def from_samples(
        cls,
        neutral: np.ndarray,
        expressions: np.ndarray,
        *,
        num_identity: int,
        num_expression: int | None = None,
        expression_weights: np.ndarray | None = None,
        expression_std: np.ndarray | float = 1.0,
        expression_names: Sequence[str] = (),
        nonnegative_expression: bool = False,
        distance: float = math.inf,
        name: str = "head",
    ) -> "LinearHeadModel":
        """Neutral heads (N, 72, 3) and expression offsets (K, 72, 3) → a model.

        Identity: the first num_identity principal components, scaled so that a coefficient has standard
        deviation 1. The heads keep their place and size, because how these go with shape is worth knowing.
        Expression: the offsets themselves (blendshapes, of the given standard deviation); or, of offsets seen
        on many faces, with num_expression the principal components about zero, since no offset is the neutral
        face; or with expression_weights (K, E), where it is known how much of E named expressions is in each,
        the offset that goes with each of these (least squares).
        """
        mean = neutral.mean(axis=0)
        identity_basis = _principal_components(neutral - mean, num_identity)
        if num_expression is not None:
            expressions = _principal_components(expressions, num_expression)
        if expression_weights is not None:
            flat = np.linalg.lstsq(expression_weights, expressions.reshape(len(expressions), -1), rcond=None)[0]
            expressions = flat.reshape(-1, landmarks.NUM, 3)
            expression_std = np.sqrt((expression_weights**2).mean(axis=0))
        return cls(
            mean=mean.astype(np.float32),
            identity_basis=identity_basis.astype(np.float32),
            expression_basis=np.asarray(expressions, dtype=np.float32),
            identity_std=np.ones(num_identity, dtype=np.float32),
            expression_std=np.broadcast_to(np.float32(expression_std), len(expressions)).copy(),
            name=name,
            expression_names=tuple(expression_names),
            nonnegative_expression=nonnegative_expression,
            distance=distance,
        )

    @classmethod
    def from_points68(
        cls,
        mean: np.ndarray,
        identity_basis: np.ndarray,
        expression_basis: np.ndarray,
        identity_std: np.ndarray,
        expression_std: np.ndarray,
        **config,
    ) -> "LinearHeadModel":
        """A model that knows the iBUG-68 points only: (68, 3), (I, 68, 3), (E, 68, 3) → the 72."""
        return cls(
            mean=landmarks.from_68(mean),
            identity_basis=landmarks.from_68(identity_basis),
            expression_basis=landmarks.from_68(expression_basis),
            identity_std=identity_std,
            expression_std=expression_std,
            **config,
        )

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "LinearHeadModel":
        """Reads what save_pretrained wrote."""
        config = json.loads((Path(folder) / CONFIG_NAME).read_text())
        weights = load_file(Path(folder) / WEIGHTS_NAME)
        own = {name: weights.pop(name) for name in list(weights) if name.startswith("regressor.")}
        return cls(
            **weights,
            regressor=ShapeRegressor(**{k.removeprefix("regressor."): v for k, v in own.items()}) if own else None,
            name=config["name"],
            expression_names=tuple(config["expression_names"]),
            nonnegative_expression=config["nonnegative_expression"],
            distance=config["distance"] or math.inf,
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes config.json and model.safetensors."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        config = {
            "_class_name": type(self).__name__,
            "name": self.name,
            "expression_names": list(self.expression_names),
            "nonnegative_expression": self.nonnegative_expression,
            "distance": self.distance if math.isfinite(self.distance) else None,  # JSON has no infinity
        }
        (Path(folder) / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n")
        names = ("mean", "identity_basis", "expression_basis", "identity_std", "expression_std")
        weights = {name: getattr(self, name) for name in names}
        if self.regressor is not None:
            weights |= {f"regressor.{name}": value for name, value in vars(self.regressor).items()}
        save_file({n: np.ascontiguousarray(w) for n, w in weights.items()}, Path(folder) / WEIGHTS_NAME)

    def reconstruct(self, faces: "Sequence[Face]") -> list[Head]:
        if self.regressor is None:
            return super().reconstruct(faces)
        return self.fit(
            [face.landmarks for face in faces],
            [face.size for face in faces],
            identity_prior=self.regressor(np.stack([face.embedding for face in faces])),
            noise=REGRESSED_NOISE,
            expression_noise=REGRESSED_EXPRESSION_NOISE,
        )

    # ------------------------------------------------------------------ from coefficients to points

    def points(self, identity: np.ndarray, expression: np.ndarray) -> np.ndarray:
        """Coefficients (I,), (E,) → the 72 points (72, 3) in the model's frame."""
        return (
            self.mean
            + np.tensordot(identity, self.identity_basis, 1)
            + np.tensordot(expression, self.expression_basis, 1)
        )

    def tangent(self, identity: np.ndarray, expression: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The model itself: it is its own tangent everywhere."""
        return self.mean, self.identity_basis, self.expression_basis


def _principal_components(samples: np.ndarray, count: int) -> np.ndarray:
    """Centred samples (N, 72, 3) → the first components (count, 72, 3), each one standard deviation long."""
    _, singular, vt = np.linalg.svd(samples.reshape(len(samples), -1), full_matrices=False)
    components = vt[:count] * singular[:count, None] / np.sqrt(len(samples))
    return components.reshape(count, *samples.shape[1:])

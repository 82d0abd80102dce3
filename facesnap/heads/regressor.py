"""The shape of a head read from a recogniser's embedding.

Landmarks of one photo say little of a head's shape once their noise is near the differences between people. An
embedding was trained to tell people apart whatever their pose, so it knows more: what MICA (Zielonka et al.,
ECCV 2022) learns with a deep net, the mini does linearly. The fit takes the regressed shape for its prior.
"""

from dataclasses import dataclass

import numpy as np

RIDGE = 1.0  # in units of unit embeddings; 0.3 to 3 score the same
FOLDS = 5


@dataclass(frozen=True, eq=False)
class ShapeRegressor:
    """identity (I,) ≈ weight (I, D) · embedding/‖embedding‖ + bias (I,), with errors of covariance (I, I)."""

    weight: np.ndarray
    bias: np.ndarray
    covariance: np.ndarray

    @classmethod
    def fit(cls, embeddings: np.ndarray, identities: np.ndarray, person: np.ndarray) -> "ShapeRegressor":
        """Ridge regression from N pictures: embeddings (N, D), identities (N, I), person (N,).

        The people must be unknown to the recogniser, whose embeddings of those it was trained on say more than
        it will ever say of others. The covariance is that of people left out of the regression.
        """
        x = _unit(embeddings)
        left = np.empty_like(identities, dtype=np.float64)
        for k in range(FOLDS):
            out = person % FOLDS == k
            weight, bias = _ridge(x[~out], identities[~out])
            left[out] = identities[out] - x[out] @ weight.T - bias
        weight, bias = _ridge(x, identities)
        covariance = left.T @ left / len(left)
        return cls(*(a.astype(np.float32) for a in (weight, bias, covariance)))

    def __call__(self, embeddings: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Embeddings (K, D) of one person → mean (I,) and precision (I, I) of the shape.

        Several are averaged; their errors are mostly the same, so they count as one.
        """
        mean = _unit(embeddings).mean(axis=0) @ self.weight.T + self.bias
        return mean.astype(np.float64), np.linalg.inv(self.covariance.astype(np.float64))


def _unit(embeddings: np.ndarray) -> np.ndarray:
    return embeddings / np.linalg.norm(embeddings, axis=-1, keepdims=True)


def _ridge(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    centre, middle = x.mean(axis=0), y.mean(axis=0)
    weight = np.linalg.solve(
        (x - centre).T @ (x - centre) + RIDGE * np.eye(x.shape[1]), (x - centre).T @ (y - middle)
    ).T
    return weight, middle - weight @ centre

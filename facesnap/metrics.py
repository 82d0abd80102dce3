"""The measures, as pure functions of numpy arrays.

What the paper calls FaceSim is here *identity retention*: the cosine between generated face and reference
on a scale whose ends are measured, strangers at 0 and the true picture of that person at 1, so that a
recogniser that is lenient (or poor) does not flatter the model. A face that was not found is the caller's
to enter as a cosine of 0, a missed rank and a landmark error of 1 eye distance: see facesnap.evaluation.protocol.
"""

from collections.abc import Callable, Sequence

import cv2
import numpy as np

MISSED_LANDMARK_ERROR = 1.0  # eye distances; what a portrait without a face scores


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosines of all rows of a (N, D) with all rows of b (M, D): (N, M). A row of zeros (no face) has
    cosine 0."""

    def unit(x: np.ndarray) -> np.ndarray:
        length = np.linalg.norm(x, axis=-1, keepdims=True)
        return np.divide(x, length, out=np.zeros_like(x), where=length > 0)

    return unit(np.asarray(a, np.float64)) @ unit(np.asarray(b, np.float64)).T


def retention(generated: np.ndarray, ceiling: np.ndarray, strangers: float) -> float:
    """Mean cosine to the reference, scaled so that `strangers` is 0 and the mean of `ceiling` is 1.

    generated, ceiling: (N,) cosines of the generated and of the true picture with the reference. A ratio of
    means: the mean of ratios would be ruled by the few true pictures that the recogniser itself fails on.
    """
    return float((np.mean(generated) - strangers) / (np.mean(ceiling) - strangers))


def copy_paste(generated: np.ndarray, truth: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Whether portraits are nearer to the reference than to the true picture, (N,) in [-1, 1], of rows (N, D).

    (angle to the truth - angle to the reference) / angle between these two: 1 for a copy of the reference, -1 for the
    true picture, 0 in between (Xu et al. 2025, "WithAnyone"). Where truth and reference are the same: 0.
    """

    def angle(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        cosine = np.divide((a * b).sum(1), lengths, out=np.zeros(len(a)), where=lengths > 0)
        return np.arccos(np.clip(cosine, -1, 1))

    if not generated.shape == truth.shape == reference.shape:
        return np.zeros(len(generated))
    generated, truth, reference = (np.asarray(x, np.float64) for x in (generated, truth, reference))
    whole = angle(truth, reference)
    part = angle(generated, truth) - angle(generated, reference)
    return np.divide(part, whole, out=np.zeros(len(whole)), where=whole > 1e-6)


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's, of (N,) and (N,); 0 where one of them never changes."""
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])


def rank1(similarity: np.ndarray, own: np.ndarray, found: np.ndarray) -> float:
    """Share of the N probes whose own gallery entry beats every other one.

    similarity: (N, G); own: (N,) gallery index of each probe's person; found: (N,) bool, False is a miss.
    A tie is a miss too: otherwise a constant embedding would have rank one everywhere.
    """
    rows = np.arange(len(own))
    others = similarity.copy()
    others[rows, own] = -np.inf
    return float(np.mean((similarity[rows, own] > others.max(axis=1)) & found))


def same_and_different(embeddings: np.ndarray, people: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cosines of all unordered pairs: those of one person, and those of two."""
    first, second = np.triu_indices(len(people), k=1)
    pairs = cosines(embeddings, embeddings)[first, second]
    same = people[first] == people[second]
    return pairs[same], pairs[~same]


def tar_at_far(same: np.ndarray, different: np.ndarray, far: float = 1e-3) -> float:
    """Share of same-person pairs accepted at the lowest threshold that accepts at most `far` of the others.

    A pair is accepted when its cosine is *above* the threshold, so ties with the threshold stay outside.
    """
    allowed = int(np.floor(far * len(different)))
    threshold = np.sort(different)[::-1][allowed]
    return float(np.mean(same > threshold))


def landmark_error(points: np.ndarray, wanted: np.ndarray, eye_distance: float) -> float:
    """Mean distance of corresponding points (K, 2), in eye distances.

    eye_distance: pixels between the outer eye corners of the *frontal* head at that scale
    (`frontal_eye_distance`): in the picture itself the distance shrinks as the head turns, and the error
    would grow for nothing.
    """
    return float(np.linalg.norm(points - wanted, axis=-1).mean() / eye_distance)


def frontal_eye_distance(points3d: np.ndarray, scale: float) -> float:
    """Outer corners 36 to 48 of a head (72, 3) in model units, in pixels at `scale` pixels a unit."""
    return float(np.linalg.norm(points3d[48] - points3d[36]) * scale)


def orthographic_scale(points3d: np.ndarray, points2d: np.ndarray) -> float:
    """Pixels a model unit of the scaled-orthographic camera that best maps points (K, 3) on (K, 2).

    Least squares for a 2x3 matrix, whose singular values are the scale: their mean is taken. With points so
    few and a head so nearly flat the depth column is badly conditioned, so it carries a small ridge.
    """
    x = points3d - points3d.mean(axis=0)
    y = points2d - points2d.mean(axis=0)
    ridge = 1e-3 * np.trace(x.T @ x) / 3
    camera = np.linalg.solve(x.T @ x + ridge * np.eye(3), x.T @ y)
    return float(np.linalg.svd(camera, compute_uv=False).mean())


def sharpness(picture: np.ndarray, box: np.ndarray) -> float:
    """Standard deviation of the Laplacian (Pech-Pacheco et al. 2000) of the grey values of RGB uint8 (H, W, 3) inside
    a detector's box (4,); grows with noise and halos, too."""
    left, top, right, bottom = np.clip(np.round(box).astype(int), 0, None)
    inside = picture[top:bottom, left:right]
    if inside.size == 0:
        return 0.0
    return float(cv2.Laplacian(cv2.cvtColor(inside, cv2.COLOR_RGB2GRAY), cv2.CV_64F).std())


def balanced_accuracy(predicted: Sequence, wanted: Sequence) -> tuple[float, float]:
    """(macro recall, chance-corrected macro recall) over the classes that occur in `wanted`.

    Macro: every class counts the same, however rare. Chance-corrected: (recall - 1/K) / (1 - 1/K) for the K
    classes, so that guessing scores 0 whatever K is; it is not cut off below.
    """
    predicted_, wanted_ = np.asarray(predicted), np.asarray(wanted)
    classes = np.unique(wanted_)
    if len(classes) < 2:
        raise ValueError(f"one class only ({classes.tolist()}): chance cannot be told from skill; take more samples")
    recall = float(np.mean([np.mean(predicted_[wanted_ == c] == c) for c in classes]))
    chance = 1 / len(classes)
    return recall, (recall - chance) / (1 - chance)


def linear_probe(features: np.ndarray, labels: Sequence, held: np.ndarray, ridge: float = 10.0) -> dict[str, float]:
    """Balanced accuracy on the `held` rows (N,) bool of a linear classifier fitted to the others, beside chance.

    Ridge regression to one-hot labels from the standardised features (N, D), in its dual form: samples are
    fewer than features. Classes that miss on either side are left out of the figure.
    """
    x = (features - features[~held].mean(0)) / (features[~held].std(0) + 1e-6)
    named = np.asarray(labels)
    classes = np.intersect1d(named[~held], named[held])
    target = (named[~held, None] == classes).astype(float)
    target = (target - target.mean(0)) / (target.std(0) + 1e-6)
    gram = x[~held] @ x.T
    weights = np.linalg.solve(gram[:, ~held] + ridge * x.shape[1] * np.eye(len(target)), target)
    known = np.isin(named[held], classes)
    said = classes[(gram[:, held].T @ weights).argmax(1)]
    return {
        "balanced_accuracy": balanced_accuracy(said[known], named[held][known])[0],
        "chance": 1 / len(classes),
    }


def attribute_accuracy(predicted: Sequence[dict], wanted: Sequence[dict]) -> dict:
    """Text accuracy: the mean over attributes of the chance-corrected macro recall.

    predicted, wanted: a dict of attribute name -> value for each picture; a picture whose `wanted` lacks an
    attribute does not count for it, and an attribute of which only one value was asked for is left out.
    Returns {"score", "recall", "attributes": {name: {"score", "recall", "pictures"}}}.
    """
    attributes = {}
    for name in sorted({name for row in wanted for name in row}):
        pairs = [(p.get(name), w[name]) for p, w in zip(predicted, wanted, strict=True) if name in w]
        if len({value for _, value in pairs}) < 2:
            continue
        # None stands for "no face, no guess": it is wrong for every class. As text, since arrays sort their
        # values.
        recall, score = balanced_accuracy([str(p) for p, _ in pairs], [str(w) for _, w in pairs])
        attributes[name] = {"score": score, "recall": recall, "pictures": len(pairs)}
    return {
        "score": float(np.mean([a["score"] for a in attributes.values()])),
        "recall": float(np.mean([a["recall"] for a in attributes.values()])),
        "attributes": attributes,
    }


def interval(
    statistic: Callable[[np.ndarray], float], groups: np.ndarray, *, draws: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """95 % bootstrap interval of `statistic(row indices)`, drawing whole groups (people) and not rows:
    the portraits of one person rise and fall together."""
    rng = np.random.default_rng(seed)
    members = [np.flatnonzero(groups == g) for g in np.unique(groups)]
    values = []
    for _ in range(draws):
        chosen = rng.integers(len(members), size=len(members))
        values.append(statistic(np.concatenate([members[i] for i in chosen])))
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)

"""From answers about pairs to an order: the Bradley-Terry model, with intervals over judges."""

from collections.abc import Sequence

import numpy as np

ITERATIONS, CLOSE = 2000, 1e-9


def strengths(wins: np.ndarray) -> np.ndarray:
    """wins (M, M), how often each row was preferred to each column, → strengths (M,), whose mean is 0.

    The chance that i is preferred to j is 1 / (1 + exp(s_j - s_i)) (Bradley and Terry 1952). "No difference" is to be
    entered as half a win for each. Every pair gets one more such answer: whoever won or lost all would else be
    infinitely strong or weak. Fitted by Hunter's (2004) minorisation-maximisation.
    """
    seen = np.asarray(wins, float) + 0.5 * (1 - np.eye(len(wins)))
    met, won = seen + seen.T, seen.sum(1)
    power = np.ones(len(wins))
    for _ in range(ITERATIONS):
        before = power
        power = won / (met / (power[:, None] + power[None])).sum(1)
        power = power / np.exp(np.log(power).mean())
        if np.abs(np.log(power / before)).max() < CLOSE:
            break
    return np.log(power)


def ranked(each: Sequence[np.ndarray], *, draws: int = 1000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The wins (M, M) of each judge → strengths (M,) and their 95 % intervals (M, 2), a bootstrap over judges.

    One judge has no interval: its two ends are the strength itself.
    """
    found = strengths(np.sum(each, axis=0))
    if len(each) < 2:
        return found, np.column_stack([found, found])
    rng = np.random.default_rng(seed)
    drawn = [strengths(np.sum([each[k] for k in rng.integers(len(each), size=len(each))], 0)) for _ in range(draws)]
    return found, np.quantile(drawn, [0.025, 0.975], axis=0).T

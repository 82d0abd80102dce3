"""Which of many faces are the same picture, and which the same person."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components


def unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors (..., D) at length 1."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def near_duplicates(hashes: np.ndarray, embeddings: np.ndarray, bits: int, cosine: float) -> np.ndarray:
    """(N,) numbers of groups of like pictures: hashes (N,) uint64 that differ in at most `bits` bits, and embeddings
    (N, D) of at least this cosine.

    Hashes that differ in so few bits agree in one of `bits` + 1 stretches: only those are compared.
    """
    pairs = []
    edges = np.linspace(0, 64, bits + 2).astype(int)
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        stretch = (hashes >> np.uint64(low)) & np.uint64((1 << int(high - low)) - 1)
        order = np.argsort(stretch, kind="stable")
        _, starts = np.unique(stretch[order], return_index=True)
        for rows in np.split(order, starts[1:]):
            for k in range(1, len(rows)):
                near = rows[:k][np.bitwise_count(hashes[rows[:k]] ^ hashes[rows[k]]) <= bits]
                like = near[(embeddings[near].astype(np.float32) @ embeddings[rows[k]].astype(np.float32)) >= cosine]
                pairs.append(np.stack([np.full(len(like), rows[k]), like]))
    return _groups(pairs, len(hashes))


def same_people(embeddings: np.ndarray, cosine: float, device: str = "cpu", block: int = 4096) -> np.ndarray:
    """(N,) numbers of groups of unit embeddings (N, D): chains of pairs of at least this cosine, less the members
    that are farther than that from their group's mean."""
    import torch

    whole = torch.from_numpy(embeddings.astype(np.float32)).to(device)
    pairs = []
    for start in range(0, len(whole), block):
        near = (whole[start : start + block] @ whole[: start + block].T >= cosine).nonzero().cpu().numpy().T
        pairs.append(near + np.array([[start], [0]]))
    groups = _groups(pairs, len(whole))
    means = np.zeros((groups.max(initial=-1) + 1, embeddings.shape[1]), np.float32)
    np.add.at(means, groups, embeddings.astype(np.float32))
    alone = (unit(means)[groups] * embeddings).sum(axis=1) < cosine
    return np.unique(np.where(alone, len(means) + np.arange(len(groups)), groups), return_inverse=True)[1]


def _groups(pairs: Iterable[np.ndarray], count: int) -> np.ndarray:
    a, b = np.concatenate([np.zeros((2, 0), int), *pairs], axis=1)
    return connected_components(coo_matrix((np.ones(len(a), bool), (a, b)), shape=(count, count)), directed=False)[1]


def identities_of(samples: Sequence[dict[str, Any]], labels: dict[str, str] | None, groups: np.ndarray) -> np.ndarray:
    """(N,) identities, numbered from 0 in the order of their first sample.

    A label belongs to the largest face of its photo; the others, and photos without a label, stand for themselves.
    With `labels` None the `groups` (N,) are taken, but nobody is twice in one photo: the second stands for itself.
    """
    numbers: dict[Any, int] = {}
    seen: set[tuple[Any, str]] = set()
    out = []
    for i, sample in enumerate(samples):
        source, face = sample["source"], sample["face"]
        name: Any = groups[i] if labels is None else labels.get(source) if face == 0 else None
        if name is None or (name, source) in seen:
            name = (source, face)
        seen.add((name, source))
        out.append(numbers.setdefault(name, len(numbers)))
    return np.array(out, int)

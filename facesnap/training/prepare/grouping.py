"""Which of many faces are the same picture, and which the same person. Neighbours are found by faiss."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import faiss
import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

EXACT = 200_000  # up to so many embeddings each is compared with all; above, with those of the nearest cells
PROBES = 64  # cells; a pair that lies in no common one is missed, but chains close over it


def unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors (..., D) at length 1."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def near_duplicates(
    hashes: np.ndarray, embeddings: np.ndarray, bits: int, cosine: float, block: int = 65_536
) -> np.ndarray:
    """(N,) numbers of groups of like pictures: hashes (N,) uint64 that differ in at most `bits` bits, and embeddings
    (N, D) of at least this cosine.

    Exact: of `bits` // 2 + 1 stretches of a hash, hashes this near differ in one of them by one bit at most, and
    those are the hashes that faiss compares (Norouzi et al. 2014, multi-index hashing).
    """
    tables = bits // 2 + 1
    index = faiss.IndexBinaryMultiHash(64, tables, min(32, 64 // tables))
    index.nflip = 1
    codes = np.ascontiguousarray(hashes.astype("<u8")).view(np.uint8).reshape(-1, 8)
    index.add(codes)
    pairs = []
    for a, b in _neighbours(index, codes, bits + 1, block):
        like = np.einsum("ij,ij->i", embeddings[a].astype(np.float32), embeddings[b].astype(np.float32)) >= cosine
        pairs.append(np.stack([a[like], b[like]]))
    return _groups(pairs, len(hashes))


def same_people(embeddings: np.ndarray, cosine: float, *, block: int = 8192, exact: int = EXACT) -> np.ndarray:
    """(N,) numbers of groups of unit embeddings (N, D): chains of pairs of at least this cosine, less the members
    that are farther than that from their group's mean."""
    count, width = embeddings.shape
    # Above `exact` an inverted file of half-precision vectors, with faiss's rule of 4 √N cells.
    kind = "Flat" if count <= exact else f"IVF{round(4 * math.sqrt(count))},SQfp16"
    index: Any = faiss.index_factory(width, kind, faiss.METRIC_INNER_PRODUCT)
    if not index.is_trained:
        index.train(_singles(embeddings[np.random.default_rng(0).permutation(count)[: 40 * index.nlist]]))
        index.nprobe = min(PROBES, index.nlist)
    for start in range(0, count, block):
        index.add(_singles(embeddings[start : start + block]))
    just_below = float(np.nextafter(np.float32(cosine), np.float32(-2)))  # faiss takes what is above
    groups = _groups([np.stack(pair) for pair in _neighbours(index, embeddings, just_below, block)], count)
    means = np.zeros((groups.max(initial=-1) + 1, width), np.float32)
    np.add.at(means, groups, _singles(embeddings))
    alone = (unit(means)[groups] * embeddings).sum(axis=1) < cosine
    return np.unique(np.where(alone, len(means) + np.arange(len(groups)), groups), return_inverse=True)[1]


def _neighbours(index: Any, vectors: np.ndarray, radius: float, block: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of unlike rows, some at a time, that an index which holds all `vectors` finds within `radius`."""
    for start in range(0, len(vectors), block):
        some = vectors[start : start + block]
        limits, _, b = index.range_search(some if some.dtype == np.uint8 else _singles(some), radius)
        a = start + np.repeat(np.arange(len(some)), np.diff(limits.astype(np.int64)))
        yield a[a != b], b[a != b]


def _singles(vectors: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(vectors, np.float32)


def _groups(pairs: Sequence[np.ndarray], count: int) -> np.ndarray:
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

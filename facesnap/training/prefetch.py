"""Batches drawn ahead of their use."""

import itertools
from collections.abc import Callable, Generator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

Batch = dict[str, Any]


class _Draws(Dataset):
    """Batches by their numbers, each a function of the seed, its number and the process."""

    def __init__(self, draw: Callable[[np.random.Generator], Batch], seed: int, own: tuple[int, ...]) -> None:
        self.draw, self.seed, self.own = draw, seed, own

    def __getitem__(self, position: int) -> Batch:
        return self.draw(np.random.default_rng((self.seed, position, *self.own)))


def prefetched(
    draw: Callable[[np.random.Generator], Batch], position: int, seed: int, rank: int = 0, world: int = 1
) -> Generator[Batch]:
    """The batches of one of `world` processes from number `position` on, drawn in a process beside it."""
    draws = _Draws(draw, seed, (rank,) if world > 1 else ())
    generator = torch.Generator()  # its own, so that drawing leaves the global one as it is
    yield from DataLoader(
        draws, batch_size=None, sampler=itertools.count(position), num_workers=1, prefetch_factor=3,
        generator=generator,
    )  # fmt: skip

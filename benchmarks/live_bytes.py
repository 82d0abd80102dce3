"""How much memory all tensors take at a time, on any device, and on none: fake tensors count too."""

import weakref

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """The bytes of all storages that operations made and nobody has let go of, and their peak.

    `known`: tensors that were there before and are not to count (weights, their gradients).
    """

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen = weakref.WeakSet(t.untyped_storage() for t in known)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.count(leaf.untyped_storage())
        return out

    def count(self, storage) -> None:
        if storage in self.seen:
            return
        size = storage.nbytes()
        self.seen.add(storage)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.free, size)

    def free(self, size: int) -> None:
        self.now -= size

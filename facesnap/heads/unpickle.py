"""Pickled model files read without running anything that they name.

FLAME and DECA come as Python pickles, and a pickle is a program: reading one may run any function. Here only the
handful of classes that these files are known to hold is let through; whatever else a file names is refused
before it is looked up. Objects of chumpy, which need not be installed, and scipy's sparse matrices become `Record`s:
these only keep what was stored, and `array` makes an array of the kinds that are known.
"""

import io
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import scipy.sparse

from facesnap.errors import InputError


class Record:
    """What a pickle stored of an object of the class `kind` ("chumpy.ch.Ch"), in `state`."""

    kind = ""
    state: Any = {}

    def __setstate__(self, state: Any) -> None:
        # (None, {...}) is how a class with slots would be stored: neither chumpy nor scipy has any.
        self.state = state if isinstance(state, dict) else {}


class RestrictedUnpickler(pickle.Unpickler):
    """Loads arrays, sparse matrices, chumpy's objects and torch's tensors; anything else is an InputError."""

    def __init__(self, file: BinaryIO, source: Path) -> None:
        super().__init__(file, encoding="latin1")  # the models were pickled by Python 2
        self.source = source

    def find_class(self, module: str, name: str) -> Any:
        chumpy = module == "chumpy" or module.startswith("chumpy.")
        sparse = module.startswith("scipy.sparse.") and name in ("csc_matrix", "csr_matrix")
        if chumpy or sparse:
            return type("Record", (Record,), {"kind": f"{module}.{name}"})
        if (module, name) in _ALLOWED:
            return super().find_class(module, name)
        if module == "torch._utils" and name == "_rebuild_tensor_v2":
            from torch._utils import _rebuild_tensor_v2

            return _rebuild_tensor_v2
        if module == "torch.storage" and name == "_load_from_bytes":
            return self._storage
        raise forbidden(self.source, f"{module}.{name}")

    def _storage(self, data: bytes) -> Any:
        """torch's own `_load_from_bytes` reads the pickle inside the pickle with no restriction at all."""
        return _load_torch(io.BytesIO(data), self.source)


_ALLOWED = {  # as the file spells them: modules that Python 3 renamed have two names
    *((module, name) for module in ("builtins", "__builtin__") for name in ("set", "object")),
    *((module, "_reconstructor") for module in ("copyreg", "copy_reg")),
    ("collections", "OrderedDict"),
    ("_codecs", "encode"),  # how protocol 2 stores bytes
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    *((f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
    *((f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")),
}


def load_pickle(path: str | Path) -> Any:
    """The object in a pickle file, made of builtins, arrays, tensors and Records."""
    path = Path(path)
    with path.open("rb") as file:
        return _read(path, lambda: RestrictedUnpickler(file, path).load())


def load_npy(path: str | Path) -> Any:
    """A .npy file: the array, or the object that is pickled in it."""
    path = Path(path)

    def read(file: BinaryIO) -> Any:
        major, _ = np.lib.format.read_magic(file)
        header = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
        shape, _, dtype = header(file)
        if not dtype.hasobject:
            file.seek(0)
            return np.load(file, allow_pickle=False)
        stored = RestrictedUnpickler(file, path).load()
        return stored[()] if shape == () else stored

    with path.open("rb") as file:
        return _read(path, lambda: read(file))


def load_torch(path: str | Path) -> Any:
    """What torch.save wrote, by torch's own restricted reader."""
    path = Path(path)
    return _read(path, lambda: _load_torch(path, path))


def array(value: Any, source: Path, name: str) -> np.ndarray:
    """An entry of a loaded file as a plain array; InputError where it is something else."""
    return _read(source, lambda: _array(value, source, name))


def _array(value: Any, source: Path, name: str) -> np.ndarray:
    if isinstance(value, Record):
        part, state = value.kind.rsplit(".", 1)[1], value.state
        if value.kind.startswith("scipy.sparse") and {"data", "indices", "indptr"} <= set(state):
            kind: Any = getattr(scipy.sparse, part)
            return kind((state["data"], state["indices"], state["indptr"]), shape=state.get("_shape")).toarray()
        if part == "Ch" and "x" in state:
            return _array(state["x"], source, name)
        if part == "Select" and {"a", "idxs"} <= set(state):
            chosen = _array(state["a"], source, name).ravel()[state["idxs"]]
            return chosen.reshape(state.get("preferred_shape", chosen.shape))
        raise InputError(f"{source.name} holds {name} as a {value.kind}, which is not known here.")
    if hasattr(value, "detach"):  # a tensor
        value = value.detach().cpu().numpy()
    found = np.asarray(value)
    if found.dtype.hasobject:
        raise InputError(f"{source.name} holds {name} as objects where numbers were expected.")
    return found


def forbidden(source: Path, name: str) -> InputError:
    return InputError(
        f"{source.name} was refused: it names {name}, which is none of the things that such a file holds. Nothing "
        "of it was run; get the file from its authors."
    )


def _load_torch(file: Any, source: Path) -> Any:
    import torch

    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        if found is None:
            raise
        raise forbidden(source, found[1]) from error


def _read(path: Path, read: Callable[[], Any]) -> Any:
    """Whatever a damaged file makes its reader raise becomes one sentence."""
    try:
        return read()
    except (InputError, MemoryError):
        raise
    except Exception as error:
        raise InputError(f"{path.name} cannot be read ({type(error).__name__}): get it again.") from error

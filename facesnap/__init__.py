"""FaceSnap: one reference photo, a head pose and a prompt become a portrait of that person.

The names below are the package's public face. They are imported on first use (PEP 562), so that
`import facesnap` costs nothing and, say, drawing landmarks does not load torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "InputError": "errors",
    "FaceSnapPipeline": "pipeline",
    "FacialAttributeMixer": "mixer",
    "FFRNet": "ffrnet",
    "LandmarkPredictor": "predictor",
    "FaceAnalyser": "faces",
    "Face": "faces",
    "Head": "heads",
    "LinearHeadModel": "heads",
}

__all__ = [
    "Face",
    "FaceAnalyser",
    "FaceSnapPipeline",
    "FacialAttributeMixer",
    "FFRNet",
    "Head",
    "InputError",
    "LandmarkPredictor",
    "LinearHeadModel",
    "__version__",
]

if TYPE_CHECKING:
    from facesnap.errors import InputError
    from facesnap.faces import Face, FaceAnalyser
    from facesnap.ffrnet import FFRNet
    from facesnap.heads import Head, LinearHeadModel
    from facesnap.mixer import FacialAttributeMixer
    from facesnap.pipeline import FaceSnapPipeline
    from facesnap.predictor import LandmarkPredictor


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)

"""A second look at finished portraits, for pages that strangers can reach: SDXL has no safety checker of its own.

The mini needs none, its world holds nothing that one would catch.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from facesnap.errors import InputError

MODEL = "Falconsai/nsfw_image_detection"
MOST = 0.5  # of the score of UNSAFE
UNSAFE = "nsfw"
HELD_BACK = "The safety checker held this portrait back: try other words or another seed."


def is_public() -> bool:
    """Whether strangers reach this page: on a Space, through a shared link or a proxy (which GRADIO_ROOT_PATH tells
    of), or where the server listens beyond this machine."""
    server = os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1")
    shared = os.environ.get("GRADIO_SHARE", "").lower() == "true"
    proxied = bool({"SPACE_ID", "GRADIO_ROOT_PATH"} & os.environ.keys())
    return proxied or shared or server not in ("127.0.0.1", "localhost", "::1")


def checker(*, is_mini: bool) -> Callable[[Image.Image], None]:
    """What to ask about every portrait. InputError, before anything is served, where a checker is due and cannot be
    loaded. FACESNAP_SAFETY is "on", "off", or a folder with another classifier that has a label "nsfw"."""
    wish = os.environ.get("FACESNAP_SAFETY", "")
    if wish == "off" or (not wish and (is_mini or not is_public())):
        return lambda picture: None
    return load(MODEL if wish in ("", "on") else wish)


def load(model: str | Path) -> Callable[[Image.Image], None]:
    """The checker of a model folder or Hub id, on the CPU. Raises InputError for a picture that it holds back."""
    from transformers import pipeline

    try:
        classify: Any = pipeline(
            "image-classification", model=str(model), device=-1, model_kwargs={"use_safetensors": True}
        )
        known = {label.lower() for label in classify.model.config.id2label.values()}
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"The safety checker {model} cannot be loaded ({type(error).__name__}); without it nothing is served in "
            'public. Fetch it, or set FACESNAP_SAFETY to "off" if nobody but you reaches this page.'
        ) from error
    if UNSAFE not in known:
        raise InputError(f"The safety checker {model} has no label {UNSAFE!r}: give a classifier that has one.")

    def allowed(picture: Image.Image) -> None:
        scores = {row["label"].lower(): row["score"] for row in classify(picture.convert("RGB"), top_k=None)}
        if not scores[UNSAFE] < MOST:  # a score that is no number holds it back, too
            raise InputError(HELD_BACK)

    return allowed

"""Serves the page: `python app.py`, or a Space that names this file. The page itself is `facesnap.web`."""

try:  # on ZeroGPU it must come before torch; elsewhere it does nothing
    import spaces
except ImportError:
    spaces = None

import argparse
import ctypes
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns of torchvision, which nothing here needs

from facesnap.errors import InputError  # noqa: E402
from facesnap.web import safety, server  # noqa: E402
from facesnap.web.denoise import gpu_seconds  # noqa: E402

MINI = Path(__file__).parent / "assets" / "mini"


def load(model: str, lora: str | None = None) -> Any:
    """The checkpoint where it will run, in the memory mode that FACESNAP_MEMORY names or that fits.

    Who serves a model by its name wants its files, so they are fetched unasked.
    """
    from facesnap import checkpoints

    base = os.environ.get("FACESNAP_BASE") or None
    pipeline = checkpoints.load(model, base=base, lora=lora or os.environ.get("FACESNAP_LORA") or None, yes=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def is_mini(model: str) -> bool:
    """Whether a name or a folder, however it is written, is the mini that ships."""
    return model == "mini" or (Path(model).exists() and Path(model).samefile(MINI))


def one_heap() -> None:
    """Two heaps on Linux: glibc gives each new thread its own, and what a portrait's thread leaves in it stays."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-8, 2)  # M_ARENA_MAX


def main(arguments: list[str] | None = None) -> None:
    """Serves the checkpoint that FACESNAP_MODEL names (a folder or a Hub id), else the mini."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--lora", help="a LoRA for the base model: a folder, a file or a Hub id")
    given = parser.parse_args(arguments)
    one_heap()
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    model = os.environ.get("FACESNAP_MODEL") or str(MINI)
    try:
        pipeline = load(model, given.lora)
        allowed = safety.checker(is_mini=is_mini(model))
    except InputError as error:
        sys.exit(f"{error}\nThe environment variable FACESNAP_MODEL names the checkpoint to serve.")
    # Ended by its host as by Ctrl-C: the visitors' files are then deleted on the way out.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    on_gpu = spaces.GPU(duration=gpu_seconds) if spaces else (lambda generator: generator)
    server.launch(server.build(pipeline, allowed=allowed, on_gpu=on_gpu))


if __name__ == "__main__":
    main()

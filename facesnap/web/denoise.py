"""The denoising of one picture as a generator, which a host with borrowed GPUs may move into a process of its own.

Closing it, which is all that happens when Stop is pressed or a tab is closed, raises inside the denoising loop at its
next step.
"""

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from facesnap.errors import InputError
from facesnap.web.words import sentence


@dataclass(frozen=True)
class Step:
    """`done` of `of` denoising steps of picture `number` are made; numbers count from 0."""

    done: int
    of: int
    number: int = 0


class Stopped(Exception):
    """Raised inside the denoising loop when nobody waits for the portrait any more."""


def denoiser(pipeline: Any) -> Callable[[Any, dict[str, Any]], Iterator[Any]]:
    """The generator that holds the GPU: yields a Step after every denoising step, then a `FaceSnapOutput`, or an
    InputError that says why there is none.

    The pipeline runs in a thread of its own while the steps are read here, because a callback cannot yield. Errors are
    yielded as well, as sentences: of what is raised in a process of its own, `spaces` hands on no more than the type.
    """

    def denoise(preview: Any, arguments: dict[str, Any]) -> Iterator[Any]:
        events: queue.Queue[Any] = queue.Queue()
        stop = threading.Event()

        def on_step_end(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            if stop.is_set():
                raise Stopped
            events.put(Step(step + 1, pipe.num_timesteps))
            return tensors

        def work() -> None:
            try:
                given = dict(arguments)
                events.put(
                    pipeline(
                        given.pop("prompt"),
                        reference=preview.reference_faces,
                        preview=preview,
                        score=False,
                        callback_on_step_end=on_step_end,
                        **given,
                    )
                )
            except BaseException as error:  # whatever it is, the reader below must not wait for ever
                events.put(error)

        worker = threading.Thread(target=work, name="portrait", daemon=True)
        worker.start()
        try:
            while isinstance(event := events.get(), Step):
                yield event
            yield InputError(sentence(event)) if isinstance(event, BaseException) else event
        finally:
            stop.set()
            worker.join()

    return denoise


def gpu_seconds(preview: Any, arguments: dict[str, Any]) -> int:
    """How long denoising may hold a GPU, for hosts that lend one by the second: what an H200 slice or an A10G needs
    for SDXL at 1024², scaled by steps and area, and some for its start and the decoder."""
    height, width = preview.drawing.shape[:2]
    return round(6 + arguments["num_inference_steps"] * 0.8 * max(1.0, height * width / 1024**2))

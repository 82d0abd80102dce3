"""From what a visitor sends to what the pipeline makes. Knows nothing of Gradio.

A portrait is made in a thread of its own while the caller reads its steps from a generator. So closing the
generator, which is all that Gradio does when Stop is pressed or a tab is closed, can end the work: the thread
sees the flag at its next step and raises inside the denoising loop.
"""

import logging
import queue
import secrets
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from facesnap.images import InputError, open_image, save_png
from facesnap.templates import TEMPLATES
from facesnap.templates import get as get_template

log = logging.getLogger(__name__)

OWN_POSE, PHOTO_POSE = "as in the photo", "another photo"
POSES = (OWN_POSE, *(template.name for template in TEMPLATES), PHOTO_POSE)
MAX_PROMPT = 1000
MAX_SEED = 2**31 - 1
LIMITS: dict[str, tuple[float, float]] = {
    "steps": (1, 50),
    "guidance": (1, 10),
    "identity_strength": (0, 2),
    "landmark_strength": (0, 2),
    "seed": (-1, MAX_SEED),
}
NO_CONSENT = "Please tick the box first: it says that the people in the photos agree."
NO_REFERENCE = "There is no photo yet: add one of the person to portray."
NO_POSE_PHOTO = "There is no photo of a pose yet: add one, or choose another pose."
# Cosines of a recogniser that took no part in making the portrait. Strangers score about 0.
LIKENESS = (
    (0.55, "a close likeness"),
    (0.35, "a clear likeness"),
    (0.2, "some likeness"),
    (-1, "a faint likeness"),
)


@dataclass(frozen=True)
class Order:
    """All that one portrait depends on. Photos are paths of uploads; seed −1 asks for a new one."""

    reference: str | None
    prompt: str
    consent: bool
    pose: str
    negative_prompt: str
    steps: int
    guidance: float
    identity_strength: float
    landmark_strength: float
    seed: int
    pose_photo: str | None

    def check(self) -> None:
        """Raises InputError. Runs with every portrait, as a browser's own checks can be walked around."""
        if not self.consent:
            raise InputError(NO_CONSENT)
        if self.reference is None:
            raise InputError(NO_REFERENCE)
        for name in ("prompt", "negative_prompt"):
            if (length := len(getattr(self, name))) > MAX_PROMPT:
                words = name.replace("_", " ")
                raise InputError(f"The {words} has {length} characters; the most are {MAX_PROMPT}.")
        for name, (low, high) in LIMITS.items():
            if not low <= (value := getattr(self, name)) <= high:
                words = name.replace("_", " ")
                raise InputError(f"The {words} is {value}; choose between {low} and {high}.")


@dataclass(frozen=True)
class Step:
    """`done` of `of` denoising steps are made."""

    done: int
    of: int


@dataclass(frozen=True)
class Portrait:
    """A finished portrait: a marked PNG file, and a JSON report of what went in and came out."""

    path: str
    report: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Look:
    """A preview and the pictures it was made of: the photo and, where there is one, the pose photo."""

    result: Any
    photo: np.ndarray
    pose_photo: np.ndarray | None


class Stopped(Exception):
    """Raised inside the denoising loop when nobody waits for the portrait any more."""


class Studio:
    """A `FaceSnapPipeline` as a page uses it: one portrait at a time, previews at any time."""

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline
        self._turn = threading.Lock()

    def preview(self, reference: str | None, pose: str, pose_photo: str | None) -> Look:
        """How the photos are read, and the landmarks a portrait would follow; InputError as a sentence."""
        photo, driver = self._read(reference, pose, pose_photo)
        result = self.pipeline.preview(photo, driver)
        return Look(result, photo, driver if isinstance(driver, np.ndarray) else None)

    def make(self, order: Order) -> Iterator[Step | Portrait]:
        """Yields a Step after every denoising step, then the Portrait; its file lives until the next `next`.

        Raises InputError as a sentence. Closing the generator ends the work within one step.
        """
        order.check()
        reference, pose = self._read(order.reference, order.pose, order.pose_photo)
        events: queue.Queue[Any] = queue.Queue()
        stop = threading.Event()

        def on_step_end(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            if stop.is_set():
                raise Stopped
            events.put(Step(step + 1, order.steps))
            return tensors

        def work() -> None:
            try:
                with self._turn:
                    if stop.is_set():
                        return
                    started = time.perf_counter()
                    output = self.pipeline(
                        order.prompt,
                        reference=reference,
                        pose=pose,
                        negative_prompt=order.negative_prompt or None,
                        num_inference_steps=order.steps,
                        guidance_scale=order.guidance,
                        identity_scale=order.identity_strength,
                        landmark_scale=order.landmark_strength,
                        seed=secrets.randbelow(MAX_SEED) if order.seed < 0 else order.seed,
                        callback_on_step_end=on_step_end,
                    )
                    events.put((output, time.perf_counter() - started))
            except BaseException as error:  # whatever it is, the reader below must not wait for ever
                events.put(error)

        worker = threading.Thread(target=work, name="portrait", daemon=True)
        worker.start()
        try:
            while isinstance(event := events.get(), Step):
                yield event
            if isinstance(event, BaseException):
                raise event
            output, seconds = event
            report = self._report(order, output, seconds)
            with tempfile.TemporaryDirectory(prefix="facesnap-") as folder:
                path = Path(folder) / f"facesnap-{output.seed}.png"
                save_png(np.asarray(output.images[0]), path, info=_notes(report))
                yield Portrait(str(path), report)
        finally:
            stop.set()
            worker.join()

    @staticmethod
    def _read(reference: str | None, pose: str, pose_photo: str | None) -> tuple[np.ndarray, np.ndarray | str | None]:
        """The pictures. `pose` is compared with known names, so it can never be taken for a path."""
        if reference is None:
            raise InputError(NO_REFERENCE)
        photo = open_image(reference)
        if pose == OWN_POSE:
            return photo, None
        if pose != PHOTO_POSE:
            return photo, get_template(pose).name
        if pose_photo is None:
            raise InputError(NO_POSE_PHOTO)
        return photo, open_image(pose_photo)

    @staticmethod
    def _report(order: Order, output: Any, seconds: float) -> dict[str, Any]:
        score = output.identity_scores[0] if output.identity_scores else None
        return {
            "model": output.model,
            "seed": output.seed,
            "identity_score": None if score is None else round(float(score), 3),
            "likeness": likeness(score),
            "notes": list(output.notes),
            "seconds": round(seconds, 2),
            "prompt": order.prompt,
            "negative_prompt": order.negative_prompt,
            "pose": order.pose,
            "steps": output.steps,
            "guidance": output.guidance,
            "identity_strength": order.identity_strength,
            "landmark_strength": order.landmark_strength,
            "scheduler": output.scheduler,
            "size": list(output.size),
            "face_box": np.round(output.face.box, 1).tolist(),
            "faces_in_photo": output.face.count,
            "landmarks": np.round(output.landmarks, 2).tolist(),
        }


def likeness(score: float | None) -> str:
    """A word for an identity score; None stands for a portrait in which no face was found."""
    if score is None:
        return "no face was found in the portrait"
    return next(word for least, word in LIKENESS if score >= least)


def sentence(error: Exception) -> str:
    """What a visitor may read of an error. All else goes to the log, under a number the visitor can quote."""
    if isinstance(error, InputError):
        return str(error)
    number = secrets.token_hex(3)
    log.error("error %s", number, exc_info=error)
    return f"Something went wrong on this side (number {number} in the log). Please try again."


def _notes(report: dict[str, Any]) -> dict[str, str]:
    """What is written into the PNG: enough to make the picture again, nothing about the visitor."""
    kept = ("model", "prompt", "negative_prompt", "pose", "seed", "steps", "guidance", "scheduler")
    return {"Software": "FaceSnap", **{key: str(report[key]) for key in kept}}

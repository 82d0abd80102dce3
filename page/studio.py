"""From what a visitor asks for to what the pipeline makes. Knows nothing of Gradio.

Faces are read in the process that serves the page; only denoising runs in the function that a host with
borrowed GPUs may move into a process of its own. That function is a generator: closing it, which is all that
happens when Stop is pressed or a tab is closed, raises inside the denoising loop at its next step.
"""

import logging
import queue
import secrets
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from facesnap import shaded
from facesnap.errors import InputError
from facesnap.faces import Face
from facesnap.images import open_image, save_png
from facesnap.landmarks import from_68
from page.order import MAX_SEED, OWN_POSE, OWN_SCHEDULER, PHOTO_POSE, Order, Sitting

log = logging.getLogger(__name__)

MOST_WAITING = 12
# Cosines of a recogniser that took no part in making the portrait. Measured with the mini's, on 120 held-out people:
# two true photos of one person all reach 0.6; of two of strangers 0.01 % do, 0.5 % reach 0.45 and 4 % reach 0.3.
LIKENESS = (
    (0.6, "a clear likeness"),
    (0.45, "a likeness"),
    (0.3, "some likeness"),
    (-1, "no clear likeness"),
)
MARK, MARK_METHOD = "FaceSnap", "dwtDctSvd"  # the invisible watermark's text, and how `invisible-watermark` writes it


@dataclass(frozen=True, eq=False)
class Reading:
    """A photo as it was read: its face, and the part around it, RGB uint8 of at most 384², with the 72
    landmarks (72, 2) in that part's pixels. The photo itself is not kept, unless the head model reads pictures."""

    face: Face
    around: np.ndarray
    points: np.ndarray


@dataclass(frozen=True, eq=False)
class Look:
    """A preview, and how the photos it was made of were read."""

    result: Any
    references: tuple[Reading, ...]
    driver: Reading | None
    head: np.ndarray | None = None  # the reconstructed head, shaded, RGB uint8; where PyTorch3D is installed


@dataclass(frozen=True)
class Waiting:
    """`ahead` other pictures are made before this one."""

    ahead: int


@dataclass(frozen=True)
class Step:
    """`done` of `of` denoising steps of picture `number` are made; numbers count from 0."""

    done: int
    of: int
    number: int = 0


@dataclass(frozen=True)
class Portrait:
    """A finished portrait, a marked PNG file, and a JSON report of all that came out so far."""

    path: str
    report: dict[str, Any]


class Stopped(Exception):
    """Raised inside the denoising loop when nobody waits for the portrait any more."""


class Turnstile:
    """One at a time, first come, first served. Who makes several pictures goes to the end of the line after
    each, so that a second visitor waits for one picture and not for all four."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._line: deque[object] = deque()
        self._moved = threading.Condition()

    @contextmanager
    def turn(self, *, again: bool = False) -> Iterator[Callable[[float], int]]:
        """A place in the line. What it gives says, after waiting at most so many seconds for a change, how
        many stand ahead; at 0 it is one's turn, until the block ends. InputError where the line is full."""
        ticket = object()
        with self._moved:
            if not again and len(self._line) > self.most:
                raise InputError(f"The queue is full, {self.most} visitors are waiting: please try again in a minute.")
            self._line.append(ticket)
        try:
            yield partial(self._ahead, ticket)
        finally:
            with self._moved:
                self._line.remove(ticket)
                self._moved.notify_all()

    def _ahead(self, ticket: object, patience: float) -> int:
        with self._moved:
            if ahead := self._line.index(ticket):
                self._moved.wait(patience)
                ahead = self._line.index(ticket)
            return ahead


class Studio:
    """A `FaceSnapPipeline` as a page uses it: one portrait at a time, previews at any time.

    on_gpu: wraps the denoising generator, as `spaces.GPU(duration=...)` does; it is called with the preview and the
    pipeline's arguments, all picklable. allowed: raises InputError for a picture that must not be given out.
    most_waiting: orders in line, beside the one that is made; who comes later is told to come back.
    """

    def __init__(
        self,
        pipeline: Any,
        *,
        on_gpu: Callable[[Any], Any] = lambda generator: generator,
        allowed: Callable[[Image.Image], None] = lambda picture: None,
        most_waiting: int = MOST_WAITING,
    ) -> None:
        self.pipeline = pipeline
        self.turnstile = Turnstile(most_waiting)
        self._denoise = on_gpu(denoiser(pipeline))
        self._allowed = allowed
        # ONNX Runtime keeps the memory of as many analyses as ever ran at once, and they are short.
        self._reading = threading.Lock()

    def read(self, path: str, role: str) -> Reading:
        """The face of an upload; InputError, opened by `role`, where there is none."""
        try:
            photo = open_image(path)
        except InputError as error:
            raise InputError(f"{role}: {error}") from error
        with self._reading:
            face = self.pipeline.analyse(photo, role)
        if not self.pipeline.head_model.reads_pictures:
            face = replace(face, image=None)
        return around(photo, face)

    def look(self, sitting: Sitting, read: Callable[[str, str], Reading] | None = None) -> Look:
        """How the photos are read, and the landmarks a portrait would follow; InputError as a sentence.

        read: stands in for `self.read`, to remember what was read before.
        """
        sitting.check(self.pipeline.settings)
        read = read or self.read
        references = tuple(read(path, role(k, len(sitting.references))) for k, path in enumerate(sitting.references))
        driver: Reading | None = None
        pose: Face | str | None = None
        if sitting.pose == PHOTO_POSE and sitting.pose_photo is not None:
            driver = read(sitting.pose_photo, "The pose photo")
            pose = driver.face
        elif sitting.pose != OWN_POSE:
            pose = sitting.pose
        settings = self.pipeline.settings
        result = self.pipeline.preview(
            [reading.face for reading in references],
            pose,
            (sitting.height or settings.size, sitting.width or settings.size),
            expression=sitting.expression,
            expression_strength=sitting.expression_strength,
            yaw=sitting.yaw,
            pitch=sitting.pitch,
            roll=sitting.roll,
            head_size=sitting.head_size,
        )
        head = None
        if shaded.available() and result.head is not None:
            head = shaded.picture(self.pipeline.head_model, result.head, result.drawing.shape[:2])
        return Look(result, references, driver, head)

    def make(
        self, order: Order, read: Callable[[str, str], Reading] | None = None
    ) -> Generator[Look | Waiting | Step | Portrait, None, None]:
        """Yields the Look, then for each picture Waiting, Steps and the Portrait. The files live until the end.

        Raises InputError as a sentence. Closing the generator ends the work within one step.
        """
        began = time.perf_counter()
        order.check(self.pipeline.settings)
        look = self.look(order, read)
        seconds = {"faces": time.perf_counter() - began, "waiting": 0.0, "making": 0.0}
        yield look
        first = secrets.randbelow(MAX_SEED - order.count) if order.seed < 0 else order.seed
        height, width = look.result.drawing.shape[:2]
        prompt, negative = order.words()
        arguments = order.options(self.pipeline.settings) | {
            "prompt": prompt,
            "negative_prompt": negative,
            "height": height,
            "width": width,
            "identity_scale": order.identity_strength,
            "landmark_scale": order.landmark_strength,
            "scheduler": None if order.scheduler == OWN_SCHEDULER else order.scheduler,
        }
        made: list[dict[str, Any]] = []
        with tempfile.TemporaryDirectory(prefix="facesnap-") as folder:
            for number in range(order.count):
                queued = time.perf_counter()
                with self.turnstile.turn(again=number > 0) as ahead:
                    while before := ahead(0.5):
                        yield Waiting(before)
                    called = time.perf_counter()
                    output: Any = None
                    with closing(self._denoise(look.result, arguments | {"seed": first + number})) as events:
                        for event in events:
                            if isinstance(event, Step):
                                yield Step(event.done, event.of, number)
                            elif isinstance(event, InputError):
                                raise event
                            else:
                                output = event
                    self._allowed(output.images[0])
                    score = None
                    if self.pipeline.scorer is not None:
                        score = self.pipeline.identity_score(output.images[0], look.result.reference_faces)
                ended = time.perf_counter()
                seconds["waiting"] += called - queued
                seconds["making"] += ended - called
                seconds["total"] = ended - began
                made.append(
                    {
                        "seed": first + number,
                        "identity_score": None if score is None else round(float(score), 3),
                        "likeness": likeness(score),
                        "seconds": round(ended - called, 2),
                    }
                )
                report = self._report(order, look, output, made, seconds)
                path = Path(folder) / f"facesnap-{first + number}.png"
                save_png(marked(output.images[0]), path, info=_notes(report))
                yield Portrait(str(path), report)

    @staticmethod
    def keep(png: bytes, report: dict[str, Any]) -> Generator[Portrait, None, None]:
        """A portrait that was made before; its file, too, lives until the generator ends."""
        with tempfile.TemporaryDirectory(prefix="facesnap-") as folder:
            path = Path(folder) / f"facesnap-{report['seed']}.png"
            path.write_bytes(png)
            yield Portrait(str(path), report)

    def _report(
        self, order: Order, look: Look, output: Any, made: list[dict[str, Any]], seconds: dict[str, float]
    ) -> dict[str, Any]:
        settings = self.pipeline.settings
        faces = [reading.face for reading in look.references]
        height, width = output.size
        return {
            "model": output.model,
            "mode": order.preset,
            "seed": made[0]["seed"],
            "identity_score": made[0]["identity_score"],
            "likeness": made[0]["likeness"],
            "pictures": list(made),
            "prompt": order.prompt,
            "style": order.style,
            "negative_prompt": order.negative_prompt,
            "pose": order.pose,
            "expression": order.expression,
            "expression_strength": order.expression_strength,
            "turn": {"yaw": order.yaw, "pitch": order.pitch, "roll": order.roll, "head_size": order.head_size},
            "steps": output.steps,
            "guidance": output.guidance,
            "identity_strength": order.identity_strength,
            "landmark_strength": order.landmark_strength,
            "scheduler": output.scheduler,
            "width": width,
            "height": height,
            "face_box": np.round(faces[0].box, 1).tolist(),
            "face_boxes": [np.round(face.box, 1).tolist() for face in faces],
            "faces_in_photos": [face.count for face in faces],
            "landmarks": np.round(look.result.landmarks, 2).tolist(),
            "notes": list(output.notes),
            "seconds": {name: round(value, 2) for name, value in seconds.items()},
            "device": str(getattr(self.pipeline, "device", "cpu")).partition(":")[0],
            "licence": f"Weights: {settings.about.get('license', 'see the model card')}. The portrait was generated "
            "by a model: say so where you show it, and portray only people who agree.",
        }


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


def role(number: int, count: int) -> str:
    """How errors call one of the reference photos."""
    return "The photo" if count == 1 else f"Photo {number + 1}"


def around(photo: np.ndarray, face: Face, side: int = 384) -> Reading:
    """The part of a photo around its face, at most side² pixels, with the landmarks in its own pixels."""
    x0, y0, x1, y1 = face.box
    half = 0.95 * max(x1 - x0, y1 - y0)
    centre = np.array([(x0 + x1) / 2, (y0 + y1) / 2])
    start = np.maximum(np.floor(centre - half), 0).astype(int)
    end = np.minimum(np.ceil(centre + half), photo.shape[1::-1]).astype(int)
    crop = photo[start[1] : end[1], start[0] : end[0]]
    scale = side / max(crop.shape[:2])
    height, width = (max(1, round(length * scale)) for length in crop.shape[:2])
    picture = np.asarray(Image.fromarray(crop).resize((width, height), Image.Resampling.LANCZOS))
    return Reading(face, picture, (from_68(face.landmarks[:, :2]) - start) * scale)


def likeness(score: float | None) -> str:
    """A word for an identity score; None stands for a portrait in which no face was found."""
    if score is None:
        return "no face was found in the portrait"
    return next(word for least, word in LIKENESS if score >= least)


def sentence(error: BaseException) -> str:
    """What a visitor may read of an error. All else goes to the log, under a number the visitor can quote."""
    if isinstance(error, InputError):
        return str(error)
    number = secrets.token_hex(3)
    log.error("error %s", number, exc_info=error)
    return f"Something went wrong on this side (number {number} in the log). Please try again."


def marked(picture: Image.Image) -> np.ndarray:
    """The picture with an invisible watermark, where the library for it (`invisible-watermark`) is installed and
    the picture is large enough for it; else as it is."""
    pixels = np.asarray(picture.convert("RGB"))
    try:
        from imwatermark import WatermarkEncoder
    except ImportError:
        return pixels
    if min(pixels.shape[:2]) < 256:
        return pixels
    encoder = WatermarkEncoder()
    encoder.set_watermark("bytes", MARK.encode())
    # "dwtDct", the library's first method, is lost in smooth and in strongly coloured pictures; this one is read back.
    encoded = encoder.encode(np.ascontiguousarray(pixels[..., ::-1]), MARK_METHOD)[..., ::-1]
    # The library lets bytes overflow, which shows as speckles: such a pixel stays as it was. The text is repeated all
    # over the picture, so that it is still read.
    speckles = np.abs(encoded.astype(int) - pixels).max(axis=2, keepdims=True) > 40
    return np.ascontiguousarray(np.where(speckles, pixels, encoded))


def _notes(report: dict[str, Any]) -> dict[str, str]:
    """What is written into the PNG: enough to make the picture again, nothing about the visitor."""
    kept = ("model", "mode", "prompt", "style", "negative_prompt", "pose", "steps", "guidance", "scheduler", "licence")
    return {"Software": "FaceSnap", "seed": str(report["pictures"][-1]["seed"])} | {k: str(report[k]) for k in kept}

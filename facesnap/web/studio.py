"""From what a visitor asks for to what the pipeline makes. Knows nothing of Gradio.

Faces are read in the process that serves the page; only denoising runs in the function that a host with
borrowed GPUs may move into a process of its own. That function is a generator: closing it, which is all that
happens when Stop is pressed or a tab is closed, raises inside the denoising loop at its next step.
"""

import hashlib
import json
import secrets
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from facesnap import shaded
from facesnap.errors import InputError
from facesnap.faces import Face
from facesnap.images import open_image, save_png
from facesnap.landmarks import from_68
from facesnap.web.denoise import Step, denoiser
from facesnap.web.line import NOBODY_IN_PARTICULAR, Busy, Line, Visitor
from facesnap.web.request import MAX_SEED, OWN_POSE, OWN_SCHEDULER, PHOTO_POSE, PortraitRequest
from facesnap.web.uploads import GONE
from facesnap.web.words import likeness, unknown_words

MOST_WAITING = 12  # for a portrait, beside the one that is made
EACH_SESSION, EACH_ADDRESS = 2, 6
MOST_READINGS, READINGS_OF_ADDRESS = 64, 8  # of one kind in line; Gradio hands over 40 requests at a time
LARGE = 6e6  # pixels: what has to be decoded whole and is larger is read beside the hard photographs
MOST_FAILURES = 256
KEPT = (  # of a report, in the file of its portrait
    "model", "mode", "prompt", "style", "negative_prompt", "pose", "turn", "expression", "expression_strength",
    "expressions", "steps", "guidance", "identity_strength", "landmark_strength", "scheduler", "licence",
)  # fmt: skip
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
class Portrait:
    """A finished portrait, a marked PNG file, and a JSON report of all that came out so far."""

    path: str
    report: dict[str, Any]


class Studio:
    """A `FaceSnapPipeline` as a page uses it: one portrait at a time, previews at any time.

    on_gpu: wraps the denoising generator, as `spaces.GPU(duration=...)` does; it is called with the preview and the
    pipeline's arguments, all picklable. allowed: raises InputError for a picture that must not be given out.
    most_waiting: requests in line, beside the one that is made; who comes later is told to come back. scratch: the
    folder for files on their way out, the system's by default.
    """

    def __init__(
        self,
        pipeline: Any,
        *,
        on_gpu: Callable[[Any], Any] = lambda generator: generator,
        allowed: Callable[[Image.Image], None] = lambda picture: None,
        most_waiting: int = MOST_WAITING,
        scratch: Path | None = None,
    ) -> None:
        self.pipeline, self.scratch = pipeline, scratch
        self.portraits = Line(most=most_waiting, each_session=EACH_SESSION, each_address=EACH_ADDRESS)
        # ONNX Runtime keeps the memory of as many analyses as ever ran at once, and they are short. A photograph in
        # which no face is seen at once is searched for ten times as long: beside the others and not before them.
        places = {"most": MOST_READINGS, "each_address": READINGS_OF_ADDRESS}
        self.readings, self.hard_readings = Line(**places), Line(**places)
        self._denoise = on_gpu(denoiser(pipeline))
        self._allowed = allowed
        self._failures: OrderedDict[bytes, str] = OrderedDict()  # by the files' digests, so that each costs only once

    def read(self, path: str, role: str, visitor: Visitor = NOBODY_IN_PARTICULAR) -> Reading:
        """The face of an upload; InputError, opened by `role`, where there is none."""
        try:
            digest = hashlib.sha256(Path(path).read_bytes()).digest()
        except OSError:
            raise InputError(f"{role}: {GONE}") from None
        if (known := self._failures.get(digest)) is not None:
            raise InputError(f"{role}: {known}")
        try:
            return self._read(path, visitor)
        except Busy:
            raise
        except InputError as error:
            self._failures[digest] = str(error)
            if len(self._failures) > MOST_FAILURES:
                self._failures.popitem(last=False)
            raise InputError(f"{role}: {error}") from error

    def _read(self, path: str, visitor: Visitor) -> Reading:
        with ExitStack() as place:
            place.enter_context((self.hard_readings if is_large(path) else self.readings).wait(visitor))

            @contextmanager
            def hard() -> Iterator[Callable[[], None]]:
                place.close()
                with self.hard_readings.wait(visitor):
                    yield self._let_others_pass

            photo = open_image(path)
            face = self.pipeline.face_analyser.analyse(photo, hard=hard())
        if not self.pipeline.head_model.reads_pictures:
            face = replace(face, image=None)
        return around(photo, face)

    def _let_others_pass(self) -> None:
        """Between the searches of a hard photograph: other photographs and portraits go first, for a moment."""
        self.readings.quiet(0.5)
        self.portraits.quiet(0.5)

    def look(self, request: PortraitRequest, read: Callable[[str, str], Reading] | None = None) -> Look:
        """How the photos are read, and the landmarks a portrait would follow; InputError as a sentence.

        read: stands in for `self.read`, to remember what was read before.
        """
        request.check(self.pipeline, preview=True)
        read = read or self.read
        paths = request.references
        references = tuple(read(path, role(k, len(paths))) for k, path in enumerate(paths))
        driver: Reading | None = None
        pose: Face | str | None = None
        if request.pose == PHOTO_POSE and request.pose_photo is not None:
            driver = read(request.pose_photo, "The pose photo")
            pose = driver.face
        elif request.pose != OWN_POSE:
            pose = request.pose
        settings = self.pipeline.settings
        result = self.pipeline.preview(
            [reading.face for reading in references],
            pose,
            (request.height or settings.size, request.width or settings.size),
            expression=request.expression,
            expression_strength=request.expression_strength,
            yaw=request.yaw,
            pitch=request.pitch,
            roll=request.roll,
            head_size=request.head_size,
            expressions=request.expressions,
        )
        head = None
        if shaded.available() and result.head is not None:
            head = shaded.picture(self.pipeline.head_model, result.head, result.drawing.shape[:2])
        return Look(result, references, driver, head)

    def make(
        self,
        request: PortraitRequest,
        read: Callable[[str, str], Reading] | None = None,
        visitor: Visitor = NOBODY_IN_PARTICULAR,
    ) -> Generator[Look | Waiting | Step | Portrait, None, None]:
        """Yields the Look, then for each picture Waiting, Steps and the Portrait. The files live until the end.

        Raises InputError as a sentence. Closing the generator ends the work within one step.
        """
        began = time.perf_counter()
        request.check(self.pipeline)
        look = self.look(request, read or (lambda path, role: self.read(path, role, visitor)))
        seconds = {"faces": time.perf_counter() - began, "waiting": 0.0, "making": 0.0}
        yield look
        first = secrets.randbelow(MAX_SEED - request.count) if request.seed < 0 else request.seed
        made: list[dict[str, Any]] = []
        with self._folder() as folder:
            for number in range(request.count):
                queued = time.perf_counter()
                with self.portraits.turn(visitor, again=number > 0) as ahead:
                    while before := ahead(0.5):
                        yield Waiting(before)
                    called = time.perf_counter()
                    arguments = self._arguments(request, look) | {"seed": first + number}
                    output = yield from self._steps(look, arguments, number)
                    score = self._judged(output.images[0], look)
                ended = time.perf_counter()
                seconds["waiting"] += called - queued
                seconds["making"] += ended - called
                seconds["total"] = ended - began
                made.append(
                    {
                        "seed": first + number,
                        "identity_score": None if score is None else round(float(score), 3),
                        "likeness": likeness(score, self.pipeline.settings),
                        "seconds": round(ended - called, 2),
                    }
                )
                report = self._report(request, look, output, made, seconds)
                path = Path(folder) / f"facesnap-{first + number}.png"
                save_png(marked(output.images[0]), path, info=_notes(report))
                yield Portrait(str(path), report)

    def _folder(self) -> tempfile.TemporaryDirectory[str]:
        return tempfile.TemporaryDirectory(prefix="making-", dir=self.scratch)

    def _arguments(self, request: PortraitRequest, look: Look) -> dict[str, Any]:
        """Of the pipeline's call, all but the seed."""
        height, width = look.result.drawing.shape[:2]
        prompt, negative = request.words()
        return request.options(self.pipeline.settings) | {
            "prompt": prompt,
            "negative_prompt": negative,
            "height": height,
            "width": width,
            "identity_scale": request.identity_strength,
            "landmark_scale": request.landmark_strength,
            "scheduler": None if request.scheduler == OWN_SCHEDULER else request.scheduler,
        }

    def _steps(self, look: Look, arguments: dict[str, Any], number: int) -> Generator[Step, None, Any]:
        """The Steps of one picture. → the pipeline's output"""
        output: Any = None
        with closing(self._denoise(look.result, arguments)) as events:
            for event in events:
                if isinstance(event, InputError):
                    raise event
                if isinstance(event, Step):
                    yield Step(event.done, event.of, number)
                else:
                    output = event
        return output

    def _judged(self, picture: Image.Image, look: Look) -> float | None:
        """The identity score, where a scorer and a face are there; InputError for what must not be given out."""
        self._allowed(picture)
        if self.pipeline.scorer is None:
            return None
        return self.pipeline.identity_score(picture, look.result.reference_faces)

    def keep(self, png: bytes, report: dict[str, Any]) -> Generator[Portrait, None, None]:
        """A portrait that was made before; its file, too, lives until the generator ends."""
        with self._folder() as folder:
            path = Path(folder) / f"facesnap-{report['seed']}.png"
            path.write_bytes(png)
            yield Portrait(str(path), report)

    def _report(
        self, request: PortraitRequest, look: Look, output: Any, made: list[dict[str, Any]], seconds: dict[str, float]
    ) -> dict[str, Any]:
        settings = self.pipeline.settings
        faces = [reading.face for reading in look.references]
        height, width = output.size
        return {
            "model": output.model,
            "mode": request.preset,
            "seed": made[0]["seed"],
            "identity_score": made[0]["identity_score"],
            "likeness": made[0]["likeness"],
            "pictures": list(made),
            "prompt": request.prompt,
            "style": request.style,
            "negative_prompt": request.negative_prompt,
            "pose": request.pose,
            "expression": request.expression,
            "expression_strength": request.expression_strength,
            "expressions": dict(request.expressions or {}),
            "turn": {"yaw": request.yaw, "pitch": request.pitch, "roll": request.roll, "head_size": request.head_size},
            "steps": output.steps,
            "guidance": output.guidance,
            "identity_strength": request.identity_strength,
            "landmark_strength": request.landmark_strength,
            "scheduler": output.scheduler,
            "width": width,
            "height": height,
            "face_box": np.round(faces[0].box, 1).tolist(),
            "face_boxes": [np.round(face.box, 1).tolist() for face in faces],
            "faces_in_photos": [face.count for face in faces],
            "landmarks": np.round(look.result.landmarks, 2).tolist(),
            "notes": [*output.notes, *unknown_words(request.prompt, self.pipeline.tokenizer)],
            "seconds": {name: round(value, 2) for name, value in seconds.items()},
            "device": str(getattr(self.pipeline, "device", "cpu")).partition(":")[0],
            "licence": f"Weights: {settings.about.get('license', 'see the model card')}. The portrait was generated "
            "by a model: say so where you show it, and portray only people who agree.",
        }


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


def is_large(path: str) -> bool:
    """Whether a photo takes long to decode; JPEGs are decoded at a smaller scale."""
    try:
        with Image.open(path) as photo:
            return photo.width * photo.height > LARGE and photo.format != "JPEG"
    except Exception:  # what is no picture, or too large a one, is refused from its header
        return False


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
    """What is written into the PNG: what, beside the photos, makes the picture again; nothing about the visitor."""
    kept = {name: report[name] if isinstance(report[name], str) else json.dumps(report[name]) for name in KEPT}
    return {"Software": "FaceSnap", "seed": str(report["pictures"][-1]["seed"])} | kept

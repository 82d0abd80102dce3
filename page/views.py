"""What the page shows, as HTML: the preview's figures, progress, results and errors."""

import base64
import html
import io
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from facesnap.faces import Face
from facesnap.landmarks import draw, from_68
from facesnap.templates import TEMPLATES

from .studio import Look, Step

HEAD = """<header class="fs-head"><h1>FaceSnap</h1>
<p>One photo, a head pose and a sentence in; a portrait of that person out.</p></header>"""
PREVIEW_EMPTY = '<div class="fs-empty"><p>The landmarks show here<br>as soon as there is a photo.</p></div>'
PREVIEW_WAITS = '<div class="fs-empty"><p>Add a photo of the pose<br>to see its landmarks.</p></div>'
STAGE_EMPTY = """<div class="fs-empty fs-stage"><svg viewBox="0 0 120 140" aria-hidden="true">
<path d="M24 52c0 40 16 68 36 68s36-28 36-68" stroke-dasharray="0.1 6.2"/>
<path d="M33 48c5-4 12-5 18-2M69 46c6-3 13-2 18 2" stroke-dasharray="0.1 5"/>
<path d="M36 60c4-4 10-4 14 0c-4 3-10 3-14 0z" stroke-dasharray="0.1 4.4"/>
<path d="M70 60c4-4 10-4 14 0c-4 3-10 3-14 0z" stroke-dasharray="0.1 4.4"/>
<path d="M60 58v22M52 86c4 3 12 3 16 0" stroke-dasharray="0.1 5"/>
<path d="M46 101c8-5 20-5 28 0c-7 8-21 8-28 0z" stroke-dasharray="0.1 4.8"/></svg>
<p>Your portrait appears here.</p></div>"""
FOOT = """<footer class="fs-foot"><p>Every portrait is marked as generated, in its file. Uploads are deleted
within the hour and used for nothing else. Portray only people who agree to it, and say that a picture is
generated when you show it.</p></footer>"""


def heading(title: str, hint: str = "", number: int | None = None) -> str:
    mark = "" if number is None else f"<span>{number}</span>"
    return f'<h2 class="fs-heading">{mark}{title}<small>{hint}</small></h2>'


def preview(look: Look) -> str:
    """The photo as it was read, the pose photo where there is one, and the drawing the model is given."""
    result = look.result
    figures = [_read_figure(look.photo, result.reference_faces[0], "your photo")]
    if look.pose_photo is not None:
        figures.append(_read_figure(look.pose_photo, result.driver_face, "the pose"))
    figures.append(_figure(result.drawing, "what the model sees", "The 72 landmarks asked of the portrait."))
    return f'<div class="fs-figures">{"".join(figures)}</div>{notes(result.notes)}'


def note(text: str, *, error: bool = False) -> str:
    kind, role = ("fs-note fs-error", "alert") if error else ("fs-note", "status")
    return f'<div class="{kind}" role="{role}">{html.escape(text)}</div>'


def notes(texts: tuple[str, ...] | list[str]) -> str:
    return "".join(f'<p class="fs-hint">{html.escape(text)}</p>' for text in texts)


def working(step: Step, started: float) -> str:
    """Progress; `started` is a reading of `time.perf_counter`."""
    if step.done == 0:
        text = "Reading the photo…"
    elif step.done == step.of:
        text = "Finishing…"
    else:
        left = (time.perf_counter() - started) / step.done * (step.of - step.done)
        text = f"Step {step.done} of {step.of} · about {max(1, round(left))} s left"
    return (
        f'<div class="fs-working" role="status"><span>{text}</span>'
        f'<progress max="{step.of}" value="{step.done}" aria-label="Steps done"></progress></div>'
    )


def summary(report: dict[str, Any]) -> str:
    """What stands under a finished portrait."""
    score = report["identity_score"]
    identity = report["likeness"]
    if score is not None:
        meter = f'<meter max="1" value="{max(score, 0)}" aria-label="Identity score"></meter>'
        identity = f"<b>{score:.2f}</b>{meter}{identity}"
    made = f"{report['steps']} steps, {report['seconds']:.1f} s, {html.escape(report['model'])}"
    return (
        '<dl class="fs-summary" role="status">'
        f"<div><dt>Identity</dt><dd>{identity}</dd></div>"
        f"<div><dt>Seed</dt><dd><b>{report['seed']}</b></dd></div>"
        f"<div><dt>Made in</dt><dd>{made}</dd></div></dl>{notes(report['notes'])}"
    )


def pose_tiles(folder: Path) -> str:
    """CSS that puts the thumbnails `<folder>/<template name>.png` on the templates' radio buttons."""
    rules = []
    for number, template in enumerate(TEMPLATES, start=2):  # the first button is the photo's own pose
        thumbnail = np.asarray(Image.open(folder / f"{template.name}.png").convert("RGB"))
        picture = f"background-image: url({_data_uri(thumbnail, 160)})"
        rules.append(f"#pose label:nth-of-type({number})::before {{ {picture} }}")
    return "\n".join(rules)


def overlay(photo: np.ndarray, face: Face, side: int = 384) -> np.ndarray:
    """The part of a photo around its face, at most side² pixels, with its 72 landmarks drawn over it."""
    x0, y0, x1, y1 = face.box
    half = 0.95 * max(x1 - x0, y1 - y0)
    centre = np.array([(x0 + x1) / 2, (y0 + y1) / 2])
    start = np.maximum(np.floor(centre - half), 0).astype(int)
    end = np.minimum(np.ceil(centre + half), photo.shape[1::-1]).astype(int)
    crop = photo[start[1] : end[1], start[0] : end[0]]
    scale = side / max(crop.shape[:2])
    height, width = (max(1, round(length * scale)) for length in crop.shape[:2])
    picture = np.asarray(Image.fromarray(crop).resize((width, height), Image.Resampling.LANCZOS))
    drawing = draw((from_68(face.landmarks[:, :2]) - start) * scale, (height, width))
    cover = drawing.max(axis=2, keepdims=True) / 255
    # The photo a little darker, so that the lines stand out on light skin as well.
    return np.round(0.8 * picture * (1 - cover) + drawing * cover).astype(np.uint8)


def _read_figure(photo: np.ndarray, face: Face, name: str) -> str:
    caption = name if face.count == 1 else f"{name}: the largest of {face.count} faces"
    return _figure(overlay(photo, face), caption, f"{caption}, with its landmarks".capitalize())


def _figure(image: np.ndarray, caption: str, alt: str) -> str:
    return f'<figure><img src="{_data_uri(image)}" alt="{alt}"><figcaption>{caption}</figcaption></figure>'


def _data_uri(image: np.ndarray, side: int = 384) -> str:
    """RGB uint8 → a small WebP inside a URL: previews then leave no files behind."""
    picture = Image.fromarray(image)
    picture.thumbnail((side, side))
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=85)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"

"""What the page shows, as HTML: how photos were read, the preview, progress, results and errors."""

import base64
import html
import io
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from facesnap.landmarks import draw
from facesnap.templates import TEMPLATES
from facesnap.web.request import OWN_POSE
from facesnap.web.studio import Look, Reading

HEAD = """<header class="fs-head"><h1>FaceSnap</h1>
<p>One photo, a head pose and a sentence in; a portrait of that person out.</p></header>"""
SEEN_EMPTY = '<div class="fs-empty"><p>How each photo is read shows here.</p></div>'
TIP = '<p class="fs-hint">Large, well lit faces work best; more photos help.</p>'
FACE = """<svg viewBox="0 0 120 140" aria-hidden="true">
<path d="M24 52c0 40 16 68 36 68s36-28 36-68" stroke-dasharray="0.1 6.2"/>
<path d="M33 48c5-4 12-5 18-2M69 46c6-3 13-2 18 2" stroke-dasharray="0.1 5"/>
<path d="M36 60c4-4 10-4 14 0c-4 3-10 3-14 0z" stroke-dasharray="0.1 4.4"/>
<path d="M70 60c4-4 10-4 14 0c-4 3-10 3-14 0z" stroke-dasharray="0.1 4.4"/>
<path d="M60 58v22M52 86c4 3 12 3 16 0" stroke-dasharray="0.1 5"/>
<path d="M46 101c8-5 20-5 28 0c-7 8-21 8-28 0z" stroke-dasharray="0.1 4.8"/></svg>"""
PREVIEW_EMPTY = '<div class="fs-empty"><p>Add a photo to see the 72 landmarks that the portrait will follow.</p></div>'
PREVIEW_BLOCKED = '<div class="fs-empty"><p>The preview waits until every photo can be read.</p></div>'
PREVIEW_WAITS = '<div class="fs-empty"><p>Add a photo of the pose to see its landmarks.</p></div>'
STAGE_EMPTY = f"""<div class="fs-empty fs-stage">{FACE}<p>Your portrait appears here.</p>
<p class="fs-tip">No photo at hand? Start from an example below.</p></div>"""
STAGE_FAILED = f"""<div class="fs-empty fs-stage fs-failed">{FACE}<p>No portrait was made.</p>
<p class="fs-tip">What to do stands beside the button.</p></div>"""


THUMBNAILS = Path(__file__).with_name("templates")  # <template name>.png
PAPER = "https://arxiv.org/abs/2602.00627"
APACHE = "https://www.apache.org/licenses/LICENSE-2.0"


def foot(licence: str, code: str | None = None) -> str:
    """Tips, what is done with the photos, on what terms the weights are, and links; code: the address of the code."""
    links = [("The paper", PAPER), ("Code", code), ("Licence of the code: Apache-2.0", APACHE)]
    listed = "".join(f'<li><a href="{html.escape(url)}" rel="noopener">{text}</a></li>' for text, url in links if url)
    return f"""<footer class="fs-foot">
<p>Of a pose’s photo only the head’s place, turn and expression are taken, never who it is. A higher guidance gives
the prompt more weight, a higher identity strength the photos.</p>
<p>Every portrait is marked as generated, in its file. Uploads are deleted within the hour and used for nothing else.
Portray only people who agree to it, and say that a picture is generated when you show it.</p>
<p>Licence of the weights: {html.escape(licence)}.</p><ul>{listed}</ul></footer>"""


def more(title: str, text: str) -> str:
    """A line that unfolds."""
    return f'<details class="fs-more"><summary>{html.escape(title)}</summary><p>{html.escape(text)}</p></details>'


def heading(title: str, hint: str = "", number: int | None = None) -> str:
    mark = "" if number is None else f"<span>{number}</span>"
    return f'<h2 class="fs-heading">{mark}{title}<small>{hint}</small></h2>'


# ------------------------------------------------------------------ what goes in


def seen(readings: Sequence[Reading | str]) -> str:
    """How each reference was read: its crop and which face it is, or in a sentence why it cannot be used."""
    tiles = []
    for number, reading in enumerate(readings, start=1):
        name = "the photo" if len(readings) == 1 else f"photo {number}"
        if isinstance(reading, str):
            tiles.append(f'<div class="fs-note fs-error" role="alert">{html.escape(reading)}</div>')
            continue
        count = reading.face.count
        which = "one face" if count == 1 else f"the largest of {count} faces"
        tiles.append(_figure(reading.face.crop, which, f"The face that was cut out of {name}: {which}.", side=224))
    return f'<div class="fs-tiles fs-{len(tiles)}">{"".join(tiles)}</div>'


def preview(look: Look, pose: str) -> str:
    """The reference and the driver with their landmarks, the reconstructed head where it can be shaded, and the drawing
    the model is given, at its aspect."""
    figures = [_figure(overlay(look.references[0]), "your photo", "Your photo with its landmarks.")]
    if look.driver is not None:
        count = look.driver.face.count
        which = "the pose" if count == 1 else f"the pose: largest of {count} faces"
        figures.append(_figure(overlay(look.driver), which, "The pose photo with its landmarks."))
    elif pose != OWN_POSE:
        template = next(template for template in TEMPLATES if template.name == pose)
        picture = _thumbnail(pose)
        figures.append(_figure(picture, template.title.lower(), f"The pose “{template.title}” with its landmarks."))
    height, width = look.result.drawing.shape[:2]
    drawing = _figure(
        look.result.drawing,
        "what the model follows",
        "The 72 landmarks of the portrait: the face of the photo, held as asked.",
        style=f"aspect-ratio: {width} / {height}; {'width' if width >= height else 'height'}: 100%",
    )
    joined = '<span class="fs-op" aria-hidden="true">+</span>'.join(figures)
    arrow = '<span class="fs-op" aria-hidden="true">→</span>'
    if look.head is not None:
        joined += arrow + _figure(look.head, "the head behind it", "The head that was reconstructed, held as asked.")
    return f'<div class="fs-figures">{joined}{arrow}{drawing}</div>{notes(look.result.notes)}'


def overlay(reading: Reading) -> np.ndarray:
    """The part around the face with its landmarks drawn over it."""
    drawing = draw(reading.points, reading.around.shape[:2])
    cover = drawing.max(axis=2, keepdims=True) / 255
    # The photo a little darker, so that the lines stand out on light skin as well.
    return np.round(0.8 * reading.around * (1 - cover) + drawing * cover).astype(np.uint8)


# ------------------------------------------------------------------ what comes out


def note(text: str, *, error: bool = False) -> str:
    kind, role = ("fs-note fs-error", "alert") if error else ("fs-note", "status")
    return f'<div class="{kind}" role="{role}">{html.escape(text)}</div>'


def wanted(what: str, text: str) -> str:
    """What is missing before anything can be made; page.css marks its field, and takes this away when it is there."""
    return f'<div class="fs-note fs-error fs-wants-{what}" role="alert">{html.escape(text)}</div>'


def finished(report: dict[str, Any]) -> str:
    """Said to who only listens; who looks has the portrait."""
    count = len(report["pictures"])
    done = "The portrait is ready." if count == 1 else f"{count} portraits are ready."
    return f'<div class="fs-finished" role="status">{done}</div>'


def notes(texts: Sequence[str]) -> str:
    return "".join(f'<p class="fs-hint">{html.escape(text)}</p>' for text in texts)


def working(text: str, done: int = 0, of: int = 1) -> str:
    """Progress. Only its beginning is announced: a screen reader need not hear every step."""
    live = 'role="status"' if done == 0 else 'role="group"'
    return (
        f'<div class="fs-working" {live}><span>{html.escape(text)}</span>'
        f'<progress max="{of}" value="{done}" aria-label="Steps done"></progress></div>'
    )


def steps(done: int, of: int, number: int, count: int, seconds_a_step: float) -> str:
    """Where the work stands: step `done` of `of` in picture `number` (from 0) of `count`."""
    which = f"Picture {number + 1} of {count}, step" if count > 1 else "Step"
    left = seconds_a_step * (of - done + of * (count - number - 1))
    tail = f"about {max(1, round(left))} s left" if done < of or number + 1 < count else "finishing"
    return working(f"{which} {done} of {of} · {tail}", number * of + done, of * count)


def waiting(ahead: int) -> str:
    pictures = "One picture is" if ahead == 1 else f"{ahead} pictures are"
    return working(f"{pictures} made before yours. You may stay or stop.")


def stage_working(drawing: np.ndarray) -> str:
    """While the first portrait is made: the landmarks it follows."""
    return f'<div class="fs-stage fs-making"><img src="{_data_uri(drawing)}" alt="The landmarks being followed."></div>'


def compared(reference: np.ndarray, portrait: np.ndarray, landmarks: np.ndarray) -> str:
    """The face of the photo and the same part of the portrait side by side. landmarks (72, 2) in its pixels."""
    low, high = landmarks.min(axis=0), landmarks.max(axis=0)
    half, (x, y) = 0.9 * (high - low).max(), (low + high) / 2
    box = (round(x - half), round(y - 1.15 * half), round(x + half), round(y + 0.85 * half))
    cut = np.asarray(Image.fromarray(portrait).crop(box))
    figures = [
        _figure(reference, "your photo", "The face in your photo.", side=288),
        _figure(cut, "the portrait", "The same part of the portrait.", side=288),
    ]
    return (
        '<details class="fs-compare"><summary>Compare with your photo</summary>'
        f'<div class="fs-figures">{"".join(figures)}</div></details>'
    )


def summary(report: dict[str, Any], comparison: str = "") -> str:
    """What stands under the finished portraits: scores and seeds, one line that says what made them, and `compared`."""
    rows = []
    for number, made in enumerate(report["pictures"], start=1):
        score, words = made["identity_score"], html.escape(made["likeness"])
        if score is not None:
            meter = f'<meter max="1" value="{max(score, 0)}" aria-label="Identity score"></meter>'
            words = f"<b>{score:.2f}</b>{meter}{words}"
        seed = f"<span>seed <b>{made['seed']}</b></span>"
        if len(report["pictures"]) == 1:
            rows.append(
                f"<div><dt>Identity</dt><dd>{words}</dd></div><div><dt>Seed</dt><dd><b>{made['seed']}</b></dd></div>"
            )
        else:
            rows.append(f"<div><dt>Picture {number}</dt><dd>{words}{seed}</dd></div>")
    on = {"cpu": "the CPU", "cuda": "a GPU"}.get(report["device"], report["device"])
    made_by = (
        f"{report['model']}, {report['mode']}: {report['steps']} steps, guidance {report['guidance']:g}, "
        f"{report['width']} × {report['height']}, {report['seconds']['making']:.1f} s on {on}"
    )
    return (
        f'<div role="status"><dl class="fs-summary">{"".join(rows)}'
        f"<div><dt>Made by</dt><dd>{html.escape(made_by)}</dd></div></dl>{notes(report['notes'])}</div>{comparison}"
    )


# ------------------------------------------------------------------ pictures in pages


def pose_tiles() -> str:
    """CSS that puts the thumbnails on the templates' radio buttons."""
    rules = []
    for number, template in enumerate(TEMPLATES, start=2):  # the first button is the photo's own pose
        picture = f"background-image: url({_data_uri(_thumbnail(template.name), 160)})"
        rules.append(f"#pose label:nth-of-type({number})::before {{ {picture} }}")
    return "\n".join(rules)


@cache
def _thumbnail(template: str) -> np.ndarray:
    return np.asarray(Image.open(THUMBNAILS / f"{template}.png").convert("RGB"))


def _figure(image: np.ndarray, caption: str, alt: str, *, side: int = 384, style: str = "") -> str:
    styled = f' style="{style}"' if style else ""
    picture = f'<img src="{_data_uri(image, side)}" alt="{html.escape(alt)}"{styled}>'
    return f"<figure><div>{picture}</div><figcaption>{html.escape(caption)}</figcaption></figure>"


def _data_uri(image: np.ndarray, side: int = 384) -> str:
    """RGB uint8 → a small WebP inside a URL: previews then leave no files behind."""
    picture = Image.fromarray(image)
    picture.thumbnail((side, side))
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=85)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"

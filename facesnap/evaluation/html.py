"""The report that people look at: one HTML file, pictures inside, nothing fetched.

Tables, histograms, and of every method a contact sheet sorted by worst, with what was asked beside each picture.
Whoever is given the file is given the pictures: a report of real people's photographs is theirs.
"""

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from facesnap.evaluation.plan import Plan, Row
from facesnap.images import open_image

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; color: #1c1c20 }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto }
td, th { border: 1px solid #d5d5dc; padding: .3rem .6rem; text-align: right }
td:first-child, th:first-child { text-align: left }
.row { display: flex; gap: .6rem; border-top: 1px solid #d5d5dc; padding: .6rem 0; align-items: flex-start }
figure { margin: 0 } figcaption { color: #6e6e76; font-size: 12px; text-align: center }
img { display: block; width: 160px; height: 160px; object-fit: contain; background: #f1f1f4 }
.failed { width: 160px; height: 160px; background: #f6d6d6; font-size: 12px; padding: .5rem; box-sizing: border-box }
.asked { min-width: 16rem } svg { margin: 0 1rem 1rem 0 }
@media (prefers-color-scheme: dark) { body { background: #17171a; color: #e8e8ee } svg text { fill: #e8e8ee } }
"""
THUMBNAIL = 160  # pixels
BARS = 24
SHOWN = ("FaceSim", "CLIP-T", "CLIP-face", "copy-paste", "landmark_error", "pose_error", "sharpness")


def document(title: str, *parts: str) -> str:
    """A whole HTML page."""
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    head += f"<style>{STYLE}</style>"
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>\n'


def page(
    found: dict[str, Any],
    plan: Plan,
    folders: Sequence[Path],
    each: dict[str, dict[str, np.ndarray]],
    looks: dict[str, dict],
    markdown: str,
    *,
    worst: int,
) -> str:
    """The report of `score`: its Markdown's table, then histograms and the sheet of each method."""
    parts = [table(markdown)]
    for folder in folders:
        told, failures = each[folder.name], found["methods"][folder.name]["failures"]
        parts.append(f"<h2>{escape(folder.name)}</h2>")
        parts += [histogram(values, key) for key, values in told.items() if key.startswith(SHOWN)]
        first = next((key for key in told if key.startswith("FaceSim")), "found")
        order = np.argsort(told[first], kind="stable")[:worst]
        parts.append(f"<h3>The {len(order)} worst by {escape(first)}</h3>")
        parts += [_row(plan, plan.rows[i], folder, told, int(i), failures, looks) for i in order]
    return document(f"Evaluation on plan {plan.digest}", *parts)


def table(markdown: str) -> str:
    """Headings, tables and lists of the Markdown that `score` writes, as HTML."""
    parts, rows, items = [], [], []
    for line in [*markdown.splitlines(), ""]:
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
            continue
        if rows:
            head, *body = [row for row in rows if not all(cell.startswith("---") for cell in row)]
            parts.append("<table><tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>")
            parts += ["<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in body]
            parts.append("</table>")
            rows = []
        if line.startswith("- "):
            items.append(f"<li>{escape(line[2:])}</li>")
            continue
        if items:
            parts.append("<ul>" + "".join(items) + "</ul>")
            items = []
        if line.startswith("# "):
            parts.append(f"<h1>{escape(line[2:])}</h1>")
        elif line:
            parts.append(f"<p>{escape(line)}</p>")
    return "".join(parts)


def _row(
    plan: Plan, row: Row, folder: Path, told: dict[str, np.ndarray], number: int, failures: dict, looks: dict
) -> str:
    """reference | driver | what was made | the true picture, and what was asked."""
    cells = [_figure(plan.folder / row.reference, "reference"), _figure(plan.folder / row.driver, row.template)]
    if row.file in failures:
        cells.append(f'<div class="failed">failed: {escape(failures[row.file])}</div>')
    else:
        look = looks[f"{folder.name}/{row.file}"]
        cells.append(_figure(folder / row.file, row.file if look["found"] else f"{row.file}: {look['reason']}"))
    if row.truth:
        cells.append(_figure(plan.folder / row.truth, "true picture"))
    figures = [f"{key} {values[number]:.3g}" for key, values in told.items() if not np.isnan(values[number])]
    asked = f"<b>{escape(row.prompt)}</b><br>person {escape(row.person)}, seed {row.seed}<br>"
    return f'<div class="row">{"".join(cells)}<div class="asked">{asked}{escape(", ".join(figures))}</div></div>'


def _figure(path: Path, words: str) -> str:
    return f'<figure><img src="{embedded(path)}" alt=""><figcaption>{escape(words)}</figcaption></figure>'


def embedded(path: Path, side: int = THUMBNAIL) -> str:
    """A picture as the address of a small JPEG that it is itself."""
    picture = Image.fromarray(open_image(path))
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    picture.save(stream, format="JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()


def histogram(values: np.ndarray, title: str, *, width: int = 300, height: int = 110) -> str:
    """Counts of (N,) values, NaN left out and counted in the title, as an SVG."""
    known = values[~np.isnan(values)]
    if not len(known):
        return ""
    counts, edges = np.histogram(known, bins=BARS)
    step, tallest = width / BARS, counts.max()
    bars = "".join(
        f'<rect x="{k * step:.1f}" y="{20 + (height - 40) * (1 - n / tallest):.1f}" width="{step - 1:.1f}" '
        f'height="{(height - 40) * n / tallest:.1f}" fill="#4c7dc0"/>'
        for k, n in enumerate(counts)
    )
    words = title if len(known) == len(values) else f"{title} (of {len(known)})"
    low, high = f"{edges[0]:.3g}", f"{edges[-1]:.3g}"
    return (
        f'<svg width="{width}" height="{height}" role="img" aria-label="histogram of {escape(words)}">'
        f'<text x="0" y="13" font-size="13">{escape(words)}</text>{bars}'
        f'<text x="0" y="{height - 4}" font-size="12">{low}</text>'
        f'<text x="{width}" y="{height - 4}" font-size="12" text-anchor="end">{high}</text></svg>'
    )


def intervals(rows: Sequence[tuple[str, float, float, float]], title: str, *, width: int = 560) -> str:
    """A dot and its interval for each (name, value, low, high), one below the other, as an SVG."""
    low, high = min(row[2] for row in rows), max(row[3] for row in rows)
    span, left, right, line = (high - low) or 1.0, 150, width - 60, 28

    def x(value: float) -> float:
        return left + (value - low) / span * (right - left)

    height = 40 + line * len(rows)
    parts = [f'<text x="0" y="16" font-size="14">{escape(title)}</text>']
    for k, (name, value, least, most) in enumerate(rows):
        y = 40 + line * k
        parts.append(
            f'<text x="0" y="{y + 4}" font-size="13">{escape(name)}</text>'
            f'<line x1="{x(least):.1f}" x2="{x(most):.1f}" y1="{y}" y2="{y}" stroke="#4c7dc0" stroke-width="2"/>'
            f'<circle cx="{x(value):.1f}" cy="{y}" r="4.5" fill="#4c7dc0"/>'
            f'<text x="{right + 8}" y="{y + 4}" font-size="12">{value:.2f}</text>'
        )
    label = escape(title)
    return f'<svg width="{width}" height="{height}" role="img" aria-label="{label}">{"".join(parts)}</svg>'

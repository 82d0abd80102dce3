"""What surrounds the figures: where they come from, how a killed run goes on, and the sheet that shows them.

A figure without its command, commit, weights and machine cannot be repeated, so every report carries them.
"""

import json
import os
import resource
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from facesnap.errors import InputError
from facesnap.provenance import commit, fingerprint, libraries, machine

# ------------------------------------------------------------------------------------ where it comes from


def provenance(model: str) -> dict:
    """Command, commit, model version, machine and library versions. `model`: the checkpoint folder as it
    was typed."""
    return {
        "command": " ".join(["python -m facesnap.evaluation", *sys.argv[1:]]),
        "commit": commit(),
        "model": {"name": model, "version": fingerprint(Path(model))},
        "machine": machine(),
        "libraries": libraries(),
    }


def peak_memory_gb() -> float:
    """The most memory this process ever held (GB): model, face pack, scorer and renderer together."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e9 if sys.platform == "darwin" else 1e6)  # bytes on macOS, kilobytes on Linux


# -------------------------------------------------------------------------------------------- going on


class Ledger:
    """Results of single pictures, one JSON line each, so that a killed run continues where it stopped.

    The first line holds the settings; a file of other settings is refused rather than mixed in. A line that
    the kill cut short is dropped. `ledger.get(key)` is a former result or None; `ledger.put(key, result)`
    writes at once.
    """

    def __init__(self, path: Path, settings: dict):
        self.path = path
        self.rows: dict[str, dict] = {}
        lines = list(self._read()) if path.exists() else []
        if lines and lines[0] != settings:
            differing = sorted(k for k in {*lines[0], *settings} if lines[0].get(k) != settings.get(k))
            raise InputError(
                f"{path.name} holds results of another run (different: {', '.join(differing)}): "
                "give another --out, or delete it"
            )
        self.rows = {row.pop("key"): row for row in lines[1:]}
        # Written anew, which also removes a line cut short; a kill in between loses nothing, since replace
        # is atomic.
        whole = path.with_suffix(".new")
        rows = [settings, *({"key": k, **row} for k, row in self.rows.items())]
        whole.write_text("".join(json.dumps(row) + "\n" for row in rows))
        os.replace(whole, path)

    def _read(self) -> Iterator[dict]:
        for line in self.path.read_text().splitlines(keepends=True):
            if not line.endswith("\n"):
                return
            yield json.loads(line)

    def get(self, key: str) -> dict | None:
        return self.rows.get(key)

    def put(self, key: str, row: dict) -> dict:
        self.rows[key] = row
        with self.path.open("a") as file:
            file.write(json.dumps({"key": key, **row}) + "\n")
        return row


def rounded(value: object, digits: int = 4) -> object:
    """The same tree of dicts and lists with floats of `digits` decimals."""
    if isinstance(value, dict):
        return {k: rounded(v, digits) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(v, digits) for v in value]
    return round(float(value), digits) if isinstance(value, (float, np.floating)) else value


def write(path: Path, report: dict) -> None:
    path.write_text(json.dumps(rounded(report), indent=1) + "\n")


def write_whole(path: Path, text: str) -> None:
    """The text under that name, whole or not at all."""
    draft = path.with_name(path.name + ".part")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


def table(rows: Sequence[tuple[str, object, str]]) -> str:
    """Lines of name, value and remark, for the terminal."""
    shown = [(n, f"{v:.3f}" if isinstance(v, float) else str(v), remark) for n, v, remark in rows]
    wide, deep = max(len(n) for n, _, _ in shown), max(len(v) for _, v, _ in shown)
    return "\n".join(f"{n:<{wide}}  {v:>{deep}}  {remark}".rstrip() for n, v, remark in shown)


# ------------------------------------------------------------------------------------------- the sheet

INK, PAPER, GREY = (28, 28, 32), (255, 255, 255), (110, 110, 118)


def contact_sheet(
    rows: Sequence[Sequence[np.ndarray]],
    titles: Sequence[str],
    path: Path,
    *,
    captions: Sequence[str] | None = None,
    notes: Sequence[Sequence[str]] | None = None,
    cell: int = 256,
) -> None:
    """Rows of pictures (H, W, 3) under column titles, saved as PNG or JPEG by the ending of `path`.

    captions: one line under each row (the prompt). notes: a short word under each picture, "" for none.
    Pictures are fitted into cells of `cell` pixels and never stretched.
    """
    gap, head = 12, 40
    font, small = ImageFont.load_default(18), ImageFont.load_default(15)
    line = 21
    below = line * ((captions is not None) + (notes is not None)) + 8
    width = gap + len(titles) * (cell + gap)
    sheet = Image.new("RGB", (width, head + len(rows) * (cell + below + gap)), PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        draw.text((gap + column * (cell + gap) + cell / 2, head / 2), title, INK, font, anchor="mm")
    for r, row in enumerate(rows):
        top = head + r * (cell + below + gap)
        for column, picture in enumerate(row):
            left = gap + column * (cell + gap)
            image = Image.fromarray(picture)
            scale = cell / max(image.size)
            image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
            sheet.paste(image, (left + (cell - image.width) // 2, top + (cell - image.height) // 2))
            if notes and notes[r][column]:
                draw.text((left + cell / 2, top + cell + line / 2 + 2), notes[r][column], GREY, small, anchor="mm")
        if captions:
            text = _shortened(captions[r], small, width - 2 * gap)
            middle = top + cell + line * (notes is not None) + line / 2 + 2
            draw.text((width / 2, middle), text, INK, small, anchor="mm")
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, quality=88, optimize=True)  # PNG knows no quality and ignores it


def _shortened(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"

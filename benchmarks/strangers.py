"""500 requests that no page would send, to app.py as it is served: each must get an answer that a person can read.

    python benchmarks/strangers.py --out strangers.json

In turn: files that are no photo of a face, photographs whose EXIF was spoiled, strange values of every parameter, paths
and addresses in the place of a photo. Prints, for each kind, how many were refused in a sentence and how many were
taken (a spoiled byte may leave a picture a picture); whether a visitor is served as before, and what is in memory.
The exit status is 1 where an answer is no sentence, names a folder, or a visitor is no longer served.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import re
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # so that the file runs as it is, installed or not

from calls import FILE, call, sentence_of, uploaded  # noqa: E402
from load import megabytes, serve  # noqa: E402
from test_api_strangers import STRANGE, bad_uploads  # noqa: E402

from facesnap.web.request import PHOTOS, SPECS  # noqa: E402

PERSON = ROOT / "assets/examples/avery.png"
PATHS = (
    *("/etc/passwd", "/proc/self/environ", "/dev/zero", "/tmp", ".", "..", "~", "", "\0", "a" * 5000, "C:\\me.png"),
    *("../../../etc/passwd", "file:///etc/passwd", "http://127.0.0.1:1/", "https://example.org/me.png", "//host/share"),
    *("ftp://x/y", "data:image/png;base64,AAAA", "data:,", "\ud800", "me.png\n", "%2e%2e/%2e%2e", "app.py", "assets"),
)
Request = tuple[str, str, dict[str, Any], bytes | None]  # kind, endpoint, body, upload


def spoiled_exif(rng: random.Random) -> bytes:
    """A photograph whose EXIF block has bytes of chance."""
    picture, exif = Image.open(PERSON).convert("RGB"), Image.Exif()
    exif[274], exif[256], exif[282] = rng.choice([0, 1, 3, 6, 8, 9, 65535]), rng.randrange(65536), 72.0
    for tag in (271, 306, 33432):
        exif[tag] = rng.choice(["words", "9" * 500, "-1/0"])
    block = bytearray(exif.tobytes())
    for _ in range(rng.randrange(40)):  # types and lengths of the tags among them
        block[rng.randrange(10, len(block))] = rng.randrange(256)
    file = io.BytesIO()
    picture.save(file, rng.choice(["JPEG", "WEBP", "PNG"]), exif=bytes(block))
    return file.getvalue()


def requests(good: str, seed: int) -> Iterator[Request]:
    rng, uploads = random.Random(seed), bad_uploads(seed)
    taken = {"reference": good, "consent": True, "steps": 1}
    while True:
        yield "uploads", "preview", {}, next(uploads)
        yield "EXIF", "preview", {}, spoiled_exif(rng)
        name = rng.choice([name for name in SPECS if name != "count"])
        yield "parameters", "generate", taken | {name: rng.choice(STRANGE)}, None
        path = rng.choice(PATHS)
        value = rng.choice([path, {"path": path} | FILE, {"url": path} | FILE, [path], {"path": [path]} | FILE])
        pose = {"pose": "another photo"} if (name := rng.choice(PHOTOS)) == "pose_photo" else {}
        yield "paths", "preview", {"reference": good} | pose | {name: value}, None


def outcome(answer: str) -> str:
    if "event: complete" in answer:
        return "taken"
    said = sentence_of(answer)
    if not re.fullmatch(r"[A-Z“][^\n]{10,400}[.?]", said) or str(ROOT) in said or "/facesnap-" in said:
        raise AssertionError(f"no sentence: {said}")
    return "sentence"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file for the numbers")
    given = parser.parse_args()
    server, url = serve()
    page = SimpleNamespace(url=f"{url}/")
    counts: Counter[tuple[str, str]] = Counter()
    wrong: list[str] = []
    memory = {}
    try:
        good = uploaded(page, str(PERSON))
        served = lambda: "event: complete" in call(page, "generate", {"reference": good, "consent": True})  # noqa: E731
        is_served = {"before": served()}
        asked = requests(good, given.seed)
        for part in range(5):  # memory after each fifth
            fifth = [next(asked) for _ in range(given.requests // 5)]
            with ThreadPoolExecutor(4) as strangers:
                answers = list(strangers.map(lambda request: call(page, *request[1:]), fifth))
            for (kind, _, body, _), answer in zip(fifth, answers, strict=True):
                try:
                    counts[kind, outcome(answer)] += 1
                except AssertionError as error:
                    counts[kind, "wrong"] += 1
                    wrong.append(f"{kind} {str(body)[:200]}: {str(error)[:300]}")
            memory[f"{part + 1}/5"] = round(megabytes(server.pid))
        is_served["after"] = served()
    finally:
        server.terminate()
        server.wait()
    sent = (path for path in Path(good).parents[1].rglob("*") if path.name in ("me.png", "photo"))
    left = [path for path in sent if path.is_file()]
    report = {
        "answers": {f"{kind}: {what}": number for (kind, what), number in sorted(counts.items())},
        "a_visitor_is_served": is_served,
        "memory_mb": memory,
        "files_left_behind": len(left),
        "wrong": wrong[:10],
    }
    print(json.dumps(report, indent=2, ensure_ascii=False))
    if given.out:
        given.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    sys.exit(bool(wrong or left or not all(is_served.values())))


if __name__ == "__main__":
    main()

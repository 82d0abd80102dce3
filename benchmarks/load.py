"""Many visitors at once: 20 clients for 3 minutes against the page, each asking for previews and portraits.

    python benchmarks/load.py --out load.json

Starts `app.py` (or takes `--url` and `--pid` of one that runs). Prints, also as the README's table, and writes how many
requests succeeded, were told that the queue is full, or failed; p50 and p95 of the seconds they took; and the server's
memory after its first portrait and at the end. A client asks for two previews and then a portrait, over and over, with
pauses of up to two seconds, as fast hands might. The exit status is 1 where a request failed for another reason than a
full queue.
"""

import argparse
import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import httpx
import numpy as np
import psutil

ROOT = Path(__file__).resolve().parents[1]
POSES = ("as in the photo", "front", "quarter-left", "quarter-right", "looking-up", "tilted")
FULL = "queue is full"


class Visitor:
    """One client with a photo of its own; keeps (what, outcome, seconds) of every request."""

    def __init__(self, url: str, photo: Path, seed: int) -> None:
        self.http = httpx.Client(base_url=url, timeout=600)
        self.rng = random.Random(seed)
        sent = self.http.post("/gradio_api/upload", files={"files": (photo.name, photo.read_bytes())})
        self.photo = {"path": sent.raise_for_status().json()[0], "meta": {"_type": "gradio.FileData"}}
        self.seen: list[tuple[str, str, float]] = []

    def ask(self, what: str, **arguments: object) -> None:
        began = time.perf_counter()
        body = {"reference": self.photo, "pose": self.rng.choice(POSES), **arguments}
        joined = self.http.post(f"/gradio_api/call/v2/{what}", json=body)
        last = joined.text
        if joined.status_code == 200:
            stream = self.http.get(f"/gradio_api/call/{what}/{joined.json()['event_id']}").text
            last = stream.strip().split("\n\n")[-1]
        outcome = "ok" if "event: complete" in last else "full" if FULL in last.lower() else f"failed: {last[:200]}"
        self.seen.append((what, outcome, time.perf_counter() - began))

    def stay(self, until: float) -> None:
        while time.perf_counter() < until:
            for what in ("preview", "preview", "generate"):
                extra = {"consent": True, "prompt": "wearing a red jacket"} if what == "generate" else {}
                try:
                    self.ask(what, **extra)
                except httpx.HTTPError as error:
                    self.seen.append((what, f"failed: {error!r}", 0.0))
                time.sleep(self.rng.uniform(0, 2))


def serve() -> tuple[subprocess.Popen, str]:
    """app.py on a free port, up and answering."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {"GRADIO_SERVER_PORT": str(port), "GRADIO_SERVER_NAME": "127.0.0.1"}
    server = subprocess.Popen(
        [sys.executable, "app.py"], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    url = f"http://127.0.0.1:{port}"
    while server.poll() is None:
        try:
            httpx.get(url, timeout=5)
            return server, url
        except httpx.HTTPError:
            time.sleep(0.5)
    sys.exit("app.py ended before it answered: start it by hand to see why.")


def megabytes(pid: int) -> float:
    return psutil.Process(pid).memory_info().rss / 2**20


def table(report: dict) -> str:
    """The numbers as the README shows them."""
    rows = [
        f"| {report['clients']} clients, {report['seconds']:g} s | answered | “queue is full” | failed | p50 | p95 |",
        "|---|---|---|---|---|---|",
    ]
    for what in ("preview", "generate"):
        row = report[what]
        rows.append(
            f"| `/{what}` | {row['ok']} | {row['full']} | {row['failed']} | {row['p50_s']} s | {row['p95_s']} s |"
        )
    memory = report["memory_mb"]
    if report["up_after_s"] is not None:
        rows.append(f"\nThe page was up {report['up_after_s']} s after its start.")
    rows.append(
        f"\nMemory {memory['start']} MB after the first portrait, {memory['end']} MB at the end: {memory['ratio']} ×."
    )
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--url", help="a page that runs already; needs --pid")
    parser.add_argument("--pid", type=int, help="its process")
    parser.add_argument("--out", type=Path, help="JSON file for the numbers")
    given = parser.parse_args()
    if (given.url is None) != (given.pid is None):
        parser.error("--url and --pid belong together")
    server = None
    url, pid = given.url, given.pid
    up_after = None
    if url is None:
        begun = time.perf_counter()
        server, url = serve()
        up_after, pid = round(time.perf_counter() - begun, 1), server.pid
    try:
        photos = sorted((ROOT / "assets" / "examples").glob("*.png"))
        visitors = [Visitor(url, photos[k % len(photos)], k) for k in range(given.clients)]
        for what, extra in (("preview", {}), ("generate", {"consent": True, "prompt": ""})):
            visitors[0].ask(what, **extra)
        visitors[0].seen.clear()
        at_start = megabytes(pid)
        until = time.perf_counter() + given.seconds
        threads = [threading.Thread(target=visitor.stay, args=(until,)) for visitor in visitors]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        at_end = megabytes(pid)
    finally:
        if server is not None:
            server.terminate()
            server.wait()

    rows = [row for visitor in visitors for row in visitor.seen]
    report: dict = {"clients": given.clients, "seconds": given.seconds, "up_after_s": up_after}
    for what in ("preview", "generate"):
        outcomes = Counter(outcome.partition(":")[0] for name, outcome, _ in rows if name == what)
        took = [seconds for name, outcome, seconds in rows if name == what and outcome == "ok"]
        p50, p95 = (round(float(q), 2) for q in np.percentile(took, [50, 95])) if took else (None, None)
        report[what] = {"ok": 0, "full": 0, "failed": 0, **outcomes, "p50_s": p50, "p95_s": p95}
    failures = sorted({outcome for _, outcome, _ in rows if outcome.startswith("failed")})
    report["memory_mb"] = {"start": round(at_start), "end": round(at_end), "ratio": round(at_end / at_start, 3)}
    report["failures"] = failures[:10]
    report["load_average"] = [round(value, 1) for value in os.getloadavg()]  # other work on the machine shows here
    print(json.dumps(report, indent=2))
    print(table(report))
    if given.out:
        given.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()

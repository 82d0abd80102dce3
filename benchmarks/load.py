"""Many visitors at once, and visitors beside those who mean ill.

    python benchmarks/load.py --out load.json                     # 20 visitors for 3 minutes
    python benchmarks/load.py --attack all --out attacks.json     # one honest visitor, alone and beside each attack

Starts `app.py` (or takes `--url` and `--pid` of one that runs). Prints as a table, and writes, how many requests
succeeded, were told that there is no place, or failed; p50 and p95 of the seconds they took; and the server's memory
after its first portrait and at the end. A visitor asks for two previews and then a portrait, over and over, with
pauses of up to two seconds, as fast hands might. The attacks, each by `--attackers` clients of addresses of their own:

    unheard    posts for portraits to whose answers nobody listens
    faceless   photographs without a face, each a new one, one after the other
    folders    a folder in the place of a photo, and uploads that must be gone from it all the same

The exit status is 1 where a request failed for another reason than a full queue, or an upload could not be deleted.
"""

import argparse
import io
import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
POSES = ("as in the photo", "front", "quarter-left", "quarter-right", "looking-up", "tilted")
FULL = ("queue is full", "requests in line")
API = "/gradio_api"


class Client:
    """One client with an address of its own, as behind a proxy."""

    def __init__(self, url: str, number: int) -> None:
        forwarded = {"X-Forwarded-For": f"8.8.{number // 250}.{number % 250 + 1}"}
        self.http = httpx.Client(base_url=url, timeout=600, headers=forwarded)
        self.rng = random.Random(number)

    def upload(self, name: str, data: bytes) -> dict[str, Any]:
        sent = self.http.post(f"{API}/upload", files={"files": (name, data)})
        return {"path": sent.raise_for_status().json()[0], "meta": {"_type": "gradio.FileData"}}

    def post(self, what: str, **arguments: object) -> httpx.Response:
        return self.http.post(f"{API}/call/v2/{what}", json=arguments)

    def ask(self, what: str, **arguments: object) -> str:
        """The last event, or the refusal at the door."""
        joined = self.post(what, **arguments)
        if joined.status_code != 200:
            return joined.text
        return self.http.get(f"{API}/call/{what}/{joined.json()['event_id']}").text.strip().split("\n\n")[-1]


class Visitor(Client):
    """Keeps (what, outcome, seconds) of every request."""

    def __init__(self, url: str, photo: Path, number: int) -> None:
        super().__init__(url, number)
        self.photo = self.upload(photo.name, photo.read_bytes())
        self.seen: list[tuple[str, str, float]] = []

    def visit(self, what: str) -> None:
        began = time.perf_counter()
        extra = {"consent": True, "prompt": "wearing a red jacket"} if what == "generate" else {}
        try:
            last = self.ask(what, reference=self.photo, pose=self.rng.choice(POSES), **extra)
        except httpx.HTTPError as error:
            last = repr(error)
        full = any(words in last.lower() for words in FULL)
        outcome = "ok" if "event: complete" in last else "full" if full else f"failed: {last[:200]}"
        self.seen.append((what, outcome, time.perf_counter() - began))

    def stay(self, until: float) -> None:
        while time.perf_counter() < until:
            for what in ("preview", "preview", "generate"):
                self.visit(what)
                time.sleep(self.rng.uniform(0, 2))


# ---------------------------------------------------------------------- who means ill


def unheard(client: Client, photo: bytes, until: float) -> None:
    mine = client.upload("me.png", photo)
    while time.perf_counter() < until:
        for _ in range(17):
            client.post("generate", reference=mine, consent=True, steps=50, count=3)
        time.sleep(1)


def faceless(client: Client, photo: bytes, until: float) -> None:
    while time.perf_counter() < until:
        noise = np.random.default_rng(client.rng.randrange(2**32)).integers(90, 160, (512, 512, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(noise).save(file, "PNG")
        client.ask("preview", reference=client.upload("wall.png", file.getvalue()))


def folders(client: Client, photo: bytes, until: float) -> None:
    mine = client.upload("me.png", photo)
    place = Path(mine["path"])
    while time.perf_counter() < until:
        for path in (place.parent, place.parent.parent, place.parent.parent.parent):
            client.ask("preview", reference=mine | {"path": str(path)})
        time.sleep(0.5)


ATTACKS: dict[str, Callable[[Client, bytes, float], None]] = {
    "unheard": unheard,
    "faceless": faceless,
    "folders": folders,
}


# ---------------------------------------------------------------------- the server


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


def together(*works: Callable[[], None]) -> None:
    threads = [threading.Thread(target=work) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def figures(seen: list[tuple[str, str, float]]) -> dict[str, Any]:
    """For each endpoint: outcomes, and p50 and p95 of what was answered."""
    report: dict[str, Any] = {}
    for what in ("preview", "generate"):
        outcomes = Counter(outcome.partition(":")[0] for name, outcome, _ in seen if name == what)
        took = [seconds for name, outcome, seconds in seen if name == what and outcome == "ok"]
        p50, p95 = (round(float(q), 2) for q in np.percentile(took, [50, 95])) if took else (None, None)
        report[what] = {"ok": 0, "full": 0, "failed": 0, **outcomes, "p50_s": p50, "p95_s": p95}
    return report


def table(report: dict[str, Any]) -> str:
    rows = ["| | answered | no place | failed | p50 | p95 |", "|---|---|---|---|---|---|"]
    for label, scene in report["scenes"].items():
        for what in ("preview", "generate"):
            row = scene[what]
            counts = f"{row['ok']} | {row['full']} | {row['failed']}"
            rows.append(f"| {label}: `/{what}` | {counts} | {row['p50_s']} s | {row['p95_s']} s |")
    memory = report["memory_mb"]
    if report["up_after_s"] is not None:
        rows.append(f"\nThe page was up {report['up_after_s']} s after its start.")
    rows.append(f"\nMemory {memory['start']} MB after the first portrait, {memory['end']} MB at the end.")
    return "\n".join(rows)


def crowd(url: str, photos: list[Path], clients: int, seconds: float) -> list[tuple[str, str, float]]:
    visitors = [Visitor(url, photos[k % len(photos)], k) for k in range(clients)]
    until = time.perf_counter() + seconds
    together(*(lambda visitor=visitor: visitor.stay(until) for visitor in visitors))
    return [row for visitor in visitors for row in visitor.seen]


def besieged(
    url: str, photos: list[Path], attack: str | None, attackers: int, seconds: float
) -> list[tuple[str, str, float]]:
    """One honest visitor who brings a new photo each time, so that it has to be read."""
    visitor = Visitor(url, photos[0], 1000)
    until = time.perf_counter() + seconds

    def stay() -> None:
        while time.perf_counter() < until - seconds / 10:
            for what in ("preview", "preview", "generate"):
                data = photos[0].read_bytes() + visitor.rng.randbytes(8)  # behind the picture: another file
                visitor.photo = visitor.upload("me.png", data)
                visitor.visit(what)
                time.sleep(visitor.rng.uniform(0, 1))

    data = photos[1].read_bytes()
    bad = [Client(url, k) for k in range(attackers if attack else 0)]
    together(stay, *(lambda one=one: ATTACKS[str(attack)](one, data, until) for one in bad))
    return visitor.seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=180, help="of each scene")
    parser.add_argument("--attack", choices=[*ATTACKS, "all"])
    parser.add_argument("--attackers", type=int, default=8)
    parser.add_argument("--url", help="a page that runs already; needs --pid")
    parser.add_argument("--pid", type=int, help="its process")
    parser.add_argument("--out", type=Path, help="JSON file for the numbers")
    given = parser.parse_args()
    if (given.url is None) != (given.pid is None):
        parser.error("--url and --pid belong together")
    server, url, pid, up_after = None, given.url, given.pid, None
    if url is None:
        begun = time.perf_counter()
        server, url = serve()
        up_after, pid = round(time.perf_counter() - begun, 1), server.pid
    photos = sorted((ROOT / "assets" / "examples").glob("*.png"))
    scenes: dict[str, Any] = {}
    failures: set[str] = set()
    try:
        first = Visitor(url, photos[0], 0)
        for what in ("preview", "generate"):
            first.visit(what)
        at_start = megabytes(pid)
        attacks = ["crowd"] if given.attack is None else [None, *(ATTACKS if given.attack == "all" else [given.attack])]
        for attack in attacks:
            if attack == "crowd":
                label, seen = f"{given.clients} visitors", crowd(url, photos, given.clients, given.seconds)
            else:
                label = f"beside {given.attackers} × {attack}" if attack else "alone"
                seen = besieged(url, photos, attack, given.attackers, given.seconds)
            scenes[label] = figures(seen)
            failures |= {outcome for _, outcome, _ in seen if outcome.startswith("failed")}
        at_end = megabytes(pid)
    finally:
        left: list[Path] = []
        if server is not None:
            place = Path(first.photo["path"]).parents[1]
            server.terminate()
            server.wait()
            left = [path for path in place.rglob("*") if path.is_file() and path.name in ("me.png", "wall.png")]
    if left:
        failures.add(f"failed: {len(left)} uploads are left behind")
    report = {
        "seconds": given.seconds,
        "up_after_s": up_after,
        "scenes": scenes,
        "memory_mb": {"start": round(at_start), "end": round(at_end), "ratio": round(at_end / at_start, 3)},
        "failures": sorted(failures)[:10],
        "load_average": [round(value, 1) for value in os.getloadavg()],  # other work on the machine shows here
    }
    print(json.dumps(report, indent=2))
    print(table(report))
    if given.out:
        given.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()

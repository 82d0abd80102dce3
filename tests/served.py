"""The page, served over a tiny FaceSnap with random weights, and what its tests upload to it.

Its "photos" are noise that says who it shows (tiny.py). Fixtures; conftest.py makes them known to all tests.
"""

import json
import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from gradio_client import Client
from PIL import Image
from tiny import faceless, photo

CHROMIUM = Path("/usr/bin/chromium")
MOST_WAITING = 2


class Slow:
    """The pipeline, with a count of its steps, a pause at each, and a gate that holds it there for as long as a test
    needs; `seeds` are those of the pictures in the order in which they were begun."""

    def __init__(self, pipe):
        self.pipe = pipe
        self.gate = threading.Event()
        self.fresh()

    def fresh(self):
        """As a test wants to find it."""
        self.steps, self.seeds, self.pause, self.fails = 0, [], 0.0, False
        self.gate.set()

    def __getattr__(self, name):
        return getattr(self.pipe, name)

    def __call__(self, prompt, *, callback_on_step_end, **arguments):
        def on_step_end(*state):
            self.steps += 1
            self.gate.wait()
            time.sleep(self.pause)
            return callback_on_step_end(*state)

        self.seeds.append(arguments["seed"])
        if self.fails:
            raise RuntimeError("/etc/secret: the server's own text")
        return self.pipe(prompt, callback_on_step_end=on_step_end, **arguments)


def wait_for(happened, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.05)


def idle() -> bool:
    """No portrait is being made: the thread that makes one is gone."""
    return not any(thread.name == "portrait" for thread in threading.enumerate())


@pytest.fixture(scope="session")
def files(tmp_path_factory) -> SimpleNamespace:
    """Uploads, good and bad."""
    folder = tmp_path_factory.mktemp("uploads")

    def keep(name: str, pixels: np.ndarray) -> str:
        Image.fromarray(pixels).save(folder / name)
        return str(folder / name)

    (folder / "words.png").write_text("these are words")
    (folder / "cut.png").write_bytes(Path(keep("whole.png", photo(1))).read_bytes()[:2000])
    Image.new("1", (12000, 12000)).save(folder / "huge.png")
    return SimpleNamespace(
        ann=keep("ann.png", photo(1)),
        ann_too=keep("ann_too.png", photo(1, 1)),
        bob=keep("bob.png", photo(2)),
        group=keep("group.png", photo(1, 99)),
        faceless=keep("faceless.png", faceless()),
        words=str(folder / "words.png"),
        cut=str(folder / "cut.png"),
        huge=str(folder / "huge.png"),
    )


@pytest.fixture(scope="session")
def page(pipe, tmp_path_factory):
    """The page, served; its assets are made here, so that it does not matter which the repository has."""
    from facesnap.web import server

    assets = tmp_path_factory.mktemp("assets")
    (assets / "examples").mkdir()
    Image.fromarray(photo(3)).save(assets / "examples" / "cleo.png")
    row = {"reference": "cleo.png", "pose": "quarter-left", "prompt": "in a red coat", "style": "oil painting"}
    (assets / "examples" / "examples.json").write_text(json.dumps([row]))

    slow = Slow(pipe)
    demo = server.build(slow, most_waiting=MOST_WAITING, assets=assets)
    _, url, _ = server.launch(demo, prevent_thread_lock=True, quiet=True)
    yield SimpleNamespace(url=url, pipe=slow, demo=demo)
    demo.close()


@pytest.fixture
def client(page):
    page.pipe.fresh()
    return Client(page.url, verbose=False)


@pytest.fixture(scope="session")
def browser():
    if not CHROMIUM.exists() and not os.environ.get("CI"):
        pytest.skip("the page is tested in Debian's chromium; apt-get install chromium")
    from playwright.sync_api import sync_playwright

    flags = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync")
    quiet = ("--disable-background-networking", "--disable-component-update")
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=[*flags, *quiet])


@pytest.fixture(scope="session")
def shoot(tmp_path_factory):
    """shoot(tab, name) keeps a screenshot and refuses an empty one."""
    folder = Path(os.environ.get("FACESNAP_SCREENSHOTS") or tmp_path_factory.mktemp("screenshots"))
    folder.mkdir(parents=True, exist_ok=True)

    def shoot(tab, name: str, full_page: bool = True) -> None:
        tab.screenshot(path=folder / f"{name}.png", full_page=full_page, animations="disabled")
        assert np.asarray(Image.open(folder / f"{name}.png").convert("L")).std() > 5

    return shoot


@pytest.fixture
def visit(browser, page):
    """visit() opens the page; afterwards no error may be in the console and no request may have gone out."""
    page.pipe.fresh()
    contexts, faults = [], []

    def visit(width: int = 1280, **options):
        context = browser.new_context(viewport={"width": width, "height": 900}, **options)
        context.set_default_timeout(int(os.environ.get("FACESNAP_PATIENCE", 120_000)))
        contexts.append(context)
        tab = context.new_page()
        tab.on("pageerror", lambda error: faults.append(str(error)))
        tab.on(
            "request",
            lambda r: None if r.url.startswith((page.url, "data:", "blob:")) else faults.append(r.url),
        )
        tab.goto(page.url)
        tab.wait_for_selector("#generate")
        return tab

    yield visit
    page.pipe.gate.set()
    for context in contexts:
        context.close()
    assert faults == []

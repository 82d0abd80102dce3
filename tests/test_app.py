"""The page and its endpoints: by `gradio_client`, as programs call them, and in a real browser, as people do.

All run on a tiny FaceSnap with random weights, whose "photos" are noise that says who it shows; the last test
runs the main job on the mini.
"""

import json
import os
import time
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image
from tiny import faceless, photo

import app
from facesnap.templates import TEMPLATES, thumbnail
from page.studio import LIMITS, POSES, Order, Portrait, Step, Studio, likeness

CHROMIUM = Path("/usr/bin/chromium")
MINI = app.ASSETS / "mini"


class Slow:
    """The pipeline, with a pause at every step and a count of them."""

    def __init__(self, pipe):
        self.pipe, self.settings, self.preview = pipe, pipe.settings, pipe.preview
        self.steps, self.pause, self.fails = 0, 0.0, False

    def __call__(self, prompt, *, callback_on_step_end, **arguments):
        def on_step_end(*state):
            self.steps += 1
            time.sleep(self.pause)
            return callback_on_step_end(*state)

        if self.fails:
            raise RuntimeError("/etc/secret: the server's own text")
        return self.pipe(prompt, callback_on_step_end=on_step_end, **arguments)


@pytest.fixture(scope="module")
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
        bob=keep("bob.png", photo(2)),
        group=keep("group.png", photo(1, 99)),
        faceless=keep("faceless.png", faceless()),
        words=str(folder / "words.png"),
        cut=str(folder / "cut.png"),
        huge=str(folder / "huge.png"),
    )


@pytest.fixture(scope="module")
def page(pipe, files, tmp_path_factory):
    """The page, served; its assets are made here, so that it does not matter which the repository has."""
    assets = tmp_path_factory.mktemp("assets")
    for folder in ("templates", "examples"):
        (assets / folder).mkdir()
    for template in TEMPLATES:
        Image.fromarray(thumbnail(template, pipe.head_model, 64)).save(assets / "templates" / f"{template.name}.png")
    Image.fromarray(photo(3)).save(assets / "examples" / "cleo.png")
    row = {"reference": "cleo.png", "pose": "quarter-left", "prompt": "in a red coat"}
    (assets / "examples" / "examples.json").write_text(json.dumps([row]))

    slow = Slow(pipe)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(app, "ASSETS", assets)
        demo = app.build(slow)
        _, url, _ = app.launch(demo, prevent_thread_lock=True, quiet=True)
    yield SimpleNamespace(url=url, pipe=slow)
    demo.close()


@pytest.fixture
def client(page):
    page.pipe.pause, page.pipe.fails = 0.0, False
    return Client(page.url, verbose=False)


def order(files, **changes) -> dict:
    arguments = {
        "reference": files.ann,
        "prompt": "by the sea",
        "consent": True,
        "api_name": "/generate",
        **changes,
    }
    uploads = ("reference", "pose_photo")
    return {key: handle_file(v) if key in uploads and v else v for key, v in arguments.items()}


# Programs -------------------------------------------------------------------------------------------------


def test_signatures_are_pinned(client):
    api = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    parameters = {
        name: {p["parameter_name"]: p["parameter_default"] for p in endpoint["parameters"]}
        for name, endpoint in api.items()
    }
    assert parameters == {
        "/preview": {"reference": None, "pose": "as in the photo", "pose_photo": None},
        "/generate": {
            "reference": None,
            "prompt": "",
            "consent": False,
            "pose": "as in the photo",
            "negative_prompt": "",
            "steps": 2,
            "guidance": 2.0,
            "identity_strength": 1,
            "landmark_strength": 1,
            "seed": -1,
            "pose_photo": None,
        },
    }
    assert [[r["label"] for r in endpoint["returns"]] for endpoint in api.values()] == [["picture", "report"]] * 2


def test_preview_draws_the_landmarks_and_says_which_face(client, files):
    own, report = client.predict(handle_file(files.ann), "as in the photo", None, api_name="/preview")
    assert np.array(report["landmarks"]).shape == (72, 2)
    assert report["faces_in_photo"] == 1 and report["notes"] == []
    assert list(Image.open(own).size) == report["size"][::-1]

    _, turned = client.predict(handle_file(files.ann), "quarter-left", None, api_name="/preview")
    assert turned["landmarks"] != report["landmarks"]
    _, driven = client.predict(handle_file(files.ann), "another photo", handle_file(files.bob), api_name="/preview")
    assert driven["landmarks"] not in (report["landmarks"], turned["landmarks"])

    _, crowd = client.predict(handle_file(files.group), "as in the photo", None, api_name="/preview")
    assert crowd["faces_in_photo"] == 2 and "2 faces" in crowd["notes"][0]


def test_generate_gives_a_marked_portrait_that_its_seed_repeats(client, files):
    path, report = client.predict(**order(files, seed=7))
    portrait = Image.open(path)
    assert (report["seed"], report["steps"], report["prompt"]) == (7, 2, "by the sea")
    assert report["likeness"] == likeness(report["identity_score"])
    assert portrait.text["seed"] == "7"
    assert "trainedAlgorithmicMedia" in str(portrait.info)

    again, _ = client.predict(**order(files, seed=7))
    other, fresh = client.predict(**order(files))
    assert np.array_equal(portrait, Image.open(again))
    assert fresh["seed"] != 7 and not np.array_equal(portrait, Image.open(other))


def test_generate_reports_every_step(client, files):
    job = client.submit(**order(files, steps=4))
    job.result(timeout=120)
    steps = [report["step"] for _, report in job.outputs() if "step" in report]
    assert steps == sorted(steps) and steps[-1] == 4


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"consent": False}, "tick the box"),
        ({"reference": None}, "There is no photo"),
        ({"pose": "another photo"}, "no photo of a pose"),
        ({"prompt": "x" * 10_000}, "10000 characters"),
        ({"steps": 500}, "steps is 500; choose between 1 and 50"),
        ({"pose": "quarter-lft"}, "quarter-left"),
        ({"seed": -5}, "seed is -5"),
        ({"reference": "faceless"}, "No face"),
        ({"reference": "words"}, "not a picture"),
        ({"reference": "cut"}, "damaged"),
        ({"reference": "huge"}, "12000 × 12000"),
    ],
)
def test_refusals_are_sentences(client, files, changes, words):
    upload = getattr(files, str(changes.get("reference")), None)
    with pytest.raises((AppError, ValueError)) as refusal:
        client.predict(**order(files, **changes | ({"reference": upload} if upload else {})))
    assert words in str(refusal.value)
    assert "/" not in str(refusal.value).replace("JPEG, PNG or WebP", "")


def test_a_pose_is_never_taken_for_a_path(pipe, files):
    with pytest.raises(ValueError, match="There is no pose template"):
        Studio(pipe).preview(files.ann, files.bob, None)


def test_the_servers_own_errors_stay_with_the_server(client, page, files):
    page.pipe.fails = True
    with pytest.raises(AppError, match="Something went wrong") as refusal:
        client.predict(**order(files))
    assert "secret" not in str(refusal.value)


def test_nothing_gets_past_the_queue(page):
    for name in ("generate", "preview"):
        answer = httpx.post(f"{page.url}gradio_api/run/{name}", json={"data": []})
        assert answer.status_code >= 400


def test_a_client_that_leaves_ends_the_work_and_frees_the_queue(client, page, files):
    page.pipe.pause, page.pipe.steps = 0.3, 0
    job = client.submit(**order(files, steps=50))
    wait_for(lambda: page.pipe.steps >= 2)
    job.cancel()
    wait_for(lambda: settled(page.pipe))
    assert page.pipe.steps < 45
    page.pipe.pause = 0
    _, report = client.predict(**order(files))
    assert report["steps"] == 2


def wait_for(happened, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.1)


def settled(slow: Slow) -> bool:
    """No step was made for a second, which is three times as long as one takes here."""
    before = slow.steps
    time.sleep(1)
    return slow.steps == before


def test_a_missing_model_is_a_sentence(monkeypatch, tmp_path):
    monkeypatch.setenv("FACESNAP_MODEL", str(tmp_path / "nothing"))
    with pytest.raises(SystemExit, match="There is no folder .*nothing.*\n.*FACESNAP_MODEL"):
        app.main()


# The studio -----------------------------------------------------------------------------------------------


def studio_order(files, **changes) -> Order:
    defaults = dict(
        reference=files.ann, prompt="", consent=True, pose="front", negative_prompt="", steps=3, guidance=2.0,
        identity_strength=1.0, landmark_strength=1.0, seed=1, pose_photo=None,
    )  # fmt: skip
    return Order(**defaults | changes)


def test_closing_the_generator_ends_the_worker_and_leaves_the_pipeline_clean(pipe, files):
    slow = Slow(pipe)
    slow.pause = 0.05
    making = Studio(slow).make(studio_order(files, steps=40))
    assert next(making) == Step(1, 40)
    making.close()
    assert slow.steps < 10
    done = slow.steps
    time.sleep(0.3)
    assert slow.steps == done
    assert not pipe.unet._forward_pre_hooks


def test_the_portraits_file_goes_when_it_was_taken(pipe, files):
    making = Studio(pipe).make(studio_order(files))
    *steps, portrait = making_until_portrait(making)
    assert [step.done for step in steps] == [1, 2, 3]
    assert Path(portrait.path).exists()
    making.close()
    assert not Path(portrait.path).exists()


def making_until_portrait(making):
    events = []
    for event in making:
        events.append(event)
        if isinstance(event, Portrait):
            return events
    raise AssertionError("no portrait")


def test_limits_are_checked_in_the_handler_too(files):
    for name, (low, high) in LIMITS.items():
        for value in (low - 1, high + 1):
            with pytest.raises(ValueError, match=name.replace("_", " ")):
                studio_order(files, **{name: value}).check()


def test_likeness_has_a_word_for_every_score():
    words = [likeness(score) for score in (-1.0, 0.0, 0.3, 0.5, 0.9, None)]
    assert words[2] != words[3] != words[4] and "no face" in words[-1]


# People ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not CHROMIUM.exists() and not os.environ.get("CI"):
        pytest.skip("the page is tested in Debian's chromium; apt-get install chromium")
    from playwright.sync_api import sync_playwright

    flags = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync")
    quiet = ("--disable-background-networking", "--disable-component-update")
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=[*flags, *quiet])


@pytest.fixture
def visit(browser, page):
    """visit() opens the page; afterwards no error may be in the console and no request may have gone out."""
    page.pipe.pause, page.pipe.fails = 0.0, False
    contexts, faults = [], []

    def visit(width: int = 1280, **options):
        context = browser.new_context(viewport={"width": width, "height": 900}, **options)
        context.set_default_timeout(60_000)
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
    for context in contexts:
        context.close()
    assert faults == []


def upload(tab, path: str, where: str = "#reference") -> None:
    tab.locator(f"{where} input[type=file]").first.set_input_files(path)


def test_first_visit_to_portrait(visit, files):
    tab = visit()
    assert "Your portrait appears here" in tab.locator("#stage").inner_text()
    upload(tab, files.ann)
    tab.wait_for_selector("#seen .fs-figures")
    tab.locator("#prompt textarea").fill("by the sea")
    tab.locator("#consent input").check()
    tab.locator("#generate").click()
    tab.wait_for_selector("#portrait img")
    assert "Identity" in tab.locator("#summary").inner_text()
    tab.wait_for_selector("#generate")
    assert tab.locator("#stop").count() == 0 or not tab.locator("#stop").is_visible()


def test_the_preview_follows_every_change(visit, files):
    tab = visit()
    drawing = "#seen figure:last-child img"
    upload(tab, files.ann)
    seen = [tab.locator(drawing).get_attribute("src")]

    def changed() -> None:
        tab.wait_for_function(
            "([q, old]) => { const e = document.querySelector(q); return e && !old.includes(e.src); }",
            arg=[drawing, seen],
        )
        seen.append(tab.locator(drawing).get_attribute("src"))

    tab.locator("#pose").get_by_label("Quarter left", exact=True).check(force=True)
    changed()
    tab.locator("#pose").get_by_label("Another photo", exact=True).check(force=True)
    tab.wait_for_selector("#pose-photo input[type=file]", state="attached")
    assert "Add a photo of the pose" in tab.locator("#seen").inner_text()
    upload(tab, files.bob, "#pose-photo")
    changed()
    assert tab.locator("#seen figure").count() == 3


def test_poses_are_chosen_by_keyboard(visit, files):
    tab = visit()
    tab.locator("#pose input").first.focus()
    tab.keyboard.press("Tab")
    tab.keyboard.press("Space")
    assert tab.locator("#pose input:checked").get_attribute("value") == POSES[1]


def test_an_example_fills_the_form(visit):
    tab = visit()
    tab.locator("#examples button").first.click()
    tab.wait_for_selector("#seen .fs-figures")
    assert tab.locator("#prompt textarea").input_value() == "in a red coat"
    assert tab.locator("#pose input:checked").get_attribute("value") == "quarter-left"


def test_errors_are_said_where_they_happen(visit, files):
    tab = visit()
    tab.locator("#generate").click()
    assert "There is no photo yet" in tab.locator("#reference .validation-error").inner_text()
    upload(tab, files.faceless)
    assert "No face" in tab.locator("#seen .fs-error").inner_text()
    tab.reload()
    upload(tab, files.ann)
    tab.wait_for_selector("#seen .fs-figures")
    tab.locator("#generate").click()
    assert "tick the box" in tab.locator("#consent .validation-error").inner_text()
    tab.locator("#consent input").check()  # the message does not lie over the box
    tab.locator("#generate").click()
    tab.wait_for_selector("#portrait img")


def test_a_failure_is_one_sentence_and_the_button_comes_back(visit, page, files):
    tab = visit()
    page.pipe.fails = True
    upload(tab, files.ann)
    tab.wait_for_selector("#seen .fs-figures")
    tab.locator("#consent input").check()
    tab.locator("#generate").click()
    text = tab.locator("#status .fs-error").inner_text()
    assert "Something went wrong" in text and "secret" not in text
    assert tab.locator("#generate").is_visible()


def test_stop_ends_the_work(visit, page, files):
    tab = visit()
    page.pipe.pause, page.pipe.steps = 0.5, 0
    upload(tab, files.ann)
    tab.wait_for_selector("#seen .fs-figures")
    tab.locator("#advanced button").first.click()
    tab.get_by_label("number input for Steps").fill("40")
    tab.keyboard.press("Tab")
    tab.locator("#consent input").check()
    tab.locator("#generate").click()
    tab.wait_for_selector("#status progress:not([value='0'])")
    tab.locator("#stop").click()
    tab.wait_for_selector("#status :text('Stopped.')")
    assert tab.locator("#generate").is_visible()
    wait_for(lambda: settled(page.pipe))
    assert page.pipe.steps < 35


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_all_without_scrolling_sideways(visit, files, scheme):
    tab = visit(390, color_scheme=scheme)
    upload(tab, files.ann)
    tab.wait_for_selector("#seen .fs-figures")
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390
    red = tab.locator("body").evaluate("e => +getComputedStyle(e).backgroundColor.match(/\\d+/)[0]")
    assert (red < 60) == (scheme == "dark")


# What the repository ships --------------------------------------------------------------------------------


needs_mini = pytest.mark.skipif(not MINI.exists() and not os.environ.get("CI"), reason="assets/mini is not built yet")


@needs_mini
def test_every_template_has_its_thumbnail_and_every_example_its_photo():
    assert all((app.ASSETS / "templates" / f"{template.name}.png").exists() for template in TEMPLATES)
    shelf = app.examples(app.ASSETS / "examples")
    assert len(shelf) >= 3
    assert all(row["pose"] in POSES and row["prompt"] and Path(row["reference"]).exists() for row in shelf)


@needs_mini
def test_the_main_job_on_the_mini():
    from facesnap import FaceSnapPipeline

    started = time.perf_counter()
    pipe = FaceSnapPipeline.from_pretrained(MINI)
    demo = app.build(pipe)
    _, url, _ = app.launch(demo, prevent_thread_lock=True, quiet=True)
    up_after = time.perf_counter() - started
    row = app.examples(app.ASSETS / "examples")[0]
    arguments = {"reference": handle_file(row["reference"]), "prompt": row["prompt"], "pose": row["pose"]}
    path, report = Client(url, verbose=False).predict(**arguments, consent=True, seed=1, api_name="/generate")
    demo.close()
    assert Image.open(path).size == (pipe.settings.size, pipe.settings.size)
    assert report["identity_score"] is not None
    assert up_after < 25

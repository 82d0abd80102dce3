"""The page as people use it: real Chromium, over a tiny FaceSnap (served.py).

FACESNAP_SCREENSHOTS=<folder> keeps a picture of every state; without it they go to a temporary folder. The README's
three are made by `FACESNAP_SCREENSHOTS=docs pytest tests/test_page.py -k on_the_mini`.
"""

import re

import numpy as np
import pytest
from on_page import choose, downloaded, made, ready, set_slider, unfold, upload
from served import MOST_WAITING, idle, wait_for
from test_app import MINI, needs_mini

import app
from facesnap.web import server


def test_first_visit_to_portrait(visit, files, shoot):
    tab = visit()
    assert "Your portrait appears here" in tab.locator("#stage").inner_text()
    shoot(tab, "empty")
    upload(tab, files.ann)
    tab.wait_for_selector("#preview .fs-figures")
    assert "one face" in tab.locator("#seen").inner_text()
    tab.locator("#prompt textarea").fill("by the sea")
    tab.locator("#consent input").check()
    tab.locator("#generate").click()
    tab.wait_for_selector("#pictures img")
    assert "“sea”" in tab.locator("#unknown").inner_text()
    said = tab.locator("#summary").inner_text()
    assert re.search(r"Identity\s+-?\d\.\d\d\s+[a-z ]*likeness", said) and re.search(r"Seed\s+\d+", said)
    assert re.search(r"Made by\s+tiny, best: 2 steps", said)
    tab.wait_for_selector("#generate")
    assert not tab.locator("#stop").is_visible()
    assert re.fullmatch(r"Portrait with seed \d+", tab.locator("#pictures img").first.get_attribute("alt"))
    shoot(tab, "done")
    assert downloaded(tab).text["seed"] in said


def test_a_seed_can_be_used_again(visit, page, files):
    tab = ready(visit(), files.ann)
    made(tab, page, steps=2)
    first, picture = tab.locator("#summary b").last.inner_text(), downloaded(tab)
    tab.locator("#again").click()
    tab.wait_for_selector(f"#status :text('The next portrait uses seed {first}')")
    made(tab, page, steps=2)
    assert tab.locator("#summary b").last.inner_text() == first
    assert np.array_equal(picture, downloaded(tab))


def test_several_photos_are_read_one_by_one(visit, files, shoot):
    tab = visit()
    upload(tab, files.ann, files.group)
    tab.wait_for_selector("#seen figure:nth-child(2)")
    assert tab.locator("#seen figcaption").all_inner_texts() == ["one face", "the largest of 2 faces"]
    upload(tab, files.ann_too, where="#photo-foot")
    tab.wait_for_selector("#seen figure:nth-child(3)")
    tab.wait_for_selector("#preview .fs-figures")
    assert "2 faces" in tab.locator("#preview").inner_text()
    shoot(tab, "several-photos")
    upload(tab, files.bob, where="#photo-foot")
    tab.wait_for_selector("#seen figure:nth-child(4)")
    tab.wait_for_selector("#more", state="hidden")  # a fifth is not offered


def test_what_is_below_the_photos_stays_in_its_place(visit, files):
    """A visitor who goes on while a photo is read does not press what has just moved under the pointer."""
    tab = visit()
    before = tab.locator("#card-pose").bounding_box()["y"]
    upload(tab, files.ann)
    tab.wait_for_selector("#seen figure")
    tab.wait_for_selector("#more")
    assert abs(tab.locator("#card-pose").bounding_box()["y"] - before) < 1


def test_the_preview_follows_every_change(visit, files):
    tab = visit()
    drawing = "#preview figure:last-child img"
    upload(tab, files.ann)
    tab.wait_for_selector(drawing)
    seen = [tab.locator(drawing).get_attribute("src")]

    def changed() -> None:
        tab.wait_for_function(
            "([q, old]) => { const e = document.querySelector(q); return e && !old.includes(e.src); }",
            arg=[drawing, seen],
        )
        seen.append(tab.locator(drawing).get_attribute("src"))

    choose(tab, "#pose", "Quarter left")
    changed()
    assert tab.locator("#preview figure").count() == 3  # the photo, the template, the drawing
    unfold(tab, "turn", "advanced")
    for label, value in (("Turn (yaw)", 10), ("Nod (pitch)", 10), ("Tilt (roll)", 10), ("Head size", 0.8)):
        set_slider(tab, label, value)
        changed()
    set_slider(tab, "Smile", 0.8)
    changed()
    choose(tab, "#expression", "As in the photo")
    changed()
    choose(tab, "#aspect", "3:2")
    changed()
    width, height = tab.locator(drawing).evaluate("e => [e.naturalWidth, e.naturalHeight]")
    assert width > height
    choose(tab, "#pose", "Another photo")
    tab.wait_for_selector("#pose-photo input[type=file]", state="attached")
    tab.wait_for_selector("#preview :text('Add a photo of the pose')")
    upload(tab, files.bob, where="#pose-photo")
    changed()
    assert tab.locator("#preview figcaption").all_inner_texts()[1] == "the pose"


def test_a_preset_takes_back_what_was_set_by_hand(visit):
    tab = visit()
    unfold(tab, "advanced")
    set_slider(tab, "Steps", 1)
    choose(tab, "#preset", "Fast")
    tab.wait_for_function("() => document.querySelector('[aria-label=\"number input for Steps\"]').value === '2'")


def test_several_pictures_each_with_its_score_and_seed(visit, files, shoot):
    tab = ready(visit(), files.ann)
    unfold(tab, "advanced")
    set_slider(tab, "Pictures", 3)
    tab.locator("#generate").click()
    tab.wait_for_selector("#summary :text('Picture 3')")
    tab.wait_for_selector("#stop", state="hidden")
    assert tab.locator("#pictures .thumbnail-item").count() == 3
    seeds = [int(text) for text in re.findall(r"seed\s+(\d+)", tab.locator("#summary").inner_text())]
    assert seeds == [seeds[0], seeds[0] + 1, seeds[0] + 2]
    unfold(tab, "advanced")
    shoot(tab, "several-pictures")
    tab.locator("#pictures .thumbnail-item").nth(1).click()
    tab.keyboard.press("Escape")  # it was enlarged, too
    tab.wait_for_selector(f"#again:has-text('{seeds[1]}')")
    assert downloaded(tab).text["seed"] == str(seeds[1])


def test_an_example_fills_the_form_and_is_made_once(visit, page):
    page.pipe.steps = 0
    steps = []
    for _ in range(2):
        tab = visit()
        unfold(tab, "turn")
        set_slider(tab, "Turn (yaw)", 20)  # of which an example knows nothing
        tab.locator("#examples button").first.click()
        tab.wait_for_selector("#pictures img")
        tab.wait_for_selector("#preview .fs-figures")
        assert tab.locator("#prompt textarea").input_value() == "in a red coat"
        assert tab.locator("#pose input:checked").get_attribute("value") == "quarter-left"
        assert tab.locator("#style input:checked").get_attribute("value") == "oil painting"
        assert tab.get_by_label("number input for Turn (yaw)").input_value() == "0"
        steps.append(page.pipe.steps)
    assert steps in ([2, 2], [0, 0])  # 0 where an earlier visitor asked already


def test_the_tab_keeps_its_portraits_and_their_settings(visit, page, files, shoot):
    tab = ready(visit(), files.ann)
    for prompt in ("first", "second"):
        tab.locator("#prompt textarea").fill(prompt)
        made(tab, page, steps=2)
    tab.wait_for_selector("#session .thumbnail-item >> nth=1")
    seeds = re.findall(r"seed (\d+)", " ".join(
        tab.locator("#session img").nth(k).get_attribute("alt") or "" for k in range(2)
    ))  # fmt: skip
    tab.locator("#session .thumbnail-item").nth(1).click()
    tab.wait_for_selector("#fs-large[open] img")
    tab.keyboard.press("Escape")
    tab.locator("#back").click()
    tab.wait_for_function("() => document.querySelector('#prompt textarea').value === 'first'")
    made(tab, page, steps=2)
    assert tab.locator("#summary b").last.inner_text() == seeds[1]
    tab.locator(".fs-compare summary").click()
    assert tab.locator(".fs-compare img").count() == 2
    shoot(tab, "session")
    tab.locator("#pictures img").click()
    tab.wait_for_selector("#fs-large[open] img")


# What goes wrong ----------------------------------------------------------------------------------------


def test_nothing_is_made_without_photo_or_consent(visit, files, shoot):
    tab = visit()
    tab.locator("#generate").click()
    tab.wait_for_selector("#status .fs-error:has-text('There is no photo yet')")
    shoot(tab, "no-photo")
    upload(tab, files.ann)
    tab.wait_for_selector("#status .fs-error", state="hidden")  # it goes with its cause
    tab.wait_for_selector("#preview .fs-figures")
    tab.locator("#generate").click()
    tab.wait_for_selector("#status .fs-error:has-text('tick the box')")
    shoot(tab, "no-consent")
    tab.locator("#consent input").check()
    tab.wait_for_selector("#status .fs-error", state="hidden")
    tab.locator("#generate").click()
    tab.wait_for_selector("#pictures img")


def test_who_puts_another_person_in_is_asked_again(visit, files):
    tab = ready(visit(), files.ann)
    tab.locator("#references .delete-button").click()
    tab.wait_for_function("() => !document.querySelector('#consent input').checked")
    upload(tab, files.bob)
    tab.wait_for_selector("#preview .fs-figures")
    assert not tab.locator("#consent input").is_checked()


@pytest.mark.parametrize(
    ("photos", "said"),
    [
        (["faceless"], "The photo: No face"),
        (["words"], "not a picture"),
        (["cut"], "damaged"),
        (["huge"], "12000 × 12000"),
        (["ann", "words"], "Photo 2: This file is not a picture"),
    ],
)
def test_photos_that_cannot_be_read_say_why(visit, files, photos, said, shoot):
    tab = visit()
    upload(tab, *(getattr(files, name) for name in photos))
    assert said in tab.locator("#seen .fs-error").inner_text()
    assert "waits until every photo" in tab.locator("#preview").inner_text()
    assert tab.locator("#seen figure").count() == len(photos) - 1
    shoot(tab, f"unreadable-{photos[-1]}-{len(photos)}")


def test_too_many_photos(visit, files, shoot):
    tab = visit()
    upload(tab, files.ann, files.ann_too, files.bob, files.group, files.ann)
    assert "choose at most 4" in tab.locator("#preview .fs-error").inner_text()
    shoot(tab, "too-many-photos")


def test_a_pose_photo_without_a_face(visit, files, shoot):
    tab = visit()
    upload(tab, files.ann)
    choose(tab, "#pose", "Another photo")
    tab.wait_for_selector("#pose-photo input[type=file]", state="attached")
    upload(tab, files.faceless, where="#pose-photo")
    assert "The pose photo: No face" in tab.locator("#preview .fs-error").inner_text()
    shoot(tab, "unreadable-pose")


def test_a_failure_is_one_sentence_and_the_button_comes_back(visit, page, files, shoot):
    tab = ready(visit(), files.ann)
    page.pipe.fails = True
    tab.locator("#generate").click()
    text = tab.locator("#status .fs-error").inner_text()
    assert "Something went wrong" in text and "secret" not in text
    assert tab.locator("#generate").is_visible()
    assert "No portrait was made" in tab.locator("#stage").inner_text()
    shoot(tab, "failed")
    tab.locator("#prompt textarea").fill("another prompt")  # about which nothing has been said
    tab.wait_for_selector("#status .fs-error", state="hidden")


# Stopping and leaving -----------------------------------------------------------------------------------


def working(visit, page, files):
    """A page whose portrait takes 40 steps of half a second, of which some are made."""
    tab = ready(visit(), files.ann)
    unfold(tab, "advanced")
    set_slider(tab, "Steps", 40)
    page.pipe.pause, page.pipe.steps = 0.5, 0
    tab.locator("#generate").click()
    tab.wait_for_selector("#status progress:not([value='0'])")
    return tab


def steps_until_idle(page) -> int:
    """Steps that are still made: the one under way, and the one after it, which ends in the exception."""
    before = page.pipe.steps
    wait_for(idle)
    return page.pipe.steps - before


def test_stop_ends_the_work_within_a_step(visit, page, files, shoot):
    tab = working(visit, page, files)
    assert re.search(r"Step \d+ of 40 · about \d+ s left", tab.locator("#status").inner_text())
    shoot(tab, "working")
    page.pipe.pause = 2
    tab.locator("#stop").click()
    tab.wait_for_selector("#status :text('Stopped.')")
    assert tab.locator("#generate").is_visible()
    assert steps_until_idle(page) <= 2
    page.pipe.pause = 0
    tab.locator("#generate").click()  # the line is free
    tab.wait_for_selector("#pictures img")


def test_a_closed_tab_ends_the_work_and_frees_the_queue(visit, page, files):
    tab = working(visit, page, files)
    page.pipe.pause = 2
    tab.close()
    assert steps_until_idle(page) <= 2
    page.pipe.pause = 0
    tab = ready(visit(), files.bob)
    tab.locator("#generate").click()
    tab.wait_for_selector("#pictures img")


def test_who_waits_is_told_so_and_who_cannot_wait_too(visit, page, files, shoot):
    first, late, *waiting = [ready(visit(), files.ann) for _ in range(MOST_WAITING + 2)]
    page.pipe.gate.clear()
    first.locator("#generate").click()
    wait_for(lambda: page.pipe.steps == 1)
    for tab in waiting:
        tab.locator("#generate").click()
        tab.wait_for_selector("#status :text('made before yours')")
    shoot(waiting[0], "waiting")
    late.locator("#generate").click()
    late.wait_for_selector("#status .fs-error:has-text('The queue is full')")
    assert late.locator("#generate").is_visible()
    shoot(late, "queue-full")
    left = waiting.pop()  # who waits may stop, too
    left.locator("#stop").click()
    left.wait_for_selector("#status :text('Stopped.')")
    page.pipe.gate.set()
    for tab in (first, *waiting):
        tab.wait_for_selector("#pictures img")
    assert len(page.pipe.seeds) == 1 + len(waiting)


# The mini -----------------------------------------------------------------------------------------------


@needs_mini
def test_first_visit_to_portrait_on_the_mini(browser, shoot):
    """What a visitor of the shipped page sees; its three screenshots are those of the README."""
    demo = server.build(app.load(str(MINI)))
    _, url, _ = server.launch(demo, prevent_thread_lock=True, quiet=True)
    photos = server.ASSETS / "examples"

    def visit(width: int, height: int, **options):
        tab = browser.new_context(viewport={"width": width, "height": height}, **options).new_page()
        tab.set_default_timeout(120_000)
        tab.goto(url)
        tab.wait_for_selector("#generate")
        return tab

    def portrait(tab, photo: str, prompt: str, count: int = 1) -> None:
        ready(tab, str(photos / photo))
        tab.locator("#prompt textarea").fill(prompt)
        unfold(tab, "advanced")
        set_slider(tab, "Pictures", count)
        tab.locator("#new-seed input").uncheck()  # the same pictures every time
        unfold(tab, "advanced")
        tab.locator("#generate").click()
        tab.wait_for_selector("#summary :text('Made by')")
        tab.wait_for_selector("#stop", state="hidden")
        assert tab.locator("#pictures .thumbnail-item, #pictures img").count() >= count
        tab.mouse.move(0, 0)
        tab.evaluate("scrollTo(0, 0)")

    tab = visit(1160, 1130)
    choose(tab, "#pose", "Quarter left")
    portrait(tab, "avery.png", "wearing a red jacket, a blue studio background")
    shoot(tab, "page", full_page=False)

    tab = visit(1160, 1130, color_scheme="dark")
    choose(tab, "#pose", "Another photo")
    upload(tab, str(photos / "frankie.png"), where="#pose-photo")
    portrait(tab, "devon.png", "wearing a purple shirt, a plain gray background", count=4)
    shoot(tab, "page-dark", full_page=False)

    tab = visit(390, 844)
    portrait(tab, "ellis.png", "wearing square glasses, a plain yellow background")
    tab.locator("#result").evaluate("card => card.scrollIntoView()")
    shoot(tab, "page-phone", full_page=False)
    demo.close()

"""The page for everybody: every width, light and dark, keyboard, clipboard, and what axe finds (served.py)."""

import base64
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from on_page import choose, made, ready, set_slider, unfold, upload

from facesnap.web.request import POSES

BEYOND = """() => [...document.querySelectorAll("body *")].filter((e) => {
  const {left, right, width} = e.getBoundingClientRect();
  const seen = width && e.checkVisibility({opacityProperty: true, visibilityProperty: true});
  return seen && (left < -1 || right > innerWidth + 1);
}).map((e) => `${innerWidth}: ${e.tagName} ${e.id} ${e.className}`)"""


IN_VIEW = """(query) => { const {top, bottom, height} = document.querySelector(query).getBoundingClientRect();
  return Math.min(bottom, innerHeight) - Math.max(top, 0) >= Math.min(height, 200) - 2; }"""


# With the head's sliders unfolded beneath it; whatever is seen through the bar, at its edges or in it
THROUGH = """() => {
  document.querySelector("#turn").scrollIntoView({block: "end"});
  scrollBy(0, 0.5 * document.querySelector("#bar").offsetHeight);
  const {left, top, right, bottom} = document.querySelector("#bar").getBoundingClientRect(), found = [];
  for (let x = left + 8; x < right - 8; x += 10) for (let y = top + 8; y < Math.min(bottom, innerHeight) - 4; y += 6) {
    const seen = document.elementFromPoint(x, y);
    if (!seen.closest("#bar")) found.push(`${innerWidth}: ${seen.tagName} ${seen.className} through the bar`);
  }
  return [...new Set(found)];
}"""


WIDTHS = {320: 568, 360: 740, 390: 844, 768: 1024, 1024: 768, 1366: 768, 1920: 1080}


def test_every_width_shows_all_and_what_becomes_of_the_button(visit, page, files, shoot):
    """Nothing beyond the edge; whoever presses Generate sees the button's answer and the portrait."""
    tab = visit()
    found = []
    for width, height in WIDTHS.items():
        tab.set_viewport_size({"width": width, "height": height})
        tab.wait_for_timeout(200)
        found += tab.evaluate(BEYOND)
    ready(tab, files.ann)
    unfold(tab, "turn", "advanced")
    for width, height in WIDTHS.items():
        tab.set_viewport_size({"width": width, "height": height})
        tab.wait_for_timeout(200)
        found += tab.evaluate(BEYOND) + tab.evaluate(THROUGH)
        tab.locator("#generate").scroll_into_view_if_needed()
        made(tab, page, steps=2)
        for query in ("#status", "#pictures img"):
            tab.wait_for_function(IN_VIEW, arg=query)
        tab.locator("#prompt textarea").fill(f"at {width}")
        shoot(tab, f"width-{width}", full_page=False)
    assert found == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_has_one_column_in_the_order_of_the_work(visit, files, scheme, shoot):
    tab = visit(390, color_scheme=scheme)
    upload(tab, files.ann)
    tab.wait_for_selector("#preview .fs-figures")
    red = tab.locator("body").evaluate("e => +getComputedStyle(e).backgroundColor.match(/\\d+/)[0]")
    assert (red < 60) == (scheme == "dark")
    cards = ("card-photos", "card-pose", "card-preview", "card-prompt", "result")
    tops = [tab.locator(f"#{name}").bounding_box()["y"] for name in cards]
    assert tops == sorted(tops)  # the preview stands where it helps: between the pose and the words
    shoot(tab, f"phone-{scheme}")


def test_a_wide_screen_keeps_to_1100_pixels(visit):
    tab = visit(1920)
    assert tab.locator("#columns").bounding_box()["width"] <= 1100


PASTE = """async (picture) => {
  const blob = await (await fetch(picture)).blob(), data = new DataTransfer();
  data.items.add(new File([blob], "image.png", {type: "image/png"}));
  document.dispatchEvent(new ClipboardEvent("paste", {clipboardData: data}));
}"""


def test_pictures_can_be_pasted(visit, files):
    tab = visit()
    card, camera = (
        tab.locator(q).bounding_box() for q in ("#card-photos", "#references [aria-label='Capture from camera']")
    )
    assert camera["y"] + camera["height"] <= card["y"] + card["height"]
    for count, path in enumerate((files.ann, files.bob), start=1):
        picture = "data:image/png;base64," + base64.b64encode(Path(path).read_bytes()).decode()
        tab.evaluate(PASTE, picture)
        tab.wait_for_selector(f"#seen figure:nth-child({count})")


def test_keyboard_only_from_photo_to_portrait(visit, files):
    """Every control is reached with Tab and worked with keys; only the file dialog is the browser's own."""
    tab = visit()
    with tab.expect_file_chooser() as chooser:
        press_until(tab, "#references .upload-container")
        tab.keyboard.press("Enter")
    chooser.value.set_files(files.ann)
    tab.wait_for_selector("#preview .fs-figures")
    press_until(tab, "#pose input")
    tab.keyboard.press("ArrowRight")  # one group: Tab enters it once
    assert tab.locator("#pose input:checked").get_attribute("value") == POSES[1]
    press_until(tab, "#prompt textarea")
    tab.keyboard.type("by the sea")
    press_until(tab, "#consent input")
    tab.keyboard.press("Space")
    press_until(tab, "#generate")
    tab.keyboard.press("Enter")
    tab.wait_for_selector("#pictures img")


def press_until(tab, selector: str) -> None:
    for _ in range(60):
        if tab.evaluate("q => !!document.activeElement && document.activeElement.matches(q)", selector):
            return
        tab.keyboard.press("Tab")
    raise AssertionError(f"Tab does not reach {selector}")


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_axe_finds_nothing(visit, page, files, width, scheme):
    tab = visit(width, color_scheme=scheme, reduced_motion="reduce")  # colours then change at once
    found = {"empty": violations(tab)}
    tab.locator("#generate").click()
    tab.wait_for_selector("#status .fs-error")
    found["refused"] = violations(tab)
    upload(tab, files.ann, files.words)
    tab.wait_for_selector("#seen .fs-error")
    found["unreadable"] = violations(tab)
    tab.reload()
    ready(tab, files.ann, files.group)
    choose(tab, "#pose", "Another photo")
    tab.wait_for_selector("#pose-photo input[type=file]", state="attached")
    upload(tab, files.bob, where="#pose-photo")
    tab.wait_for_selector("#preview figcaption:text('the pose')")
    unfold(tab, "turn", "advanced")
    page.pipe.pause = 0.5
    set_slider(tab, "Steps", 10)
    tab.locator("#generate").click()
    tab.wait_for_selector("#status progress:not([value='0'])")
    found["working"] = violations(tab)
    page.pipe.pause = 0
    tab.wait_for_selector("#pictures img")
    tab.wait_for_selector("#stop", state="hidden")
    found["done"] = violations(tab)
    page.pipe.fails = True
    tab.locator("#generate").click()
    tab.wait_for_selector("#status .fs-error")
    found["failed"] = violations(tab)
    assert {state: said for state, said in found.items() if said} == {}


def violations(tab) -> list[str]:
    found = Axe().run(tab).response["violations"]
    return [f"{v['id']}: {node['target']} {node['failureSummary'][:200]}" for v in found for node in v["nodes"]]

"""What a visitor does on the page, as functions of its tab."""

from PIL import Image
from served import wait_for


def upload(tab, *paths: str, where: str = "#references") -> None:
    tab.locator(f"{where} input[type=file]").first.set_input_files(list(paths))


def ready(tab, *paths: str):
    """A page with photos, their preview, and consent."""
    upload(tab, *paths)
    tab.wait_for_selector("#preview .fs-figures")
    tab.locator("#consent input").check()
    return tab


def choose(tab, group: str, label: str) -> None:
    """Clicks one of the radio buttons that look like pictures or words, when it lies still, and sees it chosen."""
    tab.locator(f"{group} label").get_by_text(label, exact=True).click()
    tab.wait_for_function(
        "([q, text]) => document.querySelector(`${q} label:has(input:checked)`)?.innerText.trim() === text",
        arg=[group, label],
    )


def made(tab, page, steps: int) -> None:
    """Generate is pressed, and the work that follows has ended."""
    before = page.pipe.steps
    tab.locator("#generate").click()
    wait_for(lambda: page.pipe.steps >= before + steps)
    tab.wait_for_selector("#stop", state="hidden")
    tab.wait_for_selector("#generate")


def unfold(tab, *accordions: str) -> None:
    for accordion in accordions:
        tab.locator(f"#{accordion} button").first.click()


def set_slider(tab, label: str, value: float) -> None:
    box = tab.get_by_label(f"number input for {label}")
    for _ in range(5):  # what has just been unfolded may still be set to its default once
        box.fill(str(value))
        tab.keyboard.press("Tab")
        tab.wait_for_timeout(300)
        if float(box.input_value()) == value:
            return
    raise AssertionError(f"{label} does not take {value}")


def downloaded(tab) -> Image.Image:
    with tab.expect_download() as download:
        tab.locator("#download").click()
    assert download.value.suggested_filename.endswith(".png")
    return Image.open(download.value.path())

"""The blind study: Bradley-Terry by hand, judges over HTTP, and the page as people use it, in real Chromium."""

import csv
import json
import shutil
import threading
import urllib.error
import urllib.request

import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from PIL import Image

from facesnap.errors import InputError
from facesnap.evaluation import plan, ranking, study
from facesnap.evaluation.__main__ import parse

SIZE = 64
GREYS = {"worst": 40, "middle": 120, "best": 220}  # how light the pictures of each method are


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A plan of two people, and three methods whose pictures are greys."""
    place = tmp_path_factory.mktemp("study")
    planned = plan.run(parse(f"plan --out {place}/plan --people 2 --poses 2 --size {SIZE}".split()))
    for name, grey in GREYS.items():
        (place / name).mkdir()
        for k, row in enumerate(planned.rows):
            Image.new("RGB", (SIZE, SIZE), (grey + k,) * 3).save(place / name / row.file)
    return planned, [place / name for name in GREYS]


@pytest.fixture
def served(folders, tmp_path):
    """The study, its answers and its address."""
    planned, methods = folders
    told = study.Study(planned, methods, tmp_path / "answers.csv", 12)
    server = study.serve(told, "127.0.0.1", 0)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield told, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def ask(address: str, body: dict | bytes | None = None, kind: str = "application/json"):
    data = json.dumps(body).encode() if isinstance(body, dict) else body
    request = urllib.request.Request(address, data, {"Content-Type": kind})
    with urllib.request.urlopen(request) as response:
        return json.load(response) if "json" in response.headers["Content-Type"] else response.read()


# ------------------------------------------------------------------------------------------------- the model


def test_strengths_by_hand():
    # 3 answers to 1, and the one more that every pair gets: 3.5 to 1.5
    found = ranking.strengths(np.array([[0, 3], [1, 0]]))
    assert found[0] - found[1] == pytest.approx(np.log(3.5 / 1.5)) and found.sum() == pytest.approx(0)
    assert np.allclose(ranking.strengths(np.zeros((3, 3))), 0)
    assert np.isfinite(ranking.strengths(np.array([[0, 9], [0, 0]]))).all()  # won all


def test_strengths_are_found_again_and_one_judge_has_no_interval():
    wanted = np.array([1.0, 0.2, -1.2])
    chance = 1 / (1 + np.exp(wanted[None] - wanted[:, None]))
    rng = np.random.default_rng(0)

    def judge() -> np.ndarray:
        first = np.triu(rng.binomial(40, chance), 1)
        return first + np.tril(40 - first.T, -1)

    values, ends = ranking.ranked([judge() for _ in range(10)], draws=200)
    assert np.abs(values - wanted).max() < 0.25
    assert (ends[:, 0] < values).all() and (values < ends[:, 1]).all() and np.ptp(ends, axis=1).max() < 0.8
    alone, none = ranking.ranked([judge()])
    assert np.array_equal(none[:, 0], alone) and np.array_equal(none[:, 1], alone)


# ------------------------------------------------------------------------------------------------- the study


def test_a_judges_pairs_are_their_own_balanced_and_asked_once(folders, tmp_path):
    planned, methods = folders
    told = study.Study(planned, methods, tmp_path / "answers.csv", 12)
    ann = told.asked("ann")
    assert ann == told.asked("ann") != told.asked("bob")
    seen = [(pair.row, *sorted((pair.left, pair.right))) for pair in ann]
    assert len(set(seen)) == len(seen)
    many = [pair for n in range(60) for pair in told.asked(f"judge {n}")]
    counts = [
        sum({pair.left, pair.right} == {a, b} for pair in many) for a, b in (("worst", "best"), ("best", "middle"))
    ]
    assert min(counts) > 0.25 * len(many)
    assert 0.4 < np.mean([pair.left < pair.right for pair in many]) < 0.6  # sides by chance


def test_ten_made_up_judges_over_http_recover_their_order(served, tmp_path):
    told, address = served
    for number in range(10):
        judge, rng = f"judge {number}", np.random.default_rng(number)
        name = judge.replace(" ", "%20")
        state = ask(f"{address}/next?judge={name}")
        while not state.get("done"):
            assert not any(method in json.dumps(state) for method in GREYS)  # blind
            pair = told.asked(judge)[state["number"]]
            lead = GREYS[pair.left] - GREYS[pair.right]
            if state["question"] == "quality":
                answer = "same"  # they see a difference in likeness only
            else:
                answer = "left" if lead / 60 + rng.logistic() > 0 else "right"
            given = {"number": state["number"], "question": state["question"], "answer": answer}
            state = ask(f"{address}/answer", {"judge": judge, **given})
    found = study.results(told.answers, tmp_path / "results")
    likeness, quality = found["questions"]["likeness"], found["questions"]["quality"]
    assert list(likeness["methods"]) == ["best", "middle", "worst"] and found["judges"] == 10
    best, worst = (likeness["methods"][name]["95"] for name in ("best", "worst"))
    assert best[0] > worst[1]
    assert quality["no_difference"] == 1 and all(abs(m["strength"]) < 1e-6 for m in quality["methods"].values())
    page = (tmp_path / "results" / "study.html").read_text()
    assert page.count("<circle") == 6 and "10 judges" in page


def test_answers_go_on_count_once_and_are_of_this_study(served, folders, tmp_path):
    told, address = served
    first = {"judge": "ann", "number": 0, "question": "likeness", "answer": "left"}
    assert ask(f"{address}/answer", first)["question"] == "quality"
    ask(f"{address}/answer", {**first, "answer": "right"})  # the same question again: the first answer stays
    lines = list(csv.DictReader(told.answers.open()))
    assert len(lines) == 1 and lines[0]["answer"] == "left" and lines[0]["judge"] == "ann"
    planned, methods = folders
    again = study.Study(planned, methods, told.answers, 12)
    assert again.next("ann")["question"] == "quality" and again.next("bob")["question"] == "likeness"
    others = [folder for folder in methods if folder.name != lines[0]["left"]]
    with pytest.raises(InputError, match="answers to another study"):
        study.Study(planned, others, told.answers, 12)


def test_pictures_carry_pixels_alone_and_bad_requests_are_refused(served):
    told, address = served
    picture = ask(f"{address}/picture?judge=ann&number=0&side=left")
    assert picture.startswith(b"\x89PNG") and b"tEXt" not in picture and b"iTXt" not in picture
    good = {"judge": "ann", "number": 0, "question": "likeness", "answer": "left"}
    bad = [
        ("/next?judge=", None, "application/json"),
        ("/picture?judge=ann&number=99&side=left", None, "application/json"),
        ("/picture?judge=ann&number=0&side=../plan.json", None, "application/json"),
        ("/answer", {**good, "answer": "both"}, "application/json"),
        ("/answer", {**good, "number": "0"}, "application/json"),
        ("/answer", b"[]", "application/json"),
        ("/answer", b"{", "application/json"),
        ("/answer", good, "text/plain"),  # what a foreign page could send unasked
        ("/answer", b" " * 20_000, "application/json"),
        ("/plan/plan.json", None, "application/json"),
    ]
    for path, body, kind in bad:
        with pytest.raises(urllib.error.HTTPError) as refused:
            ask(address + path, body, kind)
        assert refused.value.code in (400, 404)
    assert not told.answered


def test_rows_that_a_method_failed_on_are_counted_and_not_asked_about(folders, tmp_path):
    planned, methods = folders
    failing = tmp_path / "failing"
    shutil.copytree(methods[0], failing)
    (failing / planned.rows[1].file).unlink()
    (failing / "made.jsonl").write_text(json.dumps({"file": planned.rows[1].file, "failed": "no face"}) + "\n")
    told = study.Study(planned, [failing, methods[1]], tmp_path / "answers.csv", 12)
    assert told.left_out == 1 and {pair.row for pair in told.asked("ann")} == {0, 2, 3}


def test_studies_that_cannot_be_are_named(folders, tmp_path):
    planned, methods = folders
    with pytest.raises(InputError, match="two or more"):
        study.Study(planned, methods[:1], tmp_path / "a.csv", 5)
    with pytest.raises(InputError, match="number of pairs is 0"):
        study.Study(planned, methods, tmp_path / "a.csv", 0)
    with pytest.raises(InputError, match="no file 'a.csv'"):
        study.results(tmp_path / "a.csv", tmp_path)
    (tmp_path / "b.csv").write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match="'b.csv' is no file of answers"):
        study.results(tmp_path / "b.csv", tmp_path)
    (tmp_path / "c.csv").write_text(",".join(study.COLUMNS) + "\n")
    with pytest.raises(InputError, match="holds no answer yet"):
        study.results(tmp_path / "c.csv", tmp_path)
    (tmp_path / "c.csv").write_text(",".join(study.COLUMNS) + "\np,ann,0.png,likeness,a,b,maybe\n")
    with pytest.raises(InputError, match="Line 2 of 'c.csv' is no answer"):
        study.results(tmp_path / "c.csv", tmp_path)
    with pytest.raises(InputError, match="Give a plan's folder"):
        study.run(parse(f"study --answers {tmp_path / 'd.csv'}".split()))


# -------------------------------------------------------------------------------------------------- the page


def test_a_judge_answers_by_keyboard_and_by_mouse_and_goes_on_later(served, browser):
    told, address = served
    context = browser.new_context()
    tab, faults = context.new_page(), []
    tab.on("pageerror", lambda error: faults.append(str(error)))
    tab.on("request", lambda r: None if r.url.startswith(address) else faults.append(r.url))
    tab.goto(address)
    tab.get_by_label("Your name").fill("ann")
    tab.keyboard.press("Enter")
    tab.get_by_role("heading", name="more like the person").wait_for()
    assert tab.locator("#left").evaluate("picture => picture.naturalWidth") == SIZE
    assert not any(name in tab.content() for name in GREYS)
    assert not Axe().run(tab).response["violations"]
    tab.keyboard.press("ArrowLeft")
    tab.get_by_role("heading", name="the better picture").wait_for()
    tab.get_by_role("button", name="No difference").click()
    tab.get_by_text("pair 2 of").wait_for()
    tab.keyboard.press("ArrowRight")
    tab.get_by_role("heading", name="the better picture").wait_for()
    answers = [(line["question"], line["answer"]) for line in csv.DictReader(told.answers.open())]
    assert answers == [("likeness", "left"), ("quality", "same"), ("likeness", "right")]

    tab.reload()
    tab.get_by_label("Your name").fill("ann")
    tab.get_by_role("button", name="Begin").click()
    tab.get_by_role("heading", name="the better picture").wait_for()
    while tab.locator("#end").is_hidden():
        before = len(told.answered)
        tab.keyboard.press("ArrowDown")
        tab.wait_for_function("() => !busy")
        assert len(told.answered) == before + 1
    assert tab.get_by_text("Thank you").is_visible() and told.next("ann")["done"]
    context.close()
    assert faults == []

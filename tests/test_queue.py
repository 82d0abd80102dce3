"""Many callers at once: who waits, who is refused, and whose work ends when he leaves."""

import json

import httpx
import pytest
from calls import call, order, post, sentence_of, uploaded
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from served import MOST_WAITING, idle, wait_for


def test_an_order_that_nobody_listens_to_is_not_made(page, files, monkeypatch):
    monkeypatch.setattr("facesnap.web.line.PATIENCE", 1.5)
    page.pipe.fresh()
    path = uploaded(page, files.ann)
    asked = {"reference": path, "consent": True, "steps": 50}
    posts = [post(page, "generate", json.dumps(asked)) for _ in range(17)]
    refused = [sentence_of(answer.text) for answer in posts if answer.status_code != 200]
    assert refused and all("faster than it listens" in said for said in refused)
    wait_for(lambda: "event: complete" in call(page, "generate", asked | {"steps": 2}))  # it may ask again
    assert page.pipe.steps == 2


def test_a_client_that_leaves_ends_the_work_and_frees_the_queue(client, page, files):
    page.pipe.pause, page.pipe.steps = 0.3, 0
    job = client.submit(**order(files, steps=50))
    wait_for(lambda: page.pipe.steps >= 2)
    job.cancel()
    left_at = page.pipe.steps
    page.pipe.pause = 0
    _, report = client.predict(**order(files))  # would wait for 50 steps, were the line not free
    assert report["steps"] == 2
    assert page.pipe.steps <= left_at + 2 + 2 + 1  # the one under way, one in the race, the new two, the raised one


def test_a_connection_that_drops_ends_the_work(page, files):
    page.pipe.fresh()
    page.pipe.pause = 1.0
    body = {
        "reference": {"path": uploaded(page, files.ann), "meta": {"_type": "gradio.FileData"}},
        "prompt": "",
        "consent": True,
    }
    joined = httpx.post(f"{page.url}gradio_api/call/v2/generate", json=body | {"steps": 50}).json()
    with httpx.stream("GET", f"{page.url}gradio_api/call/generate/{joined['event_id']}", timeout=60) as events:
        wait_for(lambda: page.pipe.steps >= 2)
        next(events.iter_lines())
    left_at = page.pipe.steps
    wait_for(idle)
    assert page.pipe.steps <= left_at + 2  # the one under way, and the next, which ends in the exception


@pytest.fixture
def held(page):
    """The page, whose portraits wait at their first step until `gate.set()`."""
    page.pipe.fresh()
    page.pipe.gate.clear()
    yield page
    page.pipe.gate.set()
    wait_for(idle)


def lines_up(job) -> bool:
    return "waiting" in str(job.outputs()[-1:])


def test_a_full_queue_says_so(client, held, files):
    jobs = [Client(held.url, verbose=False).submit(**order(files)) for _ in range(1 + MOST_WAITING)]
    wait_for(lambda: sum(lines_up(job) for job in jobs) == MOST_WAITING)
    with pytest.raises(AppError, match="The queue is full"):
        client.predict(**order(files))
    held.pipe.gate.set()
    assert all(job.result(timeout=120)[0] for job in jobs)  # who stood in line was served


def test_previews_do_not_wait_for_generations(client, held, files):
    job = client.submit(**order(files))
    wait_for(lambda: held.pipe.steps == 1)
    _, report = client.predict(reference=handle_file(files.ann), api_name="/preview")
    assert len(report["landmarks"]) == 72 and not job.done()


def test_a_second_visitor_waits_for_one_picture_not_for_four(client, held, files):
    greedy = client.submit(**order(files, count=4, seed=10))
    wait_for(lambda: held.pipe.steps == 1)
    second = client.submit(**order(files, seed=99))
    wait_for(lambda: lines_up(second))
    held.pipe.gate.set()
    assert len(greedy.result(timeout=120)[0]) == 4 and second.result(timeout=120)
    assert held.pipe.seeds == [10, 99, 11, 12, 13]

"""What strangers send to the bare routes of a tiny FaceSnap (served.py): each gets a sentence, and nothing leaks."""

import base64
import io
import json
import random
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from itertools import islice
from pathlib import Path

import httpx
import pytest
from calls import FILE, HTTP, call, sentence_of, uploaded
from PIL import Image
from served import wait_for

from facesnap.errors import InputError
from facesnap.web import endpoints, uploads
from facesnap.web.request import SPECS


def test_nothing_gets_past_the_queue(page):
    for name in ("generate", "preview"):
        for route in ("run", "api"):
            answer = httpx.post(f"{page.url}gradio_api/{route}/{name}", json={"data": []})
            assert answer.status_code >= 400
    for number, event in page.demo.fns.items():  # the page's own events have no name, but a number
        body = {"fn_index": number, "data": [None] * len(event.inputs), "session_hash": "stranger"}
        if event.queue:
            assert httpx.post(f"{page.url}gradio_api/run/predict", json=body).status_code >= 400


def test_the_pages_own_event_wants_consent(page, files):
    """The handler behind the button, called as Gradio calls it once the queue is passed."""
    event = next(event for event in page.demo.fns.values() if event.name == "show_portrait")
    values = [box.value for box in event.inputs]
    values[0] = [files.ann]
    page.pipe.steps = 0
    *_, last = event.fn(None, *values)
    said = [str(getattr(update, "value", "")) for update in last.values()]
    assert any("fs-error" in text and "tick the box" in text for text in said) and page.pipe.steps == 0


def test_what_no_page_would_send_to_its_events_is_refused_in_words(page, capfd):
    """The handlers of the page, asked as a page asks them, and what it handles without the server."""
    names = ("show_preview", "show_portrait", "show_preset", "show_example", "choose", "choose_kept")
    names += ("use_again", "restore")
    events = {number: event for number, event in page.demo.fns.items() if event.name in names or event.fn is None}
    assert {event.name for event in events.values()} > set(names)
    for number, event in events.items():
        session = f"stranger {number}"
        values = [json.dumps(["words"]) if box.stateful else "words" for box in event.inputs]
        body = {"fn_index": number, "data": values, "session_hash": session}
        assert HTTP.post(f"{page.url}gradio_api/queue/join", json=body).status_code == 200
        answers = HTTP.get(f"{page.url}gradio_api/queue/data", params={"session_hash": session}).text
        (said,) = re.findall(r'"error":\s?"([^"]*)', answers)
        assert "of the form that the page's clients send" in said
    assert "Traceback" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("chosen", [{"index": 0}, {"index": True, "value": 1}, {"index": [0, 1], "value": 1}, "x"])
def test_a_choice_that_no_page_would_send_is_refused_in_words(page, chosen, capfd):
    number = next(number for number, event in page.demo.fns.items() if event.name == "choose_kept")
    body = {"fn_index": number, "data": [], "session_hash": "stranger", "event_data": chosen}
    answer = HTTP.post(f"{page.url}gradio_api/run/predict", json=body)
    assert "of the form that the page's clients send" in answer.text and "Traceback" not in "".join(capfd.readouterr())


STREAMS = ["call/generate/nothing", "call/v2/preview/nothing", "queue/data?session_hash=nobody"]


@pytest.mark.parametrize("stream", STREAMS)
def test_a_stream_that_nobody_asked_for_says_so(page, stream, capfd):
    answer = HTTP.get(f"{page.url}gradio_api/{stream}")
    assert "Nobody asked for this" in answer.text and "404" not in answer.text
    assert "Traceback" not in "".join(capfd.readouterr())


@pytest.mark.parametrize(
    "address",
    [
        *("?page=SECRET", "assets/" + 50 * "SECRET", "pwa_icon/SECRET", "monitoring", "monitoring/SECRET", "SECRET"),
        *("gradio_api/call/a/b/SECRET", "gradio_api/file=https://SECRET.org/me.png", "gradio_api/proxy=SECRET%00"),
        *("gradio_api/custom_component/SECRET/client/component/x.js", "gradio_api/dev/reload"),
    ],
)
def test_addresses_where_nothing_is_say_so(page, address, capfd):
    answer = HTTP.get(page.url + address)
    assert answer.status_code >= 400 and re.fullmatch(r"[A-Z][^\n]{20,150}\.", sentence_of(answer.text))
    assert not re.search("SECRET|Traceback", answer.text + "".join(capfd.readouterr()))


@pytest.mark.parametrize(
    ("route", "body"),
    [
        ("queue/join", '{"data": [], "fn_index": 99999, "session_hash": "s"}'),
        ("queue/join", '{"data": [], "fn_index": 0, "session_hash": "s", "event_id": NaN}'),
        ("run/predict", '{"data": [], "fn_index": 1e400}'),
        ("run/SECRET", '{"data": []}'),
        ("component_server", '{"data": 1, "component_id": 99999, "session_hash": "s", "fn_name": "SECRET"}'),
        ("process_recording", ""),
    ],
)
def test_what_no_client_posts_is_the_senders_fault(page, route, body, capfd):
    sent = {"content": body, "headers": {"content-type": "application/json"}} if body else {"files": {"video": b"x"}}
    answer = HTTP.post(f"{page.url}gradio_api/{route}", **sent)
    assert 400 <= answer.status_code < 500 and sentence_of(answer.text)
    assert not re.search("SECRET|Traceback|error [0-9a-f]{6}", "".join(capfd.readouterr()))


def test_an_upload_without_a_name_is_refused_in_words(page):
    answer = HTTP.post(f"{page.url}gradio_api/upload", files={"files": ("", b"x")})
    assert answer.status_code == 400 and answer.text.startswith("Nothing was uploaded")


@pytest.mark.parametrize("part", ["bytes=0-5,7-9", "bytes=words"])
def test_several_parts_of_a_file_are_all_of_it(page, files, part):
    whole = Path(files.ann).read_bytes()
    answer = HTTP.get(f"{page.url}gradio_api/file={uploaded(page, files.ann)}", headers={"range": part})
    assert answer.status_code == 200 and answer.content == whole


def test_of_several_streams_of_one_session_none_breaks(page, capfd):
    address, one = f"{page.url}gradio_api/queue/data", {"session_hash": "twice"}
    page.pipe.fresh()
    with page.demo.listeners.stream("twice"):
        HTTP.post(f"{page.url}gradio_api/queue/join", json=one | {"fn_index": 0, "data": []})
    with ExitStack() as streams:
        for _ in range(3):  # one of them is told the end
            streams.enter_context(httpx.stream("GET", address, params=one))

    def unheard() -> bool:
        try:
            page.demo.listeners.await_one("twice", 0)
        except InputError:
            return True
        return False

    wait_for(unheard)
    assert HTTP.get(page.url).status_code == 200
    assert "Traceback" not in "".join(capfd.readouterr())


@pytest.mark.parametrize(
    ("message", "status", "said"),
    [
        ("[" * 100_000, 400, "none of the messages"),
        ('{"jsonrpc": "2.0", "id": 1, "method": "SECRET"}', 200, "none of the messages"),
        ('{"jsonrpc": "2.0", "method": "SECRET"}', 202, ""),
        ('{"jsonrpc": "2.0", "id": 1, "method": "prompts/get", "params": {"name": "SECRET"}}', 200, "no prompts"),
        (
            '{"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": 5, "arguments": ["SECRET"]}}',
            200,
            "",
        ),
        ('{"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": "SECRET\\ud83d"}}', 200, "no tool"),
        ("SECRET" * 10**6, 400, "upload the photos as files"),
    ],
)
def test_what_is_no_message_of_an_agent_is_refused_and_not_logged(page, message, status, said, capfd):
    pytest.importorskip("mcp", reason='the MCP server needs its extra: pip install "gradio[mcp]"')
    headers = {"accept": "application/json, text/event-stream", "content-type": "application/json"}
    answer = HTTP.post(f"{page.url}gradio_api/mcp/", content=message, headers=headers)
    assert answer.status_code == status and said in answer.text
    assert not re.search("SECRET|Traceback|pydantic", "".join(capfd.readouterr()))


def test_agents_are_told_apart_by_their_addresses(page, monkeypatch):
    pytest.importorskip("mcp", reason='the MCP server needs its extra: pip install "gradio[mcp]"')
    seen, tell = [], endpoints.visitor_of
    monkeypatch.setattr(endpoints, "visitor_of", lambda request: seen.append(tell(request)) or seen[-1])
    call = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": "preview", "arguments": {}}}
    for address in ("8.8.8.8", "9.9.9.9"):
        headers = {"accept": "application/json, text/event-stream", "x-forwarded-for": f"1.1.1.1, {address}"}
        assert "There is no photo yet" in HTTP.post(f"{page.url}gradio_api/mcp/", json=call, headers=headers).text
    assert [visitor.address for visitor in seen] == ["8.8.8.8", "9.9.9.9"]


def test_consent_and_limits_hold_on_the_route_itself(page, files):
    page.pipe.steps, photo = 0, Path(files.ann).read_bytes()
    assert "The consent must be true" in call(page, "generate", {"prompt": "", "consent": False}, photo)
    assert "choose a whole number" in call(page, "generate", {"prompt": "", "consent": True, "steps": 9999}, photo)
    assert page.pipe.steps == 0


@pytest.mark.parametrize("where", ["reference", "reference_3", "pose_photo"])
def test_addresses_are_not_fetched(page, files, where):
    file = {"path": "http://127.0.0.1:9/me.png", "meta": {"_type": "gradio.FileData"}}
    body = {"consent": True, "pose": "another photo", where: file}
    assert "upload the picture itself" in call(page, "generate", {"prompt": ""} | body)
    assert "upload the picture itself" in call(page, "preview", {k: v for k, v in body.items() if k != "consent"})


@pytest.mark.parametrize("path", ["/etc/passwd", "../../etc/passwd", "assets/../app.py", "tests/tiny.py", "aa/bb"])
def test_files_of_the_server_are_not_read(page, path):
    answer = call(page, "preview", {"reference": {"path": path, "meta": {"_type": "gradio.FileData"}}})
    assert "was not uploaded here" in sentence_of(answer)
    assert str(Path(__file__).parents[1]) not in answer


def bad_uploads(seed: int):
    """Endless bytes that are no photo of a face: noise, cut and flipped files, formats and sizes gone wrong."""
    rng = random.Random(seed)

    def picture(form: str, size=(96, 96), mode="RGB") -> bytes:
        file = io.BytesIO()
        Image.frombytes("RGB", size, rng.randbytes(3 * size[0] * size[1])).convert(mode).save(file, form)
        return file.getvalue()

    def flipped(data: bytes) -> bytes:
        spoiled = bytearray(data)
        for _ in range(rng.randint(1, 40)):
            spoiled[rng.randrange(len(spoiled))] = rng.randrange(256)
        return bytes(spoiled)

    kinds = [
        lambda: rng.randbytes(rng.randint(0, 4000)),
        lambda: picture(rng.choice(["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"]))[: rng.randint(1, 900)],
        lambda: flipped(picture("PNG"))[: rng.randint(20, 20_000)],
        lambda: b"\x89PNG\r\n\x1a\n" + rng.randbytes(200),
        lambda: b"%PDF-1.4 " + rng.randbytes(100),
        lambda: b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>",
        lambda: b"GIF89a" + bytes([rng.randrange(256) for _ in range(30)]),
        lambda: b"PK\x03\x04" + rng.randbytes(300),
        lambda: picture("PPM"),
        lambda: picture("PNG", size=(rng.randint(1, 3), rng.randint(1, 3)), mode=rng.choice(["L", "1", "P", "RGBA"])),
        lambda: json.dumps({"path": "/etc/passwd"}).encode(),
        lambda: b"",
    ]
    while True:
        yield rng.choice(kinds)()


def test_two_hundred_bad_uploads_get_two_hundred_answers(page):
    """As a stranger sends them: each is uploaded and asked for, and what comes back is a sentence."""
    page.pipe.fresh()
    said = []
    with ThreadPoolExecutor(8) as strangers:
        answers = list(strangers.map(partial(call, page, "preview", {}), islice(bad_uploads(0), 200)))
    said = [sentence_of(answer) for answer in answers if "event: complete" not in answer]
    assert len(said) > 140  # spoiled bytes may still be a picture, and the tiny analyser sees a face in any
    assert not [words for words in said if not re.fullmatch(r"[A-Z][^\n]{15,150}\.", words) or "/" in words]


STRANGE = [
    *(
        "words",
        "",
        "\ud800",
        "\u202e",
        "1e999",
        "9" * 5000,
        "x" * 3000,
        "/etc/passwd",
        "../../x",
        "http://127.0.0.1/x.png",
    ),
    *("data:image/png;base64,!", "data:text/plain,x", True, False, 0, -1, 10**400, 1e308, float("nan"), float("inf")),
    *(["a"], [], [[[]]], {}, {"a": 1}, {"path": None}, {"path": 5}, {"path": ["x"]}, {"path": "/tmp"} | FILE),
    *({"url": "http://127.0.0.1/"} | FILE, {"path": "x", "is_stream": True} | FILE, {"path": "\ud800"} | FILE),
]


def test_every_strange_value_of_every_parameter_gets_a_sentence(page, files):
    page.pipe.fresh()
    path = uploaded(page, files.ann)
    rng, good = random.Random(1), {"reference": path, "consent": True}
    cases = [(name, value) for name in SPECS for value in STRANGE]
    with ThreadPoolExecutor(8) as strangers:
        asked = rng.sample(cases, 300)
        answers = list(strangers.map(lambda case: call(page, "generate", good | {case[0]: case[1]}), asked))
    for (name, value), answer in zip(asked, answers, strict=True):
        if "event: complete" not in answer:
            said = sentence_of(answer)
            assert re.fullmatch(r"[A-Z“][^\n]{10,400}[.?]", said) and "facesnap-" not in said, (name, value, said)


@pytest.mark.parametrize(
    ("name", "body", "said"),
    [
        ("preview", "{", "no JSON"),
        ("preview", "[1]", "must be a JSON object"),
        ("preview", '{"steps": 4}', "There is no parameter 'steps'"),
        ("generate", '{"yaww": 4}', "did you mean 'yaw'"),
        ("generat", "{}", "did you mean 'generate'"),
        ("generate", "[" * 100_000, "no JSON"),
    ],
)
def test_malformed_requests_get_sentences(page, name, body, said):
    answer = HTTP.post(
        f"{page.url}gradio_api/call/v2/{name}", content=body, headers={"content-type": "application/json"}
    )
    assert answer.status_code == 400 and said in sentence_of(answer.text)


def test_prompts_and_names_of_files_never_reach_the_log(page, files, capfd, caplog):
    page.pipe.fresh()
    path = uploaded(page, files.ann, "SECRET.png")
    order = {"reference": path, "consent": True, "prompt": "SECRET words " * 30}  # more than the model reads
    assert "event: complete" in call(page, "generate", order)
    for spoiled in (
        {"steps": "SECRET"},
        {"reference": "SECRET"},
        {"reference": {"path": "SECRET"} | FILE},
        {"SECRET": 1},
    ):
        sentence_of(call(page, "generate", order | spoiled))
    page.pipe.fails = True
    assert "Something went wrong" in call(page, "generate", order)
    for number, event in page.demo.fns.items():  # the page's own events, some of which need no queue
        body = {"fn_index": number, "data": ["SECRET"] * len(event.inputs), "session_hash": "stranger"}
        HTTP.post(f"{page.url}gradio_api/run/predict", json=body)
    assert "SECRET" not in "".join(capfd.readouterr()) + caplog.text


def test_folders_links_and_foreign_files_are_no_photos_and_deletion_goes_on(page, files, tmp_path):
    path = Path(uploaded(page, files.ann))
    link = path.parent / "link.png"
    link.symlink_to("/etc/passwd")
    for place in (path.parent, path.parent.parent, link, tmp_path, Path(files.ann), path.parent / ".." / "x"):
        for form in (str(place), {"path": str(place), "meta": {"_type": "gradio.FileData"}}):
            assert "not uploaded here" in call(page, "preview", {"reference": form})
    body = {"data": [{"path": str(path.parent.parent), "meta": {"_type": "gradio.FileData"}}], "session_hash": "s"}
    with page.demo.listeners.stream("s"):
        for number, event in page.demo.fns.items():  # the page's own events, too
            sent = body | {"fn_index": number, "data": body["data"] * max(1, len(event.inputs))}
            HTTP.post(f"{page.url}gradio_api/queue/join", json=sent)
    link.unlink()
    uploads.sweep(uploads.folder(), -1, frozenset(uploads.page_files))
    assert not path.exists()


def test_uploads_and_forms_that_programs_send(page, files):
    data = Path(files.ann).read_bytes()
    path = uploaded(page, files.ann)
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    seen = [call(page, "preview", {"reference": form, "width": "64"}) for form in (path, url, {"path": path})]
    assert all("event: complete" in answer for answer in seen)
    assert "event: complete" in call(page, "preview", {"reference": path, "pose_photo": url})
    assert 'the pose is \\"front\\"' in call(page, "preview", {"reference": path, "pose_photo": url, "pose": "front"})

"""The endpoints, as programs, agents and attackers call them, over a tiny FaceSnap with random weights (served.py)."""

import base64
import io
import json
import random
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path

import httpx
import numpy as np
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image
from served import MOST_WAITING, idle, wait_for

from facesnap.web import server, uploads
from facesnap.web.request import SPECS
from facesnap.web.words import likeness

ROOT = Path(__file__).parents[1]


def order(files, **changes) -> dict:
    """Arguments of a call; every name that holds a photo is given as its path."""
    arguments = {"reference": files.ann, "prompt": "by the sea", "consent": True, "api_name": "/generate", **changes}
    photos = ("reference", "reference_2", "reference_3", "reference_4", "pose_photo")
    return {key: handle_file(value) if key in photos and value else value for key, value in arguments.items()}


# The two endpoints ----------------------------------------------------------------------------------------

EXTRA = dict.fromkeys(("reference_2", "reference_3", "reference_4"))
PREVIEW = {
    "reference": None,
    "pose": "as in the photo",
    "pose_photo": None,
    **EXTRA,
    "expression": "pose",
    "expression_strength": 1.0,
    "yaw": 0.0,
    "pitch": 0.0,
    "roll": 0.0,
    "head_size": 1.0,
    "width": None,
    "height": None,
    "expressions": None,
}
GENERATE = {
    "reference": None,
    "prompt": "",
    "consent": False,
    "pose": "as in the photo",
    "pose_photo": None,
    **EXTRA,
    "style": "no style",
    "negative_prompt": "",
    "preset": "best",
    "steps": None,
    "guidance": None,
    "identity_strength": 1.0,
    "landmark_strength": 1.0,
    **{name: PREVIEW[name] for name in list(PREVIEW)[6:-1]},
    "count": 1,
    "scheduler": "the model's own",
    "seed": -1,
    "expressions": None,
}


def test_signatures_are_pinned(client):
    api = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    assert set(api) == {"/preview", "/generate"}  # the page's own events are private
    for name, wanted in (("/preview", PREVIEW), ("/generate", GENERATE)):
        parameters = api[name]["parameters"]
        assert {p["parameter_name"]: p["parameter_default"] for p in parameters} == wanted
        assert [p["parameter_name"] for p in parameters] == list(wanted)
        types = {p["parameter_name"]: p["python_type"]["type"] for p in parameters}
        assert (
            types["reference"] == types["reference_4"] == "filepath"
            and types["yaw"] == "float"
            and types["pose"] == "str"
        )
        for p in parameters:  # each says what it means and, but for photos and texts, what it may be
            said, spec = p["python_type"]["description"], SPECS[p["parameter_name"]]
            assert said.startswith(spec.text) and all(choice in said for choice in spec.choices if spec.choices)
            assert spec.kind != "number" or re.search(r"-?[\d.]+ to -?[\d.]+", said)
    assert [r["label"] for r in api["/preview"]["returns"]] == ["picture", "report"]
    assert [r["label"] for r in api["/generate"]["returns"]] == ["pictures", "report"]


def test_preview_draws_the_landmarks_and_says_which_face(client, files):
    def look(**arguments):
        return client.predict(**{"reference": handle_file(files.ann)} | arguments, api_name="/preview")

    own, report = look()
    assert np.array(report["landmarks"]).shape == (72, 2)
    assert report["faces_in_photos"] == [1] and report["notes"] == []
    assert Image.open(own).size == (report["width"], report["height"])

    changes = [
        {"pose": "quarter-left"},
        {"pose": "another photo", "pose_photo": handle_file(files.bob)},
        {"yaw": 20},
        {"head_size": 0.8},
        {"expression": "neutral"},
        {"expressions": {"smile": 0.8}},
        {"reference_2": handle_file(files.ann_too)},
    ]
    seen = [report["landmarks"]] + [look(**change)[1]["landmarks"] for change in changes]
    assert all(one != other for k, one in enumerate(seen) for other in seen[:k])

    wide, report = look(width=96, height=48)
    assert Image.open(wide).size == (96, 48)
    _, crowd = look(reference=handle_file(files.group))
    assert crowd["faces_in_photos"] == [2] and "2 faces" in crowd["notes"][0]


def test_generate_gives_a_marked_portrait_that_its_seed_repeats(client, page, files):
    (path,), report = client.predict(**order(files, seed=7))
    portrait = Image.open(path)
    wanted = {"seed": 7, "steps": 2, "prompt": "by the sea", "mode": "best", "model": "tiny", "width": 64}
    assert wanted.items() <= report.items()
    assert report["likeness"] == likeness(report["identity_score"], page.pipe.settings)
    assert set(report["seconds"]) == {"faces", "waiting", "making", "total"}
    assert "generated by a model" in report["licence"] and len(report["face_box"]) == 4
    assert portrait.text["seed"] == "7" and "trainedAlgorithmicMedia" in str(portrait.info)

    again, _ = client.predict(**order(files, seed=7))
    other, fresh = client.predict(**order(files))
    assert np.array_equal(portrait, Image.open(again[0]))
    assert fresh["seed"] != 7 and not np.array_equal(portrait, Image.open(other[0]))


def test_several_pictures_count_their_seeds_up_and_equal_single_ones(client, files):
    paths, report = client.predict(**order(files, seed=7, count=3))
    assert [made["seed"] for made in report["pictures"]] == [7, 8, 9]
    single, _ = client.predict(**order(files, seed=9))
    assert np.array_equal(Image.open(paths[2]), Image.open(single[0]))


@pytest.mark.parametrize(
    "change",
    [
        {"style": "pencil sketch"},
        {"scheduler": "Euler"},
        {"expression": "neutral"},
        {"reference_2": "ann_too"},
        {"preset": "fast"},
        {"negative_prompt": "rain"},
    ],
)
def test_what_is_asked_for_reaches_the_picture(client, files, change):
    if change.get("reference_2"):
        change = {"reference_2": files.ann_too}
    plain, _ = client.predict(**order(files, seed=7))
    changed, report = client.predict(**order(files, seed=7, **change))
    assert not np.array_equal(Image.open(plain[0]), Image.open(changed[0]))
    if "scheduler" in change:
        assert report["scheduler"] == "EulerDiscreteScheduler"


def test_generate_reports_every_step(client, page, files):
    page.pipe.pause = 0.2
    job = client.submit(**order(files, steps=4))
    job.result(timeout=120)
    steps = [report["step"] for _, report in job.outputs() if "step" in report]
    assert steps == sorted(steps) and steps[-1] == 4


# Refusals -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"consent": False}, "tick the box"),
        ({"consent": "yes"}, "tick the box"),
        ({"reference": None}, "There is no photo"),
        ({"reference_4": "words"}, "Photo 2: This file is not a picture"),
        ({"pose": "another photo"}, "no photo of a pose"),
        ({"pose": "quarter-lft"}, "quarter-left"),
        ({"pose": "/etc/passwd"}, "There is no pose"),
        ({"prompt": "x" * 10_000}, "10000 characters"),
        ({"prompt": 5}, "The prompt must be text"),
        ({"style": "fresco"}, "There is no style 'fresco'"),
        ({"preset": "fastest"}, "did you mean 'fast'"),
        ({"scheduler": "Euler b"}, "did you mean 'Euler"),
        ({"expression": "angry"}, "There is no expression"),
        ({"steps": 500}, "steps is 500; choose a whole number between 1 and 50"),
        ({"steps": "many"}, "steps is many"),
        ({"guidance": 0}, "guidance is 0"),
        ({"yaw": 90}, "yaw is 90; choose a number between -45 and 45"),
        ({"head_size": 3}, "head size is 3"),
        ({"count": 9}, "count is 9"),
        ({"seed": -5}, "seed is -5"),
        ({"width": 70}, "not a multiple of 16"),
        ({"width": 128, "height": 128}, "make it smaller"),
        ({"width": 1_000_000}, "width is 1000000"),
        ({"reference": "faceless"}, "No face"),
        ({"reference": "cut"}, "damaged"),
        ({"reference": "huge"}, "12000 × 12000"),
    ],
)
def test_refusals_are_sentences(client, files, changes, words):
    uploads = {key: getattr(files, value) for key, value in changes.items() if "reference" in key and value}
    with pytest.raises((AppError, ValueError)) as refusal:
        client.predict(**order(files, **changes | uploads))
    said = str(refusal.value)
    assert words in said
    assert "/" not in said.replace("/etc/passwd", "")  # no path but the visitor's own words


def test_the_servers_own_errors_stay_with_the_server(client, page, files):
    page.pipe.fails = True
    with pytest.raises(AppError, match="Something went wrong") as refusal:
        client.predict(**order(files))
    assert "secret" not in str(refusal.value)


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


HTTP = httpx.Client(timeout=120)


def post(page, name: str, body: str):
    return HTTP.post(f"{page.url}gradio_api/call/v2/{name}", content=body, headers={"content-type": "application/json"})


def call(page, name: str, body: dict, upload: bytes | None = None) -> str:
    """What /call answers, as text: the refusal at the door, or the last event of the stream."""
    if upload is not None:
        sent = HTTP.post(f"{page.url}gradio_api/upload", files={"files": ("me.png", upload)})
        assert sent.status_code < 500
        path = sent.json()[0] if sent.status_code == 200 else None
        body = body | {"reference": {"path": path, "meta": {"_type": "gradio.FileData"}}}
    joined = post(page, name, json.dumps(body))
    if joined.status_code != 200:
        return joined.text
    events = HTTP.get(f"{page.url}gradio_api/call/{name}/{joined.json()['event_id']}").text
    return events.strip().split("\n\n")[-1]


def test_consent_and_limits_hold_on_the_route_itself(page, files):
    page.pipe.steps, photo = 0, Path(files.ann).read_bytes()
    assert "tick the box" in call(page, "generate", {"prompt": "", "consent": False}, photo)
    assert "choose a whole number" in call(page, "generate", {"prompt": "", "consent": True, "steps": 9999}, photo)
    assert page.pipe.steps == 0


@pytest.mark.parametrize("where", ["reference", "reference_3", "pose_photo"])
def test_addresses_are_not_fetched(page, files, where):
    file = {"path": "http://127.0.0.1:9/me.png", "meta": {"_type": "gradio.FileData"}}
    body = {"consent": True, "pose": "another photo", where: file}
    assert "upload the picture itself" in call(page, "generate", {"prompt": ""} | body)
    assert "upload the picture itself" in call(page, "preview", {k: v for k, v in body.items() if k != "consent"})


@pytest.mark.parametrize("path", ["/etc/passwd", "../../etc/passwd", "assets/../app.py"])
def test_files_of_the_server_are_not_read(page, path):
    answer = call(page, "preview", {"reference": {"path": path, "meta": {"_type": "gradio.FileData"}}})
    assert "error" in answer and "root:" not in answer
    assert str(ROOT) not in answer


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


def sentence_of(answer: str) -> str:
    """What is said, at the door or by the last event."""
    door = answer.startswith("{")
    assert door or answer.startswith("event: error\ndata: {"), answer
    said = json.loads(answer if door else answer.partition("data: ")[2])["detail" if door else "error"]
    assert isinstance(said, str) and "Something went wrong" not in said and "Traceback" not in said, answer
    return said


FILE = {"meta": {"_type": "gradio.FileData"}}
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
    path = HTTP.post(f"{page.url}gradio_api/upload", files={"files": Path(files.ann).read_bytes()}).json()[0]
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
    path = HTTP.post(f"{page.url}gradio_api/upload", files={"files": ("SECRET.png", Path(files.ann).read_bytes())})
    order = {"reference": path.json()[0], "consent": True, "prompt": "SECRET words " * 30}  # more than the model reads
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
    assert "SECRET" not in "".join(capfd.readouterr()) + caplog.text


def test_folders_links_and_foreign_files_are_no_photos_and_deletion_goes_on(page, files, tmp_path):
    path = Path(HTTP.post(f"{page.url}gradio_api/upload", files={"files": Path(files.ann).read_bytes()}).json()[0])
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
    uploads.sweep(uploads.folder(), -1, frozenset(uploads._page_files))
    assert not path.exists()


def test_an_order_that_nobody_listens_to_is_not_made(page, files, monkeypatch):
    monkeypatch.setattr("facesnap.web.line.PATIENCE", 0.5)
    page.pipe.fresh()
    path = HTTP.post(f"{page.url}gradio_api/upload", files={"files": Path(files.ann).read_bytes()}).json()[0]
    order = {"reference": path, "consent": True, "steps": 50}
    posts = [post(page, "generate", json.dumps(order)) for _ in range(17)]
    refused = [sentence_of(answer.text) for answer in posts if answer.status_code != 200]
    assert refused and all("faster than it listens" in said for said in refused)
    time.sleep(0.6)  # until the address may ask again
    answer = call(page, "generate", order | {"steps": 2})
    assert "event: complete" in answer and page.pipe.steps == 2


def test_uploads_and_forms_that_programs_send(page, files):
    data = Path(files.ann).read_bytes()
    path = HTTP.post(f"{page.url}gradio_api/upload", files={"files": ("me.png", data)}).json()[0]
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    seen = [call(page, "preview", {"reference": form, "width": "64"}) for form in (path, url, {"path": path})]
    assert all("event: complete" in answer for answer in seen)
    assert "event: complete" in call(page, "preview", {"reference": path, "pose_photo": url})
    assert 'the pose is \\"front\\"' in call(page, "preview", {"reference": path, "pose_photo": url, "pose": "front"})


def test_nothing_of_the_photos_metadata_goes_into_the_portrait(client, page, files, tmp_path):
    exif = Image.Exif()
    exif[0x010E] = "SECRETPLACE"
    exif.get_ifd(0x8825)[1] = "N"
    photo = Image.open(files.ann)
    photo.save(tmp_path / "gps.png", exif=exif)
    for path in (
        client.predict(reference=handle_file(str(tmp_path / "gps.png")), api_name="/preview")[0],
        client.predict(**order(files, reference=str(tmp_path / "gps.png")))[0][0],
    ):
        assert b"SECRETPLACE" not in Path(path).read_bytes() and not Image.open(path).getexif()
        assert b"gps" not in Path(path).read_bytes()


def test_visitors_files_go_with_the_page(pipe, files):
    demo = server.build(pipe)
    _, url, _ = server.launch(demo, prevent_thread_lock=True, quiet=True)
    try:
        sent = httpx.post(f"{url}gradio_api/upload", files={"files": ("me.png", Path(files.ann).read_bytes() + b"!")})
        (portrait,), _ = Client(url, verbose=False, download_files=False).predict(**order(files))
        kept = [Path(sent.json()[0]), Path(portrait["path"])]
        assert all(path.exists() and path.is_relative_to(uploads.folder()) for path in kept)
    finally:
        demo.close()
    wait_for(lambda: not any(path.exists() for path in kept))


def test_a_sweep_deletes_what_is_old_and_survives_what_it_cannot(tmp_path, monkeypatch):
    old, stuck, own = (tmp_path / name / "photo" for name in ("old", "stuck", "own"))
    for path in (old, stuck, own):
        path.parent.mkdir()
        path.write_bytes(b"x")
    unlink = Path.unlink
    monkeypatch.setattr(Path, "unlink", lambda self: (_ for _ in ()).throw(OSError) if self == stuck else unlink(self))
    uploads.sweep(tmp_path, 3600, frozenset({own}))
    assert old.exists()  # it is young
    uploads.sweep(tmp_path, -1, frozenset({own}))
    assert not old.parent.exists() and stuck.exists() and own.exists()
    assert uploads.EVERY + uploads.OLDEST < 3600


def test_what_a_killed_server_left_is_deleted_at_the_next_start(monkeypatch, tmp_path):
    monkeypatch.setattr(uploads.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")
    ours = uploads.folder().parent
    assert ours.stat().st_mode & 0o077 == 0  # nobody else's
    dead, reused = ours.parent / "999999999-1", ours.parent / f"{ours.name.partition('-')[0]}-1"
    for left in (dead, reused):
        (left / "hash").mkdir(parents=True)
        (left / "hash" / "face.png").write_bytes(b"x")
    (ours / "mine").mkdir()
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")  # as at a start
    assert uploads.folder().parent == ours and (ours / "mine").exists() and not dead.exists() and not reused.exists()


# Many at once ---------------------------------------------------------------------------------------------


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
    sent = httpx.post(f"{page.url}gradio_api/upload", files={"files": Path(files.ann).read_bytes()}).json()
    body = {"reference": {"path": sent[0], "meta": {"_type": "gradio.FileData"}}, "prompt": "", "consent": True}
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


# As the documentation says ---------------------------------------------------------------------------------


def example(language: str, page, files, folder: Path) -> str:
    """The code block in that language of docs/api.md, for this server, with a photo beside it."""
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    code = re.search(rf"```{language}\n(.*?)```", text, re.S).group(1)
    shutil.copy(files.ann, folder / "me.jpg")
    page.pipe.fresh()
    return code.replace("http://127.0.0.1:7860", page.url.rstrip("/"))


def run(*command: str, folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_documented_python(page, files, tmp_path):
    code = example("python", page, files, tmp_path)
    path, seed, *words = run(sys.executable, "-c", code, folder=tmp_path).strip().splitlines()[-1].split()
    assert Image.open(path).size == (64, 64) and int(seed) >= 0 and "likeness" in words


def test_the_documented_javascript(page, files, tmp_path):
    if not shutil.which("npm") or not shutil.which("node"):
        pytest.skip("JavaScript's example needs node and npm: apt-get install nodejs npm")
    installed = subprocess.run(
        ["npm", "install", "--no-audit", "--no-fund", "@gradio/client"], cwd=tmp_path, capture_output=True, timeout=300
    )
    if installed.returncode:
        pytest.skip("npm cannot reach a registry here, and JavaScript's example needs @gradio/client from it")
    (tmp_path / "example.mjs").write_text(example("js", page, files, tmp_path))
    said = run("node", "example.mjs", folder=tmp_path)
    assert said.startswith("http") and "likeness" in said


def test_the_documented_curl(page, files, tmp_path):
    if not shutil.which("curl"):
        pytest.skip("curl's example needs curl: apt-get install curl")
    said = run("bash", "-euc", example("bash", page, files, tmp_path), folder=tmp_path)
    assert "event: complete" in said and '"seed"' in said and '.png"' in said


def test_agents_find_and_call_the_two_tools(page, files):
    pytest.importorskip("mcp", reason='the MCP server needs its extra: pip install "gradio[mcp]"')
    import asyncio

    from mcp import ClientSession
    from mcp.client.streamable_http import streamablehttp_client

    page.pipe.fresh()
    photo = "data:image/png;base64," + base64.b64encode(Path(files.ann).read_bytes()).decode()

    async def talk():
        async with streamablehttp_client(f"{page.url}gradio_api/mcp/") as (reading, writing, _):
            async with ClientSession(reading, writing) as session:
                await session.initialize()
                tools = {tool.name: tool for tool in (await session.list_tools()).tools}
                asked = {"reference": photo, "prompt": "by the sea", "consent": True, "seed": 3}
                made = await session.call_tool(next(name for name in tools if "generate" in name), asked)
                refused = await session.call_tool(next(n for n in tools if "generate" in n), asked | {"consent": False})
                return tools, made, refused

    with ThreadPoolExecutor(1) as thread:  # the browser's tests leave a loop running in this one
        tools, made, refused = thread.submit(asyncio.run, talk()).result()
    assert len(tools) == 2 and all(any(word in name for word in ("preview", "generate")) for name in tools)
    assert not made.isError and '"seed": 3' in str(made.content).replace("'", '"')
    assert refused.isError and "tick the box" in str(refused.content)

"""Calls of the endpoints, as Gradio's client and as any program makes them; helpers of several tests."""

import json
from pathlib import Path

import httpx
from gradio_client import handle_file

from facesnap.web.request import PortraitRequest


def order(files, **changes) -> dict:
    """Arguments of a call; every name that holds a photo is given as its path."""
    arguments = {"reference": files.ann, "prompt": "by the sea", "consent": True, "api_name": "/generate", **changes}
    photos = ("reference", "reference_2", "reference_3", "reference_4", "pose_photo")
    return {key: handle_file(value) if key in photos and value else value for key, value in arguments.items()}


HTTP = httpx.Client(timeout=120)


FILE = {"meta": {"_type": "gradio.FileData"}}


def uploaded(page, photo: str, name: str = "me.png") -> str:
    """Where the server keeps the photo that was just sent to it."""
    return HTTP.post(f"{page.url}gradio_api/upload", files={"files": (name, Path(photo).read_bytes())}).json()[0]


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


def sentence_of(answer: str) -> str:
    """What is said, at the door or by the last event."""
    door = answer.startswith("{")
    assert door or answer.startswith("event: error\ndata: {"), answer
    said = json.loads(answer if door else answer.partition("data: ")[2])["detail" if door else "error"]
    assert isinstance(said, str) and "Something went wrong" not in said and "Traceback" not in said, answer
    return said


def studio_order(files, **changes) -> PortraitRequest:
    return PortraitRequest(**{"reference": files.ann, "consent": True, "steps": 3, "seed": 1} | changes)

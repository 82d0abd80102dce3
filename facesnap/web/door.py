"""What stands between the network and Gradio: one sentence for every request that Gradio would only call an error.

An ASGI middleware. It reads what is posted to the endpoints before Gradio does, says in words what is wrong with it,
puts sentences in the place of bare statuses, and notes who listens to a stream of answers (`line.Listeners`).
"""

import html
import ipaddress
import json
import re
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from typing import Any
from urllib.parse import parse_qs

import gradio as gr
from fastapi import HTTPException

from facesnap.errors import InputError, did_you_mean, shown
from facesnap.web.line import Allowance, Listeners, Visitor
from facesnap.web.uploads import MOST_BYTES
from facesnap.web.words import sentence

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

API = "/gradio_api"
MOST_BODY = 8 * MOST_BYTES  # five pictures as data: URLs, and some
MOST_SENT = 25 * MOST_BYTES  # by one address in an hour
BY_STATUS = {
    401: "Please log in first.",
    403: "This is not given out.",
    404: "There is nothing at this address: “Use via API” at the foot of the page lists what there is.",
    405: "This address does not take that kind of request: “Use via API” at the foot of the page shows how to ask.",
    413: f"The file is larger than {MOST_BYTES // 2**20} MB: make it smaller.",
    503: "The queue is full: please try again in a minute.",
}
NOT_FOUND = b'"404: Not Found"'
NO_STREAM = b'"Nobody asked for this here, or its answer has been read already: please ask again."'
MALFORMED = "The request is not of the form that the page's clients send: “Use via API” at its foot shows it."


class Door:
    """endpoints: the names of each endpoint's parameters."""

    def __init__(self, app: Any, listeners: Listeners, endpoints: Mapping[str, Sequence[str]]) -> None:
        self.app, self.listeners, self.endpoints = app, listeners, endpoints
        self.allowance = Allowance(MOST_SENT)

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        if scope["type"] != "http" or API + "/" not in path or f"{API}/mcp" in path:
            await self.app(scope, receive, send)
            return
        route = path.partition(API + "/")[2].strip("/").split("/")
        if scope["method"] == "GET" and (session := _stream_of(route, scope)):
            with self.listeners.stream(session, _address_of(scope)):
                await self._stream(scope, receive, send)
            return
        answer = _Answer(send, plain=route[0] == "upload")  # which the page shows as it is
        try:
            if scope["method"] == "POST":
                receive = self._counted(receive, _address_of(scope))
            if scope["method"] == "POST" and route[0] in ("call", "queue"):
                receive = await self._checked(route, receive, _address_of(scope))
            await self.app(scope, receive, answer)
        except InputError as error:
            await answer.say(str(error), 400)
        except Exception as error:
            await answer.say(sentence(error), 500)

    async def _stream(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """A stream of answers. One that nobody asked for ends with a bare status and an error in the log."""

        async def worded(message: Message) -> None:
            if NOT_FOUND in (body := message.get("body", b"")):
                message["body"] = body.replace(NOT_FOUND, NO_STREAM)
            await send(message)

        try:
            await self.app(scope, receive, worded)
        except RuntimeError as error:  # so Starlette calls a status that comes after the headers
            if not isinstance(error.__cause__, HTTPException):
                raise
            await send({"type": "http.response.body", "body": b""})

    def _counted(self, receive: Receive, address: str) -> Receive:
        async def counted() -> Message:
            message = await receive()
            if size := len(message.get("body", b"")):
                self.allowance.take(address, size)
            return message

        return counted

    async def _checked(self, route: Sequence[str], receive: Receive, address: str) -> Receive:
        """The request's body again, once it is known to be of the right form; InputError otherwise, and where the
        address only asks."""
        body = await _body(receive)
        if body is None:
            return receive
        try:
            given = json.loads(body)
        except (ValueError, RecursionError):
            raise InputError("The request's body is no JSON that can be read here.") from None
        if not isinstance(given, dict):
            raise InputError(f"The request's body must be a JSON object, not {type(given).__name__}.")
        if route[0] == "call":
            self._check_call(route, given)
            given.pop("session_hash", None)  # each call has a session and a stream of its own
        elif not isinstance(given.get("data"), list) or not isinstance(given.get("session_hash"), str):
            raise InputError(MALFORMED)
        self.listeners.ask(given.get("session_hash"), address)
        sent = [json.dumps(given).encode()]

        async def again() -> Message:
            if sent:
                return {"type": "http.request", "body": sent.pop(), "more_body": False}
            return await receive()

        return again

    def _check_call(self, route: Sequence[str], given: Mapping[str, Any]) -> None:
        name, by_name = route[-1], route[1:2] == ["v2"]
        if name not in self.endpoints:
            raise InputError(f"There is no endpoint {shown(name)!r}; {did_you_mean(name, self.endpoints)}")
        known = self.endpoints[name]
        if by_name:
            for key in given:
                if key not in known and key != "oauth_token":
                    raise InputError(f"There is no parameter {shown(key)!r}; {did_you_mean(key, known)}")
        elif not isinstance(given.get("data"), list) or len(given["data"]) != len(known):
            raise InputError(f'The request must have "data", a list of {len(known)} values: {", ".join(known)}.')


class _Answer:
    """Passes an answer on, but puts a sentence in the place of an error's body."""

    def __init__(self, send: Send, *, plain: bool) -> None:
        self._send, self._plain = send, plain
        self._begun, self._status, self._body = False, 0, b""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start" and message["status"] >= 400:
            self._status = message["status"]
        elif self._status and message["type"] == "http.response.body":
            self._body += message.get("body", b"")
            if not message.get("more_body"):
                await self.say(self._words(), self._status)
        else:
            self._begun = True
            await self._send(message)

    async def say(self, words: str, status: int) -> None:
        if self._begun:  # half an answer cannot be taken back
            return
        self._begun, self._status = True, 0
        body = (words if self._plain else json.dumps({"detail": words}, ensure_ascii=False)).encode()
        kind = b"text/plain; charset=utf-8" if self._plain else b"application/json"
        headers = [(b"content-type", kind), (b"content-length", str(len(body)).encode())]
        await self._send({"type": "http.response.start", "status": status, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})

    def _words(self) -> str:
        """Gradio's own words about a queue and its direct routes; what else it says is about the server."""
        try:
            detail = json.loads(self._body).get("detail")
        except (ValueError, AttributeError):
            detail = None
        if isinstance(detail, str) and detail.startswith("This API endpoint does not accept direct"):
            return "This endpoint is asked through the queue: “Use via API” at the foot of the page shows how."
        return BY_STATUS.get(self._status, MALFORMED)


def _stream_of(route: Sequence[str], scope: Mapping[str, Any]) -> str | None:
    """The session whose answers a request listens to; a call's is its own event."""
    if route == ["queue", "data"]:
        return parse_qs(scope.get("query_string", b"").decode("latin-1")).get("session_hash", [None])[0]
    return route[-1] if route[0] == "call" and len(route) > 2 else None


async def _body(receive: Receive) -> bytes | None:
    """The whole body; None where the client went away."""
    parts: list[bytes] = []
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        parts.append(message.get("body", b""))
        if sum(map(len, parts)) > MOST_BODY:
            raise InputError(f"The request is larger than {MOST_BODY // 2**20} MB: upload the photos as files.")
        if not message.get("more_body"):
            return b"".join(parts)


# ---------------------------------------------------------------------- who asks, and what they may read


def visitor_of(request: gr.Request) -> Visitor:
    """Where a request comes from. Behind a proxy it is the last address on the way that is not of a private network:
    what stands before it was written by the caller."""
    peer = request.client.host if request.client else ""
    return Visitor(_beyond_proxies(peer, request.headers.get("x-forwarded-for", "")), request.session_hash or "")


def _address_of(scope: Mapping[str, Any]) -> str:
    """The same of an ASGI request."""
    forwarded = [value.decode("latin-1") for name, value in scope.get("headers", []) if name == b"x-forwarded-for"]
    return _beyond_proxies((scope.get("client") or ("",))[0], ",".join(forwarded))


def _beyond_proxies(peer: str, forwarded: str) -> str:
    hops = [hop.strip() for hop in forwarded.split(",")]
    if hops == [""] or _is_public(peer):
        return peer
    return next((hop for hop in reversed(hops) if _is_public(hop)), hops[-1])


def _is_public(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_global
    except ValueError:
        return False


def for_visitors(error: Exception) -> str:
    """What a visitor may read of an error; Gradio's own are meant for visitors (a GPU quota that is used up), and may
    hold the HTML of a toast."""
    if not isinstance(error, gr.Error):
        return sentence(error)
    return html.unescape(re.sub(r"<[^>]*>", "", str(error.message))).strip()

"""What stands between the network and Gradio: one sentence for every request that Gradio would only call an error.

An ASGI middleware. It reads what is posted before Gradio does, says in words what is wrong with it, puts sentences in
the place of bare statuses, and notes who listens to a stream of answers (`line.Listeners`). What Gradio serves beside
that, and this page has no use for, is shut.
"""

import html
import ipaddress
import json
import re
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, MutableMapping, Sequence
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
MOST_MESSAGE = 4 * 2**20  # of an agent, whose library takes no more
MOST_SENT = 25 * MOST_BYTES  # by one address in an hour
BY_STATUS = {
    401: "Please log in first.",
    403: "This is not given out.",
    404: "There is nothing at this address: “Use via API” at the foot of the page lists what there is.",
    405: "This address does not take that kind of request: “Use via API” at the foot of the page shows how to ask.",
    413: f"The file is larger than {MOST_BYTES // 2**20} MB: make it smaller.",
    503: "The queue is full: please try again in a minute.",
}
# Gradio's own, which nothing here needs: they look things up by a stranger's words, print them, keep what is sent in
# other folders, fetch addresses, or are asked twenty times a second.
SHUT = {
    *("component_server", "custom_component", "deep_link", "dev", "file", "process_recording", "profiling"),
    *("run-history", "runs", "stream", "undo-vibe-edit", "vibe-code", "vibe-edit", "vibe-starter-queries"),
}
SHUT_BEGINNINGS = ("proxy=", "file=http:", "file=https:")
LONGEST_NAME = 255  # bytes: no file has a longer one
NOT_FOUND = b'"404: Not Found"'
NO_STREAM = b'"Nobody asked for this here, or its answer has been read already: please ask again."'
NO_FILE = "Nothing was uploaded: send a form with the files, each with a name, as “files”."
QUEUED = "This endpoint is asked through the queue: “Use via API” at the foot of the page shows how."
MALFORMED = "The request is not of the form that the page's clients send: “Use via API” at its foot shows it."


class Refused(Exception):
    """What is answered at the door, as it is."""

    def __init__(self, body: bytes, status: int) -> None:
        super().__init__(status)
        self.body, self.status = body, status


class Door:
    """endpoints: the names of each endpoint's parameters. events: the numbers of the page's events. check_message:
    raises Refused for what an agent sent and is no message; None where the page is no MCP server."""

    def __init__(
        self,
        app: Any,
        listeners: Listeners,
        endpoints: Mapping[str, Sequence[str]],
        *,
        events: Collection[int] = (),
        check_message: Callable[[bytes], None] | None = None,
    ) -> None:
        self.app, self.listeners, self.endpoints = app, listeners, endpoints
        self.events, self.check_message = events, check_message
        self.allowance = Allowance(MOST_SENT)

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope.get("path", "")
        route = path.partition(API + "/")[2].strip("/").split("/")
        answer = _Answer(send, plain=route[0] == "upload", own=route[0] == "mcp")  # the page shows that of an upload
        try:
            if _is_shut(path, route, scope):
                await answer.say(BY_STATUS[404], 404)
            elif scope["method"] == "GET" and (session := _stream_of(route, scope)) is not None:
                with self.listeners.stream(session, _address_of(scope)):
                    await self._stream(scope, receive, answer)
            else:
                if route[0] == "mcp":
                    scope = _forwarded(scope)
                if scope["method"] == "POST":
                    receive = await self._received(route, receive, _address_of(scope))
                await self.app(_whole(scope), receive, answer)
        except Refused as error:
            await answer.give(error.body, error.status)
        except InputError as error:
            await answer.say(str(error), 400)
        except Exception as error:
            if route[0] == "upload" and isinstance(error, TypeError):  # so Gradio calls a file without a name
                await answer.say(NO_FILE, 400)
            else:
                await answer.say(sentence(error), 500)

    async def _stream(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """A stream of answers. One that nobody asked for ends with a bare status and an error in the log."""

        async def worded(message: Message) -> None:
            if NOT_FOUND in (body := message.get("body", b"")):
                message["body"] = body.replace(NOT_FOUND, NO_STREAM)
            await send(message)

        try:
            await self.app(scope, receive, worded)
        except KeyError:  # Gradio forgets a session with the first of its streams that ends, and trips over the next
            pass
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

    async def _received(self, route: Sequence[str], receive: Receive, address: str) -> Receive:
        """The request's body again, once it is known to be of the right form; InputError otherwise, and where the
        address only asks. Uploads go to the disk as they come."""
        receive = self._counted(receive, address)
        if route[0] == "upload":
            return receive
        if (body := await _body(receive, MOST_MESSAGE if route[0] == "mcp" else MOST_BODY)) is None:
            return receive
        if route[0] == "mcp" and self.check_message:
            self.check_message(body)
        elif route[0] in ("call", "queue", "run", "api"):
            body = self._checked(route, body, address)
        sent = [body]

        async def again() -> Message:
            if sent:
                return {"type": "http.request", "body": sent.pop(), "more_body": False}
            return await receive()

        return again

    def _checked(self, route: Sequence[str], body: bytes, address: str) -> bytes:
        try:
            given = json.loads(body)
        except (ValueError, RecursionError):
            raise InputError("The request's body is no JSON that can be read here.") from None
        if not isinstance(given, dict):
            raise InputError(f"The request's body must be a JSON object, not {type(given).__name__}.")
        if route[0] == "call":
            self._check_call(route, given)
            given.pop("session_hash", None)  # each call has a session and a stream of its own
        elif route[0] != "queue" and list(route[1:]) != ["predict"]:
            raise InputError(QUEUED)
        else:
            number, is_queued = given.get("fn_index"), route[0] == "queue"
            known = isinstance(number, int) and not isinstance(number, bool) and number in self.events
            session = given.get("session_hash")
            if not known or not isinstance(given.get("data"), list) or (is_queued and not isinstance(session, str)):
                raise InputError(MALFORMED)
            if not is_queued:
                return body
        self.listeners.ask(given.get("session_hash"), address)
        return json.dumps(given).encode()

    def _check_call(self, route: Sequence[str], given: Mapping[str, Any]) -> None:
        name, by_name = route[-1], route[1:2] == ["v2"]
        if name not in self.endpoints:
            raise InputError(f"There is no endpoint {shown(name)!r}; {did_you_mean(name, self.endpoints)}")
        known = self.endpoints[name]
        if by_name:
            refuse_unknown([key for key in given if key != "oauth_token"], known)
        elif not isinstance(given.get("data"), list) or len(given["data"]) != len(known):
            raise InputError(f'The request must have "data", a list of {len(known)} values: {", ".join(known)}.')


def refuse_unknown(names: Iterable[str], known: Collection[str]) -> None:
    """InputError for the first of the names that is no parameter."""
    for name in names:
        if name not in known:
            raise InputError(f"There is no parameter {shown(name)!r}; {did_you_mean(name, known)}")


class _Answer:
    """Passes an answer on, but puts a sentence in the place of an error's body. plain: as text. own: errors pass."""

    def __init__(self, send: Send, *, plain: bool, own: bool) -> None:
        self._send, self._plain, self._own = send, plain, own
        self._begun, self._status, self._body = False, 0, b""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start" and message["status"] >= 400 and not self._own:
            self._status = message["status"]
        elif self._status and message["type"] == "http.response.body":
            self._body += message.get("body", b"")
            if not message.get("more_body"):
                await self.say(self._words(), self._status)
        else:
            self._begun = True
            await self._send(message)

    async def say(self, words: str, status: int) -> None:
        body = words if self._plain else json.dumps({"detail": words}, ensure_ascii=False)
        await self.give(body.encode(), status)

    async def give(self, body: bytes, status: int) -> None:
        if self._begun:  # half an answer cannot be taken back
            return
        self._begun, self._status = True, 0
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
            return QUEUED
        return BY_STATUS.get(self._status, MALFORMED)


def _is_shut(path: str, route: Sequence[str], scope: Mapping[str, Any]) -> bool:
    """Whether nothing of this page is at an address. It has no pages by name, which Gradio would look up."""
    if route[0] in SHUT or route[0].lower().startswith(SHUT_BEGINNINGS):
        return True
    if any(len(part.encode("utf-8", "replace")) > LONGEST_NAME for part in path.split("/")):
        return True
    return path == "/" and "page" in _query(scope)


def _whole(scope: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """A request for several parts of a file, which Gradio cannot cut out, or for none, as one for all of it."""
    headers = [(k, v) for k, v in scope.get("headers", []) if k != b"range" or re.fullmatch(rb"bytes=\d*-\d*", v)]
    return {**scope, "headers": headers}


def _query(scope: Mapping[str, Any]) -> dict[str, list[Any]]:
    return parse_qs(scope.get("query_string", b"").decode("latin-1"), keep_blank_values=True)


def _stream_of(route: Sequence[str], scope: Mapping[str, Any]) -> str | None:
    """The session whose answers a request listens to; a call's is its own event."""
    if route == ["queue", "data"]:
        return _query(scope).get("session_hash", [None])[0]
    return route[-1] if route[0] == "call" and len(route) > 2 else None


async def _body(receive: Receive, most: int) -> bytes | None:
    """The whole body; None where the client went away."""
    parts: list[bytes] = []
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        parts.append(message.get("body", b""))
        if sum(map(len, parts)) > most:
            raise InputError(f"The request is larger than {most // 2**20} MB: upload the photos as files.")
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


def _forwarded(scope: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """An agent's request with its address as a proxy would write it: Gradio's server asks the endpoints for all of its
    agents, from this machine and in one session, with the headers that each has sent."""
    name, headers = b"x-forwarded-for", scope.get("headers", [])
    hops = [value for key, value in headers if key == name] + [(scope.get("client") or ("",))[0].encode("latin-1")]
    return {**scope, "headers": [*((k, v) for k, v in headers if k != name), (name, b", ".join(hops))]}


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

"""Who is served next, and whether anybody still waits for the answer. Knows nothing of Gradio.

A `Line` serves few at a time. Whoever has used it least in the last minute goes first, so that a visitor who asks for
one thing never waits for all that another has asked for. `Listeners` knows which sessions have a stream of answers
open: what nobody listens to is not made.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from facesnap.errors import InputError

MEMORY = 30.0  # seconds in which what a visitor has used counts half
PATIENCE = 5.0  # seconds for a client to open the stream of its answers after it asked
MOST_UNHEARD = 16
MOST_ASKED = 8  # requests of an address in that time, beyond those whose answers it listens to
NOBODY = "Nobody listens for the answer any more: ask again, and read the stream of events until it ends."


class Busy(InputError):
    """There is no place in a line; the same may be asked again later."""


@dataclass(frozen=True)
class Visitor:
    """Where a request comes from: the address, and the session of its page or client."""

    address: str = ""
    session: str = ""


NOBODY_IN_PARTICULAR = Visitor()


@dataclass(frozen=True, eq=False)
class _Ticket:
    visitor: Visitor
    number: int


def _known(visitor: Visitor) -> dict[str, Any]:
    """What a visitor is counted by. Agents of many addresses share one session: that of the server's own client."""
    return {"address": visitor.address, "session": (visitor.address, visitor.session) if visitor.session else ""}


class Line:
    """A few at a time, at most `most` waiting, and of them few for each session and each address."""

    def __init__(self, slots: int = 1, *, most: int = 12, each_session: int = 99, each_address: int = 99) -> None:
        self.slots, self.most = slots, most
        self._each = {"session": each_session, "address": each_address}
        self._waiting: list[_Ticket] = []
        self.served: dict[_Ticket, float] = {}  # and when it began
        self._used: dict[Any, tuple[float, float]] = {}  # address or session → seconds, and when that was true
        self._count = 0
        self._moved = threading.Condition()

    @contextmanager
    def turn(self, visitor: Visitor = NOBODY_IN_PARTICULAR, *, again: bool = False) -> Iterator[Callable[[float], int]]:
        """A place in the line. What it gives says, after waiting at most so many seconds for a change, how
        many stand ahead; at 0 it is one's turn, until the block ends. Busy where there is no place; never for
        who comes `again`, in the middle of what was begun."""
        with self._moved:
            if not again:
                self._refuse_too_many(visitor)
            self._count += 1
            ticket = _Ticket(visitor, self._count)
            self._waiting.append(ticket)
        try:
            yield partial(self._ahead, ticket)
        finally:
            with self._moved:
                self._leave(ticket)
                self._moved.notify_all()

    @contextmanager
    def wait(self, visitor: Visitor = NOBODY_IN_PARTICULAR) -> Iterator[None]:
        """One's turn, waited for."""
        with self.turn(visitor) as ahead:
            while ahead(1.0):
                pass
            yield

    def quiet(self, patience: float) -> None:
        """Returns when nobody is in the line, or after so many seconds."""
        end = time.monotonic() + patience
        with self._moved:
            while (self._waiting or self.served) and (left := end - time.monotonic()) > 0:
                self._moved.wait(left)

    def _refuse_too_many(self, visitor: Visitor) -> None:
        inside = [*self._waiting, *self.served]
        if len(self._waiting) >= self.most:
            raise Busy(f"The queue is full, {self.most} visitors are waiting: please try again in a minute.")
        for name, most in self._each.items():
            own = _known(visitor)[name]
            if own and sum(_known(ticket.visitor)[name] == own for ticket in inside) >= most:
                whose = "You have" if name == "session" else "Your address has"
                raise Busy(f"{whose} {most} requests in line already: please wait for one of them.")

    def _ahead(self, ticket: _Ticket, patience: float) -> int:
        with self._moved:
            if not self._admitted(ticket):
                self._moved.wait(patience)
            if self._admitted(ticket):
                return 0
            return max(1, len(self.served) + self._order().index(ticket) + 1 - self.slots)

    def _admitted(self, ticket: _Ticket) -> bool:
        if ticket not in self.served and len(self.served) < self.slots and self._order()[0] is ticket:
            self._waiting.remove(ticket)
            self.served[ticket] = time.monotonic()
            self._moved.notify_all()
        return ticket in self.served

    def _order(self) -> list[_Ticket]:
        def key(ticket: _Ticket) -> tuple[float, float, int]:
            known = _known(ticket.visitor)
            return self._recently(known["address"]), self._recently(known["session"]), ticket.number

        return sorted(self._waiting, key=key)

    def _recently(self, who: Any) -> float:
        """Seconds that an address or a session used, older ones counting less; in tenths, so that ties are ties."""
        seconds, then = self._used.get(who, (0.0, 0.0))
        return round(seconds * 0.5 ** ((time.monotonic() - then) / MEMORY), 1)

    def _leave(self, ticket: _Ticket) -> None:
        if (began := self.served.pop(ticket, None)) is None:
            self._waiting.remove(ticket)
            return
        now = time.monotonic()
        for who in filter(None, _known(ticket.visitor).values()):
            self._used[who] = self._recently(who) + now - began, now
        self._used = {who: used for who, used in self._used.items() if now - used[1] < 10 * MEMORY}


class Allowance:
    """Bytes that each address may send in an hour: files stay nearly as long, and a disk has an end."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._sent: dict[str, Counter[int]] = {}  # address → minute → bytes
        self._now = -1
        self._changing = threading.Lock()

    def take(self, address: str, size: int) -> None:
        """So many bytes more. Busy where they are too many."""
        now = int(time.monotonic() // 60)
        with self._changing:
            if now != self._now:  # what is older than an hour is forgotten, once a minute
                lately = {
                    who: Counter({m: b for m, b in sent.items() if now - m < 60}) for who, sent in self._sent.items()
                }
                self._now, self._sent = now, {who: sent for who, sent in lately.items() if sent}
            sent = self._sent.setdefault(address, Counter())
            if sent.total() + size > self.most:
                raise Busy(f"Your address has sent {self.most // 2**20} MB within the hour: please come back later.")
            sent[now] += size


class Listeners:
    """Which sessions have a stream of answers open."""

    def __init__(self) -> None:
        self._open: Counter[str] = Counter()
        self.unheard: list[object] = []
        self._asked: dict[str, list[tuple[float, str | None]]] = {}  # address → when, and whose answer nobody reads yet
        self._changed = threading.Condition()

    def ask(self, session: str | None, address: str) -> None:
        """Somebody asks, and will listen. Busy, before anything is done, for an address that only asks."""
        now = time.monotonic()
        with self._changed:
            if session in self._open:
                return
            self._asked = {who: asked for who, asked in self._asked.items() if now - asked[-1][0] < PATIENCE}
            asked = [one for one in self._asked.get(address, []) if now - one[0] < PATIENCE]
            if len(asked) >= MOST_ASKED:
                raise Busy("Your address asks faster than it listens: read the stream of events of what it asked for.")
            self._asked[address] = [*asked, (now, session)]

    @contextmanager
    def stream(self, session: str, address: str = "") -> Iterator[None]:
        """While the block lasts, somebody listens: to all that the session asked, or to one call's answer."""
        with self._changed:
            self._open[session] += 1
            asked = self._asked.pop(address, [])
            left = [one for one in asked if one[1] != session]
            calls = [one for one in left if one[1] is None]  # each has a session of its own, which it learns by asking
            if calls and len(left) == len(asked):
                left.remove(calls[0])
            if left:
                self._asked[address] = left
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._open[session] -= 1
                if not self._open[session]:
                    del self._open[session]

    def await_one(self, session: str, patience: float | None = None) -> None:
        """Returns when somebody listens, which clients begin as soon as they have asked. InputError where nobody does,
        or where so many others came to be unheard in the meantime that the oldest must go."""
        one, end = object(), time.monotonic() + (PATIENCE if patience is None else patience)
        with self._changed:
            self.unheard.append(one)
            del self.unheard[:-MOST_UNHEARD]
            self._changed.notify_all()
            try:
                while session not in self._open:
                    left = end - time.monotonic()
                    if left <= 0 or one not in self.unheard:
                        raise InputError(NOBODY)
                    self._changed.wait(left)
            finally:
                if one in self.unheard:
                    self.unheard.remove(one)

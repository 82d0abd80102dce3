"""The line in which visitors wait: fair, short, and without those who went away."""

import threading

import pytest
from served import wait_for

from facesnap.errors import InputError
from facesnap.web.line import PATIENCE, Allowance, Busy, Line, Listeners, Visitor


def test_the_line_is_fair_and_full_in_time():
    line = Line(most=1)
    with line.turn() as first:
        assert first(0) == 0
        with line.turn() as second:
            assert second(0) == 1
            with pytest.raises(Busy, match="The queue is full"), line.turn():
                pass
            with line.turn(again=True) as third:  # who is in the middle of an order is never sent away
                assert third(0) == 2
    with line.turn() as next_one:
        assert next_one(0) == 0


def test_who_used_the_line_least_goes_first(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("facesnap.web.line.time.monotonic", lambda: now[0])
    line, greedy, other = Line(), Visitor("1.1.1.1", "a"), Visitor("2.2.2.2", "b")
    served = line.turn(greedy)
    assert served.__enter__()(0) == 0
    now[0] += 5
    with line.turn(greedy) as again, line.turn(other) as first:
        served.__exit__(None, None, None)
        assert again(0) == 1 and first(0) == 0 and again(0) == 1
    with line.turn(greedy) as later:
        assert later(0) == 0


def test_places_are_few_for_each_session_and_each_address():
    line = Line(most=12, each_session=1, each_address=2)
    with line.turn(Visitor("1.1.1.1", "a")), line.turn(Visitor("1.1.1.1", "b")), line.turn(Visitor("2.2.2.2", "c")):
        for visitor, said in ((Visitor("2.2.2.2", "c"), "You have 1"), (Visitor("1.1.1.1", "d"), "Your address has 2")):
            with pytest.raises(Busy, match=said), line.turn(visitor):
                pass
        with line.turn(Visitor("3.3.3.3", "c")):  # agents share a session
            pass


def test_nobody_waits_for_what_nobody_listens_to():
    listeners = Listeners()
    with pytest.raises(InputError, match="Nobody listens"):
        listeners.await_one("gone", 0.01)
    with listeners.stream("here"):
        listeners.await_one("here", 0.01)
    late = threading.Thread(target=listeners.await_one, args=("late", 30))
    late.start()
    with listeners.stream("late"):
        late.join(10)
    assert not late.is_alive()


def test_an_address_that_only_asks_is_refused_before_anything_is_done(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("facesnap.web.line.time.monotonic", lambda: now[0])
    monkeypatch.setattr("facesnap.web.line.MOST_ASKED", 2)
    listeners = Listeners()
    for _ in range(5):  # who listens may ask as often as it likes
        listeners.ask(None, "1.1.1.1")
        with listeners.stream("call", "1.1.1.1"):
            pass
    for _ in range(2):
        listeners.ask(None, "6.6.6.6")
    with pytest.raises(Busy, match="faster than it listens"):
        listeners.ask(None, "6.6.6.6")
    listeners.ask(None, "1.1.1.1")
    with listeners.stream("page", "6.6.6.6"):
        listeners.ask("page", "6.6.6.6")
    listeners.ask(None, "6.6.6.6")
    with pytest.raises(Busy):
        listeners.ask(None, "6.6.6.6")
    now[0] += PATIENCE  # it may ask again
    for _ in range(2):  # a page asks several things and then reads all answers from one stream
        listeners.ask("page", "6.6.6.6")
    with listeners.stream("page", "6.6.6.6"):
        pass
    for _ in range(2):
        listeners.ask(None, "6.6.6.6")


def test_the_oldest_unheard_request_makes_room(monkeypatch):
    monkeypatch.setattr("facesnap.web.line.MOST_UNHEARD", 2)
    listeners, dropped = Listeners(), []

    def ask(session):
        try:
            listeners.await_one(session, 30)
        except InputError:
            dropped.append(session)

    threads = [threading.Thread(target=ask, args=(session,)) for session in "abc"]
    for number, thread in enumerate(threads):
        thread.start()
        wait_for(lambda number=number: len(listeners.unheard) + len(dropped) == number + 1)
    threads[0].join(10)
    assert dropped == ["a"]
    with listeners.stream("b"), listeners.stream("c"):
        for thread in threads[1:]:
            thread.join(10)


def test_an_address_may_send_so_much_in_an_hour_and_then_again(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("facesnap.web.line.time.monotonic", lambda: now[0])
    allowance = Allowance(10 * 2**20)
    for now[0] in (0, 1800):
        allowance.take("8.8.8.8", 5 * 2**20)
    with pytest.raises(Busy, match="Your address has sent 10 MB within the hour"):
        allowance.take("8.8.8.8", 1)
    allowance.take("9.9.9.9", 10 * 2**20)  # others are not concerned
    now[0] = 3660
    allowance.take("8.8.8.8", 5 * 2**20)

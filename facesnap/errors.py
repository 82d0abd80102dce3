"""What a person did wrong, in one sentence: the error that is shown as it is, and the checks that raise it."""

from __future__ import annotations

import difflib
import numbers
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any


class InputError(ValueError):
    """Something is wrong with what the user gave. The message is one sentence fit to be shown as it is: what
    is wrong, with its value, and what to do; it names no path of the machine."""


def did_you_mean(given: Any, known: Iterable[str], otherwise: str | None = None, *, cutoff: float = 0.6) -> str:
    """The end of a sentence about an unknown name: the known one nearest to it.

    otherwise: what to say where none is near, by default all that are known. cutoff: likeness, 0 to 1.
    """
    known = list(known)
    nearest = difflib.get_close_matches(str(given), known, n=1, cutoff=cutoff)
    if nearest:
        return f"did you mean {nearest[0]!r}?"
    return otherwise or f"choose {', '.join(known)}."


def check_number(name: str, value: Any, low: float, high: float, *, whole: bool = False) -> Any:
    """`value`, if it is a number from `low` to `high`, NumPy's scalars among them; raises InputError otherwise."""
    kind: Any = numbers.Integral if whole else numbers.Real
    if isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= high:  # nor is NaN
        allowed = f"choose a {'whole ' if whole else ''}number from {low} to {high}."
        raise InputError(f"The {name} is {shown(value)}; {allowed}")
    return value


def shown(value: Any, most: int = 60) -> str:
    """Whatever a caller gave, as a few characters for a sentence."""
    try:
        text = str(value)
    except Exception:  # an int of more digits than Python prints, an object that cannot say what it is
        return f"a {type(value).__name__} that cannot be shown"
    text = text.encode("utf-8", "backslashreplace").decode()  # half a surrogate pair is in no answer's encoding
    return text if len(text) <= most else f"{text[:most]}…"


@contextmanager
def reading(what: str, advice: str = "fetch or build it again") -> Iterator[None]:
    """Whatever a reader raises on a damaged file becomes one InputError about `what`, such as "The mixer of 'x'".

    Lack of memory is no fault of the file and passes through.
    """
    try:
        yield
    except (InputError, MemoryError):
        raise
    except Exception as error:  # every library has its own
        if type(error).__name__ == "OutOfMemoryError":  # torch's, which is not worth importing torch for
            raise
        raise InputError(f"{what} cannot be read ({type(error).__name__}); {advice}.") from error

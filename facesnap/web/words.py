"""Words for visitors: what may be read of an error, what an identity score means, which words a model does not know."""

import logging
import re
import secrets
import traceback
from typing import Any

from facesnap.errors import InputError

log = logging.getLogger(__name__)

# Least cosine and its word, by a scorer like the mini's: two true photos of one person reach 0.6, strangers rarely 0.3.
LIKENESS = ((0.6, "a clear likeness"), (0.45, "a likeness"), (0.3, "some likeness"), (-1, "no clear likeness"))
SMALL_VOCABULARY = 5000  # tokens: such a model was made for the words of its captions, and knows no others


def likeness(score: float | None, settings: Any) -> str:
    """A word for an identity score; None stands for a portrait in which no face was found, or for no scorer.

    A checkpoint may bring words of its own, [[least score, words], …] from the highest down, as "likeness" of its
    `about`: what a cosine means depends on its recogniser and on what its portraits can be.
    """
    if score is None:
        return "no face was found in the portrait"
    return next(word for least, word in settings.about.get("likeness", LIKENESS) if score >= least)


def unknown_words(prompt: str, tokenizer: Any) -> list[str]:
    """A note about the words of a prompt that a model with a small vocabulary has never seen; else none.

    Such a tokenizer has every word of the captions whole and cuts others up.
    """
    if not isinstance(prompt, str) or len(tokenizer) > SMALL_VOCABULARY:
        return []
    words = dict.fromkeys(word for word in re.findall(r"[^\W\d_]{3,}", prompt.lower()))
    unknown = [word for word in words if len(tokenizer.tokenize(word)) > 1]
    if not unknown:
        return []
    named = ", ".join(f"“{word}”" for word in unknown[:6]) + (" and others" if len(unknown) > 6 else "")
    return [f"This small model has never seen {named}: it will pass over {'it' if len(unknown) == 1 else 'them'}."]


def sentence(error: BaseException) -> str:
    """What a visitor may read of an error. All else goes to the log, under a number the visitor can quote: where it
    happened and what kind it was, but not its own words, which may hold a prompt or the name of a file."""
    if isinstance(error, InputError):
        return str(error)
    number = secrets.token_hex(3)
    where = "".join(traceback.format_tb(error.__traceback__))
    log.error("error %s: %s\n%s", number, type(error).__name__, where)
    return f"Something went wrong on this side (number {number} in the log). Please try again."

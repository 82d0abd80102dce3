"""Sentences for what a person did wrong."""

from fractions import Fraction

import numpy as np
import pytest

from facesnap.errors import InputError, check_number, did_you_mean, reading


@pytest.mark.parametrize("value", [1, 1.0, np.float32(0.5), np.int64(2), Fraction(1, 3)])
def test_numbers_of_every_library_are_taken(value):
    assert check_number("scale", value, 0, 2) == value


@pytest.mark.parametrize(
    "value", [None, True, "1", float("nan"), -1, 2.1, 10**400, -(10**5000), 1j, [1]], ids=lambda value: ""
)
def test_anything_else_is_refused_in_a_short_sentence(value):
    with pytest.raises(InputError, match="The scale is .*; choose a number from 0 to 2.") as refused:
        check_number("scale", value, 0, 2)
    assert len(str(refused.value)) < 150


def test_whole_numbers_only():
    with pytest.raises(InputError, match="choose a whole number from 1 to 8"):
        check_number("number of steps", 2.0, 1, 8, whole=True)


def test_the_nearest_name_or_all_of_them():
    assert did_you_mean("lo", ["low", "full"]) == "did you mean 'low'?"
    assert did_you_mean("x", ["low", "full"]) == "choose low, full."
    assert did_you_mean("x", ["low"], "give a folder.") == "give a folder."


def test_a_damaged_file_is_one_sentence_and_lack_of_memory_is_not():
    with pytest.raises(InputError, match="The mixer of 'x' cannot be read .KeyError.; fetch or build it again."):
        with reading("The mixer of 'x'"):
            raise KeyError("weight")
    with pytest.raises(MemoryError), reading("The mixer"):
        raise MemoryError

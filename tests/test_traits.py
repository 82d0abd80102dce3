"""What avatars show against what people see: the labels, the words of the renderer, the figures."""

import numpy as np
import pytest

from facesnap.errors import InputError
from facesnap.evaluation import traits

HEADER = "file,presents_as,hair_colour,hair_length,beard,skin\n"


def test_the_renderers_words_become_a_viewers():
    person = {"gender": "man", "age": "adult", "skin": "fair", "hair": "dark brown", "haircut": "balding"}
    person |= {"beard": "goatee", "graying": "none", "hat": "none"}
    seen = {"presents_as": "m", "hair_colour": "brown", "hair_length": "bald", "beard": "full", "skin": "light"}
    assert traits.traits_of(person) == seen
    assert traits.traits_of({**person, "hat": "cap"})["hair_length"] == "-"
    assert traits.traits_of({**person, "graying": "temples"})["hair_colour"] == "-"
    assert traits.traits_of({**person, "age": "child"})["presents_as"] == "-"
    assert traits.traits_of({**person, "beard": "stubble"})["beard"] == "-"


def test_every_class_counts_the_same_and_doubtful_pictures_not_at_all():
    wanted = [{**dict.fromkeys(traits.TRAITS, "-"), "skin": skin} for skin in ["light"] * 8 + ["dark"] * 2 + ["-"] * 5]
    said = [{"skin": "light"}] * 9 + [{"refused": "no face"}] + [{"skin": "dark"}] * 5
    ((name, row),) = traits.judged(said, wanted).items()
    assert name == "skin" and row["balanced_accuracy"] == 0.5 and row["pictures"] == 10
    assert row["right_of_each"] == {"dark": [0, 2], "light": [8, 8]}
    assert row["interval"][0] <= 0.5 <= row["interval"][1]


def test_the_reader_learns_what_the_pictures_show(monkeypatch):
    monkeypatch.setattr(traits, "EPOCHS", 30)
    monkeypatch.setattr(traits, "BATCH", 16)
    rng = np.random.default_rng(0)
    colours = {"black": (30, 25, 25), "blond": (220, 190, 110)}
    seen = [{**dict.fromkeys(traits.TRAITS, "-"), "hair_colour": list(colours)[k % 2]} for k in range(32)]
    crops = np.stack([colours[row["hair_colour"]] + rng.integers(-20, 20, (64, 64, 3)) for row in seen])
    crops = crops.astype(np.uint8)
    said = traits.trained(crops, seen).read(crops[:16])
    assert [row["hair_colour"] for row in said] == [row["hair_colour"] for row in seen[:16]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "has no labels.csv"),
        (HEADER, "names no photograph"),
        ("file,skin\na.jpg,light\n", "Line 2 of labels.csv has no presents_as"),
        (HEADER + "a.jpg,m,green,short,none,light\n", "hair_colour is 'green'; choose black, brown"),
    ],
)
def test_labels_that_cannot_be_read_are_named(tmp_path, text, message):
    if text is not None:
        (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(InputError, match=message):
        traits.labels(tmp_path)


def test_labels_are_read(tmp_path):
    (tmp_path / "labels.csv").write_text(HEADER + "a.jpg,m,-,short,none,light\n")
    assert traits.labels(tmp_path)[0]["hair_colour"] == "-"

"""Tables 2 and 3: what they train, what they say, and where they write it."""

import pytest
from tiny import tiny_mixer, tiny_unet

from facesnap.errors import InputError
from facesnap.mini import tables
from facesnap.mini.tables import TABLES


def lines(values: dict[str, float]) -> list[dict]:
    """rows.csv as score writes it: two people, whose figures lie around the value of each folder."""
    return [
        {"method": folder, "person": person, "FaceSim C": str(value + shift), "CLIP-face x": str(value + shift)}
        for folder, value in values.items()
        for person, shift in (("1", -1.0), ("2", 1.0))
    ]


def test_six_trainings_serve_both_tables():
    trainings = {row.training for rows in TABLES.values() for row in rows}
    assert len(trainings) == 6
    assert TABLES[3][2].training == TABLES[3][3].training == TABLES[2][3].training == "full-predicted"


def test_a_table_says_where_its_order_is_not_the_papers():
    rows, seeds = TABLES[2], (0, 1)
    values = {tables.folder_of(row, seed): row.paper[1] + seed for row in rows for seed in seeds}
    distances = {tables.folder_of(row, seed): row.paper[2] for row in rows for seed in seeds}
    same = tables.table(rows, seeds, lines(values), distances, "FD-mini")
    told = "71.1 (70.1 to 72.1)"
    assert f"| mixer | {told} | {told} | 212.30 (212.30 to 212.30) | 79.2, 70.6, 212.3 |" in same
    # CLIP-face here is a copy of FaceSim, whose order differs from the paper's CLIP-face in the first two rows
    assert "CLIP-face: “CLIP only” is not above “identity only” here" in same
    assert "FaceSim:" not in same and "FID:" not in same
    worse = {folder: 100 - value for folder, value in values.items()}
    turned = tables.table(rows, seeds, lines(worse), distances, "FD-mini")
    assert turned.count("- FaceSim:") == 3


def test_a_training_starts_from_the_base_and_knows_nothing_of_faces():
    unet = tiny_unet()
    parts = tables.fresh({"unet": unet, "mixer": tiny_mixer(), "vae": 1}, "concat")
    assert parts["mixer"].config.variant == "concat" and parts["mixer"].config.width == 24 and parts["vae"] == 1
    assert all(not block.weight.any() for block in parts["ffrnet"].controlnet_down_blocks)
    assert parts["ffrnet"].conv_in.weight.equal(unet.conv_in.weight)


def test_a_table_takes_the_place_of_the_old_one_and_only_that(tmp_path):
    page = tmp_path / "paper.md"
    page.write_text("a\n<!-- table 2 -->\nold\n<!-- end of table 2 -->\nb\n")
    tables.put(page, 2, "| new |")
    tables.put(page, 2, "| newer |")
    assert page.read_text() == "a\n<!-- table 2 -->\n| newer |\n<!-- end of table 2 -->\nb\n"
    with pytest.raises(InputError, match="'paper.md' has no marks of table 3"):
        tables.put(page, 3, "")


def test_the_projects_own_page_has_the_marks_of_both():
    text = tables.PAGE.read_text(encoding="utf-8")
    assert all(f"<!-- table {n} -->" in text and f"<!-- end of table {n} -->" in text for n in TABLES)


def test_another_number_of_samples_is_refused(tmp_path):
    tables.begun_with(tmp_path / "tables.json", {"samples": 10, "people": 2})
    tables.begun_with(tmp_path / "tables.json", {"samples": 10, "people": 2})
    with pytest.raises(InputError, match="begun with other samples"):
        tables.begun_with(tmp_path / "tables.json", {"samples": 20, "people": 2})

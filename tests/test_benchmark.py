"""The benchmark counts and times the pipeline's own calls; at small size here, as its command line does."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import generate, random_models

ROWS = [generate.PLAIN, generate.INSTANTID, generate.PAPER, "FaceSnap, best", "FaceSnap, fast"]


@pytest.fixture(scope="module")
def counted(shallow, tmp_path_factory):
    out = tmp_path_factory.mktemp("benchmark") / "flops.json"
    generate.main(["--flops", "--size", "small", "--out", str(out)])
    return json.loads(out.read_text())


def test_the_report_has_every_row_and_where_it_comes_from(counted):
    assert [row["row"] for row in counted["rows"]] == ROWS
    assert {"command", "commit", "machine", "libraries", "settings", "weights_gb_float16", "goals"} <= set(counted)
    assert counted["rows"][0]["ratio_tflop"] == 1


def test_what_is_left_out_is_not_counted(counted):
    plain, instantid, paper, best, fast = (row["tflop"] for row in counted["rows"])
    assert fast < plain < best < paper < instantid
    # FFRNet on both halves costs as much again as on one, its drawing's embedding aside
    assert paper - best == pytest.approx(best - plain, rel=0.15)
    assert all(goal["met"] for goal in counted["goals"].values())


def test_remembered_blocks_count_as_if_they_ran(shallow, monkeypatch):
    rows, best = generate.Portraits.rows, "FaceSnap, best"
    monkeypatch.setattr(generate, "STEPS", 2)
    monkeypatch.setattr(generate.Portraits, "rows", lambda self: {best: rows(self)[best]})
    size = random_models.SIZES["small"]
    with FlopCounterMode(display=False) as counter:
        generate.Portraits(random_models.make_pipeline(size, "meta", torch.float16), size.side).rows()[best]()
    assert generate.count(size)[0] == {best: counter.get_total_flops() / 1e12}


def test_timed_rows_say_seconds_and_ratios(monkeypatch, counted):
    tflop = {row["row"]: row["tflop"] for row in counted["rows"]}
    monkeypatch.setattr(generate, "count", lambda size: (tflop, counted["weights_gb_float16"]))  # once is enough
    monkeypatch.setattr(generate, "STEPS", 1)
    found = generate.main(["--size", "small", "--device", "cpu", "--turns", "1", "--note", "one step"])
    assert [(row["row"], row["mode"]) for row in found["rows"]] == [(name, "full") for name in ROWS]
    assert found["rows"][0]["ratio"] == found["rows"][0]["ratio_cpu"] == 1
    assert all(row["seconds"] > 0 and row["cpu_seconds"] > 0 for row in found["rows"])
    assert found["note"] == "one step"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--turns", "0"], "at least one portrait"),
        (["--modes", "low"], "must begin with full"),
        (["--device", "cpu", "--dtype", "float16"], "for a GPU"),
    ],
)
def test_refused_on_the_command_line(words, sentence, capsys):
    with pytest.raises(SystemExit):
        generate.parse(words)
    assert sentence in capsys.readouterr().err

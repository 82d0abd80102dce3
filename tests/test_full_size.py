"""The full-size benchmark's phases, at its small size."""

import pytest

from benchmarks.full_size import phase


@pytest.fixture(scope="module")
def folder(shallow, tmp_path_factory):
    folder = tmp_path_factory.mktemp("full_size")
    built = phase("build", folder, "small")
    assert built["gb_of_facesnap"] > 0 and {"unet", "ffrnet", "instantid/mixer"} <= set(built["gb_on_disk"])
    return folder


@pytest.mark.parametrize("name", ["portrait", "instantid"])
def test_a_portrait_goes_through_every_part_as_often_as_it_should(folder, name):
    found = phase(name, folder, "small")
    calls = {part: told["calls"] for part, told in found["parts"].items()}
    assert found["size"] == (128, 128) and found["peak_resident_gb"] > 0
    assert calls["unet"] == calls["ffrnet"] == found["steps"] == 2
    assert calls["text_encoder"] == calls["text_encoder_2"] == calls["vae"] == 1  # no text is zeros, by the base


def test_a_training_step_changes_weights(folder):
    found = phase("train", folder, "small")
    assert found["learn"] == "light" and found["loss"] > 0 and found["size"] == 64
    assert found["parts"]["whole step"]["seconds"] > 0

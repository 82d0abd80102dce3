"""What holds pictures back, and what marks those that leave."""

from pathlib import Path

import numpy as np
import pytest
import torch
from calls import studio_order
from PIL import Image
from safetensors.torch import load_file

from facesnap.errors import InputError
from facesnap.web import safety, server
from facesnap.web.studio import MARK_METHOD, Studio, marked


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """Folders of a real, tiny image classifier that finds everything, or nothing, unsafe."""
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    def build(unsafe: float, labels=("normal", "nsfw")) -> Path:
        config = ViTConfig(
            hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=32,
            patch_size=16, id2label=dict(enumerate(labels)), label2id={label: k for k, label in enumerate(labels)},
        )  # fmt: skip
        model = ViTForImageClassification(config)
        with torch.no_grad():
            model.classifier.weight.zero_()
            model.classifier.bias.copy_(torch.tensor([0.0, unsafe]))
        folder = tmp_path_factory.mktemp("classifier")
        model.save_pretrained(folder)
        ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
        return folder

    return build


def test_the_safety_checker_holds_pictures_back(classifier, pipe, files):
    picture = Image.new("RGB", (64, 64), "grey")
    safety.load(classifier(-9.0))(picture)
    for unsafe in (9.0, float("nan")):
        with pytest.raises(InputError, match="held this portrait back"):
            safety.load(classifier(unsafe))(picture)
    with pytest.raises(InputError, match="held this portrait back"):
        list(Studio(pipe, allowed=safety.load(classifier(9.0))).make(studio_order(files)))
    with pytest.raises(InputError, match="no label 'nsfw'"):
        safety.load(classifier(0.0, labels=("cat", "dog")))


def test_a_safety_checker_is_never_unpickled(classifier):
    folder = classifier(9.0)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="cannot be loaded"):
        safety.load(folder)


@pytest.mark.parametrize(
    ("environment", "is_mini", "on"),
    [
        ({}, False, False),
        ({}, True, False),
        ({"SPACE_ID": "me/space"}, True, False),
        ({"SPACE_ID": "me/space"}, False, True),
        ({"GRADIO_SERVER_NAME": "0.0.0.0"}, False, True),
        ({"GRADIO_SHARE": "True"}, False, True),
        ({"GRADIO_ROOT_PATH": "/facesnap"}, False, True),
        ({"GRADIO_SERVER_NAME": "0.0.0.0", "FACESNAP_SAFETY": "off"}, False, False),
        ({"FACESNAP_SAFETY": "on"}, True, True),
    ],
)
def test_the_safety_checker_is_on_in_public_and_fails_closed(monkeypatch, tmp_path, environment, is_mini, on):
    for name in ("SPACE_ID", "GRADIO_SERVER_NAME", "GRADIO_SHARE", "GRADIO_ROOT_PATH", "FACESNAP_SAFETY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(safety, "MODEL", str(tmp_path))  # a folder without a model: it cannot be loaded
    if not on:
        safety.checker(is_mini=is_mini)(Image.new("RGB", (8, 8)))
    else:
        with pytest.raises(InputError, match="nothing is served in public"):
            safety.checker(is_mini=is_mini)


def watermark(picture) -> bytes:
    from imwatermark import WatermarkDecoder

    return WatermarkDecoder("bytes", 64).decode(np.ascontiguousarray(np.asarray(picture)[..., ::-1]), MARK_METHOD)


def test_the_invisible_watermark_can_be_read_back():
    pytest.importorskip("imwatermark", reason="invisible-watermark is not installed, and is optional")
    photos = [Image.open(path).convert("RGB") for path in sorted((server.ASSETS / "examples").glob("*.png"))]
    plain = Image.new("RGB", (256, 256), "#2050f0")  # smooth and strongly coloured, where marks are lost
    for picture in (*photos, photos[0].resize((512, 640)), plain):
        after = marked(picture)
        assert watermark(after) == b"FaceSnap"
        change = np.abs(after.astype(int) - np.asarray(picture))
        assert 0 < change.mean() < 3 and change.max() < 60
    assert np.array_equal(marked(picture.resize((64, 64))), picture.resize((64, 64)))  # too small to hold it

"""The attribute scorer: two small nets that say what the prompt controls, by looking at a picture.

Text accuracy needs a judge that had no part in making the picture. This one is trained on rendered people whose
attributes are known and shares nothing with the model. One net sees the whole picture (style, light, colours), one
the aligned face (glasses, hat). They must be right on true renders (>= 0.95), otherwise their verdict on generated
pictures means little; the evaluation prints both.

Its files are `attributes_whole.onnx`, `attributes_face.onnx` and `attributes.json` (what each output stands for, and
the accuracy on people left out of the training); facesnap/mini/nets/scorer.py trains it.
"""

import json
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image

from facesnap.faces import align
from facesnap.synthetic.people import BACKDROPS, CLOTHES, GLASSES, HATS, LIGHTS, STYLES

Values = dict[str, tuple[str, ...]]
VIEWS: dict[str, Values] = {
    "whole": {
        "style": STYLES,
        "light": LIGHTS,
        "background_color": tuple(BACKDROPS),
        "clothes_color": tuple(CLOTHES),
        "hat_color": tuple(CLOTHES),
    },
    "face": {"glasses": GLASSES, "hat": HATS},
}
ATTRIBUTES: Values = {name: values for view in VIEWS.values() for name, values in view.items()}
COLOURLESS = ("pencil sketch", "black and white")


def visible(attributes: dict, style: str) -> dict[str, str]:
    """Of a picture's attributes those that can be seen in it: the ones a prompt is judged by.

    A pencil drawing shows no colours and no tint of the light; the strokes of an oil painting swallow thin frames; a
    landscape has no one colour; a striped shirt has two, and nobody can see which of them was named; without a hat its
    colour is nobody's.
    """
    hidden = set()
    if style in COLOURLESS:
        hidden |= {"light", "background_color", "clothes_color", "hat_color"}
    if style == "oil painting":
        hidden.add("glasses")
    if attributes["background"] not in ("studio", "plain"):
        hidden.add("background_color")
    if attributes["pattern"] == "striped":
        hidden.add("clothes_color")
    if attributes["hat"] == "none":
        hidden.add("hat_color")
    given = {**attributes, "style": style}
    return {name: given[name] for name in ATTRIBUTES if name not in hidden}


class AttributeScorer:
    """The trained judge. folder: where its files lie."""

    def __init__(self, folder: Path):
        self.views: dict[str, Values] = json.loads((folder / "attributes.json").read_text())["views"]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1  # nets this small gain nothing from more
        self.sessions = {
            view: onnxruntime.InferenceSession(
                str(folder / f"attributes_{view}.onnx"), options, providers=["CPUExecutionProvider"]
            )
            for view in self.views
        }

    def classify(self, image: np.ndarray, keypoints: np.ndarray | None) -> dict[str, str]:
        """The likeliest value of every attribute; what needs a face is left out where none was found.

        image: RGB uint8 (H, W, 3); keypoints: (5, 2) as in `faces.Face`.
        """
        found: dict[str, str] = {}
        for view, attributes in self.views.items():
            if view == "whole":
                seen = whole(image)
            elif keypoints is not None:
                seen = align(image, keypoints)
            else:
                continue
            pixels = seen.astype(np.float32).transpose(2, 0, 1)[None] / 127.5 - 1
            logits = np.split(self.sessions[view].run(None, {"image": pixels})[0][0], starts(attributes)[1:-1])
            found |= {
                name: values[int(part.argmax())]
                for (name, values), part in zip(attributes.items(), logits, strict=True)
            }
        return found


def whole(image: np.ndarray) -> np.ndarray:
    """RGB uint8 (H, W, 3) → (128, 128, 3)."""
    return np.asarray(Image.fromarray(image).resize((128, 128), Image.Resampling.BOX))


def starts(attributes: Values) -> np.ndarray:
    """Where the outputs of each attribute begin, and the end."""
    return np.cumsum([0, *map(len, attributes.values())])

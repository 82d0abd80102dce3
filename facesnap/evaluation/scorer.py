"""The attribute scorer: two small nets that say what the prompt controls, by looking at a picture.

Text accuracy needs a judge that had no part in making the picture. This one is trained on rendered people whose
attributes are known and shares nothing with the model. One net sees the whole picture (style, light, colours), one
the aligned face (glasses, hat). They must be right on true renders (>= 0.95), otherwise their verdict on generated
pictures means little; the evaluation prints both.

`python -m facesnap.evaluation.scorer --data SHARDS --out DIR` writes `attributes_whole.onnx`, `attributes_face.onnx`
and `attributes.json` (what each output stands for, and the accuracy on people left out of the training).
"""

import argparse
import json
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from PIL import Image
from torch import nn
from tqdm import tqdm

from facesnap import landmarks
from facesnap.evaluation.metrics import attribute_accuracy
from facesnap.evaluation.report import rounded, table
from facesnap.faces import align, five_points
from facesnap.synthetic.people import BACKDROPS, CLOTHES, GLASSES, HATS, LIGHTS, STYLES
from facesnap.training import data as labels_in_masks
from facesnap.training.data import People, load_people
from facesnap.training.trainer import Batch, Stage, Trainer, TrainerConfig

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
LEAST_CLOTHES = 0.01  # of the picture: a head that fills it leaves them no room
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


# ------------------------------------------------------------------------------------------------------ training


class Block(nn.Module):
    """Two 3x3 convolutions beside a 1x1 one; halves the picture."""

    def __init__(self, inside: int, out: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inside, out, 3, 2, 1, bias=False),
            nn.BatchNorm2d(out),
            nn.ReLU(),
            nn.Conv2d(out, out, 3, 1, 1, bias=False),
            nn.BatchNorm2d(out),
        )
        self.skip = nn.Conv2d(inside, out, 1, 2, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.body(x) + self.skip(x))


def build_net(attributes: Values, width: int = 18) -> nn.Module:
    """Picture (B, 3, S, S) in [-1, 1], S = 112 or 128 → logits of all values of all attributes, one after the other."""
    sizes = (width, width, 2 * width, 3 * width, 5 * width)
    return nn.Sequential(
        nn.Conv2d(3, width, 5, 2, 2),
        nn.ReLU(),
        *(Block(a, b) for a, b in pairwise(sizes)),
        nn.Conv2d(sizes[-1], 48, 1),
        nn.ReLU(),
        nn.Flatten(),  # of 4x4 places, and not their mean: which side is lit is a matter of place
        nn.Dropout(0.1),
        nn.Linear(48 * 4 * 4, int(starts(attributes)[-1])),
    )


def read(data: People, rows: np.ndarray, view: str) -> np.ndarray:
    """What a view's net sees of the pictures: (N, S, S, 3) uint8."""
    rng = np.random.default_rng(0)
    found = []
    for i in tqdm(rows, desc=f"reading ({view})", unit="picture", mininterval=5):
        image = data.images[int(i)]
        if view == "whole":
            found.append(whole(image))
        else:  # as inexactly aligned as by a landmark net
            points = data.landmarks[i]
            noise = rng.normal(0, 0.03, (5, 2)) * landmarks.eye_distance(points)
            found.append(align(image, five_points(landmarks.to_68(points)) + noise))
    return np.stack(found)


def balance(labels: torch.Tensor, attributes: Values) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels (N, attributes) → chances (N,) of drawing a picture, and what to add to the logits in training (V,).

    Pictures with rare values are drawn more often. What is left of the imbalance must not become a habit: with the
    log frequency added to the logits in training only, the trained logits are those of equal frequencies (Menon et
    al. 2021, "Long-tail learning via logit adjustment").
    """
    shown = [
        nn.functional.one_hot(column + 1, len(values) + 1)[:, 1:].float()
        for column, values in zip(labels.T, attributes.values(), strict=True)
    ]
    rarity = [one_hot @ (1 / (one_hot.sum(0) + 1)) for one_hot in shown]
    chances = torch.stack([r / r.mean() for r in rarity]).mean(0)
    counts = [chances @ one_hot + 1 for one_hot in shown]
    return chances, torch.cat([torch.log(count / count.sum()) for count in counts])


def softened(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Half of the batch loses detail and gains noise, as generated pictures do; all move by a few pixels.
    Never mirrored (the side of the light is a label) and never tinted (so are the colours)."""
    size = images.shape[-1]
    dx, dy = torch.randint(-6, 7, (2,), generator=generator).tolist()
    padded = nn.functional.pad(images, (6, 6, 6, 6), mode="replicate")
    images = padded[:, :, 6 + dy : 6 + dy + size, 6 + dx : 6 + dx + size].clone()
    half = images[::2]
    small = int(torch.randint(size // 2, size, (), generator=generator))
    blurred = nn.functional.interpolate(half, size=small, mode="bilinear", antialias=True)
    blurred = nn.functional.interpolate(blurred, size=size, mode="bilinear")
    noise = torch.randn(half.shape, generator=generator) * 0.06 * torch.rand((), generator=generator)
    images[::2] = blurred + noise
    return images


class ScorerStage(Stage):
    """One view's net learns what its pictures show; rare values are drawn more often (`balance`)."""

    def __init__(self, pictures: np.ndarray, labels: np.ndarray, attributes: Values, batch_size: int = 64):
        self.pictures, self.labels, self.batch_size = torch.from_numpy(pictures), torch.from_numpy(labels), batch_size
        self.net = build_net(attributes).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.chances, self.lean = balance(self.labels, attributes)
        self.parts = list(pairwise(starts(attributes)))

    def modules(self) -> dict[str, nn.Module]:
        return {"net": self.net}

    def batch(self, rng: np.random.Generator) -> Batch:
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        rows = torch.multinomial(self.chances, self.batch_size, generator=generator)
        images = self.pictures[rows].permute(0, 3, 1, 2).float() / 127.5 - 1
        return {"images": softened(images, generator), "labels": self.labels[rows]}

    def loss(self, batch: Batch, step: int, generator: torch.Generator) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        logits = self.net(batch["images"].contiguous(memory_format=torch.channels_last)).float()
        logits, labels = logits + self.lean.to(logits.device), batch["labels"]
        losses = [
            nn.functional.cross_entropy(logits[:, first:last], column, ignore_index=-1)
            for (first, last), column in zip(self.parts, labels.T, strict=True)
            if (column >= 0).any()
        ]
        return torch.stack(losses).sum(), {}


def train(stage: ScorerStage, out: Path, **options: Any) -> nn.Module:
    """The stage's net after some minutes or steps (`TrainerConfig`), with the moving average of its weights."""
    recipe: dict[str, Any] = {"optimiser": "muon", "lr": 3e-3, "betas": (0.9, 0.98), "ema": 0.995, "hold": 0.2}
    config = TrainerConfig(out, **recipe | options)
    trainer = Trainer(stage, config)
    trainer.train()
    trainer.average.swap()  # for good: what follows is the export
    return stage.net.cpu().eval()


def labels_of(data: People, rows: Iterable[int], attributes: Values) -> np.ndarray:
    """(N, attributes): the index of each value, -1 for what cannot be seen."""
    seen = []
    for i in rows:
        shown = visible(data.attributes[i], data.styles[i])
        if (data.masks[int(i)] == labels_in_masks.CLOTHES).mean() < LEAST_CLOTHES:
            shown.pop("clothes_color", None)
        seen.append(shown)
    return np.array([[v.index(s[n]) if n in s else -1 for n, v in attributes.items()] for s in seen])


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the attribute scorer on rendered people.")
    parser.add_argument("--data", type=Path, required=True, help="folder of shards (python -m facesnap.synthetic)")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=16, help="both nets together")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--pictures", type=int, default=20_000, help="how many to read (50 KB of memory each)")
    arguments = parser.parse_args()
    data, out = load_people(arguments.data), arguments.out
    rows = np.sort(np.random.default_rng(0).permutation(len(data))[: arguments.pictures])
    left_out = data.person[rows] % 20 == 0
    torch.set_num_threads(1)  # two can corrupt the heap in bfloat16 convolutions on a CPU
    out.mkdir(parents=True, exist_ok=True)
    accuracy: dict[str, dict] = {}
    for view, share in (("face", 0.3), ("whole", 0.7)):
        attributes = VIEWS[view]
        pictures, labels = read(data, rows, view), labels_of(data, rows, attributes)
        torch.manual_seed(0)
        stage = ScorerStage(pictures[~left_out], labels[~left_out], attributes)
        net = train(stage, out / f"{view}_run", minutes=share * arguments.minutes, device=arguments.device)
        example = torch.zeros(1, 3, *pictures.shape[1:3])
        path, names = str(out / f"attributes_{view}.onnx"), {"input_names": ["image"], "output_names": ["logits"]}
        torch.onnx.export(net, (example,), path, **names, dynamo=False)

        wanted, found = [], []
        for picture, row in zip(pictures[left_out], labels[left_out], strict=True):
            with torch.inference_mode():
                logits = net(torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 127.5 - 1)[0].numpy()
            guesses = [int(part.argmax()) for part in np.split(logits, starts(attributes)[1:-1])]
            found.append({n: v[g] for (n, v), g in zip(attributes.items(), guesses, strict=True)})
            wanted.append({n: v[i] for (n, v), i in zip(attributes.items(), row, strict=True) if i >= 0})
        result = attribute_accuracy(found, wanted)
        accuracy |= result["attributes"]
        print(table([(n, a["score"], f"recall {a['recall']:.3f}") for n, a in result["attributes"].items()]))
    notes = {"views": VIEWS, "left_out_people": rounded(accuracy)}
    (out / "attributes.json").write_text(json.dumps(notes, indent=1) + "\n")


if __name__ == "__main__":
    main()

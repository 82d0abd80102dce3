"""The attribute scorer: a small net that says what the prompt controls, by looking at a picture.

Text accuracy needs a judge that had no part in making the picture. This one is trained on rendered people
whose attributes are known, at 128², and is shared with nothing else. It must be right on true renders (>=
0.95), otherwise its verdict on generated ones means little; the evaluation prints both.

`python -m facesnap.evaluation.scorer --data SHARDS --out DIR --minutes 10` writes `attributes.onnx` (the
weights, all heads in one output) and `attributes.json` (what each output stands for).
"""

import argparse
import json
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from PIL import Image
from torch import nn
from tqdm import tqdm

from facesnap.evaluation.metrics import attribute_accuracy
from facesnap.evaluation.report import rounded, table
from facesnap.synthetic.people import (
    BACKDROPS,
    BACKGROUNDS,
    CLOTHES,
    GLASSES,
    HATS,
    LIGHTS,
    PATTERNS,
    STYLES,
)
from facesnap.training.data import load_people

SIZE = 128

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "style": STYLES,
    "light": LIGHTS,
    "background": BACKGROUNDS,
    "background_color": tuple(BACKDROPS),
    "clothes_color": tuple(CLOTHES),
    "pattern": PATTERNS,
    "glasses": GLASSES,
    "hat": HATS,
    "hat_color": tuple(CLOTHES),
}
COLOURLESS = ("pencil sketch", "black and white")


def visible(attributes: dict, style: str) -> dict[str, str]:
    """Of a picture's attributes those that can be seen in it: the ones a prompt is judged by.

    A pencil drawing shows no colours and no tint of the light; a landscape has no one colour; without a hat
    its colour is nobody's.
    """
    seen = {name: attributes[name] for name in ATTRIBUTES if name in attributes}
    seen["style"] = style
    hidden = set()
    if style in COLOURLESS:
        hidden |= {"light", "background_color", "clothes_color", "hat_color"}
    if attributes["background"] not in ("studio", "plain"):
        hidden.add("background_color")
    if attributes["hat"] == "none":
        hidden.add("hat_color")
    return {name: value for name, value in seen.items() if name not in hidden}


class AttributeScorer:
    """The trained judge. folder: where `attributes.onnx` and `attributes.json` lie."""

    def __init__(self, folder: Path):
        self.attributes: dict[str, list[str]] = json.loads((folder / "attributes.json").read_text())["attributes"]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1  # a net this small gains nothing from more
        self.session = onnxruntime.InferenceSession(
            str(folder / "attributes.onnx"), options, providers=["CPUExecutionProvider"]
        )

    def classify(self, image: np.ndarray) -> dict[str, str]:
        """The likeliest value of every attribute. image: RGB uint8 (H, W, 3)."""
        pixels = prepared(image).astype(np.float32).transpose(2, 0, 1)[None] / 127.5 - 1
        logits = self.session.run(None, {"image": pixels})[0][0]
        found, start = {}, 0
        for name, values in self.attributes.items():
            found[name] = values[int(logits[start : start + len(values)].argmax())]
            start += len(values)
        return found


def prepared(image: np.ndarray) -> np.ndarray:
    """RGB uint8 (H, W, 3) → (128, 128, 3)."""
    return np.asarray(Image.fromarray(image).resize((SIZE, SIZE), Image.Resampling.BOX))


# -------------------------------------------------------------------------------------------- training


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


def build_net(width: int = 18) -> nn.Module:
    """Picture (B, 3, 128, 128) in [-1, 1] → logits of all values of all attributes, one after the other."""
    sizes = (width, width, 2 * width, 3 * width, 5 * width)
    return nn.Sequential(
        nn.Conv2d(3, width, 5, 2, 2),
        nn.ReLU(),
        *(Block(a, b) for a, b in pairwise(sizes)),
        nn.Conv2d(sizes[-1], 48, 1),
        nn.ReLU(),
        nn.Flatten(),  # of 4x4 places, and not their mean: which side is lit is a matter of place
        nn.Dropout(0.2),
        nn.Linear(48 * 4 * 4, sum(map(len, ATTRIBUTES.values()))),
    )


def read(folder: Path, limit: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Up to `limit` pictures (N, 128, 128, 3) of the training people, their labels (N, attributes; -1 for
    what cannot be seen) and who they are (N,)."""
    data = load_people(folder)
    rows = np.random.default_rng(0).permutation(len(data))[:limit]
    rows.sort()
    pictures = np.stack([prepared(data.images[i]) for i in tqdm(rows, desc="reading", unit="picture")])
    labels = []
    for i in rows:
        seen = visible(data.attributes[i], data.styles[i])
        labels.append([v.index(seen[n]) if n in seen else -1 for n, v in ATTRIBUTES.items()])
    return pictures, np.array(labels), data.person[rows]


def softened(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Half of the batch loses detail and gains noise, as generated pictures do; all move by a few pixels.
    Never mirrored (the side of the light is a label) and never tinted (so are the colours)."""
    dx, dy = torch.randint(-6, 7, (2,), generator=generator).tolist()
    padded = nn.functional.pad(images, (6, 6, 6, 6), mode="replicate")
    images = padded[:, :, 6 + dy : 6 + dy + SIZE, 6 + dx : 6 + dx + SIZE].clone()
    half = images[::2]
    small = int(torch.randint(40, 112, (), generator=generator))
    blurred = nn.functional.interpolate(half, size=small, mode="bilinear", antialias=True)
    blurred = nn.functional.interpolate(blurred, size=SIZE, mode="bicubic")
    noise = torch.randn(half.shape, generator=generator) * 0.08 * torch.rand((), generator=generator)
    images[::2] = blurred + noise
    return images


def balance(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels (N, attributes) → chances (N,) of drawing a picture, and what to add to the logits in training
    (V,).

    Pictures with rare values are drawn more often. What is left of the imbalance must not become a habit:
    with the log frequency added to the logits in training only, the trained logits are those of equal
    frequencies (Menon et al. 2021, "Long-tail learning via logit adjustment").
    """
    shown = [
        nn.functional.one_hot(column + 1, len(v) + 1)[:, 1:].float()
        for column, v in zip(labels.T, ATTRIBUTES.values(), strict=True)
    ]
    rarity = [one_hot @ (1 / (one_hot.sum(0) + 1)) for one_hot in shown]
    chances = torch.stack([r / r.mean() for r in rarity]).mean(0)
    lean = [torch.log(chances @ one_hot + 1) - torch.log((chances @ one_hot + 1).sum()) for one_hot in shown]
    return chances, torch.cat(lean)


def train(data: Path, out: Path, *, minutes: float, limit: int, seed: int = 0) -> dict:
    """Trains for `minutes` of processor time (a busy machine takes longer and learns as much), exports to
    `out`, returns the accuracy on people left out of the training."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    pictures, labels, people = read(data, limit)
    left_out = people % 20 == 0
    x, y = torch.from_numpy(pictures[~left_out]), torch.from_numpy(labels[~left_out])
    starts = np.cumsum([0, *map(len, ATTRIBUTES.values())])
    chances, lean = balance(y)
    net = build_net().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=1e-2)
    start, batch, step, seen_loss = time.process_time(), 64, 0, 0.0
    while (spent := (time.process_time() - start) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 100) * (0.5 + 0.5 * np.cos(np.pi * spent)) + 1e-5
        rows = torch.multinomial(chances, batch, generator=generator)
        images = softened(x[rows].permute(0, 3, 1, 2).float() / 127.5 - 1, generator)
        with torch.autocast("cpu", torch.bfloat16):
            logits = net(images.contiguous(memory_format=torch.channels_last))
        logits = logits.float() + lean
        loss = sum(
            nn.functional.cross_entropy(logits[:, starts[a] : starts[a + 1]], y[rows, a], ignore_index=-1)
            for a in range(len(ATTRIBUTES))
            if (y[rows, a] >= 0).any()
        )
        assert isinstance(loss, torch.Tensor)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step, seen_loss = step + 1, 0.98 * seen_loss + 0.02 * float(loss.detach())
        if step % 100 == 0:
            print(f"step {step}  loss {seen_loss / (1 - 0.98**step):.3f}  {100 * spent:.0f} %", flush=True)

    out.mkdir(parents=True, exist_ok=True)
    export(net.eval(), out, {})
    scorer = AttributeScorer(out)
    found = [scorer.classify(picture) for picture in pictures[left_out]]
    wanted = [
        {n: v[i] for (n, v), i in zip(ATTRIBUTES.items(), row, strict=True) if i >= 0} for row in labels[left_out]
    ]
    result = attribute_accuracy(found, wanted)
    export(net, out, {"left_out_people": rounded(result)})
    return result


def export(net: nn.Module, out: Path, notes: dict) -> None:
    """attributes.onnx, and attributes.json with the order of its outputs and `notes`."""
    example = torch.zeros(1, 3, SIZE, SIZE)
    torch.onnx.export(
        net,
        (example,),
        str(out / "attributes.onnx"),
        input_names=["image"],
        output_names=["logits"],
        dynamo=False,
    )
    names = {name: list(values) for name, values in ATTRIBUTES.items()}
    (out / "attributes.json").write_text(json.dumps({"attributes": names, **notes}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the attribute scorer on rendered people.")
    parser.add_argument("--data", type=Path, required=True, help="folder of shards (python -m facesnap.synthetic)")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=6, help="of processor time")
    parser.add_argument("--pictures", type=int, default=20_000, help="how many to read (50 KB of memory each)")
    arguments = parser.parse_args()
    result = train(arguments.data, arguments.out, minutes=arguments.minutes, limit=arguments.pictures)
    print(table([(n, a["score"], f"recall {a['recall']:.3f}") for n, a in result["attributes"].items()]))
    print(table([("all", result["score"], f"recall {result['recall']:.3f}")]))


if __name__ == "__main__":
    main()

"""What the avatars of photographs show, against what people see in the photographs.

The mini turns a photograph into one of its rendered people. Does a bald man stay bald, and a man a man? A folder of
photographs with `labels.csv` says what people see: a column `file`, and one for each trait of TRAITS, "-" where a
viewer would hesitate. A small net that learns these traits from rendered people, whose parameters are known, says what
the avatars show. It shares nothing with the checkpoint. How well it reads rendered people that it has not learned from
is printed beside: what it misreads there, it misreads here.
"""

import argparse
import csv
from itertools import pairwise
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from facesnap import metrics
from facesnap.errors import InputError
from facesnap.evaluation import protocol, report
from facesnap.faces import box_around
from facesnap.geometry import square_crop
from facesnap.images import open_image
from facesnap.landmarks import to_68
from facesnap.provenance import fingerprint
from facesnap.synthetic.dataset import load_people

TRAITS: dict[str, tuple[str, ...]] = {
    "presents_as": ("m", "w"),
    "hair_colour": ("black", "brown", "blond", "red", "gray"),
    "hair_length": ("bald", "short", "long"),
    "beard": ("none", "moustache", "full"),
    "skin": ("light", "medium", "dark"),
}
UNSURE = "-"
SIDE = 64  # of the crops that the net reads, pixels
EPOCHS, BATCH, RATE = 14, 64, 4e-3
RAREST = 8.0  # how much more than its share a rare class may count
EVERY = 5  # each fifth rendered person is not learned from

# The renderer's words in those of the labels; what a viewer might call either is left out.
HAIR = {"black": "black", "dark brown": "brown", "brown": "brown", "blond": "blond", "red": "red", "gray": "gray"}
HAIR |= {"white": "gray"}
LENGTH = {"bald": "bald", "balding": "bald", "short": "short", "buzzed": "short", "fringe": "short"}
LENGTH |= {"long": "long", "long curly": "long", "bob": "long"}
BEARD = {"none": "none", "moustache": "moustache", "beard": "full", "goatee": "full"}
SKIN = {"fair": "light", "light": "light", "tan": "medium", "dark": "dark"}


def traits_of(attributes: dict) -> dict[str, str]:
    """What a viewer sees of a rendered person in a picture, by the words that the renderer has for both."""
    seen = {
        "presents_as": {"man": "m", "woman": "w"}.get(attributes["gender"], UNSURE),
        "hair_colour": HAIR.get(attributes["hair"], UNSURE),
        "hair_length": LENGTH.get(attributes["haircut"], UNSURE),
        "beard": BEARD.get(attributes["beard"], UNSURE),
        "skin": SKIN.get(attributes["skin"], UNSURE),
    }
    if attributes.get("age") == "child":
        seen["presents_as"] = UNSURE
    if attributes.get("graying", "none") != "none":
        seen["hair_colour"] = UNSURE
    if attributes.get("hat", "none") != "none":
        seen["hair_colour"] = seen["hair_length"] = UNSURE
    return seen


def crop_of(image: np.ndarray, points: np.ndarray) -> np.ndarray:
    """(SIDE, SIDE, 3) uint8 of a face in RGB uint8 (H, W, 3) with iBUG-68 points (68, 2+), hair included."""
    return cv2.resize(square_crop(image, box_around(points)), (SIDE, SIDE), interpolation=cv2.INTER_AREA)


class Reader(nn.Module):
    """Crops → the traits: four halvings, then all that is left decides."""

    def __init__(self, width: int = 16):
        super().__init__()
        widths = [3, *(width * 2**k for k in range(4))]
        self.body = nn.Sequential(*(self._half(i, o) for i, o in pairwise(widths)), nn.Flatten(), nn.Dropout(0.3))
        self.head = nn.Linear(widths[-1] * (SIDE // 16) ** 2, sum(map(len, TRAITS.values())))

    @staticmethod
    def _half(inside: int, outside: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(inside, outside, 3, 2, 1), nn.BatchNorm2d(outside), nn.ReLU(),
            nn.Conv2d(outside, outside, 3, 1, 1, groups=outside), nn.Conv2d(outside, outside, 1),
            nn.BatchNorm2d(outside), nn.ReLU(),
        )  # fmt: skip

    def forward(self, crops: Tensor) -> tuple[Tensor, ...]:
        """Crops (N, 3, SIDE, SIDE) in [-1, 1] → logits (N, K) of each trait."""
        return self.head(self.body(crops)).split([len(values) for values in TRAITS.values()], dim=1)

    @torch.no_grad()
    def read(self, crops: np.ndarray) -> list[dict[str, str]]:
        """The traits of crops (N, SIDE, SIDE, 3) uint8."""
        said: list[dict[str, str]] = []
        for start in range(0, len(crops), 256):
            logits = self.eval()(as_input(crops[start : start + 256]))
            best = [values.argmax(dim=1).tolist() for values in logits]
            said += [{n: TRAITS[n][i] for n, i in zip(TRAITS, row, strict=True)} for row in zip(*best, strict=True)]
        return said


def as_input(crops: np.ndarray) -> Tensor:
    return torch.from_numpy(crops).permute(0, 3, 1, 2).float() / 127.5 - 1


def trained(crops: np.ndarray, seen: list[dict[str, str]], seed: int = 0) -> Reader:
    """A reader of crops (N, SIDE, SIDE, 3) uint8 with these traits; every class counts about the same."""
    torch.manual_seed(seed)
    target = torch.tensor([[v.index(row[n]) if row[n] != UNSURE else -1 for n, v in TRAITS.items()] for row in seen])
    weights = []
    for k, values in enumerate(TRAITS.values()):
        often = torch.bincount(target[target[:, k] >= 0, k], minlength=len(values)).float()
        weights.append((often.sum() / len(values) / often.clamp(min=1)).clamp(max=RAREST))
    reader, pixels = Reader().train(), as_input(crops)
    optimizer = torch.optim.AdamW(reader.parameters(), lr=RATE, weight_decay=0.05)
    steps = EPOCHS * max(1, len(seen) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    order: list[Tensor] = []
    for _ in tqdm(range(steps), desc="reader", unit="step"):
        order = order or list(torch.randperm(len(seen), generator=generator).split(BATCH))
        rows = order.pop()
        logits = reader(varied(pixels[rows], generator))
        losses = [
            functional.cross_entropy(logits[k], target[rows, k], weight=weights[k], ignore_index=-1, reduction="sum")
            / max(1, int((target[rows, k] >= 0).sum()))
            for k in range(len(TRAITS))
        ]
        optimizer.zero_grad()
        sum(losses).backward()  # type: ignore[union-attr]
        optimizer.step()
        schedule.step()
    return reader


def varied(crops: Tensor, generator: torch.Generator) -> Tensor:
    """Some mirrored, all a little lighter or darker, of another tint, and moved: no trait depends on these."""

    def drawn(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    count = len(crops)
    crops = torch.where(drawn(count, 1, 1, 1) < 0.5, crops.flip(3), crops)
    gain = (0.75 + 0.5 * drawn(count, 1, 1, 1)) * (0.9 + 0.2 * drawn(count, 3, 1, 1))
    shift = torch.randint(-3, 4, (2,), generator=generator).tolist()
    return ((crops + 1) * gain - 1).clamp(-1, 1).roll(shift, (2, 3))


def learn(shards: Path) -> tuple[Reader, dict[str, dict]]:
    """A reader from the photographs among rendered people, and how well it reads those it has not learned from."""
    try:
        people = load_people(shards, held_out=True)
    except FileNotFoundError as error:
        raise InputError(f"There are no rendered people in '{shards.name}': {error}.") from error
    rows = [row for row in range(len(people)) if people.styles[row] == "photo"]
    seen = [traits_of(people.attributes[row]) for row in rows]
    crops = np.stack([crop_of(people.images[row], to_68(people.landmarks[row])) for row in rows])
    tested = people.person[rows] % EVERY == 0
    reader = trained(crops[~tested], [row for row, out in zip(seen, tested, strict=True) if not out])
    return reader, judged(reader.read(crops[tested]), [row for row, out in zip(seen, tested, strict=True) if out])


def judged(said: list[dict], wanted: list[dict]) -> dict[str, dict]:
    """{trait: balanced accuracy, its 95 % interval, pictures}; a picture without an answer is wrong."""
    results = {}
    for name in TRAITS:
        pairs = [(s.get(name, "none found"), w[name]) for s, w in zip(said, wanted, strict=True) if w[name] != UNSURE]
        if len({w for _, w in pairs}) < 2:
            continue
        answers, truth = (np.array(column) for column in zip(*pairs, strict=True))

        def recall(rows: np.ndarray, answers: np.ndarray = answers, truth: np.ndarray = truth) -> float:
            return float(np.mean([np.mean(answers[rows][truth[rows] == c] == c) for c in np.unique(truth[rows])]))

        every = np.arange(len(pairs))
        low, high = metrics.interval(recall, every)
        shown = {str(c): [int((answers[truth == c] == c).sum()), int((truth == c).sum())] for c in np.unique(truth)}
        results[name] = {
            "balanced_accuracy": recall(every),
            "interval": [low, high],
            "pictures": len(pairs),
            "right_of_each": shown,
        }
    return results


def labels(folder: Path) -> list[dict[str, str]]:
    """The rows of `labels.csv`; InputError names what is wrong in it."""
    place = folder / "labels.csv"
    if not place.is_file():
        raise InputError(f"'{folder.name}' has no labels.csv: give a folder with photographs and their labels.")
    with place.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    for number, row in enumerate(rows, start=2):
        for name in ("file", *TRAITS):
            if row.get(name) is None:
                raise InputError(f"Line {number} of labels.csv has no {name}: it needs file, {', '.join(TRAITS)}.")
            if name in TRAITS and row[name] not in (*TRAITS[name], UNSURE):
                words = ", ".join(TRAITS[name])
                raise InputError(f"Line {number} of labels.csv: {name} is {row[name]!r}; choose {words} or {UNSURE}.")
    if not rows:
        raise InputError("labels.csv names no photograph: it has no line but its first.")
    return rows


def run(arguments: argparse.Namespace) -> dict:
    """An avatar of every photograph at all defaults, read; `--sheet` shows them, the worst first."""
    folder, model = Path(arguments.folder), Path(arguments.model)
    if arguments.renders is None:
        raise InputError("Give --renders, a folder of rendered people, for the reader to learn from.")
    rows = labels(folder)
    reader, on_renders = learn(Path(arguments.renders))
    pipe = protocol.load_pipeline(model, arguments.device)
    version = fingerprint(model)
    work = Path(arguments.out).with_suffix(".work") / f"{version[:12]}-{arguments.seed}"
    work.mkdir(parents=True, exist_ok=True)
    said: list[dict[str, str]] = []
    found = 0
    for row in tqdm(rows, desc="avatars", unit="avatar"):
        avatar = work / f"{Path(row['file']).stem}.png"
        try:
            if not avatar.is_file():
                made = pipe("", reference=folder / row["file"], seed=arguments.seed, score=False).images[0]
                made.save(work / "unfinished.png")
                (work / "unfinished.png").replace(avatar)
            found += 1
            picture = open_image(avatar)
            said += reader.read(crop_of(picture, pipe.analyse(picture).landmarks)[None])
        except InputError as error:
            said.append({"refused": str(error)})
    if arguments.sheet:
        sheet(rows, said, folder, work, Path(arguments.sheet))
    return {
        "settings": {"what": "photographs", "model": version, "seed": arguments.seed, "photographs": len(rows)},
        "results": {
            "faces": len(rows),
            "found": found,
            "traits": judged(said, rows),
            "on_renders": on_renders,
            "each": [{"file": row["file"], **answers} for row, answers in zip(rows, said, strict=True)],
        },
    }


def sheet(rows: list[dict], said: list[dict], folder: Path, work: Path, out: Path) -> None:
    """photograph | avatar, those with most traits wrong first; for the eye, never to be committed."""

    def wrong(i: int) -> list[str]:
        told = [n for n in TRAITS if rows[i][n] != UNSURE and said[i].get(n) != rows[i][n]]
        return [f"{name}: {said[i].get(name, 'no face')} for {rows[i][name]}" for name in told]

    shown, captions = [], []
    for i in sorted(range(len(rows)), key=lambda i: -len(wrong(i))):
        avatar = work / f"{Path(rows[i]['file']).stem}.png"
        pictures = [folder / rows[i]["file"], *([avatar] if avatar.is_file() else [])]
        shown.append([np.asarray(Image.fromarray(open_image(p)).resize((256, 256))) for p in pictures])
        captions.append("; ".join(wrong(i)) or "all right")
    report.contact_sheet(shown, ["photograph", "avatar"], out, captions=captions)


def lines(results: dict[str, Any]) -> list[tuple[str, object, str]]:
    """The report for the terminal: name, value, remark."""
    told: list[tuple[str, object, str]] = [("faces found", results["found"], f"of {results['faces']}")]
    for name, row in results["traits"].items():
        low, high = row["interval"]
        each = ", ".join(f"{c} {right} of {of}" for c, (right, of) in row["right_of_each"].items())
        known = results["on_renders"].get(name, {}).get("balanced_accuracy", float("nan"))
        remark = f"{low:.2f} to {high:.2f}; {each}; the reader on renders {known:.2f}"
        told.append((name, row["balanced_accuracy"], remark))
    return told

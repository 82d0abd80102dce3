"""What the face encoder knows of a face: linear probes on people whom no training has seen.

Without it the mixer's second half would be told nothing, and Table 2 of the paper would compare nothing.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import CLIPVisionModel

from facesnap import metrics
from facesnap.clip import face_pixels
from facesnap.errors import InputError
from facesnap.evaluation import protocol
from facesnap.faces import FaceAnalyser
from facesnap.folder import read_settings
from facesnap.images import open_image
from facesnap.provenance import fingerprint
from facesnap.synthetic.people import EVALUATION_PEOPLE, sample_person, sample_picture

ASKED = ("eyes", "hair", "beard")
PHOTOS = (40, 41)  # of each person


def run(arguments: argparse.Namespace) -> dict:
    """Probes fitted to two thirds of `--people` held-out people, and what they say of the last third."""
    model, out = Path(arguments.model), Path(arguments.out)
    settings = {"what": "probes", "model": fingerprint(model)}
    settings |= {n: getattr(arguments, n) for n in ("people", "seed", "size")}
    order = np.random.default_rng([arguments.seed, 4]).permutation(np.array(EVALUATION_PEOPLE))
    if not 60 <= arguments.people <= len(order):
        raise InputError(f"--people {arguments.people}: choose 60 (fewer lack some colours) to {len(order)}")
    analyser, work = FaceAnalyser(model / "face_pack"), out.with_suffix(".work")
    encoder = CLIPVisionModel.from_pretrained(model / "face_encoder", dtype=torch.float32, use_safetensors=True)
    encoder = encoder.to(arguments.device).eval()
    saturation = read_settings(model).saturation
    features, labels, tested = [], [], []
    for n, seed in enumerate(tqdm(order[: arguments.people].tolist(), desc="people", unit="person")):
        person = sample_person(seed)
        for index in PHOTOS:
            # a hat hides hair, glasses hide eyes
            picture = sample_picture(person, index, style="photo", attributes={"hat": "none", "glasses": "none"})
            path = protocol.rendered(picture, work / f"person_{seed}_{index}.png", arguments.size)
            try:
                face = analyser.analyse(open_image(path))
            except InputError:
                continue
            pixels = face_pixels(face.crop[None], encoder.config.image_size, saturation).to(arguments.device)
            with torch.no_grad():
                hidden = encoder(pixels, output_hidden_states=True).hidden_states[-2]
            features.append(hidden.flatten().cpu().double().numpy())
            labels.append([person.attributes[name] for name in ASKED])
            tested.append(n >= arguments.people * 2 // 3)
    held = np.array(tested)
    found = {
        name: metrics.linear_probe(np.stack(features), [row[k] for row in labels], held) for k, name in enumerate(ASKED)
    }
    return {"settings": settings, "results": {"pictures": len(held), "tested": int(held.sum()), "probes": found}}


def lines(results: dict) -> list[tuple[str, object, str]]:
    """The report for the terminal: name, value, remark."""
    remark = "balanced accuracy of {tested} pictures, chance {chance:.2f}"
    return [
        (name, probe["balanced_accuracy"], remark.format(tested=results["tested"], chance=probe["chance"]))
        for name, probe in results["probes"].items()
    ]

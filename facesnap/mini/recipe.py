"""The mini's recipe: a whole FaceSnap from nothing, stage by stage, on rendered people (python -m facesnap.mini).

Here are the stages up to the features; those that learn to make portraits are in portraits.py, what ships in
checkpoint.py. Each stage is a function of a `Run` and a number of minutes, reads what earlier ones left in `run.work`
and, where it learns, goes on from its last checkpoint there.
"""

import dataclasses
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, CLIPVisionModel

from facesnap.mini import augment
from facesnap.mini import features as feats
from facesnap.mini.joint import SIZE, WIDTHS
from facesnap.mini.nets import face_encoder as clip
from facesnap.mini.nets.detector import train_detector
from facesnap.mini.nets.judge import train_judge
from facesnap.mini.nets.landmarks import train_landmarks
from facesnap.mini.nets.recogniser import train_recogniser
from facesnap.mini.nets.scorer import train_scorer
from facesnap.mini.nets.tokenizer import make_text_encoders, train_tokenizer
from facesnap.mini.nets.vae import VaeStage, make_trainer, make_vae
from facesnap.mini.nets.vae import export as export_vae
from facesnap.mini.nets.vae_losses import FaceFeatures, PatchCritic
from facesnap.synthetic.__main__ import main as render_people
from facesnap.synthetic.dataset import load_people
from facesnap.training.checkpointing import write_whole
from facesnap.training.trainer import Trainer, TrainerConfig

FACTOR = 16
# Beyond the people of stage people: whom the head model is made of, and whom recogniser C learns to tell apart
FIRST_SHAPE_PERSON, SHAPE_PEOPLE = 50_000, 1500
FIRST_JUDGED_PERSON, JUDGED_PEOPLE = 60_000, 4000
# More people than those that an evaluation meets, for photographs: (first seed, share of --people, pictures of each,
# flags). Some are seen from afar, some have other hair, some both.
MORE_PEOPLE = (
    (20_000, 0.18, 3, ("--wide",)),
    (30_000, 0.60, 2, ("--varied",)),
    (40_000, 0.12, 2, ("--wide", "--varied")),
)
MOST_PEOPLE = 16_000
TOKENIZER_WORDS = 3000  # captions that the tokenizer's words are taken from
NETS = ("A", "landmarks", "detector", "C", "B")
SHIPPED = {  # where the other stages look for what stage faces trained
    "detector": "face_pack/detector",
    "landmarks": "face_pack/landmarks",
    "recogniser_A": "face_pack/recogniser",
    "recogniser_C": "scorer/recogniser",
}


@dataclass(frozen=True)
class Run:
    """Where a run keeps what, and its options."""

    work: Path
    out: Path
    data: Path
    device: str = "cpu"
    people: int = 4000
    per_person: int = 5
    workers: int = 1
    steps: int | None = None
    nets: tuple[str, ...] = NETS
    widths: tuple[int, ...] = WIDTHS


def people(run: Run, minutes: float) -> None:
    """Render the shards; what is there already stays."""
    if run.people > MOST_PEOPLE:
        raise ValueError(f"--people {run.people}: choose at most {MOST_PEOPLE}, the seeds after them are others'")
    _render(run, run.data, run.people, run.per_person)
    for seed, share, per_person, flags in MORE_PEOPLE:
        _render(run, run.data, max(1, round(share * run.people)), per_person, "--seed", seed, *flags)


def _render(run: Run, out: Path, count: int, per_person: int, *options: object) -> None:
    words = ["--out", out, "--people", count, "--per-person", per_person, "--size", SIZE, "--workers", run.workers]
    render_people([str(word) for word in (*words, *options)])


def faces(run: Run, minutes: float) -> None:
    """The five nets, then the face pack (with A) and the scorer (C) where the other stages look for them."""
    place, known = run.work / "faces", augment.load(run.data)
    for net in run.nets:
        print(f"{net}: {len(known)} pictures of {int(known.person.max()) + 1} people", flush=True)
        if net == "detector":
            train_detector(known, place, minutes / len(run.nets), device=run.device)
        elif net == "landmarks":
            train_landmarks(known, place, minutes / len(run.nets), device=run.device)
        elif net == "C":
            others = run.work / "judge_people"
            _render(run, others, JUDGED_PEOPLE, 4, "--seed", FIRST_JUDGED_PERSON)
            train_judge(augment.load(others), place, minutes / len(run.nets), device=run.device)
        else:
            train_recogniser(net, known, place, minutes / len(run.nets), device=run.device)
    for source, target in SHIPPED.items():
        if (place / f"{source}.onnx").exists():
            (run.work / target).parent.mkdir(exist_ok=True)
            shutil.copy(place / f"{source}.onnx", run.work / f"{target}.onnx")


def scorer(run: Run, minutes: float) -> None:
    train_scorer(load_people(run.data), run.work / "scorer", minutes, device=run.device)


def vae(run: Run, minutes: float) -> None:
    """Pixels and features, by the nets that will read its pictures; in the last third a critic asks for texture."""
    torch.manual_seed(0)
    features = FaceFeatures.from_folder(run.work)
    first = train_vae(run, "vae_run", make_vae(), 2 / 3 * minutes, lr=2e-3, features=features)
    begun = AutoencoderKL.from_pretrained(first, use_safetensors=True)
    last = train_vae(run, "vae_critic_run", begun, minutes / 3, lr=1e-3, features=features, critic=PatchCritic())
    write_whole(run.work / "vae", lambda draft: shutil.copytree(last, draft))


def train_vae(
    run: Run, name: str, model: AutoencoderKL, minutes: float, *, lr: float, crop: int = 128, batch: int = 8, **options
) -> Path:
    """Train a VAE and return the folder of what came of it, beside its checkpoints. options: of `VaeStage`."""
    stage = VaeStage(model, run.data, batch_size=batch, crop=crop, **options)
    trainer = make_trainer(stage, run.work / name, lr=lr, device=run.device, minutes=minutes)
    trainer.train()
    export_vae(trainer, stage, run.work / name / "vae")
    return run.work / name / "vae"


def face_encoder(run: Run, minutes: float) -> None:
    """From nothing, or from the encoder that `unpack` or an earlier run left, whose tokenizer stays too."""
    torch.manual_seed(0)
    known = load_people(run.data)
    if not (run.work / "tokenizer").is_dir():
        captions = known.prompts[:TOKENIZER_WORDS] + known.rich[:TOKENIZER_WORDS]
        train_tokenizer(captions).save_pretrained(run.work / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(run.work / "tokenizer")
    _, text = make_text_encoders(tokenizer)
    encoder, place = clip.make_face_encoder(), run.work / "face_encoder"
    if place.is_dir():
        shipped = CLIPVisionModel.from_pretrained(place, dtype=torch.float32, use_safetensors=True)
        encoder.vision_model.load_state_dict(shipped.state_dict())
    if (run.work / "text_encoder_2_clip").is_dir():
        text = CLIPTextModelWithProjection.from_pretrained(
            run.work / "text_encoder_2_clip", dtype=torch.float32, use_safetensors=True
        )
    stage = clip.FaceEncoderStage(encoder, text, tokenizer, known, *clip.crops_of(known))
    trainer = Trainer(
        stage,
        TrainerConfig(
            run.work / "face_encoder_run", minutes=minutes, optimiser="muon", lr=2e-3, betas=(0.9, 0.98),
            weight_decay=0.05, device=run.device, ema=0.99, warmup=20, log_every=10,
        ),
    )  # fmt: skip
    trainer.train()
    with trainer.averaged():
        write_whole(place, lambda draft: clip.save_face_encoder(encoder.cpu(), draft))
        write_whole(run.work / "text_encoder_2_clip", text.cpu().save_pretrained)
    rows = np.arange(len(known))[:: max(1, len(known) // 3000)]
    model = CLIPVisionModel.from_pretrained(place, dtype=torch.float32, use_safetensors=True)
    found = clip.probes(clip.features_of(model, stage.crops, rows), known, rows)
    (run.work / "probes.json").write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found))


def head(run: Run, minutes: float) -> None:
    """The head model, and what A's embedding tells of a head's shape, from people whom A has not met."""
    place, data = run.work / "head", run.work / "shape_people"
    model = feats.make_head_model(SHAPE_PEOPLE, first=FIRST_SHAPE_PERSON)
    model.save_pretrained(place)
    _render(run, data, SHAPE_PEOPLE, 2, "--seed", FIRST_SHAPE_PERSON)
    known = load_people(data)
    faces = run.work / "shape_faces"
    found = feats.analyse_people(data, run.work / "face_pack", place, faces, len(known), workers=run.workers)
    dataclasses.replace(model, regressor=feats.shape_regressor(model, found, known)).save_pretrained(place)
    shutil.rmtree(faces)  # another recogniser would find other embeddings


def features(run: Run, minutes: float) -> None:
    """Everything the diffusion stages read, under `work/features`."""
    place = run.work / "features"
    place.mkdir(parents=True, exist_ok=True)
    known = load_people(run.data)
    if not (place / "latents.npy").exists():
        model = AutoencoderKL.from_pretrained(run.work / "vae", use_safetensors=True).eval()
        save_array(place / "latents.npy", feats.latents_of(model, known, device=run.device))
    photos = np.flatnonzero(np.array(known.styles) == "photo")  # references are photos
    encoder = CLIPVisionModel.from_pretrained(
        run.work / "face_encoder", dtype=torch.float32, use_safetensors=True
    ).eval()
    for name, clip_name, rows, look in (
        ("faces", "clip.npy", None, "rendered"),
        ("photographed", "clip_photographed.npy", photos, "photographed"),
        ("poor", "clip_poor.npy", photos, "poor"),
    ):
        looked = feats.analyse_people(
            run.data,
            run.work / "face_pack",
            run.work / "head",
            place / name,
            len(known),
            rows=rows,
            look=look,
            workers=run.workers,
        )
        if not (place / clip_name).exists():
            found = np.flatnonzero(looked.found)
            states = clip.features_of(encoder, looked.crops, found).half().numpy()
            kept = np.zeros((len(known), *states.shape[1:]), np.float16)
            kept[found] = states
            save_array(place / clip_name, kept)


def decoder(run: Run, minutes: float) -> None:
    """The VAE's decoder goes on alone, asked for texture: by crops, then by whole pictures, whose edges a crop seldom
    shows."""
    features, critic = FaceFeatures.from_folder(run.work), PatchCritic()
    latents = np.load(run.work / "features" / "latents.npy", mmap_mode="r")
    place = run.work / "vae_critic_run" / "vae"
    place = place if place.is_dir() else run.work / "vae"  # of `unpack`
    for name, share, lr, crop, batch in (("crops", 0.8, 1e-3, 128, 8), ("whole", 0.2, 4e-4, SIZE, 2)):
        model = AutoencoderKL.from_pretrained(place, use_safetensors=True)
        place = train_vae(
            run, f"decoder_{name}_run", model, share * minutes, lr=lr, crop=crop, batch=batch, latents=latents,
            features=features, critic=critic,
        )  # fmt: skip
    write_whole(run.work / "vae", lambda draft: shutil.copytree(place, draft))


def save_array(path: Path, array: np.ndarray) -> None:
    """Whole or not at all, also where several processes save the same."""
    draft = path.with_suffix(f".{os.getpid()}.npy")
    np.save(draft, array)
    draft.replace(path)

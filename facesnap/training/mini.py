"""The mini's recipe: a whole FaceSnap from nothing, stage by stage, on rendered people.

    python -m facesnap.training.mini --all --work DIR --out assets/mini            # everything, 15 hours on 2 cores
    python -m facesnap.training.mini --stage joint --work DIR --minutes 60         # one stage; what is done is kept
    python -m facesnap.training.mini --all --work DIR --minutes 50 --device cuda   # a budget shared by the stages

| stage        | learns                                                          | needs                  |
|--------------|-----------------------------------------------------------------|------------------------|
| people       | nothing: renders the shards                                     |                        |
| faces        | detector, landmark net, recognisers A, B and C (facenets.py)    | people                 |
| scorer       | the evaluation's judges of what a prompt asks for               | people                 |
| head         | the head model and its regressor (least squares)                | faces                  |
| vae          | the VAE (vae.py)                                                | people                 |
| face_encoder | face encoder and the second text encoder (face_encoder.py)      | people                 |
| features     | nothing: latents, faces as `faces.py` finds them                | head, vae, face_encoder |
| decoder      | the VAE's decoder alone, the latents stay                       | features               |
| joint        | base UNet, text encoders, mixer, FFRNet together (diffusion.py) | features               |
| facesnap     | mixer and FFRNet, base frozen: the paper's training             | joint                  |
| identity     | the same with the identity loss (not part of --all)             | facesnap, recogniser B |
| steady       | face encoder and mixer, to see past the camera (steady.py)      | facesnap or identity   |
| assemble     | nothing: writes the checkpoint folder                           | steady                 |

Every stage that learns resumes from its last checkpoint in `--work`. `--stage unpack` fills a new work folder from a
finished checkpoint (`--out`), so that training goes on from weights that were shipped: people, unpack, features, joint,
facesnap, steady, assemble. Where recogniser A or the face encoder was trained anew in between, `adopt` comes before
joint: it teaches the shipped mixer to read them.

Several GPUs, or the cores of a CPU, share joint, steady, facesnap or identity as processes; they count steps, not
minutes:
    torchrun --nproc-per-node 2 -m facesnap.training.mini --stage joint --work DIR --threads 1 --steps 1200
"""

import argparse
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import torch
from accelerate import DistributedDataParallelKwargs
from diffusers import AutoencoderKL, UNet2DConditionModel
from onnx import helper, numpy_helper
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, CLIPVisionModel

from facesnap.faces import FaceAnalyser, Recogniser, five_points
from facesnap.ffrnet import FFRNet
from facesnap.heads import LinearHeadModel
from facesnap.mixer import FacialAttributeMixer
from facesnap.training import face_encoder as clip
from facesnap.training import features as feats
from facesnap.training.data import load_people
from facesnap.training.diffusion import (
    CONTROL_WIDTHS,
    PREDICTION,
    Parts,
    SheetStage,
    make_mixer,
    make_scheduler,
    make_unet,
    phi_of,
)
from facesnap.training.faceviews import load as load_faces
from facesnap.training.identity import IdentityConfig, IdentityLoss, load_recogniser
from facesnap.training.steady import SteadyStage, embeddings_of
from facesnap.training.text import make_text_encoders, train_tokenizer
from facesnap.training.trainer import Stage, Trainer, TrainerConfig, make_accelerator, write_whole

SIZE, FACTOR = 256, 16
FIRST_SHAPE_PERSON, SHAPE_PEOPLE = 50_000, 1500  # whom the head model is made of, beyond those of stage people
# More people than those that an evaluation meets, for photographs: (first seed, share of --people, pictures of each,
# flags). Some are seen from afar, some have other hair, some both.
MORE_PEOPLE = (
    (20_000, 0.18, 3, ("--wide",)),
    (30_000, 0.60, 2, ("--varied",)),
    (40_000, 0.12, 2, ("--wide", "--varied")),
)
MOST_PEOPLE = 16_000
ADOPTED = 5000  # pictures that a new recogniser is fitted to an old mixer with
TOKENIZER_WORDS = 3000  # captions that the tokenizer's words are taken from
NETS = ("A", "landmarks", "detector", "C", "B")
# the share of a budget that each stage gets, and what it gets without one (minutes on two cores)
SHARES = {
    "faces": 0.20,
    "scorer": 0.03,
    "vae": 0.15,
    "face_encoder": 0.06,
    "decoder": 0.05,
    "joint": 0.34,
    "facesnap": 0.12,
    "steady": 0.05,
}
MINUTES = {
    "faces": 140.0,
    "scorer": 16.0,
    "vae": 120.0,
    "face_encoder": 60.0,
    "decoder": 30.0,
    "joint": 420.0,
    "steady": 40.0,
    "facesnap": 90.0,
    "identity": 60.0,
}


HINT = (
    "This small model has seen rendered people only: a photograph becomes one of them, with its skin, hair and build. "
    "Words it knows: a photo, a pencil sketch, a watercolor, an oil painting, black and white; a shirt, striped shirt "
    "or jacket, a beanie or cap in a colour; round or square glasses; a studio, plain or blurred background, hills; "
    "soft, warm or cool light."
)


@dataclass(frozen=True)
class Run:
    """Where a run keeps what, and its options."""

    work: Path
    out: Path
    data: Path
    device: str
    threads: int
    people: int
    per_person: int
    workers: int
    steps: int | None = None

    def minutes(self, stage: str, budget: float | None, one: bool) -> float:
        if budget is None:
            return MINUTES[stage]
        return budget if one else budget * SHARES[stage]


def people(run: Run, minutes: float) -> None:
    if run.people > MOST_PEOPLE:
        raise ValueError(f"--people {run.people}: choose at most {MOST_PEOPLE}, the seeds after them are others'")
    _module(
        "facesnap.synthetic",
        out=run.data,
        people=run.people,
        per_person=run.per_person,
        size=SIZE,
        workers=run.workers,
    )
    for seed, share, per_person, flags in MORE_PEOPLE:
        _module(
            "facesnap.synthetic", *flags, out=run.data, people=max(1, round(share * run.people)), per_person=per_person,
            size=SIZE, seed=seed, workers=run.workers,
        )  # fmt: skip


def faces(run: Run, minutes: float) -> None:
    """The five nets, then the face pack (with A) and the scorer (C) where the other stages look for them."""
    place = run.work / "faces"
    for net in NETS:
        _module(
            "facesnap.training.facenets", net=net, data=run.data, out=place,
            minutes=minutes / len(NETS), device=run.device,
        )  # fmt: skip
    for source, target in {
        "detector": "face_pack/detector",
        "landmarks": "face_pack/landmarks",
        "recogniser_A": "face_pack/recogniser",
        "recogniser_C": "scorer/recogniser",
    }.items():
        (run.work / target).parent.mkdir(exist_ok=True)
        shutil.copy(place / f"{source}.onnx", run.work / f"{target}.onnx")


def scorer(run: Run, minutes: float) -> None:
    _module(
        "facesnap.evaluation.scorer", data=run.data, out=run.work / "scorer", minutes=minutes, device=run.device,
    )  # fmt: skip


def vae(run: Run, minutes: float) -> None:
    _module(
        "facesnap.training.vae", data=run.data, out=run.work / "vae_run", export=run.work / "vae",
        minutes=minutes, threads=run.threads, device=run.device,
    )  # fmt: skip


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
        shipped = CLIPVisionModel.from_pretrained(place, dtype=torch.float32)
        encoder.vision_model.load_state_dict(shipped.state_dict())
    if (run.work / "text_encoder_2_clip").is_dir():
        text = CLIPTextModelWithProjection.from_pretrained(run.work / "text_encoder_2_clip", dtype=torch.float32)
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
    model = CLIPVisionModel.from_pretrained(place, dtype=torch.float32)
    found = clip.probes(clip.features_of(model, stage.crops, rows), known, rows)
    (run.work / "probes.json").write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found))


def head(run: Run, minutes: float) -> None:
    """The head model, and what A's embedding tells of a head's shape, from people whom A has not met."""
    place, data = run.work / "head", run.work / "shape_people"
    model = feats.make_head_model(SHAPE_PEOPLE, first=FIRST_SHAPE_PERSON)
    model.save_pretrained(place)
    _module(
        "facesnap.synthetic", out=data, people=SHAPE_PEOPLE, per_person=2, size=SIZE, seed=FIRST_SHAPE_PERSON,
        workers=run.workers,
    )  # fmt: skip
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
        model = AutoencoderKL.from_pretrained(run.work / "vae").eval()
        _save(place / "latents.npy", feats.latents_of(model, known, device=run.device))
    photos = np.flatnonzero(np.array(known.styles) == "photo")  # references are photos
    encoder = CLIPVisionModel.from_pretrained(run.work / "face_encoder", dtype=torch.float32).eval()
    for name, clip_name, options in (
        ("faces", "clip.npy", {}),
        ("photographed", "clip_photographed.npy", {"rows": photos, "photographed": True}),
    ):
        looked = feats.analyse_people(
            run.data,
            run.work / "face_pack",
            run.work / "head",
            place / name,
            len(known),
            workers=run.workers,
            **options,
        )
        if not (place / clip_name).exists():
            rows = np.flatnonzero(looked.found)
            states = clip.features_of(encoder, looked.crops, rows).half().numpy()
            kept = np.zeros((len(known), *states.shape[1:]), np.float16)
            kept[rows] = states
            _save(place / clip_name, kept)


def decoder(run: Run, minutes: float) -> None:
    """The VAE's decoder goes on alone: by crops, then by whole pictures, whose edges a crop seldom shows."""
    for name, share, options in (
        ("crops", 0.8, {"crop": 128, "batch": 8, "lr": 1e-3}),
        ("whole", 0.2, {"crop": SIZE, "batch": 2, "lr": 4e-4}),
    ):
        _module(
            "facesnap.training.vae", data=run.data, out=run.work / f"decoder_{name}_run", export=run.work / "vae",
            start=run.work / "vae", latents=run.work / "features" / "latents.npy", minutes=share * minutes,
            threads=run.threads, device=run.device, **options,
        )  # fmt: skip


def unpack(run: Run, minutes: float) -> None:
    """A finished checkpoint back into the work folder, each part where its stage would have left it."""
    for name in ("vae", "face_encoder", "face_pack", "head", "scorer", "tokenizer"):
        if (run.out / name).is_dir():
            shutil.copytree(run.out / name, run.work / name, dirs_exist_ok=True)
    for name in Parts.__dataclass_fields__:
        shutil.copytree(run.out / name, run.work / "start" / name, dirs_exist_ok=True)


def adopt(run: Run, minutes: float) -> None:
    """The unpacked mixer reads a new recogniser A and face encoder: its projections say of the new features what they
    said of the old.

    A ridge regression each on pictures of known faces; what it leaves unexplained is for the stages that follow.
    """
    known, found = load_people(run.data), feats.Features.load(run.work / "features" / "faces")
    old = Recogniser(run.out / "face_pack" / "recogniser.onnx")
    rows = np.flatnonzero(found.found)
    rows = rows[np.linspace(0, len(rows) - 1, min(len(rows), ADOPTED)).astype(int)]
    before = np.stack([old.embed(known.images[int(row)], five_points(found.points68[row])) for row in rows])
    mixer: Any = FacialAttributeMixer.from_pretrained(run.work / "start" / "mixer")
    encoder = CLIPVisionModel.from_pretrained(run.out / "face_encoder", dtype=torch.float32).eval()
    some = rows[:: max(1, len(rows) // 600)]  # of some fifty states each
    states = clip.features_of(encoder, found.crops, some).flatten(0, 1).numpy()
    now = np.load(run.work / "features" / "clip.npy", mmap_mode="r")[some].astype(np.float32)
    for name, old_values, new_values in (
        ("w_id", before, found.embeddings[rows]),
        ("w_clip", states, now.reshape(states.shape)),
    ):
        left = refit(getattr(mixer, name), old_values, new_values)
        print(f"{left:.2f} of what the mixer's {name} said is left unexplained")
    mixer.save_pretrained(run.work / "start" / "mixer")


@torch.no_grad()
def refit(layer: nn.Linear, old: np.ndarray, new: np.ndarray) -> float:
    """Change `layer` so that it says of inputs `new` (N, D) what it said of `old` (N, D), by ridge regression.

    Returns the share of its outputs' variance that is left unexplained.
    """
    wanted = layer(torch.from_numpy(old)).double().numpy()
    x, middle, centre = new.astype(np.float64), wanted.mean(0), new.mean(0, dtype=np.float64)
    ridge = 1e-3 * len(x) * x.var(0).mean() * np.eye(x.shape[1])
    weight = np.linalg.solve((x - centre).T @ (x - centre) + ridge, (x - centre).T @ (wanted - middle))
    layer.weight.copy_(torch.from_numpy(weight.T))
    layer.bias.copy_(torch.from_numpy(middle - centre @ weight))
    return float((wanted - middle - (x - centre) @ weight).var() / (wanted - middle).var())


def joint(run: Run, minutes: float) -> None:
    if (run.work / "start").is_dir():
        return _diffusion(run, "joint", load_parts(run.work / "start"), minutes, lr=1.5e-3)
    torch.manual_seed(1)
    tokenizer = CLIPTokenizer.from_pretrained(run.work / "tokenizer")
    text, _ = make_text_encoders(tokenizer)
    text_2 = CLIPTextModelWithProjection.from_pretrained(run.work / "text_encoder_2_clip")
    token_dim = text.config.hidden_size + text_2.config.hidden_size
    pooled_dim = text_2.config.projection_dim
    latents = np.load(run.work / "features" / "latents.npy", mmap_mode="r")
    unet = make_unet(latents.shape[1], latents.shape[2], token_dim, pooled_dim)
    ffrnet = FFRNet.from_unet(
        unet,
        vae_scale_factor=FACTOR,
        conditioning_embedding_out_channels=CONTROL_WIDTHS,
        load_weights_from_unet=False,
    )
    vision = CLIPVisionModel.from_pretrained(run.work / "face_encoder", dtype=torch.float32)
    parts = Parts(unet, text, text_2, tokenizer, make_mixer(vision.config.hidden_size, token_dim, pooled_dim), ffrnet)
    _diffusion(run, "joint", parts, minutes, lr=2.5e-3, embed=False)


def facesnap(run: Run, minutes: float) -> None:
    _diffusion(run, "facesnap", load_parts(run.work / "joint"), minutes, lr=1e-3)


def identity(run: Run, minutes: float) -> None:
    """The paper's training with both losses, from where the last stage left off."""
    start = latest(run, "facesnap", "joint", "start")
    config = IdentityConfig(str(run.work / "faces" / "recogniser_B.onnx"), every=2, samples=16)
    _diffusion(run, "identity", load_parts(start), minutes, lr=5e-4, identity=config)


def _diffusion(
    run: Run,
    name: str,
    parts: Parts,
    minutes: float,
    *,
    lr: float,
    embed: bool = True,
    identity: IdentityConfig | None = None,
) -> None:
    """`embed`: the control pictures' embedding has learned before; it stays frozen and its output is kept."""
    stage = diffusion_stage(run, parts, joint=name == "joint", identity=identity, embed=embed)
    trainer = _trainer(run, name, stage, minutes, lr=lr)
    begun = trainer.step
    trainer.train()
    if not trainer.accelerator.is_main_process:
        return
    with trainer.averaged():
        write_whole(run.work / name, lambda draft: save_parts(parts, draft))
    for stale in ("steady", "steady_run") if trainer.step > begun else ():  # they began from other parts
        shutil.rmtree(run.work / stale, ignore_errors=True)


def steady(run: Run, minutes: float) -> None:
    """Last of all, since the features of the stages before are the old encoder's. What these stages learn later makes
    it anew."""
    parts, known = load_parts(latest(run, "identity", "facesnap", "joint", "start")), load_people(run.data)
    rows = np.flatnonzero(np.array(known.styles) == "photo")  # references are photos
    recogniser = Recogniser(run.work / "face_pack" / "recogniser.onnx")
    of_what = recogniser.path.read_bytes() + known.person[rows].tobytes() + known.index[rows].tobytes()
    cached = run.work / f"looks-{hashlib.sha256(of_what).hexdigest()[:12]}.npy"
    if not cached.exists():
        _save(cached, embeddings_of(recogniser, load_faces(run.data), rows))
    encoder = CLIPVisionModel.from_pretrained(run.work / "face_encoder", dtype=torch.float32)
    looks = np.load(cached)
    stage = SteadyStage(encoder, parts.mixer, known, rows, *clip.crops_of(known, rows), looks)
    trainer = _trainer(run, "steady", stage, minutes, lr=1e-3)
    trainer.train()

    def save(draft: Path) -> None:
        save_parts(parts, draft)
        encoder.save_pretrained(draft / "face_encoder")

    if trainer.accelerator.is_main_process:
        with trainer.averaged():
            write_whole(run.work / "steady", save)


def latest(run: Run, *stages: str) -> Path:
    """The folder of the first of `stages` that has been trained."""
    return next(run.work / name for name in stages if (run.work / name / "unet").is_dir())


def _trainer(run: Run, name: str, stage: Stage, minutes: float, *, lr: float) -> Trainer:
    ends: dict[str, Any] = {"minutes": minutes}
    if run.steps is not None:
        ends = {"steps": run.steps, "checkpoint_every": 200, "sheet_every": 200}
    config = TrainerConfig(
        run.work / f"{name}_run", optimiser="muon", lr=lr, betas=(0.9, 0.98), weight_decay=0.01,
        ema=0.99, warmup=60, hold=0.5, device=run.device, log_every=20, **ends,
    )  # fmt: skip
    # of CLIP's last layers nothing is read
    unread = DistributedDataParallelKwargs(find_unused_parameters=True)
    return Trainer(stage, config, make_accelerator(config, kwargs_handlers=[unread]))


def _fingerprint(module: nn.Module) -> str:
    weights = b"".join(value.detach().float().numpy().tobytes() for value in module.state_dict().values())
    return hashlib.sha256(weights).hexdigest()[:12]


def diffusion_stage(
    run: Run, parts: Parts, *, joint: bool, identity: IdentityConfig | None = None, embed: bool = True
) -> SheetStage:
    """The stage over the features that lie in the work folder; `identity` adds equation 4."""
    place = run.work / "features"
    known, found = load_people(run.data), feats.Features.load(place / "faces")
    vae = AutoencoderKL.from_pretrained(run.work / "vae").eval()
    options: dict = {}
    if identity is not None and identity.recogniser is not None:
        phi = load_recogniser(identity.recogniser)
        cached = place / f"phi-{hashlib.sha256(Path(identity.recogniser).read_bytes()).hexdigest()[:12]}.npy"
        if not cached.exists():
            _save(cached, phi_of(phi, known, found))
        loss = IdentityLoss(
            phi, vae, make_scheduler().alphas_cumprod, PREDICTION, steps=identity.steps, margin=identity.margin
        ).to(run.device)
        options = {"identity": identity, "identity_loss": loss, "phi": np.load(cached)}
    stage = SheetStage(
        parts, known, found, np.load(place / "latents.npy"), np.load(place / "clip.npy"),
        photographed=feats.Features.load(place / "photographed"),
        clip_photographed=np.load(place / "clip_photographed.npy"), joint=joint, control_size=SIZE, vae=vae, **options,
    )  # fmt: skip
    if embed:
        kept = place / f"controls-{_fingerprint(parts.ffrnet.controlnet_cond_embedding)}.npy"
        if not kept.exists():
            _save(kept, stage.embed_controls())
        stage.use_controls(np.load(kept))
    return stage


def save_parts(parts: Parts, folder: Path) -> None:
    for name, part in vars(parts).items():
        part.save_pretrained(folder / name)


def load_parts(folder: Path) -> Parts:
    return Parts(
        UNet2DConditionModel.from_pretrained(folder / "unet"),  # diffusers loads float32 whatever the file holds
        CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32),
        CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2", dtype=torch.float32),
        CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        FacialAttributeMixer.from_pretrained(folder / "mixer"),
        FFRNet.from_pretrained(folder / "ffrnet"),
    )


def assemble(run: Run, minutes: float) -> None:
    """The checkpoint folder: fp16 weights, fp32 text encoders, no file over 10 MB."""
    from facesnap.pipeline import FaceSnapPipeline, Settings

    last = latest(run, "steady", "identity", "facesnap", "joint")
    parts = load_parts(last)
    encoder = next(place / "face_encoder" for place in (last, run.work) if (place / "face_encoder").is_dir())
    known = load_people(run.data)
    scorer = run.work / "scorer" / "recogniser.onnx"
    pipe = FaceSnapPipeline(
        vae=AutoencoderKL.from_pretrained(run.work / "vae"),
        text_encoder=parts.text_encoder,
        text_encoder_2=parts.text_encoder_2,
        tokenizer=parts.tokenizer,
        tokenizer_2=parts.tokenizer,
        unet=parts.unet,
        scheduler=make_scheduler(),
        mixer=parts.mixer,
        ffrnet=parts.ffrnet,
        face_encoder=CLIPVisionModel.from_pretrained(encoder, dtype=torch.float32),
        face_analyser=FaceAnalyser(run.work / "face_pack"),
        head_model=LinearHeadModel.from_pretrained(run.work / "head"),
        scorer=Recogniser(scorer) if scorer.exists() else None,
        settings=Settings(
            name="FaceSnap mini", size=SIZE, steps=8, guidance=2.0,
            saturation=0.6,  # chosen on seven photographs; of renders it changes next to nothing
            about={
                "people": f"rendered, version {known.version}, {len(np.unique(known.person))} people",
                "stage": last.name,
                "license": "Apache-2.0",
                "hint": HINT,
                "styles": ["photo", "black and white", "pencil sketch", "watercolor", "oil painting"],  # of page.order
                "diffusers": importlib.metadata.version("diffusers"),
            },
        ),
    )  # fmt: skip
    pipe.save_pretrained(run.out, dtype=torch.float16, max_shard_size="9MB")
    for file in (run.work / "scorer").glob("attributes*"):  # the evaluation's judges, see evaluation/scorer.py
        shutil.copy(file, run.out / "scorer" / file.name)
    for file in run.out.rglob("*.onnx"):
        store_half(file)
    for file in run.out.rglob("config.json"):  # diffusers notes the folder that a model was read from
        config = json.loads(file.read_text())
        config.pop("_name_or_path", None)
        file.write_text(json.dumps(config, indent=2) + "\n")
    total = sum(f.stat().st_size for f in run.out.rglob("*") if f.is_file())
    print(f"{run.out}: {total / 1e6:.1f} MB")


def store_half(path: Path) -> None:
    """Halve an ONNX file: its weights become float16, each cast back where it is used.

    ONNX Runtime folds the casts when it loads, so the nets still compute in float32.
    """
    model = onnx.load(path)
    graph = model.graph
    casts = []
    for weight in graph.initializer:
        if weight.data_type == onnx.TensorProto.FLOAT and len(weight.dims) > 1:
            name = weight.name
            half = numpy_helper.from_array(numpy_helper.to_array(weight).astype(np.float16), name + "_half")
            weight.CopyFrom(half)
            casts.append(helper.make_node("Cast", [name + "_half"], [name], to=onnx.TensorProto.FLOAT))
    nodes = list(graph.node)
    del graph.node[:]
    graph.node.extend(casts + nodes)
    onnx.checker.check_model(model)
    onnx.save(model, path)


ORDER = (people, faces, scorer, head, vae, face_encoder, features, decoder, joint, facesnap, steady, assemble)
OTHERS = (unpack, adopt, identity)
STAGES: dict[str, Callable[[Run, float], None]] = {stage.__name__: stage for stage in (*ORDER, *OTHERS)}


def _save(path: Path, array: np.ndarray) -> None:
    """Whole or not at all, also where several processes save the same."""
    draft = path.with_suffix(f".{os.getpid()}.npy")
    np.save(draft, array)
    draft.replace(path)


def _module(name: str, *flags: str, **options: object) -> None:
    arguments = [*flags, *(str(x) for key, value in options.items() for x in (f"--{key.replace('_', '-')}", value))]
    subprocess.run([sys.executable, "-m", name, *arguments], check=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m facesnap.training.mini",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--stage", choices=STAGES)
    what.add_argument("--all", action="store_true")
    parser.add_argument("--work", type=Path, required=True, help="checkpoints and everything between the stages")
    parser.add_argument("--out", type=Path, default=Path("assets/mini"), help="the finished checkpoint")
    parser.add_argument("--data", type=Path, help="shards (default: WORK/people)")
    parser.add_argument("--minutes", type=float, help="budget of the stage, or with --all of everything that learns")
    parser.add_argument("--steps", type=int, help="of joint, steady, facesnap or identity, instead of minutes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--workers", type=int, default=2, help="processes for rendering and face analysis")
    parser.add_argument("--people", type=int, default=4000)
    parser.add_argument("--per-person", type=int, default=5)
    args = parser.parse_args(argv)
    if args.steps is not None and args.stage not in ("joint", "steady", "facesnap", "identity"):
        parser.error("--steps is for --stage joint, steady, facesnap or identity")
    torch.set_num_threads(args.threads)
    cv2.setNumThreads(1)
    run = Run(
        args.work, args.out, args.data or args.work / "people", args.device, args.threads, args.people, args.per_person,
        args.workers, args.steps,
    )  # fmt: skip
    for name in [stage.__name__ for stage in ORDER] if args.all else [args.stage]:
        started = time.monotonic()
        STAGES[name](run, run.minutes(name, args.minutes, not args.all) if name in MINUTES else 0.0)
        print(f"stage {name}: {(time.monotonic() - started) / 60:.1f} minutes", flush=True)


if __name__ == "__main__":
    main()

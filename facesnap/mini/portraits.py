"""The stages that learn to make portraits, over the features that lie in the work folder."""

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import nn
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, CLIPVisionModel

from facesnap.errors import InputError
from facesnap.faces import Recogniser
from facesnap.ffrnet import FFRNet, Variant
from facesnap.mini import augment
from facesnap.mini.consistency import ConsistencyStage, embeddings_of
from facesnap.mini.features import Features, phi_of
from facesnap.mini.joint import (
    CONTROL_WIDTHS,
    JointStage,
    load_parts,
    make_mixer,
    make_pipe,
    make_unet,
    save_parts,
)
from facesnap.mini.kept import KeptConfig, KeptFeatures, Looks
from facesnap.mini.nets import face_encoder as clip
from facesnap.mini.nets.tokenizer import make_text_encoders
from facesnap.mini.recipe import FACTOR, Run, save_array
from facesnap.synthetic.dataset import load_people
from facesnap.training.checkpointing import write_whole
from facesnap.training.identity import IdentityConfig, IdentityLoss
from facesnap.training.iresnet import IResNet
from facesnap.training.portraits import LossConfig, PortraitStage
from facesnap.training.processes import make_accelerator
from facesnap.training.trainer import Stage, Trainer, TrainerConfig

# the noisiest half of the steps keeps its weight: there the picture is decided by what the model is told
LOSS = LossConfig(weighting="capped_snr", features=2.0)
JOINT = LossConfig(weighting="capped_snr", features=2.0, background=0.5)
# λ 0.25, counted twice at every second step; a rendered target is known, and the branch is asked for it too
IDENTITY: dict[str, Any] = {"weight": 0.25, "steps": 2, "most_steps": 8, "every": 2, "samples": 16}
BRANCH = 0.25


def joint(run: Run, minutes: float) -> None:
    """Everything together, from nothing, or from the parts that `unpack` left."""
    start = run.work / "start"
    parts = load_parts(start) if start.is_dir() else new_parts(run)
    # Muon takes half a second of every step, however many samples it has
    stage = portrait_stage(run, parts, joint=True, keep_controls=start.is_dir(), batch_size=64)
    teach(run, "joint", stage, minutes, lr=2e-3 if start.is_dir() else 2.5e-3)


def facesnap(run: Run, minutes: float) -> None:
    """The paper's training: the base is frozen."""
    stage = portrait_stage(run, load_parts(latest(run, "joint", "start")))
    teach(run, "facesnap", stage, minutes, lr=1e-3)


def identity(run: Run, minutes: float) -> None:
    """The paper's training with both losses, from where the last stage left off."""
    config = IdentityConfig(str(run.work / "faces" / "recogniser_B.onnx"), **IDENTITY)
    stage = portrait_stage(run, load_parts(latest(run, "facesnap", "joint", "start")), identity=config)
    teach(run, "identity", stage, minutes, lr=5e-4)


def consistency(run: Run, minutes: float) -> None:
    """Last of all, since the features of the stages before are the old encoder's. What these stages learn later makes
    it anew."""
    parts, known = load_parts(latest(run, "identity", "facesnap", "joint", "start")), load_people(run.data)
    rows = np.flatnonzero(np.array(known.styles) == "photo")  # references are photos
    recogniser = Recogniser(run.work / "face_pack" / "recogniser.onnx")
    of_what = recogniser.path.read_bytes() + known.person[rows].tobytes() + known.index[rows].tobytes()
    looks = _kept(
        run.work / f"looks-{hashlib.sha256(of_what).hexdigest()[:12]}.npy",
        lambda: embeddings_of(recogniser, augment.load(run.data), rows),
    )
    encoder = CLIPVisionModel.from_pretrained(run.work / "face_encoder", dtype=torch.float32, use_safetensors=True)
    stage = ConsistencyStage(encoder, parts["mixer"], known, rows, *clip.crops_of(known, rows), looks)
    trainer = _trainer(run, "consistency", stage, minutes, lr=1e-3)
    trainer.train()
    pipe = make_pipe(AutoencoderKL.from_pretrained(run.work / "vae", use_safetensors=True), parts)

    def save(draft: Path) -> None:
        save_parts(pipe, draft)
        encoder.save_pretrained(draft / "face_encoder")

    if trainer.accelerator.is_main_process:
        with trainer.averaged():
            write_whole(run.work / "consistency", save)


def teach(run: Run, name: str, stage: PortraitStage, minutes: float, *, lr: float) -> None:
    """Train a stage to its end and keep its parts in `work/name`; what a later stage made of other parts goes."""
    trainer = _trainer(run, name, stage, minutes, lr=lr)
    begun = trainer.step
    trainer.train()
    if not trainer.accelerator.is_main_process:
        return
    with trainer.averaged():
        write_whole(run.work / name, lambda draft: save_parts(stage.pipe, draft))
    if trainer.step > begun:
        for stale in ("consistency", "consistency_run"):
            shutil.rmtree(run.work / stale, ignore_errors=True)


def _trainer(run: Run, name: str, stage: Stage, minutes: float, *, lr: float) -> Trainer:
    ends: dict[str, Any] = {"minutes": minutes}
    if run.steps is not None:
        ends = {"steps": run.steps, "checkpoint_every": 200, "sheet_every": 200}
    config = TrainerConfig(
        run.work / f"{name}_run", optimiser="muon", lr=lr, betas=(0.9, 0.98), weight_decay=0.01,
        ema=0.999, warmup=60, hold=0.5, device=run.device, log_every=20, gradients_every=200, **ends,
    )  # fmt: skip
    return Trainer(stage, config, make_accelerator(config, find_unused=True))  # of CLIP's last layers nothing is read


def new_parts(run: Run) -> dict[str, Any]:
    """Everything that stage joint teaches, with random weights; the second text encoder is the face encoder's."""
    torch.manual_seed(1)
    tokenizer = CLIPTokenizer.from_pretrained(run.work / "tokenizer")
    text, _ = make_text_encoders(tokenizer)
    text_2 = CLIPTextModelWithProjection.from_pretrained(run.work / "text_encoder_2_clip", use_safetensors=True)
    token_dim = text.config.hidden_size + text_2.config.hidden_size
    pooled_dim = text_2.config.projection_dim
    latents = np.load(run.work / "features" / "latents.npy", mmap_mode="r")
    unet = make_unet(latents.shape[1], latents.shape[2], token_dim, pooled_dim, run.widths)
    ffrnet = FFRNet.from_unet(
        unet,
        vae_scale_factor=FACTOR,
        conditioning_embedding_out_channels=CONTROL_WIDTHS,
        load_weights_from_unet=False,
    )
    vision = CLIPVisionModel.from_pretrained(run.work / "face_encoder", dtype=torch.float32, use_safetensors=True)
    mixer = make_mixer(vision.config.hidden_size, token_dim, pooled_dim)
    return {"unet": unet, "text_encoder": text, "text_encoder_2": text_2, "tokenizer": tokenizer, "mixer": mixer,
            "ffrnet": ffrnet}  # fmt: skip


def portrait_stage(
    run: Run,
    parts: dict[str, Any],
    *,
    joint: bool = False,
    identity: IdentityConfig = IdentityConfig(),  # noqa: B008 (frozen)
    variant: Variant = "predicted",
    keep_controls: bool = True,
    batch_size: int = 32,
) -> PortraitStage:
    """The stage over the features that lie in the work folder; `identity` adds equation 4.

    variant: a row of Table 3. keep_controls: the control pictures' embedding has learned before; it stays frozen and
    its output is kept.
    """
    place = run.work / "features"
    known, looks = load_people(run.data), _looks(place, "faces", "clip")
    pipe = make_pipe(AutoencoderKL.from_pretrained(run.work / "vae", use_safetensors=True), parts)
    pipe.settings = replace(pipe.settings, variant=variant)
    options: dict[str, Any] = {"device": run.device, "loss": JOINT if joint else LOSS}
    phi = None
    if identity.recogniser is not None:
        recogniser = IResNet.from_onnx(identity.recogniser)
        digest = hashlib.sha256(Path(identity.recogniser).read_bytes()).hexdigest()[:12]
        phi = _kept(place / f"phi-{digest}.npy", lambda: phi_of(recogniser, known, looks.features))
        loss = IdentityLoss.of(pipe, recogniser, identity)
        options |= {"identity": identity, "identity_loss": loss}
        # with the background: it has the hats that the prompt asks for, and the loss of the face alone lets them go
        options["loss"] = replace(JOINT, branch=BRANCH)
    # guidance goes from a picture without FFRNet to one with it: the joint stage teaches both
    config = KeptConfig(batch_size, without_ffrnet=0.15 if joint else 0.0, drop_face=0.05)
    source = KeptFeatures(
        pipe, known, np.load(place / "latents.npy", mmap_mode="r"), looks, config, phi=phi,
        photographed=_looks(place, "photographed", "clip_photographed"), poor=_looks(place, "poor", "clip_poor"),
    )  # fmt: skip
    stage = (JointStage if joint else PortraitStage)(pipe, source, **options)
    if keep_controls:
        embedding = pipe.ffrnet.controlnet_cond_embedding.requires_grad_(False)
        kept = place / f"controls-{_fingerprint(embedding)}.npy"
        source.controls = _kept(kept, lambda: source.embed_controls(pipe.ffrnet))
    return stage


def _looks(place: Path, features: str, clip: str) -> Looks:
    return Looks(Features.load(place / features), np.load(place / f"{clip}.npy", mmap_mode="r"))


def _kept(path: Path, compute: Callable[[], np.ndarray]) -> np.ndarray:
    """An array from a file, computed first where it is not there; processes share its pages."""
    if not path.exists():
        save_array(path, compute())
    return np.load(path, mmap_mode="r")


def latest(run: Run, *stages: str) -> Path:
    """The folder of the first of `stages` that has been trained. Raises InputError where none has."""
    for name in stages:
        if (run.work / name / "unet").is_dir():
            return run.work / name
    trained = " or ".join(name for name in stages if name != "start")  # where `unpack` puts what was shipped
    raise InputError(f"There is nothing in '{run.work}' to go on from; train stage {trained} there first, or unpack.")


def _fingerprint(module: nn.Module) -> str:
    weights = b"".join(value.detach().float().cpu().numpy().tobytes() for value in module.state_dict().values())
    return hashlib.sha256(weights).hexdigest()[:12]

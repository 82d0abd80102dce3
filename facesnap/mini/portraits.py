"""The stages that learn to make portraits, over the features that lie in the work folder."""

import hashlib
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import DistributedDataParallelKwargs
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, CLIPVisionModel

from facesnap.faces import Recogniser
from facesnap.ffrnet import FFRNet
from facesnap.mini import augment
from facesnap.mini import features as feats
from facesnap.mini.consistency import ConsistencyStage, embeddings_of
from facesnap.mini.joint import (
    CONTROL_WIDTHS,
    PREDICTION,
    Parts,
    SheetStage,
    make_mixer,
    make_scheduler,
    make_unet,
    phi_of,
)
from facesnap.mini.nets import face_encoder as clip
from facesnap.mini.nets.tokenizer import make_text_encoders
from facesnap.mini.recipe import FACTOR, SIZE, Run, save_array
from facesnap.mixer import FacialAttributeMixer
from facesnap.synthetic.dataset import load_people
from facesnap.training.identity import IdentityConfig, IdentityLoss, IResNet
from facesnap.training.trainer import Stage, Trainer, TrainerConfig, make_accelerator, write_whole


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
    for stale in ("consistency", "consistency_run") if trainer.step > begun else ():  # they began from other parts
        shutil.rmtree(run.work / stale, ignore_errors=True)


def consistency(run: Run, minutes: float) -> None:
    """Last of all, since the features of the stages before are the old encoder's. What these stages learn later makes
    it anew."""
    parts, known = load_parts(latest(run, "identity", "facesnap", "joint", "start")), load_people(run.data)
    rows = np.flatnonzero(np.array(known.styles) == "photo")  # references are photos
    recogniser = Recogniser(run.work / "face_pack" / "recogniser.onnx")
    of_what = recogniser.path.read_bytes() + known.person[rows].tobytes() + known.index[rows].tobytes()
    cached = run.work / f"looks-{hashlib.sha256(of_what).hexdigest()[:12]}.npy"
    if not cached.exists():
        save_array(cached, embeddings_of(recogniser, augment.load(run.data), rows))
    encoder = CLIPVisionModel.from_pretrained(run.work / "face_encoder", dtype=torch.float32)
    looks = np.load(cached)
    stage = ConsistencyStage(encoder, parts.mixer, known, rows, *clip.crops_of(known, rows), looks)
    trainer = _trainer(run, "consistency", stage, minutes, lr=1e-3)
    trainer.train()

    def save(draft: Path) -> None:
        save_parts(parts, draft)
        encoder.save_pretrained(draft / "face_encoder")

    if trainer.accelerator.is_main_process:
        with trainer.averaged():
            write_whole(run.work / "consistency", save)


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
        phi = IResNet.from_onnx(identity.recogniser)
        cached = place / f"phi-{hashlib.sha256(Path(identity.recogniser).read_bytes()).hexdigest()[:12]}.npy"
        if not cached.exists():
            save_array(cached, phi_of(phi, known, found))
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
            save_array(kept, stage.embed_controls())
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

"""Photographs in, a trained FaceSnap out: the paper's training by one command, on one process or many.

    python -m facesnap.training.train --config configs/sdxl.yaml shards=DIR model=START out=RUN
    accelerate launch --num_processes 2 -m facesnap.training.train --config configs/sdxl.yaml …
    accelerate launch --config_file configs/accelerate-zero2.yaml -m facesnap.training.train --config …

A config is a YAML file of `TrainConfig`'s fields; `key=value` after it overrides one (`identity.weight=0.25`,
`data.batch_size=2`). `shards` is what `facesnap.training.prepare` wrote; `model` a FaceSnap folder, trained or not,
whose mixer and FFRNet learn. The same command goes on where a killed run stopped. `out` then holds

    model/          the FaceSnap checkpoint, by the EMA weights: FaceSnapPipeline.from_pretrained("RUN/model")
    run.json        the config, commit, library versions, machine and the data's fingerprint
    log.jsonl, sheet.png, checkpoint-*/, facesnap/ (TensorBoard)
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from huggingface_hub import hf_hub_download
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from facesnap.checkpoints.loading import load_lora
from facesnap.errors import InputError, reading
from facesnap.folder import KINDS, local_folder, read_weights
from facesnap.pipeline import FaceSnapPipeline
from facesnap.provenance import commit, fingerprint, machine
from facesnap.training.conditions import Cache, Photographs, Stream
from facesnap.training.config import TRACKERS, TrainConfig, read_config
from facesnap.training.identity import IdentityLoss
from facesnap.training.iresnet import IResNet
from facesnap.training.photos import PhotoShards, photo_loader
from facesnap.training.portraits import PortraitStage
from facesnap.training.processes import make_accelerator
from facesnap.training.trainer import PRECISIONS, Batch, Trainer

LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "peft", "webdataset", "insightface", "numpy")
LIGHTNING, LIGHTNING_REVISION = "ByteDance/SDXL-Lightning", "c9a24f48e1c025556787b0c58dd67a091ece2e44"


# --------------------------------------------------------------------------------------------------- the run


def shard_stream(config: TrainConfig) -> Stream:
    """The batches of `photos.PhotoShards` from any position, for any rank: it keeps no state."""

    def stream(position: int, rank: int, world: int) -> Iterable[Batch]:
        shards = PhotoShards(config.shards, config.data, rank=rank, world_size=world, position=position)
        return photo_loader(shards, config.workers)

    return stream


def shard_validation(config: TrainConfig) -> Batch | None:
    """The batch that sheets and their figures are made of: always the same pictures, nothing dropped."""
    if config.validation_samples < 1:
        return None
    data = dataclasses.replace(
        config.data, augment=False, buckets=False, batch_size=config.validation_samples, max_references=1,
        drop_text=0.0, drop_face=0.0, drop_landmarks=0.0, fitted_share=0.0, worse_share=0.0,
    )  # fmt: skip
    return next(iter(photo_loader(PhotoShards(config.validation or config.shards, data))))


def run(
    config: TrainConfig, *, stream: Stream | None = None, validation: Batch | None = None, data: str = ""
) -> Trainer:
    """Train to the end (or go on), then write the finished checkpoint to `out/model`.

    stream, validation, data: batches, the sheets' batch and the data's fingerprint, where they are not to come from
    `config.shards`. Raises ValueError or InputError for what is wrong with the config, the model or φ.
    """
    recognisers: dict[str, str | None] = {}
    if stream is None:
        stream, validation = shard_stream(config), shard_validation(config)
        data = PhotoShards(config.shards, config.data).fingerprint
        places = [place for place in (config.shards, config.validation) if place is not None]
        recognisers = {place: PhotoShards(place, config.data).recogniser for place in places}
    settings = config.trainer()
    out = Path(config.out)
    for tracker in config.trackers:
        if importlib.util.find_spec(TRACKERS[tracker]) is None:
            raise ValueError(f"tracker {tracker} needs the package {TRACKERS[tracker]}: install it, or leave it out")
    accelerator = make_accelerator(settings, log_with=list(config.trackers) or None, project_dir=str(out))
    _tell_deepspeed(accelerator, config)
    set_seed(config.seed)
    stage = make_stage(config, stream, accelerator.device, validation=validation, data=data)
    reads = stage.pipe.face_analyser
    for place, recogniser in recognisers.items():
        if recogniser and reads is not None and reads.recogniser_digest != recogniser:
            raise ValueError(
                f"{place} holds the embeddings of another recogniser than {config.model}'s: prepare the shards "
                f"with --pack {config.model}/face_pack --head {config.model}/head"
            )
    record(config, accelerator, data)
    trainer = Trainer(stage, settings, accelerator)
    if config.trackers:
        accelerator.init_trackers("facesnap", _flat(dataclasses.asdict(config)))
    trainer.train()
    export(trainer, stage, config)
    accelerator.end_training()
    return trainer


def make_stage(
    config: TrainConfig, stream: Stream, device: torch.device, *, validation: Batch | None = None, data: str = ""
) -> PortraitStage:
    """The stage of a config: the model, φ, the lightning branch and the caches."""
    dtype = PRECISIONS[config.base_precision or (config.precision if device.type != "cpu" else "fp32")] or torch.float32
    recogniser = config.identity.recogniser
    phi = None if recogniser is None else IResNet.from_onnx(recogniser)  # first: START takes minutes
    pipe = read_start(config.model, dtype)
    if config.variant is not None:
        pipe.settings = dataclasses.replace(pipe.settings, variant=config.variant)
    check_model(pipe, config.model)
    identity_loss, lightning = None, None
    if phi is not None:
        lightning = load_lightning(config.identity.lightning, pipe, dtype, config.identity.steps)
        identity_loss = IdentityLoss.of(pipe, phi, config.identity)
    caches: dict[str, Cache | None] = {"latent_cache": None, "text_cache": None}
    if config.cache is not None:
        # what is in the caches holds for these encoders, these shards and this cut only
        cut = f"{config.model} {data} {config.data.resolution} {config.data.buckets}"
        place = Path(config.cache) / hashlib.sha256(cut.encode()).hexdigest()[:12]
        caches["text_cache"] = Cache(place / "texts")
        if not config.data.augment:
            caches["latent_cache"] = Cache(place / "latents")
    source = Photographs(pipe, stream, device=device, validation=validation, **caches)
    stage = PortraitStage(
        pipe, source, device=device, dtype=dtype, loss=config.loss, identity=config.identity,
        identity_loss=identity_loss, lightning=lightning, checkpointing=config.gradient_checkpointing,
        learn=config.learn,
    )  # fmt: skip
    if config.compile is not None:
        own = stage.lightning is not pipe.unet
        # the UNets are wrapped, not compiled in place: the hook by which FFRNet joins them then stays outside the graph
        stage.pipe.unet = torch.compile(pipe.unet, backend=config.compile)
        stage.lightning = torch.compile(stage.lightning, backend=config.compile) if own else stage.pipe.unet
        if pipe.ffrnet is not None:
            pipe.ffrnet.compile(backend=config.compile)
    return stage


def read_start(model: str, dtype: torch.dtype) -> FaceSnapPipeline:
    """START, each tensor once and in the dtype it is used in: what learns in float32, and so the VAE."""
    place = local_folder(model)
    with reading(f"A part of the checkpoint '{model}'"):
        parts = {name: KINDS["facesnap"][name] for name in ("mixer", "ffrnet")} | {"vae": AutoencoderKL}
        exact = {name: read_weights(kind, place / name) for name, kind in parts.items() if (place / name).is_dir()}
    return FaceSnapPipeline.from_pretrained(model, dtype=dtype, **exact)


def check_model(pipe: FaceSnapPipeline, name: str) -> None:
    """Raises ValueError where the parts of a folder do not belong together."""
    width = pipe.unet.config.cross_attention_dim
    pairs = [("mixer", "token_dim", pipe.mixer.config.token_dim, width)]
    pairs.append(("mixer", "clip_dim", pipe.mixer.config.clip_dim, pipe.face_encoder.config.hidden_size))
    if pipe.ffrnet is not None:
        for key in ("cross_attention_dim", "block_out_channels", "in_channels"):
            theirs = getattr(pipe.unet.config, key)
            if key == "in_channels":  # a UNet that inpaints takes more than FFRNet sees
                theirs = min(theirs, pipe.vae.config.latent_channels)
            ours = getattr(pipe.ffrnet.config, key)
            pairs.append(("ffrnet", key, tuple(ours) if isinstance(ours, list) else ours,
                          tuple(theirs) if isinstance(theirs, list) else theirs))  # fmt: skip
    for part, key, ours, wanted in pairs:
        if ours != wanted:
            raise ValueError(
                f"the {part} of {name} is of another architecture than its base ({key} {ours}, the base has {wanted}): "
                "make a folder for this base with facesnap.checkpoints init"
            )


def load_lightning(name: str | None, pipe: FaceSnapPipeline, dtype: torch.dtype, steps: int) -> nn.Module | None:
    """The few-step UNet of the identity loss: SDXL-Lightning's of so many steps by its Hub id, a diffusers folder, a
    safetensors file of a whole UNet, or a LoRA, which is fused into a copy of the base's. None for None: the base
    itself takes the few steps."""
    if name is None:
        return None
    path = fetched_lightning(steps) if name == LIGHTNING else Path(name)
    if path.is_dir():
        unet = UNet2DConditionModel.from_pretrained(path, torch_dtype=dtype, use_safetensors=True)
    elif path.is_file():
        with reading(f"The lightning file '{path.name}'"), safe_open(path, "pt") as file:
            is_lora = any("lora" in key for key in file.keys())  # noqa: SIM118
        unet = _with_lora(pipe, path) if is_lora else _read_unet(pipe, path, dtype)
    else:
        raise InputError(
            f"there is no lightning UNet or LoRA at {name}: give {LIGHTNING}, a folder or a safetensors file"
        )
    for key in ("block_out_channels", "cross_attention_dim", "in_channels"):
        if unet.config[key] != pipe.unet.config[key]:
            raise InputError(
                f"the lightning UNet {name} is of another architecture than the base ({key} {unet.config[key]}, the "
                f"base has {pipe.unet.config[key]}): use one made from it"
            )
    return unet


def fetched_lightning(steps: int) -> Path:
    """SDXL-Lightning's UNet of so many steps, 5.1 GB, from the Hub's cache or the Hub."""
    if steps not in (2, 4, 8):
        raise InputError(f"{LIGHTNING} has no UNet of {steps} steps: choose identity.steps 2, 4 or 8")
    file = f"sdxl_lightning_{steps}step_unet.safetensors"
    try:
        return Path(hf_hub_download(LIGHTNING, file, revision=LIGHTNING_REVISION))
    except (OSError, ValueError) as error:  # the Hub's errors and those of the network
        raise InputError(
            f"{file} of {LIGHTNING} cannot be fetched ({type(error).__name__}): on a machine with a network run `hf "
            f"download {LIGHTNING} {file} --revision {LIGHTNING_REVISION}`, and give the file as identity.lightning"
        ) from error


def _read_unet(pipe: FaceSnapPipeline, path: Path, dtype: torch.dtype) -> UNet2DConditionModel:
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(pipe.unet.config)
    with reading(f"The lightning UNet '{path.name}'", "give one made from the base, whole"):
        unet.load_state_dict({name: tensor.to(dtype) for name, tensor in load_file(path).items()}, assign=True)
    return unet


def _with_lora(pipe: FaceSnapPipeline, path: Path) -> UNet2DConditionModel:
    unet = UNet2DConditionModel.from_config(pipe.unet.config).to(pipe.unet.dtype)
    unet.load_state_dict(pipe.unet.state_dict())
    holder = StableDiffusionXLPipeline(pipe.vae, None, None, None, None, unet, pipe.scheduler, add_watermarker=False)
    load_lora(holder, path)
    holder.fuse_lora(components=["unet"])
    holder.unload_lora_weights()
    return unet


def record(config: TrainConfig, accelerator: Accelerator, data: str) -> None:
    """`run.json`: all that is needed to make the weights beside it again."""
    if not accelerator.is_main_process:
        return
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    told = {
        "config": dataclasses.asdict(config),
        "commit": commit(),
        "versions": {"python": sys.version.split()[0], **{name: _version(name) for name in LIBRARIES}},
        "machine": machine(),
        "processes": accelerator.num_processes,
        "distributed": str(accelerator.distributed_type),
        "data": data,
        "start": fingerprint(Path(config.model)) if Path(config.model).is_dir() else config.model,
    }
    (out / "run.json").write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


def export(trainer: Trainer, stage: PortraitStage, config: TrainConfig) -> None:
    """`out/model`: the whole pipeline with the EMA weights, as `FaceSnapPipeline.from_pretrained` loads it."""
    with trainer.averaged():
        weights = trainer.weights()
    if not trainer.accelerator.is_main_process:
        return
    # the start is read again: the frozen parts may be in half precision here, or compiled, or on other devices
    pipe = FaceSnapPipeline.from_pretrained(config.model)
    for name in stage.modules():
        own = f"{name}."
        getattr(pipe, name).load_state_dict({k.removeprefix(own): v for k, v in weights.items() if k.startswith(own)})
    trained = {"steps": trainer.step, "shards": config.shards, "data": stage_data(config), "commit": commit()}
    pipe.settings = dataclasses.replace(stage.pipe.settings, about={**stage.pipe.settings.about, "training": trained})
    pipe.save_pretrained(Path(config.out) / "model", dtype=PRECISIONS[config.save_dtype])


def stage_data(config: TrainConfig) -> str:
    return json.loads((Path(config.out) / "run.json").read_text(encoding="utf-8"))["data"]


def _tell_deepspeed(accelerator: Accelerator, config: TrainConfig) -> None:
    """DeepSpeed asks for the batch size, which it otherwise reads from a prepared loader, and clips by itself."""
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None:
        plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = config.data.batch_size
        plugin.deepspeed_config["gradient_clipping"] = config.clip


def _flat(values: dict[str, Any], above: str = "") -> dict[str, Any]:
    """Nested settings as a tracker takes them: numbers and text under dotted names."""
    out: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            out |= _flat(value, f"{above}{name}.")
        else:
            out[above + name] = value if isinstance(value, int | float | str | bool) else str(value)
    return out


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m facesnap.training.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, help="a YAML file, such as configs/sdxl.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args(argv)
    try:
        run(read_config(args.config, args.overrides))
    except (ValueError, InputError, FloatingPointError, OSError) as error:
        raise SystemExit(f"{parser.prog}: {error}") from error


if __name__ == "__main__":
    main()

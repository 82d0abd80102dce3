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
import difflib
import hashlib
import importlib.metadata
import importlib.util
import json
import sys
import types
import typing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from huggingface_hub import hf_hub_download
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from facesnap.errors import InputError, reading
from facesnap.ffrnet import VARIANTS
from facesnap.folder import KINDS, local_folder, read_weights
from facesnap.pipeline import FaceSnapPipeline
from facesnap.provenance import commit, fingerprint, machine
from facesnap.training.identity import IdentityConfig, IdentityLoss, IResNet
from facesnap.training.photos import PhotoConfig, PhotoShards, photo_loader
from facesnap.training.portraits import LEARN, Cache, LossConfig, PortraitStage, Stream
from facesnap.training.trainer import PRECISIONS, Batch, Trainer, TrainerConfig, make_accelerator

LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "peft", "webdataset", "insightface", "numpy")
LIGHTNING, LIGHTNING_REVISION = "ByteDance/SDXL-Lightning", "c9a24f48e1c025556787b0c58dd67a091ece2e44"
TRACKERS = {"tensorboard": "tensorboard", "wandb": "wandb"}  # and the package each needs


@dataclass(frozen=True)
class TrainConfig:
    """One training run. The defaults are the paper's where it names them."""

    model: str  # the FaceSnap folder to start from: of `facesnap.checkpoints init`, or trained before
    shards: str  # of `facesnap.training.prepare`: a folder, a brace pattern or URLs
    out: str
    validation: str | None = None  # shards of people who are not trained on; None: the sheets show training pictures
    validation_samples: int = 6
    variant: str | None = None  # a row of Table 3; the model's own by default
    learn: str = "all"  # or "light": of FFRNet what reads face and drawing, and its outputs; for small cards
    steps: int = 360_000
    accumulate: int = 1  # batches a step and process
    optimiser: str = "adamw"  # or "adamw8bit", "muon"
    lr: float = 1e-5
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 1e-2
    schedule: str = "constant"  # or "cosine", "linear": they fall after the share `hold` of the run, to `floor`
    warmup: int = 500
    hold: float = 0.0
    floor: float = 0.0
    clip: float = 1.0
    ema: float = 0.9999
    seed: int = 0
    device: str = "auto"  # "cuda" where there is one, else "cpu"
    precision: str = "bf16"  # or "fp16", "fp32"
    base_precision: str | None = None  # of the frozen weights; `precision` on a GPU, "fp32" on a CPU
    gradient_checkpointing: bool = True
    compile: str | None = None  # a backend of torch.compile, such as "inductor"
    workers: int = 4  # processes that read shards
    log_every: int = 50
    checkpoint_every: int = 1000
    keep: int = 2
    sheet_every: int = 1000
    trackers: tuple[str, ...] = ()  # "tensorboard", "wandb"
    cache: str | None = None  # a folder for texts and, where data.augment is off, latents; None: on the fly
    save_dtype: str = "fp16"  # of the finished weights: or "bf16", "fp32"
    data: PhotoConfig = field(default_factory=PhotoConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    identity: IdentityConfig = field(default_factory=IdentityConfig)

    def __post_init__(self) -> None:
        for name in ("precision", "base_precision", "save_dtype"):
            value = getattr(self, name)
            if value is not None and value not in PRECISIONS:
                raise ValueError(f"{name} {value!r} is not known; choose {', '.join(PRECISIONS)}")
        if self.variant is not None and self.variant not in VARIANTS:
            raise ValueError(f"variant {self.variant!r} is not known; choose {', '.join(VARIANTS)}")
        if self.learn not in LEARN:
            raise ValueError(f"learn {self.learn!r} is not known; choose {', '.join(LEARN)}")
        for tracker in self.trackers:
            if tracker not in TRACKERS:
                raise ValueError(f"tracker {tracker!r} is not known; choose {', '.join(TRACKERS)}")

    def trainer(self) -> TrainerConfig:
        shared = {f.name for f in dataclasses.fields(TrainerConfig)} & {f.name for f in dataclasses.fields(self)}
        values = {name: getattr(self, name) for name in shared}
        device = self.device if self.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        return TrainerConfig(**values | {"out": Path(self.out), "device": device})


# ------------------------------------------------------------------------------------------------- the config


def read_config(path: Path | None, overrides: Sequence[str] = ()) -> TrainConfig:
    """A config from a YAML file and `key=value` words. Raises ValueError, in one sentence, for what is not right."""
    given: Any = {}
    if path is not None:
        if not path.is_file():
            raise ValueError(f"there is no config at {path}: give a YAML file, such as configs/sdxl.yaml")
        try:
            given = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
        if not isinstance(given, dict):
            raise ValueError(f"{path} must hold keys and values, such as `lr: 1e-5`")
    for word in overrides:
        name, equals, value = word.partition("=")
        if not equals:
            raise ValueError(f"{word!r} is no key=value")
        place = given
        *sections, last = name.split(".")
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise ValueError(f"{section!r} of {word!r} is no section of the config")
        place[last] = yaml.safe_load(value)
    return _build(TrainConfig, given, "")


def _build(kind: type, given: dict[str, Any], section: str) -> Any:
    """A frozen dataclass of a mapping; unknown keys and wrong types are named."""
    hints = typing.get_type_hints(kind)
    for name in given:
        if name not in hints:
            near = difflib.get_close_matches(str(name), hints, n=1)
            meant = f"did you mean {section}{near[0]}?" if near else f"known are {', '.join(hints)}"
            raise ValueError(f"the config has no key {section}{name}: {meant}")
    values = {}
    for name, value in given.items():
        if dataclasses.is_dataclass(hints[name]):
            if not isinstance(value, dict):
                raise ValueError(f"{section}{name} is a section: it holds keys and values")
            values[name] = _build(typing.cast(type, hints[name]), value, f"{section}{name}.")
        else:
            values[name] = _typed(f"{section}{name}", value, hints[name])
    try:
        return kind(**values)
    except TypeError as error:
        missing = [f.name for f in dataclasses.fields(kind) if _required(f) and f.name not in values]
        if not missing:
            raise
        raise ValueError(f"the config lacks {', '.join(missing)}: add it, or give {missing[0]}=VALUE") from error


def _required(f: dataclasses.Field) -> bool:
    return f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING


def _typed(name: str, value: Any, hint: Any) -> Any:
    """The value as its field wants it; YAML reads `1e-5` as text and `[a, b]` as a list."""
    if isinstance(hint, types.UnionType):
        if value is None:
            return None
        (hint,) = (part for part in typing.get_args(hint) if part is not type(None))
    if typing.get_origin(hint) is tuple and isinstance(value, list | tuple):
        inner = typing.get_args(hint)
        many = [inner[0]] * len(value) if inner[-1] is Ellipsis else list(inner)
        if len(many) == len(value):
            return tuple(_typed(name, v, h) for v, h in zip(value, many, strict=True))
    elif hint is float and not isinstance(value, bool):
        try:
            return float(value)
        except (TypeError, ValueError):
            pass
    elif isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    wanted = getattr(hint, "__name__", str(hint))
    raise ValueError(f"{name} is {value!r}: it must be of type {wanted}")


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
        drop_text=0.0, drop_face=0.0, drop_landmarks=0.0, fitted_share=0.0,
    )  # fmt: skip
    return next(iter(photo_loader(PhotoShards(config.validation or config.shards, data))))


def run(
    config: TrainConfig, *, stream: Stream | None = None, validation: Batch | None = None, data: str = ""
) -> Trainer:
    """Train to the end (or go on), then write the finished checkpoint to `out/model`.

    stream, validation, data: batches, the sheets' batch and the data's fingerprint, where they are not to come from
    `config.shards`. Raises ValueError or InputError for what is wrong with the config, the model or φ.
    """
    recogniser = None
    if stream is None:
        stream, validation = shard_stream(config), shard_validation(config)
        shards = PhotoShards(config.shards, config.data)
        data, recogniser = shards.fingerprint, shards.recogniser
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
    if recogniser and reads is not None and reads.recogniser_digest != recogniser:
        raise ValueError(
            f"{config.shards} holds the embeddings of another recogniser than {config.model}'s: prepare the shards "
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
    pipe = read_start(config.model, dtype)
    if config.variant is not None:
        pipe.settings = dataclasses.replace(pipe.settings, variant=config.variant)
    check_model(pipe, config.model)
    identity_loss, lightning = None, None
    if config.identity.recogniser is not None:
        lightning = load_lightning(config.identity.lightning, pipe, dtype, config.identity.steps)
        identity_loss = IdentityLoss(
            IResNet.from_onnx(config.identity.recogniser), pipe.vae, pipe.scheduler.alphas_cumprod,
            pipe.scheduler.config.prediction_type, steps=config.identity.steps, margin=config.identity.margin,
        )  # fmt: skip
    caches: dict[str, Cache | None] = {"latent_cache": None, "text_cache": None}
    if config.cache is not None:
        # what is in the caches holds for these encoders, these shards and this cut only
        cut = f"{config.model} {data} {config.data.resolution} {config.data.buckets}"
        place = Path(config.cache) / hashlib.sha256(cut.encode()).hexdigest()[:12]
        caches["text_cache"] = Cache(place / "texts")
        if not config.data.augment:
            caches["latent_cache"] = Cache(place / "latents")
    stage = PortraitStage(
        pipe, stream, device=device, dtype=dtype, loss=config.loss, identity=config.identity,
        identity_loss=identity_loss, lightning=lightning, checkpointing=config.gradient_checkpointing,
        learn=config.learn, validation=validation, **caches,
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
        unet = UNet2DConditionModel.from_pretrained(path, torch_dtype=dtype)
    elif path.is_file():
        with safe_open(path, "pt") as file:
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
    unet.load_state_dict({name: tensor.to(dtype) for name, tensor in load_file(path).items()}, assign=True)
    return unet


def _with_lora(pipe: FaceSnapPipeline, path: Path) -> UNet2DConditionModel:
    unet = UNet2DConditionModel.from_config(pipe.unet.config).to(pipe.unet.dtype)
    unet.load_state_dict(pipe.unet.state_dict())
    holder = StableDiffusionXLPipeline(pipe.vae, None, None, None, None, unet, pipe.scheduler, add_watermarker=False)
    holder.load_lora_weights(str(path))
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
        weights = trainer._weights()
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
    """DeepSpeed asks for the batch size, which it otherwise reads from a prepared loader."""
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None:
        plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = config.data.batch_size


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

"""The config of a training run: a YAML file of `TrainConfig`'s fields, and words `key=value` that override them."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from facesnap.errors import did_you_mean
from facesnap.ffrnet import VARIANTS, Variant
from facesnap.training.identity import IdentityConfig
from facesnap.training.photos import PhotoConfig
from facesnap.training.portraits import LEARN, LossConfig
from facesnap.training.trainer import PRECISIONS, TrainerConfig

TRACKERS = {"tensorboard": "tensorboard", "wandb": "wandb"}  # and the package each needs


@dataclass(frozen=True)
class TrainConfig:
    """One training run. The defaults are the paper's where it names them."""

    model: str  # the FaceSnap folder to start from: of `facesnap.checkpoints init`, or trained before
    shards: str  # of `facesnap.training.prepare`: a folder, a brace pattern or URLs
    out: str
    validation: str | None = None  # shards of people who are not trained on; None: the sheets show training pictures
    validation_samples: int = 6
    variant: Variant | None = None  # a row of Table 3; the model's own by default
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
    gradients_every: int = 0  # steps: log the norm of each loss's gradient, a backward pass more each; 0: never
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


for section in (TrainConfig, PhotoConfig, LossConfig, IdentityConfig):
    setattr(section, "__pydantic_config__", ConfigDict(extra="forbid"))  # noqa: B010 (an unknown key is an error)


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
            hint = f"; a file of them is given as --config {word}" if word.endswith((".yaml", ".yml")) else ""
            raise ValueError(f"{word!r} is no key=value{hint}")
        place = given
        *sections, last = name.split(".")
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise ValueError(f"{section!r} of {word!r} is no section of the config")
        place[last] = yaml.safe_load(value)
    try:
        return TypeAdapter(TrainConfig).validate_python(_at_home(given))
    except ValidationError as error:
        raise ValueError(_sentence(error)) from error


def _at_home(given: Any) -> Any:
    """The config with its ~/ written out, which no shell does in `identity.recogniser=~/…`."""
    if isinstance(given, dict):
        return {name: _at_home(value) for name, value in given.items()}
    return os.path.expanduser(given) if isinstance(given, str) and given.startswith("~/") else given


def _sentence(error: ValidationError) -> str:
    """What is wrong with a config, by the field's name: its first fault, or all keys that are missing."""
    faults = error.errors()
    first = faults[0]
    sections = first["loc"][:-1]
    name = ".".join(str(part) for part in first["loc"])
    if first["type"] == "unexpected_keyword_argument":
        kind: Any = TrainConfig
        for section in sections:
            kind = type(getattr(TrainConfig("", "", ""), str(section)))
        known = [".".join([*map(str, sections), f.name]) for f in dataclasses.fields(kind)]
        return f"the config has no key {name}: {did_you_mean(name, known)}"
    if first["type"] == "missing" and not sections:
        missing = [str(fault["loc"][0]) for fault in faults if fault["type"] == "missing"]
        return f"the config lacks {', '.join(missing)}: add it, or give {missing[0]}=VALUE"
    if first["type"] == "dataclass_type":
        return f"{name} is a section: it holds keys and values"
    if first["type"] == "value_error":  # of a dataclass's own checks, which name the field
        return str(first["ctx"]["error"])
    return f"{name} is {first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}"

"""Checkpoints of a trainer: written whole or not at all, and read back so that the run goes on exactly.

`checkpoint-<step>` holds `weights.safetensors` and `average.safetensors`, the weights and their EMA (both with all
parameters and buffers of the modules, named `module.parameter`), and `state.pt`, the optimiser's state and the
counters; with FSDP or DeepSpeed the former is in `sharded/`, as accelerate writes it. accelerate's own `save_state`
writes into place and keeps pickles, so that a run killed while it writes would have none.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

if TYPE_CHECKING:
    from facesnap.training.trainer import Trainer


def write_checkpoint(trainer: Trainer) -> Path:
    """Write `checkpoint-<step>`, and delete all but the last `keep`.

    Raises OSError where it cannot be written (a full disk); the checkpoint before it is still there.
    """
    out, accelerator = trainer.config.out, trainer.accelerator
    place = out / f"checkpoint-{trainer.step:08d}"
    draft = place.with_suffix(".tmp")
    main = accelerator.is_main_process
    if main:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir()
    accelerator.wait_for_everyone()
    try:
        _write(trainer, draft)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have their own
        shutil.rmtree(draft, ignore_errors=True)
        raise OSError(
            f"the checkpoint of step {trainer.step} could not be written to {out} ({error}); the one before it is "
            "whole: make room on the disk and start again"
        ) from error
    accelerator.wait_for_everyone()
    if main:
        shutil.rmtree(place, ignore_errors=True)
        draft.rename(place)
        for old in _checkpoints(out)[: -trainer.config.keep]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return place


def _write(trainer: Trainer, draft: Path) -> None:
    main, average = trainer.accelerator.is_main_process, trainer.average
    weights = trainer.weights()
    if main:
        save_file(weights, draft / "weights.safetensors")
    with trainer.averaged():
        weights = trainer.weights()
    if main:
        save_file(weights, draft / "average.safetensors")
    state: dict[str, Any] = {"step": trainer.step, "spent": trainer.spent, "updates": average.optimization_step}
    if trainer.sharded:
        trainer.accelerator.save_state(str(draft / "sharded"))
        torch.save(average.shadow_params, draft / f"average-{trainer.stage.rank}.pt")
    else:
        state["optimisers"] = [optimiser.state_dict() for optimiser in trainer.optimisers]
        if trainer.accelerator.scaler is not None:
            state["scaler"] = trainer.accelerator.scaler.state_dict()
    if main:
        torch.save(state, draft / "state.pt")


def read_checkpoint(trainer: Trainer) -> bool:
    """Go back to the last whole checkpoint in the run's folder, if there is one.

    Raises ValueError where the checkpoint is of another architecture.
    """
    places = _checkpoints(trainer.config.out)
    if not places:
        return False
    place = places[-1]
    state = torch.load(place / "state.pt", map_location="cpu", weights_only=True)
    if trainer.sharded:
        trainer.accelerator.load_state(str(place / "sharded"))
        averages = torch.load(place / f"average-{trainer.stage.rank}.pt", map_location="cpu", weights_only=True)
    else:
        weights, average = load_file(place / "weights.safetensors"), load_file(place / "average.safetensors")
        _check_architecture(trainer, place, weights)
        for module_name, module in trainer.modules.items():
            own = f"{module_name}."
            module.load_state_dict({k.removeprefix(own): v for k, v in weights.items() if k.startswith(own)})
        averages = [average[name] for name in trainer.names]
        for optimiser, kept in zip(trainer.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(kept)
        if trainer.accelerator.scaler is not None and "scaler" in state:
            trainer.accelerator.scaler.load_state_dict(state["scaler"])
    for value, kept in zip(trainer.average.shadow_params, averages, strict=True):
        value.copy_(kept)
    trainer.step, trainer.spent, trainer.average.optimization_step = state["step"], state["spent"], state["updates"]
    if trainer.accelerator.is_main_process:
        _forget_log_after(trainer.log_path, trainer.step)
    return True


def _checkpoints(out: Path) -> list[Path]:
    return sorted(place for place in out.glob("checkpoint-*") if place.suffix != ".tmp")


def _check_architecture(trainer: Trainer, place: Path, found: dict[str, Tensor]) -> None:
    wanted = {f"{n}.{k}": tuple(v.shape) for n, m in trainer.modules.items() for k, v in m.state_dict().items()}
    there = {name: tuple(value.shape) for name, value in found.items()}
    for name in sorted(wanted.keys() | there.keys()):
        if wanted.get(name) != there.get(name):
            raise ValueError(
                f"{place} is a checkpoint of another architecture ({name} is {there.get(name, 'absent')} there, "
                f"{wanted.get(name, 'absent')} here): give another folder for this run, or the model it was made of"
            )


def _forget_log_after(log: Path, step: int) -> None:
    """Steps that will be made again will be logged again."""
    if log.is_file():
        lines = log.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
        log.write_text("".join(line + "\n" for line in kept), encoding="utf-8")


def write_whole(folder: Path, save: Callable[[Path], Any]) -> None:
    """Let `save` write a folder, and put it in the place of `folder` once it is whole."""
    draft = folder.with_suffix(".tmp")
    shutil.rmtree(draft, ignore_errors=True)
    save(draft)
    shutil.rmtree(folder, ignore_errors=True)
    draft.rename(folder)

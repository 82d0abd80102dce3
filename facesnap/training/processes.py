"""What one process must know of the others: how accelerate is set up, the norm of a gradient in pieces, one scale."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, gather_object
from torch import Tensor, nn

if TYPE_CHECKING:
    from facesnap.training.trainer import TrainerConfig


def make_accelerator(config: TrainerConfig, *, find_unused: bool = False, **options: Any) -> Accelerator:
    """An accelerator for a run: that of `accelerate launch`, or of this one process.

    bf16 is autocast by the trainer itself; accelerate keeps what needs a scaler (fp16), and what a DeepSpeed or FSDP
    configuration names. find_unused: some parameters that learn have no part in the loss.
    """
    accelerator = Accelerator(
        cpu=config.device == "cpu",
        mixed_precision="fp16" if config.precision == "fp16" else None,
        gradient_accumulation_steps=config.accumulate,
        # the gradients lie in the buckets they are sent in: once in memory, not twice
        kwargs_handlers=[
            DistributedDataParallelKwargs(gradient_as_bucket_view=True, find_unused_parameters=find_unused)
        ],
        **options,
    )
    if accelerator.distributed_type == DistributedType.FSDP:
        keep_inputs(accelerator.state.fsdp_plugin)
    return accelerator


def keep_inputs(plugin: Any) -> None:
    """FSDP's mixed precision is for weights: key points and sizes among a batch stay float32, gradients are summed in
    it."""
    policy = plugin.mixed_precision_policy
    if policy is not None:
        plugin.mixed_precision_policy = dataclasses.replace(
            policy, cast_root_forward_inputs=False, cast_forward_inputs=False, reduce_dtype=torch.float32
        )


def clip_gradients(
    accelerator: Accelerator, model: Any, optimisers: Sequence[Any], parameters: Sequence[nn.Parameter], most: float
) -> Tensor | None:
    """The norm of the whole gradient, over all processes, which is brought down to `most`. model: as prepared."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:  # it clips by itself
        return accelerator.clip_grad_norm_(parameters, most)
    if accelerator.scaler is not None:
        for optimiser in optimisers:
            accelerator.scaler.unscale_(optimiser.optimizer)
    if accelerator.distributed_type == DistributedType.FSDP:  # each process holds a piece of it
        return model.clip_grad_norm_(most)
    return nn.utils.clip_grad_norm_(parameters, most)


def step_optimisers(accelerator: Accelerator, optimisers: Sequence[Any]) -> None:
    scaler = accelerator.scaler
    if scaler is None:
        for optimiser in optimisers:
            optimiser.step()
    elif accelerator.sync_gradients:
        # accelerate moves the scale on at each optimiser's step, and the next one would be unscaled twice
        for optimiser in optimisers:
            scaler.step(optimiser.optimizer)
        scaler.update()
    for optimiser in optimisers:
        optimiser.zero_grad()


def first_fault(
    accelerator: Accelerator, loss: Tensor, keys: Sequence[str], each: Tensor | None
) -> tuple[float, list[str]] | None:
    """None where the loss is a number in every process; else what it is in one, and the samples that made it so: the
    same answer in all of them, so that none is left waiting.

    keys: the samples' names, if there are any. each (B,): their losses.
    """
    several = accelerator.num_processes > 1
    fine = torch.isfinite(loss.detach())
    if several:
        fine = accelerator.reduce(fine.float()) == accelerator.num_processes
    if fine:
        return None
    faults = []
    if not torch.isfinite(loss):
        bad = list(keys)
        if each is not None and bad:
            bad = [key for key, good in zip(keys, torch.isfinite(each).tolist(), strict=True) if not good] or bad
        faults = [(loss.item(), bad)]
    first, *_ = gather_object(faults) if several else faults
    return first

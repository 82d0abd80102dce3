"""Started by `accelerate launch` in test_train.py: steps on the tiny FaceSnap, whose gradients are written down."""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny import TinyAnalyser, TinyScorer
from tiny_batches import stream

import facesnap.folder
from facesnap.training.config import read_config
from facesnap.training.processes import keep_inputs, make_accelerator
from facesnap.training.train import export, make_stage, record
from facesnap.training.trainer import Trainer


def shard(accelerator) -> None:
    """FSDP of CPU processes, which accelerate's command line has for GPUs only, as configs/accelerate-fsdp.yaml."""
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    classes = "BasicTransformerBlock,ResnetBlock2D,DecoderLayer".split(",")
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=1, sharding_strategy="FULL_SHARD", auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=classes, state_dict_type="FULL_STATE_DICT", sync_module_states=False,
        cpu_ram_efficient_loading=False, use_orig_params=True,
    )  # fmt: skip
    keep_inputs(plugin)
    told = {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin, "device": torch.device("cpu")}
    for state in (PartialState, AcceleratorState):  # the latter is made of the former whenever it is asked for
        state._shared_state.update(told)


def steps_in_pieces(overrides: list[str], count: int) -> None:
    """As `steps`, sharded, without what is left: gathering FSDP's weights is for GPUs, on CPUs torch 2.13 crashes."""
    config = read_config(None, overrides)
    accelerator = make_accelerator(config.trainer())
    shard(accelerator)
    stage = make_stage(config, stream(count), accelerator.device)
    trainer = Trainer(stage, config.trainer(), accelerator)
    batches = stage.stream(0, config.seed)
    for _ in range(config.steps):
        trainer.log({key: float(value) for key, value in trainer.update(next(batches)).items()}, 1.0)


def steps(overrides: list[str], count: int, gradients: Path) -> Trainer:
    """All steps of a run on batches of `count` samples a process; the first step's gradients go to a file."""
    config = read_config(None, overrides)
    settings = config.trainer()
    accelerator = make_accelerator(settings)
    stage = make_stage(config, stream(count), accelerator.device)
    record(config, accelerator, "tiny")
    trainer = Trainer(stage, settings, accelerator)

    def keep(optimiser, *_):
        if trainer.step == 0 and accelerator.is_main_process:
            found = {name: p.grad for name, p in zip(trainer.names, trainer.parameters, strict=True)}
            save_file({name: grad.clone() for name, grad in found.items()}, gradients)

    trainer.optimisers[0].optimizer.register_step_pre_hook(keep)
    trainer.train()
    export(trainer, stage, config)
    return trainer


def spoil(trainer: Trainer, count: int) -> None:
    """One process meets a sample that is no number; what each of them raises goes to a file of its own."""
    rank = trainer.stage.rank
    made = next(iter(stream(count)(0, rank, trainer.stage.world)))
    if rank == 1:
        made["embeddings"][0] = float("nan")
    try:
        trainer.update(made)
    except FloatingPointError as error:
        (trainer.config.out / f"told-{rank}.txt").write_text(str(error))


if __name__ == "__main__":
    facesnap.folder.FaceAnalyser, facesnap.folder.Recogniser = TinyAnalyser, TinyScorer
    torch.set_num_threads(1)
    words = json.loads(sys.argv[1])
    trained = steps(words["overrides"], words["count"], Path(words["gradients"]))
    spoil(trained, words["count"])
    if "in_pieces" in words:  # the same run again, sharded
        steps_in_pieces(words["in_pieces"], words["count"])

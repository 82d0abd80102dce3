"""Started by `accelerate launch` in test_train.py: steps on the tiny FaceSnap, whose gradients are written down."""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny import TinyAnalyser, TinyScorer
from tiny_batches import stream

import facesnap.pipeline
from facesnap.training.train import export, make_stage, read_config, record
from facesnap.training.trainer import Trainer, make_accelerator


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


if __name__ == "__main__":
    facesnap.pipeline.FaceAnalyser, facesnap.pipeline.Recogniser = TinyAnalyser, TinyScorer
    torch.set_num_threads(1)
    words = json.loads(sys.argv[1])
    steps(words["overrides"], words["count"], Path(words["gradients"]))

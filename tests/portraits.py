"""Portraits by the tiny pipeline, and their pixels; helpers of several tests."""

import numpy as np
import torch
from tiny import SIZE, photo

from facesnap.pipeline import LAST_CALL

ALICE, BOB = photo(1), photo(2)


def portrait(pipe, prompt="a photo", reference=ALICE, seed=0, **kwargs):
    return pipe(prompt, reference=reference, seed=seed, **kwargs)


def pixels(output, k=0):
    return np.asarray(output.images[k])


def same(a, b):
    """Equal but for rounding: tensors that lie elsewhere in memory may be summed in another order."""
    return np.abs(pixels(a).astype(int) - pixels(b)).max() <= 1


def state(pipe):
    """All that a request could change: attributes, configs, weights and hooks."""
    modules = {n: c for n, c in pipe.components.items() if isinstance(c, torch.nn.Module)}
    return {
        "attributes": {k: repr(v) for k, v in vars(pipe).items() if k not in (*pipe.components, *LAST_CALL)},
        "identities": {k: id(v) for k, v in pipe.components.items()},
        "scheduler": {k: repr(v) for k, v in vars(pipe.scheduler).items()},
        "weights": {n: sum(p.double().abs().sum().item() for p in m.parameters()) for n, m in modules.items()},
        "dtypes": {n: m.dtype for n, m in modules.items()},
        "hooks": [
            (n, h)
            for n, m in modules.items()
            for s in m.modules()
            for h in (*s._forward_pre_hooks.values(), *s._forward_hooks.values())
        ],
        "generator": torch.get_rng_state().sum().item(),
    }


def plain(stock):
    """The picture of a stock pipeline where `portrait` makes one with FaceSnap: the same prompt, steps and seed."""
    stock.set_progress_bar_config(disable=True)
    seed = torch.Generator().manual_seed(0)
    how = {"height": SIZE, "width": SIZE, "num_inference_steps": 2, "guidance_scale": 2.0}
    return pixels(stock("a photo", generator=seed, **how))

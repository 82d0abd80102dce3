"""Optimisers of the trainer: AdamW, Muon for what is a matrix, and how the learning rate goes."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

OPTIMISERS = ("adamw", "muon", "adamw8bit")
SCHEDULES = ("cosine", "linear", "constant")


def rate(
    peak: float, step: int, share: float, *, warmup: int, hold: float, floor: float, schedule: str = "cosine"
) -> float:
    """The learning rate: linear warm-up by steps, then flat, then a cosine (or a line) over the rest of the run.

    `share` in [0, 1] is how much of the run is spent; `hold` the share after which the rate falls, to `floor` times
    the peak.
    """
    warm = min(1.0, (step + 1) / max(warmup, 1))
    fall = min(max(0.0, share - hold) / max(1 - hold, 1e-9), 1.0)
    height = {"cosine": 0.5 + 0.5 * math.cos(math.pi * fall), "linear": 1 - fall, "constant": 1.0}[schedule]
    return peak * warm * (floor + (1 - floor) * height)


def make_optimisers(
    modules: Mapping[str, nn.Module],
    rates: Mapping[str, float],
    *,
    name: str,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
) -> list[torch.optim.Optimizer]:
    """Of all that requires a gradient: AdamW for vectors, and for matrices and kernels what `name` says.

    rates: by module, relative to `lr`, where not 1. Each group keeps its own as `scale`. Only matrices decay.
    """
    groups: dict[tuple[bool, float, float], list[nn.Parameter]] = defaultdict(list)
    for module_name, module in modules.items():
        for parameter in module.parameters():
            if parameter.requires_grad:
                decay = weight_decay if parameter.ndim >= 2 else 0.0
                groups[name == "muon" and _is_matrix(parameter), rates.get(module_name, 1.0), decay].append(parameter)
    kinds = {True: Muon, False: _adamw(name)}
    options: dict[bool, dict[str, Any]] = {True: {}, False: {"betas": betas}}
    return [
        kinds[kind](
            [
                {"params": parameters, "weight_decay": decay, "scale": scale}
                for (is_matrix, scale, decay), parameters in groups.items()
                if is_matrix == kind
            ],
            lr=lr,
            **options[kind],
        )
        for kind in sorted({key[0] for key in groups})
    ]


def _adamw(name: str) -> Any:
    if name != "adamw8bit":
        return torch.optim.AdamW
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ValueError("optimiser adamw8bit needs the package bitsandbytes: install it, or choose adamw") from error
    return AdamW8bit


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal (Jordan et al. 2024), for matrices and for kernels (O, I·k·k) seen as
    matrices.

    Each update has the root mean square of AdamW's (0.2, Liu et al., arXiv 2502.16982), so both share one
    rate.
    """

    def __init__(self, params: Any, lr: float, momentum: float = 0.95, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                ahead = parameter.grad.lerp(state["momentum"], group["momentum"])  # Nesterov's
                matrix = orthogonal(ahead.flatten(1))
                size = 0.2 * math.sqrt(max(matrix.shape))
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(matrix.view_as(parameter), alpha=-group["lr"] * size)


def orthogonal(matrix: Tensor, iterations: int = 5) -> Tensor:
    """U Vᵀ of a matrix U S Vᵀ, roughly (singular values 0.7 to 1.2): Newton-Schulz, quintic, in bfloat16."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.bfloat16()
    if tall := len(x) > x.shape[1]:
        x = x.T
    x = x / (x.norm() + 1e-7)
    for _ in range(iterations):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.T if tall else x).to(matrix.dtype)


def _is_matrix(parameter: nn.Parameter) -> bool:
    """Worth orthogonalising: not a bias, a norm, or a kernel from or to a few channels (pixels)."""
    return parameter.ndim >= 2 and min(len(parameter), parameter[0].numel()) >= 8

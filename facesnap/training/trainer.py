"""One trainer for every part that learns.

A `Stage` says what learns, where a batch comes from and what the loss is; the `Trainer` does the rest:
AdamW or Muon, learning rate, an exponential moving average of the weights (EMA), bfloat16 autocast,
checkpoints, resuming, a progress line, a JSON-lines log and sample sheets.

Resuming is exact. A batch is a function of the seed and the step, and so is the noise of the loss: a run
that was killed and started again gives the losses of one that was not. In a run with a budget of minutes
the learning rate follows the share that is spent, which a checkpoint remembers too.

    trainer = Trainer(stage, TrainerConfig(out=folder, minutes=30))
    trainer.train()                     # goes on from the last checkpoint in the folder, if there is one
    with trainer.averaged():            # the EMA weights are in the modules
        stage.unet.save_pretrained(…)
"""

import contextlib
import json
import math
import queue
import shutil
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

Batch = dict[str, Any]


class Stage:
    """What one stage of the training is. Only `modules`, `batch` and `loss` must be written."""

    def modules(self) -> dict[str, nn.Module]:
        """The modules that learn, by name; of their parameters, those that require a gradient."""
        raise NotImplementedError

    def batch(self, rng: np.random.Generator) -> Batch:
        """The next batch, by `rng` alone. Called in a background thread, on the CPU."""
        raise NotImplementedError

    def loss(self, batch: Batch, step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and what else to log, under autocast. All noise comes from `generator`."""
        raise NotImplementedError

    def rates(self) -> dict[str, float]:
        """Learning rates relative to the trainer's, by module name, where they are not 1."""
        return {}

    def sample_sheet(self, path: Path) -> dict[str, float]:
        """Write a picture that shows how far it is, by the EMA weights; return figures to log."""
        return {}

    def refresh(self) -> None:
        """Called after each checkpoint: a chance to pick up data that has arrived."""


@dataclass(frozen=True)
class TrainerConfig:
    out: Path
    steps: int | None = None  # the end, by steps
    minutes: float | None = None  # or by time spent training, over all resumed parts
    optimiser: str = "adamw"  # or "muon", for matrices and kernels, and AdamW for the rest
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 1e-2  # on matrices and kernels only
    warmup: int = 100  # steps
    hold: float = 0.3  # the share of the run after which the rate begins to fall
    floor: float = 0.01  # of the rate, at the end
    clip: float = 1.0  # the norm of the gradient
    ema: float = 0.999
    seed: int = 0
    device: str = "cpu"
    bfloat16: bool = True
    log_every: int = 50  # steps
    checkpoint_minutes: float = 4.0
    sheet_minutes: float = 5.0

    def __post_init__(self) -> None:
        if self.steps is None and self.minutes is None:
            raise ValueError("a run needs an end: give steps or minutes")
        if self.optimiser not in ("adamw", "muon"):
            raise ValueError(f"optimiser {self.optimiser!r} is not known; choose adamw or muon")


def rate(config: TrainerConfig, step: int, share: float) -> float:
    """The learning rate: linear warm-up by steps, then flat, then a cosine over the rest of the run.

    `share` in [0, 1] is how much of the run is spent.
    """
    warm = min(1.0, (step + 1) / max(config.warmup, 1))
    fall = max(0.0, share - config.hold) / max(1 - config.hold, 1e-9)
    cosine = 0.5 + 0.5 * math.cos(math.pi * min(fall, 1.0))
    return config.lr * warm * (config.floor + (1 - config.floor) * cosine)


class Average:
    """The exponential moving average of some parameters, updated in place and all at once.

    The decay grows with the number of updates, (1 + n) / (10 + n) up to `decay`, so that the random start is
    forgotten soon.
    """

    def __init__(self, parameters: list[nn.Parameter], decay: float) -> None:
        self.parameters = parameters
        self.decay = decay
        self.updates = 0
        self.values = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def update(self) -> None:
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.values, [p.detach() for p in self.parameters], 1 - decay)
        self.updates += 1

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the averages and the parameters."""
        for parameter, value in zip(self.parameters, self.values, strict=True):
            kept = parameter.detach().clone()
            parameter.copy_(value)
            value.copy_(kept)


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


class Trainer:
    def __init__(self, stage: Stage, config: TrainerConfig) -> None:
        self.stage = stage
        self.config = config
        self.device = torch.device(config.device)
        self.modules = stage.modules()
        self.names: list[str] = []  # "module.parameter" of each parameter that learns
        self.parameters: list[nn.Parameter] = []
        groups: dict[tuple[bool, float, float], list[nn.Parameter]] = defaultdict(list)
        rates = stage.rates()
        for module_name, module in self.modules.items():
            module.to(self.device)
            for name, parameter in module.named_parameters():
                if parameter.requires_grad:
                    self.names.append(f"{module_name}.{name}")
                    self.parameters.append(parameter)
                    is_matrix = config.optimiser == "muon" and _is_matrix(parameter)
                    decay = config.weight_decay if parameter.ndim >= 2 else 0.0
                    groups[is_matrix, rates.get(module_name, 1.0), decay].append(parameter)
        kinds = {True: Muon, False: torch.optim.AdamW}
        options: dict[bool, dict[str, Any]] = {True: {}, False: {"betas": config.betas}}
        self.optimisers: list[torch.optim.Optimizer] = [
            kinds[kind](
                [
                    {"params": parameters, "weight_decay": decay, "scale": scale}
                    for (is_matrix, scale, decay), parameters in groups.items()
                    if is_matrix == kind
                ],
                lr=config.lr,
                **options[kind],
            )
            for kind in sorted({key[0] for key in groups})
        ]
        self.average = Average(self.parameters, config.ema)
        self.step = 0
        self.spent = 0.0  # seconds of training
        config.out.mkdir(parents=True, exist_ok=True)
        self.log_path = config.out / "log.jsonl"
        self.resume()

    # ---- the run -------------------------------------------------------------------------------------------

    @property
    def share(self) -> float:
        """How much of the run is spent, in [0, 1]."""
        shares = [0.0]
        if self.config.steps is not None:
            shares.append(self.step / self.config.steps)
        if self.config.minutes is not None:
            shares.append(self.spent / (self.config.minutes * 60))
        return min(max(shares), 1.0)

    def train(self) -> None:
        """Train to the end of the budget, then checkpoint and draw a last sheet."""
        config = self.config
        if self.share >= 1:
            return
        checkpoint_at = self.spent + config.checkpoint_minutes * 60
        sheet_at = self.spent + min(config.sheet_minutes, 1.0) * 60  # the first one soon: it shows mistakes
        started, started_step = self.spent, self.step
        sums: dict[str, Tensor | float] = defaultdict(float)
        count = 0
        with contextlib.closing(self._batches()) as batches:
            while self.share < 1:
                begun = time.perf_counter()
                logs = self.update(next(batches))
                self.spent += time.perf_counter() - begun
                for key, value in logs.items():
                    sums[key] = sums[key] + value
                count += 1
                ends = self.share >= 1
                if count == config.log_every or ends:
                    speed = (self.step - started_step) / max(self.spent - started, 1e-9)
                    self._log({key: float(value) / count for key, value in sums.items()}, speed)
                    sums.clear()
                    count = 0
                if self.spent >= sheet_at or ends:
                    sheet_at = self.spent + config.sheet_minutes * 60
                    self._sheet()
                if self.spent >= checkpoint_at or ends:
                    checkpoint_at = self.spent + config.checkpoint_minutes * 60
                    self.checkpoint()
                    self.stage.refresh()

    def update(self, batch: Batch) -> dict[str, Tensor]:
        """One step of the optimiser; returns what to log."""
        config = self.config
        learning_rate = rate(config, self.step, self.share)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = learning_rate * group["scale"]
        batch = {
            key: value.to(self.device, non_blocking=True) if isinstance(value, Tensor) else value
            for key, value in batch.items()
        }
        seed = _seed(config.seed, self.step)
        generator = torch.Generator(self.device).manual_seed(seed)
        torch.manual_seed(seed)  # for modules that draw from the global generator (dropout)
        with self._autocast():
            loss, logs = self.stage.loss(batch, self.step, generator)
        for parameter in self.parameters:
            parameter.grad = None
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, config.clip)
        for optimiser in self.optimisers:
            optimiser.step()
        self.average.update()
        self.step += 1
        return {"loss": loss.detach(), "norm": norm.detach()} | {k: v.detach() for k, v in logs.items()}

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Within it the modules hold the EMA weights."""
        self.average.swap()
        try:
            yield
        finally:
            self.average.swap()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.bfloat16)

    def _batches(self) -> Generator[Batch]:
        """Batches from this step on, prepared one after the other in a thread."""
        ready: queue.Queue[Batch | BaseException] = queue.Queue(maxsize=3)
        stop = threading.Event()

        def put(item: Batch | BaseException) -> None:
            while not stop.is_set():
                with contextlib.suppress(queue.Full):
                    return ready.put(item, timeout=0.2)

        def prepare(step: int) -> None:
            try:
                while not stop.is_set():
                    put(self.stage.batch(np.random.default_rng((self.config.seed, step))))
                    step += 1
            except BaseException as error:  # raised again where the batch is asked for
                put(error)

        thread = threading.Thread(target=prepare, args=(self.step,), daemon=True)
        thread.start()
        try:
            while True:
                item = ready.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stop.set()
            thread.join()

    # ---- what it leaves behind -----------------------------------------------------------------------------

    def _log(self, means: dict[str, float], speed: float) -> None:
        if not math.isfinite(means["loss"]):
            raise FloatingPointError(
                f"the loss is {means['loss']} at step {self.step}: lower the learning rate "
                f"({self.config.lr}) and start again from the last checkpoint"
            )
        share = self.share
        eta = self.spent / share - self.spent if share > 0 else math.nan
        line = {"step": self.step, "minutes": self.spent / 60, "lr": rate(self.config, self.step, share)}
        self._append(line | means | {"steps_per_second": speed})
        figures = "  ".join(f"{key} {value:.4g}" for key, value in means.items())
        print(
            f"step {self.step}  {share:4.0%}  {figures}  {speed:.2f} steps/s  {eta / 60:.1f} min to go",
            file=sys.stderr,
            flush=True,
        )

    def _append(self, line: dict[str, Any]) -> None:
        with self.log_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({k: round(v, 7) if isinstance(v, float) else v for k, v in line.items()}) + "\n")

    def _sheet(self) -> None:
        with self.averaged(), self._autocast():
            for module in self.modules.values():
                module.eval()
            figures = self.stage.sample_sheet(self.config.out / "sheet.png")
            for module in self.modules.values():
                module.train()
        if figures:
            self._append({"step": self.step, "minutes": self.spent / 60} | figures)
            print("  ".join(f"{key} {value:.4g}" for key, value in figures.items()), file=sys.stderr, flush=True)

    def checkpoint(self) -> Path:
        """Write `checkpoint-<step>`, whole or not at all, and delete the ones before it.

        `weights.safetensors` are the weights, `average.safetensors` their EMA (both with all parameters and
        buffers of the modules, named `module.parameter`), `state.pt` the optimiser's state and the counters.
        """
        place = self.config.out / f"checkpoint-{self.step:08d}"
        draft = place.with_suffix(".tmp")
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir()
        save_file(self._weights(), draft / "weights.safetensors")
        with self.averaged():
            save_file(self._weights(), draft / "average.safetensors")
        state = {
            "step": self.step,
            "spent": self.spent,
            "updates": self.average.updates,
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
        }
        torch.save(state, draft / "state.pt")
        shutil.rmtree(place, ignore_errors=True)
        draft.rename(place)
        for old in self.config.out.glob("checkpoint-*"):
            if old != place:
                shutil.rmtree(old)
        return place

    def _weights(self) -> dict[str, Tensor]:
        return {
            f"{module_name}.{name}": value.detach().cpu().contiguous()
            for module_name, module in self.modules.items()
            for name, value in module.state_dict().items()
        }

    def resume(self) -> bool:
        """Go back to the last whole checkpoint in the folder, if there is one. Called by the constructor."""
        places = sorted(p for p in self.config.out.glob("checkpoint-*") if p.suffix != ".tmp")
        if not places:
            return False
        weights = load_file(places[-1] / "weights.safetensors")
        average = load_file(places[-1] / "average.safetensors")
        for module_name, module in self.modules.items():
            own = f"{module_name}."
            module.load_state_dict({k.removeprefix(own): v for k, v in weights.items() if k.startswith(own)})
        for name, value in zip(self.names, self.average.values, strict=True):
            value.copy_(average[name])
        state = torch.load(places[-1] / "state.pt", map_location="cpu", weights_only=True)
        for optimiser, kept in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(kept)
        self.step, self.spent, self.average.updates = state["step"], state["spent"], state["updates"]
        self._forget_log_after(self.step)
        return True

    def _forget_log_after(self, step: int) -> None:
        """Steps that will be made again will be logged again."""
        if self.log_path.is_file():
            lines = self.log_path.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
            self.log_path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")


def _seed(seed: int, step: int) -> int:
    """A seed for one step, unlike those of its neighbours."""
    return int(np.random.SeedSequence((seed, step, 1)).generate_state(1, np.uint64)[0] >> 1)

"""One trainer for every part that learns.

A `Stage` says what learns, where a batch comes from and what the loss is; the `Trainer` does the rest, on
accelerate: one process or many, AdamW or Muon, learning rate, accumulation and clipping of gradients, an exponential
moving average of the weights (EMA), autocast, checkpoints, resuming, a progress line, a JSON-lines log and sample
sheets.

Resuming is exact. A batch is a function of the seed and its position, and so is the noise of the loss: a run
that was killed and started again gives the losses of one that was not. In a run with a budget of minutes
the learning rate follows the share that is spent, which a checkpoint remembers too.

    trainer = Trainer(stage, TrainerConfig(out=folder, minutes=30))
    trainer.train()                     # goes on from the last checkpoint in the folder, if there is one
    with trainer.averaged():            # the EMA weights are in the modules
        stage.unet.save_pretrained(…)
"""

import contextlib
import itertools
import json
import math
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from facesnap.training.checkpointing import read_checkpoint, write_checkpoint
from facesnap.training.optim import OPTIMISERS, SCHEDULES, make_optimisers, rate
from facesnap.training.prefetch import Batch, prefetched
from facesnap.training.processes import clip_gradients, first_fault, make_accelerator, step_optimisers

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Stage:
    """What one stage of the training is. Only `modules`, `batch` (or `stream`) and `loss` must be written.

    `rank` of `world` processes: set by the trainer before anything else is asked.
    """

    rank, world = 0, 1

    def modules(self) -> dict[str, nn.Module]:
        """The modules that learn, by name; of their parameters, those that require a gradient."""
        raise NotImplementedError

    def batch(self, rng: np.random.Generator) -> Batch:
        """The next batch, by `rng` alone, on the CPU. Called in a process of its own."""
        raise NotImplementedError

    def loss(self, batch: Batch, step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Any]]:
        """The loss and what else to log, under autocast. All noise comes from `generator`.

        With several processes the generator is the same in all of them: what shall differ takes `rank` into account.
        Two entries among what to log are not logged: `each`, the losses of the samples (B,), tells which of the batch's
        `keys` to name where one is no number; `parts`, the weighted losses whose sum the loss is, by name, is what
        `TrainerConfig.gradients_every` compares.
        """
        raise NotImplementedError

    def stream(self, position: int, seed: int) -> Generator[Batch]:
        """The batches of this process from number `position` on."""
        yield from prefetched(self.batch, position, seed, self.rank, self.world)

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
    minutes: float | None = None  # or by time spent training, over all resumed parts; one process only
    optimiser: str = "adamw"  # "muon" for matrices and kernels, and AdamW for the rest; "adamw8bit" by bitsandbytes
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 1e-2  # on matrices and kernels only
    schedule: str = "cosine"  # how the rate falls: or "linear", or "constant"
    warmup: int = 100  # steps
    hold: float = 0.3  # the share of the run after which the rate begins to fall
    floor: float = 0.01  # of the rate, at the end
    accumulate: int = 1  # batches a step
    clip: float = 1.0  # the norm of the gradient
    ema: float = 0.999
    seed: int = 0
    device: str = "cpu"  # with one process
    precision: str = "bf16"  # of autocast: or "fp32", or "fp16" with its scaler (GPU only)
    log_every: int = 50  # steps
    gradients_every: int = 0  # steps: log each loss's gradient by module, a backward pass more; 0: never
    checkpoint_minutes: float = 4.0
    checkpoint_every: int | None = None  # steps, instead of minutes
    keep: int = 1  # checkpoints
    sheet_minutes: float = 5.0
    sheet_every: int | None = None  # steps, instead of minutes; 0: never

    def __post_init__(self) -> None:
        if self.steps is None and self.minutes is None:
            raise ValueError("a run needs an end: give steps or minutes")
        for what, value, known in (
            ("optimiser", self.optimiser, OPTIMISERS),
            ("schedule", self.schedule, SCHEDULES),
            ("precision", self.precision, PRECISIONS),
        ):
            if value not in known:
                raise ValueError(f"{what} {value!r} is not known; choose {', '.join(known)}")
        if self.accumulate < 1 or self.keep < 1:
            raise ValueError("accumulate and keep must be at least 1")


class _Loss(nn.Module):
    """The stage's loss as one module's forward, which holds all that learns: what DDP, FSDP and DeepSpeed wrap.

    autocast: entered here, since DeepSpeed turns off one that was entered around its own forward.
    """

    def __init__(
        self, stage: Stage, modules: dict[str, nn.Module], autocast: Callable[[], contextlib.AbstractContextManager]
    ) -> None:
        super().__init__()
        self.stage, self.autocast = stage, autocast
        self.parts = nn.ModuleDict(modules)

    def forward(self, batch: Batch, step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        with self.autocast():
            return self.stage.loss(batch, step, generator)


class Trainer:
    """`accelerator`: made with the config's accumulation (`make_accelerator`) where None is given."""

    def __init__(self, stage: Stage, config: TrainerConfig, accelerator: Accelerator | None = None) -> None:
        self.stage = stage
        self.config = config
        self.accelerator = accelerator or make_accelerator(config)
        self.device = self.accelerator.device
        one_thread(self.device, config.precision)
        stage.rank, stage.world = self.accelerator.process_index, self.accelerator.num_processes
        if stage.world > 1 and (config.steps is None or config.checkpoint_every is None or config.sheet_every is None):
            raise ValueError("processes do not share a clock: give steps, checkpoint_every and sheet_every")
        # these two keep parts of the state in every process
        self.sharded = self.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
        if self.sharded and config.gradients_every:
            raise ValueError("gradients_every needs whole gradients: set it to 0 with FSDP or DeepSpeed")
        self.modules = stage.modules()
        for module in self.modules.values():
            module.to(self.device)
        optimisers = make_optimisers(
            self.modules, stage.rates(), name=config.optimiser, lr=config.lr, betas=config.betas,
            weight_decay=config.weight_decay,
        )  # fmt: skip
        whole = _Loss(stage, self.modules, self._autocast)
        self.learning, *self.optimisers = self.accelerator.prepare(whole, *optimisers)
        inner = self.accelerator.unwrap_model(self.learning, keep_torch_compile=False)
        named = [(name.removeprefix("parts."), p) for name, p in inner.named_parameters() if p.requires_grad]
        self.names = [name for name, _ in named]  # "module.parameter" of each parameter that learns
        self.parameters = [parameter for _, parameter in named]
        self.average = EMAModel(self.parameters, config.ema, foreach=True)
        self.step = 0
        self.spent = 0.0  # seconds of training
        config.out.mkdir(parents=True, exist_ok=True)
        self.log_path = config.out / "log.jsonl"
        read_checkpoint(self)

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

    def rate(self) -> float:
        """The learning rate now."""
        config = self.config
        return rate(
            config.lr, self.step, self.share, warmup=config.warmup, hold=config.hold, floor=config.floor,
            schedule=config.schedule,
        )  # fmt: skip

    def train(self) -> None:
        """Train to the end of the budget, then checkpoint and draw a last sheet."""
        config = self.config
        if self.share >= 1:
            return
        checkpoint_at = self.spent + config.checkpoint_minutes * 60
        sheet_at = self.spent + min(config.sheet_minutes, 1.0) * 60  # the first one soon: it shows mistakes
        started, started_step = self.spent, self.step
        sums: dict[str, Tensor | float] = defaultdict(float)
        counts: dict[str, int] = defaultdict(int)  # not every step has every figure
        with contextlib.closing(self.stage.stream(self.step * config.accumulate, config.seed)) as batches:
            while self.share < 1:
                begun = time.perf_counter()
                logs = self.update(*itertools.islice(batches, config.accumulate))
                self.spent += time.perf_counter() - begun
                for key, value in logs.items():
                    sums[key] = sums[key] + value
                    counts[key] += 1
                ends = self.share >= 1
                if counts["loss"] == config.log_every or ends:
                    speed = (self.step - started_step) / max(self.spent - started, 1e-9)
                    self.log({key: float(value) / counts[key] for key, value in sums.items()}, speed)
                    sums.clear()
                    counts.clear()
                if _due(config.sheet_every, self.step, self.spent >= sheet_at, ends):
                    sheet_at = self.spent + config.sheet_minutes * 60
                    self._sheet()
                if _due(config.checkpoint_every, self.step, self.spent >= checkpoint_at, ends):
                    checkpoint_at = self.spent + config.checkpoint_minutes * 60
                    self.checkpoint()
                    self.stage.refresh()

    def update(self, *batches: Batch) -> dict[str, Tensor]:
        """One step of the optimiser, on as many batches as are accumulated; returns what to log.

        Raises FloatingPointError, before any weight is changed, where a loss is no number.
        """
        config, accelerator = self.config, self.accelerator
        learning_rate = self.rate()
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = learning_rate * group["scale"]
        sums: dict[str, Tensor] = {}
        norm: Tensor | None = None
        for k, batch in enumerate(batches):
            batch = {
                key: value.to(self.device, non_blocking=True) if isinstance(value, Tensor) else value
                for key, value in batch.items()
            }
            seed = _seed(config.seed, self.step * len(batches) + k)
            generator = torch.Generator(self.device).manual_seed(seed)
            torch.manual_seed(seed + self.stage.rank)  # for modules that draw from the global generator (dropout)
            with accelerator.accumulate(self.learning), plain_attention(self.device):
                loss, logs = self.learning(batch, self.step, generator)
                self._check(loss, batch, logs.pop("each", None))
                parts = logs.pop("parts", {})
                if k == 0 and _due(config.gradients_every, self.step + 1, False, False):
                    logs |= self._gradients(parts)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norm = clip_gradients(accelerator, self.learning, self.optimisers, self.parameters, config.clip)
                step_optimisers(accelerator, self.optimisers)
            for key, value in {"loss": loss, **logs}.items():
                sums[key] = sums.get(key, 0.0) + value.detach() / len(batches)
        self.average.step(self.parameters)
        self.step += 1
        return sums | ({} if norm is None else {"norm": torch.as_tensor(norm).detach()})

    def _gradients(self, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        """The norm of each weighted loss's gradient on each module that learns."""
        found: dict[str, Tensor] = {}
        for name, value in parts.items():
            gradients = torch.autograd.grad(value, self.parameters, retain_graph=True, allow_unused=True)
            squares: dict[str, list[Tensor]] = defaultdict(list)
            for parameter, gradient in zip(self.names, gradients, strict=True):
                if gradient is not None:
                    squares[parameter.partition(".")[0]].append(gradient.float().square().sum())
            found |= {f"grad_{name}_{module}": torch.stack(some).sum().sqrt() for module, some in squares.items()}
        return found

    def _check(self, loss: Tensor, batch: Batch, each: Tensor | None) -> None:
        """Raises FloatingPointError in all processes where the loss of one is no number."""
        fault = first_fault(self.accelerator, loss, batch.get("keys", []), each)
        if fault is not None:
            value, keys = fault
            samples = f" (samples {', '.join(keys)})" if keys else ""
            raise FloatingPointError(
                f"the loss is {value} at step {self.step + 1}{samples}: nothing was overwritten; look at these "
                f"samples, or lower the learning rate ({self.config.lr}), and start again from the last checkpoint"
            )

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Within it the modules hold the EMA weights."""
        self.average.store(self.parameters)
        self.average.copy_to(self.parameters)
        try:
            yield
        finally:
            self.average.restore(self.parameters)

    def _autocast(self) -> torch.autocast:
        dtype = PRECISIONS[self.config.precision]
        return torch.autocast(self.device.type, dtype or torch.bfloat16, enabled=dtype is not None)

    # ---- what it leaves behind -----------------------------------------------------------------------------

    def log(self, means: dict[str, float], speed: float) -> None:
        if not self.accelerator.is_main_process:
            return
        share = self.share
        eta = self.spent / share - self.spent if share > 0 else math.nan
        line = {"step": self.step, "minutes": self.spent / 60, "lr": self.rate()}
        self._append(line | means | {"steps_per_second": speed})
        self.accelerator.log(means | {"lr": line["lr"], "steps_per_second": speed}, step=self.step)
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
        # with FSDP one process cannot run a module alone
        if self.accelerator.is_main_process and self.accelerator.distributed_type != DistributedType.FSDP:
            with self.averaged(), self._autocast(), plain_attention(self.device):
                for module in self.modules.values():
                    module.eval()
                figures = self.stage.sample_sheet(self.config.out / "sheet.png")
                for module in self.modules.values():
                    module.train()
            if figures:
                self._append({"step": self.step, "minutes": self.spent / 60} | figures)
                self.accelerator.log(figures, step=self.step)
                print("  ".join(f"{key} {value:.4g}" for key, value in figures.items()), file=sys.stderr, flush=True)
        self.accelerator.wait_for_everyone()

    def checkpoint(self) -> Path:
        """Write `checkpoint-<step>`: see `write_checkpoint`."""
        return write_checkpoint(self)

    def weights(self) -> dict[str, Tensor]:
        """All parameters and buffers of the modules, named `module.parameter`, copied to the CPU; whole in the main
        process."""
        state = self.accelerator.get_state_dict(self.learning)
        return {
            name.removeprefix("parts."): value.detach().to("cpu", copy=True).contiguous()
            for name, value in state.items()
        }


def one_thread(device: torch.device, precision: str) -> None:
    """Take one thread where bfloat16 is trained on a CPU.

    With two, oneDNN's backward passes of small convolutions write past their workspace in torch 2.13 ("free(): invalid
    next size"); oneDNN's issue 6035 reports one such case. Several processes share a CPU as well as threads do.
    """
    if device.type == "cpu" and precision == "bf16" and torch.get_num_threads() > 1:
        torch.set_num_threads(1)


def plain_attention(device: torch.device) -> contextlib.AbstractContextManager:
    """On a CPU the flash kernel's backward pass takes ten times as long as plain products for sequences this short."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else contextlib.nullcontext()


def _due(every: int | None, step: int, by_time: bool, ends: bool) -> bool:
    """Whether something that happens every so many steps, or every so many minutes, happens now; it does at the end."""
    if every is None:
        return by_time or ends
    return every > 0 and (step % every == 0 or ends)


def _seed(seed: int, step: int) -> int:
    """A seed for one step, unlike those of its neighbours."""
    return int(np.random.SeedSequence((seed, step, 1)).generate_state(1, np.uint64)[0] >> 1)

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
import dataclasses
import itertools
import json
import math
import queue
import shutil
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

Batch = dict[str, Any]
OPTIMISERS = ("adamw", "muon", "adamw8bit")
SCHEDULES = ("cosine", "linear", "constant")
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
        """The next batch, by `rng` alone. Called in a background thread, on the CPU."""
        raise NotImplementedError

    def loss(self, batch: Batch, step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and what else to log, under autocast. All noise comes from `generator`.

        With several processes the generator is the same in all of them: what shall differ takes `rank` into account.
        `each` among what to log, the losses of the samples (B,), is not logged: where one is no number it tells
        which of the batch's `keys` to name.
        """
        raise NotImplementedError

    def stream(self, position: int, seed: int) -> Generator[Batch]:
        """The batches of this process from number `position` on: `batch`, called in a thread, one after the other."""
        ready: queue.Queue[Batch | BaseException] = queue.Queue(maxsize=3)
        stop = threading.Event()
        own = (self.rank,) if self.world > 1 else ()

        def put(item: Batch | BaseException) -> None:
            while not stop.is_set():
                with contextlib.suppress(queue.Full):
                    return ready.put(item, timeout=0.2)

        def prepare(position: int) -> None:
            try:
                while not stop.is_set():
                    put(self.batch(np.random.default_rng((seed, position, *own))))
                    position += 1
            except BaseException as error:  # raised again where the batch is asked for
                put(error)

        thread = threading.Thread(target=prepare, args=(position,), daemon=True)
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


def rate(config: TrainerConfig, step: int, share: float) -> float:
    """The learning rate: linear warm-up by steps, then flat, then a cosine (or a line) over the rest of the run.

    `share` in [0, 1] is how much of the run is spent.
    """
    warm = min(1.0, (step + 1) / max(config.warmup, 1))
    fall = min(max(0.0, share - config.hold) / max(1 - config.hold, 1e-9), 1.0)
    height = {"cosine": 0.5 + 0.5 * math.cos(math.pi * fall), "linear": 1 - fall, "constant": 1.0}[config.schedule]
    return config.lr * warm * (config.floor + (1 - config.floor) * height)


class Average:
    """The exponential moving average of some parameters, updated in place and all at once.

    The decay grows with the number of updates, (1 + n) / (10 + n) up to `decay`, so that the random start is
    forgotten soon.
    """

    def __init__(self, parameters: list[nn.Parameter], decay: float) -> None:
        self.parameters = parameters
        self.decay = decay
        self.updates = 0
        # in single precision: what a step adds is lost in the rounding of anything less
        self.values = [p.detach().float().clone() for p in parameters]

    @torch.no_grad()
    def update(self) -> None:
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.values, [p.detach().float() for p in self.parameters], 1 - decay)
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


class _Loss(nn.Module):
    """The stage's loss as one module's forward, which holds all that learns: what DDP, FSDP and DeepSpeed wrap."""

    def __init__(self, stage: Stage, modules: dict[str, nn.Module]) -> None:
        super().__init__()
        self.stage = stage
        self.parts = nn.ModuleDict(modules)

    def forward(self, batch: Batch, step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        return self.stage.loss(batch, step, generator)


class Trainer:
    """`accelerator`: made with the config's accumulation (`make_accelerator`) where None is given."""

    def __init__(self, stage: Stage, config: TrainerConfig, accelerator: Accelerator | None = None) -> None:
        self.stage = stage
        self.config = config
        self.accelerator = accelerator or make_accelerator(config)
        self.device = self.accelerator.device
        stage.rank, stage.world = self.accelerator.process_index, self.accelerator.num_processes
        if stage.world > 1 and (config.steps is None or config.checkpoint_every is None or config.sheet_every is None):
            raise ValueError("processes do not share a clock: give steps, checkpoint_every and sheet_every")
        # these two keep parts of the state in every process
        self.sharded = self.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
        self.modules = stage.modules()
        groups: dict[tuple[bool, float, float], list[nn.Parameter]] = defaultdict(list)
        rates = stage.rates()
        for module_name, module in self.modules.items():
            module.to(self.device)
            for parameter in module.parameters():
                if parameter.requires_grad:
                    is_matrix = config.optimiser == "muon" and _is_matrix(parameter)
                    decay = config.weight_decay if parameter.ndim >= 2 else 0.0
                    groups[is_matrix, rates.get(module_name, 1.0), decay].append(parameter)
        kinds = {True: Muon, False: _adamw(config.optimiser)}
        options: dict[bool, dict[str, Any]] = {True: {}, False: {"betas": config.betas}}
        optimisers = [
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
        self.learning, *self.optimisers = self.accelerator.prepare(_Loss(stage, self.modules), *optimisers)
        inner = self.accelerator.unwrap_model(self.learning, keep_torch_compile=False)
        named = [(name.removeprefix("parts."), p) for name, p in inner.named_parameters() if p.requires_grad]
        self.names = [name for name, _ in named]  # "module.parameter" of each parameter that learns
        self.parameters = [parameter for _, parameter in named]
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
        counts: dict[str, int] = defaultdict(int)  # not every step has every figure
        with contextlib.closing(self._batches()) as batches:
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
                    self._log({key: float(value) / counts[key] for key, value in sums.items()}, speed)
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
        learning_rate = rate(config, self.step, self.share)
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
            with accelerator.accumulate(self.learning):
                with self._autocast():
                    loss, logs = self.learning(batch, self.step, generator)
                self._check(loss, batch, logs.pop("each", None))
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norm = self._clip()
                self._step_optimisers()
            for key, value in {"loss": loss, **logs}.items():
                sums[key] = sums.get(key, 0.0) + value.detach() / len(batches)
        self.average.update()
        self.step += 1
        return sums | ({} if norm is None else {"norm": torch.as_tensor(norm).detach()})

    def _clip(self) -> Tensor | None:
        """The norm of the whole gradient, over all processes, which is brought down to the config's."""
        scaler, kind = self.accelerator.scaler, self.accelerator.distributed_type
        if kind == DistributedType.DEEPSPEED:  # it clips by itself
            return self.accelerator.clip_grad_norm_(self.parameters, self.config.clip)
        if scaler is not None:
            for optimiser in self.optimisers:
                scaler.unscale_(optimiser.optimizer)
        if kind == DistributedType.FSDP:  # each process holds a piece of it
            return self.learning.clip_grad_norm_(self.config.clip)
        return nn.utils.clip_grad_norm_(self.parameters, self.config.clip)

    def _step_optimisers(self) -> None:
        scaler = self.accelerator.scaler
        if scaler is None:
            for optimiser in self.optimisers:
                optimiser.step()
        elif self.accelerator.sync_gradients:
            # accelerate moves the scale on at each optimiser's step, and the next one would be unscaled twice
            for optimiser in self.optimisers:
                scaler.step(optimiser.optimizer)
            scaler.update()
        for optimiser in self.optimisers:
            optimiser.zero_grad()

    def _check(self, loss: Tensor, batch: Batch, each: Tensor | None) -> None:
        """Raises FloatingPointError in all processes where the loss of one is no number: none is left waiting."""
        fine = torch.isfinite(loss.detach())
        if self.stage.world > 1:
            fine = self.accelerator.reduce(fine.float()) == self.stage.world
        if fine:
            return
        told = [] if torch.isfinite(loss) else [(loss.item(), self._bad_samples(batch, each))]
        (value, samples), *_ = gather_object(told) if self.stage.world > 1 else told
        raise FloatingPointError(
            f"the loss is {value} at step {self.step + 1}{samples}: nothing was overwritten; look at these "
            f"samples, or lower the learning rate ({self.config.lr}), and start again from the last checkpoint"
        )

    @staticmethod
    def _bad_samples(batch: Batch, each: Tensor | None) -> str:
        keys = list(batch.get("keys", []))
        if each is not None and keys:
            bad = [key for key, good in zip(keys, torch.isfinite(each).tolist(), strict=True) if not good]
            keys = bad or keys
        return f" (samples {', '.join(map(str, keys))})" if keys else ""

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Within it the modules hold the EMA weights."""
        self.average.swap()
        try:
            yield
        finally:
            self.average.swap()

    def _autocast(self) -> torch.autocast:
        dtype = PRECISIONS[self.config.precision]
        return torch.autocast(self.device.type, dtype or torch.bfloat16, enabled=dtype is not None)

    def _batches(self) -> Generator[Batch]:
        """Batches from this step on."""
        return self.stage.stream(self.step * self.config.accumulate, self.config.seed)

    # ---- what it leaves behind -----------------------------------------------------------------------------

    def _log(self, means: dict[str, float], speed: float) -> None:
        if not self.accelerator.is_main_process:
            return
        share = self.share
        eta = self.spent / share - self.spent if share > 0 else math.nan
        line = {"step": self.step, "minutes": self.spent / 60, "lr": rate(self.config, self.step, share)}
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
            with self.averaged(), self._autocast():
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
        """Write `checkpoint-<step>`, whole or not at all, and delete all but the last `keep`.

        `weights.safetensors` are the weights, `average.safetensors` their EMA (both with all parameters and
        buffers of the modules, named `module.parameter`), `state.pt` the optimiser's state and the counters; with
        FSDP or DeepSpeed the former is in `sharded/`, as accelerate writes it.

        Raises OSError where it cannot be written (a full disk); the checkpoint before it is still there.
        """
        place = self.config.out / f"checkpoint-{self.step:08d}"
        draft = place.with_suffix(".tmp")
        main = self.accelerator.is_main_process
        if main:
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir()
        self.accelerator.wait_for_everyone()
        try:
            self._write(draft)
        except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have their own
            shutil.rmtree(draft, ignore_errors=True)
            raise OSError(
                f"the checkpoint of step {self.step} could not be written to {self.config.out} ({error}); the one "
                "before it is whole: make room on the disk and start again"
            ) from error
        self.accelerator.wait_for_everyone()
        if main:
            shutil.rmtree(place, ignore_errors=True)
            draft.rename(place)
            for old in self._checkpoints()[: -self.config.keep]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()
        return place

    def _write(self, draft: Path) -> None:
        main, rank = self.accelerator.is_main_process, self.stage.rank
        weights = self._weights()
        if main:
            save_file(weights, draft / "weights.safetensors")
        with self.averaged():
            weights = self._weights()
        if main:
            save_file(weights, draft / "average.safetensors")
        state: dict[str, Any] = {"step": self.step, "spent": self.spent, "updates": self.average.updates}
        if self.sharded:
            self.accelerator.save_state(str(draft / "sharded"))
            torch.save(self.average.values, draft / f"average-{rank}.pt")
        else:
            state["optimisers"] = [optimiser.state_dict() for optimiser in self.optimisers]
            if self.accelerator.scaler is not None:
                state["scaler"] = self.accelerator.scaler.state_dict()
        if main:
            torch.save(state, draft / "state.pt")

    def _weights(self) -> dict[str, Tensor]:
        state = self.accelerator.get_state_dict(self.learning)
        # copies: what is in the modules changes when the average goes out of them again
        return {
            name.removeprefix("parts."): value.detach().to("cpu", copy=True).contiguous()
            for name, value in state.items()
        }

    def _checkpoints(self) -> list[Path]:
        return sorted(p for p in self.config.out.glob("checkpoint-*") if p.suffix != ".tmp")

    def resume(self) -> bool:
        """Go back to the last whole checkpoint in the folder, if there is one. Called by the constructor.

        Raises ValueError where the checkpoint is of another architecture.
        """
        places = self._checkpoints()
        if not places:
            return False
        place = places[-1]
        state = torch.load(place / "state.pt", map_location="cpu", weights_only=True)
        if self.sharded:
            self.accelerator.load_state(str(place / "sharded"))
            averages = torch.load(place / f"average-{self.stage.rank}.pt", map_location="cpu", weights_only=True)
        else:
            weights, average = load_file(place / "weights.safetensors"), load_file(place / "average.safetensors")
            self._check_architecture(place, weights)
            for module_name, module in self.modules.items():
                own = f"{module_name}."
                module.load_state_dict({k.removeprefix(own): v for k, v in weights.items() if k.startswith(own)})
            averages = [average[name] for name in self.names]
            for optimiser, kept in zip(self.optimisers, state["optimisers"], strict=True):
                optimiser.load_state_dict(kept)
            if self.accelerator.scaler is not None and "scaler" in state:
                self.accelerator.scaler.load_state_dict(state["scaler"])
        for value, kept in zip(self.average.values, averages, strict=True):
            value.copy_(kept)
        self.step, self.spent, self.average.updates = state["step"], state["spent"], state["updates"]
        if self.accelerator.is_main_process:
            self._forget_log_after(self.step)
        return True

    def _check_architecture(self, place: Path, found: dict[str, Tensor]) -> None:
        wanted = {f"{n}.{k}": tuple(v.shape) for n, m in self.modules.items() for k, v in m.state_dict().items()}
        there = {name: tuple(value.shape) for name, value in found.items()}
        for name in sorted(wanted.keys() | there.keys()):
            if wanted.get(name) != there.get(name):
                raise ValueError(
                    f"{place} is a checkpoint of another architecture ({name} is {there.get(name, 'absent')} there, "
                    f"{wanted.get(name, 'absent')} here): give another folder for this run, or the model it was made of"
                )

    def _forget_log_after(self, step: int) -> None:
        """Steps that will be made again will be logged again."""
        if self.log_path.is_file():
            lines = self.log_path.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
            self.log_path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")


def make_accelerator(config: TrainerConfig, **options: Any) -> Accelerator:
    """An accelerator for a run: that of `accelerate launch`, or of this one process.

    bf16 is autocast by the trainer itself; accelerate keeps what needs a scaler (fp16), and what a DeepSpeed or FSDP
    configuration names.
    """
    accelerator = Accelerator(
        cpu=config.device == "cpu",
        mixed_precision="fp16" if config.precision == "fp16" else None,
        gradient_accumulation_steps=config.accumulate,
        # the gradients lie in the buckets they are sent in: once in memory, not twice
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
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


def write_whole(folder: Path, save: Callable[[Path], Any]) -> None:
    """Let `save` write a folder, and put it in the place of `folder` once it is whole."""
    draft = folder.with_suffix(".tmp")
    shutil.rmtree(draft, ignore_errors=True)
    save(draft)
    shutil.rmtree(folder, ignore_errors=True)
    draft.rename(folder)


def _adamw(name: str) -> Any:
    if name != "adamw8bit":
        return torch.optim.AdamW
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ValueError("optimiser adamw8bit needs the package bitsandbytes: install it, or choose adamw") from error
    return AdamW8bit


def _due(every: int | None, step: int, by_time: bool, ends: bool) -> bool:
    """Whether something that happens every so many steps, or every so many minutes, happens now; it does at the end."""
    if every is None:
        return by_time or ends
    return every > 0 and (step % every == 0 or ends)


def _seed(seed: int, step: int) -> int:
    """A seed for one step, unlike those of its neighbours."""
    return int(np.random.SeedSequence((seed, step, 1)).generate_state(1, np.uint64)[0] >> 1)

"""Where tasks run: in this process, in several, or on a Ray cluster. A task is a function of one job.

An engine gives executors (`concurrent.futures`), so the loop around them is one. Ray is optional: `pip install ray`.
"""

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from itertools import cycle, islice
from typing import Any, NamedTuple

from facesnap.errors import InputError

ENGINES = ("local", "ray")
# Shares of a GPU, on Ray: the large models have one to themselves but for the small nets of some other tasks.
SMALL, LARGE = 0.05, 0.6
ATTEMPTS = 3  # of a task whose worker dies


class Engine(NamedTuple):
    """Executors for tasks of small nets and of large ones, and how many tasks they run at a time, in all."""

    many: Executor
    few: Executor
    slots: int


@contextmanager
def start(name: str, workers: int, *, device: str = "cpu", small_on_gpu: bool = False) -> Iterator[Engine]:
    """An engine for as long as it is needed.

    Args:
        name: one of `ENGINES`. "ray" joins the cluster at RAY_ADDRESS, else it starts one on this machine.
        workers: processes, or CPUs of a cluster of this machine's own.
        device: of the large models: one process to a GPU, or to a machine where it is "cpu".
        small_on_gpu: the small nets want a GPU too (matters on Ray, which gives none unasked).

    Raises:
        InputError: Ray is not installed, or there is no cluster at RAY_ADDRESS.
    """
    with _ray(workers, device, small_on_gpu) if name == "ray" else _local(workers, device) as engine:
        yield engine


def run(steps: Iterable[tuple[Executor, Callable[[Any], None]]], jobs: Iterable[Any], slots: int) -> Iterator[Any]:
    """Each job goes through all steps, one after the other; yields the jobs that are through, as they come.

    Only a few more than `slots` are under way, so a slow last step holds the first one back. What a task raises is
    raised here; a worker that died is an InputError that names the jobs it may have died of.
    """
    steps, jobs = list(steps), iter(jobs)
    waiting: dict[Future[None], tuple[Any, int]] = {}

    def submit(job: Any, step: int) -> None:
        executor, task = steps[step]
        waiting[executor.submit(task, job)] = job, step

    for job in islice(jobs, 2 * slots):
        submit(job, 0)
    while waiting:
        for future in wait(waiting, return_when=FIRST_COMPLETED).done:
            job, step = waiting[future]
            try:
                future.result()
            except Exception as error:
                under_way = sorted(job.number for job, _ in waiting.values())
                raise _explained(error, under_way) from error
            del waiting[future]
            if step + 1 < len(steps):
                submit(job, step + 1)
            else:
                yield job
                for more in islice(jobs, 1):
                    submit(more, 0)


def _explained(error: Exception, under_way: list[int]) -> Exception:
    cause = getattr(error, "cause", None)  # Ray wraps what a task raised
    if isinstance(cause, Exception):
        return cause
    if isinstance(error, BrokenExecutor) or type(error).__module__.startswith("ray."):
        jobs = ", ".join(map(str, under_way))
        return InputError(
            f"a worker died over parts {jobs} (killed, out of memory, or its machine is gone): what is done is kept; "
            "give the same command again, with fewer --workers if memory is short"
        )
    return error


# ---- this machine ----------------------------------------------------------------------------------------------


class Here(Executor):
    """This process: a task is done when it is submitted."""

    def submit(self, task: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future:
        future: Future = Future()
        try:
            future.set_result(task(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


@contextmanager
def _local(workers: int, device: str) -> Iterator[Engine]:
    if workers == 1:
        yield Engine(Here(), Here(), 1)
        return
    spawn = multiprocessing.get_context("spawn")
    cards = 1
    if device == "cuda":
        import torch

        cards = max(1, torch.cuda.device_count())
    many = ProcessPoolExecutor(workers, spawn, _follow_parent)
    few = ProcessPoolExecutor(cards, spawn, _take_card, (device,))
    try:
        yield Engine(many, few, workers + cards)
    finally:
        for pool in (many, few):
            pool.shutdown(cancel_futures=True)


def _follow_parent() -> None:
    """If the parent is killed, nobody else would end us."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _take_card(device: str) -> None:
    _follow_parent()
    if device == "cuda":
        import torch

        torch.cuda.set_device(multiprocessing.current_process()._identity[-1] % torch.cuda.device_count())


# ---- a cluster -------------------------------------------------------------------------------------------------


class _Tasks(Executor):
    """Ray tasks. A worker process is used again, so that the nets it has loaded stay (`lru_cache`)."""

    def __init__(self, ray: Any, cpus: float, gpus: float) -> None:
        self.remote = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=ATTEMPTS, max_calls=0)
        self.known: dict[Callable[..., Any], Any] = {}  # Ray sends a function to its workers each time it is wrapped

    def submit(self, task: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future:
        if task not in self.known:
            self.known[task] = self.remote(task)
        return self.known[task].remote(*args, **kwargs).future()


class _Run:
    def task(self, task: Callable[..., Any], *args: Any) -> Any:
        return task(*args)


class _Actors(Executor):
    """Ray actors, a process each for as long as the engine lives: tasks would run in whichever process is idle, and in
    time the large models would be loaded in many of them. They begin with the first task."""

    def __init__(self, ray: Any, count: int, gpus: float) -> None:
        # no CPU is kept for them: on a cluster of one they would keep it from all other tasks
        options = {"num_cpus": 0, "num_gpus": gpus, "max_restarts": ATTEMPTS, "max_task_retries": ATTEMPTS}
        self.make, self.count = ray.remote(scheduling_strategy="SPREAD", **options)(_Run), count
        self.turn: Iterator[Any] | None = None

    def submit(self, task: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future:
        if self.turn is None:
            self.turn = cycle([self.make.remote() for _ in range(self.count)])
        return next(self.turn).task.remote(task, *args).future()


@contextmanager
def _ray(workers: int, device: str, small_on_gpu: bool) -> Iterator[Engine]:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise InputError("--engine ray needs the package ray: pip install ray, on every machine") from error
    address = os.environ.get("RAY_ADDRESS")
    own: dict[str, Any] = {} if address else {"num_cpus": workers, "include_dashboard": False}
    try:
        ray.init(address or "local", log_to_driver=False, logging_level="ERROR", **own)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise InputError(f"there is no Ray cluster at RAY_ADDRESS={address!r} ({error})") from error
    try:
        has = ray.cluster_resources()
        if device == "cuda" and not has.get("GPU"):
            raise InputError("--device cuda needs a GPU in the Ray cluster, and it has none: give --device cpu")
        many = _Tasks(ray, 1, SMALL if small_on_gpu else 0)
        machines = sum(node["Alive"] for node in ray.nodes())
        few = _Actors(ray, int(has["GPU"]), LARGE) if device == "cuda" else _Actors(ray, machines, 0)
        yield Engine(many, few, int(has.get("CPU", 1)))
    finally:
        ray.shutdown()

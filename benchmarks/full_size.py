"""FaceSnap at SDXL's full size, executed on a CPU: what counting cannot show.

    python benchmarks/full_size.py --folder WORK --out benchmarks/results/full-size.json       # 24 GB, 14 GB of disk

Phases, each in a process of its own, so that its peak of memory is its own; one that the report holds already is left
out, so a run that was stopped goes on.

    build      a FaceSnap folder of SDXL's size with random weights in bfloat16: UNet, FFRNet, both text encoders,
               ViT-H, VAE and mixer, in shards of 2 GB; the mini's face pack and head model. Part by part: never more
               than the largest in memory
    portrait   `FaceSnapPipeline.from_pretrained`, then one portrait of 1024² in two guided steps, from a photograph
    instantid  the same in InstantID's form (`InstantIDPipeline`); the folder shares the base by links
    train      one step of mixer and FFRNet at 512², as `facesnap.training.train` makes it: `learn=light`, since of all
               weights the gradients, averages and AdamW's moments alone would take 22 GB

The weights are random, so the pictures show nothing; a part that gives anything but finite numbers fails its phase.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from diffusers import ControlNetModel, DPMSolverMultistepScheduler
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # so that the file runs as it is, installed or not

from benchmarks import random_models  # noqa: E402
from benchmarks.training import batches  # noqa: E402
from facesnap.face_adapter import HEAD_WIDTH, FaceAdapter  # noqa: E402
from facesnap.ffrnet import FFRNet  # noqa: E402
from facesnap.folder import SETTINGS_NAME, Settings  # noqa: E402
from facesnap.instantid import InstantIDPipeline  # noqa: E402
from facesnap.mini.nets.tokenizer import train_tokenizer  # noqa: E402
from facesnap.mixer import FacialAttributeMixer  # noqa: E402
from facesnap.pipeline import FaceSnapPipeline  # noqa: E402
from facesnap.provenance import commit, machine  # noqa: E402

MINI, PHOTO = ROOT / "assets" / "mini", ROOT / "assets" / "examples" / "avery.png"
STEPS, GUIDANCE = 2, 2.0
BF16 = torch.bfloat16
# The mini stands in where a net of SDXL's size would read photographs: its pack and its head model
READERS = ("face_pack", "head")
SHARED = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler", *READERS)


# ------------------------------------------------------------------------------------------------ what is told


class Told:
    """Seconds by the wall and of the processor, calls, and the process's memory, by part."""

    def __init__(self) -> None:
        self.parts: dict[str, dict[str, float]] = defaultdict(lambda: {"calls": 0, "seconds": 0.0, "cpu_seconds": 0.0})
        self.own = 0  # the most bytes of memory that are no file's
        self.ended = threading.Event()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        told = self.parts[name]
        told["calls"] += 1
        told["seconds"] = round(told["seconds"] + time.perf_counter() - wall, 2)
        told["cpu_seconds"] = round(told["cpu_seconds"] + time.process_time() - cpu, 2)
        print(f"  {name}: {told['seconds']} s", file=sys.stderr, flush=True)

    def watch(self, pipe: Any, names: tuple[str, ...]) -> None:
        """Each call of these parts counts, and must give finite numbers."""
        for name in names:
            part = getattr(pipe, name)
            method = "decode" if name == "vae" else "forward"
            setattr(part, method, self._counted(name, getattr(part, method)))

    def _counted(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                out = call(*args, **kwargs)
            first = next(x for x in flat(out) if isinstance(x, torch.Tensor))
            if not torch.isfinite(first).all():
                raise FloatingPointError(f"{name} gave numbers that are not finite")
            return out

        return counted

    @contextmanager
    def memory(self) -> Iterator[None]:
        """Watches what this process holds beside the pages of files, five times a second."""
        process = psutil.Process()

        def look() -> None:
            while not self.ended.wait(0.2):
                held = process.memory_info()
                self.own = max(self.own, held.rss - held.shared)

        thread = threading.Thread(target=look, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self.ended.set()
            thread.join()

    def whole(self) -> dict[str, Any]:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        gb = {"peak_resident_gb": round(peak / 1e9, 2), "peak_without_files_gb": round(self.own / 1e9, 2)}
        return gb | {"parts": dict(self.parts)}


def flat(out: Any) -> Iterator[Any]:
    """The tensors of an output, whatever holds them."""
    if isinstance(out, torch.Tensor):
        yield out
    elif isinstance(out, dict):
        for value in out.values():
            yield from flat(value)
    elif isinstance(out, tuple | list):
        for value in out:
            yield from flat(value)
    elif hasattr(out, "__dict__"):
        yield from flat(vars(out))


# ------------------------------------------------------------------------------------------------ the folders


def parts_of(size: random_models.Size, eos: int) -> dict[str, Callable[[], nn.Module]]:
    """How each part is made; FFRNet and InstantID's ControlNet as the UNet's shape says."""

    def ffrnet(kind: Any) -> nn.Module:
        with torch.device("meta"):
            unet = random_models.make_unet(size)
        return kind.from_unet(unet, load_weights_from_unet=False)

    def adapter() -> nn.Module:
        with torch.device("meta"):
            unet = random_models.make_unet(size)
        places = [name for name in unet.attn_processors if "attn2" in name]
        hidden = tuple(unet.get_submodule(p.removesuffix(".processor")).to_q.out_features for p in places)
        heads = size.mixer // HEAD_WIDTH
        return FaceAdapter(width=size.mixer, heads=heads, token_dim=sum(size.text), hidden_sizes=hidden)

    return {
        "unet": lambda: random_models.make_unet(size),
        "vae": lambda: random_models.make_vae(size),
        "text_encoder": lambda: random_models.make_text_encoder(size, 0, eos),
        "text_encoder_2": lambda: random_models.make_text_encoder(size, 1, eos),
        "face_encoder": lambda: random_models.make_face_encoder(size),
        "ffrnet": lambda: ffrnet(FFRNet),
        "mixer": lambda: FacialAttributeMixer(
            clip_dim=size.face, width=size.mixer, heads=size.mixer // 64, num_tokens=random_models.TOKENS,
            token_dim=sum(size.text), pooled_dim=size.text[1],
        ),
        "instantid/ffrnet": lambda: ffrnet(ControlNetModel),
        "instantid/mixer": adapter,
    }  # fmt: skip


def build(folder: Path, size: random_models.Size, told: Told) -> dict[str, Any]:
    """`folder/facesnap` and `folder/instantid`, whose base is the former's by links."""
    ours, theirs = folder / "facesnap", folder / "instantid"
    for place in (ours, theirs):
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
    tokenizer = train_tokenizer([random_models.PROMPT])
    tokenizer.model_max_length = 77
    sizes = {}
    torch.manual_seed(0)
    for name, make in parts_of(size, tokenizer.eos_token_id).items():
        place = theirs / name.removeprefix("instantid/") if name.startswith("instantid/") else ours / name
        with told.part(name):
            with random_models.default_dtype(BF16):  # never at float32 first, which would be twice the memory
                made = make()
            made.save_pretrained(place, max_shard_size="2GB")
        sizes[name] = round(sum(file.stat().st_size for file in place.iterdir()) / 1e9, 3)
        del made
    for name in ("tokenizer", "tokenizer_2"):
        tokenizer.save_pretrained(ours / name)
    DPMSolverMultistepScheduler(beta_schedule="scaled_linear").save_pretrained(ours / "scheduler")
    for name in READERS:
        shutil.copytree(MINI / name, ours / name)
    shutil.copyfile(MINI / "model_index.json", ours / "model_index.json")  # the stock pipeline's classes
    index = json.loads((ours / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "DPMSolverMultistepScheduler"]
    (ours / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    settings = Settings(name="random weights", size=size.side, steps=STEPS, guidance=GUIDANCE)
    (ours / SETTINGS_NAME).write_text(json.dumps(asdict(settings)) + "\n")
    for name in SHARED:
        (theirs / name).symlink_to(ours.resolve() / name)
    shutil.copyfile(ours / "model_index.json", theirs / "model_index.json")
    settings = replace(settings, kind="instantid")
    (theirs / SETTINGS_NAME).write_text(json.dumps(asdict(settings)) + "\n")
    return {"gb_on_disk": sizes, "gb_of_facesnap": round(sum(v for k, v in sizes.items() if "/" not in k), 2)}


# ------------------------------------------------------------------------------------------------ the phases


def portrait(folder: Path, size: random_models.Size, told: Told) -> dict[str, Any]:
    return picture(FaceSnapPipeline, folder / "facesnap", size, told, ("face_encoder", "mixer"))


def instantid(folder: Path, size: random_models.Size, told: Told) -> dict[str, Any]:
    return picture(InstantIDPipeline, folder / "instantid", size, told, ("mixer",))


def picture(
    kind: type[FaceSnapPipeline], folder: Path, size: random_models.Size, told: Told, readers: tuple[str, ...]
) -> dict[str, Any]:
    """One portrait by the path that a visitor's photo takes."""
    with told.part("load"):
        pipe = kind.from_pretrained(folder, dtype=BF16)
    pipe.set_progress_bar_config(disable=True)
    told.watch(pipe, ("text_encoder", "text_encoder_2", *readers, "unet", "ffrnet", "vae"))
    with told.part("whole portrait"):
        made = pipe(random_models.PROMPT, reference=PHOTO, seed=0, score=False)
    pixels = np.asarray(made.images[0])
    if pixels.shape != (size.side, size.side, 3) or pixels.std() == 0:
        raise ValueError(f"the portrait is {pixels.shape} with a deviation of {pixels.std()}: no picture")
    return {"size": made.size, "steps": made.steps, "guidance": made.guidance, "mean": round(float(pixels.mean()), 1)}


def train(folder: Path, size: random_models.Size, told: Told) -> dict[str, Any]:
    """A step of the trainer, and the loss that it gave."""
    from facesnap.training.processes import make_accelerator
    from facesnap.training.train import TrainConfig, make_stage
    from facesnap.training.trainer import Trainer

    side = size.side // 2
    run = folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    config = TrainConfig(
        str(folder / "facesnap"), "none", str(run), learn="light", steps=1, device="cpu", base_precision="bf16"
    )
    settings = config.trainer()
    accelerator = make_accelerator(settings)
    with told.part("load"):
        stage = make_stage(config, lambda *_: (), accelerator.device)
        trainer = Trainer(stage, settings, accelerator)
    told.watch(stage.pipe, ("text_encoder", "text_encoder_2", "face_encoder"))
    # FFRNet's outputs begin at zero, so at the first step they alone are moved
    outputs = [p for n, p in zip(trainer.names, trainer.parameters, strict=True) if "controlnet_mid_block" in n]
    with told.part("whole step"):
        logs = trainer.update(next(batches(side, 1)))
    if not all(p.detach().any() for p in outputs):
        raise ValueError("the step left FFRNet's outputs at zero")
    learning = sum(p.numel() for p in trainer.parameters)
    return {"size": side, "learn": config.learn, "weights_that_learn": learning, "loss": float(logs["loss"])}


PHASES = {"build": build, "portrait": portrait, "instantid": instantid, "train": train}


# ------------------------------------------------------------------------------------------------ the command


def phase(name: str, folder: Path, size: str) -> dict[str, Any]:
    """One phase in this process: what it says of itself, seconds by part and memory."""
    told = Told()
    with told.memory():
        found = PHASES[name](folder, random_models.SIZES[size], told)
    return found | told.whole()


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the models are built; not deleted")
    parser.add_argument("--out", type=Path, required=True, help="the report, JSON")
    parser.add_argument("--size", choices=random_models.SIZES, default="sdxl")
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=list(PHASES))
    parser.add_argument("--machine", help="how the report calls this machine, instead of what it says of itself")
    parser.add_argument("--here", choices=PHASES, help=argparse.SUPPRESS)  # one phase, for the parent to read
    args = parser.parse_args(words)
    if args.here:
        print(json.dumps(phase(args.here, args.folder, args.size)))
        return
    found: dict[str, Any] = json.loads(args.out.read_text()) if args.out.is_file() else {"phases": {}}
    found |= {"command": " ".join(["python benchmarks/full_size.py", *(words or sys.argv[1:])])}
    found |= {"commit": commit(), "machine": args.machine or machine(), "size": args.size}
    found |= {"torch": torch.__version__, "threads": torch.get_num_threads()}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for name in args.phases:
        if name in found["phases"]:
            continue
        print(name, file=sys.stderr, flush=True)
        own = [sys.executable, __file__, "--folder", args.folder, "--out", args.out, "--size", args.size]
        done = subprocess.run([*map(str, own), "--here", name], stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise SystemExit(f"the phase {name} ended with {done.returncode} (-9: out of memory); others are kept")
        found["phases"][name] = json.loads(done.stdout.strip().splitlines()[-1])
        args.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()

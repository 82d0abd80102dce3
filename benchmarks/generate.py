"""What a portrait costs, beside plain SDXL and beside the other ways to put a face into it. Nothing is downloaded.

    python benchmarks/generate.py --flops                         # counted on meta tensors: any machine, no weights
    python benchmarks/generate.py --size small                    # the same code timed, a few minutes on a CPU
    python benchmarks/generate.py --device cuda --modes full balanced low          # 1024², fp16, seconds and memory

The weights are random, from SDXL's configurations below, since neither seconds nor operations depend on them. A
row is one portrait as the pipeline makes it, from the prompt's text and an analysed face to the decoded picture, in
8 steps at guidance 2. Rows take turns, so that whatever else the machine does meets all of them; seconds are
medians after one turn to warm up, ratios the medians of each turn's own. On a CPU the seconds are also given as
processor time, which other programs disturb least.

    plain SDXL            no face at all
    InstantID's form      a ControlNet that reads the prompt's pooled text, so it runs on both halves of guidance, and
                          decoupled (IP-Adapter) attention to 16 face tokens in the UNet; its small resampler left out
    the paper's form      FFRNet without text, but run on both halves
    FaceSnap, best, fast  ours: FFRNet in the conditional half only; the presets of facesnap/speed.py

Peak memory is of the GPU, the weights of all parts of FaceSnap included, in every row.
The VAE decodes in the dtype of everything else: at float16 that stands for the VAE that was fixed for it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from diffusers.models.embeddings import MultiIPAdapterImageProjection
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that the file runs as it is, installed or not

from benchmarks.random_models import PROMPT, SIZES, TOKENS, Size, make_pipeline, weights_gb  # noqa: E402
from facesnap import landmarks, provenance  # noqa: E402
from facesnap.evaluation import report  # noqa: E402
from facesnap.faces import Face  # noqa: E402
from facesnap.ffrnet import attach  # noqa: E402
from facesnap.folder import BASE_PARTS  # noqa: E402
from facesnap.pipeline import FaceSnapPipeline  # noqa: E402
from facesnap.results import PreviewResult  # noqa: E402

STEPS, GUIDANCE = 8, 2.0
PLAIN, INSTANTID, PAPER = "plain SDXL", "InstantID's form", "the paper's form"
PRESETS = ("best", "fast")
LIBRARIES = ("torch", "diffusers", "transformers")


# ---------------------------------------------------------------------- the rows


def a_face() -> Face:
    rng = np.random.default_rng(0)
    return Face(
        box=np.array([60, 60, 160, 160], np.float32),
        score=1.0,
        keypoints=np.zeros((5, 2), np.float32),
        landmarks=np.zeros((68, 3), np.float32),
        embedding=rng.standard_normal(512).astype(np.float32),
        crop=rng.integers(0, 255, (224, 224, 3), dtype=np.uint8),
        size=(224, 224),
        count=1,
        found_by="detector",
    )


class Portraits:
    """One method a row; each makes one picture."""

    def __init__(self, pipe: FaceSnapPipeline, side: int):
        self.pipe, self.side = pipe, side
        self.stock = StableDiffusionXLPipeline(**{n: getattr(pipe, n) for n in BASE_PARTS}, add_watermarker=False)
        self.stock.set_progress_bar_config(disable=True)
        points = np.random.default_rng(0).uniform(0.2, 0.8, (landmarks.NUM, 2)).astype(np.float32) * side
        drawing = landmarks.draw(points, (side, side))
        self.preview = PreviewResult(points, drawing, (a_face(),), None, ())
        self.arguments: dict[str, Any] = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "output_type": "pt"}

    @property
    def device(self) -> torch.device:
        return self.pipe._execution_device

    def control(self, dtype: torch.dtype) -> Tensor:
        return torch.from_numpy(self.preview.drawing).permute(2, 0, 1)[None].to(self.device, dtype) / 255

    def noise(self) -> Tensor:
        """The first latents; given, so that no generator is asked on a device that has none."""
        return torch.zeros(1, 4, self.side // 8, self.side // 8, dtype=self.pipe.unet.dtype, device=self.device)

    def plain(self, **more: Any) -> None:
        size = {"height": self.side, "width": self.side}
        self.stock(PROMPT, latents=self.noise(), **size, **self.arguments, **more)

    def instantid(self) -> None:
        with torch.no_grad():
            mixed = self.pipe.mix(self.preview.reference_faces)  # in place of its resampler
        both = torch.cat([mixed.tokens, mixed.tokens])
        unet = self.pipe.unet
        with (
            decoupled_attention(unet),
            controlnet_on_both_halves(unet, self.pipe.ffrnet, both, self.control(both.dtype)),
        ):
            self.plain(ip_adapter_image_embeds=[both[:, None]])

    def paper(self) -> None:
        with torch.no_grad():
            mixed = self.pipe.mix(self.preview.reference_faces)
        faces = {"tokens": mixed.tokens, "pooled": mixed.pooled, "control": self.control(mixed.tokens.dtype)}
        both = {name: torch.cat([x, x]) for name, x in faces.items()}
        with attach(self.pipe.unet, self.pipe.ffrnet, **both):  # two rows, as if of two pictures
            self.plain()

    def facesnap(self, preset: str) -> None:
        self.pipe(
            PROMPT, preview=self.preview, preset=preset, score=False, latents=self.noise(),
            height=self.side, width=self.side, **self.arguments,
        )  # fmt: skip

    def rows(self) -> dict[str, Callable[[], None]]:
        ours = {f"FaceSnap, {preset}": lambda preset=preset: self.facesnap(preset) for preset in PRESETS}
        return {PLAIN: self.plain, INSTANTID: self.instantid, PAPER: self.paper} | ours


@contextmanager
def decoupled_attention(unet: UNet2DConditionModel) -> Iterator[None]:
    """IP-Adapter's processors in the UNet's cross-attentions, for ready tokens."""
    before, processors = unet.attn_processors, {}
    for name, processor in before.items():
        if "attn2" not in name:
            processors[name] = processor
            continue
        hidden = unet.get_submodule(name.removesuffix(".processor")).to_q.out_features
        with torch.device(unet.device):
            new = IPAdapterAttnProcessor2_0(hidden, unet.config.cross_attention_dim, num_tokens=(TOKENS,))
        processors[name] = new.to(unet.dtype)
    unet.set_attn_processor(processors)
    unet.encoder_hid_proj = MultiIPAdapterImageProjection([nn.Identity()])
    unet.config.encoder_hid_dim_type = "ip_image_proj"
    try:
        yield
    finally:
        unet.set_attn_processor(dict(before))
        unet.encoder_hid_proj = None
        unet.config.encoder_hid_dim_type = None


@contextmanager
def controlnet_on_both_halves(
    unet: nn.Module, controlnet: ControlNetModel, tokens: Tensor, control: Tensor
) -> Iterator[None]:
    """A ControlNet that reads face tokens in its attention and, in its pooled text, the prompt."""

    def pre_hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        down, mid = controlnet(
            *args, tokens, control.expand(len(tokens), -1, -1, -1),
            added_cond_kwargs=kwargs["added_cond_kwargs"], return_dict=False,
        )  # fmt: skip
        residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        return args, kwargs | residuals

    handle = unet.register_forward_pre_hook(pre_hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


# ---------------------------------------------------------------------- what a row costs


def count(size: Size) -> tuple[dict[str, float], dict[str, float]]:
    """({row: TFLOP}, weights in GB at float16), from the very calls that are timed, on meta tensors."""
    pipe = make_pipeline(size, "meta", torch.float16)
    found, counter = {}, FlopCounterMode(display=False)
    with repeats_remembered(pipe, counter) as repeated:
        for name, run in Portraits(pipe, size.side).rows().items():
            repeated.clear()
            with counter:
                run()
            found[name] = (counter.get_total_flops() + sum(repeated)) / 1e12
    return found, weights_gb(pipe)


@contextmanager
def repeats_remembered(pipe: FaceSnapPipeline, counter: FlopCounterMode) -> Iterator[list[int]]:
    """Runs every block once for each set of shapes, which saves nine tenths of the time that counting takes.

    A call with shapes that the block had before is answered with the (meta) tensors that it gave then, and the
    operations of that first call are appended to the list.
    """
    repeated: list[int] = []
    halves = [*pipe.unet.down_blocks, pipe.unet.mid_block, *pipe.unet.up_blocks]
    halves += [*pipe.ffrnet.down_blocks, pipe.ffrnet.mid_block]
    blocks = [*halves, pipe.vae.decoder, pipe.text_encoder, pipe.text_encoder_2, pipe.face_encoder]

    def remembering(forward: Callable) -> Callable:
        seen: dict[str, tuple[Any, int]] = {}

        def answer(*args: Any, **kwargs: Any) -> Any:
            shapes = repr(tree_map(lambda x: tuple(x.shape) if isinstance(x, Tensor) else x, (args, kwargs)))
            if shapes in seen:
                repeated.append(seen[shapes][1])
                return seen[shapes][0]
            before = counter.get_total_flops()
            output = forward(*args, **kwargs)
            seen[shapes] = output, counter.get_total_flops() - before
            return output

        return answer

    for block in blocks:
        block.forward = remembering(block.forward)
    try:
        yield repeated
    finally:
        for block in blocks:
            del block.forward


def measure(
    size: Size, device: str, dtype: torch.dtype, mode: str, turns: int, compiled: bool
) -> Iterator[tuple[str, dict[str, list[float]]]]:
    """(row, {"seconds", "cpu_seconds", "peak_gb"}: one value a turn), all rows of one memory mode."""
    cuda = device.startswith("cuda")
    pipe = make_pipeline(size, device if mode == "full" else "cpu", dtype)
    if mode != "full":
        if not hasattr(pipe, "set_memory"):
            raise SystemExit(f"this FaceSnap has no memory mode {mode!r}; leave out --modes")
        pipe.set_memory(mode)
    if compiled:
        pipe.compile()
    rows = Portraits(pipe, size.side).rows()
    if mode != "full":  # the others are measured all resident only
        rows = {name: run for name, run in rows.items() if name.startswith("FaceSnap")}
    found: dict[str, dict[str, list[float]]] = {n: {"seconds": [], "cpu_seconds": [], "peak_gb": []} for n in rows}
    for turn in range(-1, turns):
        for name, run in rows.items():
            if cuda:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            started, cpu_started = time.perf_counter(), time.process_time()
            run()
            if cuda:
                torch.cuda.synchronize()
            taken = time.perf_counter() - started, time.process_time() - cpu_started
            print(f"turn {turn + 1} of {turns}  {name:<18} {taken[0]:8.2f} s", file=sys.stderr, flush=True)
            if turn >= 0:
                found[name]["seconds"].append(taken[0])
                found[name]["cpu_seconds"].append(taken[1])
                if cuda:
                    found[name]["peak_gb"].append(torch.cuda.max_memory_allocated() / 1e9)
    yield from found.items()


def timed_rows(arguments: argparse.Namespace, size: Size, dtype: torch.dtype) -> list[dict]:
    """Every row in every memory mode, with medians and the ratios to plain SDXL all resident."""
    rows: list[dict] = []
    baseline: dict[str, list[float]] = {}
    for mode in arguments.modes:
        for name, taken in measure(size, arguments.device, dtype, mode, arguments.turns, arguments.compile):
            baseline = baseline or taken  # the first of all is plain SDXL
            row: dict[str, Any] = {"row": name, "mode": mode, "seconds": statistics.median(taken["seconds"])}
            row["ratio"] = paired_ratio(taken["seconds"], baseline["seconds"])
            if taken["peak_gb"]:
                row["peak_gb"] = max(taken["peak_gb"])
            else:
                row["cpu_seconds"] = statistics.median(taken["cpu_seconds"])
                row["ratio_cpu"] = paired_ratio(taken["cpu_seconds"], baseline["cpu_seconds"])
            rows.append(row)
    return rows


def paired_ratio(taken: list[float], baseline: list[float]) -> float:
    """The median of each turn's own ratio."""
    return statistics.median(a / b for a, b in zip(taken, baseline, strict=True))


# ---------------------------------------------------------------------- the report


def goals(tflop: dict[str, float]) -> dict[str, dict]:
    """By counted operations, at the size that was counted."""
    best, fast = tflop["FaceSnap, best"], tflop["FaceSnap, fast"]
    figures = {
        "best / plain SDXL": (best / tflop[PLAIN], 1.21),
        "best / InstantID's form": (best / tflop[INSTANTID], 0.86),
        "fast / plain SDXL": (fast / tflop[PLAIN], 0.9),
    }
    return {name: {"is": value, "at_most": goal, "met": value <= goal} for name, (value, goal) in figures.items()}


def table(rows: list[dict]) -> str:
    columns = ["row", "mode", "tflop", "ratio_tflop", "seconds", "ratio", "cpu_seconds", "ratio_cpu", "peak_gb"]
    used = [c for c in columns if any(c in row for row in rows)]
    texts = [used] + [[f"{v:.3f}" if isinstance(v := row.get(c, ""), float) else str(v) for c in used] for row in rows]
    wide = [max(len(line[k]) for line in texts) for k in range(len(used))]
    return "\n".join("  ".join(f"{cell:<{w}}" for cell, w in zip(line, wide, strict=True)).rstrip() for line in texts)


def parse(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="sdxl")
    parser.add_argument("--flops", action="store_true", help="count only, time nothing")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), help="float16, on a CPU float32")
    parser.add_argument("--turns", type=int, default=5, help="timed portraits of each row")
    parser.add_argument("--modes", nargs="+", default=["full"], help="memory modes: full first, balanced, low")
    parser.add_argument("--compile", action="store_true", help="everything through torch.compile")
    parser.add_argument("--machine", help="what the report calls this machine; by default its processor or GPU")
    parser.add_argument("--note", help="a remark for the report")
    parser.add_argument("--out", type=Path, help="the report, a .json file")
    arguments = parser.parse_args(words)
    if arguments.turns < 1:
        parser.error(f"--turns {arguments.turns}: at least one portrait of each row must be timed")
    if arguments.modes[0] != "full":
        parser.error("--modes must begin with full, to which the others are compared")
    if arguments.dtype == "float16" and arguments.device == "cpu":
        parser.error("--dtype float16 is for a GPU; on a CPU take float32 or bfloat16")
    return arguments


def machine(arguments: argparse.Namespace) -> Any:
    if arguments.machine or arguments.flops:
        return arguments.machine or "any: counted, not timed"
    on_gpu = arguments.device.startswith("cuda")
    return {"gpu": torch.cuda.get_device_name()} if on_gpu else provenance.machine()


def main(words: list[str] | None = None) -> dict:
    """Measures what the words of the command line say; the report, also printed and written to --out."""
    arguments = parse(words)
    size = SIZES[arguments.size]
    tflop, gigabytes = count(size)
    by_count = {name: {"tflop": n, "ratio_tflop": n / tflop[PLAIN]} for name, n in tflop.items()}
    dtype = arguments.dtype or ("float32" if arguments.device == "cpu" else "float16")
    if arguments.flops:
        rows: list[dict] = [{"row": name, **row} for name, row in by_count.items()]
    else:
        timed = timed_rows(arguments, size, getattr(torch, dtype))
        rows = [{"row": row["row"], "mode": row["mode"], **by_count[row["row"]], **row} for row in timed]
    found = {
        "what": "operations counted on meta tensors" if arguments.flops else "portraits timed with random weights",
        "command": " ".join(["python benchmarks/generate.py", *(sys.argv[1:] if words is None else words)]),
        "commit": provenance.commit(),
        "machine": machine(arguments),
        "libraries": {name: importlib.metadata.version(name) for name in LIBRARIES},
        "note": arguments.note,
        "settings": {
            "size": arguments.size, "side": size.side, "steps": STEPS, "guidance": GUIDANCE, "vae": "as dtype",
            "dtype": "float16" if arguments.flops else dtype, "turns": 0 if arguments.flops else arguments.turns,
            "compiled": arguments.compile and not arguments.flops,
        },
        "weights_gb_float16": gigabytes,
        "rows": rows,
        "goals": goals(tflop),
    }  # fmt: skip
    print(table(rows))
    for name, goal in found["goals"].items():
        print(f"{name}: {goal['is']:.3f} by operations, goal {goal['at_most']} {'met' if goal['met'] else 'missed'}")
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        report.write(arguments.out, found)
    return found


if __name__ == "__main__":
    main()

"""What training costs: our step against diffusers' own ControlNet step, and the identity loss's memory by its steps.

    python benchmarks/training.py --model assets/mini --out training.json        # some minutes on one core, no GPU

Four tables:

1. Seconds a sample of `facesnap.training` (without the identity loss) and of a ControlNet-SDXL step as diffusers'
   train_controlnet_sdxl.py makes it, at equal sizes, taking turns in one process: the base, the VAE and the pictures
   are the same, texts are encoded beforehand in both, both clip and run AdamW. Goal: 1.15 ×.
2. The same two steps at SDXL's size, in floating-point operations counted on fake tensors, which have no content.
3. Peak bytes of all tensors that live while the identity loss is computed and differentiated, those of weights,
   gradients and optimiser left out, for 1, 2, 4 and 8 steps of its branch: for real on the small model, on fake tensors
   at SDXL's size. Goal: 8 steps take at most 1.15 × the memory of 1. `sdxl_step` is a whole training step: from
   the second use of FFRNet on (the masked loss, or a second step) one sum of its gradients waits inside PyTorch for the
   last use, which `sdxl_fake` shows as a step from 1 to 2.
4. What a card must hold for the runs of docs/training_costs.md, in GB: counted in the same way.
"""

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import ControlNetModel, UNet2DConditionModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that the file runs as it is, installed or not

from benchmarks.live_bytes import LiveBytes  # noqa: E402
from benchmarks.random_models import SIZES, default_dtype, make_unet, make_vae  # noqa: E402
from facesnap.ffrnet import FFRNet, attach  # noqa: E402
from facesnap.mixer import FacialAttributeMixer  # noqa: E402
from facesnap.pipeline import FaceSnapPipeline  # noqa: E402
from facesnap.provenance import commit, machine  # noqa: E402
from facesnap.training.conditions import Cache, Photographs  # noqa: E402
from facesnap.training.identity import IdentityLoss  # noqa: E402
from facesnap.training.iresnet import Block, IResNet  # noqa: E402
from facesnap.training.losses import add_noise, diffusion_target  # noqa: E402
from facesnap.training.portraits import PortraitStage, what_learns  # noqa: E402
from facesnap.training.trainer import Batch, Trainer, TrainerConfig  # noqa: E402

SDXL = SIZES["sdxl"]
PARTS = ("speed", "operations", "memory", "cards")
STEPS = (1, 2, 4, 8)
ALPHAS = torch.linspace(0.999, 0.005, 1000)  # made here, since a fake tensor has no values
NO_AUTOCAST = contextlib.nullcontext()
RUNS = {  # of configs/, as docs/training_costs.md tells them
    "sdxl.yaml": {"side": 1024, "count": 7, "steps": 4, "samples": 7, "optimiser_bytes": 8},
    "sdxl.yaml, no identity loss": {"side": 1024, "count": 7, "optimiser_bytes": 8},
    "sdxl-24gb.yaml": {"side": 768, "count": 1, "learn": "light", "optimiser_bytes": 2},
}
FACE = np.array([[0.38, 0.40], [0.62, 0.40], [0.50, 0.52], [0.41, 0.64], [0.59, 0.64]])  # of a picture's side


# ------------------------------------------------------------------------------------------------ 1. time


def batches(size: int, count: int) -> Iterator[Batch]:
    """Batches of noise, in the form of `photos.PhotoShards`."""
    rng = np.random.default_rng(0)

    def picture(*shape: int) -> Tensor:
        return torch.from_numpy(rng.integers(0, 256, shape, dtype=np.uint8))

    while True:
        yield {
            "pixels": picture(count, 3, size, size),
            "mask": torch.full((count, 1, size, size), 255, dtype=torch.uint8),
            "control": picture(count, 3, size, size),
            "time_ids": torch.tensor([size, size, 0, 0, size, size], dtype=torch.float32).expand(count, -1),
            "captions": ["a photo of a person in a red shirt, plain background"] * count,
            "drop_text": torch.zeros(count, dtype=torch.bool),
            "drop_face": torch.zeros(count, dtype=torch.bool),
            "embeddings": torch.from_numpy(rng.standard_normal((count, 1, 512)).astype(np.float32)),
            "crops": picture(count, 1, 224, 224, 3),
            "reference_mask": torch.ones(count, 1, dtype=torch.bool),
        }


def our_step(model: str, out: Path) -> Callable[[Batch], None]:
    """One step of the trainer, as `facesnap.training.train` makes it."""
    pipe = FaceSnapPipeline.from_pretrained(model)
    stage = PortraitStage(pipe, Photographs(pipe, lambda *_: (), text_cache=Cache(out / "texts")))
    trainer = Trainer(stage, TrainerConfig(out, steps=10**6, precision="fp32"))
    return lambda batch: trainer.update(batch)


def their_step(model: str) -> Callable[[Batch], None]:
    """One step of diffusers' examples/controlnet/train_controlnet_sdxl.py, in its order."""
    pipe = FaceSnapPipeline.from_pretrained(model)
    unet, vae = pipe.unet.requires_grad_(False), pipe.vae.requires_grad_(False)
    widths = pipe.ffrnet.config.conditioning_embedding_out_channels
    controlnet = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=widths).train()
    optimiser = torch.optim.AdamW(controlnet.parameters(), lr=1e-5)
    alphas = pipe.scheduler.alphas_cumprod
    texts: dict[str, tuple[Tensor, Tensor]] = {}

    def step(batch: Batch) -> None:
        key = batch["captions"][0]
        if key not in texts:
            with torch.no_grad():
                text, _, pooled, _ = pipe.encode_prompt(batch["captions"], do_classifier_free_guidance=False)
            texts[key] = text, pooled
        text, pooled = texts[key]
        with torch.no_grad():
            pixels = batch["pixels"].float() / 127.5 - 1
            latents = vae.encode(pixels).latent_dist.sample() * vae.config.scaling_factor
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, len(alphas), (len(latents),))
        noisy = add_noise(latents, noise, alphas[timesteps])
        added = {"text_embeds": pooled, "time_ids": batch["time_ids"]}
        control = batch["control"].float() / 255
        down, mid = controlnet(
            noisy, timesteps, encoder_hidden_states=text, added_cond_kwargs=added, controlnet_cond=control,
            return_dict=False,
        )  # fmt: skip
        prediction = unet(
            noisy, timesteps, encoder_hidden_states=text, added_cond_kwargs=added,
            down_block_additional_residuals=down, mid_block_additional_residual=mid, return_dict=False,
        )[0]  # fmt: skip
        target = diffusion_target(pipe.scheduler.config.prediction_type, latents, noise, alphas[timesteps])
        F.mse_loss(prediction.float(), target.float()).backward()
        nn.utils.clip_grad_norm_(controlnet.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    return step


def speed(model: str, count: int, rounds: int, size: int) -> dict:
    """Seconds a sample of both, by the processor's clock (others may use this machine) and by the wall's."""
    with tempfile.TemporaryDirectory() as folder:
        sides = {"facesnap": our_step(model, Path(folder)), "diffusers_controlnet": their_step(model)}
        source = batches(size, count)
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
        for turn in range(rounds + 1):
            batch = next(source)
            for name in sides if turn % 2 else reversed(sides):
                wall, cpu = time.perf_counter(), time.process_time()
                sides[name](batch)
                if turn:  # the first turn warms up
                    times[name].append((time.process_time() - cpu, time.perf_counter() - wall))
    medians = {n: [statistics.median(t[k] for t in pairs) / count for k in (0, 1)] for n, pairs in times.items()}
    ours, theirs = medians["facesnap"], medians["diffusers_controlnet"]
    return {
        "batch": count,
        "size": size,
        "rounds": rounds,
        "cpu_seconds_a_sample": {name: value[0] for name, value in medians.items()},
        "wall_seconds_a_sample": {name: value[1] for name, value in medians.items()},
        "ratio_cpu": ours[0] / theirs[0],
        "ratio_wall": ours[1] / theirs[1],
    }


# ------------------------------------------------------------------------------------------- 2. operations


def iresnet50() -> IResNet:
    """w600k_r50's form, with random weights."""

    def conv(inner: int, outer: int, size: int = 3, stride: int = 1) -> nn.Conv2d:
        return nn.Conv2d(inner, outer, size, stride, size // 2)

    blocks, inner = [], 64
    for outer, depth in ((64, 3), (128, 4), (256, 14), (512, 3)):
        for k in range(depth):
            stride = 2 if k == 0 else 1
            shortcut = conv(inner, outer, 1, stride) if k == 0 else nn.Identity()
            parts = nn.BatchNorm2d(inner), conv(inner, outer), nn.PReLU(outer), conv(outer, outer, 3, stride)
            blocks.append(Block(*parts, shortcut))
            inner = outer
    head = nn.Sequential(nn.BatchNorm2d(512), nn.Flatten(), nn.Linear(512 * 49, 512), nn.BatchNorm1d(512))
    return IResNet(nn.Sequential(conv(3, 64), nn.PReLU(64)), blocks, head)


def operations() -> dict:
    """Floating-point operations of one sample's step at SDXL's size: forward and backward, without the encoders that
    both share (VAE) or that may be cached (texts). CLIP ViT-H is counted by its formula: 24·n·d² + 4·n²·d a layer."""
    with FakeTensorMode():
        unet = make_unet(SDXL).requires_grad_(False)
        noisy, t = torch.zeros(1, 4, 128, 128), torch.zeros(1, dtype=torch.long)
        text, ids, control = torch.zeros(1, 77, 2048), torch.zeros(1, 6), torch.zeros(1, 3, 1024, 1024)
        added = {"text_embeds": torch.zeros(1, 1280), "time_ids": ids}

        def theirs() -> None:
            down, mid = controlnet(noisy, t, text, control, added_cond_kwargs=added, return_dict=False)
            unet(
                noisy, t, text, added_cond_kwargs=added, down_block_additional_residuals=down,
                mid_block_additional_residual=mid, return_dict=False,
            )[0].square().mean().backward()  # fmt: skip

        def ours() -> None:
            mixed = mixer(torch.zeros(1, 1, 512), torch.zeros(1, 1, 257, 1280))
            with attach(unet, ffrnet, tokens=mixed.tokens, pooled=mixed.pooled, control=control):
                unet(noisy, t, text, added_cond_kwargs=added, return_dict=False)[0].square().mean().backward()

        counted = {}
        controlnet = ControlNetModel.from_unet(unet, load_weights_from_unet=False)
        with FlopCounterMode(display=False) as counter:
            theirs()
        counted["diffusers_controlnet"] = counter.get_total_flops()
        mixer, ffrnet = FacialAttributeMixer(), FFRNet.from_unet(unet, load_weights_from_unet=False)
        with FlopCounterMode(display=False) as counter:
            ours()
        counted["facesnap"] = counter.get_total_flops() + 31 * (24 * 257 * 1280**2 + 4 * 257**2 * 1280)
    ratio = counted["facesnap"] / counted["diffusers_controlnet"]
    return {"tflop_a_sample": {name: value / 1e12 for name, value in counted.items()}, "ratio": ratio}


# ------------------------------------------------------------------------------------------------ 3. memory


def added_for(unet, side: int, count: int = 1) -> dict[str, Tensor]:
    """SDXL's added conditions of `count` pictures of side² pixels."""
    width = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
    ids = torch.tensor([[side, side, 0, 0, side, side]], dtype=unet.dtype)
    return {"text_embeds": torch.zeros(count, width, dtype=unet.dtype), "time_ids": ids.expand(count, -1)}


def known_tensors(learning: list[Tensor], *modules: nn.Module) -> list[Tensor]:
    """Weights, and the gradients of those that learn, which are made: they are not to count."""
    for parameter in learning:
        parameter.grad = torch.zeros_like(parameter)
    known = [*learning, *(p.grad for p in learning), *(p for m in modules for p in m.parameters())]
    return known + [b for m in modules for b in m.buffers()]


def peaks(
    loss: IdentityLoss, unet, ffrnet, tokens: Tensor, pooled: Tensor, side: int, autocast=NO_AUTOCAST
) -> dict[int, int]:
    """{steps: peak bytes} of the identity loss, forward and backward, for one sample of side² pixels."""
    grid, channels = side // loss.factor, unet.config.in_channels
    noise, control = torch.zeros(1, channels, grid, grid) + 0.1, torch.zeros(1, 3, side, side)
    text = torch.zeros(1, 77, unet.config.cross_attention_dim, dtype=unet.dtype)
    added = added_for(unet, side)

    def predict(noisy: Tensor, t: Tensor) -> Tensor:
        with attach(unet, ffrnet, tokens=tokens, pooled=pooled, control=control):
            return unet(noisy.to(unet.dtype), t, text, added_cond_kwargs=added, return_dict=False)[0]

    learning = [tokens, pooled, *ffrnet.parameters()]
    known = known_tensors(learning, unet, ffrnet, loss.vae, loss.recogniser)
    found = {}
    for steps in STEPS:
        loss.steps = steps
        with LiveBytes(known) as live:
            with autocast:
                value = loss(predict, noise, FACE[None] * side, torch.ones(1, 512)).mean()
            value.backward()
        del value
        found[steps] = live.peak
    return found


def small_peaks(model: str) -> dict[int, int]:
    """For real, on the small model, in float32."""
    pipe = FaceSnapPipeline.from_pretrained(model)
    phi = iresnet50().requires_grad_(False)
    alphas, kind = pipe.scheduler.alphas_cumprod, pipe.scheduler.config.prediction_type
    tokens = torch.randn(1, 16, pipe.mixer.config.token_dim, requires_grad=True)
    pooled = torch.randn(1, pipe.mixer.config.pooled_dim, requires_grad=True)
    loss = IdentityLoss(phi, pipe.vae, alphas, kind)
    return peaks(loss, pipe.unet.requires_grad_(False), pipe.ffrnet, tokens, pooled, pipe.settings.size)


def sdxl_parts() -> tuple[UNet2DConditionModel, FFRNet, IdentityLoss]:
    """SDXL as it is trained: the UNet in bfloat16, VAE and FFRNet in float32, gradient checkpointing on."""
    with default_dtype(torch.bfloat16):  # fake weights cannot be converted in place
        unet = make_unet(SDXL).requires_grad_(False)
    vae = make_vae(SDXL).requires_grad_(False)
    ffrnet = FFRNet.from_unet(unet, load_weights_from_unet=False)
    for module in (unet, ffrnet, vae):
        module.enable_gradient_checkpointing()
    return unet, ffrnet, IdentityLoss(iresnet50(), vae, ALPHAS, "epsilon")


def sdxl_peaks() -> dict[int, int]:
    """Of the identity loss alone, at SDXL's size and 1024²."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        unet, ffrnet, loss = sdxl_parts()
        tokens, pooled = torch.zeros(1, 16, 2048, requires_grad=True), torch.zeros(1, 1280, requires_grad=True)
        return peaks(loss, unet, ffrnet, tokens, pooled, 1024, torch.autocast("cpu", torch.bfloat16))


def whole_step(
    side: int, count: int, *, steps: int = 0, samples: int = 1, learn: str = "all", operations: bool = False
) -> tuple[int, int]:
    """(peak bytes, weights that learn) of a training step at SDXL's size: mixer, the masked loss of `count` pictures of
    side² pixels and, with `steps`, the identity loss of `samples` of them, forward and backward.

    With `operations` instead of bytes their number, of which what gradient checkpointing computes again is part and the
    frozen encoders are not. One at a time: the counter of operations holds on to tensors.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        unet, ffrnet, loss = sdxl_parts()
        mixer, loss.steps = FacialAttributeMixer(), max(steps, 1)
        learning = [*mixer.parameters(), *what_learns(ffrnet, learn)]
        grid = side // loss.factor
        noisy, t = torch.zeros(count, 4, grid, grid) + 0.1, torch.zeros(count, dtype=torch.long)
        text, control = torch.zeros(count, 77, 2048, dtype=unet.dtype), torch.zeros(count, 3, side, side)
        embeddings, clip = torch.zeros(count, 1, 512), torch.zeros(count, 1, 257, 1280)
        known = known_tensors(learning, mixer, unet, ffrnet, loss.vae, loss.recogniser)
        with FlopCounterMode(display=False) if operations else LiveBytes(known) as counter:
            with torch.autocast("cpu", torch.bfloat16):
                mixed = mixer(embeddings, clip)

                def predict(noisy: Tensor, t: Tensor) -> Tensor:
                    few = len(noisy)
                    faces = {"tokens": mixed.tokens[:few], "pooled": mixed.pooled[:few], "control": control[:few]}
                    with attach(unet, ffrnet, **faces):
                        added = added_for(unet, side, few)
                        return unet(noisy.to(unet.dtype), t, text[:few], added_cond_kwargs=added, return_dict=False)[0]

                value = predict(noisy, t).float().square().mean()
                if steps:
                    faces = FACE[None].repeat(samples, 0) * side
                    value = value + loss(predict, noisy[:samples], faces, torch.ones(samples, 512)).mean()
            value.backward()
        found = counter.get_total_flops() if operations else counter.peak
        return found, sum(p.numel() for p in learning)


def card(run: dict) -> dict:
    """GB on a card of one of the runs of docs/training_costs.md: weights and what hangs on them, and a step's peak."""
    step = {key: value for key, value in run.items() if key != "optimiser_bytes"}
    peak, learning = whole_step(**step)
    flop, _ = whole_step(**step, operations=True)
    told = json.loads((ROOT / "benchmarks" / "results" / "flops-sdxl.json").read_text())["weights_gb_float16"]
    phi = 4 * sum(p.numel() for p in iresnet50().parameters()) / 1e9
    weights = phi + sum(2 * gb if name in ("mixer", "ffrnet", "vae") else gb for name, gb in told.items())
    state = learning * (4 + 4 + run["optimiser_bytes"]) / 1e9  # gradient, EMA, optimiser
    sizes = {"weights_gb": weights, "state_gb": state, "peak_gb": peak / 1e9}
    return run | sizes | {"sum_gb": sum(sizes.values()), "tflop_a_sample": flop / 1e12 / run["count"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="assets/mini", help="the small FaceSnap folder")
    parser.add_argument("--out", type=Path, help="a JSON file of all figures")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--only", choices=PARTS, nargs="+")
    args = parser.parse_args()
    torch.set_num_threads(1)
    wanted = args.only or PARTS
    found: dict = {"command": " ".join(["python benchmarks/training.py", *sys.argv[1:]]), "commit": commit()}
    found |= {"machine": machine(), "torch": torch.__version__}
    if "speed" in wanted:
        size = FaceSnapPipeline.from_pretrained(args.model).settings.size
        found["speed"] = told = speed(args.model, args.batch, args.rounds, size)
        print(f"one training step without the identity loss, batch {args.batch}, {size}²")
        for name, value in told["cpu_seconds_a_sample"].items():
            wall = told["wall_seconds_a_sample"][name]
            print(f"  {name:22} {value:8.4f} s of a core a sample, {wall:.4f} s by the wall")
        print(f"  ratio {told['ratio_cpu']:.3f} (wall {told['ratio_wall']:.3f}), goal 1.15", flush=True)
    if "operations" in wanted:
        found["operations"] = told = operations()
        print("the same at SDXL's size, 1024², counted")
        for name, value in told["tflop_a_sample"].items():
            print(f"  {name:22} {value:8.2f} TFLOP a sample")
        print(f"  ratio {told['ratio']:.3f}", flush=True)
    if "memory" in wanted:
        found["memory"] = {}
        print("peak bytes of the identity loss, without weights, gradients and optimiser")
        for name, measure in (
            ("small", lambda: small_peaks(args.model)),
            ("sdxl_fake", sdxl_peaks),
            ("sdxl_step", lambda: {steps: whole_step(1024, 1, steps=steps)[0] for steps in STEPS}),
        ):
            told = measure()
            ratio = told[STEPS[-1]] / told[STEPS[0]]
            found["memory"][name] = {"bytes": told, "ratio_8_to_1": ratio}
            row = "  ".join(f"{steps}: {value / 1e6:,.1f} MB" for steps, value in told.items())
            print(f"  {name:10} {row}   8 steps / 1 step {ratio:.3f}, goal 1.15", flush=True)
    if "cards" in wanted:
        print("GB on a card, counted: weights; gradients, EMA and optimiser; a step's peak; together; TFLOP a sample")
        found["cards"] = {}
        for name, run in RUNS.items():
            found["cards"][name] = told = card(run)
            parts = (f"{told[key]:6.1f}" for key in ("weights_gb", "state_gb", "peak_gb", "sum_gb", "tflop_a_sample"))
            print(f"  {name:28} {' '.join(parts)}", flush=True)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()

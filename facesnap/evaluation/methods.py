"""`make`: the built-in methods fill a plan's folder; whoever fills one otherwise writes the same files.

    facesnap, facesnap-fast       a FaceSnap checkpoint by its presets
    facesnap-driver               the driver's own landmarks instead of the predicted ones
    instantid, instantid-driver   InstantID's weights with our predicted points, and with the pose photo's own
    ip-adapter-faceid             h94's IP-Adapter-FaceID on an SDXL base, through diffusers: no pose
    base                          the plain base model: knows neither face nor pose, the floor
    paste                         the reference's own face moved to the driver's place: what copying scores
    truth, vae                    the true picture, the ceiling; and the true picture through the checkpoint's VAE

A method's folder holds the pictures, `method.json` (which method, which plan) and `made*.jsonl`, a line a picture:
{"file", "seconds", "peak_memory_gb"} or {"file", "failed": why}. Several processes (`torchrun`) share the
rows; what a killed run has made stays.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from accelerate import PartialState
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from tqdm import tqdm

from facesnap import checkpoints
from facesnap.errors import InputError, check_number, did_you_mean
from facesnap.evaluation import plan as plans
from facesnap.evaluation import report
from facesnap.evaluation.plan import Plan, Row
from facesnap.faces import FaceAnalyser
from facesnap.folder import BASE_PARTS
from facesnap.images import open_image
from facesnap.provenance import fingerprint

METHOD, MADE = "method.json", "made"
Maker = Callable[[Row], Image.Image | np.ndarray]

# the kind of checkpoint, and what is asked of its call
CALLS: dict[str, tuple[str, dict[str, Any]]] = {
    "facesnap": ("facesnap", {"preset": "best"}),
    "facesnap-fast": ("facesnap", {"preset": "fast"}),
    "facesnap-driver": ("facesnap", {"variant": "driver"}),
    "instantid": ("instantid", {}),
    "instantid-driver": ("instantid", {"variant": "driver"}),
}
METHODS = (*CALLS, "ip-adapter-faceid", "base", "paste", "truth", "vae")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("plan", type=Path, help="a plan's folder")
    parser.add_argument("--method", required=True, help=", ".join(METHODS))
    parser.add_argument("--model", required=True, help="a checkpoint: its folder, or any name `checkpoints load` knows")
    parser.add_argument("--out", required=True, type=Path, help="the method's folder; its name is the method's name")
    parser.add_argument("--adapter", type=Path, help="ip-adapter-faceid_sdxl.bin (with --method ip-adapter-faceid)")
    parser.add_argument("--steps", type=int, help="of the sampler; the checkpoint's own by default")
    parser.add_argument("--guidance", type=float, help="the checkpoint's own by default")
    parser.add_argument("--device", default="cpu")


def run(arguments: argparse.Namespace) -> dict[str, dict]:
    """Fills the folder, or the rest of it; the lines of all pictures of this process by file name."""
    if arguments.method not in METHODS:
        raise InputError(f"There is no method {arguments.method!r}; {did_you_mean(arguments.method, METHODS)}")
    if arguments.steps is not None:
        check_number("number of steps", arguments.steps, 1, 1000, whole=True)
    plan, out = plans.read(arguments.plan), arguments.out
    state = PartialState(cpu=arguments.device == "cpu")
    device = str(state.device) if arguments.device == "cuda" else arguments.device
    options = {name: getattr(arguments, name) for name in ("steps", "guidance")}
    if state.is_main_process:
        begin(out, {"method": arguments.method, "plan": plan.digest, "model": _version(arguments.model), **options})
    state.wait_for_everyone()
    known = made(out)
    waiting = [row for row in plan.rows if row.file not in known or not _is_there(out, known[row.file])]
    state.wait_for_everyone()  # nobody may note a picture that another still counts as waiting
    if mine := waiting[state.process_index :: state.num_processes]:
        fill(out, mine, method(arguments, plan, device), state.process_index, device)
    state.wait_for_everyone()
    return made(out)


def begin(out: Path, what: dict[str, Any]) -> None:
    """method.json, unless the folder already belongs to another method or plan."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / METHOD
    if path.exists() and (known := json.loads(path.read_text(encoding="utf-8"))) != what:
        differing = sorted(k for k in {*known, *what} if known.get(k) != what.get(k))
        raise InputError(f"The folder '{out.name}' was begun with another {', '.join(differing)}: give another --out.")
    report.write_whole(path, json.dumps(what, indent=1) + "\n")


def made(folder: Path) -> dict[str, dict]:
    """What the lines of all processes say of the pictures, by file name; a line that a kill cut short is dropped.

    Raises InputError for another line that says nothing of a file.
    """
    found = {}
    for path in sorted(folder.glob(f"{MADE}*.jsonl")):
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                found[row["file"]] = row
            except (ValueError, KeyError, TypeError) as error:
                if number == len(lines) and not line.endswith("\n"):
                    continue
                example = '{"file": "00017.png", "failed": "no face"}'
                raise InputError(f"Line {number} of {path.name} in '{folder.name}' is not like {example}.") from error
    return found


def fill(out: Path, rows: list[Row], maker: Maker, rank: int, device: str) -> None:
    """Makes the pictures of `rows`, each written whole or not at all; a refusal is an outcome, not an end."""
    path = out / f"{MADE}.{rank}.jsonl"
    if path.exists() and not path.read_bytes().endswith(b"\n"):  # cut short by a kill
        whole = path.read_text(encoding="utf-8").rpartition("\n")
        report.write_whole(path, whole[0] + whole[1])
    with path.open("a", encoding="utf-8") as file:
        for row in tqdm(rows, desc=out.name, unit="portrait", disable=rank > 0):
            if device.startswith("cuda"):
                torch.cuda.reset_peak_memory_stats(device)
            start = time.perf_counter()
            line: dict[str, Any] = {"file": row.file}
            try:
                picture = maker(row)
            except InputError as error:
                line["failed"] = str(error)
            else:
                line["seconds"] = round(time.perf_counter() - start, 3)
                picture = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
                draft = out / f".{row.file}.part"
                picture.save(draft, format="PNG")
                draft.replace(out / row.file)
            line["peak_memory_gb"] = round(_peak_gb(device), 2)
            file.write(json.dumps(line) + "\n")
            file.flush()


def method(arguments: argparse.Namespace, plan: Plan, device: str) -> Maker:
    """The maker of one of `METHODS`."""
    name, folder = arguments.method, plan.folder
    if name == "truth":
        return lambda row: fitted(open_image(folder / _truth(row)), row.size)
    if name == "paste":
        return Paste(folder, FaceAnalyser(_folder(arguments.model) / "face_pack"))
    if name == "ip-adapter-faceid":
        return FaceId(folder, arguments, device)
    pipe = checkpoints.load(arguments.model, device=device)
    pipe.set_progress_bar_config(disable=True)  # type: ignore[attr-defined]
    if name == "vae":
        return lambda row: through_vae(pipe.vae, fitted(open_image(folder / _truth(row)), row.size))
    steps, guidance = arguments.steps or pipe.settings.steps, arguments.guidance
    guidance = pipe.settings.guidance if guidance is None else guidance
    options = {"num_inference_steps": steps, "guidance_scale": guidance}
    if name == "base":
        stock = StableDiffusionXLPipeline(**{part: getattr(pipe, part) for part in BASE_PARTS})
        return lambda row: _stock(stock, row, **options)
    kind, more = CALLS[name]
    if pipe.settings.kind != kind:
        own = pipe.settings.kind
        raise InputError(f"Method '{name}' needs a checkpoint of kind '{kind}', and this one is '{own}'.")

    def portrait(row: Row) -> Image.Image:
        reference, driver = folder / row.reference, folder / row.driver
        sizes = {"height": row.size, "width": row.size, "seed": row.seed, "score": False}
        return pipe(row.prompt, reference=reference, pose=driver, **sizes, **options, **more).images[0]

    return portrait


def _stock(pipe: Any, row: Row, **options: Any) -> Image.Image:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(row.seed)
    return pipe(row.prompt, height=row.size, width=row.size, generator=generator, **options).images[0]


class FaceId:
    """IP-Adapter-FaceID (Ye et al. 2023, h94/IP-Adapter-FaceID) as diffusers runs it, at scale 0.8 and 30 steps.

    The base is the checkpoint's; the embedding is its face pack's, normalised, which for the public weights must be
    the pack they were trained with (buffalo_l).
    """

    def __init__(self, folder: Path, arguments: argparse.Namespace, device: str):
        adapter: Path | None = arguments.adapter
        if adapter is None or not adapter.is_file():
            raise InputError("Method 'ip-adapter-faceid' needs its weights: give --adapter FILE.")
        pipe = checkpoints.load(arguments.model, device=device)
        stock = StableDiffusionXLPipeline(**{part: getattr(pipe, part) for part in BASE_PARTS})
        self.analyser, self.folder, self.pipe = pipe.face_analyser, folder, stock
        guidance = arguments.guidance
        self.options = {"num_inference_steps": arguments.steps or 30}
        self.options["guidance_scale"] = 7.5 if guidance is None else guidance
        stock.load_ip_adapter(str(adapter.parent), subfolder=None, weight_name=adapter.name, image_encoder_folder=None)
        stock.set_ip_adapter_scale(0.8)

    def __call__(self, row: Row) -> Image.Image:
        embedding = self.analyser.analyse(open_image(self.folder / row.reference)).embedding
        face = torch.from_numpy(embedding / np.linalg.norm(embedding))[None, None, None]
        face = face.to(self.pipe.unet.device, self.pipe.unet.dtype)
        guided = self.options["guidance_scale"] > 1
        embeds = [torch.cat([torch.zeros_like(face), face]) if guided else face]
        return _stock(self.pipe, row, ip_adapter_image_embeds=embeds, **self.options)


class Paste:
    """The reference, turned, scaled and moved so that its eyes, nose and mouth come to lie on the driver's."""

    def __init__(self, folder: Path, analyser: FaceAnalyser):
        self.folder, self.analyser = folder, analyser

    def __call__(self, row: Row) -> np.ndarray:
        reference, driver = (open_image(self.folder / path) for path in (row.reference, row.driver))
        driver = fitted(driver, row.size)
        points = [self.analyser.analyse(picture).keypoints for picture in (reference, driver)]
        matrix, _ = cv2.estimateAffinePartial2D(points[0], points[1], method=cv2.LMEDS)
        if matrix is None:
            raise InputError("The reference's face cannot be moved to the driver's place: their points do not fit.")
        edges: dict[str, Any] = {"flags": cv2.INTER_CUBIC, "borderMode": cv2.BORDER_REPLICATE}
        return cv2.warpAffine(reference, matrix, (row.size, row.size), **edges)


@torch.no_grad()
def through_vae(vae: Any, picture: np.ndarray) -> np.ndarray:
    """RGB uint8 (H, W, 3) → the same, encoded and decoded: what a perfect denoiser would make of it."""
    pixels = torch.from_numpy(picture).permute(2, 0, 1)[None].to(vae.device, vae.dtype) / 127.5 - 1
    decoded = vae.decode(vae.encode(pixels).latent_dist.mode()).sample[0]
    return ((decoded.float().clamp(-1, 1) + 1) * 127.5).round().permute(1, 2, 0).byte().cpu().numpy()


def fitted(picture: np.ndarray, size: int) -> np.ndarray:
    """The middle square of a picture, `size` x `size`; as it is where it has that size."""
    if picture.shape[:2] == (size, size):
        return picture
    side = min(picture.shape[:2])
    top, left = ((length - side) // 2 for length in picture.shape[:2])
    middle = Image.fromarray(picture[top : top + side, left : left + side])
    return np.asarray(middle.resize((size, size), Image.Resampling.LANCZOS))


def _truth(row: Row) -> str:
    if row.truth is None:
        raise InputError("The plan knows no true picture for this row.")
    return row.truth


def _folder(model: str) -> Path:
    if not Path(model).is_dir():
        raise InputError(f"'{model}' is no folder; this method reads the face pack of a checkpoint's folder.")
    return Path(model)


def _version(model: str) -> str:
    return fingerprint(Path(model)) if Path(model).is_dir() else model


def _is_there(out: Path, line: dict) -> bool:
    return "failed" in line or (out / line["file"]).is_file()


def _peak_gb(device: str) -> float:
    return torch.cuda.max_memory_allocated(device) / 1e9 if device.startswith("cuda") else report.peak_memory_gb()


def lines(known: dict[str, dict]) -> list[tuple[str, object, str]]:
    """What was made, for the terminal."""
    failed = [row["failed"] for row in known.values() if "failed" in row]
    return [("made", len(known) - len(failed), ""), ("failed", len(failed), failed[0] if failed else "")]

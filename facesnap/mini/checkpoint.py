"""The mini's checkpoint folder: from a work folder to what ships, and back."""

import importlib.metadata
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from onnx import helper, numpy_helper
from torch import nn
from transformers import CLIPVisionModel

from facesnap.faces import FaceAnalyser, Recogniser, five_points
from facesnap.ffrnet import FFRNet
from facesnap.heads import LinearHeadModel
from facesnap.mini import features as feats
from facesnap.mini.joint import PARTS, load_parts, make_pipe
from facesnap.mini.nets import face_encoder as clip
from facesnap.mini.portraits import latest
from facesnap.mini.recipe import Run
from facesnap.mixer import FacialAttributeMixer
from facesnap.synthetic.dataset import People, load_people
from facesnap.training.checkpointing import write_whole

ADOPTED = 5000  # pictures that a new recogniser is fitted to an old mixer with

# By the scorer, measured on 200 held-out people: of true pairs of one person all reach 0.6 and 98 % reach 0.75; of
# strangers 0.6 % reach 0.75, 3 % reach 0.6 and 11 % reach 0.4. The words hold for photographs as well, which become
# rendered people.
LIKENESS = [
    [0.75, "a close likeness, as rendered people go"],
    [0.6, "alike, as rendered people go"],
    [0.4, "somewhat alike, as rendered people go"],
    [-1, "hardly alike"],
]
HINT = (
    "This small model has seen rendered people only: a photograph becomes one of them, with its skin, hair and build. "
    "Words it knows: a photo, a pencil sketch, a watercolor, an oil painting, black and white; a shirt, striped shirt "
    "or jacket, a beanie or cap in a colour; round or square glasses; a studio, plain or blurred background, hills; "
    "soft, warm or cool light."
)


def unpack(run: Run, minutes: float) -> None:
    """A finished checkpoint back into the work folder, each part where its stage would have left it."""
    for name in ("vae", "face_encoder", "face_pack", "head", "scorer", "tokenizer"):
        if (run.out / name).is_dir():
            shutil.copytree(run.out / name, run.work / name, dirs_exist_ok=True)
    for name in PARTS:
        shutil.copytree(run.out / name, run.work / "start" / name, dirs_exist_ok=True)


def adopt(run: Run, minutes: float) -> None:
    """The unpacked parts read what was trained anew since: the mixer a new recogniser A and face encoder, UNet and
    FFRNet the latents of a new VAE.

    The layers that read them say of the new features what they said of the old, by ridge regression on pictures of
    known faces; what that leaves unexplained is for the stages that follow.
    """
    known, found = load_people(run.data), feats.Features.load(run.work / "features" / "faces")
    rows = np.flatnonzero(found.found)
    rows = rows[np.linspace(0, len(rows) - 1, min(len(rows), ADOPTED)).astype(int)]
    parts = load_parts(run.work / "start")
    adopt_faces(run, parts["mixer"], known, found, rows)
    old = AutoencoderKL.from_pretrained(run.out / "vae", use_safetensors=True).eval()
    kept = np.load(run.work / "features" / "latents.npy", mmap_mode="r")
    some = rows[:: max(1, len(rows) // 300)]  # of 256 places each
    before = feats.encoded(old, known.images[some])
    told = adopt_latents(parts["unet"], parts["ffrnet"], before, kept[some].astype(np.float32))
    print("left unexplained of the old latents {:.2f}, of the new ones {:.2f}".format(*told))
    for name in ("mixer", "unet", "ffrnet"):
        write_whole(run.work / "start" / name, parts[name].save_pretrained)  # the shipped one lay there in pieces


def adopt_faces(run: Run, mixer: FacialAttributeMixer, known: People, found: feats.Features, rows: np.ndarray) -> None:
    old = Recogniser(run.out / "face_pack" / "recogniser.onnx")
    before = np.stack([old.embed(known.images[int(row)], five_points(found.points68[row])) for row in rows])
    encoder = CLIPVisionModel.from_pretrained(
        run.out / "face_encoder", dtype=torch.float32, use_safetensors=True
    ).eval()
    some = rows[:: max(1, len(rows) // 600)]  # of some fifty states each
    states = clip.features_of(encoder, found.crops, some).flatten(0, 1).numpy()
    now = np.load(run.work / "features" / "clip.npy", mmap_mode="r")[some].astype(np.float32)
    for name, old_values, new_values in (
        ("w_id", before, found.embeddings[rows]),
        ("w_clip", states, now.reshape(states.shape)),
    ):
        left = refit(getattr(mixer, name), old_values, new_values)
        print(f"{left:.2f} of what the mixer's {name} said is left unexplained")


@torch.no_grad()
def adopt_latents(unet: UNet2DConditionModel, ffrnet: FFRNet, old: np.ndarray, new: np.ndarray) -> tuple[float, float]:
    """UNet and FFRNet, which know latents `old` (N, C, h, w), read and make those `new` (N, D, h, w) of the same
    pictures, each place by one linear map there and one back.

    Returns the shares of variance of the old latents and of the new ones that the maps leave unexplained.
    """
    flat = [torch.from_numpy(x).movedim(1, -1).flatten(0, 2).double() for x in (old, new)]
    there, back = (torch.linalg.lstsq(x, y).solution for x, y in (flat[::-1], flat))  # (D, C) and (C, D)
    left = [float((y - x @ m).var() / y.var()) for x, y, m in ((flat[1], flat[0], there), (flat[0], flat[1], back))]
    # The noise of new latents must look to the old layers as their own did: of variance 1
    there = (there / there.norm(dim=0)).float()
    for net in (unet, ffrnet):
        net.conv_in = _conv(net.conv_in, torch.einsum("ocij,dc->odij", net.conv_in.weight, there), net.conv_in.bias)
        net.register_to_config(in_channels=len(there))
    out = unet.conv_out
    unet.conv_out = _conv(
        out, torch.einsum("cd,cikl->dikl", back.float(), out.weight), torch.einsum("cd,c->d", back.float(), out.bias)
    )
    unet.register_to_config(out_channels=len(there))
    return left[0], left[1]


def _conv(like: nn.Conv2d, weight: torch.Tensor, bias: torch.Tensor) -> nn.Conv2d:
    made = nn.Conv2d(weight.shape[1], weight.shape[0], like.kernel_size, like.stride, like.padding)
    made.load_state_dict({"weight": weight, "bias": bias})
    return made


@torch.no_grad()
def refit(layer: nn.Linear, old: np.ndarray, new: np.ndarray) -> float:
    """Change `layer` so that it says of inputs `new` (N, D) what it said of `old` (N, D), by ridge regression.

    Returns the share of its outputs' variance that is left unexplained.
    """
    wanted = layer(torch.from_numpy(old)).double().numpy()
    x, middle, centre = new.astype(np.float64), wanted.mean(0), new.mean(0, dtype=np.float64)
    ridge = 1e-3 * len(x) * x.var(0).mean() * np.eye(x.shape[1])
    weight = np.linalg.solve((x - centre).T @ (x - centre) + ridge, (x - centre).T @ (wanted - middle))
    layer.weight.copy_(torch.from_numpy(weight.T))
    layer.bias.copy_(torch.from_numpy(middle - centre @ weight))
    return float((wanted - middle - (x - centre) @ weight).var() / (wanted - middle).var())


def assemble(run: Run, minutes: float) -> None:
    """The checkpoint folder: fp16 weights, fp32 text encoders, no file over 10 MB."""
    last = latest(run, "consistency", "identity", "facesnap", "joint")
    encoder = next(place / "face_encoder" for place in (last, run.work) if (place / "face_encoder").is_dir())
    known = load_people(run.data)
    scorer = run.work / "scorer" / "recogniser.onnx"
    about = {
        "people": f"rendered, version {known.version}, {len(np.unique(known.person))} people",
        "stage": last.name,
        "license": "Apache-2.0",
        "hint": HINT,
        "likeness": LIKENESS,
        "styles": ["photo", "black and white", "pencil sketch", "watercolor", "oil painting"],  # of web.request
        "diffusers": importlib.metadata.version("diffusers"),
    }
    pipe = make_pipe(
        AutoencoderKL.from_pretrained(run.work / "vae", use_safetensors=True),
        load_parts(last),
        about,
        face_encoder=CLIPVisionModel.from_pretrained(encoder, dtype=torch.float32, use_safetensors=True),
        face_analyser=FaceAnalyser(run.work / "face_pack"),
        head_model=LinearHeadModel.from_pretrained(run.work / "head"),
        scorer=Recogniser(scorer) if scorer.exists() else None,
    )
    pipe.save_pretrained(run.out, dtype=torch.float16, max_shard_size="9MB")
    for file in (run.work / "scorer").glob("attributes*"):  # the evaluation's judges, see evaluation/scorer.py
        shutil.copy(file, run.out / "scorer" / file.name)
    for file in run.out.rglob("*.onnx"):
        store_half(file)
    for file in run.out.rglob("config.json"):  # diffusers notes the folder that a model was read from
        config = json.loads(file.read_text())
        config.pop("_name_or_path", None)
        file.write_text(json.dumps(config, indent=2) + "\n")
    total = sum(f.stat().st_size for f in run.out.rglob("*") if f.is_file())
    print(f"{run.out}: {total / 1e6:.1f} MB")


def store_half(path: Path) -> None:
    """Halve an ONNX file: its weights become float16, each cast back where it is used.

    ONNX Runtime folds the casts when it loads, so the nets still compute in float32.
    """
    model = onnx.load(path)
    graph = model.graph
    casts = []
    for weight in graph.initializer:
        if weight.data_type == onnx.TensorProto.FLOAT and len(weight.dims) > 1:
            name = weight.name
            half = numpy_helper.from_array(numpy_helper.to_array(weight).astype(np.float16), name + "_half")
            weight.CopyFrom(half)
            casts.append(helper.make_node("Cast", [name + "_half"], [name], to=onnx.TensorProto.FLOAT))
    nodes = list(graph.node)
    del graph.node[:]
    graph.node.extend(casts + nodes)
    onnx.checker.check_model(model)
    onnx.save(model, path)

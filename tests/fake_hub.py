"""A Hub cache made by hand, in its real layout, holding tiny models in the layouts of the public repositories."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from diffusers import StableDiffusionXLPipeline
from tiny import tiny_pipeline, tiny_unet, tiny_vae
from transformers import CLIPConfig, CLIPModel

from facesnap.pipeline import BASE_PARTS

MINI = Path(__file__).parents[1] / "assets" / "mini"
PACK = {"detector": "scrfd_10g_bnkps", "landmarks": "1k3d68", "recogniser": "glintr100"}  # antelopev2's names


def tiny_sdxl(vae_levels: int = 4, latent_channels: int = 4):
    """A FaceSnap on a tiny model of SDXL's form: 8x VAE, 4 latent channels."""
    parts = {"unet": tiny_unet(latent_channels), "vae": tiny_vae(vae_levels, latent_channels)}
    return tiny_pipeline(vae_levels, latent_channels, **parts)


def write_base(folder: Path, pipe) -> Path:
    """The base of a pipeline as SDXL's repositories have it: half precision, vocab.json and merges.txt."""
    stock = StableDiffusionXLPipeline(**{name: getattr(pipe, name) for name in BASE_PARTS}, add_watermarker=False)
    stock.save_pretrained(folder)
    for place in ("unet", "vae", "text_encoder", "text_encoder_2"):
        half(folder / place)
    for name in ("tokenizer", "tokenizer_2"):
        write_tokenizer(folder / name, getattr(pipe, name))
    return folder


def half(place: Path) -> None:
    """Rewrite a component's file as float16, under the name that a variant "fp16" has."""
    from safetensors.torch import load_file, save_file

    (file,) = place.glob("*.safetensors")
    tensors = {key: tensor.half() if tensor.is_floating_point() else tensor for key, tensor in load_file(file).items()}
    save_file(tensors, file.with_suffix(".fp16.safetensors"), metadata={"format": "pt"})
    file.unlink()


def write_tokenizer(place: Path, tokenizer) -> None:
    shutil.rmtree(place)
    place.mkdir()
    vocab = tokenizer.get_vocab()
    (place / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    (place / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    ends = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    special = {**ends, "pad_token": "!"}
    (place / "special_tokens_map.json").write_text(json.dumps(special), encoding="utf-8")
    config = {"model_max_length": tokenizer.model_max_length, "tokenizer_class": "CLIPTokenizer", **special}
    (place / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def write_clip(folder: Path, vision) -> Path:
    """The face encoder inside a whole CLIP, text model and all, as laion's repository has it."""
    config = CLIPConfig(
        vision_config=vision.config.to_dict(),
        text_config={"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1},
        projection_dim=8,
    )
    whole = CLIPModel(config)
    whole.vision_model.load_state_dict(vision.state_dict())
    whole.save_pretrained(folder)
    return folder


def write_pack(folder: Path) -> Path:
    """The mini's face pack under antelopev2's names, nested as its archive nests them."""
    nested = folder / folder.name
    nested.mkdir(parents=True)
    for ours, theirs in PACK.items():
        shutil.copyfile(MINI / "face_pack" / f"{ours}.onnx", nested / f"{theirs}.onnx")
    return folder


def put(cache: Path, repo: str, revision: str, folder: Path) -> Path:
    """Store a folder as the Hub's cache does: content under blobs, links under snapshots, a ref. → snapshot"""
    root = cache / f"models--{repo.replace('/', '--')}"
    snapshot = root / "snapshots" / (revision if revision != "main" else "f" * 40)
    (root / "blobs").mkdir(parents=True, exist_ok=True)
    for k, file in enumerate(sorted(path for path in folder.rglob("*") if path.is_file())):
        blob, link = root / "blobs" / f"{k:040x}", snapshot / file.relative_to(folder)
        shutil.copyfile(file, blob)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    (root / "refs").mkdir(exist_ok=True)
    (root / "refs" / "main").write_text(snapshot.name)
    return snapshot

"""A Hub cache made by hand, in its real layout, holding tiny models in the layouts of the public repositories."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file
from tiny import tiny_pipeline, tiny_text_encoder, tiny_unet, tiny_vae
from transformers import CLIPConfig, CLIPModel

from facesnap.folder import BASE_PARTS

MINI = Path(__file__).parents[1] / "assets" / "mini"
PACK = {"detector": "scrfd_10g_bnkps", "landmarks": "1k3d68", "recogniser": "glintr100"}  # antelopev2's names


def tiny_sdxl(vae_levels: int = 4, latent_channels: int = 4):
    """A FaceSnap on a tiny model of SDXL's form: 8x VAE, 4 latent channels."""
    parts = {
        "unet": tiny_unet(latent_channels),
        "vae": tiny_vae(vae_levels, latent_channels),
        # of different widths, as in SDXL: a single file tells them apart by it
        "text_encoder": tiny_text_encoder(8, projection=False),
        "text_encoder_2": tiny_text_encoder(24, projection=True),
    }
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


# ---------------------------------------------------------------------- one file, as SDXL was first published

IN_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
IN_UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
IN_VAE = {
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0": "mid.attn_1",
    "conv_norm_out": "norm_out",
    "conv_shortcut": "nin_shortcut",
    "downsamplers.0": "downsample",
    "upsamplers.0": "upsample",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
IN_OPEN_CLIP = {
    "encoder.layers": "transformer.resblocks",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn": "attn",
    "final_layer_norm": "ln_final",
    "embeddings.token_embedding": "token_embedding",
    "embeddings.position_embedding.weight": "positional_embedding",
}


def write_single_file(file: Path, pipe) -> Path:
    """UNet, VAE and text encoders of a pipeline in one file, under the names of SDXL's original code."""
    tensors = {f"model.diffusion_model.{_unet_name(k, pipe.unet)}": v for k, v in pipe.unet.state_dict().items()}
    for key, tensor in pipe.vae.state_dict().items():
        key = _renamed(key, IN_VAE).replace("down_blocks", "down").replace("resnets", "block")
        key = re.sub(r"up_blocks\.(\d+)", lambda m: f"up.{len(pipe.vae.decoder.up_blocks) - 1 - int(m[1])}", key)
        linear = re.search(r"attn_1\.(q|k|v|proj_out)\.weight", key)
        tensors[f"first_stage_model.{key}"] = tensor[..., None, None] if linear else tensor
    for key, tensor in pipe.text_encoder.state_dict().items():
        tensors[f"conditioner.embedders.0.transformer.text_model.{key.removeprefix('text_model.')}"] = tensor
    second = pipe.text_encoder_2.state_dict()
    open_clip = {_renamed(key.removeprefix("text_model."), IN_OPEN_CLIP): tensor for key, tensor in second.items()}
    open_clip["text_projection"] = open_clip.pop("text_projection.weight").T.contiguous()
    for key in [key for key in open_clip if ".q_proj." in key]:
        parts = [open_clip.pop(key.replace("q_proj", f"{kind}_proj")) for kind in "qkv"]
        open_clip[key.replace("q_proj.", "in_proj_")] = torch.cat(parts)
    tensors |= {f"conditioner.embedders.1.model.{key}": tensor for key, tensor in open_clip.items()}
    save_file({key: tensor.contiguous() for key, tensor in tensors.items() if "position_ids" not in key}, file)
    return file


def _renamed(key: str, names: dict[str, str]) -> str:
    for ours, theirs in names.items():
        key = re.sub(rf"(^|\.){re.escape(ours)}(\.|$)", rf"\g<1>{theirs}\g<2>", key)
    return key


def _unet_name(key: str, unet) -> str:
    layers = unet.config.layers_per_block
    place = re.fullmatch(r"(down|up|mid)_block(?:s\.(\d+))?\.(\w+)\.(\d+)\.(.+)", key)
    if place is None:
        return _renamed(key, IN_UNET)
    where, block, what, k, rest = place[1], int(place[2] or 0), place[3], int(place[4]), place[5]
    rest = _renamed(rest, IN_RESNET) if what == "resnets" else rest
    if where == "mid":
        return f"middle_block.{2 * k if what == 'resnets' else 1}.{rest}"
    if what == "downsamplers":
        return f"input_blocks.{1 + block * (layers + 1) + layers}.0.{rest.replace('conv', 'op')}"
    if what == "upsamplers":
        attends = hasattr(unet.up_blocks[block], "attentions")
        return f"output_blocks.{block * (layers + 1) + layers}.{2 if attends else 1}.{rest}"
    number = block * (layers + 1) + k + (where == "down")
    return f"{'input' if where == 'down' else 'output'}_blocks.{number}.{0 if what == 'resnets' else 1}.{rest}"

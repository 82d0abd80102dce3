"""InstantID's `ip-adapter.bin`: a resampler that makes face tokens, and the UNet's attention to them.

The attention is diffusers' own `IPAdapterAttnProcessor2_0`, put into the UNet while a portrait is made. The file is a
pickle, the only one that is opened here, and of plain tensors: whatever else it holds is refused by torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from diffusers.models.embeddings import IPAdapterPlusImageProjection
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from facesnap.errors import InputError

HEAD_WIDTH = 64  # of the resampler's attention; nothing in the file says it
IDENTITY_SCALE = 0.8  # InstantID's own default; what the caller gives multiplies it


class FaceAdapter(ModelMixin, ConfigMixin):
    """InstantID's ip-adapter.bin: the resampler, and keys and values of the UNet's decoupled attention.

    Args:
        id_dim: length of the recogniser's embedding.
        width: the resampler's own width. depth: its layers. heads: its attention heads, of 64 channels each.
        num_tokens: face tokens.
        token_dim: the UNet's cross-attention width.
        hidden_sizes: width of every cross-attention of the UNet, in the order of `unet.attn_processors`.
    """

    # the resampler's norms are not all called so, and its queries are no layer
    _skip_layerwise_casting_patterns = ["norm", "ln0", "ln1", r"ff\.0"]

    @register_to_config
    def __init__(
        self,
        id_dim: int = 512,
        width: int = 1280,
        depth: int = 4,
        heads: int = 20,
        num_tokens: int = 16,
        token_dim: int = 2048,
        hidden_sizes: tuple[int, ...] = (),
    ):
        super().__init__()
        self.resampler = IPAdapterPlusImageProjection(
            embed_dims=id_dim,
            output_dims=token_dim,
            hidden_dims=width,
            depth=depth,
            dim_head=HEAD_WIDTH,
            heads=heads,
            num_queries=num_tokens,
        )
        self.processors = nn.ModuleList(
            IPAdapterAttnProcessor2_0(hidden, token_dim, num_tokens=(num_tokens,), scale=IDENTITY_SCALE)
            for hidden in hidden_sizes
        )

    def forward(self, embeddings: Tensor) -> Tensor:
        """Raw embeddings (B, id_dim) → tokens (B, num_tokens, token_dim); zeros are nobody."""
        return self.resampler(embeddings[:, None])

    @classmethod
    def from_instantid(cls, file: str | Path, unet: UNet2DConditionModel) -> FaceAdapter:
        """Read InstantID's own file, a pickle of {"image_proj": …, "ip_adapter": …}, as plain tensors only.

        Raises:
            InputError: the file is damaged, is no such file, or was made for a UNet of another shape.
        """
        try:
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            resampler, layers = state["image_proj"], state["ip_adapter"]
            adapter = cls(**_shapes_of(resampler), hidden_sizes=_cross_attention_widths(unet))
            adapter.resampler.load_state_dict(dict(_resampler_keys(resampler)))
        except Exception as error:  # whatever a damaged or foreign pickle raises
            raise InputError(
                f"The file '{Path(file).name}' cannot be read as InstantID's ip-adapter.bin "
                f"({type(error).__name__}); fetch it again."
            ) from error
        places = cross_attentions(unet)
        wanted = {f"{place}.to_{kind}_ip.weight" for place in places for kind in "kv"}
        fits = wanted == set(layers) and all(
            layers[f"{place}.to_k_ip.weight"].shape == processor.to_k_ip[0].weight.shape
            for place, processor in zip(places, adapter.processors, strict=True)
        )
        if not fits:
            raise InputError(
                f"The file '{Path(file).name}' was made for another UNet: it has {len(layers) // 2} attention "
                f"layers, the base model {len(places)}, or of other sizes; use an SDXL base."
            )
        for place, processor in zip(places, adapter.processors, strict=True):
            for kind in "kv":
                getattr(processor, f"to_{kind}_ip")[0].weight = nn.Parameter(layers[f"{place}.to_{kind}_ip.weight"])
        return adapter.eval()


def _shapes_of(resampler: dict[str, Tensor]) -> dict[str, int]:
    """FaceAdapter's arguments, by the shapes of InstantID's resampler."""
    return {
        "id_dim": resampler["proj_in.weight"].shape[1],
        "width": resampler["latents"].shape[2],
        "depth": 1 + max(int(key.split(".")[1]) for key in resampler if key.startswith("layers.")),
        "heads": resampler["layers.0.0.to_q.weight"].shape[0] // HEAD_WIDTH,
        "num_tokens": resampler["latents"].shape[1],
        "token_dim": resampler["proj_out.weight"].shape[0],
    }


def _resampler_keys(state: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """InstantID's names → those of diffusers' IPAdapterPlusImageProjection; keys and values come apart."""
    names = {
        "0.norm1": "ln0",
        "0.norm2": "ln1",
        "0.to_q": "attn.to_q",
        "0.to_out": "attn.to_out.0",
        "1.0": "ff.0",
        "1.1": "ff.1.net.0.proj",
        "1.3": "ff.1.net.2",
    }
    for key, value in state.items():
        layer = re.fullmatch(r"(layers\.\d+)\.(\d\.\w+)\.(weight|bias)", key)
        if layer is None:
            yield key, value
        elif layer[2] == "0.to_kv":
            to_k, to_v = value.chunk(2)
            yield f"{layer[1]}.attn.to_k.weight", to_k
            yield f"{layer[1]}.attn.to_v.weight", to_v
        else:
            yield f"{layer[1]}.{names[layer[2]]}.{layer[3]}", value


def cross_attentions(unet: UNet2DConditionModel) -> dict[int, str]:
    """Place in `unet.attn_processors` → name, of those that read the text; InstantID's file counts like this."""
    return {k: name for k, name in enumerate(unet.attn_processors) if name.endswith("attn2.processor")}


def _cross_attention_widths(unet: UNet2DConditionModel) -> tuple[int, ...]:
    names = cross_attentions(unet).values()
    return tuple(unet.get_submodule(name.removesuffix(".processor")).to_k.out_features for name in names)

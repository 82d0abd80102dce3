"""The Facial Attribute Mixer: an identity embedding and CLIP features become a few face tokens.

Equations 1 and 2 of FaceSnap (arXiv 2602.00627), here for R references of one person:

    F_id   = W_id f_id                                        (B, R·n, d)   n tokens a reference
    F_clip = W_clip f_clip                                    (B, R·P, d)
    F      = CrossAttention(Q = F_id, K = V = [F_id ; F_clip])   (B, R·n, d)          (1)
    tokens = TransformerDecoder(Q = m learned queries, K = V = F)   (B, m, token_dim)     (2)

Several references are one set: their tokens are the keys and values of one attention, nothing says which
token came from which photo, and a mask hides the empty places of a batch whose rows hold different
numbers of photos. No token is averaged with another, so a good photo is not diluted by a poor one.

Ours, where the paper is silent: each projection is followed by a LayerNorm (a raw ArcFace embedding has a
norm near 20, CLIP's penultimate states have outlier channels), layers are pre-norm and residual, there is
no dropout, and `pooled` is a projection of the mean token, for the place where SDXL takes the pooled text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import Tensor, nn

Variant = Literal["full", "id", "clip", "concat"]
VARIANTS: tuple[Variant, ...] = ("full", "id", "clip", "concat")


@dataclass
class MixerOutput(BaseOutput):
    """`tokens` (B, m, token_dim) for FFRNet's cross-attention; `pooled` (B, pooled_dim) for its timestep."""

    tokens: Tensor
    pooled: Tensor | None = None  # with a default, or accelerate's offloading cannot make one anew


class Attention(nn.Module):
    """Multi-head attention of queries (B, Q, d) over a context (B, K, d); `mask` (B, K): which keys count."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(width, width, bias=False)
        self.to_v = nn.Linear(width, width, bias=False)
        self.to_out = nn.Linear(width, width)

    def forward(self, queries: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        def split(x: Tensor) -> Tensor:
            return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        hidden = F.scaled_dot_product_attention(
            split(self.to_q(queries)),
            split(self.to_k(context)),
            split(self.to_v(context)),
            attn_mask=None if mask is None else mask[:, None, None, :],
        )
        return self.to_out(hidden.transpose(1, 2).flatten(2))


class DecoderLayer(nn.Module):
    """One layer of equation 2: the queries look at each other, then at F, then think."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm_self = nn.LayerNorm(width)
        self.self_attention = Attention(width, heads)
        self.norm_cross = nn.LayerNorm(width)
        self.cross_attention = Attention(width, heads)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, queries: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        normed = self.norm_self(queries)
        queries = queries + self.self_attention(normed, normed)
        queries = queries + self.cross_attention(self.norm_cross(queries), context, mask)
        return queries + self.feed_forward(queries)


class FacialAttributeMixer(ModelMixin, ConfigMixin):
    """Face tokens from 1 to 4 references; the defaults are those for SDXL with CLIP ViT-H.

    Args:
        id_dim: length of the recogniser's embedding.
        clip_dim: channels of the face encoder's penultimate hidden states.
        width: d, the mixer's own width.
        num_id_tokens: n, tokens made of one identity embedding.
        num_tokens: m, face tokens given to FFRNet.
        depth: layers of the decoder.
        heads: attention heads; must divide `width`.
        token_dim: the UNet's cross-attention width.
        pooled_dim: length of the base model's pooled text embedding.
        variant: a row of the paper's Table 2. "full"; "id" and "clip" see one of the two inputs only;
            "concat" is one projection of both, concatenated (CLIP's tokens averaged, references averaged).
    """

    @register_to_config
    def __init__(
        self,
        id_dim: int = 512,
        clip_dim: int = 1280,
        width: int = 1280,
        num_id_tokens: int = 16,
        num_tokens: int = 16,
        depth: int = 4,
        heads: int = 20,
        token_dim: int = 2048,
        pooled_dim: int = 1280,
        variant: Variant = "full",
    ):
        super().__init__()
        if variant not in VARIANTS:
            raise ValueError(f"unknown mixer variant {variant!r}; choose one of {', '.join(VARIANTS)}")
        if width % heads:
            raise ValueError(f"the mixer's width {width} is not a multiple of its {heads} heads")

        self.norm_out = nn.LayerNorm(token_dim)
        self.to_pooled = nn.Linear(token_dim, pooled_dim)

        if variant == "concat":
            # each input is normed by itself: their scales differ by an order of magnitude
            self.norm_id = nn.LayerNorm(id_dim)
            self.norm_clip = nn.LayerNorm(clip_dim)
            self.to_tokens = nn.Linear(id_dim + clip_dim, num_tokens * token_dim)
            return

        if variant in ("full", "id"):
            self.w_id = nn.Linear(id_dim, num_id_tokens * width)
            self.norm_id = nn.LayerNorm(width)
            self.mix = Attention(width, heads)
        if variant in ("full", "clip"):
            self.w_clip = nn.Linear(clip_dim, width)
            self.norm_clip = nn.LayerNorm(width)

        self.norm_context = nn.LayerNorm(width)
        self.queries = nn.Parameter(torch.randn(1, num_tokens, width) * width**-0.5)
        self.decoder = nn.ModuleList(DecoderLayer(width, heads) for _ in range(depth))
        self.norm_decoder = nn.LayerNorm(width)
        self.w_out = nn.Linear(width, token_dim)

    def forward(self, id_embeddings: Tensor, clip_features: Tensor, mask: Tensor | None = None) -> MixerOutput:
        """Mix the references of each row.

        Args:
            id_embeddings: (B, R, id_dim), raw, not L2-normalised; zeros are the trainer's dropped identity.
            clip_features: (B, R, P, clip_dim), the face encoder's penultimate hidden states.
            mask: (B, R) bool, True where there is a reference, at least one a row; None means all.
        """
        if mask is None:
            mask = torch.ones(id_embeddings.shape[:2], dtype=torch.bool, device=id_embeddings.device)

        if self.config.variant == "concat":
            tokens = self._concat(id_embeddings, clip_features, mask)
        else:
            context, context_mask = self._context(id_embeddings, clip_features, mask)
            queries = self.queries.expand(len(context), -1, -1)
            for layer in self.decoder:
                queries = layer(queries, context, context_mask)
            tokens = self.w_out(self.norm_decoder(queries))

        tokens = self.norm_out(tokens)
        return MixerOutput(tokens=tokens, pooled=self.to_pooled(tokens.mean(dim=1)))

    def _context(self, id_embeddings: Tensor, clip_features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Equation 1: F (B, K, width), normed, and which of its rows count (B, K)."""
        variant = self.config.variant
        keys, masks = [], []
        if variant in ("full", "id"):
            n = self.config.num_id_tokens
            f_id = self.norm_id(self.w_id(id_embeddings).unflatten(-1, (n, -1)))
            keys.append(f_id.flatten(1, 2))
            masks.append(mask.repeat_interleave(n, dim=1))
        if variant in ("full", "clip"):
            f_clip = self.norm_clip(self.w_clip(clip_features))
            keys.append(f_clip.flatten(1, 2))
            masks.append(mask.repeat_interleave(clip_features.shape[2], dim=1))
        if variant == "clip":
            return self.norm_context(keys[0]), masks[0]

        mixed = keys[0] + self.mix(keys[0], torch.cat(keys, dim=1), torch.cat(masks, dim=1))
        return self.norm_context(mixed), masks[0]

    def _concat(self, id_embeddings: Tensor, clip_features: Tensor, mask: Tensor) -> Tensor:
        features = torch.cat([self.norm_id(id_embeddings), self.norm_clip(clip_features).mean(dim=2)], dim=-1)
        # `where`, not a product: what lies in an empty place may be anything, NaN included
        features = torch.where(mask[..., None], features, 0).sum(dim=1) / mask.sum(dim=1, keepdim=True)
        return self.to_tokens(features).unflatten(-1, (self.config.num_tokens, -1))

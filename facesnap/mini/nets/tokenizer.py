"""The mini's text side: a small tokenizer that knows the captions' words, and two CLIP-form text encoders.

SDXL has two text encoders, whose penultimate hidden states are concatenated; the second one's projection is the
pooled text. The mini keeps that form at small widths. A word that no caption ever used falls apart into letters:
it is read, but means nothing to the mini.
"""

import json
from collections.abc import Iterable, Sequence

import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import ByteLevel, Split
from tokenizers.pre_tokenizers import Sequence as PreSequence
from tokenizers.trainers import BpeTrainer
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

MAX_LENGTH = 48  # tokens of a prompt, both ends included
START, END = "<|startoftext|>", "<|endoftext|>"


def train_tokenizer(captions: Iterable[str]) -> CLIPTokenizer:
    """A CLIP tokenizer in which every word of the captions is one token.

    Every byte is in it too, with and without the end-of-word mark, so that nothing becomes unknown.
    """
    words = sorted({word for caption in captions for word in caption.lower().replace(",", " ").split()})
    suffix = "</w>"
    alphabet = sorted(ByteLevel.alphabet())
    model = Tokenizer(BPE(unk_token=END, end_of_word_suffix=suffix))
    model.normalizer = Lowercase()
    model.pre_tokenizer = PreSequence([Split(" ", "removed"), ByteLevel(add_prefix_space=False)])
    trainer = BpeTrainer(
        vocab_size=50_000,
        end_of_word_suffix=suffix,
        initial_alphabet=alphabet,
        special_tokens=[],
        show_progress=False,
    )
    model.train_from_iterator(words, trainer)
    merges = [tuple(merge) for merge in _merges(model)]
    vocab: dict[str, int] = {}
    for token in [*alphabet, *(a + suffix for a in alphabet), *("".join(m) for m in merges), START, END]:
        vocab.setdefault(token, len(vocab))
    # "!" pads the second encoder as in SDXL; both pad alike here
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_LENGTH, pad_token="!")


def _merges(model: Tokenizer) -> list[Sequence[str]]:
    merges = json.loads(model.to_str())["model"]["merges"]
    return [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]


def make_text_encoders(
    tokenizer: CLIPTokenizer, widths: tuple[int, int] = (64, 128), layers: tuple[int, int] = (3, 4)
) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    """The two encoders, untrained. SDXL reads the layer before the last; the last one serves the pooled text only."""

    def config(width: int, depth: int) -> CLIPTextConfig:
        return CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=width, intermediate_size=4 * width, num_hidden_layers=depth,
            num_attention_heads=width // 32, max_position_embeddings=MAX_LENGTH, projection_dim=width,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id, hidden_act="gelu",
        )  # fmt: skip

    return CLIPTextModel(config(widths[0], layers[0])), CLIPTextModelWithProjection(config(widths[1], layers[1]))


def token_ids(tokenizer: CLIPTokenizer, texts: Sequence[str]) -> Tensor:
    """(N, MAX_LENGTH) ids, padded and cut as the pipeline does it."""
    return tokenizer(
        list(texts),
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids


def encode_text(encoders: tuple[CLIPTextModel, CLIPTextModelWithProjection], ids: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states (B, n, widths' sum) and pooled text (B, width of the second), as SDXL's pipeline makes them."""
    outputs = [encoder(ids, output_hidden_states=True) for encoder in encoders]
    hidden = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
    return hidden, outputs[1].text_embeds

"""Four rendered people, three small pictures of each, and a portrait stage over features of noise."""

import numpy as np
import pytest
import torch
from tiny import tiny_vae

from facesnap.ffrnet import FFRNet
from facesnap.mini.features import Features
from facesnap.mini.joint import JointStage, make_mixer, make_pipe, make_unet
from facesnap.mini.kept import KeptConfig, KeptFeatures, Looks
from facesnap.mini.nets.tokenizer import make_text_encoders, train_tokenizer
from facesnap.synthetic.dataset import load_people
from facesnap.synthetic.shards import write_shard
from facesnap.training.portraits import PortraitStage

SIZE, GRID = 64, 4


@pytest.fixture(scope="session")
def people(tmp_path_factory):
    """Read only."""
    folder = tmp_path_factory.mktemp("people")
    write_shard((folder / "people.tar", 0, 4, 3, SIZE, False, False))
    return load_people(folder)


@pytest.fixture(scope="session")
def tokenizer(people):
    return train_tokenizer(people.prompts + people.rich)


def looks_of(people, seed: int = 0) -> Looks:
    """Of every picture a face, with an embedding and states of noise."""
    n, rng = len(people), np.random.default_rng(seed)
    features = Features(
        found=np.ones(n, bool),
        embeddings=rng.standard_normal((n, 512)).astype(np.float32),
        crops=np.zeros((n, 1, 1, 3), np.uint8),
        fitted=people.landmarks.copy(),
        points68=np.zeros((n, 68, 3), np.float32),
    )
    return Looks(features, rng.standard_normal((n, 5, 32)).astype(np.float16))


@pytest.fixture
def make_stage(people, tokenizer):
    """A function that makes a stage: `source` holds options of its samples, the others are the stage's own."""

    def make(
        *, joint: bool = False, config: dict | None = None, source: dict | None = None, **options
    ) -> PortraitStage:
        torch.manual_seed(0)
        text, text_2 = make_text_encoders(tokenizer, (32, 32), (2, 2))
        unet = make_unet(4, GRID, 64, 32, (32, 32, 32))
        ffrnet = FFRNet.from_unet(unet, vae_scale_factor=16, conditioning_embedding_out_channels=(4, 8, 8, 8, 8))
        for block in [*ffrnet.controlnet_down_blocks, ffrnet.controlnet_mid_block]:
            torch.nn.init.constant_(block.weight, 0.01)  # a new FFRNet says nothing at all
        parts = {"unet": unet, "text_encoder": text, "text_encoder_2": text_2, "tokenizer": tokenizer,
                 "mixer": make_mixer(32, 64, 32), "ffrnet": ffrnet}  # fmt: skip
        pipe = make_pipe(tiny_vae(5, 4), parts)
        latents = np.random.default_rng(1).standard_normal((len(people), 4, GRID, GRID)).astype(np.float16)
        how = KeptConfig(**{"batch_size": 4} | (config or {}))
        samples = KeptFeatures(pipe, people, latents, looks_of(people), how, sheet_rows=2, **source or {})
        return (JointStage if joint else PortraitStage)(pipe, samples, **options)

    return make

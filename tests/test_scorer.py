"""The attribute scorer's training."""

import numpy as np
import torch

from facesnap.mini.nets.scorer import RECIPE, ScorerStage, train
from facesnap.training.trainer import TrainerConfig


def test_the_scorer_learns_what_pictures_show_and_ignores_what_they_hide(tmp_path):
    """Two colours, one of them rare; of the second attribute nothing is ever visible."""
    rng = np.random.default_rng(0)
    labels = np.stack([rng.random(200) < 0.1, np.full(200, -1)], 1).astype(np.int64)
    labels[0, 1] = 0
    pictures = np.where(labels[:, :1, None, None] > 0, 200, 60) + rng.integers(0, 40, (200, 128, 128, 3))
    torch.manual_seed(0)
    stage = ScorerStage(pictures.astype(np.uint8), labels, {"a": ("dark", "light"), "b": ("x", "y")}, batch_size=16)
    one, two = (stage.batch(np.random.default_rng(3)) for _ in range(2))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert 0.25 < float((one["labels"][:, 0] == 1).float().mean()) < 0.75  # the rare one is drawn often
    net = train(stage, TrainerConfig(tmp_path, steps=60, warmup=5, **RECIPE | {"ema": 0.9}))
    with torch.no_grad():
        seen = net(torch.from_numpy(pictures[:50]).permute(0, 3, 1, 2).float() / 127.5 - 1)[:, :2].argmax(1)
    assert (seen.numpy() == labels[:50, 0]).mean() > 0.9

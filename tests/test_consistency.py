"""The consistency stage: what encoder and mixer say of a photograph becomes what they say of the render."""

import numpy as np
import pytest
import torch
from transformers import CLIPVisionModel

from facesnap.mini.augment import aligned_view, face_set
from facesnap.mini.consistency import ConsistencyStage, embeddings_of, unexplained
from facesnap.mini.joint import make_mixer
from facesnap.mini.nets.face_encoder import crops_of, make_face_encoder
from facesnap.training.trainer import Trainer, TrainerConfig


def snapshot(modules) -> dict[str, torch.Tensor]:
    return {f"{n}.{k}": v.clone() for n, m in modules.items() for k, v in m.state_dict().items()}


def make_stage(people, *, batch_size: int = 8, **options) -> ConsistencyStage:
    torch.manual_seed(0)
    encoder = CLIPVisionModel(make_face_encoder(64, 2, 32).config)
    rows = np.flatnonzero(np.array(people.styles) == "photo")
    looks = np.random.default_rng(0).standard_normal((len(rows), 2, 512)).astype(np.float32)
    return ConsistencyStage(
        encoder, make_mixer(64, 64, 32), people, rows, *crops_of(people, rows), looks, batch_size=batch_size, **options
    )


def test_consistency_starts_from_what_is_there_and_teaches_encoder_and_mixer_only(people, tmp_path) -> None:
    stage = make_stage(people, strangers=0.0)
    batch = stage.batch(np.random.default_rng(0))
    same = batch | {"photo": batch["render"], "told": batch["right"]}
    keys = ("states", "seen", "told")
    assert not any(stage.loss(same, 0, torch.Generator())[1][key] for key in keys)  # both say the same of it
    assert all(stage.loss(batch, 0, torch.Generator())[1][key] for key in keys)
    teachers = snapshot({str(i): part for i, part in enumerate(stage.teachers)})
    before = snapshot(stage.modules())
    Trainer(stage, TrainerConfig(tmp_path, steps=3, lr=1e-2, warmup=1)).train()
    after = snapshot(stage.modules())
    for name in ("face_encoder", "mixer"):
        assert any(not torch.equal(after[k], before[k]) for k in after if k.startswith(name)), name
    kept = snapshot({str(i): part for i, part in enumerate(stage.teachers)})
    assert all(torch.equal(v, teachers[k]) for k, v in kept.items())


def test_the_teacher_has_the_right_embedding_where_the_pupil_has_a_strangers(people) -> None:
    stage = make_stage(people, batch_size=40, strangers=0.5, claims=0.0)
    stage.groups = [np.arange(3)] * 40
    batch = stage.batch(np.random.default_rng(1))
    right, told = batch["right"].flatten(0, 1), batch["told"].flatten(0, 1)
    own = torch.from_numpy(stage.looks[:3])
    assert (right[:, None] == own[None, :, 0]).all(-1).any(1).all()
    foreign = (told[:, None] != own.flatten(0, 1)).any(-1).all(1).float().mean()
    assert 0.1 < foreign < 0.6  # some of the strangers are among the three
    one, two = (stage.batch(np.random.default_rng((3, 7))) for _ in range(2))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_some_embeddings_claim_another_hair_or_beard_and_nothing_else(people) -> None:
    stage = make_stage(people, strangers=0.0, claims=1.0)
    batch = stage.batch(np.random.default_rng(2))
    own = torch.from_numpy(stage.looks).flatten(0, 1)
    ways = torch.from_numpy(np.concatenate([means - means.mean(0) for _, means in stage.values]))
    moved = 0
    for told in batch["told"].flatten(0, 1):
        apart = told - own
        along = apart @ torch.linalg.pinv(ways) @ ways
        off = (apart - along).norm(dim=1) / own.norm(dim=1)
        assert off.min() < 1e-3  # of one of the looks, along what tells hair and beards apart
        moved += int(apart[off.argmin()].norm() > 1)
    assert moved > len(batch["told"]) / 2
    assert all((row == own).all(1).any() for row in batch["right"].flatten(0, 1))


def test_some_people_are_kept_to_see_what_consistency_learns(people, tmp_path) -> None:
    stage = make_stage(people)
    (kept,) = stage.held_out
    assert not np.isin(kept, np.concatenate(stage.groups)).any()
    assert len(kept) + sum(map(len, stage.groups)) == len(stage.crops)
    assert stage.sample_sheet(tmp_path) == stage.sample_sheet(tmp_path)
    assert set(stage.sample_sheet(tmp_path)) == {f"held_out_{key}" for key in ("states", "words", "seen", "told")}


def test_the_encoder_does_not_learn_to_say_what_the_recogniser_says(people) -> None:
    stage = make_stage(people)
    batch = stage.batch(np.random.default_rng(0))
    gradients = []
    for told in (batch["told"], batch["told"].flip(0) + 1):
        for part in stage.modules().values():
            part.zero_grad()
        stage.loss(batch | {"told": told}, 0, torch.Generator())[0].backward()
        gradients.append([part.clone() for part in (
            stage.encoder.embeddings.patch_embedding.weight.grad, stage.mixer.w_id.weight.grad
        )])  # fmt: skip
    (encoder, mixer), (encoder_2, mixer_2) = gradients
    assert encoder.abs().sum() > 0 and torch.equal(encoder, encoder_2) and not torch.equal(mixer, mixer_2)


def test_the_share_that_is_left_unexplained() -> None:
    wanted = torch.randn(50, 4, 6, generator=torch.Generator().manual_seed(0))
    assert unexplained(wanted, wanted) == 0
    assert unexplained(wanted.mean(0).expand_as(wanted), wanted) == pytest.approx(1)


def test_embeddings_of_renders_and_of_photographs_of_them(people) -> None:
    class Counter:
        def embed_crops(self, crops):
            return np.stack([np.full(512, crop.mean(), np.float32) for crop in crops])

    known = (people.images, people.masks, people.landmarks, people.landmarks3d, people.person, people.parameters)
    faces = face_set(*known)
    told = embeddings_of(Counter(), faces, np.array([2, 5]), looks=3)
    assert told.shape == (2, 3, 512) and (told[:, 0] != told[:, 1]).all() and (told[:, 1] != told[:, 2]).all()
    exact = aligned_view(faces, 5, np.random.default_rng(0), jitter=0.0)
    assert told[1, 0, 0] == pytest.approx(exact.mean())

"""The portrait stage over kept features: what learns, what a sample depends on, and what the losses ask for."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from tiny_people import GRID, SIZE, looks_of
from torch import nn

from facesnap.mini import portraits
from facesnap.mini.features import phi_of
from facesnap.mini.joint import WIDTHS, make_unet
from facesnap.mini.nets.recogniser import RecogniserNet
from facesnap.mini.recipe import Run
from facesnap.training.identity import IdentityConfig, IdentityLoss
from facesnap.training.losses import masked_diffusion_loss
from facesnap.training.portraits import LossConfig, feature_mask
from facesnap.training.trainer import Trainer, TrainerConfig

BASE, OURS = ("unet", "text_encoder", "text_encoder_2"), ("mixer", "ffrnet")


def weights(stage, names) -> dict[str, torch.Tensor]:
    return {f"{n}.{k}": v.clone() for n in names for k, v in getattr(stage.pipe, n).state_dict().items()}


def one_loss(stage, batch, step: int = 0, seed: int = 1):
    return stage.loss(batch, step, torch.Generator().manual_seed(seed))


def drawn(stage, seed: int = 0):
    return stage.source.batch(np.random.default_rng(seed))


def with_identity(**changes) -> dict:
    """Options of a stage with the identity loss."""
    torch.manual_seed(0)
    phi = RecogniserNet((8, 8, 8, 8, 8), (1, 1, 1, 1)).eval().requires_grad_(False)
    config = IdentityConfig("given", **{"steps": 2, "margin": 1} | changes)
    return {"identity": config, "phi": phi}


def make_identity_stage(make_stage, people, *, loss: LossConfig = LossConfig(), config=None, **changes):  # noqa: B008
    options = with_identity(**changes)
    phi = options.pop("phi")
    stage = make_stage(
        source={"phi": phi_of(phi, people, looks_of(people).features)}, loss=loss, config=config, **options
    )
    stage.identity_loss = IdentityLoss.of(stage.pipe, phi, stage.identity)
    return stage


# ---------------------------------------------------------------------------------------------- what learns


def test_the_papers_stage_leaves_the_base_alone(make_stage, tmp_path):
    stage = make_stage()
    base, ours = weights(stage, BASE), weights(stage, OURS)
    Trainer(stage, TrainerConfig(tmp_path, steps=3, lr=1e-2, warmup=1)).train()
    assert all(torch.equal(v, base[k]) for k, v in weights(stage, BASE).items())
    after = weights(stage, OURS)
    for name in OURS:
        assert any(not torch.equal(v, ours[k]) for k, v in after.items() if k.startswith(name)), name


def test_the_joint_stage_teaches_every_part_and_draws_a_sheet(make_stage, tmp_path):
    stage = make_stage(joint=True, config={"without_ffrnet": 0.5})
    before = weights(stage, BASE + OURS)
    Trainer(stage, TrainerConfig(tmp_path, steps=3, lr=1e-2, warmup=1)).train()
    after = weights(stage, BASE + OURS)
    for name in BASE + OURS:
        assert any(not torch.equal(after[k], before[k]) for k in after if k.startswith(name)), name
    assert (tmp_path / "sheet.png").stat().st_size > 0


def test_a_killed_portrait_stage_goes_on_as_if_it_had_not_been(make_stage, tmp_path):
    """The second run of two ends with the losses and weights of one that was never stopped."""
    config = {"lr": 1e-2, "warmup": 1, "steps": 4, "checkpoint_every": 1, "sheet_every": 0, "log_every": 1}
    ended = []
    for name, stops in (("whole", ()), ("parts", (2,))):
        for stop in (*stops, 4):
            stage = make_stage(joint=True, config={"without_ffrnet": 0.3})
            trainer = Trainer(stage, TrainerConfig(tmp_path / name, **config))
            for batch in itertools.islice(stage.stream(trainer.step, 0), stop - trainer.step):
                trainer.update(batch)
                trainer.checkpoint()
        ended.append((weights(stage, BASE + OURS), [v.clone() for v in trainer.average.shadow_params]))
    (whole, average), (parts, averages) = ended
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())
    assert all(torch.equal(a, b) for a, b in zip(average, averages, strict=True))


def test_kept_controls_predict_what_drawings_do_and_their_embedding_stays(make_stage, tmp_path):
    stage = make_stage(joint=True)
    embedding = stage.pipe.ffrnet.controlnet_cond_embedding
    nn.init.normal_(embedding.conv_out.weight)
    stage.source.looks.features.fitted[:] += 5  # so that exact and fitted drawings differ
    at = torch.full((4,), 500)
    with torch.no_grad():
        batch = drawn(stage)
        want = stage.predict(stage.pipe.unet, batch["latents"], at, stage.conditions(batch))
        stage.source.controls = stage.source.embed_controls(stage.pipe.ffrnet)
        kept = drawn(stage)
        got = stage.predict(stage.pipe.unet, kept["latents"], at, stage.conditions(kept))
    assert kept["control"].shape == (4, 32, GRID, GRID)
    assert (got - want).abs().max() < 0.02 * want.abs().max()  # the embeddings were made in bfloat16
    embedding.requires_grad_(False)
    before = {k: v.clone() for k, v in embedding.state_dict().items()}
    Trainer(stage, TrainerConfig(tmp_path, steps=2, lr=1e-2, warmup=1, sheet_every=0)).train()
    assert all(torch.equal(stage.pipe.ffrnet.controlnet_cond_embedding.state_dict()[k], v) for k, v in before.items())


def test_the_unet_is_as_wide_as_it_is_asked_to_be():
    for widths in (WIDTHS, (96, 128, 144)):
        assert tuple(make_unet(32, 16, 192, 128, widths).config.block_out_channels) == widths
    assert WIDTHS == (128, 192, 256)


def test_what_a_later_stage_made_goes_when_the_parts_it_began_from_change(make_stage, tmp_path):
    run = Run(tmp_path, tmp_path / "mini", tmp_path, steps=1)
    for learned in (True, False):  # the second time there is nothing left to learn
        (tmp_path / "consistency").mkdir(exist_ok=True)
        portraits.teach(run, "identity", make_stage(), 1.0, lr=1e-3)
        assert (tmp_path / "identity" / "unet").is_dir()
        assert (tmp_path / "consistency").is_dir() == (not learned)


# ----------------------------------------------------------------------------------------- what a sample is


def test_without_ffrnet_the_face_says_nothing(make_stage):
    stage = make_stage(joint=True, config={"without_ffrnet": 0.5})
    batch = drawn(stage)
    batch["ffrnet"] = torch.tensor([True, False, True, False])
    other = batch | {"embeddings": batch["embeddings"] + 1, "control": 255 - batch["control"]}

    def prediction(b):
        with torch.no_grad():
            return stage.predict(stage.pipe.unet, b["latents"], torch.full((4,), 500), stage.conditions(b))

    change = (prediction(batch) - prediction(other)).abs().amax((1, 2, 3))
    assert (change[[0, 2]] > 1e-5).all() and (change[[1, 3]] == 0).all()


def test_shares_of_samples_do_without_ffrnet_face_or_text(make_stage):
    config = {"batch_size": 400, "without_ffrnet": 0.15, "drop_face": 0.05, "drop_text": 0.1}
    stage = make_stage(joint=True, config=config)
    batch = drawn(stage)
    for name, share in (("drop_text", 0.1), ("drop_face", 0.05)):
        assert share / 2 < batch[name].float().mean() < 2 * share, name
    off = ~batch["ffrnet"]
    assert 0.08 < off.float().mean() < 0.25
    rich = torch.tensor([caption in stage.source.people.rich for caption in batch["captions"]])
    assert not rich[~off].any() and rich[off].float().mean() > 0.5  # the base hears of the face in words


def test_a_dropped_face_is_nobodys_and_has_nobody_to_resemble(make_stage, people):
    stage = make_identity_stage(make_stage, people)
    batch = drawn(stage) | {"drop_face": torch.ones(4, dtype=torch.bool)}
    tokens = stage.conditions(batch).tokens
    torch.testing.assert_close(tokens, tokens[:1].expand_as(tokens))
    assert one_loss(stage, batch)[1]["identity"] == 0


def test_references_are_other_photos_of_the_same_person(make_stage, people):
    for row, others in make_stage().source.references.items():
        assert row not in others
        assert (people.person[others] == people.person[row]).all()
        assert all(people.styles[i] == "photo" for i in others)


def test_a_batch_is_a_function_of_its_seed(make_stage):
    stage = make_stage(joint=True)
    one, two = (stage.source.batch(np.random.default_rng((3, 7))) for _ in range(2))
    assert all(torch.equal(one[k], two[k]) if isinstance(one[k], torch.Tensor) else one[k] == two[k] for k in one)


def test_half_of_the_references_are_photographed(make_stage, people):
    seen = looks_of(people, 5)
    config = {"batch_size": 64, "strangers": 0.0}
    stage = make_stage(config=config, source={"photographed": dataclasses.replace(seen, clip=seen.clip + 100)})
    batch = drawn(stage)
    one = batch["embeddings"][:, 0]
    taken = (one[:, None] == torch.from_numpy(seen.features.embeddings)).all(-1).any(1)
    assert 16 < taken.sum() < 48
    assert torch.equal(taken, batch["clip"][:, 0].float().mean((1, 2)) > 50)
    stage.source.photographed.features.found[:] = False  # nothing was found in any of them
    assert (drawn(stage)["clip"] < 50).all()


def test_of_a_set_all_but_one_may_be_hard_to_read(make_stage, people):
    """One reference alone is never spoiled: nobody could tell who is shown."""
    poor = dataclasses.replace(looks_of(people, 5), clip=looks_of(people, 5).clip + 100)
    config = {"batch_size": 64, "strangers": 0.0, "photographed": 0.0, "poor": 1.0}
    for most in (1, 2):
        sets = tuple(float(k == most - 1) for k in range(4))
        batch = drawn(make_stage(config=config | {"references": sets}, source={"poor": poor}))
        spoiled = (batch["clip"].float().mean((2, 3)) > 50) & batch["reference_mask"]
        there = batch["reference_mask"].sum(1)
        assert torch.equal(spoiled.sum(1), there - 1)
        assert there.max() == most


def test_some_references_come_with_a_strangers_embedding_and_their_own_picture(make_stage):
    found = []
    for share in (0.0, 0.3):
        stage = make_stage(config={"batch_size": 200, "strangers": share})
        found.append(drawn(stage))
    own, batch = found
    assert torch.equal(batch["clip"], own["clip"])
    there = own["reference_mask"]
    changed = (batch["embeddings"] != own["embeddings"]).any(-1)[there].float().mean()
    assert 0.15 < changed < 0.4  # a few strangers happen to be the person
    known = {row.tobytes() for row in np.asarray(stage.source.looks.features.embeddings)}
    assert all(row.tobytes() in known for row in batch["embeddings"].flatten(0, 1).numpy())


def test_pictures_with_glasses_are_drawn_more_often(make_stage, people):
    wears = {
        f"{person:07d}_{index:02d}": attributes["glasses"] != "none"
        for person, index, attributes in zip(people.person, people.index, people.attributes, strict=True)
    }
    odds = []
    for often in (1.0, 3.0):
        seen = [wears[key] for key in drawn(make_stage(config={"batch_size": 1000, "glasses": often}))["keys"]]
        odds.append(sum(seen) / (len(seen) - sum(seen)))
    assert 2.4 < odds[1] / odds[0] < 3.6


def test_processes_share_out_the_noise_levels(make_stage, monkeypatch):
    stage = make_stage(joint=True)
    batch, seen = drawn(stage), []
    predict = stage.predict

    def spy(unet, noisy, t, given):
        seen.append((noisy, t))
        return predict(unet, noisy, t, given)

    monkeypatch.setattr(stage, "predict", spy)
    for stage.rank, stage.world in ((0, 2), (1, 2)):
        one_loss(stage, batch)
    (one, early), (two, late) = seen
    levels = torch.cat([early, late]) * 8 // 1000
    assert sorted(levels.tolist()) == list(range(8))  # one in each eighth of all, whoever has it
    assert not torch.equal(one, two)


# ------------------------------------------------------------------------------------------------ the losses


def test_eyes_and_mouth_are_asked_for_more(people):
    mask = feature_mask(people.landmarks[0], (SIZE, SIZE))
    assert 0 < mask.mean() < 0.1
    for part in (slice(36, 44), slice(44, 52), slice(52, 72)):
        x, y = people.landmarks[0][part].mean(0).round().astype(int)
        assert mask[y, x] == 1
    found, wanted = torch.zeros(1, 4, 8, 8), torch.zeros(1, 4, 8, 8)
    found[..., 2, 2] = 1
    emphasis = torch.ones(1, 1, 8, 8)
    emphasis[..., 2, 2] = 3
    plain, more = (masked_diffusion_loss(found, wanted, torch.ones(1, 1, 8, 8), emphasis=e) for e in (None, emphasis))
    assert plain == pytest.approx(1 / 64) and more == pytest.approx(9 / (63 + 9))


def test_the_weight_of_eyes_and_mouth_is_an_option_of_the_stage(make_stage):
    plain, more = (make_stage(loss=LossConfig(features=f)) for f in (1.0, 3.0))
    batch = drawn(plain)
    assert not torch.equal(one_loss(plain, batch)[0], one_loss(more, batch)[0])


def test_the_identity_loss_is_added_to_the_papers_stage_and_changes_nothing_else(make_stage, people):
    plain = make_stage(source={"phi": np.zeros((len(people), 512), np.float32)})
    stage = make_identity_stage(make_stage, people, every=2, samples=3)
    batch = drawn(stage)
    with_it, told = one_loss(stage, batch, 0)
    skipped, untold = one_loss(stage, batch, 1)
    assert torch.equal(skipped, one_loss(plain, batch, 1)[0]) and "identity" not in untold
    # λ 0.5, computed at every second step: it counts twice there (equation 5)
    torch.testing.assert_close(with_it, told["masked"] + 2 * 0.5 * told["identity"])
    assert told["weight_identity"] == 1.0
    covered = batch | {"resembles": torch.zeros(4, dtype=torch.bool)}  # hats and glasses stay on
    assert one_loss(stage, covered, 0)[0] == skipped
    told["identity"].backward()
    assert stage.pipe.mixer.w_id.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in stage.pipe.unet.parameters())


def test_the_branchs_result_is_compared_with_the_true_latents_inside_the_head(make_stage, people):
    stage = make_identity_stage(make_stage, people, loss=LossConfig(branch=0.25), every=2)
    batch = drawn(stage)
    made = []
    of = stage.identity_loss.latents
    stage.identity_loss.latents = lambda *given: made.append(of(*given)) or made[-1]
    loss, logs = one_loss(stage, batch)
    torch.testing.assert_close(loss, logs["masked"] + logs["identity"] + 2 * 0.25 * logs["branch"])
    order = batch["resembles"].int().argsort(descending=True, stable=True)
    inside = batch["mask"][order] > 0.5
    near = masked_diffusion_loss(made[0], batch["latents"][order], batch["mask"][order])
    torch.testing.assert_close(logs["branch"], near)
    outside = torch.where(inside, 0.0, 7.0) * (batch["mask"][order] == 0)
    stage.identity_loss.latents = lambda *given: made[0] + outside
    torch.testing.assert_close(one_loss(stage, batch)[1]["branch"], near)  # the background is not asked for
    logs["branch"].backward()
    assert stage.pipe.mixer.w_id.weight.grad.abs().sum() > 0


def test_the_branchs_steps_are_drawn_for_each_batch_the_same_in_all_processes(make_stage, people):
    config = IdentityConfig("given", steps=2, most_steps=8)
    assert {config.draw_steps(seed) for seed in range(100)} == set(range(2, 9))
    stage = make_identity_stage(make_stage, people, steps=2, most_steps=8)
    asked = []
    stage.identity_loss.latents = lambda predict, noise, steps: asked.append(steps) or noise
    for seed, (stage.rank, stage.world) in itertools.product((1, 2, 3, 4), ((0, 2), (1, 2))):
        one_loss(stage, drawn(stage), seed=seed)
    assert asked[::2] == asked[1::2] and len(set(asked)) > 1
    with pytest.raises(ValueError, match="choose 1 to 8"):
        IdentityConfig("given", steps=4, most_steps=2)


def test_each_losses_weight_and_gradient_are_logged(make_stage, people, tmp_path):
    """The norms of the parts are those of the losses alone; where they pull together the whole's is larger."""
    stage = make_identity_stage(make_stage, people)
    config = TrainerConfig(tmp_path, steps=2, precision="fp32", gradients_every=2, sheet_every=0, lr=0.0)
    trainer = Trainer(stage, config)
    batches = [drawn(stage, 0), drawn(stage, 0)]
    first, logs = (trainer.update(batch) for batch in batches)
    assert not any(key.startswith("grad_") for key in first)
    assert logs["weight_identity"] == 0.5
    norms = {key: value for key, value in logs.items() if key.startswith("grad_")}
    assert set(norms) == {f"grad_{loss}_{module}" for loss in ("masked", "identity") for module in OURS}
    each = [sum(norms[f"grad_{loss}_{module}"] ** 2 for module in OURS) ** 0.5 for loss in ("masked", "identity")]
    assert abs(each[0] - each[1]) - 1e-4 <= logs["norm"] <= each[0] + each[1] + 1e-4
    assert all(value > 0 for value in each)

"""The mini's recipe at tiny size: what each stage may change, and what its samples depend on."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx import load as load_onnx
from onnx import save as save_onnx
from tiny import tiny_vae
from transformers import CLIPVisionModel

from facesnap.ffrnet import FFRNet
from facesnap.landmarks import eye_distance
from facesnap.mini import __main__ as command
from facesnap.mini import checkpoint, features, joint, portraits, recipe
from facesnap.mini.augment import aligned_view, face_set
from facesnap.mini.consistency import ConsistencyStage, embeddings_of, unexplained
from facesnap.mini.features import Features, head_masks, make_head_model
from facesnap.mini.joint import DiffusionStage, Parts, make_mixer, make_unet
from facesnap.mini.nets.face_encoder import (
    FaceEncoderStage,
    crops_of,
    make_face_encoder,
    named_words,
    save_face_encoder,
)
from facesnap.mini.nets.recogniser import RecogniserNet
from facesnap.mini.nets.tokenizer import encode_text, make_text_encoders, token_ids, train_tokenizer
from facesnap.synthetic import captions, sample_person, sample_picture
from facesnap.synthetic.dataset import load_people
from facesnap.synthetic.shards import write_shard
from facesnap.training.identity import IdentityConfig, IdentityLoss
from facesnap.training.trainer import Trainer, TrainerConfig, write_whole

SIZE, GRID = 64, 4


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    folder = tmp_path_factory.mktemp("people")
    write_shard((folder / "people.tar", 0, 4, 3, SIZE, False, False))
    return load_people(folder)


@pytest.fixture(scope="module")
def tokenizer(people):
    return train_tokenizer(people.prompts + people.rich)


def make_stage(people, tokenizer, *, joint: bool, **options) -> DiffusionStage:
    torch.manual_seed(0)
    text, text_2 = make_text_encoders(tokenizer, (32, 32), (2, 2))
    unet = make_unet(4, GRID, 64, 32, (32, 32, 32))
    ffrnet = FFRNet.from_unet(unet, vae_scale_factor=16, conditioning_embedding_out_channels=(4, 8, 8, 8, 8))
    parts = Parts(unet, text, text_2, tokenizer, make_mixer(32, 64, 32), ffrnet)
    n = len(people)
    rng = np.random.default_rng(0)
    features = Features(
        found=np.ones(n, bool),
        embeddings=rng.standard_normal((n, 512)).astype(np.float32),
        crops=np.zeros((n, 1, 1, 3), np.uint8),
        fitted=people.landmarks.copy(),
        points68=np.zeros((n, 68, 3), np.float32),
    )
    latents = rng.standard_normal((n, 4, GRID, GRID)).astype(np.float16)
    clip = rng.standard_normal((n, 5, 32)).astype(np.float16)
    return DiffusionStage(
        parts, people, features, latents, clip, joint=joint, batch_size=4, control_size=SIZE, **options
    )


def snapshot(modules) -> dict[str, torch.Tensor]:
    return {f"{n}.{k}": v.clone() for n, m in modules.items() for k, v in m.state_dict().items()}


def test_the_papers_stage_leaves_the_base_alone(people, tokenizer, monkeypatch, tmp_path) -> None:
    stage = make_stage(people, tokenizer, joint=False)
    base, ours = snapshot(stage.parts.base()), snapshot(stage.parts.ours())
    Trainer(stage, TrainerConfig(tmp_path, steps=3, lr=1e-2, warmup=1)).train()
    assert all(torch.equal(v, base[k]) for k, v in snapshot(stage.parts.base()).items())
    after = snapshot(stage.parts.ours())
    assert any(not torch.equal(v, ours[k]) for k, v in after.items() if k.startswith("mixer"))
    assert any(not torch.equal(v, ours[k]) for k, v in after.items() if k.startswith("ffrnet"))


def test_the_joint_stage_teaches_every_part(people, tokenizer, monkeypatch, tmp_path) -> None:
    stage = make_stage(people, tokenizer, joint=True)
    before = snapshot(stage.modules())
    Trainer(stage, TrainerConfig(tmp_path, steps=3, lr=1e-2, warmup=1)).train()
    after = snapshot(stage.modules())
    for name in stage.modules():
        assert any(not torch.equal(after[k], before[k]) for k in after if k.startswith(name)), name


def test_without_ffrnet_the_face_says_nothing(people, tokenizer, monkeypatch) -> None:
    stage = make_stage(people, tokenizer, joint=True, without_ffrnet=0.5)
    for block in [*stage.parts.ffrnet.controlnet_down_blocks, stage.parts.ffrnet.controlnet_mid_block]:
        torch.nn.init.normal_(block.weight)  # a new FFRNet says nothing at all
    batch = stage.batch(np.random.default_rng(0))
    batch["ffrnet"] = torch.tensor([True, False, True, False])
    other = batch | {"embeddings": batch["embeddings"] + 1, "control": 255 - batch["control"]}

    def prediction(b):
        with torch.no_grad():
            return stage.predict(b["latents"], torch.full((4,), 500), b, *stage.conditions(b))

    change = (prediction(batch) - prediction(other)).abs().amax((1, 2, 3))
    assert (change[[0, 2]] > 1e-4).all() and (change[[1, 3]] == 0).all()


def test_references_are_other_photos_of_the_same_person(people, tokenizer, monkeypatch) -> None:
    stage = make_stage(people, tokenizer, joint=True)
    for row, others in stage.references.items():
        assert row not in others
        assert (people.person[others] == people.person[row]).all()
        assert all(people.styles[i] == "photo" for i in others)


def test_a_batch_is_a_function_of_its_seed(people, tokenizer, monkeypatch) -> None:
    stage = make_stage(people, tokenizer, joint=True)
    one, two = (stage.batch(np.random.default_rng((3, 7))) for _ in range(2))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_kept_controls_predict_what_drawings_do_and_their_embedding_stays(people, tokenizer, monkeypatch, tmp_path):
    stage = make_stage(people, tokenizer, joint=True)
    embedding = stage.parts.ffrnet.controlnet_cond_embedding
    for block in [embedding.conv_out, *stage.parts.ffrnet.controlnet_down_blocks]:
        torch.nn.init.normal_(block.weight)
    stage.features.fitted[:] += 5  # so that exact and fitted drawings differ
    drawn = stage.batch(np.random.default_rng(0))
    with torch.no_grad():
        conditions = stage.conditions(drawn)
        want = stage.predict(drawn["latents"], torch.full((4,), 500), drawn, *conditions)
        stage.use_controls(stage.embed_controls())
        kept = stage.batch(np.random.default_rng(0))
        got = stage.predict(kept["latents"], torch.full((4,), 500), kept, *conditions)
    assert kept["control"].shape == (4, 32, GRID, GRID)
    assert (got - want).abs().max() < 0.02 * want.abs().max()  # the embeddings were made in bfloat16
    before = snapshot({"embedding": embedding})
    Trainer(stage, TrainerConfig(tmp_path, steps=3, lr=1e-2, warmup=1)).train()
    after = snapshot({"embedding": stage.parts.ffrnet.controlnet_cond_embedding})
    assert all(torch.equal(after[k], v) for k, v in before.items())


def test_masks_cover_face_and_hair_only(people) -> None:
    masks = head_masks(people, GRID)
    share = np.isin(people.masks[0], (1, 2)).mean()
    assert masks.shape == (len(people), 1, GRID, GRID)
    assert abs(float(masks[0].astype(np.float32).mean()) - share) < 0.01


def test_every_word_of_the_captions_is_one_token(tokenizer, people) -> None:
    for word in {w for text in people.prompts + people.rich for w in text.replace(",", " ").split()}:
        assert len(tokenizer(word).input_ids) == 3, word
    ids = token_ids(tokenizer, ["Zoë's 猫!", "a photo of a person"])
    assert int(ids.max()) < len(tokenizer)
    hidden, pooled = encode_text(make_text_encoders(tokenizer, (32, 64), (2, 2)), ids)
    assert hidden.shape == (2, tokenizer.model_max_length, 96) and pooled.shape == (2, 64)


def test_captions_of_the_whole_world_fit_the_tokenizer() -> None:
    texts = [c for s in range(150) for c in captions(sample_picture(sample_person(s), 1), 1)]
    tokenizer = train_tokenizer(texts)
    assert max(len(ids) for ids in tokenizer(texts).input_ids) <= tokenizer.model_max_length


def test_the_face_encoder_saved_alone_gives_the_same_features(people, tokenizer, tmp_path) -> None:
    encoder = make_face_encoder(64, 2, 32)
    _, text = make_text_encoders(tokenizer, (32, 32), (2, 2))
    stage = FaceEncoderStage(encoder, text, tokenizer, people, *crops_of(people), batch_size=4)
    batch = stage.batch(np.random.default_rng(0))
    loss, _ = stage.loss(batch, 0, torch.Generator())
    loss.backward()
    assert encoder.vision_model.embeddings.patch_embedding.weight.grad.abs().sum() > 0
    save_face_encoder(encoder, tmp_path)
    alone = CLIPVisionModel.from_pretrained(tmp_path)
    with torch.no_grad():
        one = encoder(batch["pixels"], output_hidden_states=True).hidden_states[-2]
        two = alone(batch["pixels"], output_hidden_states=True).hidden_states[-2]
    assert torch.equal(one, two)


def test_the_minis_head_knows_its_own_people() -> None:
    model = make_head_model(200, identities=30)
    from facesnap.synthetic.head import landmarks

    p = sample_person(90_000).parameters.copy()
    p["eyelids"] = 1.0
    true = landmarks(p[()])
    basis = model.identity_basis.reshape(len(model.identity_basis), -1)
    coefficients = np.linalg.lstsq(basis.T, (true - model.mean).ravel(), rcond=None)[0]
    rest = model.points(coefficients, np.zeros(len(model.expression_basis)))
    error = np.linalg.norm(rest - true, axis=1).mean()
    assert error < 0.02 * eye_distance(model.mean)


def test_half_stored_onnx_computes_the_same(tmp_path) -> None:
    weight = np.random.default_rng(0).standard_normal((16, 8)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (1, 16))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (1, 8))],
        [numpy_helper.from_array(weight, "w")],
    )
    path = tmp_path / "net.onnx"
    save_onnx(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    checkpoint.store_half(path)
    import onnxruntime

    x = np.ones((1, 16), np.float32)
    (y,) = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": x})
    assert np.allclose(y, x @ weight, atol=1e-2)
    assert load_onnx(path).graph.initializer[0].data_type == TensorProto.FLOAT16


def test_a_sample_sheet_can_be_drawn_while_training(people, tokenizer, monkeypatch, tmp_path) -> None:
    stage = make_stage(people, tokenizer, joint=True)
    with torch.autocast("cpu", torch.bfloat16):
        latents = stage.sample(stage.rows[:2], steps=2)
    assert latents.shape == (2, 4, GRID, GRID) and torch.isfinite(latents).all()


def test_training_goes_on_from_a_shipped_checkpoint(pipe, tmp_path) -> None:
    pipe.save_pretrained(tmp_path / "mini", dtype=torch.float16)
    run = recipe.Run(tmp_path / "work", tmp_path / "mini", tmp_path)
    checkpoint.unpack(run, 0)
    parts = portraits.load_parts(run.work / "start")
    for name, module in (parts.base() | parts.ours()).items():
        shipped = getattr(pipe, name).state_dict()
        assert all(v.dtype == torch.float32 for v in module.parameters()), name
        assert all(torch.allclose(v, shipped[k], atol=1e-3) for k, v in module.state_dict().items()), name
    assert (run.work / "head").is_dir() and (run.work / "vae").is_dir()


def test_the_shipped_mini_is_small_enough_to_ship() -> None:
    folder = Path(__file__).parent.parent / "assets" / "mini"
    sizes = {file: file.stat().st_size for file in folder.rglob("*") if file.is_file()}
    assert sizes, "assets/mini is missing"
    assert max(sizes.values()) < 10_000_000
    assert sum(sizes.values()) < 60_000_000


def test_the_identity_loss_is_added_to_the_papers_stage_and_changes_nothing_else(
    people, tokenizer, monkeypatch
) -> None:
    torch.manual_seed(0)
    phi = RecogniserNet((8, 8, 8, 8, 8), (1, 1, 1, 1)).eval().requires_grad_(False)
    identity = IdentityConfig("given", steps=2, every=2, samples=3)
    loss = IdentityLoss(phi, tiny_vae(5, 4), joint.make_scheduler().alphas_cumprod, "v_prediction", steps=2, margin=1)
    options = {"identity": identity, "identity_loss": loss}
    stages = [make_stage(people, tokenizer, joint=False, **more) for more in ({}, options)]
    found = joint.phi_of(phi, people, stages[1].features)
    assert np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-4)
    stages[1].phi = found
    logs = []
    for stage in stages:
        for block in [*stage.parts.ffrnet.controlnet_down_blocks, stage.parts.ffrnet.controlnet_mid_block]:
            torch.nn.init.constant_(block.weight, 0.01)
        batch = stage.batch(np.random.default_rng(0))
        logs.append([stage.loss(batch, step, torch.Generator().manual_seed(1)) for step in (0, 1)])
    (plain, _), (also_plain, _) = logs[0]
    (with_it, told), (skipped, untold) = logs[1]
    assert torch.equal(skipped, also_plain) and "identity" not in untold
    torch.testing.assert_close(with_it, plain + 0.5 * told["identity"])
    stages[1].covered[:] = True  # hats and glasses stay on
    covered = stages[1].batch(np.random.default_rng(0))
    assert not covered["bare"].any() and stages[1].loss(covered, 0, torch.Generator().manual_seed(1))[0] == plain
    stages[1].parts.mixer.zero_grad()
    told["identity"].backward()
    assert stages[1].parts.mixer.w_id.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in stages[1].parts.unet.parameters())


def test_faces_found_before_a_kill_are_kept(monkeypatch, tmp_path) -> None:
    """Each part is told once, whenever the run was cut off; what is there whole is read, not made again."""
    data, out = tmp_path / "people", tmp_path / "faces"
    data.mkdir()
    write_shard((data / "people.tar", 0, 3, 2, SIZE, False, False))
    asked: list[int] = []

    def analyse(job):
        (row,) = job[3]
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(int(row))
        crop, points = np.full((224, 224, 3), row, np.uint8), np.full((72, 2), row, np.float32)
        return [(int(row), (np.full(512, row), crop, points, np.zeros((68, 3))) if row else None)]

    monkeypatch.setattr(features, "PART", 1)
    monkeypatch.setattr(features, "_analyse", analyse)
    paths = (data, tmp_path / "pack", tmp_path / "head", out, 6)
    with pytest.raises(KeyboardInterrupt):
        features.analyse_people(*paths)
    assert asked == [0, 1] and not out.exists()
    asked.insert(0, -1)
    found = features.analyse_people(*paths)
    assert asked == [-1, 0, 1, 2, 3, 4, 5]
    assert found.found.tolist() == [False, True, True, True, True, True]
    assert (found.embeddings[:, 0] == np.arange(6)).all() and (found.crops[:, 0, 0, 0] == np.arange(6)).all()
    again = features.analyse_people(*paths)
    assert len(asked) == 7 and (again.fitted == found.fitted).all()


def test_half_of_the_references_are_photographed(people, tokenizer, monkeypatch) -> None:
    stage = make_stage(people, tokenizer, joint=False)
    stage.batch_size, stage.strangers = 64, 0.0
    changed = np.random.default_rng(1).standard_normal(stage.features.embeddings.shape).astype(np.float32)
    stage.photographed = replace(stage.features, embeddings=changed)
    stage.clip_photographed = stage.clip + 100
    batch = stage.batch(np.random.default_rng(0))
    one, all_ = batch["embeddings"][:, 0], changed[:, None].reshape(-1, 512)
    taken = (one[:, None] == torch.from_numpy(all_)).all(-1).any(1)
    assert 16 < taken.sum() < 48
    assert torch.equal(taken, batch["clip"][:, 0].mean((1, 2)) > 50)
    stage.photographed.found[:] = False  # nothing was found in any of them
    assert (stage.batch(np.random.default_rng(0))["clip"] < 50).all()


def test_some_references_come_with_a_strangers_embedding_and_their_own_picture(people, tokenizer, monkeypatch) -> None:
    stage = make_stage(people, tokenizer, joint=False)
    stage.batch_size, stage.strangers = 200, 0.0
    own = stage.batch(np.random.default_rng(0))
    stage.strangers = 0.3
    batch = stage.batch(np.random.default_rng(0))
    assert torch.equal(batch["clip"], own["clip"])
    changed = (batch["embeddings"] != own["embeddings"]).any(-1)[own["reference_mask"]].float().mean()
    assert 0.15 < changed < 0.4  # a few strangers happen to be the person
    known = {row.tobytes() for row in np.asarray(stage.features.embeddings)}
    assert all(row.tobytes() in known for row in batch["embeddings"].flatten(0, 1).numpy())


def test_the_encoder_is_asked_for_words_of_the_person(people) -> None:
    words, named = named_words(people.rich, least=0.05)
    assert named.shape == (len(people), len(words))
    hair = next(w for w in words if w.endswith(" hair"))
    for caption, own in zip(people.rich, named[:, words.index(hair)], strict=True):
        assert own == (hair in caption)
    assert not any("background" in w or "," in w for w in words)


def make_steady(people, *, batch_size: int = 8, **options) -> ConsistencyStage:
    torch.manual_seed(0)
    encoder = CLIPVisionModel(make_face_encoder(64, 2, 32).config)
    rows = np.flatnonzero(np.array(people.styles) == "photo")
    looks = np.random.default_rng(0).standard_normal((len(rows), 2, 512)).astype(np.float32)
    return ConsistencyStage(
        encoder, make_mixer(64, 64, 32), people, rows, *crops_of(people, rows), looks, batch_size=batch_size, **options
    )


def test_steadiness_starts_from_what_is_there_and_teaches_encoder_and_mixer_only(people, tmp_path) -> None:
    stage = make_steady(people, strangers=0.0)
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
    stage = make_steady(people, batch_size=40, strangers=0.5, claims=0.0)
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
    stage = make_steady(people, strangers=0.0, claims=1.0)
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


def test_some_people_are_kept_to_see_what_steadiness_learns(people, tmp_path) -> None:
    stage = make_steady(people)
    (kept,) = stage.held_out
    assert not np.isin(kept, np.concatenate(stage.groups)).any()
    assert len(kept) + sum(map(len, stage.groups)) == len(stage.crops)
    assert stage.sample_sheet(tmp_path) == stage.sample_sheet(tmp_path)
    assert set(stage.sample_sheet(tmp_path)) == {f"held_out_{key}" for key in ("states", "words", "seen", "told")}


def test_what_steadiness_learned_goes_when_the_parts_it_began_from_change(monkeypatch, tmp_path) -> None:
    run = recipe.Run(tmp_path, tmp_path / "mini", tmp_path)

    class Run(Trainer):
        def __init__(self, learns: int):
            self.step, self.learns = 0, learns
            self.accelerator = SimpleNamespace(is_main_process=True)

        def train(self):
            self.step += self.learns

        def averaged(self):
            return nullcontext()

    monkeypatch.setattr(portraits, "diffusion_stage", lambda *_, **__: None)
    monkeypatch.setattr(portraits, "save_parts", lambda parts, folder: folder.mkdir())
    for learns in (0, 1):
        (tmp_path / "consistency").mkdir(exist_ok=True)
        monkeypatch.setattr(portraits, "_trainer", lambda *_, learns=learns, **__: Run(learns))
        portraits._diffusion(run, "identity", None, 1.0, lr=1.0)
        assert (tmp_path / "identity").is_dir() and (tmp_path / "consistency").is_dir() == (not learns)


def test_a_folder_is_there_whole_or_as_it_was(tmp_path) -> None:
    def save(folder: Path) -> None:
        folder.mkdir()
        (folder / "one").write_text("new")
        raise KeyboardInterrupt

    (tmp_path / "place").mkdir()
    (tmp_path / "place" / "one").write_text("old")
    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "place", save)
    assert (tmp_path / "place" / "one").read_text() == "old"
    write_whole(tmp_path / "place", lambda folder: (folder.mkdir(), (folder / "two").write_text("new")))
    assert [file.name for file in (tmp_path / "place").iterdir()] == ["two"]
    assert [folder.name for folder in tmp_path.iterdir()] == ["place"]


def test_the_encoder_does_not_learn_to_say_what_the_recogniser_says(people) -> None:
    stage = make_steady(people)
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


def test_a_layer_learns_to_read_what_another_recogniser_says() -> None:
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    layer = torch.nn.Linear(12, 20)
    old = rng.standard_normal((400, 12)).astype(np.float32) + 3
    new = 7 * old @ np.linalg.qr(rng.standard_normal((12, 12)))[0].astype(np.float32) - 1
    wanted = layer(torch.from_numpy(old))
    left = checkpoint.refit(layer, old, new)
    assert left < 1e-3
    assert (layer(torch.from_numpy(new)) - wanted).abs().max() < 0.05 * wanted.std()
    assert checkpoint.refit(layer, rng.standard_normal((400, 12)).astype(np.float32), new) > 0.8  # a stranger to it


def test_a_budget_is_shared_by_all_that_learns_and_by_nothing_else() -> None:
    given = {stage.__name__: command.minutes_of(stage, 50, alone=False) for stage in command.ALL}
    assert sum(given.values()) == pytest.approx(50)
    assert {name for name, minutes in given.items() if not minutes} == {"people", "head", "features", "assemble"}
    assert "identity" in given  # which made what ships
    alone = command.STAGES["identity"]
    assert command.minutes_of(alone, 50, alone=True) == 50 and command.minutes_of(alone, None, alone=True) > 0
    assert command.minutes_of(command.STAGES["unpack"], 50, alone=True) == 0


def test_steps_are_for_the_stages_that_several_processes_share(tmp_path, capsys) -> None:
    for chosen in (["--stage", "vae"], ["--all"]):
        with pytest.raises(SystemExit):
            command.main([*chosen, "--work", str(tmp_path), "--steps", "5"])
        assert "--steps is for --stage joint, facesnap, identity or consistency" in capsys.readouterr().err


def test_processes_share_out_the_noise_levels(people, tokenizer, monkeypatch) -> None:
    stage = make_stage(people, tokenizer, joint=True)
    batch = stage.batch(np.random.default_rng(0))
    told = []
    predict = stage.predict
    monkeypatch.setattr(stage, "predict", lambda noisy, t, *rest: told.append((noisy, t)) or predict(noisy, t, *rest))
    for stage.rank, stage.world in ((0, 2), (1, 2)):
        stage.loss(batch, 0, torch.Generator().manual_seed(1))
    (one, early), (two, late) = told
    levels = torch.cat([early, late]) * 8 // 1000
    assert sorted(levels.tolist()) == list(range(8))  # one in each eighth of all, whoever has it
    assert not torch.equal(one, two)


def test_people_whose_seeds_are_others_are_not_rendered(tmp_path) -> None:
    with pytest.raises(ValueError, match="--people 16001: choose at most 16000"):
        command.main(["--stage", "people", "--work", str(tmp_path), "--people", "16001"])

"""The mini's recipe at tiny size: its nets, its features, and what its stages keep."""

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx import load as load_onnx
from onnx import save as save_onnx
from transformers import CLIPVisionModel

from facesnap.ffrnet import FFRNet
from facesnap.landmarks import eye_distance
from facesnap.mini import __main__ as command
from facesnap.mini import checkpoint, features, recipe
from facesnap.mini.features import head_masks, make_head_model
from facesnap.mini.joint import PARTS, load_parts, make_unet
from facesnap.mini.nets.face_encoder import (
    FaceEncoderStage,
    crops_of,
    make_face_encoder,
    named_words,
    save_face_encoder,
)
from facesnap.mini.nets.tokenizer import encode_text, make_text_encoders, token_ids, train_tokenizer
from facesnap.synthetic import captions, sample_person, sample_picture
from facesnap.synthetic.head import landmarks
from facesnap.synthetic.shards import write_shard
from facesnap.training.checkpointing import write_whole

SIZE, GRID = 64, 4


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


def test_the_encoder_is_asked_for_words_of_the_person(people) -> None:
    words, named = named_words(people.rich, least=0.05)
    assert named.shape == (len(people), len(words))
    hair = next(w for w in words if w.endswith(" hair"))
    for caption, own in zip(people.rich, named[:, words.index(hair)], strict=True):
        assert own == (hair in caption)
    assert not any("background" in w or "," in w for w in words)


def test_the_minis_head_knows_its_own_people() -> None:
    model = make_head_model(200, identities=30)
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
    x = np.ones((1, 16), np.float32)
    (y,) = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": x})
    assert np.allclose(y, x @ weight, atol=1e-2)
    assert load_onnx(path).graph.initializer[0].data_type == TensorProto.FLOAT16


def test_training_goes_on_from_a_shipped_checkpoint(pipe, tmp_path) -> None:
    pipe.save_pretrained(tmp_path / "mini", dtype=torch.float16)
    run = recipe.Run(tmp_path / "work", tmp_path / "mini", tmp_path)
    checkpoint.unpack(run, 0)
    parts = load_parts(run.work / "start")
    assert set(parts) == set(PARTS)
    for name, module in parts.items():
        if isinstance(module, torch.nn.Module):
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
    monkeypatch.setattr(features, "look_at", analyse)
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


def test_a_unet_reads_and_makes_the_latents_of_another_vae() -> None:
    """Turned latents go in and turned predictions come out, as if nothing had changed."""
    torch.manual_seed(0)
    unet = make_unet(4, GRID, 16, 8, widths=(16, 32, 32)).eval()
    ffrnet = FFRNet.from_unet(unet, vae_scale_factor=16, conditioning_embedding_out_channels=(4, 4, 4, 4, 4))
    turn = torch.linalg.qr(torch.randn(4, 4))[0]
    old = torch.randn(20, 4, GRID, GRID)
    told = {"text_embeds": torch.randn(2, 8), "time_ids": torch.zeros(2, 6)}

    def predict(latents: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return unet(latents, 500, torch.ones(2, 3, 16), added_cond_kwargs=told).sample

    expected, before = torch.einsum("dc,bchw->bdhw", turn, predict(old[:2])), ffrnet.conv_in(old)
    new = torch.einsum("dc,bchw->bdhw", turn, old)
    assert max(checkpoint.adopt_latents(unet, ffrnet, old.numpy(), new.numpy())) < 1e-6
    assert torch.allclose(predict(new[:2]), expected, atol=1e-4)
    assert torch.allclose(ffrnet.conv_in(new), before, atol=1e-4)


def test_a_unet_of_few_channels_reads_latents_of_more() -> None:
    unet = make_unet(4, GRID, 16, 8, widths=(16, 32, 32))
    ffrnet = FFRNet.from_unet(unet, vae_scale_factor=16, conditioning_embedding_out_channels=(4, 4, 4, 4, 4))
    old = np.random.default_rng(0).standard_normal((20, 4, GRID, GRID)).astype(np.float32)
    new = np.concatenate([2 * old, np.random.default_rng(1).standard_normal(old.shape).astype(np.float32)], 1)
    of_old, of_new = checkpoint.adopt_latents(unet, ffrnet, old, new)
    assert of_old < 1e-6 and of_new == pytest.approx(0.2, abs=0.05)  # four channels of variance 1 beside four of 4
    assert unet.config.in_channels == unet.config.out_channels == ffrnet.config.in_channels == 8
    assert unet.conv_in.weight.shape[1] == unet.conv_out.weight.shape[0] == 8


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


def test_a_stage_with_nothing_to_go_on_from_says_which_comes_first(tmp_path, capsys) -> None:
    with pytest.raises(SystemExit):
        command.main(["--stage", "facesnap", "--work", str(tmp_path), "--minutes", "1"])
    assert "to go on from; train stage joint there first, or unpack." in capsys.readouterr().err


def test_people_whose_seeds_are_others_are_not_rendered(tmp_path) -> None:
    with pytest.raises(ValueError, match="--people 16001: choose at most 16000"):
        command.main(["--stage", "people", "--work", str(tmp_path), "--people", "16001"])

"""The pipeline on tiny random weights: what a portrait depends on, what calls leave, what a folder holds."""

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
)
from PIL import Image
from tiny import SIZE, faceless, photo, tiny_ffrnet, tiny_pipeline, tiny_unet

from facesnap.attachment import parts_of
from facesnap.errors import InputError
from facesnap.ffrnet import attach
from facesnap.folder import BASE_PARTS
from facesnap.pipeline import LAST_CALL, FaceSnapPipeline
from facesnap.request import SCHEDULERS

ALICE, BOB = photo(1), photo(2)
ASSETS = Path(__file__).parents[1] / "assets"


def portrait(pipe, prompt="a photo", reference=ALICE, seed=0, **kwargs):
    return pipe(prompt, reference=reference, seed=seed, **kwargs)


def pixels(output, k=0):
    return np.asarray(output.images[k])


def same(a, b):
    """Equal but for rounding: tensors that lie elsewhere in memory may be summed in another order."""
    return np.abs(pixels(a).astype(int) - pixels(b)).max() <= 1


# ---------------------------------------------------------------------- what a portrait depends on


def test_portrait_says_how_it_was_made(pipe):
    out = portrait(pipe, pose=photo(2, 3), seed=7)
    assert out.images[0].size == (SIZE, SIZE)
    assert (out.seed, out.seeds, out.steps, out.guidance, out.model) == (7, (7,), 2, 2.0, "tiny")
    assert out.scheduler == "DPMSolverMultistepScheduler"
    assert out.landmarks.shape == (72, 2) and out.drawing.shape == (SIZE, SIZE, 3)
    assert out.face is out.reference_faces[0] and out.driver_face is not None
    assert len(out.identity_scores) == 1 and -1 <= out.identity_scores[0] <= 1
    assert out.notes == ()


def test_same_seed_same_picture_and_a_drawn_seed_can_be_used_again(pipe):
    first = portrait(pipe, seed=None)
    assert np.array_equal(pixels(first), pixels(portrait(pipe, seed=first.seed)))
    assert not np.array_equal(pixels(first), pixels(portrait(pipe, seed=first.seed + 1)))


def test_person_pose_and_prompt_each_change_the_picture(pipe):
    pose = photo(3)
    base = pixels(portrait(pipe, pose=pose))
    assert not np.array_equal(base, pixels(portrait(pipe, pose=pose, reference=BOB)))
    assert not np.array_equal(base, pixels(portrait(pipe, pose=photo(3, 1))))
    assert not np.array_equal(base, pixels(portrait(pipe, "a pencil sketch", pose=pose)))


def test_face_tokens_reach_the_picture_only_through_ffrnet(pipe):
    without = [pixels(portrait(pipe, reference=who, ffrnet_scale=0)) for who in (ALICE, BOB)]
    assert np.array_equal(*without)
    stock = StableDiffusionXLPipeline(**{name: getattr(pipe, name) for name in BASE_PARTS}, add_watermarker=False)
    stock.set_progress_bar_config(disable=True)
    stock.scheduler = copy.deepcopy(pipe.scheduler)
    plain = stock(
        "a photo",
        height=SIZE,
        width=SIZE,
        num_inference_steps=2,
        guidance_scale=2.0,
        generator=torch.Generator().manual_seed(0),
    )
    assert np.array_equal(without[0], np.asarray(plain.images[0]))


def test_zero_initialised_ffrnet_equals_the_base(pipe):
    fresh = FaceSnapPipeline.from_pipe(pipe, ffrnet=tiny_ffrnet(pipe.unet, zero=True))
    fresh.set_progress_bar_config(disable=True)
    assert np.array_equal(pixels(portrait(fresh)), pixels(portrait(pipe, ffrnet_scale=0)))


def test_variants_of_table_3(pipe):
    pose = photo(2)
    shots = [pixels(portrait(pipe, pose=pose, variant=v)) for v in ("predicted", "driver", "black", "none")]
    assert all(not np.array_equal(a, b) for k, a in enumerate(shots) for b in shots[:k])
    black = pixels(portrait(pipe, pose=photo(3), variant="black"))
    assert np.array_equal(black, shots[2])


def test_ffrnet_runs_once_a_step(pipe):
    rows = []
    handle = pipe.ffrnet.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    portrait(pipe, num_inference_steps=3)
    handle.remove()
    assert rows == [1, 1, 1]


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_batch_equals_one_by_one(pipe, guidance):
    prompts = ["a photo", "a sketch"]
    many = portrait(pipe, prompts, num_images_per_prompt=2, guidance_scale=guidance, output_type="np", seed=5)
    assert many.seeds == (5, 6, 7, 8)
    for k, seed in enumerate(many.seeds):
        alone = portrait(pipe, prompts[k // 2], guidance_scale=guidance, output_type="np", seed=seed)
        np.testing.assert_allclose(many.images[k], alone.images[0], atol=1e-4)


def test_any_size_of_the_vaes_grid(pipe):
    out = portrait(pipe, height=48, width=80)
    assert out.images[0].size == (80, 48) and out.size == (48, 80)


def test_four_latent_channels_and_an_8x_vae_work_the_same():
    out = portrait(tiny_pipeline(vae_levels=4, latent_channels=4), height=40, width=48)
    assert out.images[0].size == (48, 40)


# ---------------------------------------------------------------------- references and poses


def test_preview_shows_what_the_portrait_will_follow(pipe):
    preview = pipe.preview(ALICE, photo(2))
    out = portrait(pipe, pose=photo(2))
    assert np.array_equal(preview.landmarks, out.landmarks)
    assert np.array_equal(preview.drawing, out.drawing)
    assert np.array_equal(pixels(out), pixels(portrait(pipe, reference=None, preview=preview)))


def test_without_a_pose_the_references_own(pipe):
    """Held and looking as in the photo; only size and place are a portrait's."""
    own, again = (pipe.preview(ALICE, pose).landmarks for pose in (None, ALICE))
    own, again = ((points - points.mean(0)) / np.ptp(points[:, 1]) for points in (own, again))
    np.testing.assert_allclose(own, again, atol=0.01)


def test_pose_by_template_head_and_landmarks(pipe):
    from facesnap import templates

    name = templates.TEMPLATES[0].name
    by_name = pipe.preview(ALICE, name).landmarks
    by_head = pipe.preview(ALICE, templates.get(name).head(pipe.head_model, (SIZE, SIZE))).landmarks
    assert np.array_equal(by_name, by_head)
    assert np.array_equal(pipe.preview(BOB, by_name).landmarks, by_name)


def test_expression_can_be_weakened(pipe):
    strong, weak, none = (pipe.preview(ALICE, BOB, expression_strength=s).landmarks for s in (1, 0.5, 0))
    np.testing.assert_allclose(weak, (strong + none) / 2, atol=1e-3)
    assert np.abs(strong - none).max() > 0.1


def test_expressions_by_name_are_added(pipe):
    from facesnap.landmarks import GROUPS

    def mouth(**options):
        points = pipe.preview(photo(1), "front", expression="neutral", **options).landmarks
        return points[list(GROUPS["mouth"])]

    neutral, opened = mouth(), mouth(expressions={"mouth_open": 0.6})
    assert np.ptp(opened[:, 1]) > np.ptp(neutral[:, 1]) + 1
    assert np.array_equal(neutral, mouth(expressions={"mouth_open": -0.6}))  # a blend shape, never below 0
    for wrong, said in (
        ({"smirk": 0.5}, "smile"),
        ({"smile": 1.5}, "from -1 to 1"),
        ({"smile": "much"}, "a number from"),
    ):
        with pytest.raises(InputError, match=said):
            mouth(expressions=wrong)
    with pytest.raises(InputError, match="followed as they are"):
        pipe.preview(photo(1), np.zeros((72, 2)), expressions={"smile": 0.5})


def test_expression_of_the_pose_of_the_reference_or_none(pipe):
    def mouth(**options):
        return pipe.preview(ALICE, BOB, **options).landmarks

    posed, own, neutral = (mouth(expression=name) for name in ("pose", "reference", "neutral"))
    assert np.abs(posed - own).max() > 0.1 and np.abs(own - neutral).max() > 0.1
    assert np.array_equal(neutral, mouth(expression_strength=0))
    assert np.array_equal(pipe.preview(ALICE, expression="reference").landmarks, pipe.preview(ALICE).landmarks)


def test_a_pose_can_be_turned_and_resized(pipe):
    straight = pipe.preview(ALICE, "front").landmarks
    np.testing.assert_allclose(pipe.preview(ALICE, "front", yaw=-20).landmarks,
                               pipe.preview(ALICE, "quarter-left").landmarks, atol=0.5)  # fmt: skip
    half = pipe.preview(ALICE, "front", head_size=0.5).landmarks
    assert np.ptp(half[:, 1]) == pytest.approx(0.5 * np.ptp(straight[:, 1]), rel=0.02)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_samplers_by_name_work_for_this_call_only(pipe, name):
    portrait(pipe)  # transformers hooks its text encoders at their first call
    before = state(pipe)
    out = portrait(pipe, scheduler=name, num_inference_steps=3)
    assert out.scheduler == SCHEDULERS[name][0].__name__
    assert np.array_equal(pixels(out), pixels(portrait(pipe, scheduler=name, num_inference_steps=3)))
    assert state(pipe) == before


def test_what_the_user_should_know_of_a_photo(pipe):
    face = replace(pipe.analyse(ALICE), count=3, found_by="haar")
    notes = pipe.preview(face, "front").notes
    assert any("shows 3 faces; the largest was used" in note for note in notes)
    assert any("the face was hard to find, so the likeness and the pose may suffer" in note for note in notes)


def test_a_preview_brings_its_size_and_no_other(pipe):
    preview = pipe.preview(ALICE, "front", (48, 80))
    assert portrait(pipe, reference=None, preview=preview).images[0].size == (80, 48)
    with pytest.raises(InputError, match="The preview is for 80 × 48 pixels, not for 64 × 64"):
        portrait(pipe, reference=None, preview=preview, height=64, width=64)


def test_references_are_one_set_of_which_every_photo_counts(pipe):
    pose = photo(3)
    two = pixels(portrait(pipe, reference=[ALICE, photo(1, 1)], pose=pose))
    assert not np.array_equal(two, pixels(portrait(pipe, pose=pose)))
    tokens = [pipe.mix([pipe.analyse(p) for p in order]).tokens for order in ([ALICE, BOB], [BOB, ALICE])]
    torch.testing.assert_close(*tokens)


def test_analysed_faces_serve_as_references(pipe):
    face = pipe.analyse(ALICE)
    assert np.array_equal(pixels(portrait(pipe, reference=face)), pixels(portrait(pipe)))


def test_references_of_different_people_are_pointed_out(pipe):
    notes = portrait(pipe, reference=[ALICE, photo(1, 1), BOB]).notes
    assert len(notes) == 2
    assert all("and 3 may show different people" in note for note in notes)


@pytest.mark.parametrize("size", [(64, 64), (96, 64), (48, 80)])
def test_as_in_the_photo_keeps_turn_and_expression_and_the_frame_is_a_portraits(pipe, size):
    near = pipe.analyse(ALICE)
    away = np.array([*(near.landmarks[:, :2].mean(0) + [200, 300]), 0])
    far = replace(near, size=(600, 800), landmarks=(away + 0.2 * (near.landmarks - away)).astype(np.float32))
    own, front = pipe.preview(far, None, size), pipe.preview(far, "front", size, expression="reference")
    np.testing.assert_allclose(own.landmarks, pipe.preview(near, None, size).landmarks, atol=0.5)
    np.testing.assert_allclose(own.head.angles, pipe.predictor.reconstruct(near)[0].angles, atol=0.5)
    np.testing.assert_allclose(own.head.expression, front.head.expression, atol=1e-3)
    assert own.head.scale == pytest.approx(front.head.scale) and own.notes == ()
    template = pipe.preview(far, "front", size).landmarks
    assert np.abs(np.mean([own.landmarks.min(0) + own.landmarks.max(0)], 0) / 2
                  - (template.min(0) + template.max(0)) / 2).max() < 0.05 * min(size)  # fmt: skip


def test_a_pose_photo_says_size_and_place(pipe):
    near = pipe.analyse(BOB)
    corner = np.array([20, 20, 0])
    far = replace(near, landmarks=(corner + 0.5 * (near.landmarks - corner)).astype(np.float32))
    ratio = pipe.preview(ALICE, far).head.scale / pipe.preview(ALICE, near).head.scale
    assert ratio == pytest.approx(0.5, rel=0.02)


def test_what_was_turned_to_be_read_is_told_and_a_tilted_pose_stays_tilted(pipe):
    face = pipe.analyse(ALICE)
    assert pipe.preview(replace(face, turned=90), "front").notes == (
        "The reference photo lies on its side; it was read after a turn by 90° clockwise.",
    )
    assert "stands on its head" in pipe.preview(replace(face, turned=180), "front").notes[0]
    tilted = replace(face, tilt=33.0)
    (note,) = pipe.preview(tilted, "front").notes
    assert "the head is tilted by 33° to the left; it was read upright" in note
    assert pipe.preview(tilted).head.angles[2] == pytest.approx(pipe.preview(face).head.angles[2])
    assert pipe.preview(ALICE, tilted).head.angles[2] == pytest.approx(pipe.preview(ALICE, face).head.angles[2] + 33)


def test_without_a_word_the_checkpoints_own_prompt_is_used(pipe):
    assert pipe.settings.prompt == "a photo of a person"
    said = pixels(portrait(pipe, "a photo of a person"))
    for nothing in (None, "", "  "):
        assert np.array_equal(pixels(portrait(pipe, nothing)), said)
    both = portrait(pipe, ["", "a cat"]).images
    assert np.array_equal(np.asarray(both[0]), said) and not np.array_equal(np.asarray(both[1]), said)


def test_a_face_too_small_to_draw_is_pointed_out(pipe):
    far = pipe.preview(ALICE, head_size=0.5)
    assert len(far.notes) == 1 and "pixels high" in far.notes[0] and "raise the head size" in far.notes[0]
    assert pipe.preview(ALICE, head_size=1.0).notes == ()


def test_several_faces_are_pointed_out(pipe):
    assert portrait(pipe, reference=photo(1, 99)).notes == ("The reference photo shows 2 faces; the largest was used.",)


def test_words_beyond_the_prompts_limit_are_pointed_out(pipe):
    (note,) = portrait(pipe, "abcdefghijklmnopqrstuvwxyz").notes
    assert "“stuvwxyz”" in note.replace(" ", "")
    (note,) = portrait(pipe, "x" * 10_000).notes
    assert len(note) < 200


def test_identity_score_is_none_where_there_is_no_face(pipe):
    assert pipe.identity_score(Image.fromarray(faceless()), [pipe.analyse(ALICE)]) is None
    assert pipe.identity_score(ALICE, [pipe.analyse(ALICE)]) == pytest.approx(1, abs=1e-5)


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"height": 70}, "height 70 is not a multiple of 16; the nearest are 64 and 80"),
        ({"width": 100_000}, "width is 100000; choose a whole number from 16 to 4096"),
        ({"width": 64.0}, "width is 64.0; choose a whole number"),
        ({"num_inference_steps": 0}, "number of steps is 0; choose a whole number from 1 to 200"),
        ({"guidance_scale": -1}, "guidance scale is -1; choose a number from 0 to 30"),
        ({"guidance_scale": float("nan")}, "guidance scale is nan"),
        ({"identity_scale": 3}, "identity scale is 3; choose a number from 0 to 2"),
        ({"expression_strength": -0.1}, "expression strength is -0.1"),
        ({"scheduler": "Euler b"}, "no sampler 'Euler b'; choose DPM"),
        ({"num_images_per_prompt": 0}, "number of pictures for a prompt is 0"),
        ({"seed": -1}, "seed is -1; choose a whole number from 0"),
        ({"prompt": 5}, "prompt must be text"),
        ({"reference": []}, "There is no reference photo"),
        ({"reference": None}, "There is no reference photo"),
        ({"reference": [ALICE] * 5}, "5 reference photos were given; choose at most 4"),
        ({"reference": faceless()}, "The reference photo: No face"),
        ({"reference": [ALICE, faceless()]}, "Reference photo 2: No face"),
        ({"pose": faceless()}, "The pose photo: No face"),
        ({"pose": "frontal"}, "no pose template 'frontal'; did you mean 'front'"),
        ({"pose": "sideways, somehow"}, "'sideways, somehow'; choose front-close,"),
        ({"pose": "x" * 5000}, f"There is no pose template '{60 * 'x'}…'"),
        ({"pose": "pose.jpg"}, "The picture 'pose.jpg' cannot be read: give an existing image file"),
        ({"pose": np.full((72, 2), np.nan, np.float32)}, "not numbers"),
    ],
)
def test_refused_with_a_sentence(pipe, arguments, sentence):
    with pytest.raises(InputError, match=sentence):
        portrait(pipe, **arguments)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"expression": "angry"}, "no expression 'angry'; choose pose, reference or neutral"),
        ({"yaw": 90}, "yaw is 90; choose a number from -60.0 to 60.0"),
        ({"head_size": 0}, "head size is 0; choose a number from 0.5 to 2"),
        ({"pose": np.zeros((72, 2), np.float32), "roll": 5}, "followed as they are"),
    ],
)
def test_previews_are_refused_with_a_sentence(pipe, arguments, sentence):
    with pytest.raises(InputError, match=sentence):
        pipe.preview(ALICE, **arguments)


def test_empty_prompt_is_a_prompt(pipe):
    assert portrait(pipe, "").images[0].size == (SIZE, SIZE)


# ---------------------------------------------------------------------- what a call leaves behind


def state(pipe):
    """All that a request could change: attributes, configs, weights and hooks."""
    modules = {n: c for n, c in pipe.components.items() if isinstance(c, torch.nn.Module)}
    return {
        "attributes": {k: repr(v) for k, v in vars(pipe).items() if k not in (*pipe.components, *LAST_CALL)},
        "identities": {k: id(v) for k, v in pipe.components.items()},
        "scheduler": {k: repr(v) for k, v in vars(pipe.scheduler).items()},
        "weights": {n: sum(p.double().abs().sum().item() for p in m.parameters()) for n, m in modules.items()},
        "dtypes": {n: m.dtype for n, m in modules.items()},
        "hooks": [
            (n, h)
            for n, m in modules.items()
            for s in m.modules()
            for h in (*s._forward_pre_hooks.values(), *s._forward_hooks.values())
        ],
        "generator": torch.get_rng_state().sum().item(),
    }


def test_pipeline_is_untouched_after_a_call(pipe):
    before = state(pipe)
    portrait(pipe, identity_scale=0.5, landmark_scale=0.5, num_inference_steps=3)
    assert state(pipe) == before


def test_pipeline_is_untouched_after_a_call_that_failed(pipe):
    def stop(request, step, timestep, tensors):
        raise KeyboardInterrupt

    before, picture = state(pipe), pixels(portrait(pipe))
    with pytest.raises(KeyboardInterrupt):
        portrait(pipe, identity_scale=0.5, callback_on_step_end=stop)
    assert state(pipe) == before
    assert np.array_equal(picture, pixels(portrait(pipe)))


def test_a_callback_can_end_guidance_early(pipe):
    rows = []

    def end_guidance(request, step, timestep, tensors):
        request._guidance_scale = 1.0
        return {name: tensor[len(tensor) // 2 :] for name, tensor in tensors.items()}

    handle = pipe.unet.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])) if args else None)
    portrait(
        pipe,
        num_inference_steps=3,
        callback_on_step_end=end_guidance,
        callback_on_step_end_tensor_inputs=["prompt_embeds", "add_text_embeds", "add_time_ids"],
    )
    handle.remove()
    assert rows == [2, 1, 1] or rows == [2, 1]
    assert portrait(pipe).guidance == 2.0


# ---------------------------------------------------------------------- other pipelines


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_from_pipe_shares_modules_and_leaves_their_dtype_alone(pipe, dtype):
    parts = {name: copy.deepcopy(getattr(pipe, name)) for name in BASE_PARTS}
    parts["unet"].to(dtype)
    parts["vae"].to(dtype)
    source = StableDiffusionXLPipeline(**parts, add_watermarker=False)
    ours = {"mixer": pipe.mixer, "ffrnet": pipe.ffrnet, "face_encoder": pipe.face_encoder}
    made = FaceSnapPipeline.from_pipe(source, **ours)
    assert all(getattr(made, name) is part for name, part in parts.items())
    assert {n: getattr(source, n).dtype for n in ("unet", "vae", "text_encoder")} == {
        "unet": dtype,
        "vae": dtype,
        "text_encoder": torch.float32,
    }
    assert made.ffrnet.dtype == torch.float32


def test_from_pipe_takes_our_parts_from_a_checkpoint(pipe, tmp_path, tiny_readers):
    pipe.save_pretrained(tmp_path)
    source = StableDiffusionXLPipeline(**{n: getattr(pipe, n) for n in BASE_PARTS}, add_watermarker=False)
    made = FaceSnapPipeline.from_pipe(source, tmp_path)
    made.set_progress_bar_config(disable=True)
    assert made.settings == pipe.settings and made.mixer is not pipe.mixer
    assert same(portrait(made), portrait(pipe))


def conditions(pipe, size=(SIZE, SIZE)):
    preview = pipe.preview(ALICE, size=size)
    mixed = pipe.mix(preview.reference_faces)
    control = torch.from_numpy(preview.drawing).permute(2, 0, 1)[None].float() / 255
    return {"tokens": mixed.tokens, "pooled": mixed.pooled, "control": control}


@pytest.mark.parametrize(
    ("kind", "channels"),
    [
        (StableDiffusionXLImg2ImgPipeline, 4),
        (StableDiffusionXLInpaintPipeline, 4),
        (StableDiffusionXLInpaintPipeline, 9),
    ],
)
def test_stock_pipelines_follow_an_attached_ffrnet(kind, channels):
    ours = tiny_pipeline(vae_levels=4, latent_channels=4)
    unet = tiny_unet(in_channels=channels, out_channels=4)
    stock = kind(**{n: getattr(ours, n) for n in BASE_PARTS} | {"unet": unet}, add_watermarker=False)
    stock.set_progress_bar_config(disable=True)
    inputs = {"image": Image.fromarray(photo(4, size=SIZE)), "num_inference_steps": 4, "strength": 0.8}
    if kind is StableDiffusionXLInpaintPipeline:
        inputs |= {"mask_image": Image.new("L", (SIZE, SIZE), 255), "height": SIZE, "width": SIZE}

    def run():
        with torch.no_grad():
            return np.asarray(stock("a photo", **inputs, generator=torch.Generator().manual_seed(0)).images[0])

    plain = run()
    with attach(unet, ours.ffrnet, parts=lambda: parts_of(stock), **conditions(ours)):
        followed = run()
    assert not np.array_equal(plain, followed)
    assert np.array_equal(plain, run())


def test_lora_weights_load_and_unload_around_ffrnet(pipe):
    from peft import LoraConfig

    unet = copy.deepcopy(pipe.unet)
    with_lora = FaceSnapPipeline.from_pipe(pipe, unet=unet)
    with_lora.set_progress_bar_config(disable=True)
    plain = pixels(portrait(with_lora))
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    assert not np.array_equal(plain, pixels(portrait(with_lora)))
    with_lora.unload_lora_weights()
    assert np.array_equal(plain, pixels(portrait(with_lora)))


# ---------------------------------------------------------------------- folders


@pytest.fixture(scope="module")
def saved(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    pipe.save_pretrained(folder)
    return folder


def test_save_load_same_picture(pipe, saved, tiny_readers):
    again = FaceSnapPipeline.from_pretrained(saved)
    again.set_progress_bar_config(disable=True)
    assert again.settings == pipe.settings
    first, second = portrait(pipe, pose=BOB), portrait(again, pose=BOB)
    assert same(first, second)
    np.testing.assert_allclose(first.landmarks, second.landmarks, atol=1e-3)
    assert first.identity_scores == pytest.approx(second.identity_scores, abs=1e-2)


def test_stock_sdxl_loads_the_folder(pipe, saved, caplog):
    index = json.loads((saved / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionXLPipeline"
    assert not set(index) & {"mixer", "ffrnet", "face_encoder", "face_analyser", "head_model", "scorer"}
    stock = StableDiffusionXLPipeline.from_pretrained(saved)
    stock.set_progress_bar_config(disable=True)
    plain = stock(
        "a photo",
        height=SIZE,
        width=SIZE,
        num_inference_steps=2,
        guidance_scale=2.0,
        generator=torch.Generator().manual_seed(0),
    )
    assert np.array_equal(np.asarray(plain.images[0]), pixels(portrait(pipe, ffrnet_scale=0)))


def test_half_precision_files_keep_the_text_encoders_whole_and_the_pipeline_as_it_was(pipe, tmp_path, tiny_readers):
    before = state(pipe)
    pipe.save_pretrained(tmp_path, dtype=torch.float16, max_shard_size="20KB")
    assert state(pipe) == before
    assert len(list((tmp_path / "unet").glob("*.safetensors"))) > 1
    stock = StableDiffusionXLPipeline.from_pretrained(tmp_path)  # no dtype given
    assert stock.text_encoder.dtype == stock.unet.dtype == torch.float32
    again = FaceSnapPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert {again.mixer.dtype, again.ffrnet.dtype, again.face_encoder.dtype} == {torch.float32}
    difference = np.abs(pixels(portrait(again)).astype(int) - pixels(portrait(pipe)))
    assert difference.mean() < 4


def test_every_module_takes_the_dtype_asked_for(saved, tiny_readers):
    again = FaceSnapPipeline.from_pretrained(saved, torch_dtype=torch.bfloat16)
    again.set_progress_bar_config(disable=True)
    modules = [c for c in again.components.values() if isinstance(c, torch.nn.Module)]
    assert {m.dtype for m in modules} == {torch.bfloat16} and not any(m.training for m in modules)
    assert portrait(again).images[0].size == (SIZE, SIZE)


def test_half_precision_on_a_cpu_is_refused(saved, tiny_readers):
    half = FaceSnapPipeline.from_pretrained(saved, torch_dtype=torch.float16)
    with pytest.raises(InputError, match="half precision, in which a CPU is many times slower; load it with"):
        half("a photo", reference=ALICE)
    assert half.preview(ALICE).landmarks.shape == (72, 2)  # which no weights are needed for


def test_hub_ids_are_snapshotted_first(saved, tiny_readers, monkeypatch):
    asked = []
    monkeypatch.setattr("facesnap.folder.snapshot_download", lambda name: asked.append(name) or saved)
    assert FaceSnapPipeline.from_pretrained("somebody/facesnap").settings.name == "tiny"
    assert asked == ["somebody/facesnap"]


def test_missing_folder_is_named(monkeypatch):
    def offline(name):
        raise OSError("no network")

    monkeypatch.setattr("facesnap.folder.snapshot_download", offline)
    with pytest.raises(InputError, match="no folder 'assets/nowhere', and the Hub gave none"):
        FaceSnapPipeline.from_pretrained("assets/nowhere")
    with pytest.raises(InputError, match="no folder './nowhere'; give the folder"):
        FaceSnapPipeline.from_pretrained("./nowhere")


@pytest.mark.parametrize("part", ["facesnap.json", "mixer", "ffrnet", "face_pack", "head", "unet", "vae", "tokenizer"])
def test_missing_part_is_named(saved, tmp_path, tiny_readers, part):
    folder = shutil.copytree(saved, tmp_path / "copy")
    if (folder / part).is_dir():
        shutil.rmtree(folder / part)
    else:
        (folder / part).unlink()
    with pytest.raises(InputError, match="plain SDXL checkpoint" if part == "facesnap.json" else f"has no {part}"):
        FaceSnapPipeline.from_pretrained(folder)


@pytest.mark.parametrize(
    ("file", "part"),
    [
        ("mixer/diffusion_pytorch_model.safetensors", "mixer"),
        ("head/model.safetensors", "head"),
        ("face_encoder/config.json", "face_encoder"),
        ("unet/diffusion_pytorch_model.safetensors", "base model"),
        ("facesnap.json", "facesnap.json"),
    ],
)
def test_damaged_part_is_named(saved, tmp_path, tiny_readers, file, part):
    folder = shutil.copytree(saved, tmp_path / "copy")
    (folder / file).write_bytes((folder / file).read_bytes()[:100])
    with pytest.raises(InputError, match=f"The {part} of the checkpoint .* cannot be read"):
        FaceSnapPipeline.from_pretrained(folder)


def test_weights_that_lack_tensors_are_damaged(saved, tmp_path, tiny_readers):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(saved, tmp_path / "copy")
    file = folder / "ffrnet/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors.pop("controlnet_mid_block.weight")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match="ffrnet"):
        FaceSnapPipeline.from_pretrained(folder)


@pytest.mark.parametrize(("part", "tensor"), [("unet", "conv_in.bias"), ("text_encoder", "norm.bias"), ("vae", "to_q")])
def test_a_base_model_that_lacks_tensors_is_damaged(saved, tmp_path, tiny_readers, part, tensor):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(saved, tmp_path / "copy")
    (file,) = (folder / part).glob("*.safetensors")
    tensors = load_file(file)
    gone = next(key for key in tensors if tensor in key)
    tensors.pop(gone)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=f"is damaged: {part}: 1 tensors are missing.*Fetch or build it again"):
        FaceSnapPipeline.from_pretrained(folder)
    parts = {part: getattr(FaceSnapPipeline.from_pretrained(saved), part)}
    assert getattr(FaceSnapPipeline.from_pretrained(folder, **parts), part) is parts[part]  # it is not read then


def test_arguments_that_nobody_knows_are_refused(pipe):
    with pytest.raises(TypeError, match="unexpected argument 'sede'"):
        portrait(pipe, sede=3)
    with pytest.raises(TypeError, match="unexpected argument 'yaw'; give it to `preview`"):
        portrait(pipe, yaw=30)


def test_checkpoint_trained_without_ffrnet_needs_none(pipe, tmp_path, tiny_readers):
    without = tiny_pipeline(ffrnet=None)
    without.settings = replace(without.settings, variant="none")
    without.save_pretrained(tmp_path)
    again = FaceSnapPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert again.ffrnet is None
    assert same(portrait(again), portrait(pipe, variant="none"))


def test_saving_over_the_folder_it_came_from(saved, tmp_path, tiny_readers):
    folder = shutil.copytree(saved, tmp_path / "copy")
    again = FaceSnapPipeline.from_pretrained(folder)
    again.settings = replace(again.settings, steps=3)
    again.save_pretrained(folder)
    assert FaceSnapPipeline.from_pretrained(folder).settings.steps == 3


def test_scorer_may_be_absent(saved, tmp_path, tiny_readers):
    folder = shutil.copytree(saved, tmp_path / "copy")
    shutil.rmtree(folder / "scorer")
    again = FaceSnapPipeline.from_pretrained(folder)
    again.set_progress_bar_config(disable=True)
    assert portrait(again).identity_scores == ()


# ---------------------------------------------------------------------- the mini


@pytest.fixture(scope="module")
def mini():
    if not (ASSETS / "mini" / "facesnap.json").is_file():
        pytest.skip("assets/mini is not built yet")
    pipe = FaceSnapPipeline.from_pretrained(ASSETS / "mini")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_the_mini_comes_back_from_a_folder_pack_and_head_included(mini, tmp_path):
    reference = min((ASSETS / "examples").glob("*.png"))
    mini.save_pretrained(tmp_path, max_shard_size="9MB")
    again = FaceSnapPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    made = [
        portrait(p, "a photo of a person", reference=reference, pose="quarter-left", num_inference_steps=2)
        for p in (mini, again)
    ]
    assert same(*made)
    assert np.array_equal(made[0].face.embedding, made[1].face.embedding)
    np.testing.assert_allclose(made[0].landmarks, made[1].landmarks, atol=1e-3)
    assert made[0].identity_scores == pytest.approx(made[1].identity_scores, abs=1e-2)


def test_the_mini_refuses_a_picture_without_a_face(mini):
    with pytest.raises(InputError, match="The reference photo: No face was found"):
        mini.preview(np.full((256, 256, 3), 127, np.uint8))


def test_the_face_encoder_is_shown_as_much_colour_as_the_checkpoint_says(pipe, monkeypatch):
    face = pipe.analyse(ALICE)
    gray = replace(face, crop=np.repeat(np.round(face.crop @ [0.299, 0.587, 0.114])[..., None], 3, -1).astype(np.uint8))
    states = {}
    for saturation in (1.0, 0.5, 0.0):
        monkeypatch.setattr(pipe, "settings", replace(pipe.settings, saturation=saturation))
        states[saturation] = [pipe.encode_faces([one])[1] for one in (face, gray)]
    apart = [float((coloured - pale).abs().max()) for coloured, pale in states.values()]
    assert apart[0] > apart[1] > apart[2] and apart[2] < 0.05 * apart[0]

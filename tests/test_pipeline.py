"""The pipeline on tiny random weights: what a portrait depends on."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import (
    StableDiffusionXLPipeline,
)
from PIL import Image
from portraits import ALICE, BOB, pixels, plain, portrait, state
from tiny import SIZE, faceless, photo, tiny_ffrnet, tiny_pipeline

from facesnap.errors import InputError
from facesnap.folder import BASE_PARTS
from facesnap.geometry import in_crop
from facesnap.pipeline import FaceSnapPipeline
from facesnap.request import SCHEDULERS


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
    stock.scheduler = copy.deepcopy(pipe.scheduler)
    assert np.array_equal(without[0], plain(stock))


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


# references and poses -----------------------------------------------------------------------------------


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


def test_the_identity_score_reads_each_face_where_its_crop_has_it(pipe, monkeypatch):
    face, seen = pipe.analyse(ALICE), []
    monkeypatch.setattr(pipe.scorer, "embed", lambda image, points: seen.append((image, points)) or np.ones(4))
    pipe.identity_score(ALICE, [face])
    for image, points in seen:
        assert image.shape == (224, 224, 3) and np.array_equal(points, in_crop(face.keypoints, face.box))

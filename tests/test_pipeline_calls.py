"""What a call refuses and leaves behind, and other pipelines that share its parts."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import (
    StableDiffusionXLPipeline,
)
from portraits import ALICE, STOCK_KINDS, pixels, portrait, same, state, stock_beside
from tiny import SIZE, faceless, tiny_pipeline

from facesnap.attachment import parts_of
from facesnap.errors import InputError
from facesnap.ffrnet import attach
from facesnap.folder import BASE_PARTS
from facesnap.landmarks import to_68
from facesnap.pipeline import FaceSnapPipeline

# refusals -----------------------------------------------------------------------------------------------


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
        ({"pose": np.full((72, 2), "x")}, "not numbers"),
        ({"pose": np.zeros((72, 3))}, "an array of 72 × 3: landmarks are 72 points"),
        ({"pose": np.zeros((5, 2))}, "an array of 5 × 2"),
        ({"pose": np.full((72, 2), 500.0)}, "No landmark of the pose lies in the portrait of 64 × 64 pixels"),
        ({"generator": 5}, "generator must be a torch.Generator"),
        ({"ip_adapter_image": ALICE}, "no IP-Adapter to read the ip_adapter_image: load_ip_adapter"),
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
        ({"size": 64}, "The size is 64; it must be two whole numbers"),
        ({"size": "64"}, "The size is 64; it must be two whole numbers"),
        ({"size": 0}, "The size is 0; it must be two whole numbers"),
        ({"size": np.array([64, 64])}, "it must be two whole numbers"),
        ({"expressions": ["smile"]}, "must be names with weights"),
        ({"pose": np.zeros((72, 2), np.float32), "roll": 5}, "followed as they are"),
    ],
)
def test_previews_are_refused_with_a_sentence(pipe, arguments, sentence):
    with pytest.raises(InputError, match=sentence):
        pipe.preview(ALICE, **arguments)


def test_a_head_of_another_model_is_refused(pipe):
    head = pipe.preview(ALICE).head
    with pytest.raises(InputError, match="head of another head model: it has .* 9 of expression"):
        pipe.preview(ALICE, replace(head, expression=np.zeros(9)), expression="reference")


def test_ibugs_68_points_are_landmarks_too(pipe):
    points = np.random.default_rng(0).integers(0, SIZE, (68, 2))
    found = pipe.preview(ALICE, points).landmarks
    assert found.shape == (72, 2) and np.array_equal(to_68(found), points)


def test_empty_prompt_is_a_prompt(pipe):
    assert portrait(pipe, "").images[0].size == (SIZE, SIZE)


# what a call leaves behind ------------------------------------------------------------------------------


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


# other pipelines ----------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(("kind", "channels"), STOCK_KINDS)
def test_stock_pipelines_follow_an_attached_ffrnet(kind, channels):
    ours = tiny_pipeline(vae_levels=4, latent_channels=4)
    stock, run = stock_beside(ours, kind, channels)
    plain = run()
    with attach(stock.unet, ours.ffrnet, parts=lambda: parts_of(stock), **conditions(ours)):
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

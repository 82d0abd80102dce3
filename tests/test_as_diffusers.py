"""The pipeline as diffusers' users call it: schedulers, outputs, offloading, interrupts, and parts that are missing."""

import inspect
import shutil

import accelerate
import numpy as np
import pytest
import torch
from accelerate.utils import send_to_device
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionXLPipeline,
)
from safetensors.torch import save_file
from tiny import photo, tiny_pipeline

from facesnap import checkpoints
from facesnap.checkpoints.plans import MINI
from facesnap.errors import InputError
from facesnap.faces import FaceAnalyser
from facesnap.folder import BASE_CLASSES, BASE_PARTS, WEIGHTS, Settings
from facesnap.mixer import MixerOutput
from facesnap.pipeline import FaceSnapPipeline
from facesnap.request import SCHEDULERS, Request
from facesnap.speed import Speed

ALICE = photo(1)


def portrait(pipe, **how):
    return pipe("a photo", reference=ALICE, **{"seed": 0, "num_inference_steps": 3, "score": False} | how)


# ---------------------------------------------------------------------- schedulers


@pytest.mark.parametrize("kind", [DDIMScheduler, DDPMScheduler])
def test_latents_are_not_clipped_as_if_they_were_pictures(pipe, kind):
    """diffusers' default for both clips at ±1: a fifth of the mini's latents lie beyond, and portraits turn gray."""
    made = [
        portrait(FaceSnapPipeline.from_pipe(pipe, scheduler=kind(clip_sample=clip)), output_type="latent").images
        for clip in (True, False)
    ]
    assert torch.equal(*made) and made[0].abs().max() > 1


def test_no_scheduler_that_fits_clips(pipe):
    arguments = {name: None for name in inspect.signature(Request.of).parameters} | dict.fromkeys(
        ("identity_scale", "landmark_scale", "ffrnet_scale"), 1.0
    )
    arguments |= {"settings": pipe.settings, "prompt": "a photo", "size": (64, 64), "stock": {}}
    arguments["num_inference_steps"] = 8
    own = [kind() for kind in pipe.scheduler.compatibles if kind is not EDMEulerScheduler]
    for scheduler, name in [(made, None) for made in own] + [(pipe.scheduler, name) for name in SCHEDULERS]:
        request = Request.of(**arguments | {"own_scheduler": scheduler, "scheduler": name})
        assert not getattr(request.scheduler.config, "clip_sample", False), scheduler
    assert request.speed == Speed()


@pytest.mark.parametrize("kind", [EDMEulerScheduler, FlowMatchEulerDiscreteScheduler])
def test_schedulers_of_another_kind_of_noise_are_refused(pipe, kind):
    with pytest.raises(InputError, match=f"{kind.__name__} is for models that were trained with another kind of noise"):
        portrait(FaceSnapPipeline.from_pipe(pipe, scheduler=kind()))


@pytest.mark.parametrize(("kind", "fewest"), [(PNDMScheduler, 8), (KDPM2AncestralDiscreteScheduler, 6)])
def test_schedulers_that_need_more_steps_say_so(pipe, kind, fewest):
    ours = FaceSnapPipeline.from_pipe(pipe, scheduler=kind.from_config(pipe.scheduler.config))
    with pytest.raises(InputError, match=f"{kind.__name__} makes good pictures from {fewest} steps on, and 4 are"):
        portrait(ours, num_inference_steps=4)
    assert portrait(ours, num_inference_steps=fewest).steps == fewest


def test_steps_are_those_that_were_made(pipe):
    assert portrait(pipe, timesteps=[900, 500, 100, 10], num_inference_steps=None).steps == 4


# ---------------------------------------------------------------------- what comes back


def test_the_output_is_diffusers_own_kind(pipe):
    out = portrait(pipe, output_type="np")
    assert out[0] is out.images and out["images"] is out.images and out.to_tuple()[0] is out.images
    (images,) = portrait(pipe, output_type="np", return_dict=False)
    assert np.array_equal(images, out.images)


def test_the_signature_names_every_argument():
    known = inspect.signature(FaceSnapPipeline.__call__).parameters
    assert {"reference", "negative_prompt", "callback_on_step_end", "ip_adapter_image", "generator"} <= known.keys()
    assert not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in known.values())


def test_what_the_last_call_was_can_be_asked(pipe):
    portrait(pipe, guidance_scale=3.5)
    assert (pipe.num_timesteps, pipe.guidance_scale, pipe.clip_skip) == (3, 3.5, None)


def test_a_call_can_be_interrupted_from_outside():
    ours, calls = tiny_pipeline(), []
    ours.unet.register_forward_pre_hook(lambda *_: calls.append(1))

    def stop(request, step, timestep, tensors):
        ours._interrupt = True  # as another thread would
        return {}

    portrait(ours, callback_on_step_end=stop)
    assert len(calls) == 1
    portrait(ours)
    assert len(calls) == 4  # the next call is not cut short


def test_accelerate_can_move_face_tokens():
    moved = send_to_device(MixerOutput(tokens=torch.ones(1, 2, 3), pooled=torch.ones(1, 3)), "cpu")
    assert moved.tokens.shape == (1, 2, 3) and moved.pooled.shape == (1, 3)


# ---------------------------------------------------------------------- offloading


def test_layer_by_layer_it_is_the_same_portrait(pipe, monkeypatch):
    """The CPU in the GPU's place; accelerate takes its weights for others once it is called "cpu:0"."""
    put = accelerate.hooks.set_module_tensor_to_device
    on_cpu = lambda module, name, device, **how: put(module, name, "meta" if device == "meta" else "cpu", **how)  # noqa: E731
    monkeypatch.setattr(accelerate.hooks, "set_module_tensor_to_device", on_cpu)
    ours = tiny_pipeline()
    ours.enable_sequential_cpu_offload(device="cpu")
    assert {part.device.type for part in ours.components.values() if isinstance(part, torch.nn.Module)} == {"meta"}
    assert np.array_equal(portrait(ours, output_type="np").images, portrait(pipe, output_type="np").images)


@pytest.mark.parametrize("groups", [{"offload_type": "leaf_level"}, {"num_blocks_per_group": 1}])
def test_groups_of_all_parts_go_to_one_folder(pipe, tmp_path, groups):
    ours = tiny_pipeline()
    ours.enable_group_offload("cpu", offload_to_disk_path=str(tmp_path), exclude_modules="vae", **groups)
    assert {folder.name for folder in tmp_path.iterdir()} == {*BASE_CLASSES, *WEIGHTS} - {"vae"}
    expected = portrait(pipe, output_type="np").images
    np.testing.assert_allclose(portrait(ours, output_type="np").images, expected, atol=1e-5)
    with pytest.raises(InputError, match="holds some already, maybe of another model; empty it first"):
        tiny_pipeline().enable_group_offload("cpu", offload_to_disk_path=str(tmp_path), **groups)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a file; give a folder"):
        tiny_pipeline().enable_group_offload("cpu", offload_to_disk_path=str(tmp_path / "file"), **groups)


# ---------------------------------------------------------------------- parts


def stock_of(ours):
    return StableDiffusionXLPipeline(**{name: getattr(ours, name) for name in BASE_PARTS}, add_watermarker=False)


def test_a_pipeline_without_our_parts_says_what_it_lacks(pipe):
    bare = FaceSnapPipeline.from_pipe(stock_of(pipe))
    for part in ("head_model", "face_analyser", "face_encoder", "mixer", "ffrnet"):
        with pytest.raises(InputError, match=f"has no {part}: give `from_pipe` a FaceSnap checkpoint as its model"):
            portrait(bare)
        bare.register_modules(**{part: getattr(pipe, part)})
    assert portrait(bare).images


def test_a_call_with_an_output_type_that_there_is_not(pipe):
    with pytest.raises(InputError, match="There is no output type 'numpy'; choose pil, np, pt, latent"):
        portrait(pipe, output_type="numpy")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"timesteps": []}, "must be a list, of one number at least"),
        ({"sigmas": 5}, "must be a list, of one number at least"),
        ({"scheduler": DDIMScheduler()}, "chosen by its name, not by a DDIMScheduler"),
    ],
)
def test_arguments_of_a_wrong_kind_are_refused_in_words(pipe, arguments, said):
    with pytest.raises(InputError, match=said):
        portrait(pipe, **arguments)


def test_a_pipeline_without_a_unet_says_so(pipe, tmp_path, tiny_readers):
    pipe.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="has no unet"):
        portrait(FaceSnapPipeline.from_pretrained(tmp_path, unet=None))
    with pytest.raises(InputError, match="this str has no unet"), pipe.attached_to("words", photo(1)):
        pass


def test_embeddings_that_are_no_tensor_are_refused_in_words(pipe):
    with pytest.raises(InputError, match="prompt_embeds must be a tensor, not int"):
        pipe(reference=photo(1), prompt_embeds=5)


def test_photos_are_scored_against_photos_and_never_against_nothing(pipe):
    picture = portrait(pipe).images[0]
    photos, faces = ([photo(1), photo(2)], [pipe.analyse(photo(1)), pipe.analyse(photo(2))])
    assert pipe.identity_score(picture, photos) == pipe.identity_score(picture, faces)
    assert pipe.identity_score(picture, photos[0]) == pipe.identity_score(picture, faces[0])
    with pytest.raises(InputError, match="no reference to compare with"):
        pipe.identity_score(picture, [])
    with pytest.raises(InputError, match="'no.png' cannot be read"):  # and is no picture without a face
        pipe.identity_score("no.png", faces)
    for part in ("scorer", "face_analyser"):
        bare = FaceSnapPipeline.from_pipe(pipe, **{part: None})
        assert bare("a photo", reference=faces, num_inference_steps=1).identity_scores == ()
        with pytest.raises(InputError, match=f"has no {part}"):
            bare.identity_score(picture, faces)


def test_a_pipeline_of_the_same_components_has_the_same_settings(pipe):
    assert FaceSnapPipeline(**pipe.components).settings == pipe.settings != Settings()
    assert FaceSnapPipeline.from_pipe(stock_of(pipe), **pipe.components).settings == pipe.settings


@pytest.mark.parametrize("other", [None, "runwayml", torch.nn.Linear(1, 1)])
def test_from_pipe_of_what_is_no_sdxl_pipeline_says_what_it_lacks(other):
    with pytest.raises(InputError, match=f"takes an SDXL pipeline; this {type(other).__name__} has no vae"):
        FaceSnapPipeline.from_pipe(other)


@pytest.mark.parametrize(
    ("part", "kind"), [("mixer", "module"), ("vae", "module"), ("scorer", "'embed'"), ("scheduler", "'set_timesteps'")]
)
def test_components_of_a_wrong_kind_are_named(pipe, part, kind):
    with pytest.raises(InputError, match=f"The {part} must .*{kind}"):
        FaceSnapPipeline.from_pipe(pipe, **{part: 3})


def test_components_are_not_given_as_paths(pipe, tmp_path, tiny_readers):
    pipe.save_pretrained(tmp_path)
    for name in ("head_model", "vae"):
        with pytest.raises(InputError, match=f"The {name} was given as a path; load it first"):
            FaceSnapPipeline.from_pretrained(tmp_path, **{name: str(tmp_path / "head")})
        with pytest.raises(InputError, match=f"The {name} was given as a path; load it first"):
            FaceSnapPipeline.from_pipe(pipe, **{name: tmp_path / "head"})


def test_nothing_is_watermarked_unless_asked_for(pipe, tmp_path, tiny_readers):
    """diffusers' own switches on with the library; it cannot mark landscapes below 256² and speckles small pictures."""
    marking = StableDiffusionXLPipeline(**{name: getattr(pipe, name) for name in BASE_PARTS}, add_watermarker=True)
    pipe.save_pretrained(tmp_path)
    assert FaceSnapPipeline.from_pipe(marking).watermark is None
    assert FaceSnapPipeline.from_pretrained(tmp_path).watermark is None
    assert FaceSnapPipeline.from_pretrained(tmp_path, add_watermarker=True).watermark is not None
    assert FaceSnapPipeline.from_pipe(marking, add_watermarker=True).watermark is not None


def test_a_lora_of_another_architecture_is_refused(tmp_path):
    weights = {f"transformer.blocks.0.attn.to_q.lora_{k}.weight": torch.zeros(2, 2) for k in "AB"}
    save_file(weights, tmp_path / "flux.safetensors")
    with pytest.raises(InputError, match="The LoRA 'flux.safetensors' does not fit this base model"):
        checkpoints.load("mini", lora=tmp_path, device="cpu")


def test_brackets_in_a_path_are_no_pattern(tmp_path):
    pack = shutil.copytree(MINI / "face_pack", tmp_path / "a[b]" / "pack[1]")
    assert FaceAnalyser(pack).pack_dir == pack

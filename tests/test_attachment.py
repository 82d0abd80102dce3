"""One UNet, many who use it: threads, callbacks, twins, and stock pipelines with batches of their own."""

import threading

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPAGPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from tiny import SIZE, photo, tiny_pipeline
from tiny_instantid import tiny_instantid

from facesnap.attachment import GUIDED, Cadence, alone_with
from facesnap.errors import InputError
from facesnap.folder import BASE_PARTS
from facesnap.instantid import attach
from facesnap.pipeline import FaceSnapPipeline

ALICE, BOB = photo(1), photo(2)


@pytest.fixture(scope="module")
def instantid(tmp_path_factory):
    return tiny_instantid(tmp_path_factory.mktemp("InstantID"))


def latents(pipe, reference=ALICE, **how):
    how = {"seed": 4, "num_inference_steps": 3, "output_type": "latent", "score": False} | how
    return pipe("a photo", reference=reference, **how).images


def stock(ours, kind=StableDiffusionXLPipeline, **how):
    made = kind(**{name: getattr(ours, name) for name in BASE_PARTS}, add_watermarker=False, **how)
    made.set_progress_bar_config(disable=True)
    return made


def run(pipeline, **how):
    how = {
        "num_inference_steps": 3,
        "height": SIZE,
        "width": SIZE,
        "guidance_scale": 3.0,
        "output_type": "latent",
    } | how
    with torch.no_grad():
        return pipeline("a photo", generator=torch.Generator().manual_seed(4), **how).images


def unet_calls(unet, seen):
    """Note the arguments of every call as `attach` leaves them."""
    return unet.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)


# ---------------------------------------------------------------------- one at a time


def test_landmarks_of_another_size_than_the_pictures_are_refused_in_words(pipe, instantid):
    for ours in (pipe, instantid):
        side, other = ours.settings.size, stock(ours)
        said = f"drawn for {side} × {side} pixels, and the picture has {side} × {2 * side}: give its"
        with pytest.raises(InputError, match=said), ours.attached_to(other, ALICE):
            run(other, height=2 * side, width=side)


@pytest.mark.parametrize("twin", [False, True])
def test_portraits_of_two_threads_are_those_made_alone(pipe, twin):
    other = FaceSnapPipeline.from_pipe(pipe) if twin else pipe
    other.set_progress_bar_config(disable=True)
    bobs = {"reference": BOB, "identity_scale": 0.5, "landmark_scale": 1.5}
    alone = latents(pipe), latents(other, **bobs)
    begun, made = threading.Event(), []

    def second():
        made.append(latents(other, callback_on_step_end=lambda *_: begun.set() or {}, **bobs))

    thread = threading.Thread(target=second)

    def let_the_other_begin(request, step, timestep, tensors):
        if step == 0:
            thread.start()
            begun.wait(0.3)  # which it never does while this one is at work
        return {}

    first = latents(pipe, callback_on_step_end=let_the_other_begin)
    thread.join()
    assert torch.equal(first, alone[0]) and torch.equal(made[0], alone[1])


@pytest.mark.parametrize("twin", [False, True])
def test_a_portrait_from_within_a_portrait_is_refused_in_words(pipe, twin):
    other = FaceSnapPipeline.from_pipe(pipe) if twin else pipe
    before = latents(pipe)

    def another(request, step, timestep, tensors):
        return latents(other, BOB)

    with pytest.raises(RuntimeError, match="This UNet is making a picture already, in this very thread"):
        latents(pipe, callback_on_step_end=another)
    with pipe.attached_to(stock(pipe), ALICE, "front"), pytest.raises(RuntimeError, match="making a picture already"):
        latents(other, BOB)
    assert torch.equal(before, latents(pipe))  # and nobody is locked out


def test_a_stock_pipeline_of_another_thread_is_refused_rather_than_given_the_face(pipe):
    other, said = stock(pipe), []
    before, own = run(other), latents(pipe)

    def beside():
        with pytest.raises(RuntimeError) as error:
            run(other)
        said.append(str(error.value))

    def let_it_try(request, step, timestep, tensors):
        if step == 0:
            thread = threading.Thread(target=beside)
            thread.start()
            thread.join()
        return {}

    assert torch.equal(latents(pipe, callback_on_step_end=let_it_try), own)
    assert said and said[0].startswith("This UNet is making a portrait in another thread")
    assert torch.equal(run(other), before)


def test_other_modules_are_nobodys_business():
    first, second = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    with alone_with(first, None), alone_with(second):
        with pytest.raises(RuntimeError), alone_with(second, torch.nn.Linear(1, 1)):
            pass
    with alone_with(first, second):
        pass


# ---------------------------------------------------------------------- other pipelines


@pytest.mark.parametrize("rest", [{}, {"identity_scale": 0.5, "every": 2, "end": 0.7}])
def test_a_stock_pipeline_with_instantid_attached_makes_its_portrait(instantid, rest):
    names = {"every": "ffrnet_every", "end": "ffrnet_end"}
    own = latents(instantid, pose=BOB, guidance_scale=3.0, **{names.get(k, k): v for k, v in rest.items()})
    other = stock(instantid)
    with instantid.attached_to(other, ALICE, BOB, **rest) as preview:
        torch.testing.assert_close(run(other), own)
    assert preview.drawing.shape == (SIZE, SIZE, 3)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"scale": 5}, "The FFRNet scale is 5; choose a number from 0 to 2"),
        ({"identity_scale": float("nan")}, "The identity scale is nan"),
        ({"landmark_scale": "1"}, "The landmark scale is 1; choose a number"),
    ],
)
def test_scales_of_an_attachment_have_the_bounds_of_a_call(pipe, options, said):
    with pytest.raises(InputError, match=said), pipe.attached_to(stock(pipe), ALICE, "front", **options):
        pass


def test_a_unet_of_another_shape_is_refused_by_what_differs(pipe):
    """The refiner's, one of few channels, of another latent space."""
    other, config = stock(pipe), dict(pipe.unet.config)
    for key, value in {"cross_attention_dim": 8, "out_channels": 7}.items():
        other.unet = UNet2DConditionModel.from_config(config | {key: value})
        with pytest.raises(InputError, match=f"another kind than our base: its {key} is {value}"):
            pipe.attached_to(other, ALICE, "front").__enter__()


@pytest.mark.parametrize("guidance", [3.0, 1.0])
def test_a_pag_pipeline_follows_ffrnet(pipe, guidance):
    """Its batch has a third part, with guidance: [unconditional ; conditional ; perturbed]."""
    perturbed = stock(pipe, StableDiffusionXLPAGPipeline, pag_applied_layers="mid")
    plain, own, seen = run(perturbed, guidance_scale=guidance), pipe.unet.attn_processors, []
    with pipe.attached_to(perturbed, ALICE, "front"):
        handle = unet_calls(pipe.unet, seen)
        followed = run(perturbed, guidance_scale=guidance)
        handle.remove()
    assert not torch.equal(followed, plain) and pipe.unet.attn_processors == own
    *unconditional, conditional, last = seen[0]["mid_block_additional_residual"]
    assert len(unconditional) == (guidance > 1) and not any(part.any() for part in unconditional)
    assert conditional.any() and torch.equal(conditional, last)
    assert torch.equal(plain, run(perturbed, guidance_scale=guidance))


def test_a_pag_pipeline_follows_instantid(instantid):
    perturbed = stock(instantid, StableDiffusionXLPAGPipeline, pag_applied_layers="mid")
    own, seen = instantid.unet.attn_processors, []
    with instantid.attached_to(perturbed, ALICE, "front"):
        handle = unet_calls(instantid.unet, seen)
        run(perturbed)
        handle.remove()
    (tokens,) = seen[0]["encoder_hidden_states"][1]
    assert len(tokens) == 3 and torch.equal(tokens[1], tokens[2]) and not torch.equal(tokens[0], tokens[1])
    assert instantid.unet.attn_processors == own


def test_what_a_failed_call_left_in_the_unet_is_taken_out():
    """A PAG pipeline puts its attention into the shared UNet, and back only where it succeeds."""
    ours = tiny_pipeline()
    perturbed, own = stock(ours, StableDiffusionXLPAGPipeline, pag_applied_layers="mid"), ours.unet.attn_processors

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), ours.attached_to(perturbed, ALICE, "front"):
        run(perturbed, callback_on_step_end=stop)
    assert ours.unet.attn_processors == own


def test_instantid_adds_to_the_residuals_of_another_controlnet(instantid):
    mixed, width = instantid.mix([instantid.analyse(ALICE)]), instantid.text_encoder_2.config.projection_dim
    call = {
        "sample": torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": torch.zeros(2, 5, instantid.unet.config.cross_attention_dim),
        "added_cond_kwargs": {"text_embeds": torch.zeros(2, width), "time_ids": torch.zeros(2, 6)},
    }
    seen = []
    conditions = {"tokens": mixed.tokens, "control": torch.zeros(1, 3, 64, 64), "parts": GUIDED}
    with torch.no_grad(), attach(instantid.unet, instantid.ffrnet, instantid.mixer, **conditions):
        handle = unet_calls(instantid.unet, seen)
        instantid.unet(**call)
        down, mid = (seen[0][f"{k}_additional_residual{s}"] for k, s in (("down_block", "s"), ("mid_block", "")))
        others = {
            "down_block_additional_residuals": [torch.ones_like(residual) for residual in down],
            "mid_block_additional_residual": torch.ones_like(mid),
        }
        instantid.unet(**call, **others)
        handle.remove()
    torch.testing.assert_close(seen[1]["mid_block_additional_residual"], mid + 1)
    for both, own in zip(seen[1]["down_block_additional_residuals"], down, strict=True):
        torch.testing.assert_close(both, own + 1)


# ---------------------------------------------------------------------- previews and cadences


def test_a_preview_is_enough_and_nothing_may_contradict_it(pipe):
    preview = pipe.preview(ALICE, "quarter-left", yaw=10)
    made = pipe("a photo", preview=preview, seed=1)
    assert np.array_equal(made.landmarks, preview.landmarks)
    pipe("a photo", reference=preview.reference_faces, preview=preview, seed=1)  # its own faces are no contradiction
    for beside in ({"reference": BOB}, {"pose": "front"}, {"expression_strength": 0.5}):
        with pytest.raises(InputError, match=f"leave out {next(iter(beside))}, or the preview"):
            pipe("a photo", preview=preview, **beside)
    with pytest.raises(InputError, match="There is no reference photo"):
        pipe("a photo")
    with pytest.raises(InputError, match="The preview is a ndarray; give what `preview` returns"):
        pipe("a photo", preview=ALICE)


def test_whose_shape_a_preview_has_may_not_be_contradicted(pipe):
    """Variants "predicted" and "driver" differ in the landmarks alone, and these are the preview's."""
    how = {"seed": 1, "num_inference_steps": 1, "score": False}
    for own, other in (("predicted", "driver"), ("driver", "predicted")):
        preview = pipe.preview(ALICE, BOB, variant=own)
        for agreeing in (own, "black", None):
            pipe("a photo", preview=preview, variant=agreeing, **how)
        with pytest.raises(InputError, match="leave out variant, or the preview"):
            pipe("a photo", preview=preview, variant=other, **how)


def test_cadence_knows_where_the_next_picture_begins():
    cadence = Cadence(every=2, end=0.75, num_steps=lambda: 4)
    assert [cadence.next() for _ in range(8)] == ["run", "keep", "run", "rest"] * 2
    exact = Cadence()
    assert [exact.next() for _ in range(3)] == ["run"] * 3

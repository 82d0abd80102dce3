"""What is kept between steps changes nothing; what is left out is left out, and only where it was asked for."""

from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DPMSolverSinglestepScheduler, HeunDiscreteScheduler
from diffusers.callbacks import SDXLCFGCutoffCallback
from test_evaluation import ledger_of
from test_ffrnet import call, face
from tiny import photo, tiny_ffrnet, tiny_pipeline, tiny_unet

from facesnap.attachment import GUIDED
from facesnap.errors import InputError
from facesnap.evaluation import speed
from facesnap.evaluation.__main__ import parse
from facesnap.ffrnet import attach
from facesnap.pipeline import FaceSnapPipeline
from facesnap.speed import PRESETS, Speed, chosen

ALICE = photo(1)


def portrait(pipe, prompt="a photo", **kwargs):
    return pipe(prompt, reference=ALICE, **{"seed": 0, "num_inference_steps": 4, "score": False} | kwargs)


def pixels(output):
    return np.asarray(output.images[0])


@contextmanager
def counted(pipe):
    """{"unet": rows of each call, "ffrnet": likewise, "embeddings": of the drawing}, filled while the block lasts."""
    seen = {"unet": [], "ffrnet": [], "embeddings": []}
    unet_rows = lambda m, args, kwargs: seen["unet"].append(len(args[0] if args else kwargs["sample"]))  # noqa: E731
    handles = [
        pipe.unet.register_forward_pre_hook(unet_rows, with_kwargs=True),
        pipe.ffrnet.register_forward_pre_hook(lambda m, args: seen["ffrnet"].append(len(args[0]))),
        pipe.ffrnet.controlnet_cond_embedding.register_forward_pre_hook(
            lambda m, args: seen["embeddings"].append(len(args[0]))
        ),
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@pytest.fixture(scope="module")
def unet():
    return tiny_unet().requires_grad_(False)


@pytest.fixture(scope="module")
def ffrnet(unet):
    return tiny_ffrnet(unet).requires_grad_(False)


# ---------------------------------------------------------------------- exact


def by_hand(unet, ffrnet, arguments, conditions):
    """One guided UNet call with FFRNet run for it alone, nothing kept from any other."""
    (sample, timestep), kwargs = arguments
    added = {"text_embeds": conditions["pooled"], "time_ids": kwargs["added_cond_kwargs"]["time_ids"][1:]}
    down, mid = ffrnet(
        sample[1:], timestep, conditions["tokens"], conditions["control"], added_cond_kwargs=added, return_dict=False
    )
    residuals = {
        "down_block_additional_residuals": [torch.cat([torch.zeros_like(d), d]) for d in down],
        "mid_block_additional_residual": torch.cat([torch.zeros_like(mid), mid]),
    }
    return unet(sample, timestep, **kwargs, **residuals, return_dict=False)[0]


def test_every_step_equals_one_by_hand_bit_for_bit(unet, ffrnet):
    steps = [call(seed=s, halves=2) for s in range(3)]
    with torch.no_grad():
        expected = [by_hand(unet, ffrnet, step, face()) for step in steps]
        with attach(unet, ffrnet, parts=GUIDED, **face()):
            got = [unet(*args, **kwargs, return_dict=False)[0] for args, kwargs in steps]
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_the_drawing_is_embedded_once_a_picture(pipe):
    embedding = pipe.ffrnet.controlnet_cond_embedding
    with counted(pipe) as seen:
        portrait(pipe)
        portrait(pipe, landmark_scale=0.5, num_images_per_prompt=2)
    assert seen["ffrnet"] == [1] * 4 + [2] * 4
    assert seen["embeddings"] == [1, 2]
    assert pipe.ffrnet.controlnet_cond_embedding is embedding


def test_the_drawing_is_embedded_anew_where_gradients_are_recorded(unet):
    ffrnet, calls = tiny_ffrnet(unet), []
    ffrnet.controlnet_cond_embedding.register_forward_pre_hook(lambda m, args: calls.append(1))
    with attach(unet, ffrnet, **face()):
        for _ in range(2):  # a step's graph is its own, or the second backward pass would find it gone
            unet(*call()[0], **call()[1]).sample.sum().backward()
    assert len(calls) == 2


def test_group_offloading_finds_every_module_called(unet):
    ffrnet = tiny_ffrnet(unet)
    with torch.no_grad(), attach(unet, ffrnet, **face()):
        expected = unet(*call()[0], **call()[1]).sample
    ffrnet.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    calls = []
    ffrnet.controlnet_cond_embedding.register_forward_pre_hook(lambda m, args: calls.append(1))
    with torch.no_grad(), attach(unet, ffrnet, **face()):
        got = [unet(*call()[0], **call()[1]).sample for _ in range(2)]
    assert len(calls) == 2 and all(torch.equal(g, expected) for g in got)


def test_best_is_the_default_and_exact(pipe):
    assert Speed() == PRESETS["best"] == Speed(ffrnet_every=1, ffrnet_end=1.0, guidance_end=1.0)
    plain, best = portrait(pipe), portrait(pipe, preset="best")
    assert plain.speed == best.speed == Speed()
    assert np.array_equal(pixels(plain), pixels(best))
    assert np.array_equal(pixels(plain), pixels(portrait(pipe, preset="fast", ffrnet_every=1, guidance_end=1.0)))


# ---------------------------------------------------------------------- left out


@pytest.mark.parametrize(
    ("asked", "unet_rows", "ffrnet_rows"),
    [
        ({}, [2] * 5, [1] * 5),
        ({"ffrnet_every": 2}, [2] * 5, [1] * 3),
        ({"ffrnet_every": 9}, [2] * 5, [1]),
        ({"ffrnet_end": 0.6}, [2] * 5, [1] * 3),
        ({"ffrnet_end": 0.0}, [2] * 5, []),
        ({"ffrnet_end": 0.5, "ffrnet_every": 2}, [2] * 5, [1] * 2),
        ({"guidance_end": 0.4}, [2, 2, 1, 1, 1], [1] * 5),
        ({"guidance_end": 0.01}, [2, 1, 1, 1, 1], [1] * 5),
        ({"guidance_end": 0.0}, [1] * 5, [1] * 5),
        ({"guidance_end": 0.4, "guidance_scale": 1.0}, [1] * 5, [1] * 5),
        ({"preset": "fast"}, [2, 2, 2, 1, 1], [1] * 3),
        ({"preset": "fast", "ffrnet_every": 1}, [2, 2, 2, 1, 1], [1] * 5),
    ],
)
def test_what_runs(pipe, asked, unet_rows, ffrnet_rows):
    with counted(pipe) as seen:
        out = portrait(pipe, num_inference_steps=5, **asked)
    assert (seen["unet"], seen["ffrnet"]) == (unet_rows, ffrnet_rows)
    given = {name: value for name, value in asked.items() if name in Speed.__dataclass_fields__}
    assert {name: getattr(out.speed, name) for name in given} == given
    assert out.guidance == asked.get("guidance_scale", 2.0)


def test_steps_between_get_the_last_residuals(unet, ffrnet):
    steps = [call(seed=s) for s in range(6)]

    def run(**speed):
        with torch.no_grad(), attach(unet, ffrnet, **face(), **speed):
            return [unet(*args, **kwargs, return_dict=False)[0] for args, kwargs in steps]

    exact, bare = run(), [unet(*args, **kwargs, return_dict=False)[0] for args, kwargs in steps]
    kept = run(every=2, num_steps=3)  # two pictures of three calls: FFRNet runs at 0, 2 and again at 3, 5
    assert [torch.equal(a, b) for a, b in zip(kept, exact, strict=True)] == [True, False, True, True, False, True]
    ended = run(end=0.5, num_steps=lambda: 3)
    assert [torch.equal(a, b) for a, b in zip(ended, exact, strict=True)] == [True, True, False] * 2
    assert torch.equal(ended[2], bare[2])


def test_the_half_that_stays_is_the_conditional_one(pipe):
    asked = []

    def keep(module, args, kwargs):
        asked.append({"text": kwargs["encoder_hidden_states"], **kwargs["added_cond_kwargs"]})

    handle = pipe.unet.register_forward_pre_hook(keep, with_kwargs=True)
    portrait(pipe, ["a photo", "a sketch"], num_inference_steps=2, guidance_end=0.5, negative_prompt=["b", "c"])
    handle.remove()
    both, one = asked
    assert not torch.equal(both["text"][:2], both["text"][2:])
    assert all(torch.equal(both[name][2:], one[name]) for name in both)


def test_ending_guidance_leaves_a_batch_as_its_pictures_one_by_one(pipe):
    prompts = ["a photo", "a sketch"]
    many = portrait(pipe, prompts, num_images_per_prompt=2, preset="fast", output_type="np", seed=5)
    for k, seed in enumerate(many.seeds):
        alone = portrait(pipe, prompts[k // 2], preset="fast", output_type="np", seed=seed)
        np.testing.assert_allclose(many.images[k], alone.images[0], atol=1e-4)


@pytest.mark.parametrize("scheduler", [DPMSolverSinglestepScheduler, HeunDiscreteScheduler])
def test_fractions_are_of_the_calls_that_a_scheduler_makes(pipe, scheduler):
    other = FaceSnapPipeline.from_pipe(pipe, scheduler=scheduler.from_config(HeunDiscreteScheduler().config))
    other.set_progress_bar_config(disable=True)
    with counted(other) as seen:
        portrait(other, preset="fast")
    calls = {DPMSolverSinglestepScheduler: 4, HeunDiscreteScheduler: 7}[scheduler]
    assert len(seen["unet"]) == calls
    assert seen["unet"].count(2) == len(seen["ffrnet"]) == (calls + 1) // 2


def test_variant_none_has_no_residuals_but_its_guidance_ends(pipe):
    with counted(pipe) as seen:
        portrait(pipe, variant="none", preset="fast")
    assert seen["unet"] == [2, 2, 1, 1] and seen["ffrnet"] == []


# ---------------------------------------------------------------------- beside the caller's own


def test_the_callers_callback_still_runs_with_what_it_asked_for(pipe):
    seen = []

    def watch(request, step, timestep, tensors):
        seen.append((step, sorted(tensors), len(tensors["prompt_embeds"])))
        return {}

    portrait(
        pipe,
        guidance_end=0.5,
        callback_on_step_end=watch,
        callback_on_step_end_tensor_inputs=["prompt_embeds"],
    )
    assert seen == [(k, ["prompt_embeds"], 2 if k < 2 else 1) for k in range(4)]


def test_diffusers_own_cutoff_may_end_guidance_first(pipe):
    cutoff = SDXLCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=0)
    with counted(pipe) as seen:
        portrait(pipe, guidance_end=0.75, callback_on_step_end=cutoff)
    assert seen["unet"] == [2, 1, 1, 1]


def test_a_preset_leaves_the_pipeline_as_it_was(pipe):
    before = pixels(portrait(pipe))
    portrait(pipe, preset="fast", ffrnet_end=0.5)
    hooks = [h for m in (pipe.unet, pipe.ffrnet) for s in m.modules() for h in (*s._forward_pre_hooks.values(),)]
    assert not hooks
    assert np.array_equal(before, pixels(portrait(pipe)))


@pytest.mark.parametrize("scales", [{}, {"identity_scale": 0.5, "landmark_scale": 0.5}])
def test_compiled_blocks_give_the_same_picture(scales):
    ours = tiny_pipeline()
    before = [pixels(portrait(ours, num_inference_steps=2, **s)) for s in ({}, scales)]
    ours.compile(backend="eager")  # the graphs of torch.compile, without a compiler for their kernels
    after = [pixels(portrait(ours, num_inference_steps=2, **s)) for s in ({}, scales)]
    assert all(np.abs(a.astype(int) - b).max() <= 1 for a, b in zip(before, after, strict=True))


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"preset": "quick"}, "There is no preset 'quick'; choose best or fast"),
        ({"ffrnet_every": 0}, "interval of FFRNet's steps is 0; choose a whole number from 1 to 200"),
        ({"ffrnet_every": 1.5}, "interval of FFRNet's steps is 1.5; choose a whole number"),
        ({"ffrnet_end": -0.1}, "end of FFRNet is -0.1; choose a number from 0 to 1"),
        ({"guidance_end": 1.01}, "end of guidance is 1.01; choose a number from 0 to 1"),
        ({"guidance_end": float("nan")}, "end of guidance is nan"),
        ({"preset": "fast", "guidance_end": True}, "end of guidance is True"),
    ],
)
def test_refused_with_a_sentence(pipe, arguments, sentence):
    with pytest.raises(InputError, match=sentence):
        portrait(pipe, **arguments)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"every": 2}, "num_steps"),
        ({"end": 0.5}, "num_steps"),
        ({"every": 0, "num_steps": 4}, "every is 0"),
        ({"end": 1.5, "num_steps": 4}, "end 1.5"),
    ],
)
def test_attach_refuses_what_it_cannot_do(unet, ffrnet, arguments, sentence):
    with pytest.raises(ValueError, match=sentence), attach(unet, ffrnet, **face(), **arguments):
        pass


def test_explicit_values_win_over_the_preset():
    assert chosen("fast", ffrnet_every=3) == Speed(3, 1.0, PRESETS["fast"].guidance_end)
    assert chosen(None, guidance_end=0.0) == Speed(guidance_end=0.0)
    assert chosen("fast", ffrnet_every=None) == PRESETS["fast"]


# ---------------------------------------------------------------------- its price in likeness


def test_a_presets_difference_to_best_is_that_of_the_same_portraits():
    rows, requests, gallery = ledger_of("perfect")
    missed, _, _ = ledger_of("faceless")
    for n in range(len(requests)):
        rows[f"best {n}"], rows[f"fast {n}"] = rows.pop(f"portrait {n}"), missed[f"portrait {n}"]
    for row in rows.values():
        if "wanted" in row:
            row["wanted"] = {"style": row["wanted"]["style"]}
    results = speed.summary(SimpleNamespace(rows=rows), requests, gallery, ["best", "fast"])
    assert results["best"]["identity_retention"] == pytest.approx(1)
    assert results["fast"]["identity_retention"] == pytest.approx(0)
    assert (results["best"]["retention_minus_best"], results["fast"]["retention_minus_best"]) == pytest.approx((0, -1))
    assert results["fast"]["retention_minus_best_95"] == pytest.approx((-1, -1))
    assert any("minus best" in name for name, _, _ in speed.lines(results))


def test_the_evaluations_command_for_presets():
    arguments = parse("speed --model assets/mini --people 20 --poses 2 --out presets.json".split())
    assert (arguments.command, arguments.people, arguments.gallery) == ("speed", 20, 200)

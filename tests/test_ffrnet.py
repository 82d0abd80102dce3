"""FFRNet on a bare UNet: zero at the start, in the conditional half of guidance only, gone after the block."""

import pytest
import torch
from tiny import POOLED_DIM, TOKEN_DIM, tiny_ffrnet, tiny_unet

from facesnap.attachment import GUIDED, UNGUIDED
from facesnap.ffrnet import FFRNet, attach
from facesnap.training.portraits import embedded


def call(batch=1, channels=16, seed=0, halves=1):
    """Arguments of a UNet call; in two halves the latents are equal and the text differs, as in diffusers."""
    g = torch.Generator().manual_seed(seed)
    sample = torch.randn(batch, channels, 4, 4, generator=g).repeat(halves, 1, 1, 1)
    rows = batch * halves
    added = {
        "text_embeds": torch.randn(rows, POOLED_DIM, generator=g),
        "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]]).repeat(rows, 1),
    }
    text = torch.randn(rows, 7, TOKEN_DIM, generator=g)
    return (sample, torch.tensor(500)), {"encoder_hidden_states": text, "added_cond_kwargs": added}


def face(batch=1, seed=0):
    g = torch.Generator().manual_seed(100 + seed)
    return {
        "tokens": torch.randn(batch, 4, TOKEN_DIM, generator=g),
        "pooled": torch.randn(batch, POOLED_DIM, generator=g),
        "control": torch.rand(batch, 3, 64, 64, generator=g),
    }


@pytest.fixture(scope="module")
def unet():
    return tiny_unet().requires_grad_(False)


@pytest.fixture(scope="module")
def ffrnet(unet):
    return tiny_ffrnet(unet).requires_grad_(False)


def run(unet, ffrnet, arguments, **conditions):
    args, kwargs = arguments
    with attach(unet, ffrnet, **conditions):
        return unet(*args, **kwargs, return_dict=False)[0]


def bare(unet, arguments):
    return unet(*arguments[0], **arguments[1], return_dict=False)[0]


def test_from_unet_gives_an_ffrnet_with_the_unets_encoder(unet):
    ffrnet = FFRNet.from_unet(unet, vae_scale_factor=16)
    assert type(ffrnet) is FFRNet
    assert torch.equal(ffrnet.conv_in.weight, unet.conv_in.weight)
    assert ffrnet.controlnet_cond_embedding(torch.zeros(1, 3, 64, 64)).shape[-2:] == (4, 4)


def test_widths_that_do_not_fit_the_vae_are_refused(unet):
    with pytest.raises(ValueError, match="4 widths reduce the control picture 8x, the VAE 16x"):
        FFRNet.from_unet(unet, vae_scale_factor=16, conditioning_embedding_out_channels=(4, 4, 4, 8))


def test_a_drawing_that_was_embedded_before_gives_the_same(unet, ffrnet):
    """What training keeps; its side is that of the latents."""
    kept = face() | {"control": ffrnet.controlnet_cond_embedding(face()["control"])}
    with embedded(ffrnet):
        again = run(unet, ffrnet, call(), **kept)
    assert torch.equal(again, run(unet, ffrnet, call(), **face()))


def test_zero_initialised_equals_the_base_bit_for_bit(unet):
    new = tiny_ffrnet(unet, zero=True)
    assert torch.equal(run(unet, new, call(), **face()), bare(unet, call()))


def test_tokens_and_landmarks_change_the_output(unet, ffrnet):
    base = run(unet, ffrnet, call(), **face())
    for name in face():
        other = face() | {name: face(seed=1)[name]}
        assert not torch.equal(base, run(unet, ffrnet, call(), **other)), name


def test_guidance_leaves_ffrnet_out_of_the_unconditional_half(unet, ffrnet, monkeypatch):
    passes = []
    ffrnet.register_forward_pre_hook(lambda m, args: passes.append(len(args[0])))
    args, kwargs = call(2, halves=2)
    plain, told = run(unet, ffrnet, (args, kwargs), parts=GUIDED, **face(2)).chunk(2)
    assert passes == [2]
    ffrnet._forward_pre_hooks.clear()

    def half(rows):
        added = {name: x[rows] for name, x in kwargs["added_cond_kwargs"].items()}
        text = kwargs["encoder_hidden_states"][rows]
        return (args[0][rows], args[1]), {"encoder_hidden_states": text, "added_cond_kwargs": added}

    torch.testing.assert_close(plain, bare(unet, half(slice(0, 2))), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(told, run(unet, ffrnet, half(slice(2, 4)), **face(2)), rtol=1e-5, atol=1e-6)


def test_guidance_of_one_is_the_conditional_prediction(unet, ffrnet):
    plain, told = run(unet, ffrnet, call(halves=2), parts=GUIDED, **face()).chunk(2)
    args, kwargs = call(halves=2)
    added = {name: x[1:] for name, x in kwargs["added_cond_kwargs"].items()}
    single = {"encoder_hidden_states": kwargs["encoder_hidden_states"][1:], "added_cond_kwargs": added}
    alone = run(unet, ffrnet, ((args[0][1:], args[1]), single), **face())
    torch.testing.assert_close(plain + 1.0 * (told - plain), alone, rtol=1e-5, atol=1e-6)


def test_guidance_is_asked_at_every_call(unet, ffrnet):
    answers = [GUIDED, UNGUIDED]
    with attach(unet, ffrnet, parts=lambda: answers.pop(0), **face()):
        first = unet(*call(halves=2)[0], **call(halves=2)[1]).sample
        second = unet(*call()[0], **call()[1]).sample
    assert len(first) == 2 and len(second) == 1 and not answers


def test_batch_equals_one_by_one_and_pictures_of_a_prompt_stay_together(unet, ffrnet):
    args, kwargs = call(4)
    together = run(unet, ffrnet, (args, kwargs), **face(2))  # rows 0, 1 are person 0; rows 2, 3 person 1
    for row in range(4):
        person = {name: x[row // 2, None] for name, x in face(2).items()}
        added = {k: v[row, None] for k, v in kwargs["added_cond_kwargs"].items()}
        text = kwargs["encoder_hidden_states"][row, None]
        single = {"encoder_hidden_states": text, "added_cond_kwargs": added}
        alone = run(unet, ffrnet, ((args[0][row, None], args[1]), single), **person)
        torch.testing.assert_close(together[row, None], alone, rtol=1e-4, atol=1e-5)


def test_rows_that_do_not_divide_are_refused(unet, ffrnet):
    with pytest.raises(ValueError, match="3 rows.*batch of 4"):
        run(unet, ffrnet, call(4), **face(3))


def test_inpainting_unet_passes_its_latents_only(ffrnet):
    inpainting = tiny_unet(in_channels=33, out_channels=16)
    args, kwargs = call(channels=33)
    first = run(inpainting, ffrnet, (args, kwargs), **face())
    assert first.shape[1] == 16

    seen = []
    handle = ffrnet.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    run(inpainting, ffrnet, (args, kwargs), **face())
    handle.remove()
    assert torch.equal(seen[0], args[0][:, :16])


def test_residuals_already_there_are_added_to(unet, ffrnet):
    args, kwargs = call()
    down, mid = ffrnet(
        *args,
        kwargs["encoder_hidden_states"],
        controlnet_cond=torch.rand(1, 3, 64, 64),
        added_cond_kwargs=kwargs["added_cond_kwargs"],
        return_dict=False,
    )
    others = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
    neither, ours = bare(unet, (args, kwargs)), run(unet, ffrnet, (args, kwargs), **face())
    theirs = bare(unet, (args, kwargs | others))
    both = run(unet, ffrnet, (args, kwargs | others), **face())
    assert not any(torch.equal(both, x) for x in (neither, ours, theirs))

    # two FFRNets at once: the order of attaching does not matter
    other_face = face(seed=5)
    with attach(unet, ffrnet, **other_face):
        inner = run(unet, ffrnet, (args, kwargs), **face())
    with attach(unet, ffrnet, **face()):
        outer = run(unet, ffrnet, (args, kwargs), **other_face)
    torch.testing.assert_close(inner, outer, rtol=1e-5, atol=1e-6)


def hooks(module):
    return [h for m in module.modules() for h in (*m._forward_pre_hooks.values(), *m._forward_hooks.values())]


def test_nothing_is_left_behind_not_even_after_an_error(unet, ffrnet):
    base = bare(unet, call())
    with pytest.raises(RuntimeError, match="stop"):
        with attach(unet, ffrnet, identity_scale=0.5, landmark_scale=0.5, **face()):
            assert hooks(unet) and hooks(ffrnet)
            raise RuntimeError("stop")
    assert not hooks(unet) and not hooks(ffrnet)
    assert torch.equal(base, bare(unet, call()))


def test_scales_switch_off_what_they_name(unet, ffrnet):
    def out(seed=0, what=(), **scales):
        return run(unet, ffrnet, call(), **face() | {name: face(seed=seed)[name] for name in what}, **scales)

    who, where = ("tokens", "pooled"), ("control",)
    assert torch.equal(out(identity_scale=0), out(1, who, identity_scale=0))
    assert not torch.equal(out(identity_scale=0), out(1, where, identity_scale=0))
    assert torch.equal(out(landmark_scale=0), out(1, where, landmark_scale=0))
    assert not torch.equal(out(landmark_scale=0), out(1, who, landmark_scale=0))
    assert torch.equal(out(scale=0), bare(unet, call()))


def test_variant_black_ignores_the_drawing(unet, ffrnet):
    other = face() | {"control": face(seed=1)["control"]}
    black = run(unet, ffrnet, call(), variant="black", **face())
    assert torch.equal(black, run(unet, ffrnet, call(), variant="black", **other))
    assert not torch.equal(black, run(unet, ffrnet, call(), **face()))


def test_variant_none_appends_the_tokens_to_the_text(unet):
    tokens = face()["tokens"]
    args, kwargs = call(halves=2)
    text = torch.cat([kwargs["encoder_hidden_states"], tokens.repeat(2, 1, 1)], dim=1)
    expected = bare(unet, (args, kwargs | {"encoder_hidden_states": text}))
    got = run(unet, None, (args, kwargs), tokens=tokens, variant="none", parts=GUIDED)
    assert torch.equal(got, expected)


def test_gradient_reaches_the_tokens(unet):
    ffrnet, conditions = tiny_ffrnet(unet), face()
    conditions["tokens"].requires_grad_()
    run(unet, ffrnet, call(), **conditions).square().sum().backward()
    assert conditions["tokens"].grad.abs().sum() > 0


def test_half_precision_ffrnet_serves_a_float32_unet(unet):
    half = tiny_ffrnet(unet).to(torch.bfloat16)
    full = run(unet, tiny_ffrnet(unet), call(), **face())
    assert torch.allclose(run(unet, half, call(), **face()), full, atol=0.1)


def test_save_and_load(unet, ffrnet, tmp_path):
    ffrnet.save_pretrained(tmp_path)
    again = FFRNet.from_pretrained(tmp_path).eval()
    assert torch.equal(run(unet, ffrnet, call(), **face()), run(unet, again, call(), **face()))

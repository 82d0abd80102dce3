"""InstantID inside our pipeline: its maths, stated a second time; whose points are drawn; what a call leaves."""

import math
import os
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import SIZE, photo, tiny_unet
from tiny_instantid import HEADS, TOKENS, adapter_state, tiny_instantid
from torch.nn import functional as F

from facesnap.attachment import GUIDED
from facesnap.errors import InputError
from facesnap.face_adapter import FaceAdapter
from facesnap.instantid import InstantIDPipeline, attach, draw_five
from facesnap.landmarks import to_68
from facesnap.pipeline import FaceSnapPipeline

ALICE, BOB = photo(1), photo(2)


@pytest.fixture(scope="module")
def instantid(tmp_path_factory):
    return tiny_instantid(tmp_path_factory.mktemp("InstantID"))


def latents(pipe, reference=ALICE, **how):
    how = {"seed": 4, "output_type": "latent", "score": False, "negative_prompt": "blurred"} | how
    return pipe("a photo", reference=reference, **how).images


# ---------------------------------------------------------------------- the maths, a second time


def softmax_attention(q, k, v, heads):
    """Attention of (B, Q, h·c) over (B, K, h·c), written out."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)


def resample(state, embedding):
    """InstantID's resampler: embedding (B, 512) → tokens (B, TOKENS, TOKEN_DIM)."""

    def norm(name, x):
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])

    x = F.linear(embedding[:, None], state["proj_in.weight"], state["proj_in.bias"])
    queries = state["latents"].repeat(len(x), 1, 1)
    k = 0
    while f"layers.{k}.1.1.weight" in state:
        layer = f"layers.{k}"
        normed = norm(f"{layer}.0.norm2", queries)
        context = torch.cat([norm(f"{layer}.0.norm1", x), normed], dim=1)
        keys, values = (context @ state[f"{layer}.0.to_kv.weight"].T).chunk(2, dim=-1)
        seen = softmax_attention(normed @ state[f"{layer}.0.to_q.weight"].T, keys, values, HEADS)
        queries = queries + seen @ state[f"{layer}.0.to_out.weight"].T
        inner = F.gelu(norm(f"{layer}.1.0", queries) @ state[f"{layer}.1.1.weight"].T)
        queries = queries + inner @ state[f"{layer}.1.3.weight"].T
        k += 1
    return norm("norm_out", F.linear(queries, state["proj_out.weight"], state["proj_out.bias"]))


class Decoupled:
    """attention(text) + 0.8 · attention(face), for a UNet whose text tokens are followed by TOKENS of the face."""

    def __init__(self, to_k, to_v):
        self.to_k, self.to_v = to_k, to_v

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **ignored):
        text, face = encoder_hidden_states[:, :-TOKENS], encoder_hidden_states[:, -TOKENS:]
        query = attn.to_q(hidden_states)
        seen = softmax_attention(query, attn.to_k(text), attn.to_v(text), attn.heads)
        seen = seen + 0.8 * softmax_attention(query, face @ self.to_k.T, face @ self.to_v.T, attn.heads)
        return attn.to_out[0](seen)


@torch.no_grad()
def restated(pipe, face, drawing, *, guidance, seed, steps=2):
    """InstantID as its paper and public pipeline have it, in a loop of its own: the final latents."""
    unet = tiny_unet(4)
    state = adapter_state(unet)
    processors = {
        name: Decoupled(*(state["ip_adapter"][f"{k}.to_{kind}_ip.weight"] for kind in "kv"))
        if name.endswith("attn2.processor")
        else processor
        for k, (name, processor) in enumerate(unet.attn_processors.items())
    }
    unet.set_attn_processor(processors)
    embedding = torch.from_numpy(face.embedding)[None]
    tokens = resample(state["image_proj"], torch.cat([torch.zeros_like(embedding), embedding]))
    text, no_text, pooled, no_pooled = pipe.encode_prompt("a photo", negative_prompt="blurred")
    text, pooled = torch.cat([no_text, text]), torch.cat([no_pooled, pooled])
    sizes = torch.tensor([[SIZE, SIZE, 0, 0, SIZE, SIZE]] * 2, dtype=torch.float32)
    control = torch.from_numpy(drawing).permute(2, 0, 1)[None].float() / 255

    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    scheduler.set_timesteps(steps)
    x = torch.randn(1, 4, SIZE // 8, SIZE // 8, generator=torch.Generator().manual_seed(seed))
    x = x * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        both = scheduler.scale_model_input(torch.cat([x, x]), t)
        added = {"text_embeds": pooled, "time_ids": sizes}
        down, mid = pipe.ffrnet(
            both,
            t,
            encoder_hidden_states=tokens,
            controlnet_cond=control.repeat(2, 1, 1, 1),
            conditioning_scale=0.8,
            added_cond_kwargs=added,
            return_dict=False,
        )
        without, with_ = unet(
            both,
            t,
            encoder_hidden_states=torch.cat([text, tokens], dim=1),
            added_cond_kwargs=added,
            down_block_additional_residuals=down,
            mid_block_additional_residual=mid,
        ).sample.chunk(2)
        x = scheduler.step(without + guidance * (with_ - without), t, x).prev_sample
    return x


def test_portrait_equals_instantid_stated_a_second_time(instantid):
    face, driver = instantid.analyse(ALICE), instantid.analyse(BOB)
    drawing = instantid.preview(face, driver).drawing
    expected = restated(instantid, face, drawing, guidance=3.0, seed=4)
    ours = latents(instantid, face, pose=driver)
    another = latents(instantid, photo(3), pose=driver)
    assert (ours - another).abs().max() > 0.05  # the comparison below could fail
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-4)


def test_resampler_reads_instantids_names_at_any_depth(instantid):
    state = adapter_state(instantid.unet)["image_proj"]
    embedding = torch.randn(3, 512, generator=torch.Generator().manual_seed(0)) * 20
    with torch.no_grad():
        torch.testing.assert_close(instantid.mixer(embedding), resample(state, embedding), rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------- whose points


def test_five_points_drawn_as_instantid_draws_them():
    points = np.array([[30, 40], [70, 40], [50, 60], [35, 80], [65, 80]], np.float32)
    drawing = draw_five(points, (120, 100))
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 0, 255)]
    for (x, y), colour in zip(points.astype(int), colours, strict=True):
        assert tuple(drawing[y, x]) == colour
        assert tuple(drawing[y, x - 10]) == colour  # discs of radius 10
    far = np.array([[20, 20], [180, 20], [100, 100], [30, 180], [170, 180]], np.float32)
    drawing = draw_five(far, (200, 200))
    for k in (0, 1, 3, 4):  # halfway to the nose, limbs of their point's colour, dimmed
        x, y = ((far[k] + far[2]) / 2).astype(int)
        assert tuple(drawing[y, x]) == tuple(int(0.6 * c) for c in colours[k])


def test_predicted_points_keep_the_references_face_and_plain_ones_the_drivers(instantid):
    alice, bob, driver = (instantid.preview(who, photo(3), variant=v) for who, v in (
        (ALICE, "predicted"), (BOB, "predicted"), (ALICE, "driver")
    ))  # fmt: skip
    assert np.abs(alice.landmarks - bob.landmarks).max() > 0.1
    plain = instantid.preview(BOB, photo(3), variant="driver")
    assert np.array_equal(driver.landmarks, plain.landmarks)
    own = instantid.analyse(photo(3)).landmarks[:, :2]
    np.testing.assert_allclose(to_68(driver.landmarks), (own + 0.5) * SIZE / 96 - 0.5, atol=1e-3)


def test_plain_points_cannot_be_changed(instantid):
    with pytest.raises(InputError, match="leave out expression_strength"):
        instantid.preview(ALICE, BOB, variant="driver", expression_strength=0.5)


# ---------------------------------------------------------------------- scales, references, modes


def test_every_scale_and_variant_counts(instantid):
    shots = [latents(instantid, pose=BOB)]
    for how in (
        {"identity_scale": 0.5},
        {"landmark_scale": 0.5},
        {"ffrnet_scale": 0.5},
        {"variant": "driver"},
        {"variant": "black"},
        {"variant": "none"},
        {"guidance_scale": 1.0},
    ):
        shots.append(latents(instantid, pose=BOB, **how))
    assert all(not torch.equal(a, b) for k, a in enumerate(shots) for b in shots[:k])


def test_without_adapter_and_controlnet_it_is_the_base(instantid):
    bare = [latents(instantid, who, identity_scale=0, variant="none") for who in (ALICE, BOB)]
    assert torch.equal(*bare)


def test_several_references_stand_side_by_side(instantid):
    one, two = instantid.analyse(ALICE), instantid.analyse(BOB)
    both = instantid.mix([one, two]).tokens
    assert both.shape[:2] == (2, 2 * TOKENS)
    torch.testing.assert_close(both[1], torch.cat([instantid.mix([f]).tokens[1] for f in (one, two)]))
    pose = instantid.preview(one, photo(3)).landmarks
    torch.testing.assert_close(  # twice the same photo is that photo: nobody's tokens repeated change nothing
        latents(instantid, [one, one], pose=pose), latents(instantid, one, pose=pose), rtol=1e-5, atol=1e-4
    )


def test_batch_equals_one_by_one(instantid):
    many = latents(instantid, pose=BOB, num_images_per_prompt=2)
    for k in range(2):
        torch.testing.assert_close(many[k : k + 1], latents(instantid, pose=BOB, seed=4 + k), rtol=1e-4, atol=1e-3)


def test_call_leaves_the_shared_unet_as_it_was(instantid):
    before = {name: id(processor) for name, processor in instantid.unet.attn_processors.items()}
    keys = instantid.unet.state_dict().keys()
    latents(instantid)
    with pytest.raises(RuntimeError, match="stop"):
        latents(instantid, callback_on_step_end=lambda *args: (_ for _ in ()).throw(RuntimeError("stop")))
    assert {name: id(processor) for name, processor in instantid.unet.attn_processors.items()} == before
    assert instantid.unet.state_dict().keys() == keys
    assert not instantid.unet._forward_pre_hooks


@pytest.mark.parametrize(("rest", "runs"), [({}, 4), ({"every": 2}, 2), ({"end": 0.5}, 2), ({"every": 3}, 2)])
def test_controlnet_can_rest_at_some_steps(instantid, rest, runs):
    tokens = instantid.mix([instantid.analyse(ALICE)]).tokens
    added = {"text_embeds": torch.ones(2, 16), "time_ids": torch.ones(2, 6)}
    call = {"encoder_hidden_states": torch.ones(2, 3, 32), "added_cond_kwargs": added}
    latent, count, outputs = torch.ones(2, 4, 8, 8), [], []
    handle = instantid.ffrnet.register_forward_hook(lambda *args: count.append(1))
    conditions = {"tokens": tokens, "control": torch.ones(1, 3, 64, 64), "parts": GUIDED, "num_steps": 4}
    with torch.no_grad(), attach(instantid.unet, instantid.ffrnet, instantid.mixer, **conditions, **rest):
        for t in (900, 600, 300, 0):
            outputs.append(instantid.unet(latent, t, **call).sample)
    handle.remove()
    assert len(count) == runs
    assert all(not torch.equal(a, b) for k, a in enumerate(outputs) for b in outputs[:k])


def test_another_ip_adapter_is_in_the_way(instantid):
    unet = tiny_unet(4)
    unet.encoder_hid_proj = torch.nn.Identity()
    tokens = torch.zeros(2, TOKENS, 32)
    with pytest.raises(InputError, match="unload_ip_adapter"):
        with attach(unet, None, instantid.mixer, tokens=tokens, variant="none"):
            pass


# ---------------------------------------------------------------------- folders and files


def test_saved_and_loaded_it_makes_the_same_picture(instantid, tiny_readers, tmp_path):
    unsure = InstantIDPipeline.from_pipe(instantid)
    unsure.settings = replace(instantid.settings, kind="facesnap")  # as those of a FaceSnap it shares a base with
    unsure.save_pretrained(tmp_path)
    again = InstantIDPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(latents(again, pose=BOB), latents(instantid, pose=BOB))
    with pytest.raises(InputError, match="is of kind 'instantid', not 'facesnap'"):
        FaceSnapPipeline.from_pretrained(tmp_path)


def test_file_for_another_unet_is_refused(tmp_path):
    torch.save(adapter_state(tiny_unet(4)), tmp_path / "ip-adapter.bin")
    other = tiny_unet(4)
    other.up_blocks = other.up_blocks[1:]  # fewer attention layers
    with pytest.raises(InputError, match="made for another UNet"):
        FaceAdapter.from_instantid(tmp_path / "ip-adapter.bin", other)


def test_truncated_file_is_refused(tmp_path):
    torch.save(adapter_state(tiny_unet(4)), tmp_path / "ip-adapter.bin")
    whole = (tmp_path / "ip-adapter.bin").read_bytes()
    (tmp_path / "ip-adapter.bin").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="cannot be read as InstantID's ip-adapter.bin"):
        FaceAdapter.from_instantid(tmp_path / "ip-adapter.bin", tiny_unet(4))


class Payload:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def test_pickle_that_would_run_something_is_refused_and_does_not_run(tmp_path):
    bad = {"image_proj": Payload(tmp_path / "created"), "ip_adapter": {}}
    pickle.loads(pickle.dumps(Payload(tmp_path / "proof")))
    assert (tmp_path / "proof").is_dir()  # the payload works where it is let
    torch.save(bad, tmp_path / "ip-adapter.bin")
    with pytest.raises(InputError, match="cannot be read"):
        FaceAdapter.from_instantid(tmp_path / "ip-adapter.bin", tiny_unet(4))
    assert not (tmp_path / "created").exists()

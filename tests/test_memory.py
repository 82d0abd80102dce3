"""Memory modes on a CPU: what they store, what they refuse, and that what they move changes nothing."""

import copy

import numpy as np
import pytest
import torch
from tiny import photo, tiny_pipeline
from tiny_instantid import tiny_instantid
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.live_bytes import LiveBytes
from benchmarks.random_models import SIZES, make_vae
from facesnap import memory
from facesnap.errors import InputError

FP8 = torch.float8_e4m3fn
CPU = torch.device("cpu")


def portrait(pipe):
    return pipe("a photo", reference=photo(1), pose=photo(2), seed=3, score=False, output_type="np").images[0]


@pytest.fixture(scope="module")
def full():
    pipe = tiny_pipeline()
    assert pipe.set_memory("full", "cpu") == "full"
    return portrait(pipe)


@pytest.fixture(scope="module")
def low_pipe():
    pipe = tiny_pipeline()
    pipe.set_memory("low", "cpu")
    return pipe


def stored(module):
    return {p.dtype for name, p in module.named_parameters() if name.endswith("weight") and p.ndim > 1}


def test_low_stores_what_runs_at_every_step_in_8_bits(full, low_pipe):
    assert FP8 in stored(low_pipe.unet) and FP8 in stored(low_pipe.ffrnet)
    assert FP8 not in stored(low_pipe.mixer) | stored(low_pipe.text_encoder) | stored(low_pipe.vae)
    assert low_pipe.unet.dtype == torch.float32  # in which it still computes
    assert low_pipe.vae.use_tiling
    picture = portrait(low_pipe)
    assert 0 < np.abs(picture - full).mean() < 0.1
    assert FP8 in stored(low_pipe.unet)  # a call does not undo it


def test_low_decodes_1024_pixels_in_less_than_a_gigabyte():
    """Counted on tensors without content, in float32, as SDXL's own VAE must decode."""

    def peak(lower):
        with FakeTensorMode():
            vae = make_vae(SIZES["sdxl"]).requires_grad_(False)
            lower(vae)
            vae.blend_v = vae.blend_h = lambda above, below, extent: below  # row by row: slow here, and no memory
            with torch.no_grad(), LiveBytes(list(vae.parameters())) as live:
                assert vae.decode(torch.zeros(1, 4, 128, 128)).sample.shape == (1, 3, 1024, 1024)
        return live.peak

    whole, tiled = peak(lambda vae: None), peak(memory.tile)
    assert whole > 3.2e9 and tiled < 0.83e9
    assert peak(lambda vae: vae.enable_tiling()) == whole  # diffusers' own tiles are as large as the picture


def test_layers_that_come_and_go_change_nothing(low_pipe):
    """What "low" does on a GPU and not here: the once-a-picture parts lie elsewhere, layer by layer."""
    pipe = tiny_pipeline()
    memory.lower(pipe, CPU, offload=True)
    hooked = [m for m in pipe.text_encoder.modules() if hasattr(m, "_diffusers_hook")]
    assert hooked and pipe._execution_device == CPU
    assert np.array_equal(portrait(pipe), portrait(low_pipe))


def test_vae_that_must_be_upcast_can_still_come_and_go():
    """SDXL's own VAE overflows in half precision: diffusers turns it to float32 to decode, and back."""
    pictures = []
    for offload in (False, True):
        pipe = tiny_pipeline()
        pipe.vae.to(torch.float16).register_to_config(force_upcast=True)
        memory.lower(pipe, CPU, offload=offload)
        pictures.append(portrait(pipe))
        assert pipe.vae.dtype == torch.float16
    assert np.array_equal(*pictures)


def test_components_that_come_and_go_change_nothing(full):
    """What "balanced" does on a GPU: diffusers' component offload, here from the CPU to itself."""
    pipe = tiny_pipeline()
    pipe.enable_model_cpu_offload(device="cpu")
    assert np.array_equal(portrait(pipe), full)
    assert np.array_equal(portrait(pipe), full)  # again: each call takes the hooks away and puts them back


def test_instantids_adapter_is_stored_with_the_unet_it_works_in(tmp_path):
    pipe = tiny_instantid(tmp_path)
    exact = portrait(copy.copy(pipe))
    pipe.set_memory("low", "cpu")
    assert FP8 in stored(pipe.mixer.processors)
    assert pipe.mixer.resampler.latents.dtype == torch.float32
    assert 0 < np.abs(portrait(pipe) - exact).mean() < 0.1


def test_low_cannot_be_left(low_pipe):
    assert low_pipe.set_memory("low", "cpu") == low_pipe.set_memory(None, "cpu") == "low"
    with pytest.raises(InputError, match="load the model again for 'full'"):
        low_pipe.set_memory("full", "cpu")


@pytest.mark.parametrize(
    ("mode", "sentence"),
    [("balanced", "there is no GPU here; use 'full' or"), ("ful", "did you mean 'full'"), ("x", "choose full, bal")],
)
def test_refused_with_a_sentence(pipe, mode, sentence):
    with pytest.raises(InputError, match=sentence):
        pipe.set_memory(mode, "cpu")


def test_without_a_name_the_first_mode_that_fits(pipe, monkeypatch):
    work = memory.WORKING_SPACE * (pipe.settings.size / 1024) ** 2
    weights = {name: memory._bytes(part) for name, part in memory._modules(pipe).items()}
    everything = sum(weights.values()) + work
    every_step = weights["unet"] + weights["ffrnet"] + work
    for free, mode in ((everything, "full"), (everything - 1, "balanced"), (every_step, "balanced"), (0, "low")):
        monkeypatch.setattr(memory, "free_memory", lambda device, free=free: free)
        assert memory.choose(pipe, torch.device("cuda")) == mode


def test_free_memory_of_this_machine_is_told_in_bytes():
    assert 1e7 < memory.free_memory(CPU) < 1e15

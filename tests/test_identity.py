"""The identity loss: the crop that φ sees, and the branch of a few steps through which gradients go."""

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import EulerDiscreteScheduler
from tiny import TOKEN_DIM, lively, tiny_ffrnet, tiny_mixer, tiny_unet, tiny_vae
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from benchmarks import training as benchmark
from benchmarks.live_bytes import LiveBytes
from facesnap.faces import align
from facesnap.ffrnet import attach
from facesnap.mini.nets.recogniser import RecogniserNet
from facesnap.training import identity
from facesnap.training.identity import IdentityLoss, crop_faces, crop_to_picture
from facesnap.training.losses import predicted_latents

# the crop -----------------------------------------------------------------------------------------------


def points(scale: float, degrees: float, x: float, y: float) -> np.ndarray:
    """Five points of a face somewhere in a picture; not quite ArcFace's, so that the fit has something to do."""
    a = np.deg2rad(degrees)
    turn = scale * np.array([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]])
    wrong = np.random.default_rng(1).normal(0, 1.5, (5, 2))
    return ((identity.arcface_dst + wrong - 56) @ turn.T + [x, y]).astype(np.float32)


FACES = [points(1.3, 20, 100, 90), points(0.5, -40, 60, 120), points(2.5, 5, 150, 40)]  # the last one sticks out


def smooth_picture(side: int = 200) -> np.ndarray:
    noise = np.random.default_rng(0).integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8)
    return cv2.resize(noise, (side, side), interpolation=cv2.INTER_CUBIC)


def test_the_crop_is_insightfaces():
    picture = smooth_picture()
    pixels = torch.from_numpy(picture).permute(2, 0, 1).float().div(127.5).sub(1).expand(3, -1, -1, -1)
    crops = crop_faces(pixels, crop_to_picture(np.stack(FACES).astype(float)))
    for crop, keypoints in zip(crops, FACES, strict=True):
        theirs = align(picture, keypoints).astype(int)
        ours = ((crop + 1) * 127.5).round().permute(1, 2, 0).numpy().astype(int)
        assert (theirs == 0).all(2).sum() == pytest.approx((ours == 0).all(2).sum(), abs=150)
        assert np.abs(ours - theirs).mean() < 1 and np.quantile(np.abs(ours - theirs), 0.99) <= 6


def test_the_window_holds_all_that_the_crop_shows():
    picture = torch.from_numpy(smooth_picture(208)).permute(2, 0, 1)[None].float() / 127.5 - 1
    for keypoints in FACES:
        matrix = crop_to_picture(keypoints[None].astype(float))
        top, left, height, width = identity.face_window(matrix[0], (26, 26), 8, 1)
        assert 0 <= top <= top + height <= 26 and 0 <= left <= left + width <= 26
        window = picture[..., top * 8 : (top + height) * 8, left * 8 : (left + width) * 8]
        inside = matrix.copy()
        inside[..., 2] -= np.array([left, top]) * 8
        torch.testing.assert_close(crop_faces(window, inside), crop_faces(picture, matrix), atol=1e-4, rtol=0)
    small = identity.face_window(crop_to_picture(FACES[1][None].astype(float))[0], (26, 26), 8, 1)
    assert small[2] * small[3] < 0.5 * 26**2


# the branch ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_few_steps_are_diffusers_euler_steps(kind):
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=kind,
        timestep_spacing="trailing",
    )
    noise = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    asked = []

    def model(x, t):
        asked.append(t[0].item())
        return torch.tanh(x.flip(-1)) + t.view(-1, 1, 1, 1) / 1000

    ours = identity.few_steps(model, noise, scheduler.alphas_cumprod.tolist(), kind, 4)
    assert asked == [999, 749, 499, 249]
    scheduler.set_timesteps(4)
    latents = noise * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        prediction = model(scheduler.scale_model_input(latents, t), t.expand(2))
        latents = scheduler.step(prediction, t, latents).prev_sample
    torch.testing.assert_close(ours, latents, atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def world():
    unet, vae, mixer = tiny_unet(), tiny_vae(), tiny_mixer()
    unet.requires_grad_(False)
    recogniser = lively(RecogniserNet((8, 8, 8, 8, 8), (1, 1, 1, 1)))
    loss = IdentityLoss(recogniser, vae, torch.linspace(0.999, 0.005, 1000), "v_prediction", steps=2, margin=1)
    return unet, tiny_ffrnet(unet), mixer, loss


def branch(world, *, steps: int, checkpointed: bool = True, batch: int = 2):
    """The loss of a batch, through mixer, FFRNet, UNet, decoder, crop and φ."""
    unet, ffrnet, mixer, loss = world
    loss.steps = steps
    draw = torch.Generator().manual_seed(3)
    embeddings, clip = torch.randn(batch, 1, 512, generator=draw), torch.randn(batch, 1, 5, 16, generator=draw)
    control, noise = torch.rand(batch, 3, 64, 64, generator=draw), torch.randn(batch, 16, 4, 4, generator=draw)
    text, pooled = torch.randn(batch, 7, TOKEN_DIM, generator=draw), torch.randn(batch, 16, generator=draw)
    mixed = mixer(embeddings, clip)
    condition = {"text_embeds": pooled, "time_ids": torch.tensor([64.0, 64, 0, 0, 64, 64]).expand(batch, -1)}

    def predict(x, t):
        with attach(unet, ffrnet, tokens=mixed.tokens, pooled=mixed.pooled, control=control):
            return unet(x, t, text, added_cond_kwargs=condition, return_dict=False)[0]

    keypoints = np.stack([points(0.3, 10, 32, 30), points(0.4, -10, 30, 34)])[:batch]
    faces = torch.randint(0, 256, (batch, 1, 112, 112, 3), generator=draw, dtype=torch.uint8)
    if checkpointed:
        return loss(predict, noise, keypoints, loss.embed(faces)), (predict, noise, keypoints, faces)
    return None, (predict, noise, keypoints, faces)


def gradients(world) -> dict[str, torch.Tensor]:
    _, ffrnet, mixer, _ = world
    names = {f"{n}.{k}": p for n, m in (("mixer", mixer), ("ffrnet", ffrnet)) for k, p in m.named_parameters()}
    found = {k: p.grad.clone() for k, p in names.items() if p.grad is not None}
    for module in (mixer, ffrnet):
        module.zero_grad()
    return found


def test_the_identity_loss_reaches_mixer_and_ffrnet_and_nothing_else(world):
    unet, ffrnet, mixer, loss = world
    values, _ = branch(world, steps=2)
    assert values.shape == (2,) and (values > 0).all() and (values <= 2).all()
    values.mean().backward()
    frozen = (unet, loss.vae, loss.recogniser)
    assert all(p.grad is None for module in frozen for p in module.parameters())
    found = gradients(world)
    assert set(found) == {f"mixer.{k}" for k, _ in mixer.named_parameters()} | {
        f"ffrnet.{k}" for k, _ in ffrnet.named_parameters()
    }
    for part in ("mixer.w_id.weight", "mixer.w_out.weight", "mixer.to_pooled.weight", "ffrnet.conv_in.weight"):
        assert found[part].abs().sum() > 0, part


def test_checkpointing_changes_no_gradient(world, monkeypatch):
    values, _ = branch(world, steps=3)
    values.mean().backward()
    with_ = gradients(world)
    monkeypatch.setattr(identity, "checkpoint", lambda f, *args, **how: f(*args))
    values, _ = branch(world, steps=3)
    values.mean().backward()
    without = gradients(world)
    for name, gradient in with_.items():
        torch.testing.assert_close(gradient, without[name], atol=1e-6, rtol=1e-4)


def test_memory_does_not_grow_with_the_steps(world, monkeypatch):
    """Bytes of all tensors that live at a time, weights and their gradients left out."""
    unet, ffrnet, mixer, loss = world
    modules = (unet, ffrnet, mixer, loss.vae, loss.recogniser)

    def peak(steps: int) -> int:
        for p in [*mixer.parameters(), *ffrnet.parameters()]:
            p.grad = torch.zeros_like(p)
        known = [t for m in modules for t in (*m.parameters(), *m.buffers())]
        with LiveBytes([*known, *(p.grad for p in known if p.grad is not None)]) as live:
            values, _ = branch(world, steps=steps, batch=1)
            values.mean().backward()
        gradients(world)
        return live.peak

    assert peak(8) <= 1.15 * peak(1)
    monkeypatch.setattr(identity, "checkpoint", lambda f, *args, **how: f(*args))
    assert peak(8) > 1.5 * peak(1)  # the measure sees what checkpointing spares


def test_half_precision_copies_of_the_weights_do_not_pile_up():
    """Where weights outweigh activations, as FFRNet's do at SDXL's size: gradients of the first use wait for the last
    use, in half precision, but the copies that autocast makes must not lie beside them."""
    layers = nn.ModuleList(nn.Linear(512, 512) for _ in range(8))
    own = [*layers.parameters()]
    weights = sum(p.numel() for p in own)

    def predict(x, t):
        flat = x.reshape(1, 512)
        for layer in layers:  # as gradient checkpointing has it, block by block
            flat = checkpoint(layer, flat, use_reentrant=False)
        return flat.reshape(x.shape)

    def peak(steps: int) -> int:
        for p in own:
            p.grad = torch.zeros_like(p)
        with LiveBytes([*own, *(p.grad for p in own)]) as live:
            with torch.autocast("cpu", torch.bfloat16):
                made = identity.few_steps(predict, torch.ones(1, 2, 16, 16), [0.9, 0.5, 0.1, 0.01], "epsilon", steps)
            made.square().mean().backward()
        return live.peak

    assert peak(4) < 2 * weights + 3 * 512 * 512 * 4  # one waiting sum, and what one layer needs


def test_fake_tensors_tell_the_peak_of_real_ones(monkeypatch):
    """The benchmark counts SDXL's bytes on tensors without content, by the same function as real ones."""
    monkeypatch.setattr(benchmark, "STEPS", (1, 3))
    monkeypatch.setattr(benchmark, "FACE", np.stack([points(0.005, 10, 0.5, 0.45)])[0])
    alphas = torch.linspace(0.999, 0.005, 1000)

    def found() -> dict[int, int]:
        unet, vae, phi = tiny_unet(), tiny_vae(), lively(RecogniserNet((8, 8, 8, 8, 8), (1, 1, 1, 1)))
        unet.requires_grad_(False)
        loss = IdentityLoss(phi, vae, alphas, "v_prediction", margin=1)
        tokens, pooled = torch.zeros(1, 4, TOKEN_DIM, requires_grad=True), torch.zeros(1, 16, requires_grad=True)
        return benchmark.peaks(loss, unet, tiny_ffrnet(unet), tokens, pooled, 64)

    real = found()
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = found()
    assert fake.keys() == real.keys() == {1, 3}
    assert all(fake[steps] == pytest.approx(real[steps], rel=0.05) for steps in real)


def test_a_step_along_the_gradient_brings_the_face_closer(world):
    _, ffrnet, mixer, _ = world
    before, _ = branch(world, steps=2)
    before.mean().backward()
    kept = {id(p): p.detach().clone() for m in (mixer, ffrnet) for p in m.parameters()}
    length = sum(p.grad.square().sum() for m in (mixer, ffrnet) for p in m.parameters()).sqrt()
    with torch.no_grad():
        for module in (mixer, ffrnet):
            for p in module.parameters():
                p -= 1e-2 * p.grad / length
    after, _ = branch(world, steps=2)
    with torch.no_grad():
        for module in (mixer, ffrnet):
            for p in module.parameters():
                p.copy_(kept[id(p)])
            module.zero_grad()
    assert after.mean() < before.mean()


def test_each_sample_stands_alone(world):
    both, _ = branch(world, steps=2)
    unet, ffrnet, mixer, loss = world
    _, (predict, noise, keypoints, faces) = branch(world, steps=2, checkpointed=False)
    swapped = loss.embed(faces.flip(0))
    other = loss(predict, noise, keypoints, swapped)
    torch.testing.assert_close(loss.embed(faces).flip(0), swapped)
    assert not torch.allclose(both, other)
    latents = identity.few_steps(predict, noise, loss.alphas, loss.kind, 2)
    one = torch.cat([loss.faces(latents[i : i + 1], keypoints[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(loss.faces(latents, keypoints), one)


def test_references_count_as_the_mean_of_their_directions(world):
    loss = world[3]
    faces = torch.randint(0, 256, (1, 3, 112, 112, 3), dtype=torch.uint8)
    alone = [F.normalize(loss.embed(faces[:, i : i + 1])) for i in range(3)]
    told = loss.embed(faces, torch.tensor([[True, False, True]]))
    torch.testing.assert_close(told, alone[0] + alone[2], atol=1e-5, rtol=1e-4)


def test_euler_from_a_perfect_model_arrives():
    """A model that knows x₀ gives x₀ in any number of steps."""
    alphas = torch.linspace(0.999, 0.005, 1000)
    truth = torch.randn(1, 2, 3, 3)

    def model(x, t):
        a = alphas[t].view(-1, 1, 1, 1)
        return (x - a.sqrt() * truth) / (1 - a).sqrt()

    for steps in (1, 2, 8):
        found = identity.few_steps(model, torch.randn(1, 2, 3, 3), alphas.tolist(), "epsilon", steps)
        torch.testing.assert_close(found, truth, atol=1e-4, rtol=1e-3)
    assert predicted_latents("epsilon", torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1), torch.tensor([0.25])) == 2


def test_when_it_counts():
    config = identity.IdentityConfig(recogniser="b.onnx", after=10, every=4)
    assert [step for step in range(24) if config.counts(step)] == [12, 16, 20]
    assert not identity.IdentityConfig(after=0).counts(0)
    with pytest.raises(ValueError, match="choose 1 to 8"):
        identity.IdentityConfig(steps=9)

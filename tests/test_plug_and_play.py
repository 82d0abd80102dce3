"""What else there is for SDXL works beside FaceSnap and leaves no trace: LoRA, bases, stock pipelines, IP-Adapter."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLInpaintPipeline
from peft.utils import get_peft_model_state_dict
from PIL import Image
from portraits import STOCK_KINDS, stock_beside
from safetensors.torch import load_file
from tiny import SIZE, TOKEN_DIM, photo, tiny_pipeline, tiny_unet

from facesnap.folder import BASE_PARTS
from facesnap.mini.style_lora import INKS, STYLES, StyleStage, add_lora, caption, save, screen_print
from facesnap.pipeline import FaceSnapPipeline
from facesnap.training.trainer import Trainer, TrainerConfig

ALICE, BOB = photo(1), photo(2)
ASSETS = Path(__file__).parents[1] / "assets"
LORA_FILE = "pytorch_lora_weights.safetensors"


def portrait(pipe, reference=ALICE, **kwargs):
    arguments = {"prompt": "a photo", "seed": 0, "score": False} | kwargs
    return np.asarray(pipe(reference=reference, **arguments).images[0])


@pytest.fixture(scope="module")
def eight():
    """A tiny FaceSnap with SDXL's own latents (4 channels, 8 times smaller), which stock inpainting wants."""
    return tiny_pipeline(vae_levels=4, latent_channels=4)


# ---------------------------------------------------------------------- LoRA


@pytest.fixture(scope="module")
def lora(pipe, tmp_path_factory):
    """A LoRA file for the tiny base, written as the training writes it."""
    unet, folder = copy.deepcopy(pipe.unet), tmp_path_factory.mktemp("lora")
    add_lora(unet, rank=2)
    torch.manual_seed(0)
    for name, parameter in unet.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    save(unet, folder)
    return folder


def test_a_lora_file_changes_the_picture_until_it_is_unloaded(pipe, lora):
    ours = FaceSnapPipeline.from_pipe(pipe, unet=copy.deepcopy(pipe.unet))
    ours.set_progress_bar_config(disable=True)
    plain = portrait(ours)
    ours.load_lora_weights(lora)
    styled = portrait(ours)
    assert not np.array_equal(styled, plain)
    assert not np.array_equal(styled, portrait(ours, BOB))  # the face still counts
    assert np.array_equal(portrait(ours, cross_attention_kwargs={"scale": 0.0}), plain)
    assert np.array_equal(portrait(ours), styled)
    ours.unload_lora_weights()
    assert np.array_equal(portrait(ours), plain)


def test_every_layer_of_the_file_is_loaded(pipe, lora):
    ours = FaceSnapPipeline.from_pipe(pipe, unet=copy.deepcopy(pipe.unet))
    ours.load_lora_weights(lora)
    loaded = get_peft_model_state_dict(ours.unet, adapter_name="default_0")
    written = {name.removeprefix("unet."): tensor for name, tensor in load_file(lora / LORA_FILE).items()}
    assert loaded.keys() == written.keys() and any("attn2.to_k" in name for name in written)
    assert all(torch.equal(loaded[name], written[name].float()) for name in written)


def test_a_lora_goes_to_the_unet_not_to_ffrnet(pipe, lora):
    ours = FaceSnapPipeline.from_pipe(pipe, unet=copy.deepcopy(pipe.unet))
    before = {name: value.clone() for name, value in ours.ffrnet.state_dict().items()}
    ours.load_lora_weights(lora)
    after = ours.ffrnet.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert any("lora" in name for name in ours.unet.state_dict())


def test_style_training_moves_the_lora_alone_and_resumes(pipe, tmp_path):
    ours = FaceSnapPipeline.from_pipe(pipe, unet=copy.deepcopy(pipe.unet))
    images = np.stack([photo(k, size=SIZE) for k in range(3)])
    stage = StyleStage(ours, images, ["a photo", "a sketch", "a print"], batch_size=2)
    add_lora(ours.unet, rank=2)
    before = {name: p.detach().clone() for name, p in ours.unet.named_parameters()}
    Trainer(stage, TrainerConfig(out=tmp_path / "work", steps=2, precision="fp32")).train()
    moved = {name for name, p in ours.unet.named_parameters() if not torch.equal(p, before[name])}
    assert moved and all("lora_" in name for name in moved)
    assert Trainer(stage, TrainerConfig(out=tmp_path / "work", steps=4, precision="fp32")).step == 2
    save(ours.unet, tmp_path / "lora")
    again = FaceSnapPipeline.from_pipe(pipe, unet=copy.deepcopy(pipe.unet))
    again.load_lora_weights(tmp_path / "lora")


def test_captions_name_the_style_and_keep_the_rest():
    assert (
        caption("a portrait photo of a person, wearing a cap", "blueprint") == "a blueprint of a person, wearing a cap"
    )
    with pytest.raises(StopIteration):
        caption("a watercolor of a person", "blueprint")


def test_styles_are_pictures_of_the_same_size_and_a_screen_print_has_four_inks():
    image = np.random.default_rng(0).integers(0, 255, (48, 32, 3), dtype=np.uint8)
    for style in STYLES.values():
        assert style(image).shape == image.shape and style(image).dtype == np.uint8
    assert {tuple(c) for c in screen_print(image).reshape(-1, 3)} <= set(INKS)


# ---------------------------------------------------------------------- another base


def test_another_base_unet_follows_the_same_ffrnet(pipe):
    other = FaceSnapPipeline.from_pipe(pipe, unet=tiny_unet(seed=9))
    other.set_progress_bar_config(disable=True)
    assert other.ffrnet is pipe.ffrnet and other.unet is not pipe.unet
    on_other = portrait(other)
    assert not np.array_equal(on_other, portrait(pipe))
    assert not np.array_equal(on_other, portrait(other, BOB))
    assert not np.array_equal(on_other, portrait(other, ffrnet_scale=0))


# ---------------------------------------------------------------------- stock pipelines


@pytest.mark.parametrize(("kind", "channels"), STOCK_KINDS)
def test_stock_pipelines_follow_face_and_pose_while_attached(eight, kind, channels):
    stock, made = stock_beside(eight, kind, channels)

    def run(**attached):
        if not attached:
            return made()
        with eight.attached_to(stock, **attached) as preview:
            assert preview.landmarks.shape == (72, 2)
            return made()

    plain, alice = run(), run(reference=ALICE, pose=ALICE)
    others = [
        run(reference=BOB, pose=ALICE),
        run(reference=ALICE, pose=BOB),
        run(reference=ALICE, pose=ALICE, identity_scale=0.2),
        run(reference=ALICE, pose=ALICE, end=0.5),
    ]
    assert not any(np.array_equal(alice, other) for other in (plain, *others))
    assert np.array_equal(alice, run(reference=ALICE, pose=ALICE))
    assert np.array_equal(plain, run())


def test_inpainting_keeps_what_lies_outside_the_mask(eight):
    stock = StableDiffusionXLInpaintPipeline(**{n: getattr(eight, n) for n in BASE_PARTS}, add_watermarker=False)
    stock.set_progress_bar_config(disable=True)
    mask = np.zeros((SIZE, SIZE), np.uint8)
    mask[:, : SIZE // 2] = 255
    given = Image.fromarray(photo(4, size=SIZE))

    def latents(reference):
        with eight.attached_to(stock, reference), torch.no_grad():
            return stock(
                "a photo", image=given, mask_image=Image.fromarray(mask), height=SIZE, width=SIZE, strength=1.0,
                num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="latent",
            ).images  # fmt: skip

    one, other = latents(ALICE), latents(BOB)
    half = one.shape[-1] // 2
    assert torch.equal(one[..., half:], other[..., half:])
    assert not torch.equal(one[..., :half], other[..., :half])


# ---------------------------------------------------------------------- IP-Adapter


def ip_adapter_weights(unet, seed=0, embedding_dim=10, tokens=4):
    """A public IP-Adapter file's content, at random: the plain projection and a pair of matrices an attention."""
    g = torch.Generator().manual_seed(seed)
    crossing = [n for n in unet.attn_processors if "attn2" in n]
    weights = {
        "image_proj": {
            "proj.weight": torch.randn(tokens * TOKEN_DIM, embedding_dim, generator=g),
            "proj.bias": torch.zeros(tokens * TOKEN_DIM),
            "norm.weight": torch.ones(TOKEN_DIM),
            "norm.bias": torch.zeros(TOKEN_DIM),
        },
        "ip_adapter": {},
    }
    for k, name in enumerate(crossing):
        width = unet.get_submodule(name.removesuffix(".processor")).to_q.out_features
        for which in ("to_k_ip", "to_v_ip"):
            weights["ip_adapter"][f"{2 * k + 1}.{which}.weight"] = torch.randn(width, TOKEN_DIM, generator=g)
    return weights


def test_ip_adapter_comes_and_goes_beside_facesnap(pipe):
    ours = FaceSnapPipeline.from_pipe(pipe, unet=copy.deepcopy(pipe.unet))
    ours.set_progress_bar_config(disable=True)
    before, face_encoder = portrait(ours), ours.face_encoder
    ours.load_ip_adapter(ip_adapter_weights(ours.unet), subfolder="", weight_name="", image_encoder_folder=None)
    images = [torch.randn(2, 1, 10, generator=torch.Generator().manual_seed(k)) for k in range(2)]
    shots = [portrait(ours, ip_adapter_image_embeds=[image]) for image in images]
    assert not np.array_equal(shots[0], before) and not np.array_equal(*shots)
    assert not np.array_equal(shots[0], portrait(ours, BOB, ip_adapter_image_embeds=[images[0]]))
    # where guidance ends early, the adapter's picture goes on with the conditional half alone
    assert not np.array_equal(shots[0], portrait(ours, ip_adapter_image_embeds=[images[0]], guidance_end=0.5))
    ours.unload_ip_adapter()
    assert ours.face_encoder is face_encoder is not None
    assert np.array_equal(before, portrait(ours))


# ---------------------------------------------------------------------- the mini


@pytest.mark.parametrize("name", ["screen-print", "blueprint"])
def test_the_shipped_loras_load_and_style_a_portrait(name):
    folder = ASSETS / "lora" / name
    if not (ASSETS / "mini" / "facesnap.json").is_file() or not folder.is_dir():
        pytest.skip("assets/mini or its LoRAs are not built yet")
    assert (folder / LORA_FILE).stat().st_size < 1_000_000
    mini = FaceSnapPipeline.from_pretrained(ASSETS / "mini")
    mini.set_progress_bar_config(disable=True)
    arguments = {"reference": ASSETS / "examples" / "avery.png", "pose": "front", "prompt": "a photo of a person"}
    shots = []
    for styled in (False, True):
        if styled:
            mini.load_lora_weights(folder)
            arguments["prompt"] = f"a {name.replace('-', ' ')} of a person"
        shots.append(portrait(mini, **arguments).astype(float))
    # how far each pixel is from the style's own colours
    inks = np.array(INKS if name == "screen-print" else [(18, 58, 140), (59, 99, 181), (236, 244, 255)], float)
    far = [np.abs(shot[..., None, :] - inks).sum(-1).min(-1).mean() for shot in shots]
    assert far[1] < 0.75 * far[0]

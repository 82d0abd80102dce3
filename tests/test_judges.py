"""The judges of the paper's evaluation: each equals its library on tiny random nets, and refuses foreign weights."""

import hashlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_face_encoder, tiny_tokenizer
from torchmetrics.image.fid import FrechetInceptionDistance
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTextConfig, CLIPVisionConfig

from facesnap import metrics
from facesnap.errors import InputError
from facesnap.evaluation import facesim, fid, protocol
from facesnap.evaluation.clip import Clip, face_region
from facesnap.evaluation.inception import FaceNet, InceptionV3, read_weights
from facesnap.synthetic.render import render


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A CLIP of random weights, as on the Hub."""
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": 190, "eos_token_id": 191, "vocab_size": 192, "max_position_embeddings": 20}
    text, vision = CLIPTextConfig(**small, **ends), CLIPVisionConfig(**small, image_size=32, patch_size=8)
    folder = tmp_path_factory.mktemp("clip")
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=12)
    CLIPModel(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder)
    return folder


def picture(seed: int, size: int = 48) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)


def test_clip_t_is_the_cosine_of_transformers_own_logits(clip_folder):
    clip, prompt = Clip(str(clip_folder)), "a red hat"
    model, processor = CLIPModel.from_pretrained(clip_folder).eval(), clip.processor
    words = clip.tokenizer([prompt], return_tensors="pt")
    pixels = processor(Image.fromarray(picture(1)), return_tensors="pt").pixel_values
    with torch.no_grad():
        logits = model(**words, pixel_values=pixels).logits_per_image / model.logit_scale.exp()
    own = metrics.cosines(clip.image(picture(1))[None], clip.text(prompt)[None])
    assert own.item() == pytest.approx(logits.item(), abs=1e-5)
    assert clip_folder.name in clip.about and clip.text("x" * 200).shape == (12,)  # cut, not refused


def test_a_folder_that_is_no_clip_is_named(tmp_path, clip_folder):
    with pytest.raises(InputError, match="The CLIP 'empty' cannot be read"):
        (tmp_path / "empty").mkdir()
        Clip(str(tmp_path / "empty"))
    tiny_face_encoder().save_pretrained(tmp_path / "half")  # the vision half only: no CLIP
    with pytest.raises(InputError, match="The CLIP 'half' cannot be read"):
        Clip(str(tmp_path / "half"))


def test_the_face_region_is_a_square_around_the_box():
    image = np.full((40, 60, 3), 200, np.uint8)
    region = face_region(image, np.array([20, 0, 40, 10], np.float32))
    assert region.shape == (26, 26, 3) and (region[8:] == 200).all()
    assert not region[:8].any()  # above the picture there is nothing


@pytest.mark.parametrize(
    ("net", "form", "size"),
    [(InceptionV3, "760681d791cb", 23_850_960), (FaceNet, "dab2b9a792ad", 27_910_327)],
)
def test_public_nets_have_the_form_of_their_public_files(net, form, size):
    # The digests of the names and shapes in the public files' own classes (torch-fidelity 0.4, facenet-pytorch 2.6),
    # whose outputs on the same random weights were equal to the last bit.
    made = net()
    told = "\n".join(f"{name} {tuple(value.shape)}" for name, value in sorted(made.state_dict().items()))
    assert hashlib.sha256(told.encode()).hexdigest()[:12] == form
    assert sum(p.numel() for p in made.parameters()) == size


def test_weights_of_another_architecture_are_refused(tmp_path):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    torch.save(net.state_dict(), tmp_path / "own.pt")
    older = {name: value for name, value in net.state_dict().items() if "num_batches" not in name}
    torch.save(older, tmp_path / "older.pt")
    other = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    read_weights(other, tmp_path / "older.pt", "the weights")
    assert torch.equal(other[0].weight, net[0].weight) and not other.training
    torch.save(torch.nn.Conv2d(3, 5, 3).state_dict(), tmp_path / "foreign.pt")
    (tmp_path / "torn.pt").write_bytes(b"PK\x03")
    for name, words in (
        ("foreign.pt", "does not hold the weights"),
        ("torn.pt", "cannot be read"),
        ("no.pt", "no file"),
    ):
        with pytest.raises(InputError, match=words):
            read_weights(other, tmp_path / name, "the weights")


def test_facenet_sees_the_box_alone(tmp_path, pipe):
    torch.manual_seed(0)
    torch.save(FaceNet(5).state_dict(), tmp_path / "five.pt")
    with pytest.raises(InputError, match="logits"):  # trained on other people than VGGFace2's
        facesim.FaceNetJudge(tmp_path / "five.pt")
    net = FaceNet().eval()
    torch.save(net.state_dict(), tmp_path / "random.pt")
    judge = facesim.FaceNetJudge(tmp_path / "random.pt")
    image = picture(2, 96)
    face = pipe.face_analyser.analyse(image)
    left, top, right, bottom = face.box.astype(int)
    cut = np.asarray(Image.fromarray(image[top:bottom, left:right]).resize((160, 160), Image.Resampling.BILINEAR))
    with torch.no_grad():
        wanted = net((torch.from_numpy(cut.copy()).permute(2, 0, 1)[None].float() - 127.5) / 128)[0].numpy()
    assert np.allclose(judge.embed(image, face), wanted, atol=1e-5)
    assert np.linalg.norm(wanted) == pytest.approx(1, abs=1e-5)


def test_judges_that_cannot_be_are_named(tmp_path):
    for names, words in ((["facenet"], "--facenet"), (["D"], "no judge 'D'"), (["C"], "no scoring recogniser")):
        with pytest.raises(InputError, match=words):
            facesim.judges(names, tmp_path, None, "cpu")


def test_fid_of_features_is_torchmetrics_fid_of_pictures():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 5))
    net.num_features = 5
    real, made = torch.rand(2, 20, 3, 8, 8)
    theirs = FrechetInceptionDistance(feature=net)
    with torch.no_grad():
        theirs.update(real, real=True)
        theirs.update(made, real=False)
        own = fid.distances(net(real).numpy(), net(made).numpy())
    assert own[0] == pytest.approx(float(theirs.compute()), rel=1e-4)
    assert own == fid.distances(net(real).detach().numpy(), net(made).detach().numpy())  # KID's subsets are seeded


def test_fid_needs_two_pictures_a_side():
    with pytest.raises(InputError, match="at least 2 pictures on each side, and there are 5 real and 1 made"):
        fid.distances(np.zeros((5, 3)), np.zeros((1, 3)))


def test_fd_is_0_of_a_set_with_itself_and_grows_with_blur():
    extractor = fid.EncoderFeatures(Path("assets/mini/face_encoder"))
    renders = [render(protocol.world_picture(1_000_100 + n, 0), 64).image for n in range(20)]

    def blurred(radius: int) -> np.ndarray:
        seen = renders if not radius else [cv2.GaussianBlur(image, (0, 0), radius) for image in renders]
        return np.stack([extractor.features(image) for image in seen])

    sharp, soft, softest = blurred(0), blurred(2), blurred(8)
    assert abs(fid.distances(sharp, sharp)[0]) < 1e-4
    little, much = fid.distances(sharp, soft), fid.distances(sharp, softest)
    assert 0.5 < 2 * little[0] < much[0] and little[1] < much[1]
    # of so few pictures FID itself is far above 0 between halves, which KID is not (it has no bias)
    assert abs(fid.distances(sharp[::2], sharp[1::2])[1]) < much[1] / 3


def test_inception_features_are_those_of_the_picture_at_299(tmp_path):
    torch.manual_seed(0)
    net = InceptionV3().eval()
    torch.save(net.state_dict(), tmp_path / "random.pth")
    extractor = fid.InceptionFeatures(tmp_path / "random.pth")
    image = picture(3, 299)  # needs no resizing, so that nothing but the scale is between
    with torch.no_grad():
        wanted = net((torch.from_numpy(image).permute(2, 0, 1)[None].float() - 128) / 128)[0].numpy()
    assert np.allclose(extractor.features(image), wanted, atol=1e-4) and extractor.names == ("FID", "KID")


def test_copy_paste_by_hand():
    reference, truth = np.eye(3)[:1], np.eye(3)[1:2]
    halfway = (reference + truth) * 7  # any length
    for made, wanted in ((reference, 1), (truth, -1), (halfway, 0), (np.eye(3)[2:], 0), (np.zeros((1, 3)), 0)):
        assert metrics.copy_paste(made, truth, reference).item() == pytest.approx(wanted, abs=1e-6)
    assert metrics.copy_paste(reference, reference, reference).item() == 0  # nothing to tell apart


def test_correlation_of_what_never_changes_is_0():
    steps = np.arange(5.0)
    assert metrics.correlation(steps, -2 * steps) == pytest.approx(-1)
    assert metrics.correlation(steps, np.ones(5)) == 0

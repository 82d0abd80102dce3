"""The face nets: their labels, their losses, their training that resumes, and ONNX that InsightFace reads as
torch does."""

import contextlib
from functools import partial

import numpy as np
import onnxruntime
import pytest
import torch
from insightface.model_zoo import get_model
from insightface.utils.face_align import trans_points

from facesnap import landmarks as lm
from facesnap.geometry import moved, similarity, warp
from facesnap.mini import augment as faceviews
from facesnap.mini.backgrounds import Backgrounds
from facesnap.mini.checkpoint import store_half
from facesnap.mini.nets.common import NetStage, to_input
from facesnap.mini.nets.detector import Detector, export_detector, train_detector
from facesnap.mini.nets.judge import JudgeNet, train_judge
from facesnap.mini.nets.landmarks import LandmarkNet, export_landmarks, train_landmarks
from facesnap.mini.nets.recogniser import RECOGNISERS, RecogniserNet, export_recogniser, train_recogniser
from facesnap.synthetic.dataset import HAIR, SKIN
from facesnap.training.trainer import Trainer, TrainerConfig

PER_PERSON, SIZE = 3, 128


def toy_head(rng):
    """72 points (72, 3) of a rough head: x right, y up, z to the camera."""
    jaw = np.linspace(-np.pi / 2, np.pi / 2, 17)
    contour = np.stack([0.7 * np.sin(jaw), -0.9 * np.cos(jaw), 0.5 * np.cos(jaw)], 1)
    brows = [[x, 0.45, 0.75] for x in (*np.linspace(-0.5, -0.12, 5), *np.linspace(0.12, 0.5, 5))]
    nose = [[0, y, z] for y, z in ((0.25, 0.8), (0.1, 0.9), (-0.05, 1.0), (-0.2, 1.1))]
    nose += [[x, -0.28, 0.9] for x in np.linspace(-0.12, 0.12, 5)]
    ring = np.linspace(np.pi, -np.pi, 7)[:-1]
    eyes = [[side * 0.3 + 0.1 * np.cos(a), 0.28 + 0.05 * np.sin(a), 0.75] for side in (-1, 1) for a in ring]
    mouth = np.linspace(np.pi, -np.pi, 13)[:-1]
    lips = [[0.25 * np.cos(a), -0.55 + 0.1 * np.sin(a), 0.85] for a in mouth]
    lips += [[0.2 * np.cos(a), -0.55 + 0.04 * np.sin(a), 0.85] for a in np.linspace(np.pi, -np.pi, 9)[:-1]]
    points = np.concatenate([contour, brows, nose, eyes, lips])
    return lm.from_68(points * [rng.uniform(0.85, 1.1), rng.uniform(0.9, 1.1), 1])


@pytest.fixture(scope="module")
def faces():
    """28 people × 3 pictures: a disc in the person's colour with the landmarks drawn over it."""
    rng = np.random.default_rng(0)
    images, masks, flat, heads, people, parameters = [], [], [], [], [], []
    for person in range(28):
        head, colour = toy_head(rng), rng.uniform(60, 255, 3)
        for _ in range(PER_PERSON):
            yaw, scale = rng.uniform(-0.5, 0.5), rng.uniform(28, 38)
            turn = np.array([[np.cos(yaw), 0, np.sin(yaw)], [0, 1, 0], [-np.sin(yaw), 0, np.cos(yaw)]])
            points = (head @ turn.T)[:, :2] * [scale, -scale] + [64, 60]
            mask = np.zeros((SIZE, SIZE), np.uint8)
            y, x = np.mgrid[:SIZE, :SIZE]
            mask[((x - 64) / (0.8 * scale)) ** 2 + ((y - 60) / (1.1 * scale)) ** 2 < 1] = 1
            image = np.where(mask[..., None] > 0, colour, 40).astype(np.uint8)
            drawing = lm.draw(points, (SIZE, SIZE))
            images.append(np.where(drawing.max(-1, keepdims=True) > 60, drawing, image))
            masks.append(mask)
            flat.append(points)
            heads.append(head)
            people.append(person + 100)
            parameters.append([*colour, yaw, 1.0])
    arrays = (np.stack(a) for a in (images, masks, flat, heads))
    return faceviews.face_set(*arrays, np.array(people), np.array(parameters))


# -------------------------------------------------------------------------------------------------- labels


def test_face_set_knows_depth_box_and_what_makes_the_person(faces):
    nose, chin, left, right = (faces.points[:, k] for k in (30, 8, 0, 16))
    assert (nose[:, 2] > left[:, 2]).all() and (nose[:, 2] > right[:, 2]).all()  # the tip is nearest
    assert np.abs(faces.points[..., 2].mean(1)).max() < 1e-3
    box = np.stack([faceviews.box_of(outline) for outline in faces.outlines])
    assert (box[:, 1] < faces.points[..., 1].min(1) - 5).all()  # the forehead is in it
    assert np.allclose(box[:, 3], faces.points[..., 1].max(1), atol=0.1)
    assert faces.is_identity.tolist() == [True, True, True, False, True]
    assert faces.person.tolist() == np.repeat(np.arange(28), PER_PERSON).tolist()


def test_depth_is_in_the_scale_of_the_picture(faces):
    """A rigid motion keeps 3D distances: those of the points with depth are those of the head, times one
    scale."""
    a, b = faces.points[0], faces.points[1]  # one person, two poses
    ratio = [np.linalg.norm(p[None] - p[:, None], axis=-1)[np.triu_indices(68, 1)] for p in (a, b)]
    assert np.std(ratio[0] / ratio[1]) < 1e-3


def test_similarity_finds_what_was_done():
    rng = np.random.default_rng(1)
    points = rng.normal(size=(5, 2)) * 20
    matrix = faceviews.around((3, 4), 0.6, 1.8, (50, 60))
    assert np.allclose(similarity(points, moved(points, matrix)), matrix, atol=1e-5)


def test_warp_moves_pixels_where_moved_says():
    """Also when it shrinks first: the disc's centre lies where the point goes."""
    image = np.zeros((200, 200, 3), np.uint8)
    y, x = np.mgrid[:200, :200]
    image[(x - 140) ** 2 + (y - 60) ** 2 < 400] = 255
    for scale in (0.15, 0.4, 1.0, 1.7):
        matrix = faceviews.around((140, 60), 0.3, scale, (47, 52))
        seen = warp(image, matrix, 96)[..., 0].astype(float)
        rows, columns = np.mgrid[:96, :96]
        centre = np.array([(columns * seen).sum(), (rows * seen).sum()]) / seen.sum()
        assert np.abs(centre - [47, 52]).max() < 0.15


def test_scenes_and_crops_keep_their_labels_in_the_picture(faces):
    rng = np.random.default_rng(2)
    backgrounds = Backgrounds(rng, 96, faces.images, count=4)
    counts = []
    for _ in range(30):
        image, boxes, points = faceviews.scene(faces, np.arange(len(faces)), backgrounds, rng, 96)
        assert image.shape == (96, 96, 3) and image.dtype == np.uint8
        counts.append(len(boxes))
        for box, five in zip(boxes, points, strict=True):
            assert (five >= box[:2] - 2).all() and (five <= box[2:] + 2).all()
            assert 0.07 * 96 < (box[2:] - box[:2]).max() < 1.3 * 96
    assert min(counts) == 0 and max(counts) > 1
    crop, points = faceviews.landmark_view(faces, 0, backgrounds, rng)
    assert crop.shape == (192, 192, 3) and points.shape == (68, 3)
    assert (points[36:42, 0].mean() < points[42:48, 0].mean()) and points[:, 0].min() > -30
    assert faceviews.aligned_view(faces, 0, rng, jitter=0).shape == (112, 112, 3)


def test_a_poor_reference_hides_the_face_and_is_always_the_same(faces):
    landmarks, image = faces.outlines[0][:72], faces.images[0]
    low, high = landmarks.min(0).astype(int), landmarks.max(0).astype(int)
    looks = [faceviews.poor(image, landmarks, str(k)) for k in range(30)]
    assert np.array_equal(looks[3], faceviews.poor(image, landmarks, "3"))
    changed = np.array([np.abs(look.astype(int) - image) for look in looks])
    face = changed[:, low[1] : high[1], low[0] : high[0]].mean((1, 2, 3))
    assert (face > 0.3).all() and len({look.tobytes() for look in looks}) == 30
    eyes = landmarks[[36, 40, 44, 48]].mean(0).round().astype(int)
    shaded = [look for look in looks if (look[eyes[1] - 3 : eyes[1] + 4, eyes[0]] < 65).all()]
    assert shaded  # sunglasses, among others


def test_a_photographed_render_changes_all_but_keeps_who_is_dark_and_who_is_fair():
    rng = np.random.default_rng(3)
    backgrounds = Backgrounds(rng, 64, np.zeros((2, 64, 64, 3), np.uint8), count=4)
    labels = np.zeros((64, 64), np.uint8)
    labels[:24], labels[24:48] = HAIR, SKIN
    means = {}
    for hair in (20, 200):
        picture = np.full((64, 64, 3), 90, np.uint8)
        picture[:24], picture[24:48] = hair, (210, 170, 150)
        seen = np.stack([faceviews.as_photograph(picture, labels, backgrounds, rng) for _ in range(60)]).astype(float)
        means[hair] = seen[:, 4:20].mean((1, 2, 3))
        assert seen[:, 4:20].std((1, 2, 3)).mean() > 3  # strands and highlights
        assert seen[:, 52:].mean((1, 2)).std(0).mean() > 25  # other backgrounds
    assert (means[20][:, None] < means[200]).mean() > 0.97


def test_a_ruffled_render_moves_the_hairs_outline_and_leaves_the_face():
    rng = np.random.default_rng(4)
    labels = np.zeros((112, 112), np.uint8)
    labels[10:60, 20:92], labels[60:100, 40:72] = HAIR, SKIN
    picture = rng.integers(0, 256, (112, 112, 3), dtype=np.uint8)
    moved = 0
    for _ in range(20):
        image, kinds = faceviews.ruffle(picture, labels, rng)
        assert np.abs(image[64:96, 44:68].astype(int) - picture[64:96, 44:68]).max() <= 3
        assert (kinds[60:100, 40:72] == SKIN).mean() > 0.99
        moved = max(moved, (kinds[:50] != labels[:50]).sum())
        assert ((kinds == HAIR) & (labels == HAIR)).sum() > 0.75 * (labels == HAIR).sum()
    assert moved > 100


# -------------------------------------------------------------------------------------------------- losses


def test_every_face_has_an_anchor_and_decodes_to_itself():
    """Whatever its size and place, some anchor is asked for each face; perfect answers decode to its box."""
    net = Detector()
    rng = np.random.default_rng(3)
    side = np.exp(rng.uniform(np.log(16), np.log(250), 200))
    centre = rng.uniform(side[:, None] / 2, 256 - side[:, None] / 2, (200, 2))
    half = np.stack([0.4 * side, 0.5 * side], 1)
    boxes = torch.from_numpy(np.concatenate([centre - half, centre + half], 1).astype(np.float32))[:, None]
    centres, sizes = net.anchors(256, 256, torch.device("cpu"))
    choice, positive = net.assign(centres, sizes, boxes, torch.ones(200, 1, dtype=torch.bool))
    assert positive.any(1).all()
    assert positive.sum(1).float().mean() < 80  # and not half of the picture


def test_detector_overfits_one_scene():
    torch.manual_seed(0)
    net = Detector((8, 12, 16, 24, 32), 16)
    picture = torch.randn(1, 3, 64, 64)
    boxes, points = (
        torch.tensor([[[16.0, 12, 48, 52]]]),
        torch.tensor([[[[24.0, 24], [40, 24], [32, 32], [26, 42], [38, 42]]]]),
    )
    optimizer = torch.optim.AdamW(net.parameters(), lr=5e-3)
    for _ in range(120):
        losses = net.loss(picture, boxes, points, torch.ones(1, 1, dtype=torch.bool))
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    logits, found, spots = net.decode(net(picture), 64, 64)
    best = logits[0].argmax()
    assert logits[0, best].sigmoid() > 0.7
    assert (found[0, best] - boxes[0, 0]).abs().max() < 2 and (spots[0, best] - points[0, 0]).abs().max() < 2


def test_a_picture_without_faces_has_a_loss():
    net = Detector((8, 8, 8, 8, 8), 8)
    nothing = torch.zeros(2, 1, 4), torch.zeros(2, 1, 5, 2), torch.zeros(2, 1, dtype=torch.bool)
    losses = net.loss(torch.randn(2, 3, 64, 64), *nothing)
    assert losses["box"] == 0 and losses["points"] == 0 and losses["score"] > 0
    sum(losses.values()).backward()


def test_prototypes_start_where_the_parameters_say():
    """People with like parameters start close, others do not."""
    torch.manual_seed(0)
    identities = torch.randn(3, 20)
    identities[1] = identities[0] + 0.01
    net = RecogniserNet((4, 4, 4, 4, 4), (1, 1, 1, 1), identities=identities)
    unit = torch.nn.functional.normalize(net.prototypes(net.identities))
    assert unit[0] @ unit[1] > 0.99 > 0.5 > unit[0] @ unit[2]


@pytest.mark.parametrize("make", [partial(RecogniserNet, (4, 4, 8, 8, 8)), partial(JudgeNet, (8, 8, 8, 8))])
def test_a_mirrored_face_is_the_same_person(make):
    net = settled(make((1, 1, 1, 1)), 4, 3, 112, 112)
    crops = torch.randn(2, 3, 112, 112)
    assert torch.allclose(net(crops), net(crops.flip(3)), atol=1e-5)


def test_the_judge_asks_a_persons_pictures_to_be_nearest():
    net, person = JudgeNet((8, 8, 8), (1, 1, 1)), torch.tensor([0, 0, 1, 1])
    unit = torch.nn.functional.normalize(torch.randn(4, 512))
    net.forward = lambda crops: 3 * unit
    told = [
        -torch.log_softmax((unit[i] @ unit.T / 0.07)[[j for j in range(4) if j != i]], 0)[k]
        for i, k in ((0, 0), (1, 0), (2, 2), (3, 2))  # where the other picture of the person is among the three
    ]
    assert torch.allclose(net.loss(None, person)["contrast"], torch.stack(told).mean(), atol=1e-4)


# ------------------------------------------------------------------------------------------------ training


def test_all_four_train_log_and_export(faces, tmp_path, capsys):
    widths = (4, 4, 8, 8, 8)
    train_recogniser("A", faces, tmp_path, 0.02, batch_size=8, sizes={"widths": widths, "depths": (1, 1, 1, 1)})
    train_judge(faces, tmp_path, 0.02, people=3, net=JudgeNet((8, 8, 8), (1, 1, 1)))
    train_detector(faces, tmp_path, 0.02, batch_size=2, net=Detector(widths, 8))
    train_landmarks(faces, tmp_path, 0.02, batch_size=2, net=LandmarkNet(widths, 8))
    said = capsys.readouterr().err
    for measured in ("TAR", "recall", "median", "min to go"):
        assert measured in said
    assert {path.name for path in tmp_path.glob("*.onnx")} == {
        "recogniser_A.onnx",
        "recogniser_C.onnx",
        "detector.onnx",
        "landmarks.onnx",
    }


def test_too_few_people_are_refused(faces, tmp_path):
    few = faceviews.FaceSet(**{**faces.__dict__, "person": faces.person % 10})
    with pytest.raises(ValueError, match="10 people are too few"):
        train_landmarks(few, tmp_path, 1)


def test_killed_training_goes_on_where_it_was(faces, tmp_path):
    """Killed and started again, the nets see the batches they would have seen, with the same batch statistics."""

    def stage():
        torch.manual_seed(0)
        backgrounds = Backgrounds(np.random.default_rng(0), 96, faces.images, count=4)

        def draw(rng):
            crop, points = faceviews.landmark_view(faces, int(rng.integers(9)), backgrounds, rng)
            points = torch.from_numpy(points / 96 - [1, 1, 0]).float()
            return {"crops": to_input(np.stack([crop] * 2), 128.0), "points": torch.stack([points] * 2)}

        return NetStage("tiny", LandmarkNet((4, 4, 8, 8, 8), 8), draw, lambda net: {})

    def run(out, steps, *parts):
        for part in (*parts, steps):
            here = stage()
            trainer = Trainer(here, TrainerConfig(out, steps=steps, checkpoint_every=1, sheet_every=0))
            with contextlib.closing(here.stream(trainer.step, 0)) as batches:
                while trainer.step < part:
                    trainer.update(next(batches))
                    trainer.checkpoint()
        return here.net.state_dict()

    whole, parts = run(tmp_path / "whole", 5), run(tmp_path / "parts", 5, 2, 3)
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())


# -------------------------------------------------------------------------------------------------- export


def settled(net, *shape):
    """Running statistics that are not the initial ones, so that exports are compared on something."""
    net.train()
    with torch.no_grad():
        for _ in range(3):
            net(torch.randn(*shape))
    return net.eval()


def test_detector_onnx_equals_torch_at_any_size(tmp_path):
    net = settled(Detector((8, 8, 12, 16, 16), 8), 2, 3, 64, 64)
    export_detector(net, tmp_path / "detector.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "detector.onnx")
    for height, width in ((64, 64), (96, 160)):
        picture = torch.randn(1, 3, height, width)
        with torch.no_grad():
            expected = net(picture)
        outputs = session.run(None, {"input": picture.numpy()})
        cells = [height * width // s**2 * 2 for s in (8, 16, 32)] * 3
        assert [o.shape for o in outputs] == [
            (1, n, c) for n, c in zip(cells, (1, 1, 1, 4, 4, 4, 10, 10, 10), strict=True)
        ]
        for k, (found, wanted) in enumerate(zip(outputs, expected, strict=True)):
            wanted = wanted.sigmoid() if k < 3 else wanted
            assert np.abs(found - wanted.numpy()).max() < 1e-3


def test_insightface_decodes_the_detector_as_we_do(tmp_path):
    """The same picture through InsightFace's SCRFD class and through ours: the same boxes and points."""
    torch.manual_seed(1)
    net = settled(Detector((8, 8, 12, 16, 16), 8), 2, 3, 96, 96)
    for output in net.outputs:
        output.weight.data.mul_(30)
        output.bias.data[[0, 15]] = 0
    export_detector(net, tmp_path / "detector.onnx")
    image = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    theirs = get_model(str(tmp_path / "detector.onnx"), providers=["CPUExecutionProvider"])
    theirs.prepare(0, nms_thresh=1.0)  # keep all
    found, spots = theirs.detect(image[..., ::-1], input_size=(128, 128), det_thresh=0.5)
    with torch.no_grad():
        logits, boxes, points = net.decode(net(to_input(image[None], 128.0)), 128, 128)
    scores = logits[0].sigmoid()
    order = scores.argsort(descending=True)[: len(found)]
    assert len(found) == int((scores >= 0.5).sum()) > 10
    best = int(order[0])
    assert np.allclose(found[0, :4], boxes[0, best], atol=0.05) and np.allclose(spots[0], points[0, best], atol=0.05)


def test_insightface_reads_the_landmarks_back(tmp_path):
    net = settled(LandmarkNet((8, 8, 8, 8, 8), 8), 2, 3, 192, 192)
    export_landmarks(net, tmp_path / "landmarks.onnx")
    model = get_model(str(tmp_path / "landmarks.onnx"), providers=["CPUExecutionProvider"])
    assert model.taskname == "landmark_3d_68"
    image = np.random.default_rng(0).integers(0, 256, (192, 192, 3), dtype=np.uint8)
    face = type("Face", (dict,), {"bbox": np.array([32.0, 32, 160, 160])})()  # 1.5 × 128 = 192: the crop is the picture
    found = model.get(image[..., ::-1], face)
    with torch.no_grad():
        raw = net(to_input(image[None], 128.0))[0].numpy()
    expected = trans_points((raw + [1, 1, 0]) * 96, np.eye(2, 3))
    assert np.abs(found - expected).max() < 0.1


@pytest.mark.parametrize(
    "make",
    [
        partial(RecogniserNet, (8, 8, 8, 8, 8), (1, 1, 1, 1), identities=torch.randn(50, 9)),
        partial(JudgeNet, (32, 64), (1, 1)),
    ],
)
def test_recogniser_onnx_equals_torch_and_drops_what_only_training_needs(make, tmp_path):
    net = settled(make(), 4, 3, 112, 112)
    export_recogniser(net, tmp_path / "a.onnx")
    crops = torch.randn(3, 3, 112, 112)
    with torch.no_grad():
        expected = net(crops).numpy()
    found = onnxruntime.InferenceSession(tmp_path / "a.onnx").run(None, {"input": crops.numpy()})[0]
    assert found.shape == (3, 512) and np.abs(found - expected).max() < 1e-3
    model = get_model(str(tmp_path / "a.onnx"), providers=["CPUExecutionProvider"])
    assert model.taskname == "recognition" and model.input_mean == 127.5 and model.input_std == 127.5
    size = (tmp_path / "a.onnx").stat().st_size
    assert size < 4 * sum(p.numel() for p in net.parameters()) + 20_000  # and the graph
    store_half(tmp_path / "a.onnx")  # as it ships
    assert (tmp_path / "a.onnx").stat().st_size < 0.6 * size
    found = onnxruntime.InferenceSession(tmp_path / "a.onnx").run(None, {"input": crops.numpy()})[0]
    directions = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (found, expected)]
    assert np.abs(directions[0] - directions[1]).max() < 1e-3


@pytest.mark.parametrize("make", [partial(RecogniserNet, **sizes) for sizes in RECOGNISERS.values()] + [JudgeNet])
def test_exported_recognisers_stay_under_ten_megabytes(make):
    net = make()
    assert 4 * sum(p.numel() for p in net.parameters()) < 10e6

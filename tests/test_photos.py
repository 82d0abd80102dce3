"""Photographs of shards as batches: what a batch holds, and where pictures, masks and landmarks lie."""

import json

import cv2
import numpy as np
import pytest
import torch
from shard_batches import arrays_of, equal, rewrite, take

from facesnap.geometry import moved
from facesnap.landmarks import draw
from facesnap.training.photos import PhotoConfig, PhotoShards
from facesnap.training.placing import ENLARGED, bucket_sizes, place, placed, time_ids
from facesnap.training.references import alone, relit

# what a batch is ----------------------------------------------------------------------------------------


def test_a_batch_is_what_it_says(prepared):
    (batch,) = take(PhotoShards(prepared.out, PhotoConfig(resolution=128, batch_size=5)), 1)
    references = batch["reference_mask"].shape[1]
    assert 1 <= references <= 4
    expected = {
        "pixels": ((5, 3, 128, 128), torch.uint8),
        "mask": ((5, 1, 128, 128), torch.uint8),
        "control": ((5, 3, 128, 128), torch.uint8),
        "landmarks": ((5, 72, 2), torch.float32),
        "keypoints": ((5, 5, 2), torch.float32),
        "box": ((5, 4), torch.float32),
        "time_ids": ((5, 6), torch.float32),
        "embeddings": ((5, references, 512), torch.float32),
        "crops": ((5, references, 224, 224, 3), torch.uint8),
        "reference_faces": ((5, references, 112, 112, 3), torch.uint8),
        "reference_mask": ((5, references), torch.bool),
        "drop_text": ((5,), torch.bool),
        "drop_face": ((5,), torch.bool),
        "drop_landmarks": ((5,), torch.bool),
        "same_picture": ((5,), torch.bool),
    }
    for name, (shape, dtype) in expected.items():
        assert (batch[name].shape, batch[name].dtype) == (shape, dtype), name
    assert batch.keys() == {*expected, "captions", "keys", "epochs"}
    assert all(caption.startswith("person") for caption in batch["captions"])
    assert torch.equal(
        batch["control"][0].permute(1, 2, 0), torch.from_numpy(draw(batch["landmarks"][0].numpy(), (128, 128)))
    )


def test_references_are_other_pictures_of_the_same_person(prepared, stored):
    source = {key: json.loads(parts["json"])["source"] for key, parts in stored.items()}
    owner = {arrays_of(parts)["embeddings"][0].tobytes(): key for key, parts in stored.items()}
    config = PhotoConfig(resolution=128, batch_size=3, worse_share=0)
    for batch in take(PhotoShards(prepared.out, config), 4):
        assert not batch["same_picture"].any() and batch["reference_mask"][:, 0].all()
        for i, key in enumerate(batch["keys"]):
            count = int(batch["reference_mask"][i].sum())
            givers = [owner[batch["embeddings"][i, j].numpy().tobytes()] for j in range(count)]
            assert key not in givers and len(set(givers)) == count
            assert {source[g].split("/")[0] for g in givers} == {source[key].split("/")[0]}
            crop = cv2.imdecode(np.frombuffer(stored[givers[0]]["crop.jpg"], np.uint8), cv2.IMREAD_COLOR)
            assert np.array_equal(batch["crops"][i, 0].numpy(), crop[..., ::-1])
            assert not batch["embeddings"][i, count:].any() and not batch["crops"][i, count:].any()


def test_a_lone_picture_is_its_own_reference_but_not_pixel_for_pixel(prepared, stored, tmp_path):
    rewrite(prepared.out, tmp_path, lambda key, parts: parts if key.endswith("_0000") else None)
    crops = []
    for batch in take(PhotoShards(tmp_path, PhotoConfig(resolution=128, batch_size=3, lone_share=1)), 2):
        assert batch["same_picture"].all() and batch["reference_mask"].tolist() == [[True]] * 3
        for i, key in enumerate(batch["keys"]):
            assert torch.equal(batch["embeddings"][i, 0], torch.from_numpy(arrays_of(stored[key])["embeddings"][1]))
            crop = cv2.imdecode(np.frombuffer(stored[key]["crop.jpg"], np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
            apart = np.abs(batch["crops"][i, 0].numpy().astype(int) - crop).mean()
            assert apart > 15  # another crop, another light, mostly another background
            crops.append((key, batch["crops"][i, 0]))
    first, second = (next(c for k, c in part if k == crops[0][0]) for part in (crops[:3], crops[3:]))
    assert not torch.equal(first, second)  # a new one each epoch


def test_a_reference_of_the_same_picture_keeps_the_head_alone():
    crop = np.random.default_rng(0).integers(0, 256, (224, 224, 3), np.uint8)
    head = cv2.circle(np.zeros((224, 224), np.uint8), (112, 112), 60, (255,), -1)
    inside, outside = (cv2.erode(mask, np.ones((15, 15))) > 0 for mask in (head, 255 - head))
    shades = []
    for seed in range(4):
        bare = alone(crop, head, np.random.default_rng(seed))
        assert np.array_equal(bare[inside], crop[inside])
        flat = bare[outside].astype(float)
        assert np.abs(np.corrcoef(flat.ravel(), crop[outside].ravel())[0, 1]) < 0.02  # nothing of what was there
        lit = relit(np.full_like(crop, 128), np.random.default_rng(seed)).astype(float)
        assert not lit.std(axis=2).any()  # not coloured
        shades.append(np.ptp(lit))
    assert max(shades) > 20  # brighter on one side


def test_lone_pictures_come_less_often_and_always_the_same(prepared, stored, tmp_path):
    rewrite(prepared.out, tmp_path, lambda key, parts: parts if key.endswith(("_0000", "0_0001")) else None)
    config = PhotoConfig(resolution=64, batch_size=1, lone_share=0.5)
    batches = take(PhotoShards(tmp_path, config), 60)
    lone = [batch["same_picture"].item() for batch in batches]
    epochs = batches[-1]["epochs"][0]
    assert 2 * epochs <= lone.count(False) <= 2 * epochs + 2  # one person has two pictures: each comes every time
    assert 0.5 * epochs < lone.count(True) < 1.6 * epochs  # two have one each
    later = take(PhotoShards(tmp_path, PhotoConfig(resolution=64, batch_size=1, lone_share=0.5), position=50), 10)
    assert all(equal(a, b) for a, b in zip(later, batches[50:], strict=True))


def test_some_references_are_covered_dark_or_blurred(prepared, stored):
    owner = {arrays_of(parts)["worse_embedding"].tobytes(): parts for parts in stored.values()}
    kinds = {json.loads(parts["json"])["worse"] for parts in stored.values()}
    assert len(kinds) > 1 and kinds <= {"covered", "dark", "blurred"}
    (bad,) = take(PhotoShards(prepared.out, PhotoConfig(resolution=128, batch_size=5, worse_share=1)), 1)
    (good,) = take(PhotoShards(prepared.out, PhotoConfig(resolution=128, batch_size=5, worse_share=0)), 1)
    for i in range(5):
        parts = owner[bad["embeddings"][i, 0].numpy().tobytes()]
        crop = cv2.imdecode(np.frombuffer(parts["worse.jpg"], np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
        assert np.array_equal(bad["crops"][i, 0].numpy(), crop)
    for name in ("reference_faces", "pixels", "landmarks"):  # φ compares with the good one
        assert torch.equal(bad[name], good[name])


def test_aligned_faces_show_the_face(prepared, stored):
    """Cut from the stored crop they are the same as from the picture itself, but for its resolution."""
    from facesnap.faces import align

    owner = {arrays_of(parts)["embeddings"][0].tobytes(): parts for parts in stored.values()}
    (batch,) = take(PhotoShards(prepared.out, PhotoConfig(resolution=128, batch_size=5, worse_share=0)), 1)
    for i in range(5):
        parts = owner[batch["embeddings"][i, 0].numpy().tobytes()]
        picture = cv2.imdecode(np.frombuffer(parts["jpg"], np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
        true = align(picture, arrays_of(parts)["keypoints"])
        inner = np.s_[20:92, 20:92]
        difference = batch["reference_faces"][i, 0].numpy().astype(int) - true
        assert np.abs(difference[inner]).mean() < 6


# geometry -----------------------------------------------------------------------------------------------


class Painted:
    """A dark picture, a disc for a head, and white dots at its landmarks."""

    def __init__(self, height=300, width=200, centre=(110, 120), radius=60):
        self.picture = np.full((height, width, 3), 30, np.uint8)
        self.mask = cv2.circle(np.zeros((height, width), np.uint8), centre, radius, (255,), -1)
        self.dots = np.array(centre) + np.array([[0, 0], [-30, -20], [30, -20], [0, 35]])
        for x, y in self.dots:
            cv2.circle(self.picture, (int(x), int(y)), 3, (255, 255, 255), -1)


@pytest.mark.parametrize("size", [(256, 256), (320, 192), (96, 160), (384, 384)])
def test_picture_mask_and_landmarks_move_together(size):
    target = Painted()
    rng = np.random.default_rng(0)
    angles, scales, padded = [], [], 0
    for _ in range(20):
        matrix, scale = place(target, size, rng)
        image = placed(target.picture, matrix, size, (127, 127, 127))
        mask = placed(target.mask, matrix, size, (0,))
        dots = moved(target.dots, matrix)
        for x, y in dots:  # each dot is where its point went
            spot = image[max(round(y) - 8, 0) : round(y) + 9, max(round(x) - 8, 0) : round(x) + 9, 0].astype(float)
            bright = np.argwhere(spot > 0.9 * spot.max())
            corner = [max(round(x) - 8, 0), max(round(y) - 8, 0)]
            assert np.abs(bright.mean(0)[::-1] + corner - [x, y]).max() < 1.2
        assert np.abs(cv2.moments(mask)["m10"] / cv2.moments(mask)["m00"] - dots[0, 0]) < 1
        # The head is seen whole: as many pixels as its scale says.
        assert (mask > 127).sum() == pytest.approx((target.mask > 0).sum() * scale**2, rel=0.03)
        angles.append(np.degrees(np.arctan2(matrix[1, 0], matrix[0, 0])))
        scales.append(scale)
        padded += (image == 127).all(axis=2).any()
    assert np.ptp(angles) > 15 and max(np.abs(angles)) <= 15
    assert np.ptp(np.log(scales)) > 0.1
    assert padded > 2


def test_nothing_is_enlarged_to_mere_blur():
    target = Painted(150, 150, (75, 75), 20)
    for seed in range(8):
        assert place(target, (1024, 1024), np.random.default_rng(seed))[1] <= ENLARGED == 2
    matrix, scale = place(target, (1024, 1024), None)
    image = placed(target.picture, matrix, (1024, 1024), (127, 127, 127))
    assert scale == 2 and (image != 127).any(axis=2).sum() == pytest.approx(300**2, rel=0.05)  # padded around


def test_a_head_larger_than_the_bucket_is_shrunk_into_it():
    target = Painted(200, 200, (100, 100), 98)
    for rng in (None, np.random.default_rng(1)):
        matrix, _ = place(target, (192, 320), rng)
        mask = placed(target.mask, matrix, (192, 320), (0,))
        rows, columns = np.flatnonzero(mask.max(1) > 127), np.flatnonzero(mask.max(0) > 127)
        assert np.ptp(rows) == pytest.approx(np.ptp(columns), abs=2) and np.ptp(rows) > 140  # a whole disc


def test_size_and_crop_conditioning():
    # A square photo of 900², stored at 300², in a square bucket: nothing is cut.
    target = Painted(300, 300, (150, 150))
    matrix, scale = place(target, (512, 512), None)
    assert np.allclose(time_ids([900, 900], matrix, scale, (512, 512)), [900, 900, 0, 0, 512, 512])
    assert np.allclose(
        moved(np.array([[-0.5, -0.5], [299.5, 299.5]]), matrix), [[-0.5, -0.5], [511.5, 511.5]], atol=1e-3
    )
    # Twice as high as the bucket: half of the surplus is cut off above.
    target = Painted(400, 200, (100, 200))
    matrix, scale = place(target, (200, 200), None)
    assert time_ids([400, 200], matrix, scale, (200, 200)).tolist() == [400, 200, 100, 0, 200, 200]
    # The head is at the top: the bucket goes there.
    target = Painted(400, 200, (100, 70))
    matrix, scale = place(target, (200, 200), None)
    assert time_ids([400, 200], matrix, scale, (200, 200))[2] == 10
    # Shrunk until it is padded: the crop begins at 0.
    target = Painted(200, 200, (100, 100))
    matrix = np.array([[0.5, 0, 50], [0, 0.5, 50]])
    assert time_ids([200, 200], matrix, 0.5, (200, 200)).tolist() == [200, 200, 0, 0, 200, 200]


def test_without_augmentation_a_picture_never_changes(prepared):
    config = PhotoConfig(resolution=256, batch_size=9, augment=False, fitted_share=0, max_references=1)
    first, second = take(PhotoShards(prepared.out, config), 2)
    rows = {key: i for i, key in enumerate(second["keys"])}
    order = [rows[key] for key in first["keys"]]
    assert first["epochs"] == [0] * 9 and second["epochs"] == [1] * 9 and first["keys"] != second["keys"]
    for name in ("pixels", "mask", "control", "landmarks", "keypoints", "time_ids"):
        assert torch.equal(first[name], second[name][order]), name
    augmented = take(PhotoShards(prepared.out, PhotoConfig(resolution=256, batch_size=9)), 1)[0]
    assert augmented["keys"] == first["keys"] and not torch.equal(augmented["pixels"], first["pixels"])


def test_buckets_are_sdxls():
    sizes = bucket_sizes(1024)
    assert {(1024, 1024), (832, 1216), (896, 1152), (768, 1344), (1344, 768)} <= set(sizes)
    for height, width in sizes:
        assert height % 64 == width % 64 == 0 and 0.5 <= height / width <= 2
        assert 0.85 * 1024**2 < height * width <= 1024**2
    assert (256, 256) in bucket_sizes(256) and all(side % 32 == 0 for size in bucket_sizes(256) for side in size)


def test_pictures_go_to_the_bucket_of_their_shape_and_batches_have_one(prepared, tmp_path):
    def tall(key, parts):
        if key.endswith("_0001"):
            about = json.loads(parts["json"])
            image = cv2.imdecode(np.frombuffer(parts["jpg"], np.uint8), cv2.IMREAD_COLOR)
            mask = cv2.imdecode(np.frombuffer(parts["mask.png"], np.uint8), cv2.IMREAD_GRAYSCALE)
            image, mask = (cv2.copyMakeBorder(i, 0, 150, 0, 0, cv2.BORDER_CONSTANT) for i in (image, mask))
            about["size"] = about["original_size"] = list(mask.shape)
            parts |= {"jpg": cv2.imencode(".jpg", image)[1].tobytes(), "json": json.dumps(about).encode()}
            parts |= {"mask.png": cv2.imencode(".png", mask)[1].tobytes()}
        return parts

    rewrite(prepared.out, tmp_path, tall)
    seen = set()
    for batch in take(PhotoShards(tmp_path, PhotoConfig(resolution=128, batch_size=2)), 6):
        seen.add(tuple(batch["pixels"].shape[2:]))
        assert (batch["time_ids"][:, 4:] == torch.tensor(batch["pixels"].shape[2:])).all()
        assert len({key.endswith("_0001") for key in batch["keys"]}) == 1
    assert seen == {(128, 128), (160, 96)}


def test_conditions_are_dropped_as_often_as_asked_and_nothing_else_changes(prepared):
    config = PhotoConfig(resolution=128, batch_size=9)
    (plain,) = take(PhotoShards(prepared.out, config), 1)
    assert not plain["drop_face"].any() and not plain["drop_landmarks"].any()
    options = {"drop_text": 1.0, "drop_face": 1.0, "drop_landmarks": 1.0}
    (dropped,) = take(PhotoShards(prepared.out, PhotoConfig(resolution=128, batch_size=9, **options)), 1)
    assert all(dropped[name].all() for name in options) and not dropped["control"].any()
    for name in ("pixels", "landmarks", "crops", "embeddings"):
        assert torch.equal(plain[name], dropped[name])
    assert plain["captions"] == dropped["captions"]  # the loop drops text: it knows what stands for none
    assert config.drop_text == 0.1  # the paper's
    many = take(PhotoShards(prepared.out, PhotoConfig(resolution=64, batch_size=9, drop_text=0.4)), 8)
    assert 15 <= sum(int(batch["drop_text"].sum()) for batch in many) <= 43  # 29 of 72

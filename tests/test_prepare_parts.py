"""Photographs → training shards: duplicates, identities, shards and measures, each alone."""

import cv2
import numpy as np
import photo_folder
import skimage.data

from facesnap.heads import LinearHeadModel, rotation_from_euler
from facesnap.landmarks import to_68
from facesnap.training.prepare.grouping import identities_of, near_duplicates, same_people, unit
from facesnap.training.prepare.headmask import landmark_mask
from facesnap.training.prepare.samples import perceptual_hash, sharpness
from facesnap.training.prepare.shards import plan_shards


def test_near_duplicates_are_those_that_brute_force_finds():
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**63, 200, dtype=np.uint64)
    flips = np.array(
        [sum(1 << int(b) for b in rng.choice(64, rng.integers(1, 7), replace=False)) for _ in range(60)], np.uint64
    )
    hashes[100:160] = hashes[:60] ^ flips
    embeddings = unit(rng.normal(size=(200, 16)))
    embeddings[100:150] = embeddings[:50]
    for bits in (0, 3, 4, 16):
        groups = near_duplicates(hashes, embeddings, bits, 0.9, block=64)
        near = np.bitwise_count(hashes[:, None] ^ hashes) <= bits
        assert ((near & (embeddings @ embeddings.T >= 0.9)) == np.equal.outer(groups, groups)).all()
    assert len(set(near_duplicates(hashes, embeddings, 4, 0.9))) not in (150, 200)  # some are near, and not all


def test_people_are_told_apart_by_their_embeddings():
    rng = np.random.default_rng(0)
    centres = unit(rng.normal(size=(5, 64)))
    true = rng.integers(0, 5, 60)
    embeddings = unit(centres[true] + 0.08 * rng.normal(size=(60, 64)))
    for options in ({"block": 7}, {"exact": 10}):  # the latter: as with millions of faces
        groups = same_people(embeddings, 0.5, **options)
        assert (np.equal.outer(groups, groups) == np.equal.outer(true, true)).all()
    # A face between two people would chain them: who is far from the mean of the chain stands alone.
    angles = np.radians(np.arange(0, 180, 30))
    chain = same_people(np.stack([np.cos(angles), np.sin(angles)], 1), 0.8)
    assert chain[0] != chain[2] and chain[5] != chain[2]


def test_identities_are_numbered_as_they_come():
    samples = [{"source": s, "face": f} for s, f in (("a", 0), ("a", 1), ("b", 0), ("c", 0))]
    assert identities_of(samples, {"a": "x", "b": "x"}, np.zeros(0)).tolist() == [0, 1, 0, 2]
    assert identities_of(samples, None, np.array([3, 3, 3, 1])).tolist() == [0, 1, 0, 2]


def test_an_identity_lies_in_one_shard_unless_it_is_larger():
    identities = np.repeat(np.arange(30), np.random.default_rng(0).integers(1, 9, 30))
    identities = np.concatenate([identities, np.full(25, 30)])
    shards = plan_shards(identities, 10, seed=1)
    assert sorted(row for shard in shards for row in shard) == list(range(len(identities)))
    assert all(0 < len(shard) <= 10 for shard in shards)
    for identity in range(30):
        assert sum(identity in identities[shard] for shard in shards) == 1
    for shard in shards:  # together within the shard
        people = identities[shard]
        assert len(set(people)) == 1 + (np.diff(people) != 0).sum()
    assert shards != plan_shards(identities, 10, seed=2)


def test_sharpness_and_hash_say_what_they_should():
    crop = cv2.resize(skimage.data.astronaut()[20:200, 140:320], (224, 224))
    blurred = cv2.GaussianBlur(crop, (0, 0), 4)
    assert sharpness(crop) > 5 * sharpness(blurred) and sharpness(blurred) < 20
    small = cv2.resize(cv2.resize(crop, (150, 150)), (224, 224))
    assert (perceptual_hash(crop) ^ perceptual_hash(small)).bit_count() <= 4
    assert (perceptual_hash(crop) ^ perceptual_hash(crop[:, ::-1])).bit_count() > 12


def test_the_skull_turns_with_the_face():
    model = LinearHeadModel.from_pretrained(photo_folder.MINI / "head")

    def side_by_side(yaw):
        points = 60 * to_68(model.mean) @ rotation_from_euler(yaw=yaw).T * [1, -1, 1] + [128, 128, 0]
        columns = np.flatnonzero(landmark_mask(points.astype(np.float32), (256, 256)).any(axis=0))
        return points[30, 0] - columns[0], columns[-1] - points[30, 0]  # from the tip of the nose to either edge

    left, right = side_by_side(0)
    assert abs(left - right) <= 2
    left, right = side_by_side(40)  # she looks to the picture's right: the head is behind, on the left
    assert left > 2 * right

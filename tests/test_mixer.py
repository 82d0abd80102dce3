"""The mixer: its four variants, references as one masked set, sane scales, and files that come back equal."""

import pytest
import torch
from tiny import CLIP_DIM, POOLED_DIM, TOKEN_DIM, tiny_mixer

from facesnap.mixer import VARIANTS, FacialAttributeMixer


def references(batch=2, count=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(batch, count, 512, generator=g) * 20 / 512**0.5
    return embeddings, torch.randn(batch, count, 5, CLIP_DIM, generator=g)


@pytest.mark.parametrize("variant", VARIANTS)
class TestEveryVariant:
    def test_gives_tokens_and_pooled(self, variant):
        out = tiny_mixer(variant)(*references())
        assert out.tokens.shape == (2, 4, TOKEN_DIM)
        assert out.pooled.shape == (2, POOLED_DIM)

    def test_masked_reference_is_as_if_absent_whatever_it_holds(self, variant):
        mixer, (ids, clip) = tiny_mixer(variant), references()
        mask = torch.tensor([[True, True, False]] * 2)
        ids[:, 2], clip[:, 2] = 7.0, -7.0
        torch.testing.assert_close(mixer(ids, clip, mask).tokens, mixer(ids[:, :2], clip[:, :2]).tokens)

    def test_references_are_a_set(self, variant):
        mixer, (ids, clip), order = tiny_mixer(variant), references(), [2, 0, 1]
        torch.testing.assert_close(mixer(ids, clip).tokens, mixer(ids[:, order], clip[:, order]).tokens)

    def test_rows_do_not_mix(self, variant):
        mixer, (ids, clip) = tiny_mixer(variant), references()
        torch.testing.assert_close(mixer(ids, clip).tokens[1:], mixer(ids[1:], clip[1:]).tokens)

    def test_sees_just_the_inputs_it_names(self, variant):
        mixer, (ids, clip) = tiny_mixer(variant), references()
        base = mixer(ids, clip).tokens
        assert torch.equal(base, mixer(ids + torch.randn_like(ids), clip).tokens) == (variant == "clip")
        assert torch.equal(base, mixer(ids, clip + torch.randn_like(clip)).tokens) == (variant == "id")

    def test_every_parameter_learns(self, variant):
        mixer = tiny_mixer(variant)
        out = mixer(*references())
        (out.tokens.pow(2).mul(torch.randn_like(out.tokens)).sum() + out.pooled.pow(2).sum()).backward()
        idle = [name for name, p in mixer.named_parameters() if p.grad is None or not p.grad.any()]
        assert not idle

    def test_save_and_load(self, variant, tmp_path):
        mixer = tiny_mixer(variant)
        mixer.save_pretrained(tmp_path)
        again, info = FacialAttributeMixer.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info.values())
        assert torch.equal(mixer(*references()).tokens, again.eval()(*references()).tokens)


def test_scale_of_the_embedding_hardly_matters():
    """ArcFace's raw norm says how sharp the photo was, not who it shows."""
    mixer, (ids, clip) = tiny_mixer("id"), references()
    ones, twos = mixer(ids, clip).tokens, mixer(2 * ids, clip).tokens
    others = mixer(*references(seed=1)).tokens
    assert (ones - twos).norm() < 0.2 * (ones - others).norm()
    assert 0.5 < ones.std() < 2


def test_dropped_identity_is_finite():
    ids, clip = references()
    out = tiny_mixer()(torch.zeros_like(ids), torch.zeros_like(clip))
    assert out.tokens.isfinite().all() and out.pooled.isfinite().all()


def test_unknown_variant_is_named():
    with pytest.raises(ValueError, match="'average'.*full, id, clip, concat"):
        tiny_mixer("average")

"""Categorical latents: probabilities, sampling, straight-through gradients and the KL losses."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from world_model.latent import (
    UNIMIX,
    LatentState,
    kl_balance,
    kl_divergence,
    probabilities,
    sample_onehot,
)
from world_model.onehot import _steps, onehot_at, onehot_mode

LAST_LEVEL = 1.0 - 2.0**-24  # the largest number that torch.rand returns


def random_logp(seed: int, *shape: int, grad: bool = False) -> torch.Tensor:
    """Log-probabilities (..., K) of random categoricals."""
    logits = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 2
    return torch.log_softmax(logits, -1).requires_grad_(grad)


def test_what_is_kept_from_acting_serves_where_there_are_gradients():
    _steps.cache_clear()
    probs, level = torch.full((1, 2, 4), 0.25), torch.full((1, 2, 1), 0.6)
    with torch.inference_mode():
        acted = onehot_at(probs, level)
    trained = onehot_at(probs.requires_grad_(), level)
    assert torch.equal(acted, trained)


@pytest.mark.parametrize("unimix", [0.0, 0.01, 0.5, 1.0])
def test_probabilities_are_a_softmax_mixed_with_the_uniform(unimix):
    logits = torch.randn(5, 3, 8, generator=torch.Generator().manual_seed(1)) * 10
    expected = (1 - unimix) * torch.softmax(logits, -1) + unimix / 8
    assert torch.allclose(probabilities(logits, unimix), expected, atol=1e-6)


def test_probabilities_survive_huge_logits():
    probs = probabilities(torch.tensor([[1e30, -1e30, 0.0, 1e4]]), 0.04)
    assert torch.allclose(probs, torch.tensor([[0.97, 0.01, 0.01, 0.01]]))


@pytest.mark.parametrize("size", [1e4, 1e30, 3e38])
def test_log_probabilities_of_extreme_logits_are_finite(size):
    logits = torch.tensor([[size, -size, 0.0, 0.0], [-size, -size, -size, size]], requires_grad=True)
    post, prior = torch.log(probabilities(logits)), torch.log(probabilities(-logits))
    assert post.isfinite().all()
    assert post.min() >= np.log(UNIMIX / 4) - 1e-5
    kl = kl_divergence(post[:, None], prior[:, None])
    assert kl.isfinite().all()
    kl.sum().backward()
    assert logits.grad.isfinite().all()


def test_probabilities_have_the_gradient_of_a_softmax():
    logits = torch.randn(6, 5, generator=torch.Generator().manual_seed(2))
    weight = torch.randn(6, 5, generator=torch.Generator().manual_seed(3))
    a, b = (logits.clone().requires_grad_() for _ in range(2))
    (probabilities(a, 0.1) * weight).sum().backward()
    ((0.9 * torch.softmax(b, -1) + 0.02) * weight).sum().backward()
    assert torch.allclose(a.grad, b.grad, atol=1e-6)


def traced_onehot_at(probs: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
    """`onehot_at` as torch.compile sees it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        return onehot_at(probs, level)


BOTH = [onehot_at, traced_onehot_at]


@pytest.mark.parametrize("draw", BOTH)
@pytest.mark.parametrize("scale", [1.0, 7.0])
def test_sampling_frequencies_are_the_probabilities(scale, draw):
    probs = torch.tensor([0.5, 0.0, 0.2, 0.3])
    levels = (torch.arange(1000) + 0.5).div(1000)[:, None]
    counts = draw((probs * scale).expand(1000, 4), levels).sum(0)
    assert counts.tolist() == [500, 0, 200, 300]


@pytest.mark.parametrize("draw", BOTH)
def test_rare_classes_are_drawn_under_autocast(draw):
    probs = torch.full((16,), 0.00075)
    probs[3] = 1.0 - 15 * 0.00075
    levels = (torch.arange(20_000) + 0.5).div(20_000)[:, None]
    with torch.autocast("cpu", torch.bfloat16):
        counts = draw(probs.expand(20_000, 16), levels).float().sum(0)
    assert torch.allclose(counts, 20_000 * probs, atol=1.01)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**31), st.integers(2, 33), st.sampled_from([0.0, 0.01]), st.floats(0.1, 60.0))
def test_every_level_gives_exactly_one_class(seed, classes, unimix, scale):
    gen = torch.Generator().manual_seed(seed)
    probs = probabilities(torch.randn(50, classes, generator=gen) * scale, unimix)
    levels = torch.cat([torch.zeros(10, 1), torch.full((10, 1), LAST_LEVEL), torch.rand(30, 1, generator=gen)])
    for draw in BOTH:
        sample = draw(probs, levels)
        assert sample.dtype == probs.dtype
        assert ((sample == 0) | (sample == 1)).all()
        assert (sample.sum(-1) == 1).all()
        assert ((sample * probs).sum(-1) > 0).all()  # never a class without probability


@pytest.mark.parametrize("classes", [2, 3, 16, 33])
def test_what_is_compiled_draws_the_same_classes(classes):
    gen = torch.Generator().manual_seed(classes)
    probs = torch.rand(200, 6, classes, generator=gen, dtype=torch.float64)  # exact enough that no rounding decides
    probs[torch.rand(probs.shape, generator=gen) < 0.4] = 0.0
    probs[..., 1] += 1e-3  # of each something can be drawn
    probs[:50, :, 0] = 0.0
    probs[50:100] /= probs[50:100].sum(-1, keepdim=True)
    levels = torch.rand(200, 6, 1, generator=gen, dtype=torch.float64)
    levels[::5] = 0.0
    plain, traced = (draw(probs, levels) for draw in BOTH)
    assert plain.dtype == traced.dtype == torch.float64
    assert torch.equal(plain, traced)
    assert torch.equal(traced.sum(-1), torch.ones(200, 6, dtype=torch.float64))
    assert ((traced == 0) | (traced == 1)).all()
    shares = (probs.cumsum(-1) / probs.sum(-1, keepdim=True)).flatten(0, 1).numpy()
    pairs = zip(shares, levels.flatten().numpy(), strict=True)
    expected = [np.searchsorted(share, level, side="right") for share, level in pairs]  # one by one
    assert traced.argmax(-1).flatten().tolist() == expected


@pytest.mark.parametrize("draw", BOTH)
def test_extreme_levels_give_the_first_and_the_last_class(draw):
    probs = torch.full((2, 4), 0.25)
    sample = draw(probs, torch.tensor([[0.0], [LAST_LEVEL]]))
    assert sample.argmax(-1).tolist() == [0, 3]


def test_mode_is_the_most_probable_class():
    probs = torch.softmax(torch.randn(20, 6, generator=torch.Generator().manual_seed(4)), -1)
    mode = onehot_mode(probs)
    assert torch.equal(mode.argmax(-1), probs.argmax(-1))
    assert torch.equal(mode.sum(-1), torch.ones(20))
    assert torch.equal(mode, sample_onehot(probs, None))


@pytest.mark.parametrize("sampled", [True, False])
def test_straight_through_passes_the_gradient_of_the_probabilities(sampled):
    logits = torch.randn(7, 5, generator=torch.Generator().manual_seed(5))
    weight = torch.randn(7, 5, generator=torch.Generator().manual_seed(6))
    level = torch.rand(7, 1, generator=torch.Generator().manual_seed(7)) if sampled else None
    a, b = (logits.clone().requires_grad_() for _ in range(2))
    sample = sample_onehot(probabilities(a), level)
    assert ((sample == 0) | (sample == 1)).all()
    (sample * weight).sum().backward()
    (probabilities(b) * weight).sum().backward()
    assert torch.allclose(a.grad, b.grad)


def test_kl_known_answers():
    half = torch.log(torch.tensor([[0.5, 0.5]]))
    skewed = torch.log(torch.tensor([[0.25, 0.75]]))
    expected = 0.5 * torch.log(torch.tensor(2.0)) + 0.5 * torch.log(torch.tensor(2.0 / 3.0))
    assert float(kl_divergence(half, half)) == 0.0
    assert torch.allclose(kl_divergence(half, skewed), expected)
    two = torch.stack([half, half], -2).squeeze(0), torch.stack([skewed, half], -2).squeeze(0)
    assert torch.allclose(kl_divergence(*two), expected)  # summed over the groups


def test_kl_agrees_with_torch_and_is_never_negative():
    p, q = random_logp(8, 9, 4, 6), random_logp(9, 9, 4, 6)
    categorical = [torch.distributions.Categorical(logits=x) for x in (p, q)]
    expected = torch.distributions.kl_divergence(*categorical).sum(-1)
    assert torch.allclose(kl_divergence(p, q), expected, atol=1e-5)
    assert (kl_divergence(p, q) > 0).all()


def test_free_nats_clip_the_sum_and_stop_the_gradient():
    post, prior = random_logp(10, 3, 2, 4, grad=True), random_logp(11, 3, 2, 4, grad=True)
    plain = kl_divergence(post, prior).detach()
    free = float(plain.median())
    dynamics, representation = kl_balance(post, prior, free)
    assert torch.allclose(dynamics, plain.clamp(min=free))
    assert torch.allclose(representation, plain.clamp(min=free))
    (dynamics + representation).sum().backward()
    below = plain < free
    assert below.any()
    assert (prior.grad[below] == 0).all()
    assert (post.grad[below] == 0).all()
    assert (prior.grad[~below] != 0).any()


def test_kl_losses_pull_one_side_each():
    post, prior = random_logp(12, 3, 2, 4, grad=True), random_logp(13, 3, 2, 4, grad=True)
    dynamics, representation = kl_balance(post, prior, 0.0)
    to_post, to_prior = torch.autograd.grad(dynamics.sum(), [post, prior], allow_unused=True)
    assert to_post is None or not to_post.any()
    assert to_prior.any()
    to_post, to_prior = torch.autograd.grad(representation.sum(), [post, prior], allow_unused=True)
    assert to_prior is None or not to_prior.any()
    assert to_post.any()


def test_latent_state_features_and_detach():
    deter = torch.arange(24.0).view(2, 3, 4).requires_grad_()
    stoch = torch.arange(20.0).view(2, 5, 2)
    state = LatentState(deter, stoch)
    assert state.feat().shape == (2, 22)
    assert state.feat()[1].tolist() == [*range(12, 24), *range(10, 20)]
    assert state.map(lambda leaf: leaf[:, None].expand(-1, 6, -1, -1)).feat().shape == (2, 6, 22)
    assert not state.detach().deter.requires_grad

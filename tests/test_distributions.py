"""Two-hot and symlog against closed forms."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from world_model.distributions import TwoHot, symexp, symlog

TARGETS = torch.tensor([0.0, 1e-4, -0.3, 0.5, 1.0, -1.0, 3.7, 42.0, -123.4, 999.5, -19_999.0, 20_000.0])


def code_of(twohot: TwoHot, target: torch.Tensor) -> torch.Tensor:
    """The target distribution that the loss uses, read off its gradient: softmax - d loss / d logits."""
    logits = torch.zeros(*target.shape, len(twohot.bins), requires_grad=True)
    twohot.loss(logits, target).sum().backward()
    return 1.0 / len(twohot.bins) - logits.grad


@given(st.floats(-1e4, 1e4))
def test_symexp_inverts_symlog(value):
    x = torch.tensor(value, dtype=torch.float64)
    assert float(symexp(symlog(x))) == pytest.approx(value, rel=1e-9, abs=1e-12)


def test_symlog_known_values():
    x = torch.tensor([0.0, torch.e - 1, -(torch.e - 1)])
    assert torch.allclose(symlog(x), torch.tensor([0.0, 1.0, -1.0]))


@pytest.mark.parametrize("bins", [0, 1, 2, 94, 256])
def test_bins_must_be_odd_and_at_least_three(bins):
    with pytest.raises(ValueError, match="odd"):
        TwoHot(bins)


@pytest.mark.parametrize(("bins", "limit"), [(3, 10.0), (95, 20_000.0), (255, 1e6)])
def test_bins_are_symmetric_and_span_the_limit(bins, limit):
    values = TwoHot(bins, limit).bins
    assert len(values) == bins
    assert values[bins // 2] == 0.0
    assert torch.equal(values, -values.flip(0))
    assert (values.diff() > 0).all()
    assert float(values[-1]) == pytest.approx(limit, rel=1e-6)


def test_code_has_two_neighbours_and_the_mean_of_the_target():
    twohot = TwoHot()
    code = code_of(twohot, TARGETS).double()
    assert torch.allclose(code.sum(-1), torch.ones(len(TARGETS), dtype=torch.float64), atol=1e-5)
    big = code > 1e-6
    assert (big.sum(-1) <= 2).all()
    span = big.float().argmax(-1), big.shape[-1] - 1 - big.flip(-1).float().argmax(-1)
    assert (span[1] - span[0] <= 1).all()
    mean = (code * big * twohot.bins.double()).sum(-1)
    assert torch.allclose(mean, TARGETS.double(), rtol=1e-5, atol=1e-5)


def test_mean_recovers_the_target_from_its_own_code():
    twohot = TwoHot()
    code = code_of(twohot, TARGETS)
    logits = torch.log(code.clamp(min=1e-30))
    assert torch.allclose(twohot.mean(logits), TARGETS, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bins", [3, 95, 255])
def test_equal_logits_mean_exactly_zero(bins):
    twohot = TwoHot(bins)
    for level in (0.0, 3.3, -7.0):
        assert twohot.mean(torch.full((4, bins), level)).tolist() == [0.0] * 4


def test_mean_of_known_distributions():
    twohot = TwoHot(5, 100.0)
    certain = torch.eye(5) * 200.0
    assert torch.allclose(twohot.mean(certain), twohot.bins)
    probs = torch.tensor([0.1, 0.2, 0.3, 0.15, 0.25])
    assert torch.allclose(twohot.mean(probs.log()), (probs * twohot.bins).sum(), rtol=1e-5)


def test_targets_beyond_the_limit_are_clamped():
    twohot = TwoHot(11, 50.0)
    logits = torch.randn(2, 11)
    outside = twohot.loss(logits, torch.tensor([1e9, -1e9]))
    assert torch.equal(outside, twohot.loss(logits, torch.tensor([50.0, -50.0])))
    assert torch.allclose(outside, -F.log_softmax(logits, -1)[[0, 1], [10, 0]], atol=1e-6)


@settings(deadline=None, max_examples=50)
@given(st.floats(-120.0, 120.0, width=32), st.integers(0, 2**31))
def test_loss_is_the_dense_cross_entropy(target, seed):
    twohot = TwoHot(21, 100.0)
    logits = torch.randn(21, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
    goal = torch.tensor(target).clamp(-100.0, 100.0).double()
    bins = twohot.bins.double()
    dense = torch.zeros(21, dtype=torch.float64)
    for low in range(20):
        if bins[low] <= goal <= bins[low + 1]:
            share = (goal - bins[low]) / (bins[low + 1] - bins[low])
            dense[low], dense[low + 1] = 1.0 - share, share
            break
    expected = -(dense * F.log_softmax(logits.double(), -1)).sum()
    assert float(twohot.loss(logits, torch.tensor(target))) == pytest.approx(float(expected), rel=1e-4, abs=1e-5)


def test_no_gradient_reaches_the_target():
    twohot = TwoHot(11, 50.0)
    target = torch.tensor([3.0], requires_grad=True)
    logits = torch.zeros(1, 11, requires_grad=True)
    twohot.loss(logits, target).sum().backward()
    assert target.grad is None
    assert logits.grad.abs().sum() > 0


def test_gradient_descent_on_the_loss_finds_the_target():
    twohot = TwoHot(21, 100.0)
    target = torch.tensor([-37.0, 0.0, 5.5])
    logits = torch.zeros(3, 21, requires_grad=True)
    adam = torch.optim.Adam([logits], lr=0.3)
    for _ in range(150):
        adam.zero_grad()
        twohot.loss(logits, target).sum().backward()
        adam.step()
    assert torch.allclose(twohot.mean(logits), target, atol=0.3)

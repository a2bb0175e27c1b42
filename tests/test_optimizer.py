"""The flat Adam against torch's own on separate parameters."""

import copy

import pytest
import torch
from torch import nn

from agent.learning.optimizer import FlatAdam, flatten


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 2))


def test_flatten_keeps_values_and_makes_views():
    net = network()
    before = [p.detach().clone() for p in net.parameters()]
    x = torch.randn(4, 3)
    out = net(x)
    flat = flatten(net.parameters())
    assert flat.shape == (sum(p.numel() for p in before),)
    assert torch.equal(flat, torch.cat([p.flatten() for p in before]))
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    assert torch.equal(net(x), out)
    with torch.no_grad():
        flat.fill_(0.5)
    assert all((p == 0.5).all() for p in net.parameters())


def test_gradients_land_in_the_flat_gradient():
    net, twin = network(), network()
    flat = flatten(net.parameters())
    x = torch.randn(4, 3)
    for _ in range(2):  # accumulates, as separate gradients do
        net(x).square().sum().backward()
        twin(x).square().sum().backward()
    assert torch.equal(flat.grad, torch.cat([p.grad.flatten() for p in twin.parameters()]))


def test_flatten_without_gradient_makes_frozen_views():
    net, twin = network(), network()
    flat = flatten(net.parameters(), grad=False)
    assert flat.grad is None
    assert not flat.requires_grad
    assert all(p.grad is None and not p.requires_grad for p in net.parameters())
    flat.lerp_(torch.zeros_like(flat), 0.25)
    assert all(torch.allclose(p, 0.75 * q) for p, q in zip(net.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("clip", [0.5, 1e6])
def test_step_equals_adam_with_a_clipped_global_norm(clip):
    net, twin = network(), network()
    flat = FlatAdam(net.parameters(), lr=1e-2, clip=clip, warmup=0)
    adam = torch.optim.Adam(twin.parameters(), lr=1e-2, eps=1e-8)
    gen = torch.Generator().manual_seed(1)
    for _ in range(8):
        x = torch.randn(16, 3, generator=gen) * 3
        flat.gradient.zero_()
        adam.zero_grad()
        net(x).square().sum().backward()
        twin(x).square().sum().backward()
        norm = flat.clip_gradient()
        expected = nn.utils.clip_grad_norm_(twin.parameters(), clip)
        assert torch.allclose(norm, expected, rtol=1e-4)
        assert torch.allclose(flat.flat.grad, torch.cat([p.grad.flatten() for p in twin.parameters()]), atol=1e-5)
        flat.step()
        adam.step()
    for a, b in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    assert not torch.allclose(net[0].weight, network()[0].weight, atol=1e-2)


def test_warm_up_and_factor_scale_the_rate():
    net = nn.Linear(1, 1, bias=False)
    adam = FlatAdam(net.parameters(), lr=0.1, clip=1e9, warmup=4)
    sizes = []
    for factor in [1.0, 1.0, 1.0, 1.0, 1.0, 0.5]:
        adam.gradient.zero_()
        before = net.weight.item()
        (net.weight * 3.0).sum().backward()  # a constant gradient: Adam moves by exactly the rate
        adam.set_rate(factor)
        adam.step()
        sizes.append(before - net.weight.item())
    assert sizes == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1, 0.05], rel=1e-3)


def test_clipping_alone_moves_no_weight():
    net, twin = network(), network()
    adam = FlatAdam(net.parameters(), lr=0.1, clip=1e-3, warmup=0)
    net(torch.randn(4, 3)).sum().backward()
    norm = adam.clip_gradient()
    assert norm > 1e-3
    assert adam.flat.grad.norm().item() == pytest.approx(1e-3, rel=1e-2)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), twin.parameters(), strict=True))
    assert adam.state_dict()["updates"] == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_gradient_shows_and_a_skipped_step_leaves_everything_untouched(bad):
    net = network()
    adam = FlatAdam(net.parameters(), lr=0.1, clip=1.0, warmup=0)
    skip = torch.zeros(())
    adam.skip_step_where(skip)
    net(torch.randn(4, 3)).sum().backward()
    before = adam.flat.detach().clone()
    adam.step()
    weights, state = adam.flat.detach().clone(), copy.deepcopy(adam.state_dict())
    assert not torch.equal(weights, before)
    adam.gradient.zero_()
    net(torch.randn(4, 3)).sum().backward()
    net[0].weight.grad[1, 1] = bad
    skip.copy_(~torch.isfinite(adam.clip_gradient()))
    assert skip == 1
    adam.step()
    assert torch.equal(adam.flat, weights)
    for name, value in state["adam"]["state"][0].items():
        assert torch.equal(adam.state_dict()["adam"]["state"][0][name], value)


def test_state_round_trip_continues_identically():
    nets = [network(), network()]
    first = FlatAdam(nets[0].parameters(), lr=0.1, clip=1.0, warmup=5)
    xs = torch.randn(6, 8, 3)

    def train(net: nn.Module, adam: FlatAdam, batches: torch.Tensor) -> None:
        for x in batches:
            adam.gradient.zero_()
            net(x).square().sum().backward()
            adam.set_rate()
            adam.step()

    train(nets[0], first, xs[:3])
    saved, weights = copy.deepcopy(first.state_dict()), copy.deepcopy(nets[0].state_dict())
    second = FlatAdam(nets[1].parameters(), lr=0.1, clip=1.0, warmup=5)
    nets[1].load_state_dict(weights)
    second.load_state_dict(saved)
    assert repr(second.state_dict()) == repr(first.state_dict())  # the rate of the last step is no state
    train(nets[0], first, xs[3:])
    train(nets[1], second, xs[3:])
    assert torch.equal(first.flat, second.flat)

"""The named choices of the looped core: retention, gain, norm, initial state, truncated gradients."""

import math

import pytest
import torch
import torch.nn.functional as F
from small import core_input, make_core, make_world
from torch import nn

from world_model.block import Block
from world_model.retention import Retention


def linear_loop(**settings):
    """A core whose block does nothing and whose state is not normalised."""
    core = make_core(double=True, **settings)
    with torch.no_grad():
        core.block.merge.weight.zero_()
        core.block.down.weight.zero_()
    core.loop_norm = nn.Identity()
    return core


# ---------------------------------------------------------------------- retention and gain


def test_zero_order_hold_is_the_exact_solution_of_the_linear_dynamics():
    """dh/ds = -exp(a) h + B e over R intervals Delta, by many small Euler steps."""
    core = linear_loop(gain="zoh")
    with torch.no_grad():
        core.retention.matrix.normal_(generator=torch.Generator().manual_seed(0))
    deter, inputs = core_input(core, 4)
    _, (states, *_) = core(deter, inputs, 3, core.prepare())
    e, _ = core.prelude(deter, inputs)
    speed, delta = core.retention.log_rate.exp(), F.softplus(core.retention.delta)
    drive, h, small = e @ core.retention.matrix.t(), deter, 20_000
    for _ in range(small):
        h = h + 3 * delta / small * (drive - speed * h)
    assert torch.allclose(states[-1], h, atol=1e-3)


@pytest.mark.parametrize("log_rate", [-200.0, -9.0, 0.0, 5.0, 80.0])
def test_no_gain_grows_beyond_delta(log_rate):
    """Where Delta * exp(a) is clamped, zero-order hold goes on to its limits: Delta for slow channels, 0 for fast."""
    retention = Retention(4, "zoh")
    with torch.no_grad():
        retention.log_rate.fill_(log_rate)
    decay, injection = retention()
    delta = float(F.softplus(retention.delta[0]))
    assert ((injection.diagonal() > 0) & (injection.diagonal() <= delta * 1.00001)).all()
    if log_rate < -8:
        assert torch.allclose(injection.diagonal(), torch.full((4,), delta), rtol=1e-3)


def test_a_free_retention_is_a_plain_vector_that_may_pass_one():
    free, kept = Retention(8, kind="free"), Retention(8)
    assert torch.allclose(free().decay, kept().decay, atol=1e-6)  # they start alike
    assert torch.allclose(free().injection, kept().injection, atol=1e-6)
    with torch.no_grad():
        free.decay.fill_(1.5)
    decay, _ = free()
    assert (decay == 1.5).all()
    decay.sum().backward()
    assert (free.decay.grad == 1).all()
    assert "log_rate" not in dict(free.named_parameters())


# ---------------------------------------------------------------------- norm


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("place", ["pre", "sandwich", "post"])
def test_the_norm_stands_where_its_name_says(place, tokens):
    torch.manual_seed(0)
    block = Block(tokens, 8, 2, 16, place)
    x = torch.randn(5, tokens, 8) * 3

    def norm(y):
        return F.layer_norm(y, (8,), eps=1e-3)

    def around(f, x):
        if place == "post":
            return norm(x + f(x))
        return x + f(norm(x)) if place == "pre" else x + 0.1 * norm(f(norm(x)))

    def mlp(y):
        gate, value = block.up(y).chunk(2, -1)
        return block.down(F.silu(gate) * value)

    expected = x if tokens == 1 else around(lambda y: block.merge(block.attention(block.qkv(y))), x)
    assert torch.allclose(block(x), around(mlp, expected), atol=1e-5)


@pytest.mark.parametrize("place", ["pre", "sandwich", "post"])
@torch.no_grad()
def test_a_thousand_dreamed_steps_at_twice_the_training_depth_stay_bounded(place):
    world = make_world(norm=place, mean_loops=2.0, exit="fixed")
    start = world.initial(4)
    actions = torch.randn(4, 1000, 2, generator=torch.Generator().manual_seed(0))
    dream = world.imagine(start, actions, 1000, max_loops=2 * world.cfg.loop.train_cap)
    assert dream.states.deter.isfinite().all()
    norms = dream.states.deter.norm(dim=-1)
    # The outer gate gives weighted means of normalised tokens and of the start.
    assert norms.max() <= max(math.sqrt(8) * 1.0001, float(norms[:, 0].max()))


@pytest.mark.parametrize(("expand", "hidden"), [(2.0, 16), (0.25, 2), (1, 8)])
def test_the_mlp_may_be_narrower_than_its_state(expand, hidden):
    core = make_core(expand=expand)
    assert core.block.up.weight.shape == (2 * hidden, 8)
    deter, inputs = core_input(core, 2)
    assert core(deter, inputs, 2, core.prepare())[0].isfinite().all()


# ---------------------------------------------------------------------- initial state


def test_the_loop_starts_where_it_is_told():
    for initial in ("carry", "zero", "noise"):
        core = make_core(initial=initial)
        deter, inputs = core_input(core, 64)
        torch.manual_seed(1)
        first = core(deter, inputs, 1, core.prepare())[1].states[0]
        if initial == "carry":
            assert torch.equal(first, deter)
        elif initial == "zero":
            assert not first.any()
        else:
            assert float(first.std()) == pytest.approx(1.0, abs=0.1)
            assert not torch.equal(first, core(deter, inputs, 1, core.prepare())[1].states[0])


@pytest.mark.parametrize("initial", ["zero", "noise"])
def test_memory_does_not_need_the_carried_loop_state(initial):
    core = make_core(initial=initial, carry="replace")  # neither the outer gate: the prelude alone
    first, _ = core_input(core, 3)
    deter = first.requires_grad_()
    for step in range(10):
        deter = core(deter, core_input(core, 3, seed=step + 10)[1], 2, core.prepare())[0]
    (grad,) = torch.autograd.grad(deter.square().mul(torch.linspace(0.5, 1.5, 8)).sum(), first)
    assert (grad.flatten(1).norm(dim=1) > 1e-4).all()


# ---------------------------------------------------------------------- truncated gradients


@pytest.mark.parametrize("per_sequence", [False, True])
@pytest.mark.parametrize(("loops", "last"), [(5, 2), (3, 1), (4, 4), (2, 6)])
def test_exactly_the_last_loops_are_differentiated(loops, last, per_sequence):
    """In the linear loop d x_R / d e = sum of decay^k * injection over the differentiated loops."""
    core = linear_loop(backprop_loops=last)
    deter, inputs = core_input(core, 2)
    deter.requires_grad_()
    seen = []
    prelude = core.prelude

    def watched(*args):
        e, gate = prelude(*args)
        seen.append(e.detach().requires_grad_())
        return seen[0], gate.detach()

    core.prelude = watched
    depth = torch.full((2,), loops) if per_sequence else loops
    _, (states, *_) = core(deter, inputs, depth, core.prepare())
    to_e, to_start = torch.autograd.grad(states[-1].sum(), [seen[0], deter], allow_unused=True)
    decay, injection = core.prepare()
    ran = min(loops, last)
    expected = (sum(decay**k for k in range(ran)) @ injection).expand_as(to_e)
    assert torch.allclose(to_e, expected, atol=1e-10)
    if last >= loops:  # nothing is cut: the carried state is reached through the loops too
        assert torch.allclose(to_start, (decay**loops).expand_as(to_start), atol=1e-10)
    else:
        assert to_start is None or not to_start.any()


def test_truncation_changes_no_value_and_time_stays_open():
    whole, cut = (make_core(double=True, carry="replace", backprop_loops=last) for last in (None, 1))
    deter, inputs = core_input(whole, 4)
    assert torch.equal(whole(deter, inputs, 5, whole.prepare())[0], cut(deter, inputs, 5, cut.prepare())[0])
    first = deter.requires_grad_()
    state = first
    for step in range(6):
        state = cut(state, core_input(cut, 4, seed=step)[1], 5, cut.prepare())[0]
    (grad,) = torch.autograd.grad(state.square().mul(torch.linspace(0.5, 1.5, 8)).sum(), first)
    assert (grad.flatten(1).norm(dim=1) > 1e-6).all()


def test_sequences_of_unequal_depth_are_cut_each_at_its_own():
    core = linear_loop(backprop_loops=2)
    deter, inputs = core_input(core, 3)
    deter.requires_grad_()
    loops = torch.tensor([1, 2, 4])
    _, (states, *_) = core(deter, inputs, loops, core.prepare())
    with torch.no_grad():
        decay, _ = core.prepare()
    core.prelude_in.weight.requires_grad_(False)
    (grad,) = torch.autograd.grad(states[-1].sum(), deter)
    e, _ = core.prelude(deter, inputs)
    (through_e,) = torch.autograd.grad((e @ core.prepare().injection.t()).sum(), deter, retain_graph=True)
    assert torch.allclose(grad[0] - through_e[0], decay.expand_as(grad[0]), atol=1e-8)  # one loop, not cut
    factor = 1 + decay  # two loops: e enters the first one damped, the second one as it is
    (through_both,) = torch.autograd.grad((factor * (e @ core.prepare().injection.t())).sum(), deter)
    assert torch.allclose(grad[1] - through_both[1], decay.pow(2).expand_as(grad[1]), atol=1e-8)  # two, not cut
    assert torch.allclose(grad[2], through_both[2], atol=1e-8)  # four, of which the first two are cut


def test_impossible_truncation_is_refused():
    with pytest.raises(ValueError, match="backprop_loops"):
        make_core(backprop_loops=0)

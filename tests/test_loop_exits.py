"""The exits of the looped core: each sample stops by itself, and depends on no other."""

import pytest
import torch
from small import core_input, exit_bias, forward_at, make_core, step_of

from world_model.looped import LoopedCore


def spread_exits(core: LoopedCore) -> LoopedCore:
    """Random exit weights, so that samples stop at different depths."""
    with torch.no_grad():
        core.rule.state.weight.normal_(generator=torch.Generator().manual_seed(2))
        core.rule.state.bias.fill_(2.0)
        core.rule.change.weight.normal_(generator=torch.Generator().manual_seed(3))
    return core


@pytest.mark.parametrize("compact", [True, False])
def test_an_adaptive_step_of_fixed_depth_equals_forward(compact):
    core = make_core(exit="fixed")
    deter, inputs = core_input(core, 5)
    dynamics = core.prepare()
    for loops in (None, 1, 4):
        result, stats = step_of(core, deter, inputs, dynamics, loops, compact=compact)
        ran = loops or 3
        assert torch.allclose(result, core(deter, inputs, ran, dynamics)[0], atol=1e-6)
        assert stats.depth.tolist() == [ran] * 5
        assert stats.residual.shape == (5, ran)


def test_compacted_and_frozen_exits_agree():
    core = spread_exits(make_core(double=True))
    deter, inputs = core_input(core, 32)
    dynamics = core.prepare()
    compact, a = step_of(core, deter, inputs, dynamics, 8, compact=True)
    frozen, b = step_of(core, deter, inputs, dynamics, 8, compact=False)
    assert len(a.depth.unique()) >= 3
    assert torch.equal(a.depth, b.depth)
    assert torch.allclose(compact, frozen, atol=1e-12)
    assert torch.allclose(a.residual, b.residual, atol=1e-12)


def test_exits_give_the_state_of_their_own_depth():
    core = spread_exits(make_core(double=True))
    deter, inputs = core_input(core, 32)
    dynamics = core.prepare()
    result, stats = core.adaptive_step(deter, inputs, dynamics, 8)
    states = core(deter, inputs, 8, dynamics)[1].states
    assert torch.allclose(result, forward_at(core, deter, inputs, stats.depth), atol=1e-12)
    # A sample stops after the first loop whose predicted improvement is not above the threshold.
    for row, depth in enumerate(stats.depth.tolist()):
        for loop in range(1, min(depth, 7) + 1):
            x = states[loop][row : row + 1]
            gain = core.rule.improvement(x, x - states[loop - 1][row : row + 1])
            assert (gain.item() > core.rule.threshold) == (loop < depth)


def test_loop_stats_have_one_residual_per_loop_and_zeros_after_the_exit():
    core = spread_exits(make_core(double=True))
    deter, inputs = core_input(core, 32)
    dynamics = core.prepare()
    for compact in (True, False):
        _, stats = step_of(core, deter, inputs, dynamics, 8, compact=compact)
        assert stats.depth.shape == (32,)
        assert stats.residual.shape == (32, 8)
        ran = torch.arange(8) < stats.depth[:, None]
        assert not ran.all()
        assert (stats.residual[ran] > 0).all()
        assert (stats.residual[~ran] == 0).all()
    states = core(deter, inputs, 1, dynamics)[1].states
    first = (states[1] - states[0]).flatten(1).norm(dim=1) / states[1].flatten(1).norm(dim=1)
    assert torch.allclose(stats.residual[:, 0], first)


@pytest.mark.parametrize("compact", [True, False])
def test_all_samples_can_exit_after_the_first_loop(compact):
    core = exit_bias(make_core(), -5.0)
    deter, inputs = core_input(core, 4)
    dynamics = core.prepare()
    result, stats = step_of(core, deter, inputs, dynamics, 6, compact=compact)
    assert stats.depth.tolist() == [1] * 4
    assert torch.allclose(result, core(deter, inputs, 1, dynamics)[0], atol=1e-6)


@pytest.mark.parametrize("compact", [True, False])
def test_max_loops_may_exceed_the_training_depth(compact):
    core = exit_bias(make_core(), 1e9)
    deter, inputs = core_input(core, 4)
    dynamics = core.prepare()
    beyond = 3 * core.cfg.train_cap
    result, stats = step_of(core, deter, inputs, dynamics, beyond, compact=compact)
    assert stats.depth.tolist() == [beyond] * 4
    assert torch.allclose(result, core(deter, inputs, beyond, dynamics)[0], atol=1e-5)
    assert core.adaptive_step(deter, inputs, dynamics)[1].depth.tolist() == [core.cfg.train_cap] * 4
    assert make_core(max_loops=9).cfg.run_cap == 9


def test_a_new_core_goes_on_until_its_state_has_settled():
    core = make_core()
    deter, inputs = core_input(core, 16)
    _, stats = core.adaptive_step(deter, inputs, core.prepare(), 50)
    last = stats.residual[range(16), stats.depth - 1]
    before = stats.residual[range(16), stats.depth - 2]
    assert (stats.depth > 2).all()
    assert (last < 0.06).all()
    assert (before > 0.03).all()


def test_a_settled_state_is_never_worth_another_loop():
    core = spread_exits(make_core())
    x = core_input(core, 16)[0]
    change = torch.randn(x.shape, generator=torch.Generator().manual_seed(4))
    gains = [core.rule.improvement(x, change * size).abs() for size in (1.0, 0.1, 0.0)]
    assert torch.allclose(gains[1], 0.1 * gains[0], rtol=1e-4)
    assert (gains[2] == 0).all()


def test_a_higher_threshold_exits_no_later():
    cores = [spread_exits(make_core(exit_threshold=t, double=True)) for t in (-1.0, 0.5, 2.0)]
    deter, inputs = core_input(cores[0], 32)
    depths = [core.adaptive_step(deter, inputs, core.prepare(), 8)[1].depth for core in cores]
    assert (depths[0] >= depths[1]).all()
    assert (depths[1] >= depths[2]).all()
    assert depths[0].sum() > depths[2].sum()


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("compact", [True, False])
def test_a_row_does_not_depend_on_its_batch(tokens, compact):
    core = spread_exits(make_core(double=True, tokens=tokens))
    deter, inputs = core_input(core, 64)
    dynamics = core.prepare()
    together, stats = step_of(core, deter, inputs, dynamics, 8, compact=compact)
    assert len(stats.depth.unique()) >= 2
    for row in range(64):
        one = slice(row, row + 1)
        alone, own = step_of(core, deter[one], inputs[one], dynamics, 8, compact=compact)
        assert own.depth.item() == stats.depth[row].item()
        assert torch.allclose(alone[0], together[row], atol=1e-11)

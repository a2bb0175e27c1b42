"""The controls: stack and GRU behind the same interface, their cost, and sizes that match the looped core's."""

import pytest
import torch
from small import make_batch, observe, random_state, world_loss
from torch.utils.flop_counter import FlopCounterMode

from world_model import ModelConfig, WorldModel, cost
from world_model.controls import gru
from world_model.controls.gru import GRUCore
from world_model.controls.matching import make_core, nearest
from world_model.controls.stacked import StackedCore
from world_model.core import CoreSizes
from world_model.looped import LoopConfig, LoopedCore

SIZES = CoreSizes(groups=16, classes=8, actions=6)
LOOP = LoopConfig()
WIDE = LoopConfig(tokens=4, width=64)


def build(name, match="none", loop=LOOP):
    torch.manual_seed(0)
    return make_core(name, loop, SIZES, match)


def step(core, loops=2, batch=3):
    """One step of random states: (next deter, trace)."""
    gen = torch.Generator().manual_seed(1)
    deter = torch.randn(batch, *core.start.shape, generator=gen)
    inputs = torch.randn(batch, SIZES.groups * SIZES.classes + SIZES.actions, generator=gen)
    return deter, inputs, core(deter, inputs, loops, core.prepare())


# ---------------------------------------------------------------------- the cells


def test_a_stack_whose_layers_are_copies_is_the_looped_core():
    looped, stacked = build("looped"), build("stacked")
    with torch.no_grad():
        for name, parameter in stacked.named_parameters():
            parts = name.split(".")
            if parts[0] == "layers":
                parts = ["loop_norm" if parts[2] == "norm" else parts[2], *parts[3:]]
            parameter.copy_(looped.get_parameter(".".join(parts)))
    assert len(stacked.layers) == 2
    _, _, (expected, trace) = step(looped, 2)
    _, _, (found, stack_trace) = step(stacked, 99)  # the number of loops means nothing to a stack
    assert torch.allclose(found, expected, atol=1e-6)
    for a, b in zip(trace.states, stack_trace.states, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_the_gru_is_the_cell_of_dreamerv3(monkeypatch):
    monkeypatch.setattr(gru, "BLOCKS", 4)
    core = build("gru", loop=LoopConfig(width=16, units=5))
    deter, inputs, (found, trace) = step(core)

    def read(part, x):
        y = x @ part.linear.weight.t() + part.linear.bias
        y = torch.nn.functional.layer_norm(y, y.shape[-1:], eps=1e-3)
        return y * torch.sigmoid(y)

    for row in range(3):
        h, z, a = deter[row].flatten(), inputs[row, :128], inputs[row, 128:]
        said = torch.cat([read(core.read_deter, h), read(core.read_stoch, z), read(core.read_action, a)])
        hidden = torch.cat(
            [torch.cat([h[4 * b : 4 * b + 4], said]) @ core.hidden.weight[b] + core.hidden.bias[b, 0] for b in range(4)]
        )
        hidden = torch.nn.functional.silu(torch.nn.functional.layer_norm(hidden, (16,), eps=1e-3))
        for b in range(4):
            part = slice(4 * b, 4 * b + 4)
            reset, candidate, update = (hidden[part] @ core.gates.weight[b] + core.gates.bias[b, 0]).split(4)
            u = torch.sigmoid(update - 1)
            new = u * torch.tanh(torch.sigmoid(reset) * candidate) + (1 - u) * h[part]
            assert torch.allclose(found[row].flatten()[part], new, atol=1e-5)
            assert torch.allclose(trace.gate[row].flatten()[part], u, atol=1e-5)


def test_the_recurrence_of_dreamerv3_12m_has_as_many_parameters_as_its_code_makes():
    """Deter 2048, hidden 256, 32 latents of 16 classes, 8 blocks, 6 actions: the sum of its layers, by hand."""
    torch.manual_seed(0)
    core = GRUCore(LoopConfig(width=2048, units=256), CoreSizes(32, 16, 6))
    reads = sum((size + 1) * 256 + 256 for size in (2048, 512, 6))
    hidden = 8 * (2048 // 8 + 3 * 256) * (2048 // 8) + 2048 + 2048
    gates = 8 * (2048 // 8) * 3 * (2048 // 8) + 3 * 2048
    start = 2048  # learned here, zero there
    assert cost(core).params == reads + hidden + gates + start


@pytest.mark.parametrize("kind", ["stacked", "gru"])
def test_a_control_trains_dreams_and_reports_one_loop(kind):
    torch.manual_seed(0)
    loop = LoopConfig(tokens=2, width=8, units=16)
    cfg = ModelConfig(core=kind, loop=loop, groups=3, classes=4, units=16)
    world = WorldModel(cfg, {"state": 4}, 2)
    batch = make_batch(world)
    loss, _, metrics = world_loss(world, batch)
    loss.backward()
    assert all(value.isfinite() for value in metrics.values())
    assert not any(name.startswith("loop/exit") for name in metrics)
    missing = [name for name, p in world.core.named_parameters() if p.grad is None or not p.grad.any()]
    assert not missing
    dream = world.imagine(random_state(world), torch.zeros(3, 5, 2), 5, max_loops=7)
    assert (dream.loops.depth == 1).all()
    assert world.run_cap == 1
    assert {world.sample_depth() for _ in range(20)} == {1}  # no depth is drawn where it means nothing
    # Memory: the first row still matters to the last one.
    last = observe(world, batch).states.deter[:, -1].mul(torch.linspace(-1, 1, 8)).sum()
    (grad,) = torch.autograd.grad(last, world.core.start)
    assert grad.abs().max() > 1e-6


# ---------------------------------------------------------------------- cost


@pytest.mark.parametrize("loop", [LOOP, WIDE], ids=["one token", "four tokens"])
@pytest.mark.parametrize(("name", "loops"), [("looped", 1), ("looped", 3), ("stacked", 1), ("gru", 1)])
def test_flops_agree_with_what_torch_counts(name, loops, loop):
    core = build(name, loop=loop)
    with FlopCounterMode(display=False) as counter:
        step(core, loops, batch=1)
    written_out = 0.0  # attention on CPU is not a matrix product, and torch does not count it
    if loop.tokens > 1 and name != "gru":
        blocks = loops if name == "looped" else len(core.layers)
        written_out = blocks * 4.0 * loop.tokens**2 * loop.width
    assert core.flops(loops) == pytest.approx(counter.get_total_flops() + written_out, rel=1e-6)


@pytest.mark.parametrize("loop", [LOOP, WIDE], ids=["one token", "four tokens"])
@pytest.mark.parametrize("match", ["params", "flops"])
@pytest.mark.parametrize("name", ["stacked", "gru"])
def test_a_matched_control_costs_what_the_looped_core_costs(name, match, loop):
    wanted = getattr(cost(build("looped", loop=loop), loop.mean_loops), match)
    found = getattr(cost(build(name, match, loop)), match)
    assert found == pytest.approx(wanted, rel=0.01)
    assert isinstance(build(name, match, loop), StackedCore if name == "stacked" else GRUCore)


def test_the_exit_rule_does_not_matter_to_matching():
    random = build("gru", "params", LoopConfig(exit="random", exit_histogram=(1.0, 3.0)))
    assert cost(random) == cost(build("gru", "params", LoopConfig()))


def test_matching_draws_no_random_numbers():
    sized = build("gru", "params")
    after = torch.rand(1)
    plain = build("gru", loop=LoopConfig(units=sized.read_deter.linear.out_features))
    assert torch.equal(torch.rand(1), after)
    for one, other in zip(sized.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_exit_rule_costs_nothing_and_moves_no_other_weight():
    gate, none = build("looped"), build("looped", loop=LoopConfig(exit="fixed"))
    assert isinstance(gate, LoopedCore)
    assert cost(gate).params == cost(none).params == sum(p.numel() for p in none.parameters())
    weights = dict(gate.named_parameters())
    assert all(torch.equal(parameter, weights[name]) for name, parameter in none.named_parameters())
    build("looped")
    after = torch.rand(1)
    build("looped", loop=LoopConfig(exit="paper"))
    assert torch.equal(torch.rand(1), after)


def test_a_control_that_cannot_be_so_small_is_refused():
    with pytest.raises(ValueError, match="no stacked core is as small"):
        make_core("stacked", LoopConfig(mean_loops=30), SIZES, "params")
    with pytest.raises(ValueError, match="tokens \\* width = 12: give a --model.loop.width"):
        make_core("gru", LoopConfig(width=12), SIZES)


def test_nearest_finds_the_integer():
    assert nearest(lambda size: 3.0 * size, 10.0) == 3
    assert nearest(lambda size: 3.0 * size, 11.0) == 4
    assert nearest(lambda size: 3.0 * size, 2.0) == 0
    assert nearest(lambda size: float(size * size), 1e6) == 1000

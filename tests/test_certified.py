"""Cores with a certificate: no attack exceeds it, and the exit's bound holds at every loop."""

import math

import pytest
import torch
from small import CORE_INPUTS, core_input, make_batch, step_of

from world_model import CoreSizes, LoopConfig, ModelConfig, WorldModel
from world_model.attack import Points, expansion, leading_direction, loop_map, step_map, visited_points
from world_model.certified import (
    RATE,
    SMALLEST_UPDATE,
    CertifiedCore,
    CertifiedExit,
    CertifiedLoop,
    ContractingCore,
    at_most_one,
    certificate,
    maxmin,
    spectral_bound,
)
from world_model.controls.matching import make_core
from world_model.exits import HaltingState
from world_model.looped import LoopedCore

KINDS = ["certified", "contracting"]
CLOSE = 1e-9


def core_of(kind, scale=1.0, double=True, **settings):
    """A small core, its weights moved at random and multiplied by `scale`."""
    torch.manual_seed(0)
    cfg = LoopConfig(**{"tokens": 4, "width": 8, "units": 16, "mean_loops": 3.0} | settings)
    core = make_core(kind, cfg, CoreSizes(groups=1, classes=CORE_INPUTS - 2, actions=2))
    with torch.no_grad():
        for weight in core.parameters():
            weight.add_(0.3 * torch.randn_like(weight)).mul_(scale)
    return core.double() if double else core


def points_of(core, count, size=1.0):
    deter, inputs = core_input(core, count)
    return Points(size * deter, torch.randn_like(deter)), Points(size * deter, inputs)


# ---------------------------------------------------------------------- the bound of a matrix


@pytest.mark.parametrize("shape", [(1, 1), (5, 5), (3, 40), (64, 7), (128, 128)])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_the_spectral_bound_is_above_the_norm_and_near_it(shape, scale):
    torch.manual_seed(0)
    for matrix in (torch.randn(shape), torch.eye(*shape), torch.ones(shape)):
        matrix = scale * matrix.double()
        true = float(torch.linalg.matrix_norm(matrix, 2))
        bound = float(spectral_bound(matrix))
        assert true * (1 - 1e-9) <= bound <= true * min(shape) ** (1 / 128) * (1 + 1e-9)


def test_the_spectral_bound_has_the_gradient_of_the_norm():
    matrix = torch.diag(torch.tensor([3.0, 1.0, 0.5], dtype=torch.float64)).requires_grad_()
    (gradient,) = torch.autograd.grad(spectral_bound(matrix), matrix)
    expected = torch.zeros(3, 3, dtype=torch.float64)
    expected[0, 0] = 1.0
    assert torch.allclose(gradient, expected, atol=1e-6)


def test_small_matrices_stay_as_they_are_and_zero_is_no_trouble():
    small = 0.1 * torch.eye(4)
    assert torch.equal(at_most_one(small), small)
    zero = torch.zeros(3, 3, requires_grad=True)
    at_most_one(zero).sum().backward()
    assert torch.equal(at_most_one(zero), torch.zeros(3, 3))
    assert zero.grad.isfinite().all()


def test_maxmin_sorts_pairs_and_keeps_distances():
    x = torch.tensor([[1.0, -2.0, 0.0, 5.0]])
    assert torch.equal(maxmin(x), torch.tensor([[1.0, 5.0, 0.0, -2.0]]))
    a, b = torch.randn(2, 100, 6)
    assert (((maxmin(a) - maxmin(b)).norm(dim=1)) <= (a - b).norm(dim=1) + 1e-6).all()


# ---------------------------------------------------------------------- certificate against attack


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_no_attack_exceeds_the_certificate(kind, tokens, scale):
    core = core_of(kind, scale, tokens=tokens)
    bound = certificate(core)
    assert bound.loop <= RATE + CLOSE
    for size in (0.1, 10.0):
        loop, step = points_of(core, 40, size)
        found = expansion(loop_map(core), loop, steps=30)
        assert float(found.attacked.max()) <= bound.loop + CLOSE
        assert (found.attacked >= found.visited).all()
        if kind == "contracting":
            for loops in (1, 3):
                assert float(expansion(step_map(core, loops), step, steps=30).attacked.max()) <= bound.step + CLOSE


@pytest.mark.parametrize("kind", KINDS)
def test_the_certificate_is_not_loose(kind):
    """With identity matrices and open gates the attack comes near the bound."""
    core = core_of(kind, tokens=1)
    with torch.no_grad():
        for matrix in (core.loop.up, core.loop.down):
            matrix.copy_(torch.eye(*matrix.shape))
        core.loop.gate.weight.zero_()
        core.loop.bias.weight.zero_()
        core.retention.log_rate.fill_(-20.0)  # Abar = exp(-1e-4)
    loop, _ = points_of(core, 20)
    assert float(expansion(loop_map(core), loop, steps=30).attacked.max()) > 0.99 * certificate(core).loop


def test_an_attack_finds_what_the_free_loop_hides():
    """The search is no certificate that cannot fail: it breaks the looped core's, whose largest value it more than
    doubles."""
    core = core_of("looped", tokens=1)
    assert certificate(core).loop == math.inf
    loop, _ = points_of(core, 40)
    found = expansion(loop_map(core), loop, steps=100)
    assert float(found.attacked.max()) > 2.0 * float(found.visited.max())


def test_the_leading_direction_is_that_of_the_jacobian():
    core = core_of("looped", tokens=2)
    loop, _ = points_of(core, 3)
    f = loop_map(core)
    value, direction = leading_direction(f, *loop, iterations=200)
    for row in range(3):
        given = loop.given[row : row + 1]
        jacobian = torch.autograd.functional.jacobian(lambda x, given=given: f(x, given), loop.state[row : row + 1])
        matrix = jacobian.reshape(16, 16)
        assert float(value[row]) == pytest.approx(float(torch.linalg.matrix_norm(matrix, 2)), rel=1e-4)
        assert float((matrix @ direction[row].flatten()).norm() / direction[row].norm()) == pytest.approx(
            float(value[row]), rel=1e-4
        )


def test_nothing_is_certified_of_a_subclass_with_a_step_of_its_own():
    class Growing(LoopedCore):
        def readout(self, deter, x, gate):
            return deter + x

    class Named(LoopedCore):
        """The steps of the looped core."""

        def flops(self, loops=1.0):
            return 0.0

    class Tripled(ContractingCore):
        def forward(self, *args):
            deter, trace = super().forward(*args)
            return 3.0 * deter, trace

    class Louder(LoopedCore):
        def adaptive_step(self, *args):
            deter, *others = super().adaptive_step(*args)
            return 5.0 * deter, *others

    class Wild(CertifiedLoop):
        def forward(self, *args):
            return 4.0 * super().forward(*args)

    class Wilder(CertifiedCore):
        def build_loop(self, cfg):
            super().build_loop(cfg)
            self.loop.__class__ = Wild

    sizes = CoreSizes(groups=1, classes=CORE_INPUTS - 2, actions=2)
    for kind in (Growing, Tripled, Louder, Wilder):
        assert certificate(kind(LoopConfig(), sizes)) == (math.inf,) * 3
    core = CertifiedCore(LoopConfig(exit="experiments.exit_rules:Lookahead"), sizes)
    assert certificate(core).loop < 1.0
    core.loop.__class__ = Wild  # also where a part alone is somebody else's
    assert certificate(core) == (math.inf,) * 3
    assert certificate(Named(LoopConfig(), sizes)).box < math.inf


# ---------------------------------------------------------------------- box, forgetting, exit


@torch.no_grad()
@pytest.mark.parametrize("kind", ["looped", *KINDS])
@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_the_carried_state_stays_in_its_box(kind, scale):
    core = core_of(kind, scale)
    box = certificate(core).box
    deter, prepared = core.start.expand(3, -1, -1), core.prepare()
    for step in range(200):
        inputs = 100.0 * torch.randn(3, CORE_INPUTS, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        deter = core(deter, inputs, 1 + step % 4, prepared)[0]
        assert float(deter.abs().max()) <= box * (1 + CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_two_dreams_forget_each_other_at_the_certified_rate(scale):
    core = core_of("contracting", scale)
    rate, prepared = certificate(core).step, core.prepare()
    one, _ = core_input(core, 5)
    other = one.roll(1, 0) * 3.0
    distance = first = (one - other).flatten(1).norm(dim=1)
    for step in range(300):
        inputs = torch.randn(5, CORE_INPUTS, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        one, other = (core(state, inputs, 2, prepared)[0] for state in (one, other))
        now = (one - other).flatten(1).norm(dim=1)
        assert (now <= rate * distance + 1e-12).all()
        distance = now
    assert (distance <= first * rate**300 + 1e-12).all()


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_the_exit_knows_how_far_the_fixed_point_is(kind):
    core = core_of(kind)
    deter, inputs = core_input(core, 6)
    states = core(deter, inputs, 400, core.prepare())[1].states
    end = states[-1]
    assert (states[-2] - end).abs().max() < 1e-9
    rule, stopped = CertifiedExit(32, 64, threshold=0.2), []
    for cap in (4, 64):
        memory = rule.begin(deter, cap)
        for loop in range(1, cap):
            x, change = states[loop], states[loop] - states[loop - 1]
            away, size = (x - end).flatten(1).norm(dim=1), x.flatten(1).norm(dim=1)
            assert (away <= RATE / (1 - RATE) * change.flatten(1).norm(dim=1) * (1 + CLOSE) + 1e-12).all()
            stops, _ = rule.stops(HaltingState(loop, x, change, lambda: None), memory)
            left = (states[cap] - x).flatten(1).norm(dim=1)  # what the loops up to the cap would still move
            assert (left[stops] <= 0.2 * size[stops]).all()
            stopped.append((cap, loop, float(stops.double().mean())))
    assert stopped[-1][2] == 1.0
    shares = {(cap, loop): share for cap, loop, share in stopped}
    assert shares[4, 3] >= shares[64, 3]  # one loop is left, or many


def test_the_certified_exit_stops_samples_alone_in_dreams():
    core = core_of("certified", exit="certified", exit_threshold=0.5, max_loops=64)
    deter, inputs = core_input(core, 12)
    prepared = core.prepare()
    together, stats = core.adaptive_step(deter, inputs, prepared)
    frozen, same = step_of(core, deter, inputs, prepared, compact=False)
    assert torch.equal(stats.depth, same.depth)
    assert torch.allclose(together, frozen, atol=1e-12)
    assert 1 < int(stats.depth.max()) < 64
    for row in range(3):
        alone, depth = core.adaptive_step(deter[row : row + 1], inputs[row : row + 1], prepared)
        assert torch.allclose(alone, together[row : row + 1], atol=1e-12)
        assert int(depth.depth) == int(stats.depth[row])


@pytest.mark.parametrize("core", ["looped", "stacked", "gru"])
def test_the_certified_exit_is_refused_where_nothing_is_certified(core):
    with pytest.raises(ValueError, match="--model.core certified"):
        make_core(core, LoopConfig(exit="certified", width=8), CoreSizes(1, 3, 2))


@pytest.mark.parametrize("kind", ["certified", "contracting"])
def test_a_certified_core_is_not_matched_in_size(kind):
    with pytest.raises(ValueError, match="its own"):
        make_core(kind, LoopConfig(width=8), CoreSizes(1, 3, 2), "params")


@pytest.mark.parametrize("squared_norm", [None, 24.0])
def test_the_inputs_of_every_prelude_start_with_an_equal_say(squared_norm):
    torch.manual_seed(0)
    sizes = CoreSizes(groups=8, classes=8, actions=1, squared_norm=squared_norm)
    for kind, flat in (("looped", 64), ("contracting", 0)):
        core = make_core(kind, LoopConfig(width=64, units=2000), sizes)
        parts = core.prelude_in.weight.split([n for n in (flat, 64, 1) if n], 1)
        squared_norms = [n for n in (flat, squared_norm or 8, 1) if n]
        said = [float(part.detach().square().mean()) * of for part, of in zip(parts, squared_norms, strict=True)]
        assert said == pytest.approx([said[0]] * len(said), rel=0.15), kind


def test_a_certified_core_refuses_a_free_retention():
    with pytest.raises(ValueError, match="leave --model.loop.retention out"):
        core_of("certified", retention="free")


# ---------------------------------------------------------------------- as part of a world model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1, 2])
def test_a_certified_world_model_trains_and_dreams_within_its_bounds(kind, tokens):
    torch.manual_seed(0)
    loop = LoopConfig(tokens=tokens, width=8, units=16, mean_loops=2.0)
    world = WorldModel(ModelConfig(loop, core=kind, groups=3, classes=4, units=16), {"joints": 3, "touch": 2}, 2)
    batch, losses = make_batch(world, 8, 6), []
    optimizer = torch.optim.Adam(world.parameters(), 3e-3)
    for _ in range(60):
        loss, _ = world.loss(world.observe_sequence(batch, 2), batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(weight.grad is not None for weight in world.core.loop.parameters())
    loops, steps = visited_points(world, batch, 2, 20)
    assert loops.state.shape == steps.state.shape == (20, tokens, 8)
    bound = certificate(world.core)
    assert float(expansion(loop_map(world.core), loops, steps=20).attacked.max()) <= bound.loop + 1e-6
    dream = world.imagine(world.initial(4), torch.zeros(4, 100, 2), 100)
    assert float(dream.states.deter.abs().max()) <= bound.box


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1, 4])
def test_flops_count_what_is_multiplied(kind, tokens):
    from torch.utils.flop_counter import FlopCounterMode

    core = core_of(kind, double=False, tokens=tokens)
    deter, inputs = core_input(core, 1)
    prepared = core.prepare()
    for loops in (1, 3):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            core(deter, inputs, loops, prepared)
        attention = 2 * tokens * tokens * 8 * (1 + loops) if tokens > 1 else 0
        assert core.flops(loops) == pytest.approx(counter.get_total_flops(), abs=attention)


def test_the_kinds_are_what_they_are_called():
    assert type(core_of("certified")) is CertifiedCore
    assert type(core_of("contracting")) is ContractingCore
    assert certificate(core_of("contracting")).step == pytest.approx(1 - (1 - RATE) * SMALLEST_UPDATE, abs=1e-3)

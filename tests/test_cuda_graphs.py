"""The update that a CUDA graph can hold: the same as the eager one, and blind to numbers while it runs."""

import pytest
import torch
from test_dreamer import CONTINUOUS, DISCRETE, flats, make_batch
from torch.utils._python_dispatch import TorchDispatchMode

from agent.errors import NonFiniteError
from agent.execution import CudaGraphs, Eager
from agent.execution.cuda_graphs import WARM_UPDATES
from agent.learning.actor_critic import BehaviorConfig
from agent.learning.dreamer import Dreamer
from agent.learning.optimizer import OptimizerConfig
from agent.spaces import Spaces
from world_model import LoopConfig, ModelConfig

LOOKS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "is_nonzero", "equal"}
"""Operations whose result a program on a GPU would have to wait for."""


class Blindfold(TorchDispatchMode):
    """Raises where a number is looked at."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        if name in LOOKS:
            raise AssertionError(f"the update looks at a number: {name}")
        return func(*args, **(kwargs or {}))


def make(spec=CONTINUOUS, *, device="cpu", behavior=None, core="looped", obs=None, **loop):
    torch.manual_seed(0)
    loop = LoopConfig(**({"tokens": 2, "width": 8, "units": 16, "mean_loops": 2.0} | loop))
    model = ModelConfig(loop, core=core, groups=3, classes=4, units=16)
    behavior = BehaviorConfig(**({"horizon": 3, "starts": 8, "units": 16} | (behavior or {})))
    agent = Dreamer(model, behavior, OptimizerConfig(), Spaces(obs or {"state": 3}, spec), device)
    for adam in agent.optimizers.values():
        adam.warmup = 2
    return agent


def with_start(agent, seed):
    """A batch whose sequences begin in the middle of episodes, as those of the replay."""
    batch = make_batch(agent.spaces.action, seed)
    start = agent.world.initial(4).map(lambda leaf: torch.full_like(leaf, 0.1 * seed))
    return batch._replace(start=start.detach())


@pytest.mark.parametrize("settings", [{}, {"exit": "residual"}])
@pytest.mark.parametrize("spec", [CONTINUOUS, DISCRETE])
def test_the_update_of_the_graphs_is_the_eager_one(spec, settings):
    one, other = make(spec, **settings), make(spec, **settings)
    eager, graphs = Eager(one), CudaGraphs(other)
    for number in range(6):
        results = []
        for execution in (eager, graphs):
            torch.manual_seed(number)
            results.append(execution.update(with_start(one, number), progress=0.2 * number))
        (states, depths, metrics, errors), (its_states, its_depths, its_metrics, its_errors) = results
        assert torch.allclose(errors, its_errors, atol=1e-4)
        assert torch.allclose(states.deter, its_states.deter, atol=1e-5)
        assert metrics.keys() == its_metrics.keys()
        for name, value in metrics.items():
            # One processor: both agree to 6e-8 for four updates, and are 4e-4 apart in the fifth at once. Unexplained:
            # a sample at its threshold would do that.
            assert float(value) == pytest.approx(float(its_metrics[name]), rel=1e-3, abs=5e-4), name
        assert torch.equal(depths, its_depths)
    for pair in ((flats(agent)[name] for agent in (one, other)) for name in flats(one)):
        assert torch.allclose(*pair, atol=5e-4)
    for pair in zip(one.average_flats.values(), other.average_flats.values(), strict=True):
        assert torch.allclose(*pair, atol=5e-4)


EXITS = ["gate", "residual", "acceleration", "kl", "paper", "random"]
EXITS += ["experiments.exit_rules:Lookahead", "experiments.exit_rules:Forecast"]


@pytest.mark.parametrize("rule", EXITS)
def test_no_exit_rule_looks_at_a_number(rule):
    agent = make(exit=rule)
    graphs = CudaGraphs(agent)
    graphs.copy_in(with_start(agent, 0))
    with Blindfold():
        graphs.run(2)


@pytest.mark.parametrize("core", ["looped", "stacked", "gru"])
@pytest.mark.parametrize("spec", [CONTINUOUS, DISCRETE])
def test_no_part_of_the_update_looks_at_a_number(spec, core):
    agent = make(spec, core=core)
    graphs = CudaGraphs(agent)
    graphs.copy_in(with_start(agent, 0))
    with Blindfold():
        graphs.run(2)


def test_the_eager_update_does_look():
    agent = make()
    with pytest.raises(AssertionError, match="looks at a number"), Blindfold():
        agent.update(make_batch(), 2, Eager(agent))


def test_a_loss_that_is_not_finite_moves_no_weight():
    agent = make()
    graphs = CudaGraphs(agent)
    graphs.update(with_start(agent, 0))
    before, averaged = flats(agent), [flat.clone() for flat in agent.average_flats.values()]
    slow = [p.clone() for p in agent.behavior.critic.slow.parameters()]
    batch = with_start(agent, 1)
    batch.reward[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="world/reward_loss"):
        graphs.update(batch)
    for name, flat in flats(agent).items():
        assert torch.equal(flat, before[name]), name
    for flat, other in zip(agent.average_flats.values(), averaged, strict=True):
        assert torch.equal(flat, other)
    assert all(torch.equal(*pair) for pair in zip(slow, agent.behavior.critic.slow.parameters(), strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("spec", [CONTINUOUS, DISCRETE])
def test_replayed_graphs_learn_what_the_eager_update_learns(spec):
    agents = [make(spec, device="cuda") for _ in range(2)]
    eager, graphs = Eager(agents[0]), CudaGraphs(agents[1])
    for number in range(4 * (WARM_UPDATES + 3)):  # depths 1 to 4, each recorded and replayed
        losses = []
        for execution in (eager, graphs):
            batch = with_start(execution.agent, number % 5).map(torch.Tensor.cuda)
            torch.manual_seed(number)
            losses.append(float(execution.update(batch).metrics["world/reconstruction_loss"]))
        assert losses[1] == pytest.approx(losses[0], rel=0.3)
    assert graphs.recorded

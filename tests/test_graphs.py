"""The update that a CUDA graph can hold: the same as the eager one, and blind to numbers while it runs."""

import pytest
import torch
from test_dreamer import CONTINUOUS, DISCRETE, flats, make_batch
from torch.utils._python_dispatch import TorchDispatchMode

from agent.errors import NonFiniteError
from agent.execution.cuda_graphs import WARM, UpdateGraphs
from agent.learning.actor_critic import BehaviorConfig
from agent.learning.dreamer import Dreamer
from agent.learning.learner import OptimizerConfig
from agent.spaces import Spaces
from world_model import LoopConfig, ModelConfig, Posterior
from world_model.exits import RULES

LOOKS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "is_nonzero", "equal"}
"""Operations whose result a program on a GPU would have to wait for."""


class Blindfold(TorchDispatchMode):
    """Raises where a number is looked at."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        if name in LOOKS:
            raise AssertionError(f"the update looks at a number: {name}")
        return func(*args, **(kwargs or {}))


def make(spec=CONTINUOUS, *, device="cpu", optimizer=None, behavior=None, core="looped", obs=None, **loop):
    torch.manual_seed(0)
    loop = LoopConfig(**({"tokens": 2, "width": 8, "heads": 2, "units": 16, "mean_loops": 2.0} | loop))
    model = ModelConfig(loop, core=core, groups=3, classes=4, units=16)
    behavior = BehaviorConfig(**({"horizon": 3, "starts": 8, "units": 16, "layers": 1} | (behavior or {})))
    optimizer = OptimizerConfig(**({"warmup": 2, "graphs": False} | (optimizer or {})))
    return Dreamer(model, behavior, optimizer, Spaces(obs or {"state": 3}, spec), device)


def with_start(agent, seed):
    """A batch whose sequences begin in the middle of episodes, as those of the replay."""
    batch = make_batch(agent.spaces.action, seed)
    start = agent.world.initial(4).map(lambda leaf: torch.full_like(leaf, 0.1 * seed))
    return batch._replace(start=start.detach())


@pytest.mark.parametrize("settings", [{}, {"exit": "experiments.exit_rules:Forecast"}, {"exit": "residual"}])
@pytest.mark.parametrize("spec", [CONTINUOUS, DISCRETE])
def test_the_update_of_the_graphs_is_the_eager_one(spec, settings):
    eager, other = make(spec, **settings), make(spec, **settings)
    other.graphs = UpdateGraphs(other)
    for number in range(6):
        results = []
        for agent in (eager, other):
            torch.manual_seed(number)
            results.append(agent.update(with_start(agent, number), progress=0.2 * number))
        (states, metrics), (its_states, its_metrics) = results
        assert torch.allclose(states.deter, its_states.deter, atol=1e-5)
        assert metrics.keys() == its_metrics.keys()
        for name, value in metrics.items():
            assert float(value) == pytest.approx(float(its_metrics[name]), rel=1e-3, abs=1e-4), name
    for pair in ((flats(agent)[name] for agent in (eager, other)) for name in flats(eager)):
        assert torch.allclose(*pair, atol=1e-4)
    for pair in zip(eager.average_flats, other.average_flats, strict=True):
        assert torch.allclose(*pair, atol=1e-4)
    assert torch.equal(eager.last_depths, other.last_depths)


@pytest.mark.parametrize("rule", [*RULES, "experiments.exit_rules:Lookahead", "experiments.exit_rules:Forecast"])
def test_no_exit_rule_looks_at_a_number(rule):
    agent = make(exit=rule)
    graphs = UpdateGraphs(agent)
    graphs.take(with_start(agent, 0), 2)
    with Blindfold():
        graphs.run(2)


@pytest.mark.parametrize(
    "settings",
    [
        {"core": "stacked"},
        {"core": "gru"},
        {"behavior": {"adaptive": "loops", "spread": 0.2}},
        {"optimizer": {"precision": "bfloat16"}},
    ],
)
@pytest.mark.parametrize("spec", [CONTINUOUS, DISCRETE])
def test_no_part_of_the_update_looks_at_a_number(spec, settings):
    agent = make(spec, **settings)
    graphs = UpdateGraphs(agent)
    graphs.take(with_start(agent, 0), 2)
    with Blindfold():
        graphs.run(2)


def test_the_eager_update_does_look():
    agent = make()
    with pytest.raises(AssertionError, match="looks at a number"), Blindfold():
        agent.losses(make_batch(), 2)


def test_a_loss_that_is_not_finite_moves_no_weight():
    agent = make()
    agent.graphs = UpdateGraphs(agent)
    agent.update(with_start(agent, 0))
    before, averaged = flats(agent), [flat.clone() for flat in agent.average_flats]
    batch = with_start(agent, 1)
    batch.reward[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="world/reward_loss"):
        agent.update(batch)
    for name, flat in flats(agent).items():
        assert torch.equal(flat, before[name]), name
    for flat, other in zip(agent.average_flats, averaged, strict=True):
        assert flat.isfinite().all()
        assert torch.allclose(flat, other, atol=0.1)


@pytest.mark.parametrize("core", ["looped", "stacked", "gru"])
@pytest.mark.parametrize("gradient", ["reinforce", "dynamics"])
def test_an_update_in_bfloat16_is_near_the_one_in_float32(core, gradient):
    found = []
    for precision in ("float32", "bfloat16"):
        agent = make(core=core, optimizer={"precision": precision}, behavior={"actor_gradient": gradient})
        for number in range(2):
            torch.manual_seed(number)
            losses = agent.losses(with_start(agent, number), 2)
            agent.update(with_start(agent, number))
        post: Posterior = agent.world.observe_sequence(with_start(agent, 0), 2)
        assert post.states.deter.dtype == torch.float32
        found.append({name: float(value) for name, value in losses.metrics.items()})
        assert losses.total.dtype == torch.float32
    single, half = found
    for name in ("world/reconstruction_loss", "world/reward_loss", "world/kl", "behavior/value_loss"):
        assert half[name] == pytest.approx(single[name], rel=0.1, abs=0.02), name
    assert single != half


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("spec", [CONTINUOUS, DISCRETE])
def test_replayed_graphs_learn_what_the_eager_update_learns(spec):
    eager, graphed = make(spec, device="cuda"), make(spec, device="cuda", optimizer={"graphs": True})
    assert graphed.graphs is not None
    for number in range(4 * (WARM + 3)):  # depths 1 to 4, each recorded and replayed
        losses = []
        for agent in (eager, graphed):
            batch = with_start(agent, number % 5)
            rows = {k: v.cuda() for k, v in batch._asdict().items() if isinstance(v, torch.Tensor)}
            obs = {k: v.cuda() for k, v in batch.obs.items()}
            torch.manual_seed(number)
            _, metrics = agent.update(batch._replace(obs=obs, **rows))
            losses.append(float(metrics["world/reconstruction_loss"]))
        assert losses[1] == pytest.approx(losses[0], rel=0.3)
    assert graphed.graphs.recorded


@pytest.mark.parametrize("obs", [{"state": 3}, {"image": (16, 16, 1)}])
def test_only_who_asks_for_bfloat16_gets_it(obs):
    before = torch.get_float32_matmul_precision()
    for precision, half in (("auto", False), ("float32", False), ("bfloat16", True)):
        assert make(obs=obs, optimizer={"precision": precision}).half is half
    assert torch.get_float32_matmul_precision() == before == "highest"  # on a CPU

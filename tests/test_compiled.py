"""torch.compile fuses the parts of a step: the update stays what it was."""

import copy
from dataclasses import replace

import pytest
import torch
from test_cuda_graphs import make, with_start
from test_dreamer import CONTINUOUS, DISCRETE, flats

from agent.execution import CudaGraphs, Eager, make_execution
from agent.execution.compiled import can_compile, compile_world_model

WORLD, SHELL = {"reset", "posterior", "prior_probs", "draw"}, {"prelude", "readout"}
REAL = torch.compile


@pytest.fixture(autouse=True)
def clean():
    """Nothing that is compiled or set here outlives the test."""
    with torch._dynamo.config.patch(recompile_limit=torch._dynamo.config.recompile_limit):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("core", "parts"),
    [
        ("looped", WORLD | SHELL | {"refine", "adaptive_step"}),
        ("stacked", WORLD | SHELL | {"adaptive_step"}),
        ("gru", WORLD | {"adaptive_step"}),
    ],
)
def test_the_parts_of_a_step_are_handed_over_and_used(monkeypatch, core, parts):
    given, used = [], set()

    def compiler(function, **_):
        given.append(function.__name__)

        def counted(*args, **kwargs):
            used.add(function.__name__)
            return function(*args, **kwargs)

        return counted

    plain, fused = make(core=core), make(core=core)
    monkeypatch.setattr("agent.execution.compiled.torch.compile", compiler)
    compile_world_model(fused.world)
    assert sorted(given) == sorted(parts)  # each once
    for number in range(2):
        results = []
        for agent in (plain, fused):
            torch.manual_seed(number)
            results.append(Eager(agent).update(with_start(agent, number)))
        (states, _, metrics, _), (its_states, _, its_metrics, _) = results
        assert torch.equal(states.deter, its_states.deter)
        assert metrics == its_metrics
    assert used == parts
    for name, flat in flats(plain).items():
        assert torch.equal(flat, flats(fused)[name]), name


def test_a_copy_of_a_fused_world_computes_with_its_own_weights(monkeypatch):
    monkeypatch.setattr("agent.execution.compiled.torch.compile", lambda function, **_: function)
    world = make().world
    names = set(world.state_dict())
    compile_world_model(world)
    assert set(world.state_dict()) == names
    deter, embed = torch.randn(4, 2, 8), torch.randn(4, 16)
    other = copy.deepcopy(world)
    torch.nn.init.zeros_(other.post_out.weight)
    torch.nn.init.zeros_(other.post_out.bias)
    assert torch.allclose(other.posterior(deter, embed), torch.full((4, 3, 4), 0.25))
    assert not torch.allclose(world.posterior(deter, embed), torch.full((4, 3, 4), 0.25))


def test_where_nothing_can_be_compiled_a_line_says_so(monkeypatch):
    def broken(function, **_):
        raise RuntimeError("no C compiler\nand a long story")

    monkeypatch.setattr("agent.execution.compiled.torch.compile", broken)
    with pytest.warns(UserWarning, match="nothing is compiled, and updates take longer: no C compiler$"):
        assert not can_compile(torch.device("cpu"))
    monkeypatch.setattr("agent.execution.compiled.torch.compile", lambda function, **_: function)
    assert can_compile(torch.device("cpu"))


def test_a_cpu_compiles_nothing(monkeypatch):
    compiled = lambda *_, **__: pytest.fail("something was compiled")  # noqa: E731
    monkeypatch.setattr("agent.execution.compiled.torch.compile", compiled)
    agent = make()
    agent.optimizer = replace(agent.optimizer, gpu="compiled")
    make_execution(agent).update(with_start(agent, 0))


@pytest.mark.parametrize(("spec", "backend"), [(CONTINUOUS, "eager"), (DISCRETE, "aot_eager")])
def test_what_is_traced_learns_the_same_in_one_piece(monkeypatch, spec, backend):
    """Static, as the graphs of a GPU want it; a few seconds."""
    plain, fused = make(spec), make(spec)
    compiled = lambda function, **how: REAL(function, backend=backend, **how)  # noqa: E731
    monkeypatch.setattr("agent.execution.compiled.torch.compile", compiled)
    compile_world_model(fused.world)
    executions = Eager(plain), CudaGraphs(fused)
    for number in range(2):
        depths = []
        for execution in executions:
            torch.manual_seed(number)
            depths.append(execution.update(with_start(plain, number)).dream_depth)
        for name, flat in flats(plain).items():
            assert torch.allclose(flat, flats(fused)[name], atol=1e-4), name
    assert torch.equal(*depths)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] > 0
    assert not counters["graph_break"]

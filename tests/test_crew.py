"""Processes that share the updates."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import metronomes

from agent.data.checkpoint import find_checkpoint, read_checkpoint
from agent.errors import NonFiniteError
from agent.execution.data_parallel import part_of
from agent.learning.actor_critic import BehaviorConfig
from agent.learning.dreamer import Dreamer
from agent.learning.gradients import Gradients
from agent.learning.learner import OptimizerConfig
from agent.runs.presets import preset
from agent.spaces import ActionSpec, Spaces
from world_model import Batch, LatentState, LoopConfig, ModelConfig
from world_model.images import ImageConfig

SIZE, LENGTH, HORIZON = 6, 5, 3


def make(workers, **behavior):
    """A small agent of which every part learns, with an adaptive horizon: all running numbers are in use."""
    torch.manual_seed(0)
    loop = LoopConfig(tokens=2, width=8, heads=2, units=16, mean_loops=2.0)
    model = ModelConfig(loop, image=ImageConfig(anneal=True), groups=3, classes=4, units=16)
    behavior = {"adaptive": "loops", "spread": 0.5, "starts": 4 * SIZE, "units": 16, "layers": 1} | behavior
    cfg = BehaviorConfig(horizon=HORIZON, **behavior)
    spaces = Spaces({"state": 3, "sight": (64, 64, 3)}, ActionSpec(2, False))
    agent = Dreamer(model, cfg, OptimizerConfig(warmup=1, workers=workers), spaces)
    return agent


@pytest.fixture
def crews():
    """make(...), and an end to its processes."""
    agents = []

    def made(*args, **settings):
        agents.append(make(*args, **settings))
        return agents[-1]

    yield made
    for agent in agents:
        agent.close()


def make_batch(agent, seed=1):
    gen = torch.Generator().manual_seed(seed)
    off = torch.zeros(SIZE, LENGTH, dtype=torch.bool)
    start = agent.world.initial(SIZE).detach()
    return Batch(
        {
            "state": torch.randn(SIZE, LENGTH, 3, generator=gen),
            "sight": torch.randint(0, 256, (SIZE, LENGTH, 64, 64, 3), dtype=torch.uint8, generator=gen),
        },
        torch.rand(SIZE, LENGTH, 2, generator=gen),
        torch.randn(SIZE, LENGTH, generator=gen),
        off.clone(),
        off.clone(),
        off.clone(),
        LatentState(start.deter.clone(), start.stoch.clone()),
    )


def test_the_gradient_is_the_mean_of_the_parts(crews):
    """What the others did is done again here, with the same weights and random numbers, and averaged."""
    agent = crews(3)
    batch = make_batch(agent)
    agent.update(batch)  # the processes begin, and every running number has seen something
    loops = 2
    here, theirs = torch.get_rng_state(), agent.crew.random_states()
    lent = {name: value.clone() for name, value in agent.policy.state_dict().items()}
    losses = agent.shared(batch, loops)
    found = [flat.clone() for flat in agent.flats]

    alone = Gradients(agent.policy, agent.flats, parts=3)
    expected, each = [torch.zeros_like(flat) for flat in agent.flats], []
    for number, random in enumerate([here, *theirs]):
        agent.policy.load_state_dict(lent)
        torch.set_rng_state(random)
        part = slice(2 * number, 2 * number + 2)
        each.append(alone.losses(part_of(batch, part), loops))
        alone.differentiate(each[-1])
        for total, flat in zip(expected, agent.flats, strict=True):
            total += flat / 3
    for one, other in zip(found, expected, strict=True):
        assert one.abs().max() > 0
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-6 * float(other.abs().max()))
    assert torch.allclose(losses.states.deter, torch.cat([part.states.deter for part in each]), atol=1e-6)
    assert torch.equal(losses.states.stoch, torch.cat([part.states.stoch for part in each]))
    assert torch.equal(losses.depths, torch.cat([part.depths for part in each]))
    assert torch.allclose(losses.lengths, torch.cat([part.lengths for part in each]), atol=1e-5)
    for name, value in losses.metrics.items():
        mean = sum(float(part.metrics[name]) for part in each) / 3
        assert float(value) == pytest.approx(mean, rel=1e-3, abs=1e-5), name


def test_a_shared_update_returns_what_a_plain_one_does(crews):
    shared, plain = crews(2), crews(1)
    batch = make_batch(plain)
    states, metrics = shared.update(batch)
    usual, names = plain.update(batch)
    assert metrics.keys() == names.keys()
    assert states.deter.shape == usual.deter.shape == (SIZE, LENGTH, 2, 8)
    assert shared.last_depths.shape == plain.last_depths.shape == (4 * SIZE, HORIZON)
    assert "others" in shared.seconds
    # The gradients are those of other random numbers; the weights are the same ones in all processes.
    for name, value in metrics.items():
        assert torch.isfinite(value), name


def test_only_the_one_who_acts_moves_the_running_numbers(crews):
    agent = crews(3)
    batch = make_batch(agent)
    for _ in range(3):
        agent.update(batch)
    before = {name: value.clone() for name, value in agent.behavior.named_buffers()}
    assert before["scale.size"] > 0
    assert before["budget.pace"] > 0
    agent.crew.begin(batch, 2)
    for pipe in agent.crew.pipes:
        agent.crew.answer(pipe)
    for name, value in agent.behavior.named_buffers():
        assert torch.equal(value, before[name]), name


def test_a_loss_that_is_not_finite_anywhere_moves_no_weight(crews):
    agent = crews(2)
    batch = make_batch(agent)
    agent.update(batch)
    before = [adam.flat.detach().clone() for adam in agent.adams.values()]
    batch.reward[SIZE - 1, 0] = float("nan")  # of the other process
    with pytest.raises(NonFiniteError, match="world/reward_loss"):
        agent.update(batch)
    for adam, value in zip(agent.adams.values(), before, strict=True):
        assert torch.equal(adam.flat, value)


def test_a_process_that_ends_or_fails_is_told(crews):
    agent = crews(2)
    batch = make_batch(agent)
    agent.update(batch)
    ours = agent.alone(part_of(batch, slice(0, 3)), 2)
    agent.crew.begin(batch._replace(reward=batch.reward[:, :2]), 2)  # a shape that cannot be
    with pytest.raises(RuntimeError, match="failed:(.|\n)*size of tensor"):
        agent.crew.end(ours)
    agent.crew.processes[0].kill()
    agent.crew.processes[0].join()
    with pytest.raises(OSError, match="--optimizer.workers"):
        agent.update(batch)


def test_a_resumed_run_of_several_processes_is_the_uninterrupted_one(make_trainer, tmp_path):
    config = preset("debug")
    config = replace(config, optimizer=replace(config.optimizer, workers=2))
    options = {"config": config, "steps": 240, "log_every": 50, "save_every": 200, "eval_every": 0}
    whole = make_trainer(tmp_path / "whole", metronomes, **options)
    inner, kept = whole.store, []

    def store(name, content):
        inner(name, content)
        if name == "latest" and content["step"] == 200:
            kept.append((tmp_path / "whole/checkpoints/latest.pt").read_bytes())

    whole.store = store
    assert whole.run()
    whole.agent.close()
    copy = tmp_path / "part/checkpoints/latest.pt"
    copy.parent.mkdir(parents=True)
    copy.write_bytes(kept[0])
    saved = read_checkpoint(find_checkpoint(tmp_path / "part"))
    part = make_trainer(tmp_path / "part", metronomes, saved=saved, **options)
    assert part.run()
    part.agent.close()
    assert part.agent.updates == whole.agent.updates > 10
    for name, adam in part.agent.adams.items():
        assert torch.equal(adam.flat, whole.agent.adams[name].flat), name
    assert np.array_equal(part.replay.rows["deter"], whole.replay.rows["deter"])


def test_what_cannot_be_shared_is_refused():
    config = preset("small")
    with pytest.raises(ValueError, match="--train.batch 16 cannot be shared evenly by 3 processes: .*workers 1"):
        replace(config, optimizer=replace(config.optimizer, workers=3))


def test_an_agent_that_learned_by_several_processes_can_be_on_another_device():
    torch.manual_seed(0)
    config = preset("debug")
    optimizer = replace(config.optimizer, workers=2)
    spaces = Spaces({"state": 3}, ActionSpec(2, False))
    assert Dreamer(config.model, config.behavior, optimizer, spaces, "meta").parts == 1
    assert Dreamer(config.model, config.behavior, optimizer, spaces).parts == 2

"""Data-parallel updates: worker processes compute the gradients of their part of a batch."""

import operator
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import metronomes

from agent.data.checkpoint import find_checkpoint, read_checkpoint
from agent.errors import NonFiniteError, WorkerFailure
from agent.execution import DataParallel, Eager, make_execution
from agent.learning.actor_critic import BehaviorConfig
from agent.learning.dreamer import Dreamer
from agent.learning.optimizer import OptimizerConfig
from agent.runs.presets import preset
from agent.spaces import ActionSpec, Spaces
from world_model import Batch, LatentState, LoopConfig, ModelConfig

SIZE, LENGTH, HORIZON = 6, 5, 3


def make(workers):
    """A small agent of vectors and images, all parts of which learn, and its execution."""
    torch.manual_seed(0)
    loop = LoopConfig(tokens=2, width=8, units=16, mean_loops=2.0)
    model = ModelConfig(loop, groups=3, classes=4, units=16)
    cfg = BehaviorConfig(horizon=HORIZON, starts=4 * SIZE, units=16)
    spaces = Spaces({"state": 3, "sight": (64, 64, 3)}, ActionSpec(2, False))
    agent = Dreamer(model, cfg, OptimizerConfig(workers=workers), spaces)
    for adam in agent.optimizers.values():
        adam.warmup = 1
    return agent, make_execution(agent)


@pytest.fixture
def processes():
    """make(workers), whose processes end with the test."""
    executions = []

    def made(workers):
        agent, execution = make(workers)
        executions.append(execution)
        return agent, execution

    yield made
    for execution in executions:
        execution.close()


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


class Part(Eager):
    """What a worker computes, in this process: gradients of one part, and no step."""

    takes_step = False
    processes = 3


def test_the_gradient_is_the_mean_of_the_parts(processes):
    """What the workers did is done again here, with the same weights and random numbers, and averaged."""
    agent, execution = processes(3)
    batch = make_batch(agent)
    execution.update(batch)  # the processes start, and the running statistics have seen something
    execution.takes_step, execution.depth = False, 2
    here, theirs = torch.get_rng_state(), execution.workers.random_states()
    before = {name: value.clone() for name, value in agent.policy.state_dict().items()}
    update = execution.compute(batch, 2)
    gradients = [adam.gradient.clone() for adam in agent.optimizers.values()]

    expected, parts = [torch.zeros_like(flat) for flat in gradients], []
    for number, random in enumerate([here, *theirs]):
        agent.policy.load_state_dict(before)
        torch.set_rng_state(random)
        part = batch.map(operator.itemgetter(slice(2 * number, 2 * number + 2)))
        parts.append(Part(agent).compute(part, 2))
        for total, adam in zip(expected, agent.optimizers.values(), strict=True):
            total += adam.gradient / 3
    for one, other in zip(gradients, expected, strict=True):
        assert one.abs().max() > 0
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-6 * float(other.abs().max()))
    assert torch.allclose(update.states.deter, torch.cat([part.states.deter for part in parts]), atol=1e-6)
    assert torch.equal(update.states.stoch, torch.cat([part.states.stoch for part in parts]))
    assert torch.equal(update.dream_depth, torch.cat([part.dream_depth for part in parts]))
    for name, value in update.metrics.items():
        mean = sum(float(part.metrics[name]) for part in parts) / 3
        assert float(value) == pytest.approx(mean, rel=1e-3, abs=1e-5), name


def test_a_shared_update_returns_what_a_plain_one_does(processes):
    (shared, two), (plain, one) = processes(2), processes(1)
    batch = make_batch(plain)
    torch.manual_seed(1)  # the same training depth
    states, depths, metrics = two.update(batch)
    torch.manual_seed(1)
    usual_states, usual_depths, usual_metrics = one.update(batch)
    assert metrics.keys() == usual_metrics.keys()
    assert states.deter.shape == usual_states.deter.shape == (SIZE, LENGTH, 2, 8)
    assert depths.shape == usual_depths.shape == (4 * SIZE, HORIZON)
    assert "workers" in shared.clock.seconds
    # The gradients are those of other random numbers; the weights are the same ones in all processes.
    for name, value in metrics.items():
        assert torch.isfinite(value), name


def test_the_first_process_alone_moves_the_running_statistics(processes):
    agent, execution = processes(3)
    batch = make_batch(agent)
    for _ in range(3):
        execution.update(batch)
    before = {name: value.clone() for name, value in agent.behavior.named_buffers()}
    assert before["scale.size"] > 0
    execution.scatter(batch)
    execution.workers.answers()
    for name, value in agent.behavior.named_buffers():
        assert torch.equal(value, before[name]), name


def test_a_loss_that_is_not_finite_anywhere_moves_no_weight(processes):
    agent, execution = processes(2)
    batch = make_batch(agent)
    execution.update(batch)
    before = [adam.flat.detach().clone() for adam in agent.optimizers.values()]
    batch.reward[SIZE - 1, 0] = float("nan")  # of the worker
    with pytest.raises(NonFiniteError, match="world/reward_loss"):
        execution.update(batch)
    for adam, value in zip(agent.optimizers.values(), before, strict=True):
        assert torch.equal(adam.flat, value)


def test_a_worker_that_ends_or_fails_is_told(processes):
    agent, execution = processes(2)
    batch = make_batch(agent)
    execution.update(batch)
    execution.scatter(batch._replace(reward=batch.reward[:, :2]))  # a shape that cannot be
    with pytest.raises(WorkerFailure, match="failed:(.|\n)*size of tensor"):
        execution.workers.answers()
    execution.workers.processes[0].kill()
    execution.workers.processes[0].join()
    with pytest.raises(WorkerFailure, match="--optimizer.workers"):
        execution.update(batch)


def test_a_worker_whose_update_is_given_up_ends_quietly(processes):
    """As by a second Ctrl-C, or a loss of the first process that is not finite."""
    agent, execution = processes(2)
    execution.update(make_batch(agent))
    execution.scatter(make_batch(agent))
    (worker,) = execution.workers.processes
    execution.close()
    assert worker.exitcode == 0


def test_a_worker_that_ends_leaves_a_run_that_goes_on(make_trainer, tmp_path):
    config = preset("debug")
    config = replace(config, optimizer=replace(config.optimizer, workers=2))
    trainer = make_trainer(tmp_path, config=config, steps=240, save_every=0, eval_every=0)
    update = trainer.execution.update

    def dying(*words):
        if trainer.agent.updates == 20:
            trainer.execution.workers.processes[0].kill()
        return update(*words)

    trainer.execution.update = dying
    with pytest.raises(WorkerFailure, match="--optimizer.workers"):
        trainer.run()
    saved = read_checkpoint(find_checkpoint(tmp_path))
    assert saved["step"] == trainer.step > 100
    again = make_trainer(tmp_path, config=config, saved=saved, steps=240, save_every=0, eval_every=0)
    assert again.run()
    assert again.agent.updates >= 20


def test_a_resumed_run_of_several_processes_is_the_uninterrupted_one(make_trainer, tmp_path):
    config = preset("debug")
    config = replace(config, optimizer=replace(config.optimizer, workers=2))
    options = {"config": config, "steps": 240, "log_every": 50, "save_every": 200, "eval_every": 0}
    whole = make_trainer(tmp_path / "whole", metronomes, **options)
    inner, kept = whole.store, []

    def store(name, content, beside=False):
        inner(name, content, beside)
        if name == "latest" and content["step"] == 200:
            kept.append((tmp_path / "whole/checkpoints/latest.pt").read_bytes())

    whole.store = store
    assert whole.run()
    copy = tmp_path / "part/checkpoints/latest.pt"
    copy.parent.mkdir(parents=True)
    copy.write_bytes(kept[0])
    saved = read_checkpoint(find_checkpoint(tmp_path / "part"))
    part = make_trainer(tmp_path / "part", metronomes, saved=saved, **options)
    assert part.run()
    assert part.agent.updates == whole.agent.updates > 10
    for name, adam in part.agent.optimizers.items():
        assert torch.equal(adam.flat, whole.agent.optimizers[name].flat), name
    assert np.array_equal(part.replay.rows["deter"], whole.replay.rows["deter"])


def test_what_cannot_be_shared_is_refused():
    config = preset("small")
    with pytest.raises(ValueError, match="--train.batch 16 cannot be shared evenly by 3 processes: .*workers 1"):
        replace(config, optimizer=replace(config.optimizer, workers=3))


def test_one_process_needs_no_workers(processes):
    assert type(processes(1)[1]) is Eager
    assert type(processes(2)[1]) is DataParallel

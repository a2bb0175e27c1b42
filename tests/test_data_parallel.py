"""Data-parallel updates: ranks share a batch, and their step is that of one process with all of it."""

import operator
import os
import signal
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import metronomes
from small_ranks import SEED, together

from agent.data.checkpoint import find_checkpoint, read_checkpoint
from agent.errors import NonFiniteError, RankLost, WorkerFailure
from agent.execution import DataParallel, Eager, make_execution
from agent.execution.ranks import Ranks
from agent.learning.actor_critic import BehaviorConfig
from agent.learning.dreamer import Dreamer
from agent.learning.optimizer import OptimizerConfig
from agent.runs.presets import preset
from agent.spaces import ActionSpec, Spaces
from world_model import Batch, LatentState, LoopConfig, ModelConfig
from world_model.images import ImageConfig
from world_model.objectives import EMBEDDING

SIZE, LENGTH, HORIZON = 8, 5, 3


def make(workers, objective="reconstruct"):
    """A small agent of vectors and images, all parts of which learn, and its execution."""
    torch.manual_seed(0)
    loop = LoopConfig(tokens=2, width=8, units=16, mean_loops=2.0)
    model = ModelConfig(loop, groups=3, classes=4, units=16, image=ImageConfig(4), objective=objective)
    cfg = BehaviorConfig(horizon=HORIZON, starts=4 * SIZE, units=16)
    spaces = Spaces({"state": 3, "sight": (16, 16, 3)}, ActionSpec(2, False))
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
            "sight": torch.randint(0, 256, (SIZE, LENGTH, 16, 16, 3), dtype=torch.uint8, generator=gen),
        },
        torch.rand(SIZE, LENGTH, 2, generator=gen),
        torch.randn(SIZE, LENGTH, generator=gen),
        off.clone(),
        off.clone(),
        off.clone(),
        LatentState(start.deter.clone(), start.stoch.clone()),
    )


@pytest.fixture
def steady(monkeypatch):
    """No random number depends on how many are drawn."""
    monkeypatch.setattr(torch, "rand", lambda *shape, dtype=None, **_: torch.full(shape, 0.37, dtype=dtype))
    monkeypatch.setattr(torch, "randn_like", lambda x: torch.full_like(x, 0.5))
    fixed = torch.nn.functional.normalize(torch.randn(EMBEDDING, 8, generator=torch.Generator().manual_seed(3)), dim=0)
    monkeypatch.setattr("world_model.objectives.random_directions", lambda *_: fixed)


def share_of(batch, rank, size):
    part = SIZE // size
    return batch.map(operator.itemgetter(slice(rank * part, (rank + 1) * part)))


def two_updates(ranks, objective):
    """The agent after two updates of this rank's parts, the gradients of the first and the `Update` of the second."""
    with SEED:
        agent, _ = make(1, objective)
    execution = Eager(agent, ranks=ranks)
    for policy in (agent.policy, agent.averaged):
        policy.world.observation_model.images.precision = "float32"
    fitted = make_batch(agent, 3)
    agent.fit_image_normaliser(lambda *_: (share_of(fitted, ranks.rank, ranks.size), None), ranks.size, ranks.average)
    gradients = None
    for seed in (1, 2):
        agent.begin_update(0.0)
        update = agent.update(share_of(make_batch(agent, seed), ranks.rank, ranks.size), 2, execution)
        gradients = gradients or {name: adam.gradient.clone() for name, adam in agent.optimizers.items()}
    return agent, gradients, update


@pytest.mark.parametrize("objective", ["reconstruct", "redundancy", "sigreg"])
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_are_one_process_with_the_whole_batch(steady, size, objective):
    """Gradients, running statistics, weights and metrics, of vectors and of images."""
    agent, gradients, update = two_updates(Ranks(), objective)
    ranks = together(size, lambda ranks: two_updates(ranks, objective))
    for result in ranks:
        assert not isinstance(result, Exception), result
        other, theirs, its_update = result
        for name, gradient in gradients.items():
            assert 0 < float((gradient - theirs[name]).abs().max()) <= 1e-5 * float(gradient.abs().max()), name
            assert torch.equal(ranks[0][0].optimizers[name].flat, other.optimizers[name].flat), name
        buffers = dict(other.policy.named_buffers())
        for name, buffer in agent.policy.named_buffers():
            assert torch.allclose(buffer, buffers[name], rtol=1e-5, atol=1e-5), name
        for name, value in update.metrics.items():
            assert float(its_update.metrics[name]) == pytest.approx(float(value), rel=1e-3, abs=1e-4), name
    joined = torch.cat([its.states.deter for _, _, its in ranks])
    assert torch.allclose(joined, update.states.deter, atol=1e-3)


def test_the_depth_is_that_of_rank_0():
    def draws(ranks):
        agent, _ = make(1)
        execution, depths = Eager(agent, ranks=ranks), []
        agent.begin_update = lambda progress: 1 + ranks.rank
        agent.update = lambda batch, depth, execution: depths.append(depth)
        execution.update(None)
        return depths

    assert together(2, draws) == [[1], [1]]


def test_a_loss_that_is_not_finite_on_one_rank_raises_on_all_and_moves_no_weight():
    def bad(ranks):
        agent, _ = make(1)
        execution = Eager(agent, ranks=ranks)
        batch = share_of(make_batch(agent), ranks.rank, 2)
        if ranks.rank:
            batch.reward[0, 0] = float("nan")
        before = [adam.flat.detach().clone() for adam in agent.optimizers.values()]
        with pytest.raises(NonFiniteError, match="world/reward_loss"):
            execution.update(batch)
        return all(map(torch.equal, before, (adam.flat for adam in agent.optimizers.values())))

    assert together(2, bad) == [True, True]


def test_a_rank_that_ends_is_noticed_at_once():
    def work(ranks):
        assert ranks.gather({"rank": ranks.rank}) == [{"rank": number} for number in range(3) if ranks.rank == 0]
        assert ranks.broadcast_object("folder" if ranks.rank == 0 else None) == "folder"
        assert ranks.all_gather([ranks.rank]) == [[0.0], [1.0], [2.0]]
        if ranks.rank == 2:
            del ranks.group  # its connections close
            return None
        began = time.monotonic()
        with pytest.raises(RankLost, match="killed, or out of memory"):
            list(iter(lambda: ranks.all_gather([0.0]), None))  # messages without an end
        return time.monotonic() - began

    first, second, _ = together(3, work)
    assert max(first, second) < 60.0, (first, second)


# ---------------------------------------------------------------------- --optimizer.workers


def test_workers_are_one_process_with_the_whole_batch(processes):
    """But for random numbers: all processes take the same steps, and their statistics are those of the whole batch."""
    (shared, two), (plain, one) = processes(2), processes(1)
    batch = make_batch(plain)
    for _ in range(2):
        torch.manual_seed(1)  # the same training depth
        states, depths, metrics, errors = two.update(batch)
        torch.manual_seed(1)
        usual_states, usual_depths, usual_metrics, usual_errors = one.update(batch)
    assert errors.shape == usual_errors.shape == (SIZE, 2)
    assert metrics.keys() == usual_metrics.keys()
    assert states.deter.shape == usual_states.deter.shape == (SIZE, LENGTH, 2, 8)
    assert depths.shape == usual_depths.shape == (4 * SIZE, HORIZON)
    assert {"all_reduce", "workers"} <= shared.clock.seconds.keys()
    for name, value in metrics.items():
        assert torch.isfinite(value), name
    statistics = [agent.world.observation_model.standardise for agent in (shared, plain)]
    for name in ("mean", "var", "updates"):
        assert torch.allclose(*(getattr(each, name) for each in statistics), atol=1e-5), name


def test_a_loss_of_a_worker_that_is_not_finite_moves_no_weight(processes):
    agent, execution = processes(2)
    batch = make_batch(agent)
    execution.update(batch)
    before = [adam.flat.detach().clone() for adam in agent.optimizers.values()]
    batch.reward[SIZE - 1, 0] = float("nan")  # of the worker
    with pytest.raises(NonFiniteError, match="world/reward_loss"):
        execution.update(batch)
    for adam, value in zip(agent.optimizers.values(), before, strict=True):
        assert torch.equal(adam.flat, value)


def test_a_worker_that_fails_or_is_killed_is_told(processes, capfd):
    agent, execution = processes(2)
    batch = make_batch(agent)
    execution.update(batch)
    execution.connection.send(("update", "no batch"), 1)
    with pytest.raises(WorkerFailure, match="--optimizer.workers has ended"):
        execution.update(batch)
    assert "no attribute" in capfd.readouterr().err
    execution.close()
    execution.update(batch)  # with new ones
    os.kill(execution.workers[0].pid, signal.SIGKILL)
    with pytest.raises(WorkerFailure, match="--optimizer.workers has ended"):
        execution.update(batch)


def test_what_is_saved_after_the_death_of_a_worker_has_the_random_numbers_before_it(processes):
    """It died between two updates, or before the first one: that is told by the next update, and no save fails."""
    agent, execution = processes(2)
    execution.update(make_batch(agent))
    before = execution.state_dict()["random"]
    os.kill(execution.workers[0].pid, signal.SIGKILL)
    execution.workers[0].join()
    (state,) = execution.state_dict()["random"]
    assert torch.equal(state, before[0])
    with pytest.raises(WorkerFailure, match="--optimizer.workers has ended"):
        execution.update(make_batch(agent))
    _, other = processes(2)
    other.workers = [execution.workers[0]]  # it ended while it started
    assert other.state_dict() == {"random": []}


def test_a_worker_whose_update_is_given_up_ends_quietly(processes):
    """As by a second Ctrl-C."""
    agent, execution = processes(2)
    execution.update(make_batch(agent))
    execution.scatter(make_batch(agent), 0.0)
    execution.broken = True
    (worker,) = execution.workers
    execution.close()
    assert worker.exitcode == 0


def test_a_worker_that_ends_leaves_a_run_that_goes_on(make_trainer, tmp_path):
    config = preset("debug")
    config = replace(config, optimizer=replace(config.optimizer, workers=2))
    trainer = make_trainer(tmp_path, config=config, steps=240, save_every=0, eval_every=0)
    update = trainer.execution.update

    def dying(*words):
        if trainer.agent.updates == 20:
            trainer.execution.workers[0].kill()
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

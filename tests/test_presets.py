"""The presets and what suits the machine: every preset can be built and updated, threads are chosen."""

import itertools
from dataclasses import replace

import pytest
import torch
from small import ACTIONS, SIZES, make_batch

from agent import runtime
from agent.execution import Eager
from agent.learning.dreamer import Dreamer
from agent.runs.presets import PRESETS, preset
from agent.runtime import set_threads
from agent.spaces import ActionSpec, Spaces


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_can_be_trained(name):
    settings = preset(name)
    behavior = replace(settings.behavior, starts=0, horizon=2)
    agent = Dreamer(settings.model, behavior, settings.optimizer, Spaces(SIZES, ActionSpec(ACTIONS, False)))
    before = agent.optimizers["world"].flat.detach().clone()
    Eager(agent).update(make_batch(agent.world, size=2, length=4))
    assert not torch.equal(before, agent.optimizers["world"].flat)
    assert torch.isfinite(agent.optimizers["world"].flat).all()


def test_tiny_keeps_to_its_number_of_parameters():
    """Of all but the copies of weights (the slow critic, the averaged agent), on the largest task of @dmc18."""
    walker = Spaces({"state": 24}, ActionSpec(6, False))
    settings = preset("tiny")
    agent = Dreamer(settings.model, settings.behavior, settings.optimizer, walker)
    counts = agent.parameter_counts()
    assert counts["core"] <= 43_000
    trained = counts["world"] + counts["actor"] + counts["critic"]
    assert trained == sum(adam.flat.numel() for adam in agent.optimizers.values()) <= 120_000


def test_base_has_tokens_that_attend_to_each_other():
    assert preset("base").model.loop.tokens > 1


def test_base_learns_from_as_many_rows_as_dreamerv3_does():
    train, behavior = preset("base").train, preset("base").behavior
    assert (train.batch * train.length, train.ratio) == (16 * 64, 0.25)
    assert (behavior.starts, behavior.horizon) == (0, 15)  # every row starts a dream


@pytest.fixture
def threads():
    """Whatever a test does to the number of threads is undone."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("wanted", [1, 2, 3])
def test_threads_are_taken_as_given(threads, wanted):
    torch.set_num_threads(4)
    assert set_threads(wanted) == torch.get_num_threads() == wanted


def test_threads_not_given_are_measured(threads):
    torch.set_num_threads(4)
    chosen = set_threads(0)
    assert chosen in (1, 2)
    assert torch.get_num_threads() == chosen


@pytest.mark.parametrize(("cores", "seconds", "faster"), [(2, (3, 2), 2), (2, (2, 3), 1), (1, (3, 2), 1)])
def test_the_faster_number_of_threads_is_taken(monkeypatch, cores, seconds, faster):
    given = []  # nothing really runs on two threads, which takes long on busy cores
    now = itertools.accumulate(iter(lambda: seconds[given[-1] - 1], None))
    monkeypatch.setattr(runtime.time, "perf_counter", lambda: next(now))
    monkeypatch.setattr(runtime, "cores", lambda: cores)
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    assert set_threads(0) == given[-1] == faster


@pytest.mark.parametrize(("allowed", "count", "expected"), [({0, 5}, 8, 2), (None, 8, 8), (None, None, 1)])
def test_processors_are_those_that_this_process_may_use(monkeypatch, allowed, count, expected):
    monkeypatch.setattr(runtime.os, "cpu_count", lambda: count)
    if allowed:
        monkeypatch.setattr(runtime.os, "sched_getaffinity", lambda pid: allowed, raising=False)
    else:
        monkeypatch.delattr(runtime.os, "sched_getaffinity", raising=False)
    assert runtime.cores() == expected
    assert preset("base").train.envs == expected

"""The parallel scan over time computes what the scan row by row computes."""

import csv
import sys

import pytest
import torch
from conftest import benchmark
from small import ACTIONS, SIZES, make_batch

from experiments.parallel_scan import FilterWorldModel, PicardWorldModel, ScanWorldModel, linear_recurrence
from world_model import LatentState, LoopConfig, ModelConfig, WorldModel


def world_of(kind, core, seed=0, **loop):
    torch.manual_seed(seed)
    cfg = LoopConfig(**{"tokens": 2, "width": 8, "units": 16, "mean_loops": 2.0, "depth": "fixed"} | loop)
    return kind(ModelConfig(cfg, core=core, groups=3, classes=4, units=16), SIZES, ACTIONS)


def row_by_row(world, batch, loops):
    """With `WorldModel.scan`, of the same weights."""
    torch.manual_seed(5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(world), "scan", WorldModel.scan)
        return world.observe_sequence(batch, loops)


def at_once(world, batch, loops):
    torch.manual_seed(5)
    return world.observe_sequence(batch, loops)


@pytest.fixture
def batch():
    world = world_of(WorldModel, "looped")
    batch = make_batch(world, 3, 7)
    first = batch.is_first.clone()
    first[0, 0] = first[1, 3] = first[2, 5] = True
    start = LatentState(torch.randn(3, 2, 8), torch.eye(4)[torch.randint(0, 4, (3, 3))])
    return batch._replace(is_first=first, start=start)


def test_a_linear_recurrence_is_what_it_says():
    keep, add, first = torch.rand(5, 2, 1, 3), torch.randn(5, 2, 1, 3), torch.randn(2, 1, 3)
    states, state = linear_recurrence(keep, add, first), first
    for t in range(5):
        state = keep[t] * state + add[t]
        assert torch.allclose(states[t], state)


@pytest.mark.parametrize("loops", [1, 3])
def test_all_rows_at_once_are_the_rows_one_after_the_other(batch, loops):
    world = world_of(ScanWorldModel, "experiments.parallel_scan:ScanCore")
    one, other = at_once(world, batch, loops), row_by_row(world, batch, loops)
    assert torch.equal(one.states.stoch.argmax(-1), other.states.stoch.argmax(-1))
    assert torch.allclose(one.states.deter, other.states.deter, atol=1e-5)
    assert torch.allclose(one.prior_dist, other.prior_dist, atol=1e-4)
    for mine, theirs in zip(one.trace, other.trace, strict=True):
        assert mine.shape == theirs.shape
    assert torch.allclose(one.trace.states[1:], other.trace.states[1:], atol=1e-5)
    losses = [world.loss(post, batch)[0] for post in (one, other)]
    assert float(losses[0].detach()) == pytest.approx(float(losses[1].detach()), rel=1e-4)
    grads = [torch.autograd.grad(loss, list(world.parameters()), allow_unused=True) for loss in losses]
    for mine, theirs in zip(*grads, strict=True):
        assert (mine is None) == (theirs is None)
        assert mine is None or torch.allclose(mine, theirs, atol=1e-4, rtol=1e-2)


@torch.no_grad()
def test_sweeps_reach_the_scan_after_as_many_as_there_are_rows(batch):
    """Each sweep makes at least one more row exact, whatever the core; so T sweeps are the scan itself."""
    world = world_of(PicardWorldModel, "looped")
    exact, away = row_by_row(world, batch, 2).states.deter, []
    for sweeps in range(1, 8):
        world.sweeps = sweeps
        deter = at_once(world, batch, 2).states.deter
        assert torch.allclose(deter[:, :sweeps], exact[:, :sweeps], atol=1e-5)
        away.append(float((deter - exact).norm() / exact.norm()))
    assert away[-1] < 1e-5
    assert away[0] > 1e-3


@torch.no_grad()
def test_the_posterior_reads_the_observation_alone(batch):
    world = world_of(FilterWorldModel, "looped")
    embed = torch.randn(3, 16)
    assert torch.equal(world.posterior(torch.randn(3, 2, 8), embed), world.posterior(torch.zeros(3, 2, 8), embed))
    dream = world.imagine(batch.start, torch.zeros(3, 4, ACTIONS), 4)
    assert dream.states.deter.shape == (3, 5, 2, 8)


# ---------------------------------------------------------------------- the study


@pytest.fixture
def study(monkeypatch):
    module = benchmark("parallel_time")
    threads = torch.get_num_threads()
    yield module
    torch.set_num_threads(threads)


def test_the_study_trains_every_variant_once_and_goes_on(study, monkeypatch, tmp_path, script):
    made = script("evaluate.py", "collect", "toy:cue5", tmp_path / "data", "--episodes", 20)
    assert made.returncode == 0, made.stderr
    words = [tmp_path / "data", "--updates", 3, "--length", 8, "--seeds", 0, "--out", tmp_path / "rows.csv"]
    for variants in (["scan"], list(study.VARIANTS)):
        monkeypatch.setattr(sys, "argv", ["parallel_time.py", *map(str, words), "--variants", *variants])
        assert study.main() == 0
    with (tmp_path / "rows.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["variant"] for row in rows if row["horizon"] == "1"] == [
        "scan", "default", "filter", "picard2", "picard4"
    ]  # fmt: skip
    assert all(float(row["error"]) > 0 for row in rows)


def test_every_variant_is_timed_with_both_kinds_of_layers(study, monkeypatch, capsys):
    study.times(["default", "scan"], 1, (4, 8))
    header, *rows, note = capsys.readouterr().out.splitlines()
    assert [row[:24].strip() for row in rows] == ["default", "scan", "default, fused", "scan, fused"]
    assert all(float(number) > 0 for row in rows for number in row[24:].split())
    assert [row[24:].split()[1] for row in rows[::2]] == ["1.00", "1.00"]


def test_both_kinds_of_layers_compute_the_same_scan(study):
    config, found = study.preset("small"), []
    for fused in (False, True):
        world = study.make_world(study.VARIANTS["scan"], config, study.WALKER, 0, fused)
        batch = make_batch(WorldModel(config.model, {"state": 24}, 6), 4, 6)
        batch = batch._replace(prev_action=torch.zeros(4, 6, 6))
        torch.manual_seed(0)
        with study.fused_layers():
            found.append(world.observe_sequence(batch, 2).states.deter)
    assert torch.allclose(*found, atol=1e-4)

"""evaluate.py stability and evaluate.py loops: long dreams, read-outs loop by loop, and both commands."""

import csv
import json

import pytest
import torch
from conftest import counters, untrained
from small import make_batch

from agent.evaluation.anatomy import Samples, anatomy, descent, participation, rank_correlation, untrained_like
from agent.evaluation.open_loop import choose_windows
from agent.evaluation.recording import record
from agent.evaluation.stability import NEAR, batch_of, long_dreams, neighbours, stability_report
from world_model import ModelConfig, WorldModel, certificate
from world_model.latent import kl_divergence


def recorded(agent):
    return record(None, agent.spaces, counters, range(4))


@pytest.fixture
def agent():
    return untrained()


def test_a_batch_of_recorded_episodes_starts_with_them(agent):
    recording = recorded(agent)
    batch = batch_of(recording.episodes, rows=3)
    assert batch.reward.shape == (4, 3)
    assert torch.equal(batch.obs["state"][:, :, 0], torch.arange(3.0).expand(4, -1))
    assert batch.is_first.tolist() == [[True, False, False]] * 4
    assert batch_of(recording.episodes).reward.shape[1] == int(recording.episodes.length.min())


# ---------------------------------------------------------------------- stability


def test_neighbours_are_as_near_as_they_say():
    deter = torch.randn(5, 2, 8)
    apart = (neighbours(deter) - deter).flatten(1).norm(dim=1)
    assert torch.allclose(apart, NEAR * deter.flatten(1).norm(dim=1))


def test_dreams_of_a_contracting_core_forget_how_they_began(agent):
    """Driven by the same actions and latents; the looped core need not, and the distance starts at 1."""
    torch.manual_seed(0)
    spaces, behavior = agent.spaces, agent.behavior
    loop = agent.world.cfg.loop
    cfg = ModelConfig(loop, core="contracting", groups=agent.world.cfg.groups, classes=agent.world.cfg.classes)
    world = WorldModel(cfg, spaces.obs, spaces.action.size)
    rows = long_dreams(world, behavior, world.initial(3), 200, 2)
    assert rows[0]["distance"] == pytest.approx(1.0)
    rate = certificate(world.core).step
    for row in rows:
        assert row["farthest"] <= rate ** row["step"] + 1e-4
    assert rows[-1]["farthest"] < 0.1
    assert [row["step"] for row in rows] == list(range(201))


def test_long_dreams_start_anywhere_in_the_first_half_of_an_episode(agent, monkeypatch):
    """Dreams of all but the first rows would all start at the same row."""
    chosen = []
    monkeypatch.setattr(
        "agent.evaluation.stability.choose_windows", lambda *args: chosen.append(choose_windows(*args)) or chosen[-1]
    )
    report = stability_report(agent.world, agent.behavior, recorded(agent), 2, points=4, attack_steps=1, dreams=6)
    (windows,) = chosen
    assert len(windows.row.unique()) > 2
    assert len(report.errors) == windows.ahead.shape[1] > 1


def test_a_report_holds_bounds_dreams_and_errors(agent):
    report = stability_report(
        agent.world, agent.behavior, recorded(agent), 2, points=12, attack_steps=5, steps=20, dreams=3
    )
    loop, step, channel = report.bounds
    assert (loop["certificate"], step["certificate"]) == (float("inf"), float("inf"))
    for row in (loop, step):
        assert row["visited"] <= row["worst"] <= row["attacked"]
    assert channel["certificate"] == certificate(agent.world.core).box > channel["attacked"]
    assert len(report.dreams) == 21
    assert report.errors[0]["step"] == 1
    assert report.plain()["bounds"][0]["certificate"] is None
    json.dumps(report.plain(), allow_nan=False)


# ---------------------------------------------------------------------- loops


def test_participation_and_ranks_have_known_values():
    assert participation(torch.ones(3, 10)) == pytest.approx(1.0)
    assert participation(torch.eye(10)) == pytest.approx(0.1)
    x = torch.tensor([3.0, 1.0, 2.0, 9.0])
    assert float(rank_correlation(x, x.exp())) == pytest.approx(1.0)
    assert float(rank_correlation(x, -x)) == pytest.approx(-1.0)
    assert float(rank_correlation(x, torch.ones(4))) == 0.0


def test_a_step_down_the_gradient_is_recognised_and_one_across_it_is_not(agent):
    """The first state is moved by hand, against the gradient of KL(posterior || prior), and at right angles to it."""
    with torch.no_grad():
        for weight in agent.world.prior.parameters():
            weight.add_(0.5 * torch.randn_like(weight))
        found = Samples(agent.world, recorded(agent), 8, 2)
    core, world = agent.world.core, agent.world
    x = found.x[0].float().requires_grad_()
    deter = core.readout(found.deter, x, found.gate)
    post = torch.log(world.posterior(deter, found.embed)).detach()
    (gradient,) = torch.autograd.grad(kl_divergence(post, world.log_prior(deter)).sum(), x)
    found.x[1] = found.x[0] - gradient
    assert descent(world, found, 1) == pytest.approx(1.0, abs=1e-4)
    across = torch.randn_like(gradient)
    along = (across * gradient).flatten(1).sum(1) / gradient.flatten(1).square().sum(1)
    found.x[1] = found.x[0] + across - along[:, None, None] * gradient
    assert descent(world, found, 1) == pytest.approx(0.0, abs=1e-4)


def test_each_loop_is_read_out_as_the_core_would_stop_there(agent):
    """Row by row the states, KL and rewards are those of a step of that many loops."""
    report = anatomy(agent.world, agent.behavior, recorded(agent), samples=10, loops=6)
    reference = agent.world.cfg.loop.train_cap
    assert report.reference == reference
    assert [row["loop"] for row in report.loops] == list(range(1, 7))
    at_reference = report.loops[reference - 1]
    assert at_reference["prior_kl"] == pytest.approx(0.0, abs=1e-6)
    assert at_reference["reward"] == pytest.approx(0.0, abs=1e-6)
    assert report.loops[-1]["distance"] == 0.0
    assert sum(report.orbits.values()) == pytest.approx(1.0)
    assert report.moving.shape[0] == 6
    json.dumps(report.plain(), allow_nan=False)
    again = anatomy(agent.world, agent.behavior, recorded(agent), samples=10, loops=6)
    assert again.loops == report.loops


@torch.no_grad()
def test_the_states_of_samples_are_those_of_a_step():
    torch.manual_seed(0)
    agent = untrained()
    found = Samples(agent.world, recorded(agent), 5, 4)
    core = agent.world.core
    x, injected = found.x[0].float(), core.inject(core.input_norm(found.given.float()), core.prepare())
    for loop in range(1, 4):
        x = core.refine(x, injected, core.prepare())
        assert torch.allclose(x, found.x[loop].float(), atol=1e-4)


def test_an_untrained_model_has_other_weights_and_the_same_scales(agent):
    agent.world.observation_model.track(make_batch(agent.world).obs)
    fresh = untrained_like(agent.world, 5)
    assert not torch.equal(fresh.prior.out.weight, agent.world.prior.out.weight)
    for mine, trained in zip(fresh.observation_model.buffers(), agent.world.observation_model.buffers(), strict=True):
        assert torch.equal(mine, trained)
    assert torch.equal(untrained_like(agent.world, 5).prior.out.weight, fresh.prior.out.weight)


# ---------------------------------------------------------------------- the commands


def test_both_commands_print_and_write_what_they_found(finished, script, tmp_path):
    words = finished[0], "--episodes", 2, "--out", tmp_path / "out"
    done = script("evaluate.py", "stability", *words, "--points", 6, "--attack-steps", 3, "--steps", 12)
    assert done.returncode == 0, done.stderr
    for text in ("one loop", "environment step", "none", "distance of neighbouring dreams", "against the simulator"):
        assert text in done.stdout
    assert {"bounds.csv", "dreams.csv", "errors.csv", "stability.json", "stability.png"} == {
        path.name for path in (tmp_path / "out").iterdir()
    }
    with (tmp_path / "out" / "dreams.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 13

    done = script("evaluate.py", "loops", *words, "--samples", 6, "--loops", 5, "--json", tmp_path / "x.json")
    assert done.returncode == 0, done.stderr
    for text in ("orbits of 6 samples after 5 loops", "spectral radius", "the deepest of training"):
        assert text in done.stdout
    assert json.loads((tmp_path / "x.json").read_text())["reference"] >= 1
    done = script("evaluate.py", "loops", *words, "--samples", 6, "--loops", 5, "--untrained")
    assert done.returncode == 0, done.stderr
    assert "step 0" in done.stdout


def test_a_run_without_loops_is_refused(script, tmp_path):
    words = "toy:cue5", "--preset", "debug", "--model.core", "gru", "--run-dir", tmp_path / "runs", "--no-video"
    assert script("train_agent.py", *words).returncode == 0
    for command in ("stability", "loops"):
        refused = script("evaluate.py", command, tmp_path / "runs", "--episodes", 2)
        assert refused.returncode == 2
        assert "the core gru has no loops" in refused.stderr


@pytest.mark.parametrize(
    ("command", "option", "message"),
    [
        ("stability", "--points", "must be at least 1, got 0"),
        ("stability", "--max-loops", "must be from 1 to 10,000, got 0"),
        ("loops", "--loops", "must be at least 1, got 0"),
    ],
)
def test_impossible_counts_are_refused(command, option, message, finished, script):
    refused = script("evaluate.py", command, finished[0], option, "0")
    assert refused.returncode == 2
    assert message in refused.stderr

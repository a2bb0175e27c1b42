"""The linear read-out of the true state: closed forms, known latents, and the command."""

import csv
import json

import pytest
import torch
from conftest import counters, untrained

from agent.errors import UsageError
from agent.evaluation.open_loop import posterior_states
from agent.evaluation.probe import Readout, probe_states, r_squared, true_state
from agent.evaluation.recording import record
from world_model import WorldModel


def test_r_squared_of_known_predictions():
    torch.manual_seed(0)
    y = torch.randn(1000, 3, dtype=torch.float64)
    y[:, 2] = 5.0
    half = 0.5 * y + 0.5 * y.mean(0)
    for prediction, expected in ((y, 1.0), (y.mean(0).expand_as(y), 0.0), (half, 0.75)):
        found = r_squared(prediction, y)
        assert found[:2].tolist() == pytest.approx([expected] * 2, abs=1e-6)
        assert found[2].isnan()


def test_the_read_out_finds_a_linear_map_and_its_intercept():
    torch.manual_seed(0)
    x, weight = torch.randn(500, 4), torch.randn(4, 2)
    readout = Readout(x, x @ weight + 3.0)
    new = torch.randn(20, 4)
    assert torch.allclose(readout(new), (new @ weight + 3.0).double(), atol=0.05)
    Readout(torch.ones(10, 4), torch.randn(10, 2))  # nothing varies: no division by nothing


@pytest.fixture
def agent():
    return untrained()


def test_what_latents_hold_is_read_out_and_what_they_do_not_hold_is_not(agent):
    recording = record(None, agent.spaces, counters, range(40))
    states, _ = posterior_states(agent.world, recording.episodes)
    feat = states.feat()
    gen = torch.Generator().manual_seed(0)
    known = feat @ torch.randn(feat.shape[-1], 2, generator=gen)
    noise = torch.randn(*feat.shape[:2], 2, generator=gen)
    held = probe_states(agent.world, recording._replace(hidden=known), steps=(1, 3))
    assert held.r2 > 0.95
    assert held.truth == "the vector that images show"
    assert held.numbers == 2
    assert set(held.ahead) <= {1, 3}
    foreign = probe_states(agent.world, recording._replace(hidden=noise), steps=())
    assert foreign.r2 < 0.2
    assert held.r2 > held.r2_deter - 1e-6
    again = probe_states(agent.world, recording._replace(hidden=known), steps=(1, 3))
    assert again == held


def test_vectors_are_the_true_state_where_they_are_seen(agent):
    recording = record(None, agent.spaces, counters, range(6))
    name, truth = true_state(agent.world, recording)
    assert name == "the observed vector"
    assert torch.equal(truth, recording.episodes.obs["state"])
    cfg = agent.world.cfg
    blind = WorldModel(cfg, {"image": (16, 16, 3)}, 1)
    with pytest.raises(UsageError, match="images are all that is seen"):
        true_state(blind, recording)


def test_too_few_episodes_are_an_error(agent):
    with pytest.raises(UsageError, match="at least two"):
        probe_states(agent.world, record(None, agent.spaces, counters, range(1)))


def test_the_command_reads_models_without_a_decoder_too(script, tmp_path):
    run, words = tmp_path / "run", ("--preset", "debug", "--no-video", "--model.objective", "sigreg")
    assert script("train_agent.py", "gym:Pendulum-v1", *words, "--run-dir", run).returncode == 0
    done = script("evaluate.py", "probe", run, "--episodes", 4, "--json", tmp_path / "x.json")
    assert done.returncode == 0, done.stderr
    assert "3 numbers of the true state (the observed vector)" in done.stdout
    found = json.loads((tmp_path / "x.json").read_text())
    assert found["r2"] <= 1.0
    assert set(found["ahead"]) == {"1", "5", "15", "50"}
    words = ("--episodes", 4, "--horizons", 1, "--json", tmp_path / "x.json", "--player")
    for player in ("random", run):
        done = script("evaluate.py", "probe", run, *words, player)
        assert done.returncode == 0, done.stderr
        again = json.loads((tmp_path / "x.json").read_text())
        assert (again["r2"] == found["r2"]) == (player == run)  # its own agent plays the same episodes
    refused = script("evaluate.py", "probe", run, "--episodes", 1)
    assert refused.returncode == 2


def test_world_models_without_a_decoder_are_compared_on_a_data_set(script, tmp_path):
    """What the probe finds stands beside that of a model with a decoder, which has errors too."""
    assert script("evaluate.py", "collect", "gym:Pendulum-v1", tmp_path / "data", "--episodes", 40).returncode == 0
    for objective in ("sigreg", "reconstruct"):
        run, words = tmp_path / objective, ("--model-only", "--dataset", tmp_path / "data", "--preset", "debug")
        words += ("--model.objective", objective, "--offline.updates", 40, "--offline.eval-every", 20)
        done = script("train_agent.py", "gym:Pendulum-v1", *words, "--run-dir", run)
        assert done.returncode == 0, done.stderr
        with (run / "probe.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert [row["update"] for row in rows] == ["20", "40"]
        assert all(float(row["probe"]) <= 1.0 for row in rows)
        assert {"probe_1", "probe_5", "probe_15", "probe_50"} <= rows[0].keys()
        assert (run / "open_loop.csv").exists() == (objective == "reconstruct")
        assert "probe " in done.stdout

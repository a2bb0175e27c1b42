"""Each purpose plays episodes of its own."""

from itertools import pairwise

import pytest
import torch
from conftest import counters, metronomes, untrained
from gymnasium.vector import SyncVectorEnv

from agent.evaluation.episodes import EvalConfig, Evaluator
from agent.evaluation.recording import record, record_batches
from agent.seeds import COLLECTION, MODEL_RECORDING, PURPOSES
from agent.spaces import spaces_of


def test_a_data_set_and_the_episodes_that_score_its_model_share_no_seed(finished, script, monkeypatch):
    seeds, reset = [], SyncVectorEnv.reset

    def spy(self, *, seed=None, options=None):
        seeds.extend(seed)
        return reset(self, seed=seed, options=options)

    monkeypatch.setattr(SyncVectorEnv, "reset", spy)
    done = script("evaluate.py", "collect", "toy:cue5", "data", "--episodes", 12)
    assert done.returncode == 0, done.stderr
    collected = set(seeds)
    seeds.clear()
    words = ("--episodes", 3, "--horizon", 2, "--windows", 2, "--out", "model")
    done = script("evaluate.py", "model", finished[0], *words)
    assert done.returncode == 0, done.stderr
    assert len(collected) == 12
    assert len(set(seeds)) == 3
    assert not collected & set(seeds)


def test_the_ranges_do_not_overlap():
    ranges = sorted((range(first, first + size) for first, size in PURPOSES), key=lambda seeds: seeds.start)
    assert all(one.stop <= other.start for one, other in pairwise(ranges))


def test_final_and_interim_evaluations_play_their_own_episodes():
    evaluate = Evaluator(EvalConfig(episodes=4, interim_episodes=3, seed=5), untrained(), counters, 1)
    assert [row["seed"] for row in evaluate(final=True)] == [1_000_000_005 + i for i in range(4)]
    assert [row["seed"] for row in evaluate(final=False)] == [1_001_000_005 + i for i in range(3)]


def test_recordings_for_two_purposes_differ_even_where_the_environment_ignores_its_seed():
    spaces = spaces_of(metronomes(1))
    model = record(None, spaces, metronomes, MODEL_RECORDING.episodes(0, 2))
    same = record(None, spaces, metronomes, MODEL_RECORDING.episodes(0, 2))
    (data,) = record_batches(None, spaces, metronomes, COLLECTION.episodes(0, 2))
    assert torch.equal(model.episodes.prev_action, same.episodes.prev_action)
    assert not torch.equal(model.episodes.prev_action, data.episodes.prev_action)


@pytest.mark.parametrize(("seed", "count"), [(-1, 1), (1_000_000, 1), (999_999, 2)])
def test_seeds_beyond_a_range_are_refused(seed, count):
    with pytest.raises(ValueError, match=f"--seed must lie between 0 and .* for {count} episodes, got {seed}"):
        COLLECTION.episodes(seed, count)
    with pytest.raises(ValueError, match="--eval.seed must lie between"):
        EvalConfig(seed=seed, episodes=count)

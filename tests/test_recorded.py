"""A recorded data set in the replay of a run: each row where it belongs, and the whole program with it."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import counters, untrained

from agent.data.dataset import Dataset, load_dataset, whole_episodes
from agent.data.replay import ReplayBuffer
from agent.errors import UsageError
from agent.spaces import ActionSpec, Spaces
from agent.training.recorded import add_recorded, load_recorded, recorded_line

SPACES = Spaces({"state": 1}, ActionSpec(1, False))


def dataset_of(episodes, length=5):
    """Rows that count on, over all episodes."""
    count = episodes * length
    at = np.arange(count) % length
    rows = {
        "obs/state": np.arange(count, dtype=np.float32)[:, None], "prev_action": np.ones((count, 1), np.float32),
        "reward": at.astype(np.float32), "is_first": at == 0, "is_last": at == length - 1,
        "is_terminal": at == length - 1,
    }  # fmt: skip
    return Dataset("toy:counter", SPACES, rows, {})


def replay_of(agent, rows, envs=2):
    loop, model = agent.world.cfg.loop, agent.world.cfg
    return ReplayBuffer(rows, envs, {"state": 1}, 1, (loop.tokens, loop.width), (model.groups, model.classes))


def test_rows_are_dealt_to_the_environments_in_their_order():
    agent = untrained(counters)
    replay = replay_of(agent, 400)
    assert add_recorded(replay, dataset_of(7), agent) == 34  # of 35: two pieces of equal length
    assert replay.count == 17
    state, first, last = (replay.rows[name][:, :17] for name in ("obs/state", "is_first", "is_last"))
    assert state[..., 0].tolist() == [list(range(1, 18)), list(range(18, 35))]
    # A piece begins with an episode of its own and ends one; inside everything is as it was.
    assert first[:, 0].all()
    assert last[:, -1].all()
    assert not replay.rows["reward"][:, 0].any()
    assert not replay.rows["prev_action"][:, 0].any()
    assert first[0, 1:].tolist() == [n % 5 == 0 for n in range(2, 18)]
    assert not replay.rows["is_terminal"][0, 16]  # 17 is in the middle of an episode: truncated
    assert replay.rows["is_terminal"][1, 16]
    assert len(whole_episodes(replay.state_dict())["reward"]) == 34


def test_a_piece_that_ends_with_the_first_row_of_an_episode_does_not_end_it_too():
    agent = untrained(counters)
    replay = replay_of(agent, 400, envs=3)
    assert add_recorded(replay, dataset_of(5, length=3), agent) == 15
    assert replay.rows["is_first"][1, 4]
    assert not (replay.rows["is_first"] & replay.rows["is_last"]).any()


def test_of_too_much_the_last_rows_stay_and_the_run_goes_on_behind_them():
    agent = untrained(counters)
    replay = replay_of(agent, 20, envs=1)
    assert add_recorded(replay, dataset_of(30), agent) == 20
    assert replay.rows["obs/state"][0, :, 0].tolist() == list(range(130, 150))
    row = {name: value[:, 0] for name, value in replay.rows.items() if name not in ("deter", "stoch")}
    replay.add({**row, "obs/state": np.full((1, 1), -1.0)}, agent.world.initial(1))
    assert replay.rows["obs/state"][0, 0, 0] == -1.0


def test_what_does_not_fit_is_told():
    dataset = dataset_of(400)._replace(held_out=dataset_of(40).train)
    line = recorded_line(dataset, 500)
    assert "500 recorded rows lie in the replay, 200 are held out; 1,500 do not fit, a larger --train.r" in line
    assert recorded_line(dataset, 2000).endswith("200 are held out")


def test_too_few_rows_are_an_error():
    agent = untrained(counters)
    with pytest.raises(UsageError, match="too few for 20 environments"):
        add_recorded(replay_of(agent, 400, envs=20), dataset_of(7), agent)


def test_latents_are_those_of_the_agent():
    agent = untrained(counters)
    replay = replay_of(agent, 200)
    add_recorded(replay, dataset_of(6), agent)
    first = torch.from_numpy(replay.rows["deter"][0, :2].astype(np.float32))
    assert not torch.allclose(first[0], first[1])
    assert replay.rows["stoch"].any()


def test_a_data_set_of_other_sizes_or_of_another_task_is_refused(script, tmp_path):
    assert script("evaluate.py", "collect", "toy:counter", tmp_path / "data", "--episodes", 20).returncode == 0
    spaces = load_dataset(tmp_path / "data").spaces
    load_recorded(tmp_path / "data", "toy:counter", spaces)
    with pytest.raises(UsageError, match="not of dmc:walker_walk"):
        load_recorded(tmp_path / "data", "dmc:walker_walk", spaces)
    with pytest.raises(UsageError, match="other observations or actions"):
        load_recorded(tmp_path / "data", "toy:counter", spaces._replace(obs={"state": 99}))


def test_a_run_begins_with_a_data_set_and_goes_on_without_it(script, tmp_path):
    data, run = tmp_path / "data", tmp_path / "run"
    assert script("evaluate.py", "collect", "toy:counter", data, "--episodes", 50).returncode == 0
    held = len(load_dataset(data).train["reward"])
    words = "--preset", "debug", "--no-video", "--dataset", data, "--run-dir", run
    done = script("train_agent.py", "toy:counter", *words)
    assert done.returncode == 0, done.stderr
    saved = torch.load(run / "checkpoints" / "latest.pt", weights_only=True)
    assert saved["replay"]["count"] >= held + 600
    assert f"{held} recorded rows lie in the replay, " in done.stdout
    shutil.rmtree(data)
    done = script("train_agent.py", "--resume", run, "--steps", "700")
    assert done.returncode == 0, done.stderr
    again = torch.load(run / "checkpoints" / "latest.pt", weights_only=True)
    assert again["replay"]["count"] >= saved["replay"]["count"] + 100
    assert script("evaluate.py", "dataset", run, tmp_path / "both").returncode == 0
    assert f"with episodes of {data}" in json.loads((tmp_path / "both" / "dataset.json").read_text())["source"]
    refused = script("train_agent.py", "toy:counter", "--preset", "debug", "--dataset", data)
    assert refused.returncode == 2
    assert "is not a data set" in refused.stderr


def test_baselines_take_no_data_set(script, tmp_path):
    refused = script("train_agent.py", "toy:counter", "--agent", "sac", "--dataset", tmp_path)
    assert refused.returncode == 2
    assert "learns from no data set" in refused.stderr

"""Fixed data sets, and training on them."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import counters, metronomes
from small import make_world

from agent.data.dataset import check_dataset, export_dataset, load_dataset, pad_episodes, rows_of, whole_episodes
from agent.data.replay import FLAGS, NEVER, ReplayBuffer
from agent.errors import UsageError
from agent.evaluation import open_loop as open_loop_module
from agent.evaluation.open_loop import posterior_rows, posterior_states
from agent.evaluation.recording import record
from agent.execution import Eager
from agent.learning.dreamer import Dreamer
from agent.logs.logger import Logger
from agent.runs.cli import load_yaml
from agent.runs.presets import preset
from agent.spaces import spaces_of
from agent.training.offline import OfflineConfig, OfflineTrainer, check_lengths
from world_model import LatentState

LENGTH = 60
STATE = LatentState(torch.zeros(2, 2, 4), torch.zeros(2, 3, 4))


def counting_replay(rows, capacity=10_000, length=LENGTH):
    """Two environments that count their rows; the second one's episodes are half as long."""
    replay = ReplayBuffer(capacity, 2, {"state": 1}, 1, (2, 4), (3, 4))
    for step in range(rows):
        at = np.array([step % length, step % (length // 2)])
        last = at == [length - 1, length // 2 - 1]
        flags = dict(zip(FLAGS, (at == 0, last, last & False), strict=True))
        episode = np.array([step // length, step // (length // 2)])
        row = {"obs/state": (100.0 * episode + at)[:, None], "prev_action": np.ones((2, 1)), "reward": at}
        replay.add({**row, **flags}, STATE)
    return replay


def checkpoint(replay):
    spaces = {"obs": {"state": 1}, "action": {"size": 1, "discrete": False}}
    return {"task": "toy:counter", "spaces": spaces, "step": 7, "replay": replay.state_dict()}


# ---------------------------------------------------------------------- what is kept


@pytest.mark.parametrize("capacity", [10_000, 2 * 250])
def test_only_whole_episodes_are_kept_in_their_order(capacity):
    replay = counting_replay(10 * LENGTH + 17, capacity)
    rows = whole_episodes(replay.state_dict())
    starts = np.flatnonzero(rows["is_first"])
    ends = np.flatnonzero(rows["is_last"])
    lengths = ends - starts + 1
    assert rows["is_first"][0]
    assert len(rows["reward"]) == lengths.sum()
    held = min(10 * LENGTH + 17, capacity // 2)
    long = (held - 17) // LENGTH  # whole episodes of each environment among the newest rows
    short = (held - 17) // (LENGTH // 2)
    assert lengths.tolist() == [LENGTH] * long + [LENGTH // 2] * short
    for start, length in zip(starts, lengths, strict=True):
        state = rows["obs/state"][start : start + length, 0]
        assert (np.diff(state) == 1).all()
    firsts = rows["obs/state"][starts[:long], 0]
    assert (np.diff(firsts) == 100).all()


def test_a_data_set_comes_back_with_every_tenth_episode_held_out(tmp_path):
    facts = export_dataset(checkpoint(counting_replay(20 * LENGTH)), tmp_path / "data", Path("somewhere"))
    assert facts["episodes"] == 60
    assert facts["mean_return"] == pytest.approx((20 * sum(range(60)) + 40 * sum(range(30))) / 60)
    assert json.loads((tmp_path / "data" / "dataset.json").read_text())["source"] == "somewhere"
    dataset = load_dataset(tmp_path / "data")
    assert dataset.task == "toy:counter"
    assert dataset.spaces.obs == {"state": 1}
    assert dataset.train["is_first"].sum() == 54
    assert dataset.held_out["is_first"].sum() == 6
    episodes = pad_episodes(dataset.held_out)
    assert episodes.length.tolist() == [60, 60, 30, 30, 30, 30]
    assert episodes.reward[2, :30].tolist() == list(range(30))
    assert not episodes.reward[2, 30:].any()


def test_a_data_set_of_a_variant_leaves_numbers_out(tmp_path):
    saved = checkpoint(counting_replay(20 * LENGTH))
    rows = saved["replay"]["rows"]
    rows["obs/state"] = torch.cat([rows["obs/state"], -rows["obs/state"]], -1)
    saved["spaces"]["obs"]["state"] = 2
    export_dataset(saved, tmp_path / "data", Path("run"), np.array([False, True]), "@nov")
    dataset = load_dataset(tmp_path / "data")
    assert (dataset.task, dataset.spaces.obs) == ("toy:counter@nov", {"state": 1})
    assert dataset.train["obs/state"].shape[1:] == (1,)
    assert dataset.train["obs/state"].max() == 0 > dataset.train["obs/state"].min()


def test_data_sets_are_not_overwritten_and_need_episodes(tmp_path):
    saved = checkpoint(counting_replay(20 * LENGTH))
    export_dataset(saved, tmp_path / "data", Path("run"))
    with pytest.raises(UsageError, match="exists"):
        export_dataset(saved, tmp_path / "data", Path("run"))
    with pytest.raises(UsageError, match="at least 10"):
        export_dataset(checkpoint(counting_replay(LENGTH)), tmp_path / "few", Path("run"))
    with pytest.raises(UsageError, match=r"latest\.pt"):
        export_dataset({"task": "toy:counter"}, tmp_path / "none", Path("run"))
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"evaluate\.py dataset"):
        load_dataset(tmp_path / "empty")
    with pytest.raises(UsageError, match="toy:counter"):
        check_dataset(load_dataset(tmp_path / "data"), "toy:cue")


def test_a_replay_without_a_first_row_holds_no_episode():
    replay = counting_replay(40, capacity=2 * 20, length=60)
    replay.rows["is_first"][:] = False
    assert len(whole_episodes(replay.state_dict())["reward"]) == 0


def test_a_filled_replay_samples_the_rows_of_the_data_set():
    rows = whole_episodes(counting_replay(4 * LENGTH).state_dict())
    replay = ReplayBuffer(len(rows["reward"]), 1, {"state": 1}, 1, (2, 4), (3, 4))
    count = len(rows["reward"])
    classes = torch.arange(count)[:, None].expand(-1, 3) % 4
    deter = torch.arange(count).float()[:, None, None].expand(-1, 2, 4)
    replay.fill(rows, LatentState(deter, torch.nn.functional.one_hot(classes, 4).float()))
    batch, where = replay.sample(64, 5)
    by_errors = ReplayBuffer(count, 1, {"state": 1}, 1, (2, 4), (3, 4), sampling="model-error")
    by_errors.fill(rows, LatentState(deter, torch.nn.functional.one_hot(classes, 4).float()))
    assert (by_errors.rows["priority"] == NEVER).all()
    assert torch.equal(batch.reward, torch.from_numpy(rows["reward"][where[1]]))
    before = where[1][:, 0] - 1
    assert torch.equal(batch.start.deter[:, 0, 0], torch.from_numpy(before).float())
    assert torch.equal(batch.start.stoch.argmax(-1)[:, 0], torch.from_numpy(before) % 4)


# ---------------------------------------------------------------------- training


def metronome_dataset(tmp_path, rows=1500):
    """Random play of the metronome, with episodes long enough to predict in."""
    envs = metronomes(1)
    envs.envs[0].unwrapped.length = 40
    envs.action_space.seed(0)
    replay = ReplayBuffer(rows, 1, {"state": 2}, 1, (2, 4), (3, 4))
    obs, _ = envs.reset(seed=0)
    first, action, reward, last = np.array([True]), np.zeros((1, 1)), np.zeros(1), np.array([False])
    for _ in range(rows):
        flags = dict(zip(FLAGS, (first, last, last & False), strict=True))
        state = LatentState(torch.zeros(1, 2, 4), torch.zeros(1, 3, 4))
        replay.add({"obs/state": obs["state"], "prev_action": action, "reward": reward, **flags}, state)
        action = envs.action_space.sample()
        obs, reward, _, truncated, _ = envs.step(action)
        first, last = last, truncated
        action, reward = action * ~first[:, None], reward * ~first
    spaces = spaces_of(envs)
    saved = {"task": "toy:metronome", "spaces": spaces.plain(), "step": rows, "replay": replay.state_dict()}
    export_dataset(saved, tmp_path / "data", Path("test"))
    return load_dataset(tmp_path / "data")


@pytest.mark.parametrize("core", ["looped", "stacked", "gru"])
def test_a_world_model_learns_a_fixed_data_set(tmp_path, core):
    dataset = metronome_dataset(tmp_path)
    config = preset("debug")
    model = replace(config.model, core=core, match="none" if core == "looped" else "params")
    torch.manual_seed(0)
    agent = Dreamer(model, config.behavior, config.optimizer, dataset.spaces)
    before = {name: value.clone() for name, value in agent.behavior.state_dict().items()}
    logger = Logger(tmp_path / "run", 400, console=False)
    stored = {}
    batch = 8, 8
    cfg = OfflineConfig(updates=400, eval_every=100)
    trainer = OfflineTrainer(cfg, agent, Eager(agent), dataset, logger, lambda *item: stored.update([item]), batch, 0)
    trainer.run()
    logger.close()
    with (tmp_path / "run" / "open_loop.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    errors = [float(row["error"]) for row in rows if row["depth"] == "exit" and row["horizon"] == "1"]
    assert len(errors) == 4
    assert errors[-1] < 0.6 < errors[0]
    assert {row["horizon"] for row in rows} == {"1", "5", "15"}
    depths = {row["depth"] for row in rows}
    cap = 2 * model.loop.train_cap if core == "looped" else 0
    assert depths == {"exit", *(str(depth) for depth in range(1, cap + 1))}
    assert stored["latest"]["step"] == 400
    assert trainer.finished
    after = agent.behavior.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items() if "critic" not in name)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any("stability/norm_1" in line for line in lines)


def test_a_limit_of_time_ends_the_training_of_a_model(tmp_path, monkeypatch):
    dataset, config = metronome_dataset(tmp_path), preset("debug")
    torch.manual_seed(0)
    agent = Dreamer(config.model, config.behavior, config.optimizer, dataset.spaces)
    logger = Logger(tmp_path / "run", 400, console=False)
    cfg, rest = OfflineConfig(updates=400, eval_every=100), ((4, 8), 0, "model-error", 1.0)
    trainer = OfflineTrainer(cfg, agent, Eager(agent), dataset, logger, lambda *_: None, *rest)
    passed = iter(range(0, 10_000, 10))
    monkeypatch.setattr(trainer.progress, "now", lambda: trainer.progress.start + next(passed))
    trainer.run()
    logger.close()
    assert trainer.finished
    assert trainer.step == 6  # ten seconds each
    assert trainer.replay.sampling == "model-error"
    assert {float(value) for value in trainer.replay.rows["priority"].flatten()} > {NEVER}


def test_the_commands_export_train_and_explain(finished, tmp_path, script):
    """evaluate.py dataset RUN, then train_agent.py --dataset --model-only on it."""
    data, out = tmp_path / "data", tmp_path / "run"
    made = script("evaluate.py", "dataset", finished[0], data)
    assert made.returncode == 0, made.stderr
    assert "whole episodes" in made.stdout
    common = ["--dataset", data, "--preset", "debug", "--run-dir", out]
    alone = script("train_agent.py", "toy:cue5", "--model-only")
    assert alone.returncode == 2
    assert "--model-only learns from a data set" in alone.stderr + alone.stdout
    small = ["--model-only", "--offline.updates", "20", "--model.core", "gru"]
    trained = script("train_agent.py", "toy:cue5", *common, *small, "--optimizer.workers", "2")
    assert trained.returncode == 0, trained.stderr
    assert load_yaml(out / "config.yaml").optimizer.workers == 1  # a model alone is made by one process
    assert "core         gru" in trained.stdout
    elsewhere = "--train.slice", "1", "--run-dir", tmp_path / "other"
    sliced = script("train_agent.py", "toy:cue5", *common, *small, *elsewhere)
    assert sliced.returncode == 2
    assert "leave --train.slice out" in sliced.stderr
    other = script("train_agent.py", "toy:cue", "--dataset", data, "--model-only", "--preset", "debug")
    assert other.returncode == 2
    assert "toy:cue5" in other.stderr
    collected = "collect", "toy:cue5", tmp_path / "more", "--run", out
    for command in (("policy", out), ("export", out, tmp_path / "policy.pt2"), collected):
        played = script("evaluate.py", *command)
        assert played.returncode == 2
        assert "no policy" in played.stderr
    assert not (tmp_path / "policy.pt2").exists()


def test_episodes_in_which_nothing_can_be_predicted_are_an_error(tmp_path):
    """Every horizon needs rows behind those that are seen first."""
    dataset = metronome_dataset(tmp_path)
    first = np.flatnonzero(dataset.held_out["is_first"])[0]
    lone = {name: value[first : first + 1] for name, value in dataset.held_out.items()}
    with pytest.raises(UsageError, match="at most 1 rows"):
        check_lengths(dataset._replace(held_out=lone), 8)
    with pytest.raises(UsageError, match="--train.length 100000 needs more than the"):
        check_lengths(dataset, 100_000)


def test_recorded_episodes_become_rows():
    """toy:counter says which row it is; the first episode after a seeded reset terminates."""
    spaces = spaces_of(counters(1))
    recording = record(None, spaces, counters, range(12))
    rows = rows_of(recording.episodes, recording.terminal)
    assert rows["obs/state"][:, 0].tolist() == [t for n in recording.episodes.length.tolist() for t in range(n)]
    assert np.array_equal(rows["reward"], rows["obs/state"][:, 0])
    assert np.array_equal(rows["is_first"], rows["obs/state"][:, 0] == 0)
    assert np.array_equal(rows["is_first"][1:], rows["is_last"][:-1])
    assert np.array_equal(rows["is_last"], rows["is_terminal"])
    assert torch.equal(pad_episodes(rows).length, recording.episodes.length)


def test_a_data_set_is_collected_by_a_command(finished, script):
    done = script("evaluate.py", "collect", "toy:cue5", "random", "--episodes", 23)
    assert done.returncode == 0, done.stderr
    assert "23 whole episodes" in done.stdout
    plain = load_dataset("random")
    assert plain.held_out["is_first"].sum() == 2
    mixed = script("evaluate.py", "collect", "toy:cue5", "mixed", "--episodes", 20, "--run", finished[0])
    assert mixed.returncode == 0, mixed.stderr
    for words, message in (
        (["toy:cue5", "random"], "exists"),
        (["toy:cue5", "few", "--episodes", 5], "a data set needs at least 10"),
        (["toy:serial", "other", "--run", finished[0]], "other observations or actions"),
        (["toy:cue5", "none", "--episodes", 0], "must be at least 1"),
        (["toy:nowhere", "none"], "there is no toy world"),
    ):
        refused = script("evaluate.py", "collect", *words)
        assert refused.returncode == 2, words
        assert message in " ".join(refused.stderr.replace("│", " ").split())


def test_posterior_states_of_a_few_episodes_at_a_time_are_those_of_all_together(monkeypatch):
    world = make_world(sizes={"state": 1})
    rows = whole_episodes(counting_replay(6 * LENGTH).state_dict())
    rows["prev_action"] = np.repeat(rows["prev_action"], 2, 1)
    together = posterior_rows(world, rows, "cpu")
    monkeypatch.setattr(open_loop_module, "BLOCK_BYTES", 4 * LENGTH * 2)  # two of the longest episodes
    apart = posterior_rows(world, rows, "cpu")
    assert len(together.deter) == len(rows["reward"])
    assert torch.allclose(together.deter, apart.deter, atol=1e-5)
    first = posterior_states(world, pad_episodes({name: value[:LENGTH] for name, value in rows.items()}))[0]
    assert torch.allclose(together.deter[:LENGTH], first.deter[0], atol=1e-5)

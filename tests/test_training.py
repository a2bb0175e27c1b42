"""The training loop: what it stores, counts, repeats, saves, and that it learns."""

import csv
import json
import math
import signal
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from conftest import Metronome, metronomes

from agent.actor_critic import ActionSpec
from agent.checkpoint import (
    UsageError,
    find_checkpoint,
    new_run_dir,
    read_checkpoint,
    spaces_of,
    write_checkpoint,
)
from agent.config import preset
from agent.dreamer import Dreamer
from agent.evaluation import EVAL_SEEDS, open_loop_picture, record_episode, run_episodes, save_video
from agent.optimizer import NonFiniteError
from agent.trainer import Every, Ratio
from envs import make_env, make_vector_env

counters = partial(make_vector_env, "toy:counter", seed=0)


def weights(agent):
    return torch.cat([value.flatten().float() for value in agent.policy.state_dict().values()])


def metrics(folder):
    """metrics.jsonl without what depends on the clock."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in row.items() if k != "wall" and not k.startswith(("time/", "speed/"))} for row in rows
    ]


def table(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# ---------------------------------------------------------------------- when things happen


def test_every_fires_once_per_multiple_however_large_the_steps():
    every = Every(10)
    assert [step for step in range(0, 60, 4) if every(step)] == [12, 20, 32, 40, 52]
    assert [step for step in (25, 26, 31) if Every(10, start=20)(step)] == [31]
    assert not any(Every(0)(step) for step in range(100))


def test_ratio_counts_updates_per_agent_step():
    ratio = Ratio(0.5, prefill=10, pretrain=3)
    done = []
    for step in range(16):
        done.append(0)
        while ratio.due(step):
            done[-1] += 1
    assert done == [0] * 10 + [3, 0, 1, 0, 1, 0]


# ---------------------------------------------------------------------- rows and steps


def test_rows_arrive_as_the_replay_wants_them(make_trainer, tmp_path):
    """The counter world writes into every observation when it was made."""
    trainer = make_trainer(tmp_path, counters, envs=3, steps=900, ratio=0.0, pretrain=0, eval_every=0)
    assert trainer.run()
    held = trainer.replay.count
    for env in range(3):
        rows = {name: value[env, :held] for name, value in trainer.replay.rows.items()}
        count = rows["obs/state"][:, 0]
        first, last, terminal = rows["is_first"], rows["is_last"], rows["is_terminal"]
        assert first[0]
        assert np.array_equal(first, count == 0)
        assert np.array_equal(rows["reward"], count)  # the reward of step t is t, nothing at a reset
        assert np.array_equal(first[1:], last[:-1])
        assert np.array_equal(np.diff(count)[~first[1:]], np.ones((~first[1:]).sum()))
        assert np.array_equal(terminal, last & (rows["obs/state"][:, 1] % 2 == 0))
        assert not rows["prev_action"][first].any()
        assert rows["prev_action"][~first].all()
        assert np.abs(rows["prev_action"]).max() <= 1.0


def test_steps_leave_out_resets_and_count_repeats(make_trainer, tmp_path):
    options = {"steps": 600, "ratio": 0.0, "pretrain": 0, "eval_every": 0, "envs": 2}
    trainer = make_trainer(tmp_path / "one", counters, **options)
    trainer.run()
    rows = trainer.replay.rows["is_first"][:, : trainer.replay.count]
    # the row at hand when the run ends is not in the replay yet
    assert trainer.step in (600, 601)
    assert trainer.step == (~rows).sum() + (~trainer.row["is_first"]).sum()
    double = make_trainer(tmp_path / "two", counters, repeat=2, **options)
    double.run()
    assert double.step in (600, 602)
    assert abs(double.replay.count / trainer.replay.count - 0.5) < 0.05


def test_episode_returns_are_sums_of_rewards(make_trainer, tmp_path):
    make_trainer(tmp_path, counters, steps=600, ratio=0.0, pretrain=0, envs=2, repeat=2).run()
    episodes = table(tmp_path / "episodes.csv")
    assert len(episodes) > 20
    for row in episodes:
        length = int(row["length"]) // 2
        assert float(row["return"]) == length * (length + 1) / 2
        assert 3 <= length <= 12
    assert {row["env"] for row in episodes} == {"0", "1"}


# ---------------------------------------------------------------------- evaluation


def untrained(make_envs=counters):
    config = preset("debug")
    torch.manual_seed(0)
    return Dreamer(config.model, config.behavior, config.optimizer, spaces_of(make_envs(1)))


def test_evaluation_does_not_depend_on_how_many_play_at_once():
    agent = untrained()
    one, three, all_at_once = (run_episodes(agent, counters, 7, 50, parallel=n) for n in (1, 3, 10))
    for row, same, again in zip(one, three, all_at_once, strict=True):
        for key in ("episode", "seed", "return", "length"):
            assert row[key] == same[key] == again[key]
        assert row["mean_loops"] == pytest.approx(same["mean_loops"], abs=0.2)
    assert [row["seed"] for row in one] == list(range(50, 57))
    assert len({row["return"] for row in one}) > 1
    assert all(row["return"] == row["length"] * (row["length"] + 1) / 2 for row in one)


def test_evaluation_leaves_the_generators_alone_and_repeats_itself():
    agent = untrained()
    before = torch.get_rng_state()
    one = run_episodes(agent, counters, 4, 50, explore=True)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert run_episodes(agent, counters, 4, 50, explore=True) == one


def test_evaluation_obeys_the_loop_limit():
    agent = untrained()
    assert {row["mean_loops"] for row in run_episodes(agent, counters, 3, 0, max_loops=1)} == {1.0}
    with pytest.raises(ValueError, match="at least 1 episode"):
        run_episodes(agent, counters, 0, 0)


def test_a_video_shows_every_step(tmp_path):
    agent, cfg = untrained(), preset("debug").eval
    env = make_env("toy:counter", render=True)
    frames, loops, fps, total = record_episode(agent, env, cfg)
    assert len(frames) == len(loops)
    assert total == len(frames) * (len(frames) + 1) / 2
    assert fps == 10.0
    line = save_video(tmp_path / "v.mp4", agent, lambda: make_env("toy:counter", render=True), cfg)
    assert line.startswith("video ")
    assert list(tmp_path.glob("v.*"))


def test_a_video_never_stops_a_run(tmp_path):
    line = save_video(tmp_path / "v.mp4", untrained(), lambda: make_env("toy:counter"), preset("debug").eval)
    assert line.startswith("no video: ")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------- saving and going on


def test_the_same_seed_gives_the_same_run(make_trainer, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        make_trainer(tmp_path / name, counters, seed=seed, steps=200, eval_every=150).run()
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")
    assert (tmp_path / "a/eval.csv").read_text() == (tmp_path / "b/eval.csv").read_text()
    assert (tmp_path / "a/episodes.csv").read_text() != (tmp_path / "c/episodes.csv").read_text()
    assert metrics(tmp_path / "a") != metrics(tmp_path / "c")


def test_a_resumed_run_is_the_uninterrupted_one(make_trainer, tmp_path):
    """Stopped between two episodes of a world without chance: bit for bit the same weights."""
    stop, options = 200, {"steps": 350, "log_every": 50, "save_every": 40, "ratio": 0.2}
    whole = make_trainer(tmp_path / "whole", **options)
    contents = {}
    inner = whole.store

    def store(name, content):
        inner(name, content)
        if name == "latest" and content["step"] == stop:
            contents[name] = (tmp_path / "whole/checkpoints/latest.pt").read_bytes()

    whole.store = store
    whole.run()

    folder = tmp_path / "part"
    copy = folder / "checkpoints/latest.pt"
    copy.parent.mkdir(parents=True)
    copy.write_bytes(contents["latest"])
    saved = read_checkpoint(find_checkpoint(folder))
    part = make_trainer(folder, saved=saved, **options)
    assert part.step == stop
    assert part.run()
    assert torch.equal(weights(part.agent), weights(whole.agent))
    assert torch.equal(torch.cat(part.agent.average_flats), torch.cat(whole.agent.average_flats))
    assert part.agent.updates == whole.agent.updates
    assert part.episodes == whole.episodes
    assert part.evaluations == whole.evaluations
    assert list(part.returns) == list(whole.returns)
    for name, value in whole.replay.rows.items():
        assert np.array_equal(part.replay.rows[name], value), name
    assert metrics(folder)[1:] == [row for row in metrics(tmp_path / "whole") if row["step"] > stop][1:]


class Interrupted(Metronome):
    """Ctrl-C in the middle of a step."""

    steps = 0

    def step(self, action):
        Interrupted.steps += 1
        if Interrupted.steps == 155:
            raise KeyboardInterrupt
        return super().step(action)


def test_ctrl_c_saves_and_the_open_episode_ends_there(make_trainer, tmp_path):
    Interrupted.steps = 0
    trainer = make_trainer(tmp_path, lambda n: metronomes(n, Interrupted), steps=400, eval_every=0)
    assert trainer.run() is False
    assert not trainer.finished
    saved = read_checkpoint(find_checkpoint(tmp_path))
    assert 130 < saved["step"] < 155
    again = make_trainer(tmp_path, saved=saved, steps=300, eval_every=0)
    cut = again.replay.count
    assert again.run()
    rows = {name: value[0, : again.replay.count] for name, value in again.replay.rows.items()}
    assert rows["is_last"][cut]
    assert not rows["is_terminal"].any()
    assert np.array_equal(rows["is_first"][1:], rows["is_last"][:-1])
    steps = [int(row["step"]) for row in table(tmp_path / "episodes.csv")]
    assert steps == sorted(set(steps))


def test_a_signal_ends_the_loop_and_a_second_one_quits(make_trainer, tmp_path):
    before = signal.getsignal(signal.SIGINT)
    trainer = make_trainer(tmp_path / "one", steps=400, eval_every=0)
    trainer.logger.progress = lambda step: signal.raise_signal(signal.SIGINT) if step == 150 else None
    assert trainer.run() is False
    assert trainer.step == 150
    assert find_checkpoint(tmp_path / "one").exists()

    impatient = make_trainer(tmp_path / "two", steps=400, eval_every=0, save_every=0)
    impatient.logger.progress = lambda step: [signal.raise_signal(signal.SIGINT) for _ in range(2)]
    with pytest.raises(KeyboardInterrupt):
        impatient.run()
    assert not (tmp_path / "two/checkpoints").exists()
    assert signal.getsignal(signal.SIGINT) is before


class Broken(Metronome):
    """Rewards that stop being numbers."""

    steps = 0

    def step(self, action):
        Broken.steps += 1
        obs, reward, *rest = super().step(action)
        return obs, reward if Broken.steps < 240 else math.nan, *rest


def test_a_loss_that_is_not_finite_stops_the_run(make_trainer, tmp_path):
    Broken.steps = 0
    trainer = make_trainer(tmp_path, lambda n: metronomes(n, Broken), steps=400, eval_every=0, save_every=100)
    with pytest.raises(NonFiniteError, match="world/reward_loss"):
        trainer.run()
    saved = read_checkpoint(find_checkpoint(tmp_path))
    assert saved["step"] == 200
    assert weights(Dreamer.from_checkpoint(saved, "cpu")).isfinite().all()


def test_the_agent_loads_from_its_file_alone(make_trainer, tmp_path):
    trainer = make_trainer(tmp_path, steps=200, eval_every=150)
    trainer.run()
    for path in (tmp_path, tmp_path / "checkpoints/best.pt"):
        agent = Dreamer.load(path, "cpu")
        assert agent.spaces.action == ActionSpec(1, False)
    latest = Dreamer.load(tmp_path, "cpu")
    assert run_episodes(latest, metronomes, 10, EVAL_SEEDS) == trainer.episodes
    assert "replay" not in read_checkpoint(tmp_path / "checkpoints/best.pt")


def test_checkpoints_hold_no_more_than_they_need(make_trainer, tmp_path):
    """torch.save writes whole storages, and the replay's arrays are as large as its capacity."""
    trainer = make_trainer(tmp_path, steps=200, envs=2, replay_rows=500_000, eval_every=0)
    trainer.run()
    assert (tmp_path / "checkpoints/latest.pt").stat().st_size < 2_000_000


def test_a_failed_save_keeps_the_last_checkpoint(tmp_path):
    path = tmp_path / "checkpoints/latest.pt"
    write_checkpoint(path, {"step": 1})
    before = path.read_bytes()
    with pytest.raises(Exception, match="pickle"):
        write_checkpoint(path, {"step": lambda: 2})
    assert path.read_bytes() == before
    assert [found.name for found in path.parent.iterdir()] == ["latest.pt"]


class Trap:
    """Would run code while being unpickled."""

    def __reduce__(self):
        return (open, ("/dev/null",))


def test_files_that_are_not_checkpoints(tmp_path):
    path = tmp_path / "file.pt"
    with pytest.raises(UsageError, match="there is no run"):
        find_checkpoint(tmp_path / "missing")
    with pytest.raises(UsageError, match="is not a run folder"):
        find_checkpoint(tmp_path)
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(UsageError, match="damaged"):
        read_checkpoint(path)
    torch.save({"step": Trap()}, path)
    with pytest.raises(UsageError, match="damaged"):
        read_checkpoint(path)
    torch.save({"weights": torch.zeros(3)}, path)
    with pytest.raises(UsageError, match="not a checkpoint of this program"):
        read_checkpoint(path)
    torch.save(dict.fromkeys(("task", "config", "spaces", "step", "agent"), 0) | {"format": 99}, path)
    with pytest.raises(UsageError, match="format 99"):
        read_checkpoint(path)


def test_run_folders_never_collide(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = [new_run_dir(None, "toy-cue", "small-s0") for _ in range(3)]
    assert len(set(folders)) == 3
    assert all(folder.parent.as_posix() == "runs/toy-cue" for folder in folders)
    given = new_run_dir("mine", "toy-cue", "small-s0")
    assert given.is_dir()
    assert new_run_dir("mine", "toy-cue", "small-s0") == given  # still empty
    (given / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="is not empty"):
        new_run_dir("mine", "toy-cue", "small-s0")
    with pytest.raises(UsageError, match="cannot be made"):
        new_run_dir("mine/notes.txt/below", "toy-cue", "small-s0")


# ---------------------------------------------------------------------- logs, learning


def test_metrics_tell_where_the_time_goes(make_trainer, tmp_path):
    trainer = make_trainer(tmp_path, steps=300, eval_every=150)
    trainer.run()
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[1])
    parts = {name: value for name, value in last.items() if name.startswith("time/")}
    assert {"time/act", "time/env", "time/replay", "time/evaluate", "time/world_model"} <= set(parts)
    assert 0.7 < sum(parts.values()) < 1.1
    assert last["speed/updates"] > 0
    assert trainer.recent().keys() == {"last_3_evaluations", "last_10_training_episodes"}
    picture = open_loop_picture(trainer.agent, trainer.replay, 0)
    assert picture.dtype == np.uint8
    assert picture.shape[2] == 3


def test_it_learns_from_real_interaction(make_trainer, tmp_path):
    """A real short training. Random actions return 3.75, the best constant one 5, the best policy 10."""
    config = preset("debug")
    quick = replace(
        config.optimizer, model_lr=3e-3, actor_lr=3e-3, critic_lr=3e-3, average=0.95, warmup=20
    )
    behavior = replace(config.behavior, starts=64, horizon=3, gamma=0.8)
    trainer = make_trainer(
        tmp_path, config=replace(config, optimizer=quick, behavior=behavior), steps=2000, envs=2, prefill=300,
        pretrain=100, ratio=0.5, batch=16, length=6, eval_every=0, log_every=500, save_every=0,
    )  # fmt: skip
    trainer.run()
    assert np.mean([episode["return"] for episode in trainer.episodes]) > 8.0

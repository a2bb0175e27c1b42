"""The training loop: what it stores, counts, repeats, and that it learns."""

import csv
import json
import math
import signal
from dataclasses import replace
from functools import partial

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import Metronome, counters, metronomes

from agent.data.checkpoint import find_checkpoint, read_checkpoint
from agent.errors import NonFiniteError
from agent.learning.dreamer import Dreamer
from agent.runs.presets import preset


def weights(agent):
    return torch.cat([value.flatten().float() for value in agent.policy.state_dict().values()])


def metrics(folder):
    """metrics.jsonl without what depends on the clock."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "wall" and not k.startswith(("time/", "speed/"))} for row in rows]


def table(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# ---------------------------------------------------------------------- rows and steps


def test_rows_arrive_as_the_replay_wants_them(make_trainer, tmp_path):
    """The counter world writes into every observation when it was made."""
    trainer = make_trainer(tmp_path, counters, envs=3, steps=900, ratio=0.0, eval_every=0)
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
    options = {"steps": 600, "ratio": 0.0, "eval_every": 0, "envs": 2}
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
    make_trainer(tmp_path, counters, steps=600, ratio=0.0, envs=2, repeat=2).run()
    episodes = table(tmp_path / "episodes.csv")
    assert len(episodes) > 20
    for row in episodes:
        length = int(row["length"]) // 2
        assert float(row["return"]) == length * (length + 1) / 2
        assert 3 <= length <= 12
    assert {row["env"] for row in episodes} == {"0", "1"}


def test_every_update_gives_the_replay_fresh_latents(make_trainer, tmp_path):
    trainer = make_trainer(tmp_path, steps=120, eval_every=0)
    update, write_back, made, written = trainer.execution.update, trainer.replay.write_back, [], []

    def updated(*args):
        result = update(*args)
        made.append(result.states)
        return result

    def wrote(where, states, errors):
        written.append(states)
        write_back(where, states, errors)

    trainer.execution.update, trainer.replay.write_back = updated, wrote
    trainer.run()
    assert len(made) == trainer.agent.updates > 5
    assert all(one is other for one, other in zip(made, written, strict=True))


# ---------------------------------------------------------------------- saving and going on


def test_the_same_seed_gives_the_same_run(make_trainer, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        make_trainer(tmp_path / name, counters, seed=seed, steps=150, eval_every=120).run()
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")
    assert (tmp_path / "a/eval.csv").read_text() == (tmp_path / "b/eval.csv").read_text()
    assert (tmp_path / "a/episodes.csv").read_text() != (tmp_path / "c/episodes.csv").read_text()
    assert metrics(tmp_path / "a") != metrics(tmp_path / "c")


class Choices(Metronome):
    """The beats are chosen."""

    def __init__(self):
        super().__init__()
        self.action_space = gym.spaces.Discrete(2)

    def step(self, action):
        return super().step(np.array([0.5 - action], np.float32))


@pytest.mark.parametrize("prefill", [20, 230])
@pytest.mark.parametrize("kind", [Metronome, Choices])
def test_a_resumed_run_is_the_uninterrupted_one(make_trainer, tmp_path, kind, prefill):
    """Stopped between two episodes of a world without chance: bit for bit the same weights."""
    stop, options = 200, {"steps": 300, "log_every": 50, "save_every": 40, "eval_every": 120, "prefill": prefill}
    make_envs = partial(metronomes, kind=kind)
    whole = make_trainer(tmp_path / "whole", make_envs, **options)
    contents = {}
    inner = whole.store

    def store(name, content, beside=False):
        inner(name, content, beside)
        if name == "latest" and content["step"] == stop:
            contents[name] = (tmp_path / "whole/checkpoints/latest.pt").read_bytes()

    whole.store = store
    whole.run()

    folder = tmp_path / "part"
    copy = folder / "checkpoints/latest.pt"
    copy.parent.mkdir(parents=True)
    copy.write_bytes(contents["latest"])
    saved = read_checkpoint(find_checkpoint(folder))
    part = make_trainer(folder, make_envs, saved=saved, **options)
    assert part.step == stop
    assert part.run()
    assert torch.equal(weights(part.agent), weights(whole.agent))
    for name, flat in part.agent.average_flats.items():
        assert torch.equal(flat, whole.agent.average_flats[name])
    assert part.agent.updates == whole.agent.updates
    assert part.episodes == whole.episodes
    assert part.evaluations.means == whole.evaluations.means
    assert list(whole.evaluations.means) == [120, 240]  # one before the stop
    assert list(part.counter.returns) == list(whole.counter.returns)
    for name, value in whole.replay.rows.items():
        assert np.array_equal(part.replay.rows[name], value), name
    assert metrics(folder)[1:] == [row for row in metrics(tmp_path / "whole") if row["step"] > stop][1:]


def test_updates_that_a_signal_left_undone_come_first_when_the_run_goes_on(make_trainer, tmp_path):
    """It came in the last step of an episode, after which an update was due."""
    options = {"steps": 300, "log_every": 50, "save_every": 0, "eval_every": 0, "prefill": 20}
    whole = make_trainer(tmp_path / "whole", metronomes, **options)
    whole.run()
    part = make_trainer(tmp_path / "part", metronomes, **options)
    receive = part.stepper.receive

    def stopping():
        if part.step == 199:
            part.stop()
        return receive()

    part.stepper.receive = stopping
    assert not part.run()
    assert part.step == 200
    saved = read_checkpoint(find_checkpoint(tmp_path / "part"))
    again = make_trainer(tmp_path / "part", metronomes, saved=saved, **options)
    assert again.run()
    assert torch.equal(weights(again.agent), weights(whole.agent))


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


def test_a_signal_ends_the_loop_and_a_second_one_quits(make_trainer, tmp_path, monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    trainer = make_trainer(tmp_path / "one", steps=400, eval_every=0)
    trainer.logger.progress = lambda step, _: signal.raise_signal(signal.SIGINT) if step == 150 else None
    assert trainer.run() is False
    assert trainer.step == 150
    assert find_checkpoint(tmp_path / "one").exists()

    monkeypatch.setattr("agent.training.signals.SAME_EVENT", 0.0)
    impatient = make_trainer(tmp_path / "two", steps=400, eval_every=0, save_every=0)
    impatient.logger.progress = lambda *_: [signal.raise_signal(signal.SIGINT) for _ in range(2)]
    with pytest.raises(KeyboardInterrupt):
        impatient.run()
    assert read_checkpoint(find_checkpoint(tmp_path / "two"))["step"] == 0  # what was there before
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_during_an_evaluation_does_not_wait_for_its_end(make_trainer, tmp_path):
    trainer = make_trainer(tmp_path, steps=400, eval_every=100, save_every=0)
    played = []

    def act(*words, act=trainer.agent.act, **more):
        played.append(trainer.step)
        if len(played) > 3 and more.get("explore", True) is False or (len(words) > 3 and words[3] is False):
            signal.raise_signal(signal.SIGINT)
        return act(*words, **more)

    trainer.agent.act = act
    assert trainer.run() is False
    assert read_checkpoint(find_checkpoint(tmp_path))["step"] == trainer.step
    assert not (tmp_path / "eval.csv").read_text().splitlines()[1:]


def test_the_last_step_holds_the_final_evaluation_alone(make_trainer, tmp_path, monkeypatch):
    """The time may be over during an evaluation on the way: that one is replaced."""
    trainer = make_trainer(tmp_path, steps=400, eval_every=100, minutes=10.0)
    over = []
    seconds = trainer.progress.seconds
    monkeypatch.setattr(trainer.progress, "seconds", lambda: 1e6 if over else seconds())
    evaluate = trainer.evaluate_between

    def interim():
        evaluate()
        over.append(True)

    trainer.evaluate_between = interim
    assert trainer.run()
    rows = table(tmp_path / "eval.csv")
    assert {row["step"] for row in rows} == {str(trainer.step)}
    assert [int(row["seed"]) for row in rows] == [1_000_000_000 + i for i in range(10)]
    assert trainer.evaluations.means == {}


def test_a_loss_that_is_not_finite_stops_the_run(make_trainer, tmp_path):
    trainer = make_trainer(tmp_path, steps=400, eval_every=0, save_every=100)
    update = trainer.execution.update

    def poisoned(*words):
        if trainer.step > 240:
            torch.nn.init.constant_(trainer.agent.world.reward.out.weight, math.nan)
        return update(*words)

    trainer.execution.update = poisoned
    with pytest.raises(NonFiniteError, match="world/reward_loss"):
        trainer.run()
    saved = read_checkpoint(find_checkpoint(tmp_path))
    assert saved["step"] == 200
    assert weights(Dreamer.from_checkpoint(saved, "cpu")).isfinite().all()


def test_the_final_evaluation_does_not_choose_the_best_agent(make_trainer, tmp_path):
    """It plays other episodes, and more of them: its mean and those of the evaluations before do not compare."""
    trainer = make_trainer(tmp_path / "with", steps=300, eval_every=120, ratio=0.02)
    evaluate = trainer.evaluations.evaluate

    def scored(final, stop):
        return [{**episode, "return": 5.0 if final else 1.0 / trainer.step} for episode in evaluate(final, stop)]

    trainer.evaluations.evaluate = scored
    assert trainer.run()
    assert read_checkpoint(find_checkpoint(tmp_path / "with", "best"))["step"] == 120
    assert make_trainer(tmp_path / "without", steps=150, eval_every=0, ratio=0.02).run()
    assert read_checkpoint(find_checkpoint(tmp_path / "without", "best"))["step"] == 150


def test_a_resumed_run_writes_no_row_that_is_first_and_last(make_trainer, tmp_path):
    """Of several environments some may be at the first row of an episode when the run stops."""

    class Short(Metronome):
        """Every second episode has three steps."""

        made = 0

        def __init__(self):
            super().__init__()
            Short.made += 1
            self.length = 7 + 2 * (Short.made % 2)

    def make_envs(count):
        return metronomes(count, Short)

    options = {"envs": 2, "eval_every": 0, "ratio": 0.02}
    whole = make_trainer(tmp_path, make_envs, steps=400, **options)
    progress, firsts = whole.logger.progress, []

    def stop_at_a_reset(step, share):
        first = whole.row["is_first"]
        if step > 200 and first.any() and not first.all():
            firsts.append(first.copy())
            whole.stop()
        progress(step, share)

    whole.logger.progress = stop_at_a_reset
    assert whole.run() is False
    assert firsts
    saved = read_checkpoint(find_checkpoint(tmp_path))
    part = make_trainer(tmp_path, make_envs, saved=saved, steps=400, **options)
    assert part.run()
    rows = {name: part.replay.rows[name][:, : part.replay.count] for name in ("is_first", "is_last")}
    assert not (rows["is_first"] & rows["is_last"]).any()
    ends = rows["is_last"][:, whole.replay.count]
    assert np.array_equal(ends, ~firsts[0])  # the others are cut off there


# ---------------------------------------------------------------------- learning


def test_it_learns_from_real_interaction(make_trainer, tmp_path, monkeypatch):
    """A real short training. Random actions return 3.75, the best constant one 5, the best policy 10."""
    config = preset("debug")
    monkeypatch.setattr("agent.learning.dreamer.EMA_DECAY", 0.95)
    rate = 6e-3
    quick = replace(config.optimizer, lr=rate)
    behavior = replace(config.behavior, starts=64, horizon=3, gamma=0.8, entropy=0.025)
    trainer = make_trainer(
        tmp_path, config=replace(config, optimizer=quick, behavior=behavior), steps=1100, envs=2, prefill=200,
        ratio=0.5, batch=16, length=4, eval_every=0, log_every=500, save_every=0,
    )  # fmt: skip
    for adam in trainer.agent.optimizers.values():
        adam.warmup = 20
    trainer.run()
    assert np.mean([episode["return"] for episode in trainer.episodes]) > 8.0

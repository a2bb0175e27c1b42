"""When things happen in a run: periods, updates per step, and the share of the run that is over."""

import csv
from itertools import count
from types import SimpleNamespace

from agent.data.checkpoint import find_checkpoint, read_checkpoint
from agent.training.schedule import Every, Progress, Ratio


def test_every_fires_once_per_multiple_however_large_the_steps():
    every = Every(10)
    assert [step for step in range(0, 60, 4) if every(step)] == [12, 20, 32, 40, 52]
    assert [step for step in (25, 26, 31) if Every(10, start=20)(step)] == [31]
    assert not any(Every(0)(step) for step in range(100))


def test_ratio_counts_updates_per_agent_step():
    ratio = Ratio(0.5, prefill=10)
    done = []
    for step in range(16):
        done.append(0)
        while ratio.due(step):
            ratio.done += 1
            done[-1] += 1
    assert done == [0] * 10 + [1, 0, 1, 0, 1, 0]
    assert not Ratio(0.0, prefill=10).due(1000)


def test_progress_is_the_share_of_steps_or_of_time(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    by_steps, limited = Progress(200, 0.0), Progress(200, 2.0)
    clock[0] += 60.0
    assert by_steps(50) == 0.25
    assert limited(50) == 0.5
    assert limited(150) == 0.75
    limited.resume(90.0)  # the clock of an earlier part counts, the time between the parts does not
    clock[0] += 15.0
    assert limited.seconds() == 105.0
    assert limited(0) == 0.875
    clock[0] += 100.0
    assert limited(0) == 1.0


def test_training_ends_when_its_minutes_are_over(make_trainer, tmp_path, monkeypatch):
    """On a clock that goes on by a hundredth of a second whenever it is read: a busy machine changes nothing."""
    readings = count()
    monkeypatch.setattr("agent.training.trainer.time", SimpleNamespace(monotonic=lambda: 0.01 * next(readings)))
    trainer = make_trainer(tmp_path, steps=10_000_000, minutes=0.1)
    assert trainer.run()
    assert 0 < trainer.step < 10_000_000
    assert trainer.episodes
    saved = read_checkpoint(find_checkpoint(tmp_path))
    assert saved["trainer"]["finished"]
    assert saved["trainer"]["seconds"] >= 6.0
    assert trainer.agent.updates > 0
    with (tmp_path / "eval.csv").open(newline="") as file:
        assert list(csv.DictReader(file))[-1]["step"] == str(trainer.step)

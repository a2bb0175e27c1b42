"""A run of several ranks, each with its environments, as threads. See also test_torchrun.py."""

import signal
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import Metronome, metronomes
from small_ranks import together

from agent.data.checkpoint import find_checkpoint, read_checkpoint
from agent.data.replay import ReplayBuffer
from agent.errors import EnvironmentFailure, RankLost, UsageError, WorkerFailure
from agent.execution import Ranks
from agent.learning.actor_critic import BehaviorConfig
from agent.runs import rank_run
from agent.runs.presets import preset
from agent.runs.rank_run import config_of_rank, seed_of, shared_config
from agent.training.parts import deal, deal_images, dealt, drop_other_images, intact, joined, part_of
from world_model import LatentState

DEBUG = {"steps": 200, "prefill": 60, "save_every": 0, "eval_every": 0, "log_every": 100, "batch": 2}


def trained(make_trainer, folder, ranks, make_envs=metronomes, prepare=lambda trainer: None, **options):
    """A trainer of one rank, after its run; and what the run raised."""
    trainer = make_trainer(folder, make_envs, ranks=ranks, **{**DEBUG, **options})
    prepare(trainer)
    try:
        trainer.run()
    except Exception as error:
        return trainer, error
    return trainer, None


# ---------------------------------------------------------------------- the loop, as threads


def test_ranks_make_one_run(make_trainer, tmp_path):
    """Same weights everywhere, steps counted together, episodes of all in one file, one checkpoint with all rows."""
    results = together(2, lambda ranks: trained(make_trainer, tmp_path, ranks, eval_every=100))
    (first, one), (second, two) = results
    assert (one, two) == (None, None)
    assert first.step == second.step == 200
    assert first.agent.updates == second.agent.updates > 10
    for name, adam in first.agent.optimizers.items():
        assert torch.equal(adam.flat, second.agent.optimizers[name].flat), name
    assert not np.array_equal(first.replay.rows["prev_action"], second.replay.rows["prev_action"])
    rows = [line.split(",") for line in (tmp_path / "episodes.csv").read_text().splitlines()[1:]]
    assert [row[1] for row in rows].count("0") == [row[1] for row in rows].count("1") == 10
    assert [int(row[0]) for row in rows] == sorted(int(row[0]) for row in rows)
    assert len((tmp_path / "eval.csv").read_text().splitlines()) == 1 + 2 + 10
    saved = read_checkpoint(find_checkpoint(tmp_path))
    assert saved["step"] == 200
    assert saved["replay"]["rows"]["reward"].shape == (2, first.replay.count)
    for rank, trainer in enumerate((first, second)):
        part = part_of(saved, rank, 1)
        own = trainer.replay.rows["deter"][0, : trainer.replay.count]
        assert np.array_equal(part["replay"]["rows"]["deter"][0], own)
        assert part["replay"]["rng"] == trainer.replay.rng.bit_generator.state


def test_an_environment_that_fails_on_one_rank_ends_all_with_everything_saved(make_trainer, tmp_path):
    class Broken(Metronome):
        made = 0

        def step(self, action):
            self.made += 1
            if self.made == 42:
                raise RuntimeError("broken")
            return super().step(action)

    def work(ranks):
        return trained(make_trainer, tmp_path, ranks, lambda n: metronomes(n, Broken if ranks.rank else Metronome))

    (first, one), (_, two) = together(2, work)
    assert isinstance(two, EnvironmentFailure)
    assert type(one) is WorkerFailure
    assert "rank 1" in str(one)
    assert read_checkpoint(find_checkpoint(tmp_path))["step"] == first.step == 82
    saved = read_checkpoint(find_checkpoint(tmp_path))
    assert saved["replay"]["count"] == first.replay.count


@pytest.mark.parametrize("when", ["step", "evaluation"])
def test_a_signal_on_one_rank_ends_all_with_everything_saved(make_trainer, tmp_path, when):
    def work(ranks):
        def prepare(trainer):
            if ranks.rank and when == "step":
                act = trainer.act
                trainer.act = lambda: (trainer.step >= 100 and trainer.stop(signal.SIGTERM), act())[1]
            elif when == "evaluation" and ranks.rank == 0:
                inner = trainer.evaluations.evaluate.args[0]

                def evaluate(final, stop):
                    trainer.shared_time = 0.0  # it is time to listen to the others
                    return inner(final, stop)

                trainer.evaluations.evaluate = lambda *words: trainer.evaluate_on_rank_0(evaluate, *words)
            elif when == "evaluation":
                inner = trainer.evaluations.evaluate
                trainer.evaluations.evaluate = lambda *words: (trainer.stop(signal.SIGTERM), inner(*words))[1]

        return trained(make_trainer, tmp_path, ranks, prepare=prepare, eval_every=100)

    for trainer, error in together(2, work):
        assert error is None
        assert not trainer.finished
        assert trainer.signal == signal.SIGTERM
        assert 100 <= trainer.step <= 104
    assert read_checkpoint(find_checkpoint(tmp_path))["step"] == trainer.step


def test_a_rank_that_ends_leaves_the_last_checkpoint(make_trainer, tmp_path):
    def work(ranks):
        def prepare(trainer):
            def leave():
                if trainer.step >= 150:
                    del ranks.group
                    raise MemoryError
                return act()

            act = trainer.act
            if ranks.rank:
                trainer.act = leave

        return trained(make_trainer, tmp_path, ranks, prepare=prepare, save_every=100)

    (first, one), (_, two) = together(2, work)
    assert type(two) is MemoryError
    assert type(one) is RankLost
    assert read_checkpoint(find_checkpoint(tmp_path))["step"] == 100
    alone, error = trained(make_trainer, tmp_path / "alone", Ranks())  # the other number of ranks
    saved = read_checkpoint(find_checkpoint(tmp_path))
    alone.finished, alone.stopping = False, False
    alone.load_state_dict(dealt(saved, 0, 1, 1, alone.replay.length))
    assert alone.step == 100
    assert alone.replay.count == saved["replay"]["rows"]["reward"].numel()
    assert error is None


def test_a_rank_that_ends_in_the_final_evaluation_does_not_finish_the_run(make_trainer, tmp_path):
    def work(ranks):
        def prepare(trainer):
            def leave(*_):
                del ranks.group
                raise MemoryError

            if ranks.rank:
                trainer.evaluations.final = leave

        return trained(make_trainer, tmp_path, ranks, prepare=prepare, failures=[])

    (first, one), (_, two) = together(2, work)
    assert type(two) is MemoryError
    assert type(one) is RankLost
    assert not first.finished


class Short(Metronome):
    length = 6


class Stuck(Short):
    def reset(self, **options):
        raise RuntimeError("stuck")


@pytest.mark.parametrize(("calls_made", "at_first", "later"), [(66, [True, False], Short), (70, [False, True], Stuck)])
def test_a_run_goes_on_where_one_rank_was_in_the_middle_of_an_episode_and_one_at_its_first_row(
    make_trainer, tmp_path, calls_made, at_first, later
):
    def begin(ranks):
        def prepare(trainer):
            def stop_in_time():
                calls.append(1)
                if len(calls) == calls_made and ranks.rank == 0:  # episodes have 11 rows here, 7 on the other rank
                    trainer.stop(signal.SIGTERM)
                return act()

            calls, act = [], trainer.act
            trainer.act = stop_in_time

        kind = Short if ranks.rank else Metronome
        return trained(make_trainer, tmp_path, ranks, lambda n: metronomes(n, kind), prepare=prepare)

    results = together(2, begin)
    assert [bool(trainer.row["is_first"].all()) for trainer, error in results if error is None] == at_first
    saved = read_checkpoint(find_checkpoint(tmp_path))

    def go_on(ranks):
        kind, part = later if ranks.rank else Metronome, part_of(saved, ranks.rank, 1)
        return trained(make_trainer, tmp_path, ranks, lambda n: metronomes(n, kind), saved=part)

    (first, one), (second, two) = together(2, go_on)
    if later is Stuck:
        assert type(one) is WorkerFailure
        assert isinstance(two, EnvironmentFailure)
    else:
        assert (one, two) == (None, None)
        assert first.finished
    assert first.replay.count == second.replay.count
    assert read_checkpoint(find_checkpoint(tmp_path))["replay"]["count"] == first.replay.count


# ---------------------------------------------------------------------- checkpoints


def filled(envs, rows, capacity, start=0, image=False, folder=None, **place):
    """A replay whose rewards count up in every ring, episodes of five rows."""
    sizes = {"state": 1} | ({"image": (16, 16, 1)} if image else {})
    replay = ReplayBuffer(capacity, envs, sizes, 1, (1, 2), (1, 3))
    replay.open_image_store(folder, **place)
    for number in range(rows):
        value = (100.0 * (start + np.arange(envs)) + number).astype(np.float32)
        row = {"obs/state": value[:, None], "prev_action": value[:, None], "reward": value}
        row |= {name: np.full(envs, number % 5 == at) for name, at in (("is_first", 0), ("is_last", 4))}
        row["is_terminal"] = np.zeros(envs, bool)
        if image:
            row["obs/image"] = np.broadcast_to(value[:, None, None, None], (envs, 16, 16, 1)).astype(np.uint8)
        replay.add(row, LatentState(torch.zeros(envs, 1, 2), torch.zeros(envs, 1, 3)))
    return replay


def checkpoint(replays):
    trainer = {"row": {"reward": torch.zeros(1)}, "memory": None, "random": {}, "bad_steps": 0}
    parts = [{"replay": replay.state_dict(), "trainer": trainer} for replay in replays]
    return {"step": 1, **(joined(parts) if len(parts) > 1 else parts[0])}


@pytest.mark.parametrize("rows", [12, 24, 37])  # in rings of 20 rows: not full, and overwritten, once up to a last row
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 3), (3, 2)])
def test_rows_are_dealt_out_to_another_number_of_ranks(before, after, rows):
    replays = [filled(1, rows, 20, start) for start in range(before)]
    saved, length = checkpoint(replays), 20 * before // after
    held = min(rows, 20) * before
    kept, flags = [], {"is_first": [], "is_last": []}
    for rank in range(after):
        part = dealt(saved, rank, after, 1, length)
        new = ReplayBuffer(length, 1, {"state": 1}, 1, (1, 2), (1, 3))
        new.load_state_dict(part["replay"])
        assert new.count == held // after
        kept += new.rows["obs/state"][0, : new.count, 0].tolist()
        for name, values in flags.items():
            values += new.rows[name][0, : new.count].tolist()
        assert new.rows["is_last"][0, new.count - 1] or new.rows["is_first"][0, new.count - 1]
        new.sample(4, 4)
        assert not (new.rows["is_first"] & new.rows["is_last"]).any()
    assert kept == [100.0 * ring + row for ring in range(before) for row in range(max(0, rows - 20), rows)][: len(kept)]
    for one, other, last in zip(kept, kept[1:], flags["is_last"], strict=False):
        if other != one + 1:  # no neighbours before
            assert last or flags["is_first"][kept.index(one)]
            assert flags["is_first"][kept.index(other)]


@pytest.mark.parametrize("later", [0, 3])
def test_images_are_dealt_out_too(tmp_path, later):
    """later: rows that a run wrote after its last checkpoint, before it was killed, in place of the oldest ones."""

    def work(ranks):
        place = {"first": ranks.rank, "rings": 2, "exists": ranks.rank > 0}
        if ranks.rank:
            ranks.barrier()
        replay = filled(1, 0, 20, ranks.rank, True, tmp_path / "replay/2-ranks", **place)
        if not ranks.rank:
            ranks.barrier()
        full = filled(1, 33, 20, ranks.rank, True, tmp_path / "replay/2-ranks", **{**place, "exists": True})
        assert replay.length == full.length
        return full

    replays = together(2, work)
    saved = checkpoint(replays)
    for replay in replays:
        for number in range(33, 33 + later):
            replay.images["obs/image"].write(number, np.full((1, 16, 16, 1), 255, np.uint8))
    alone = ReplayBuffer(40, 1, {"state": 1, "image": (16, 16, 1)}, 1, (1, 2), (1, 3))
    saved = intact(saved, alone, tmp_path)
    deal_images(saved, alone, tmp_path, 1, 1)
    part = dealt(saved, 0, 1, 1, 40)
    alone.open_image_store(tmp_path / "replay", exists=True)
    alone.load_state_dict(part["replay"])
    held = 40 - 2 * later
    assert alone.count == alone.held == held
    images, states = alone.rows["obs/image"][0, :held, 3, 3, 0], alone.rows["obs/state"][0, :held, 0]
    assert np.array_equal(images, states.astype(np.uint8))


def test_images_of_other_numbers_of_ranks_are_deleted_and_nothing_else(tmp_path):
    def kept(ranks: int) -> list[str]:
        for name in ("camera.images", "camera.count", "2-ranks/camera.images", "4-ranks/camera.images", "notes.txt"):
            path = tmp_path / "replay" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        drop_other_images(tmp_path, ranks)
        files = (path for path in (tmp_path / "replay").rglob("*") if path.is_file())
        return sorted(str(path.relative_to(tmp_path / "replay")) for path in files)

    assert kept(1) == ["camera.count", "camera.images", "notes.txt"]
    assert kept(4) == ["4-ranks/camera.images", "notes.txt"]
    drop_other_images(tmp_path / "no images", 2)


@pytest.mark.parametrize(("status", "stays"), [(0, False), (143, True)])
def test_they_are_deleted_when_the_run_is_done_and_not_before(status, stays, tmp_path, monkeypatch):
    old = tmp_path / "replay/2-ranks/camera.images"
    old.parent.mkdir(parents=True)
    old.touch()
    monkeypatch.setattr(rank_run, "train_to_end", lambda *_: status)
    run = SimpleNamespace(folder=tmp_path)
    assert rank_run.train_ranks_to_end(Ranks(), run, None, None) == status
    assert old.exists() == stays


def test_an_empty_replay_is_dealt_out():
    assert deal(checkpoint([filled(1, 0, 20)])["replay"], 2, 10).ring.shape == (2, 0)


def test_all_ranks_have_the_settings_of_rank_0():
    small = preset("small")

    def work(ranks):
        return shared_config(replace(small, train=replace(small.train, envs=1 + ranks.rank)), ranks)

    assert [config.train.envs for config in together(2, work)] == [1, 1]
    assert shared_config(small, Ranks()) == small


def test_the_part_of_a_rank():
    def part(size, small=None, **train):
        ranks, small = Ranks(), small or preset("small")
        ranks.rank, ranks.size = 1, size
        settings = replace(small, train=replace(small.train, **train), behavior=BehaviorConfig(starts=0))
        return config_of_rank(settings, ranks)

    with pytest.raises(UsageError, match="--train.batch 16 cannot be shared evenly by 3 ranks: give a multiple of 3"):
        part(3)
    with pytest.raises(UsageError, match="--train.prefill must be at least 4352 for 256 ranks, got 1000"):
        part(256, batch=256)
    settings = replace(preset("small"), model=replace(preset("small").model, objective="sigreg"))
    with pytest.raises(UsageError, match="each of 8 ranks has 2 of the 16 sequences, so give a larger --train.batch"):
        part(8, settings)
    mine = part(4)
    assert (mine.train.batch, mine.train.replay_rows, mine.optimizer.workers) == (4, 125_000, 1)
    assert config_of_rank(preset("small"), Ranks()) == preset("small")
    assert len({seed_of(0, rank) for rank in range(8)}) == 8
    assert seed_of(5, 0) == 5

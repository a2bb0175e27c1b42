"""benchmarks/scaling.py: pairs, matched sizes, known errors, cells that go on where they were, fits of known laws."""

import csv
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT

from agent.data.dataset import load_dataset, write_dataset
from agent.errors import UsageError

sys.path.insert(0, str(ROOT / "benchmarks"))  # as when the command is started
import scaling
import scaling_cells as cells
import scaling_data as data

SPACES = {"obs": {"state": 2, "more": 1}, "action": {"size": 1, "discrete": False}}


def rows_of(lengths, step):
    """Episodes of a point (more: its number): after an action a at state x comes step(x, a)."""
    rng = np.random.default_rng(0)
    columns = {name: [] for name in ("obs/state", "obs/more", "prev_action", "reward", "is_first", "is_last")}
    for number, length in enumerate(lengths):
        state, action = rng.normal(size=2), np.zeros(1)
        for row in range(length):
            if row:
                action = rng.uniform(-1, 1, 1)
                state = step(state, action)
            values = state, [number], action, 0.0, row == 0, row == length - 1
            for column, value in zip(columns.values(), values, strict=True):
                column.append(value)
    rows = {name: np.array(column, bool if name.startswith("is") else np.float32) for name, column in columns.items()}
    return rows | {"is_terminal": np.zeros(len(rows["reward"]), bool)}


def linear_step(state, action):
    """A slow rotation that is pushed."""
    turn = np.array([[0.9, 0.3], [-0.3, 0.9]])
    return turn @ state + np.array([0.0, 0.5]) * action


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "linear"
    write_dataset(rows_of([30] * 40, linear_step), path, {"task": "toy:linear", "spaces": SPACES, "source": "a test"})
    return path


@pytest.fixture(scope="module")
def dataset(folder):
    return load_dataset(folder)


def cell(core="looped", match="none", width=16, loops=4, k=4, seed=0):
    return cells.Cell("linear", core, match, width, loops, k, 1.0, seed)


# ---------------------------------------------------------------------- pairs


@pytest.mark.parametrize("k", [1, 3])
def test_pairs_stay_within_their_episode_and_hold_the_actions_in_between(k):
    rows = rows_of([2, 5, 3, 7], lambda state, action: state + action)
    pairs = data.pairs_of(rows, k)
    every = torch.arange(len(pairs.start))
    assert len(every) == sum(max(0, length - k) for length in (2, 5, 3, 7))
    obs, actions = pairs.inputs(every)
    change = pairs.change(every)
    assert actions.shape == (len(every), k, 1)
    assert (obs[:, 0] == pairs.episode).all()  # "more" comes first: the number of the episode
    assert (change[:, 0] == 0).all()
    torch.testing.assert_close(change[:, 1:], actions.sum(1).expand(-1, 2))


def test_a_share_is_of_the_episodes_and_another_one_for_every_seed():
    rows = rows_of([5] * 20, linear_step)
    some = [set(data.pairs_of(rows, 1, 0.25, seed).episode.tolist()) for seed in (0, 0, 1)]
    assert [len(part) for part in some] == [5, 5, 5]
    assert some[0] == some[1] != some[2]


def test_episodes_that_are_too_short_and_images_are_refused():
    rows = rows_of([4] * 3, linear_step)
    with pytest.raises(UsageError, match="no episode of the data set lasts 4 decisions: give smaller --steps"):
        data.pairs_of(rows, 4)
    with pytest.raises(UsageError, match="the data set holds images"):
        data.pairs_of(rows | {"obs/image": np.zeros((12, 4, 4, 3), np.uint8)}, 1)


def test_a_number_that_never_varies_does_not_blow_up():
    standard = data.Standard.fit(torch.tensor([[1e4, 0.0], [1e4, 2.0]]))
    torch.testing.assert_close(standard(torch.tensor([[1e4, 2.0]])), torch.tensor([[0.0, 1.0]]))


# ---------------------------------------------------------------------- nets

GRID = cells.Grid(("linear",), steps=(1, 16), loops=(1, 8), widths=(32,), seeds=(0,))


@pytest.mark.parametrize("sizes", [(6, 1), (17, 6)])
def test_controls_have_the_size_of_what_they_are_matched_to(sizes):
    settings, seen = cells.Settings(), set()
    for one in GRID.cells():
        shape = cells.shape_of(one, sizes, settings)
        if shape is None or one.core not in cells.SIZED:
            continue
        seen.add((one.core, one.match))
        own, wanted = cells.size_of(shape), cells.size_of(cells.looped_shape(one, sizes, settings))
        assert getattr(own, one.match) == pytest.approx(getattr(wanted, one.match), rel=0.02), one
        assert own.params == sum(p.numel() for p in cells.Net(shape).parameters())
    both = {(core, match) for core in ("stacked", "gru", "recurrent") for match in ("params", "flops")}
    assert seen == both | {("wide", "flops")}


def test_separate_blocks_of_equal_operations_keep_the_width_and_a_control_that_cannot_be_is_none():
    settings = cells.Settings()
    shape = cells.shape_of(cell("stacked", "flops"), (6, 1), settings)
    assert (shape.width, shape.loops) == (16, 4)
    assert cells.shape_of(cell("gru", "flops", width=4, loops=1, k=64), (6, 1), settings) is None


def test_the_grid_has_no_cell_twice_and_none_that_is_the_net_of_another():
    found = list(GRID.cells())
    assert len(found) == len(set(found))
    assert not [one for one in found if one.loops == 1 and one.core in ("stacked", "wide")]
    assert not [one for one in found if one.core in ("recurrent", "supervised") and one.k == 1]
    assert not [one for one in found if one.loops == 1 and one.core == "supervised"]
    assert len([one for one in found if one.core == "supervised"]) == 1  # k = 16 and T = 8
    assert len([one for one in found if (one.core, one.match) == ("gru", "params")]) == 2  # one for every k


@pytest.mark.parametrize("core", ["gru", "recurrent"])
def test_steps_take_one_action_after_the_other(core):
    torch.manual_seed(0)
    net = cells.Net(cells.shape_of(cell(core, "params"), (3, 2), cells.Settings()))
    assert net.shape.calls == 4
    obs, actions = torch.randn(5, 3), torch.randn(5, 4, 2)
    deter = net.encoder(obs).view(5, 1, -1) + net.core.start
    for step in range(4):
        deter, _ = net.core(deter, torch.cat([obs, actions[:, step]], -1), 1, net.core.prepare())
    torch.testing.assert_close(net(obs, actions), net.readout(deter.flatten(1)))


def test_one_call_runs_so_many_loops(monkeypatch):
    net = cells.Net(cells.shape_of(cell(loops=8), (3, 2), cells.Settings()))
    ran, refine = [], net.core.refine
    monkeypatch.setattr(net.core, "refine", lambda *args: ran.append(1) or refine(*args))
    net(torch.randn(5, 3), torch.randn(5, 4, 2))
    assert len(ran) == 8


def test_supervised_loops_say_what_comes_between(dataset):
    problem, settings = data.Problem.of(dataset, 4, 1.0, 0), cells.Settings(updates=300, batch=128, lr=3e-3)
    shape = cells.shape_of(cell("supervised"), problem.sizes, settings)
    assert cells.size_of(shape) == cells.size_of(cells.shape_of(cell(), problem.sizes, settings))
    rows = torch.arange(len(problem.train.start))
    between = problem.between(rows, 4)  # after 1, 2 and 3 of 4 decisions
    first = problem.train.start[7]
    moved = problem.train.obs[first + 2] - problem.train.obs[first]
    torch.testing.assert_close(between[1, 7], (moved - problem.change.mean) / problem.change.std)

    torch.manual_seed(0)
    net = cells.Net(shape)
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(300):
        optimizer.zero_grad()
        net.loss(problem, torch.randint(len(rows), (128,))).backward()
        optimizer.step()
    obs, actions, change = problem.batch(problem.train, rows)
    said = net(obs, actions, every=True)
    torch.testing.assert_close(said[-1], net(obs, actions))
    for spoken, truth in zip(said, [*between, change], strict=True):
        assert (spoken - truth).square().mean() < 0.1 * (truth - truth.mean(0)).square().mean() + 0.02


# ---------------------------------------------------------------------- errors


def test_a_known_linear_system_is_learned_and_the_mean_of_episodes_is_the_error(dataset):
    problem, settings = data.Problem.of(dataset, 2, 1.0, 0), cells.Settings(updates=300, batch=128, lr=3e-3)
    shape = cells.shape_of(cell(k=2, loops=2), problem.sizes, settings)
    found = cells.train_cell(problem, shape, settings, 0)
    assert found.test_error < 0.03
    assert found.train_error < 0.03
    assert found.pairs == 36 * 28
    assert found.episodes.shape == (4,)
    assert found.episodes.mean() == pytest.approx(found.test_error)
    again = cells.train_cell(problem, shape, settings, 0)
    assert again.test_error == found.test_error


def test_what_never_varies_has_no_error(dataset):
    """In place of inf, which would stay in the table."""
    problem = data.Problem.of(dataset, 2, 1.0, 0)
    same = SimpleNamespace(batch=lambda pairs, rows: (None, None, torch.ones(len(rows), 3)))
    with pytest.raises(UsageError, match="nothing is to be predicted"):
        cells.error_of(lambda obs, actions: torch.zeros(1), same, problem.held, torch.arange(4))


def test_the_mean_has_an_error_of_one(dataset):
    problem = data.Problem.of(dataset, 2, 1.0, 0)
    every = torch.arange(len(problem.held.start))
    mean = problem.batch(problem.held, every)[2].mean(0)
    error, _ = cells.error_of(lambda obs, actions: mean, problem, problem.held, every)
    assert error == pytest.approx(1.0)


def test_the_learning_rate_rises_and_falls_to_zero():
    settings = cells.Settings(updates=100)
    rates = [cells.learning_rate(update, settings) for update in range(100)]
    assert rates[4] == max(rates) == pytest.approx(settings.lr)
    assert rates[0] < rates[3]
    assert rates[-1] < 1e-3 * settings.lr


# ---------------------------------------------------------------------- the command


def words(folder, out, *more):
    grid = ["--steps", "1,2", "--loops", "1,2", "--widths", "8", "--seeds", "0,1", "--cores", "looped"]
    return [str(folder), "--out", str(out), *grid, "--updates", "3", "--batch", "8", *more]


def test_a_second_command_does_nothing_and_a_cut_off_file_is_completed(folder, tmp_path, monkeypatch, capsys):
    out, trained = tmp_path / "out", []
    train = scaling.train_cell
    monkeypatch.setattr(scaling, "train_cell", lambda *args: trained.append(args) or train(*args))
    assert scaling.main(words(folder, out)) == 0
    assert len(trained) == 8
    whole = (out / "cells.csv").read_text()
    assert scaling.main(words(folder, out)) == 0
    assert len(trained) == 8
    assert "8 cells, 8 of them are there" in capsys.readouterr().out
    (out / "cells.csv").write_text(whole[:-5])  # in the last column of the last row
    assert scaling.main(words(folder, out)) == 0
    assert len(trained) == 9
    found = scaling.read_cells(out / "cells.csv")
    first = {scaling.cell_of(row): row for row in csv.DictReader(whole.splitlines())}
    assert len(found) == len(first) == 8
    for row in found:
        assert row["test_error"] == first[scaling.cell_of(row)]["test_error"]
        assert row["episodes"] == first[scaling.cell_of(row)]["episodes"]


def test_an_interrupted_run_keeps_what_has_ended_and_goes_on(folder, tmp_path, monkeypatch):
    out, train = tmp_path / "out", scaling.train_cell
    left = [3]

    def until(*args):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return train(*args)

    monkeypatch.setattr(scaling, "train_cell", until)
    assert scaling.main(words(folder, out)) == 130
    assert len(scaling.read_cells(out / "cells.csv")) == 3
    left[0] = 5
    assert scaling.main(words(folder, out)) == 0
    assert left[0] == 0
    assert len(scaling.read_cells(out / "cells.csv")) == 8


def test_shards_are_parts_of_the_grid(folder, tmp_path):
    for shard, there in (("0/2", 4), ("1/2", 8)):
        assert scaling.main(words(folder, tmp_path / "out", "--shard", shard)) == 0
        assert len(scaling.read_cells(tmp_path / "out" / "cells.csv")) == there


def test_other_settings_in_the_same_folder_are_refused(folder, tmp_path, capsys):
    scaling.Folder(tmp_path, cells.Settings(updates=7))
    assert scaling.main(words(folder, tmp_path)) == 2
    assert "trained with --updates 7 --batch 512: give that, or another --out" in capsys.readouterr().err
    assert json.loads((tmp_path / "settings.json").read_text())["updates"] == 7


def test_another_data_set_of_the_same_name_is_refused(folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert scaling.main(words(folder, out)) == 0
    other = tmp_path / "linear"
    write_dataset(rows_of([30] * 20, linear_step), other, {"task": "toy:linear", "spaces": SPACES, "source": "a test"})
    before = (out / "cells.csv").read_text()
    assert scaling.main(words(other, out, "--seeds", "5")) == 2
    assert "holds results of another linear, toy:linear with 1,200 rows" in capsys.readouterr().err
    assert (out / "cells.csv").read_text() == before


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--report", "nowhere"], "nowhere/cells.csv cannot be read"),
        (["--out", "x"], "expected data sets and --out DIR, or --report DIR"),
        (["a/one", "b/one", "--out", "x"], "two data sets are called one"),
        (["nothing", "--out", "x"], "nothing is not a data set"),
    ],
)
def test_what_cannot_work_is_said_with_status_2(given, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert scaling.main(given) == 2
    assert expected in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--steps", "1,x"], "'1,x': expected whole numbers from 1, with commas between them"),
        (["--data", "2"], "'2': expected numbers from 1e-06 to 1"),
        (["--cores", "looped,lstm"], "'lstm': expected some of looped,stacked"),
        (["--shard", "2/2"], "'2/2': expected I/N with I from 0 to N - 1"),
        (["--updates", "0"], "'0': expected a whole number from 1"),
    ],
)
def test_words_that_mean_nothing_are_refused(given, expected, capsys):
    with pytest.raises(SystemExit) as refused:
        scaling.main(given)
    assert refused.value.code == 2
    assert expected in capsys.readouterr().err

"""Runs side by side: reading them, grouping, statistics against other implementations, the report."""

import csv
import json
import re

import numpy as np
import pytest
import yaml
from run_folders import write_run
from scipy import stats

from agent.errors import UsageError
from agent.evaluation.statistics import (
    aggregate_intervals,
    aggregates,
    improvement_interval,
    paired_difference,
    paired_interval,
    probability_of_improvement,
)
from agent.runs.compare import Comparison, return_at_seconds
from agent.runs.published import published_returns
from agent.runs.report import write_report
from agent.runs.run_record import find_runs, load_run


def comparison_of(tmp_path, by=(), seeds=2, **runs):
    """runs: name=settings of `write_run`; each with so many seeds, each 10 better than the last."""
    for name, settings in runs.items():
        for seed in range(seeds):
            returns = tuple(value + 10.0 * seed for value in settings.get("returns", (100.0, 300.0)))
            write_run(tmp_path / f"{name}-{seed}", seed, **{**settings, "returns": returns})
    return Comparison([load_run(path) for path in find_runs([str(tmp_path)])], by)


# ---------------------------------------------------------------------- statistics


def test_aggregates_by_hand():
    found = aggregates({"a": [0.0, 1.0], "b": [2.0, 4.0], "c": [0.5, 0.5]})
    assert found["mean"] == pytest.approx((0.5 + 3.0 + 0.5) / 3)
    assert found["median"] == pytest.approx(0.5)
    assert found["iqm"] == pytest.approx(np.mean([0.5, 0.5, 1.0, 2.0]))  # one of six goes at each end
    assert found["optimality_gap"] == pytest.approx(1 - (0 + 1 + 1 + 1 + 0.5 + 0.5) / 6)
    with pytest.raises(ValueError, match="at least one task"):
        aggregates({})
    assert aggregates({"a": [0.0, 0.0, 0.0, 0.0, 900.0]})["median"] == 0.0  # of one task: over its runs
    with pytest.raises(ValueError, match="finite"):
        aggregates({"a": [1.0, float("nan")]})


def test_the_iqm_is_that_of_scipy():
    scores = np.random.default_rng(0).gamma(2.0, size=(3, 7))
    found = aggregates(dict(zip("abc", scores, strict=True)))
    assert found["iqm"] == pytest.approx(stats.trim_mean(scores, 0.25, axis=None))


def test_the_interval_of_the_mean_is_students():
    scores = np.random.default_rng(1).normal(0.5, 0.1, size=6)
    theirs = stats.ttest_1samp(scores, 0.0).confidence_interval(0.95)
    intervals = aggregate_intervals({"a": scores})
    assert intervals["mean"] == pytest.approx(tuple(theirs))
    assert intervals["optimality_gap"] == pytest.approx((1.0 - theirs.high, 1.0 - theirs.low))


def test_the_interval_of_the_median_is_exact_and_given_from_six_seeds_of_one_task():
    scores = np.random.default_rng(1).normal(size=12)
    theirs = stats.quantile_test(scores, p=0.5).confidence_interval(0.95)
    assert aggregate_intervals({"a": scores})["median"] == tuple(theirs)
    assert aggregate_intervals({"a": scores[:6]})["median"] == (scores[:6].min(), scores[:6].max())
    assert "median" not in aggregate_intervals({"a": scores[:5]})
    assert "median" not in aggregate_intervals({"a": scores, "b": scores})


def test_strata_are_tasks():
    """Tasks are no sample: with constant ones the mean cannot vary, however far they lie apart."""
    intervals = aggregate_intervals({"a": [0.0] * 5, "b": [1.0] * 5})
    assert intervals["mean"] == (0.5, 0.5)


def test_the_iqm_varies_as_the_tasks_of_the_middle_half_do():
    rng = np.random.default_rng(2)
    middle = {"low": [0.0] * 5, "a": rng.normal(5.0, 1.0, 5), "b": rng.normal(6.0, 1.0, 5), "high": [9.0] * 5}
    low, high = aggregate_intervals(middle)["iqm"]
    alone = aggregate_intervals({name: middle[name] for name in "ab"})["mean"]
    assert high - low == pytest.approx(alone[1] - alone[0])
    assert (low + high) / 2 == pytest.approx(sum(alone) / 2)


def test_no_interval_below_five_seeds():
    assert aggregate_intervals({"a": [1.0] * 5, "b": [1.0] * 4}) == {}
    assert improvement_interval({"a": [1.0] * 4}, {"a": [0.0] * 5}) is None


def test_probability_of_improvement_is_mann_whitneys():
    rng = np.random.default_rng(3)
    x, y = rng.normal(0.3, 1.0, 9), rng.normal(0.0, 1.0, 6)
    statistic = stats.mannwhitneyu(x, y).statistic
    assert probability_of_improvement({"a": x}, {"a": y}) == pytest.approx(statistic / 54)
    assert probability_of_improvement({"a": [1.0, 2.0]}, {"a": [2.0, 3.0]}) == pytest.approx(0.125)
    low, high = improvement_interval({"a": x}, {"a": y})
    assert low < statistic / 54 < high
    with pytest.raises(ValueError, match="a task that both have"):
        probability_of_improvement({"a": x}, {"b": y})


def test_paired_differences_use_common_episodes_alone():
    one, other = [{1: 10.0, 2: 20.0, 3: 99.0}], [{1: 5.0, 2: 21.0}, {1: 7.0, 2: 19.0}]
    assert paired_difference(one, other) == pytest.approx(((10 - 6) + (20 - 20)) / 2)
    assert paired_difference(one, [{7: 1.0}]) is None


def test_the_interval_of_paired_differences_is_welchs():
    rng = np.random.default_rng(0)
    x, y = rng.normal(10.0, 3.0, (12, 4)), rng.normal(8.0, 3.0, (9, 4))
    y[0] = -99.0  # one that fails
    one, other = ([dict(enumerate(run)) for run in side] for side in (x, y))
    theirs = stats.ttest_ind(x.mean(1), y.mean(1), equal_var=False).confidence_interval(0.95)
    assert paired_interval([(one, other)]) == pytest.approx(tuple(theirs))
    assert paired_interval([(one[:4], other)]) is None
    assert paired_interval([(one, [{7: 1.0}] * 5)]) is None
    assert paired_interval([]) is None


def test_runs_that_do_not_overlap_leave_room_for_doubt():
    low, high = improvement_interval({"a": range(5, 10)}, {"a": range(5)})
    assert (0.5 < low < 0.8, high) == (True, 1.0)
    assert improvement_interval({"a": range(5)}, {"a": range(5, 10)}) == pytest.approx((0.0, 1.0 - low))


# ---------------------------------------------------------------------- reading


def test_runs_are_found_by_themselves_or_in_their_folder(tmp_path):
    one, two = write_run(tmp_path / "sweep" / "a"), write_run(tmp_path / "sweep" / "b")
    write_run(tmp_path / "sweep" / "c.unsaved1")
    (tmp_path / "sweep" / "a.log").write_text("")
    assert find_runs([str(tmp_path / "sweep")]) == [one, two]
    assert find_runs([str(one), str(tmp_path / "sweep" / "a.log"), str(one)]) == [one]
    assert find_runs([str(tmp_path)]) == [one, two]  # runs/TASK/NAME
    (tmp_path / "none").mkdir()
    for words, message in (([str(tmp_path / "x" / "*")], "there is no run"), ([str(tmp_path / "none")], "holds none"),
                           ([str(tmp_path / "sweep" / "a.log")], "no run was given")):  # fmt: skip
        with pytest.raises(UsageError, match=message):
            find_runs(words)


def test_what_a_run_says(tmp_path):
    run = load_run(write_run(tmp_path / "a", returns=(10.0, 20.0, 30.0, 40.0, 50.0)))
    assert run.final_returns == {0: 45.0, 1: 55.0}
    assert (run.final_return, run.recent_return, run.last_step) == (50.0, 30.0, 5000)
    assert run.setting("behavior.horizon") == 10
    assert run.setting("behavior.nothing") is None
    assert run.seconds_at(750) == pytest.approx(75.0)
    assert run.seconds_at(4000) == pytest.approx(400.0)  # beyond the last line
    assert return_at_seconds(run, 250.0) == 20.0
    assert return_at_seconds(run, 50.0) is None


def test_the_speed_of_a_run_is_that_of_its_updates_and_not_of_its_evaluations(tmp_path):
    run = write_run(tmp_path / "a")
    speeds = 0.0, 20.0, 22.0, 24.0, 5.0  # random actions come first, the final evaluation last
    lines = [{"step": 500 * i, "wall": 50.0 * i, "speed/updates": speed} for i, speed in enumerate(speeds)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert load_run(run).updates_per_second == 21.0
    (run / "metrics.jsonl").write_text(json.dumps(lines[0]) + "\n")
    assert load_run(run).updates_per_second is None


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("eval.csv", "step,episode,seed,return,length,mean_loops\n", "has no evaluation yet"),
        ("eval.csv", "step,episode\n1,2\n", "cannot be read"),
        ("meta.json", "{", "cannot be read"),
        ("meta.json", "{}", "damaged"),
        ("config.yaml", "a: [", "cannot be read"),
        ("config.yaml", "model_only: true\n", "world model alone"),
        ("eval.csv", "step,episode,seed,return,length,mean_loops\n1000,0\n", "cannot be read"),
    ],
)
def test_damaged_runs_are_named(tmp_path, name, text, message):
    run = write_run(tmp_path / "a")
    (run / name).write_text(text)
    with pytest.raises(UsageError, match=message):
        load_run(run)


def test_a_line_cut_off_by_the_end_of_a_run_is_left_out(tmp_path):
    run = write_run(tmp_path / "a")
    with (run / "eval.csv").open("a") as file:
        file.write("3000,0,0,99")
    assert load_run(run).last_step == 2000


# ---------------------------------------------------------------------- comparison


def test_groups_are_what_differs_by_seed_alone(tmp_path):
    found = comparison_of(tmp_path, short={"horizon": 5}, long={"horizon": 15, "returns": (50.0, 200.0)})
    assert found.by == ["behavior.horizon"]
    assert [group.label for group in found.groups] == ["horizon 5", "horizon 15"]  # in the order of numbers
    rows = found.table()
    assert [row["mean"] for row in rows] == pytest.approx([305.0, 205.0])
    assert rows[0]["optimality_gap"] == pytest.approx(0.695)
    assert rows[0]["iqm_interval"] is None
    assert found.warnings[0] == "horizon 5 has 2 runs of dmc:cartpole_swingup: no interval below 5"
    assert rows[0]["minutes"] == pytest.approx(200 / 60)
    (pair,) = found.improvements()
    assert pair["probability"] == 1.0
    assert pair["paired_difference"] == pytest.approx(100.0)
    curve = found.curve(found.groups[0], "dmc:cartpole_swingup")
    assert (curve["steps"], curve["mean"], curve["low"]) == ([1000.0, 2000.0], [105.0, 305.0], [100.0, 300.0])


def test_doubts_are_said(tmp_path):
    write_run(tmp_path / "other", seed=7, horizon=5, finished=False, returns=(1.0,), first=50)
    found = comparison_of(tmp_path, by=["task"], short={"horizon": 5}, long={"horizon": 15})
    text = "\n".join(found.warnings)
    for part in ("is not finished", "different steps: 1,000, 2,000", "different episodes",
                 "two runs of dmc:cartpole_swingup have the same seed", "differ in behavior.horizon too"):  # fmt: skip
        assert part in text, part
    clean = comparison_of(tmp_path / "clean", seeds=5, short={}, long={"horizon": 15})
    assert clean.warnings == []
    mixed = comparison_of(tmp_path / "mixed", ["task"], 5, cart={}, walker={"task": "dmc:walker_walk", "horizon": 15})
    assert "the groups differ in behavior.horizon too" in mixed.warnings
    assert clean.table()[0]["iqm_interval"] is not None


def test_what_is_known_of_the_dreams_stands_beside_the_returns(tmp_path):
    found = comparison_of(tmp_path / "runs", short={"horizon": 5}, long={"horizon": 15})
    assert all(found.table()[0][name] is None for name in ("observation_15", "value_bias"))
    assert "Dreams" not in write_report(found, tmp_path / "plain").read_text()
    for seed, error in ((0, 0.2), (1, 0.4)):
        rows = [{"policy": p, "loops": x, "step": k, "observation": error * (k == 15) * (x == "exit") * (p == "agent"),
                 "reward": 0.1} for p in ("agent", "random") for x in ("exit", "1") for k in range(1, 16)]  # fmt: skip
        folder = tmp_path / "runs" / f"short-{seed}" / "model"
        folder.mkdir()
        values = [{"step": 5, "bias": 9.0, "error": 9.0}, {"step": 15, "bias": -1.0, "error": 2.0}]
        (folder / "model.json").write_text(json.dumps({"errors": rows, "values": values, "step": 2000}))
    row = found.table()[0]
    assert row["observation_15"] == pytest.approx(0.3)
    assert (row["observation_5"], row["value_bias"], row["value_error"]) == (0.0, -1.0, 2.0)
    assert "<h2>Dreams</h2>" in write_report(found, tmp_path / "out").read_text()
    (folder / "model.json").write_text(json.dumps({"errors": rows, "values": values, "step": 1000}))  # older
    assert found.table()[0]["observation_15"] == pytest.approx(0.2)
    assert any("left out, they are of step 1,000" in line for line in found.find_warnings())
    (folder / "model.json").write_text(json.dumps({"errors": [], "values": [], "step": 2000}))  # too short
    assert not any("left out" in line for line in found.find_warnings())


def test_the_return_at_equal_minutes_is_that_of_every_seed(tmp_path):
    found = comparison_of(tmp_path, short={"horizon": 5}, long={"horizon": 15})
    fast, slow = found.groups[0].runs[0], found.groups[1].runs[0]
    slow.wall_clock[1][:] *= 3.0  # its first evaluation comes after 300 s
    fast.meta["finished"] = False
    fast.wall_clock[1][:] *= 0.01  # what was stopped early sets no budget
    rows = found.table()
    assert rows[0]["equal_minutes"] == pytest.approx(200 / 60)
    assert rows[0]["at_equal_minutes"] == pytest.approx(305.0)
    assert rows[1]["at_equal_minutes"] is None


def test_tasks_are_compared_only_on_a_common_scale(tmp_path):
    both = comparison_of(tmp_path / "dmc", cart={}, walker={"task": "dmc:walker_walk"})
    assert len(both.groups) == 1
    assert both.table()[0]["mean"] == pytest.approx(305.0)
    with pytest.raises(UsageError, match="share no scale"):
        comparison_of(tmp_path / "mixed", cart={}, toy={"task": "toy:cue"})


def test_unknown_fields_are_refused(tmp_path):
    with pytest.raises(UsageError, match="did you mean behavior.horizon"):
        comparison_of(tmp_path, by=["horizn"], short={})


def test_published_returns_are_those_at_the_end_of_the_runs(tmp_path):
    assert {row.method for row in published_returns()} >= {"DreamerV3", "TD-MPC2", "SAC", "PPO"}
    assert all(row.source and row.episodes in ("training", "evaluation") for row in published_returns())
    found = comparison_of(tmp_path, short={})
    assert {row.step for row in found.published("dmc:cartpole_swingup")} == {100_000}  # the nearest, far from 2,000
    found.runs[0].evaluations[100_000] = {0: 1.0}
    best, *_ = found.published("dmc:cartpole_swingup")
    assert (best.method, best.step) == ("BRO", 100_000)


def test_the_report_stands_alone(tmp_path):
    found = comparison_of(tmp_path / "runs", seeds=5, short={"horizon": 5}, long={"horizon": 15})
    page = write_report(found, tmp_path / "out").read_text()
    for word in ("http://", "https://", "<link", "<script", "nan"):
        assert word not in page.replace("http://www.w3.org", "")
    assert page.count("<source srcset=") == 3  # light and dark: final returns, curves over steps and over minutes
    assert "behavior.horizon *" in page  # the settings in which the groups differ
    assert "python train_agent.py dmc:cartpole_swingup" in page
    assert "no difference" in page
    for table in re.findall(r"<table>.*?</table>", page, re.DOTALL):
        rows = [len(re.findall(r"<t[hd][ >]", row)) for row in table.split("<tr>")[1:]]
        assert len(rows) > 1
        assert set(rows) == {rows[0]}  # as many cells as heads
    content = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert [row["group"] for row in content["groups"]] == ["horizon 5", "horizon 15"]
    with (tmp_path / "out" / "runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 10
    assert rows[0]["return"] == "300.0"


def test_what_runs_say_is_no_markup_of_the_report(tmp_path):
    """Whatever stands in the files of a run, seed, task, command, labels and folder names, is shown as text."""
    attack = "<script>alert(1)</script>"
    for number in (0, 1):
        run = write_run(tmp_path / "runs" / f"<b>{number}", seed=number)
        settings = yaml.safe_load((run / "config.yaml").read_text())
        settings |= {"seed": attack, "task": f"toy:{attack}", "dream": f"$\\x{attack}{number}$"}
        (run / "config.yaml").write_text(yaml.safe_dump(settings))
        meta = {"task": f"toy:{attack}", "finished": False, "commands": [attack], "git": {"commit": "<i>x"}}
        (run / "meta.json").write_text(json.dumps(meta))
        (run / "videos").mkdir()
        (run / "videos" / "eval_final.gif").write_bytes(b"GIF89a")
    page = write_report(Comparison([load_run(path) for path in find_runs([str(tmp_path / "runs")])], ["dream"]),
                        tmp_path / "out").read_text()  # fmt: skip
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    for markup in ("<script", "<b>0", "<b>1", "<i>x"):
        assert markup not in page


def test_runs_without_logged_times_have_none(tmp_path):
    for seed in (0, 1):
        (write_run(tmp_path / "runs" / f"a{seed}", seed) / "metrics.jsonl").write_text("")
    found = Comparison([load_run(path) for path in find_runs([str(tmp_path / "runs")])])
    write_report(found, tmp_path / "out")
    content = json.loads((tmp_path / "out" / "comparison.json").read_text(), parse_constant=pytest.fail)
    assert content["groups"][0]["minutes"] is None
    assert content["curves"]["dmc:cartpole_swingup"]["preset small"]["seconds"] == [None, None]


def test_the_command(tmp_path, script):
    for seed in (0, 1):
        write_run(tmp_path / "runs" / f"a{seed}", seed)
    done = script("evaluate.py", "compare", "runs", "--json", "-")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["groups"][0]["mean"] == 300.0
    assert "report comparison/report.html" in done.stderr
    for words in (["runs/*"], ["runs", "--by", "nothing"], ["runs", "--out", "runs/a0/meta.json"]):
        refused = script("evaluate.py", "compare", *words)
        assert refused.returncode == 2, words
        assert refused.stderr.startswith("error: ")

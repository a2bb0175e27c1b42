"""Runs over a suite: the table of its tasks, numbers over tasks beside published ones, and what is left out."""

import json
import re

import pytest
from run_folders import write_run

from agent.errors import UsageError
from agent.evaluation.atari_scores import scores
from agent.evaluation.statistics import aggregate_intervals
from agent.runs import published
from agent.runs.compare import Comparison
from agent.runs.comparison_text import format_suite, suite_cells
from agent.runs.report import write_report
from agent.runs.run_record import find_runs, load_run
from agent.runs.suite_comparison import SuiteComparison
from agent.runs.suites import Suite, find_suite

TASKS = ("dmc:cartpole_swingup", "dmc:walker_walk", "dmc:reacher_easy")
THREE = Suite("three", TASKS, "made up")

TABLE = """method,task,step,return,seeds,episodes,source
Near,dmc:cartpole_swingup,2000,300,5,evaluation,x
Near,dmc:walker_walk,2000,500,5,evaluation,x
Near,dmc:reacher_easy,2000,900,5,evaluation,x
Near,dmc:cartpole_swingup,1000,100,5,evaluation,x
Near,dmc:walker_walk,1000,200,5,evaluation,x
Late,dmc:cartpole_swingup,2500,400,5,training,x
Late,dmc:walker_walk,2500,100,5,training,x
Late,dmc:reacher_easy,2500,100,5,training,x
Partly,dmc:cartpole_swingup,2000,1000,5,evaluation,x
Partly,dmc:walker_walk,1600,1000,5,evaluation,x
"""


@pytest.fixture
def few_published(tmp_path, monkeypatch):
    """TABLE in place of published.csv. Near has all tasks, Late all at 2,500 steps, Partly two of three."""
    (tmp_path / "published.csv").write_text(TABLE)
    monkeypatch.setattr(published, "PUBLISHED", tmp_path / "published.csv")
    published.published_returns.cache_clear()
    yield
    published.published_returns.cache_clear()


def of_suite(folder, *runs, suite=THREE, by=()):
    """runs: settings of `write_run`."""
    for number, settings in enumerate(runs):
        write_run(folder / str(number), **settings)
    return SuiteComparison(suite, [load_run(path) for path in find_runs([str(folder)])], by)


def two_groups(folder):
    """horizon 5 with two seeds of the first task and one of the others, horizon 15 without the last task."""
    return of_suite(
        folder,
        {"horizon": 5, "task": TASKS[0], "returns": (100.0, 200.0)},
        {"horizon": 5, "task": TASKS[0], "seed": 1, "returns": (300.0, 400.0)},
        {"horizon": 5, "task": TASKS[1], "returns": (0.0, 600.0)},
        {"horizon": 5, "task": TASKS[2], "returns": (0.0, 50.0)},
        {"horizon": 15, "task": TASKS[0], "returns": (100.0, 100.0)},
        {"horizon": 15, "task": TASKS[1], "returns": (100.0, 700.0)},
    )


# ---------------------------------------------------------------------- task by task


def test_every_task_stands_beside_what_is_published(tmp_path, few_published):
    head, *rows = suite_cells(two_groups(tmp_path / "runs").suite_content())
    assert head == ["", "horizon 5", "horizon 15", "Partly", "Near", "Late at 2.5k"]
    assert rows == [
        [TASKS[0], "300.0 (2)", "100.0 (1)", "1000.0", "300.0", "400.0"],
        [TASKS[1], "600.0 (1)", "700.0 (1)", "1000.0 at 1.6k", "500.0", "100.0"],
        [TASKS[2], "50.0 (1)", "-", "-", "900.0", "100.0"],
        ["mean", "450.0", "400.0", "1000.0", "400.0", "250.0"],
        ["median", "450.0", "400.0", "1000.0", "400.0", "250.0"],
        ["IQM", "450.0", "400.0", "1000.0", "400.0", "250.0"],
    ]


def test_a_method_that_lacks_a_task_has_no_means(tmp_path, few_published):
    found = of_suite(tmp_path / "runs", *({"task": task} for task in TASKS))
    assert list(found.published_rows) == ["Near", "Late", "Partly"]  # best first, those without means last
    cells = suite_cells(found.suite_content())
    assert [row[-1] for row in cells[-3:]] == ["-", "-", "-"]
    assert cells[-3][:3] == ["mean", "300.0", "566.7"]
    assert cells[-2][2] == "500.0"
    assert (
        f"Partly has no published return near these steps of {TASKS[2]}: it has no numbers over tasks" in found.warnings
    )
    content = found.suite_content()
    assert set(content["profile"]["published"]) == {"Near", "Late"}
    assert content["sampled"] == ["Late"]
    assert "Late: training episodes with sampled actions" in format_suite(content)


def test_tasks_without_runs_stay_in_the_table_and_out_of_the_means(tmp_path, few_published):
    found = of_suite(tmp_path / "runs", {"task": TASKS[1], "returns": (0.0, 600.0)}, {"task": "dmc:dog_run"},
                     {"task": "toy:cue5"})  # fmt: skip
    assert found.warnings[:3] == [
        "left out, not in @three: 2 runs of dmc:dog_run, toy:cue5",
        f"no runs of 2 of the 3 tasks of @three: {TASKS[0]}, {TASKS[2]}",
        "what is said over tasks is over 1 of 3, those of which every group has runs; of the published methods too",
    ]
    cells = suite_cells(found.suite_content())
    assert [row[1] for row in cells[1:]] == ["-", "600.0 (1)", "-", "600.0", "600.0", "600.0"]
    assert dict(zip(cells[0], cells[-3], strict=True))["Near"] == "500.0"
    assert "over 1 tasks, returns:" in format_suite(found.suite_content())


def test_groups_without_a_common_task_have_no_means(tmp_path, few_published):
    found = of_suite(tmp_path / "runs", {"task": TASKS[0], "horizon": 5}, {"task": TASKS[1], "horizon": 15})
    assert "there is no task of which every group has runs: nothing is said over tasks" in found.warnings
    content = found.suite_content()
    assert all(cell == "-" for row in suite_cells(content)[-3:] for cell in row[1:])
    assert content["profile"]["groups"] == {}
    assert content["curves"]["published"] == {}
    page = write_report(found, tmp_path / "out").read_text()
    assert "Performance profile" not in page


def test_runs_that_end_elsewhere_are_said(tmp_path, few_published):
    found = of_suite(tmp_path / "runs", {"task": TASKS[0], "returns": (1.0,)}, {"task": TASKS[1]}, {"task": TASKS[2]})
    assert any("end at step 1,000, those of others at 2,000" in line for line in found.warnings)
    rows = {row["task"]: row["published"] for row in found.task_rows()}
    assert rows[TASKS[0]]["Near"]["return"] == 100.0
    assert rows[TASKS[1]]["Near"]["return"] == 500.0
    assert dict(zip(*suite_cells(found.suite_content())[:2], strict=True))["Near"] == "100.0"  # of the same step as it


def test_a_suite_without_runs_is_refused(tmp_path):
    with pytest.raises(UsageError, match="no run is of a task of @three; their tasks are dmc:dog_run: leave --suite"):
        of_suite(tmp_path / "runs", {"task": "dmc:dog_run"})


# ---------------------------------------------------------------------- over tasks


def test_on_how_many_tasks_a_group_is_at_least_as_good(tmp_path, few_published):
    found = two_groups(tmp_path / "runs").at_least()
    counts = {(row["group"], row["method"]): (row["at_least"], row["tasks"]) for row in found}
    assert counts == {
        ("horizon 5", "Partly"): (0, 2), ("horizon 5", "Near"): (2, 3), ("horizon 5", "Late"): (1, 3),
        ("horizon 15", "Partly"): (0, 2), ("horizon 15", "Near"): (1, 2), ("horizon 15", "Late"): (1, 2),
    }  # fmt: skip
    text = format_suite(two_groups(tmp_path / "again").suite_content())
    assert "horizon 5: at least Partly on 0 of 2, Near on 2 of 3, Late on 1 of 3 tasks" in text


def test_the_profile_is_over_runs_of_the_groups_and_over_means_of_the_methods(tmp_path, few_published):
    found = two_groups(tmp_path / "runs").profiles()
    at = {name: {who: shares[index] for who, shares in {**found["groups"], **found["published"]}.items()}
          for name, index in (("0.3", 30), ("0.65", 65))}  # fmt: skip
    assert found["thresholds"][30] == pytest.approx(0.3)
    assert (found["thresholds"][0], found["thresholds"][-1], len(found["thresholds"])) == (0.0, 1.0, 101)
    assert at["0.3"] == {"horizon 5": 0.75, "horizon 15": 0.5, "Partly": 1.0, "Near": 0.5, "Late": 0.5}
    assert at["0.65"] == {"horizon 5": 0.0, "horizon 15": 0.5, "Partly": 1.0, "Near": 0.0, "Late": 0.0}


def test_the_curve_is_over_tasks_at_the_steps_that_all_runs_have(tmp_path, few_published):
    found = two_groups(tmp_path / "runs")
    assert found.suite_curve(found.groups[0]) == {"steps": [1000.0, 2000.0], "mean": pytest.approx([0.1, 0.45]),
                                                  "iqm": pytest.approx([0.1, 0.45])}  # fmt: skip
    short = of_suite(tmp_path / "short", {"task": TASKS[0], "returns": (100.0, 200.0, 300.0)},
                     {"task": TASKS[1], "returns": (300.0,)})  # fmt: skip
    assert short.suite_curve(short.groups[0])["steps"] == [1000.0]
    theirs = found.published_curves()
    assert theirs["Near"] == {"steps": [1000.0, 2000.0], "mean": pytest.approx([0.15, 0.4]),
                              "iqm": pytest.approx([0.15, 0.4])}  # fmt: skip
    assert theirs["Late"]["steps"] == [2500.0]
    assert "Partly" not in theirs  # never both tasks at one step


def test_intervals_are_over_seeds_and_need_five(tmp_path, few_published):
    values = {TASKS[0]: [100.0, 150.0, 170.0, 90.0, 140.0], TASKS[1]: [800.0, 700.0, 900.0, 750.0, 640.0]}
    runs = [{"task": task, "seed": seed, "returns": (0.0, value)} for task, every in values.items()
            for seed, value in enumerate(every)]  # fmt: skip
    suite = Suite("two", TASKS[:2], "made up")
    (row,) = of_suite(tmp_path / "five", *runs, suite=suite).table()
    theirs = aggregate_intervals({task: [value / 1000.0 for value in every] for task, every in values.items()})
    for name in ("mean", "iqm"):
        assert row[f"{name}_interval"] == pytest.approx([1000.0 * end for end in theirs[name]])
    assert row["median_interval"] is None
    found = of_suite(tmp_path / "four", *runs[:-1], suite=suite)
    assert found.table()[0]["mean_interval"] is None
    assert f"preset small has 4 runs of {TASKS[1]}: no interval below 5" in found.warnings
    page = write_report(found, tmp_path / "out").read_text()
    assert "preset small has no interval: a task has fewer than five seeds" in page
    assert re.search(r"<td>458\.[78] \[\N{EN DASH}\]</td>", page)  # (130 + 787.5) / 2


# ---------------------------------------------------------------------- games


def test_games_are_compared_as_human_normalised_scores(tmp_path):
    """Boxing: random 0.1, human 12.1. Pong: random -20.7, human 14.6."""
    runs = [{"task": "atari100k:boxing", "returns": (0.1, 24.1)}, {"task": "atari100k:pong", "returns": (-20.7, 14.6)}]
    found = of_suite(tmp_path / "runs", *runs, suite=find_suite("atari26"))
    (row,) = found.table()
    assert row["mean"] == pytest.approx(1.5)
    assert (row["lowest"], row["highest"]) == (pytest.approx(1.0), pytest.approx(2.0))
    assert row["optimality_gap"] == pytest.approx(0.0)
    content = found.suite_content()
    assert content["unit"] == "human-normalised score"
    entry = content["rows"][6]["groups"]["preset small"]
    assert content["rows"][6]["task"] == "atari100k:boxing"
    assert (entry["return"], entry["score"]) == (pytest.approx(24.1), pytest.approx(2.0))
    assert content["curves"]["groups"]["preset small"]["mean"] == pytest.approx([0.0, 1.5])
    assert found.run_row(found.groups[0], found.groups[0].runs[0])["return"] == pytest.approx(24.1)  # as it was played
    with pytest.raises(UsageError, match="share no scale .* --suite atari26"):
        Comparison(found.runs)


def test_published_scores_of_games_are_those_of_the_papers(tmp_path):
    """Mean and median human-normalised scores as printed in Alonso et al. 2024 (arXiv 2405.12399), table 1."""
    found = of_suite(tmp_path / "runs", *({"task": f"atari100k:{game}"} for game in scores()),
                     suite=find_suite("atari26"))  # fmt: skip
    over = found.suite_content()["over_tasks"]["published"]
    assert (over["DIAMOND"]["mean"], over["DIAMOND"]["median"]) == pytest.approx((1.459, 0.373), abs=0.0006)
    assert (over["IRIS"]["mean"], over["IRIS"]["median"]) == pytest.approx((1.046, 0.289), abs=0.0006)


# ---------------------------------------------------------------------- report and command


def test_the_report_holds_the_suite(tmp_path, few_published):
    found = two_groups(tmp_path / "runs")
    page = write_report(found, tmp_path / "out").read_text()
    assert "<title>@three by behavior.horizon</title>" in page
    for word in ("http://", "https://", "<link", "<script", "nan"):
        assert word not in page.replace("http://www.w3.org", "")
    assert page.count("<source srcset=") == 10  # profile, two curves over tasks, final returns, two for each task
    assert "<td>600.0 (1)</td>" in page
    assert "the 2 tasks of which every group has runs" in page
    for table in re.findall(r"<table>.*?</table>", page, re.DOTALL):
        rows = [len(re.findall(r"<t[hd][ >]", row)) for row in table.split("<tr>")[1:]]
        assert set(rows) == {rows[0]}  # as many cells as heads
    content = json.loads((tmp_path / "out" / "comparison.json").read_text(), parse_constant=pytest.fail)
    suite = content["suite"]
    assert suite["compared"] == list(TASKS[:2])
    assert suite["over_tasks"]["groups"]["horizon 5"]["mean"] == pytest.approx(450.0)
    assert {"rows", "at_least", "profile", "curves", "source"} <= set(suite)
    assert "suite" not in Comparison(found.runs).content()


def test_labels_are_no_markup_of_the_report(tmp_path, few_published):
    attack = "<script>alert(1)</script>"
    for number, task in enumerate(TASKS):
        path = write_run(tmp_path / "runs" / str(number), task=task)
        text = (path / "config.yaml").read_text()
        (path / "config.yaml").write_text(text.replace("dream: null", f"dream: '{attack}'"))
    found = SuiteComparison(THREE, [load_run(path) for path in find_runs([str(tmp_path / "runs")])], ["dream"])
    page = write_report(found, tmp_path / "out").read_text()
    assert "&lt;script&gt;alert(1)" in page
    assert "<script" not in page


def test_the_command(tmp_path, script):
    for number, task in enumerate(TASKS):
        write_run(tmp_path / "runs" / str(number), task=task)
    done = script("evaluate.py", "compare", "runs", "--suite", "easy6", "--json", "-")
    assert done.returncode == 0, done.stderr
    content = json.loads(done.stdout)
    assert content["suite"]["name"] == "easy6"
    assert [row["task"] for row in content["suite"]["rows"]] == list(find_suite("easy6").tasks)
    assert "over 3 tasks, returns:" in done.stderr
    assert "note: no runs of 3 of the 6 tasks of @easy6: dmc:cartpole_balance" in done.stderr
    assert "preset small: at least " in done.stderr
    assert "report comparison/report.html" in done.stderr
    for name, message in (("easy7", "did you mean @easy6"), ("atari26", "no run is of a task of @atari26")):
        refused = script("evaluate.py", "compare", "runs", "--suite", name)
        assert refused.returncode == 2
        assert refused.stderr.startswith("error: ")
        assert message in refused.stderr

"""Returns are printed with digits that mean something, whatever the scale of a task's rewards."""

import numpy as np
import pytest

from agent.data.dataset import dataset_line
from agent.evaluation.statistics import format_summary, summary
from agent.logs.console import Console
from agent.numbers import mean_and_spread, number, side_by_side
from agent.runs.comparison_text import format_table
from agent.runs.sweep_grid import describe_results


@pytest.mark.parametrize(("value", "text"), [
    (0.0, "0"), (-0.0, "0"), (0.8125, "0.8125"), (812.44, "812.4"), (48213.4, "48213"), (1.2345e-6, "1.234e-06"),
    (4.84e13, "4.84e+13"), (-1e12, "-1e+12"), (float("nan"), "nan"), (float("-inf"), "-inf"),
])  # fmt: skip
def test_a_number_has_four_digits_or_all_before_the_point(value, text):
    assert number(value) == text


def test_a_spread_that_is_an_error_of_rounding_is_none():
    assert mean_and_spread(-3.0, 4.44e-16) == "-3 +- 0"
    assert mean_and_spread(812.44, 35.12) == "812.4 +- 35.1"
    assert mean_and_spread(2e-6, 1e-6) == "2e-06 +- 1e-06"


def test_numbers_side_by_side_end_at_the_same_place():
    assert side_by_side([812.42, 35.1]) == ["812.4", "35.1"]
    assert side_by_side([-3.0, 4e-16]) == ["-3.000", "0.000"]
    assert side_by_side([3e-6, 4e-22]) == ["3e-06", "0"]


@pytest.mark.parametrize(("scale", "shown"), [(1e-6, "return 2e-06 +- 8.165e-07 (IQM 2e-06"),
                                              (1e12, "return 2e+12 +- 8.165e+11 (IQM 2e+12")])  # fmt: skip
def test_very_small_and_very_large_rewards_are_told_apart_in_an_evaluation(scale, shown):
    assert format_summary(summary(np.array([1.0, 2.0, 3.0]) * scale)).startswith(shown)


@pytest.mark.parametrize(("value", "text"), [(3e-6, "3e-06"), (4.84e13, "4.84e+13"), (48213.4, "48213")])
def test_the_same_digits_everywhere(value, text):
    console = Console(100, 0)
    console.returns.append(value)
    console.eval_return = value
    assert console.line().count(text) == 2
    row = {"group": "all", "runs": 1, "iqm_interval": (value, value), "minutes": None}
    table = format_table([row | dict.fromkeys(("iqm", "mean", "median", "lowest", "highest"), value)])
    assert table.count(text) == 7
    assert len({len(line) for line in table.splitlines()}) == 1
    metadata = {"task": "toy:cue", "episodes": 10, "rows": 90, "mean_return": value, "best_return": value}
    assert dataset_line(metadata).count(text) == 2
    assert describe_results({"results": {"final": {"mean": value, "std": value * 1e-16}}}) == f"return {text} +- 0"

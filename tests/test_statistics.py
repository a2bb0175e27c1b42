"""Evaluation statistics against answers worked out by hand."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.evaluation.statistics import bootstrap_interval, format_summary, iqm, summary

finite = st.floats(-1e6, 1e6)


@pytest.mark.parametrize(
    ("values", "answer"),
    [
        ([5.0], 5.0),
        ([3.0, 1.0, 2.0], 2.0),  # fewer than four values: the plain mean
        ([4.0, 1.0, 3.0, 2.0], 2.5),
        ([0.0, 0.0, 10.0, 20.0, 30.0, 40.0, 1e6, 1e6], 25.0),
        ([1.0, 2.0, 3.0, 4.0, 100.0], 3.0),  # one of five goes at each end
    ],
)
def test_iqm_known_answers(values, answer):
    assert iqm(values) == pytest.approx(answer)


@given(st.lists(finite, min_size=1, max_size=40))
def test_iqm_ignores_order_and_stays_inside(values):
    assert iqm(values) == pytest.approx(iqm(values[::-1]))
    slack = 1e-9 * (1 + max(map(abs, values)))
    assert min(values) - slack <= iqm(values) <= max(values) + slack


def test_interval_holds_the_mean_and_repeats():
    sample = np.random.default_rng(3).normal(100.0, 10.0, size=50)
    low, high = bootstrap_interval([sample], np.mean)
    assert low < sample.mean() < high
    # A mean of 50 values with deviation 10: about 2 * 1.96 * 10 / sqrt(50) wide.
    assert high - low == pytest.approx(2 * 1.96 * sample.std() / math.sqrt(50), rel=0.1)
    assert bootstrap_interval([sample], np.mean).tolist() == [low, high]
    assert bootstrap_interval([sample], np.mean, seed=1).tolist() != [low, high]
    wider = bootstrap_interval([sample], np.mean, confidence=0.99)
    assert wider[0] < low < high < wider[1]


def test_interval_of_equal_returns_is_a_point():
    assert bootstrap_interval([[7.0, 7.0, 7.0]], iqm).tolist() == [7.0, 7.0]


@pytest.mark.parametrize("function", [iqm, lambda values: bootstrap_interval([values], iqm), summary])
@pytest.mark.parametrize("values", [[], [1.0, float("nan")], [float("inf")]])
def test_missing_and_non_finite_values_are_refused(function, values):
    with pytest.raises(ValueError, match="statistics need"):
        function(values)


def test_bad_confidence_is_refused():
    with pytest.raises(ValueError, match="confidence"):
        bootstrap_interval([[1.0]], iqm, confidence=95)


def test_summary_and_its_line():
    result = summary([2.0, 4.0, 4.0, 4.0, 5.0, 5.0, 7.0, 9.0], [1.0, 2.0] * 4)
    assert result["mean"] == 5.0
    assert result["std"] == 2.0  # the population deviation
    assert (result["min"], result["max"], result["episodes"], result["loops"]) == (2.0, 9.0, 8, 1.5)
    assert result["iqm"] == 4.5
    assert result["low"] <= result["iqm"] <= result["high"]
    assert "loops" not in summary([1.0])

    line = format_summary(
        {"mean": 812.42, "std": 35.1, "iqm": 820.0, "low": 790.0, "high": 838.0}
        | {"min": 700.0, "max": 900.0, "episodes": 20, "loops": 1.8}
    )
    assert line == (
        "return 812.4 +- 35.1 (IQM 820.0, 95 % interval [790.0, 838.0]) over 20 episodes | loops 1.8"
    )
    assert format_summary(summary([0.5])) == (
        "return 0.500 +- 0.000 (IQM 0.500, 95 % interval [0.500, 0.500]) over 1 episode"
    )

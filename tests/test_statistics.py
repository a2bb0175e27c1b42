"""Evaluation statistics against answers worked out by hand."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.evaluation.statistics import (
    aggregate_intervals,
    bootstrap_interval,
    count_at_least,
    format_summary,
    improvement_interval,
    iqm,
    paired_interval,
    performance_profile,
    standard_error,
    summary,
)

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
    low, high = bootstrap_interval(sample, np.mean)
    assert low < sample.mean() < high
    # A mean of 50 values with deviation 10: about 2 * 1.96 * 10 / sqrt(50) wide.
    assert high - low == pytest.approx(2 * 1.96 * sample.std() / math.sqrt(50), rel=0.1)
    assert bootstrap_interval(sample, np.mean) == (low, high)
    assert bootstrap_interval(sample, np.mean, seed=1) != (low, high)
    wider = bootstrap_interval(sample, np.mean, confidence=0.99)
    assert wider[0] < low < high < wider[1]


def test_interval_of_equal_returns_is_a_point():
    assert bootstrap_interval([7.0, 7.0, 7.0]) == (7.0, 7.0)


def test_a_standard_error_counts_what_is_alike_once():
    rng = np.random.default_rng(0)
    independent = rng.normal(size=200)
    plain = independent.std(ddof=1) / 200**0.5
    assert standard_error(independent, np.arange(200)) == pytest.approx(plain)
    repeated = np.tile(independent, 5)
    assert standard_error(repeated, np.tile(np.arange(200), 5)) == pytest.approx(plain)
    assert standard_error(repeated, np.arange(1000)) < 0.5 * plain  # what it would be if they were not the same
    assert np.isnan(standard_error([1.0, 2.0], [3, 3]))


@pytest.mark.parametrize("function", [iqm, bootstrap_interval, summary])
@pytest.mark.parametrize("values", [[], [1.0, float("nan")], [float("inf")]])
def test_missing_and_non_finite_values_are_refused(function, values):
    with pytest.raises(ValueError, match="statistics need"):
        function(values)


def test_bad_confidence_is_refused():
    with pytest.raises(ValueError, match="confidence"):
        bootstrap_interval([1.0], confidence=95)


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
    assert line == ("return 812.4 +- 35.1 (IQM 820.0, 95 % interval [790.0, 838.0]) over 20 episodes | loops 1.8")
    assert format_summary(summary([0.5])) == (
        "return 0.500 +- 0.000 (IQM 0.500, 95 % interval [0.500, 0.500]) over 1 episode"
    )


# --- over tasks


def test_a_performance_profile_is_the_share_of_runs_above_each_score():
    scores = {"a": [0.2, 0.4], "b": [0.4, 1.5]}
    found = performance_profile(scores, [0.0, 0.2, 0.3, 0.4, 1.0, 1.5])
    assert found.tolist() == [1.0, 0.75, 0.75, 0.25, 0.25, 0.0]  # above, and not at
    pooled = np.array([0.2, 0.4, 0.4, 1.5])
    limits = np.linspace(-1.0, 2.0, 50)
    assert performance_profile(scores, limits) == pytest.approx([(pooled > limit).mean() for limit in limits])


def test_every_task_weighs_the_same_in_a_profile():
    assert performance_profile({"a": [1.0], "b": [0.0, 0.0, 0.0]}, [0.5]) == pytest.approx([0.5])


@pytest.mark.parametrize(("scores", "limits"), [({}, [0.5]), ({"a": []}, [0.5]), ({"a": [math.nan]}, [0.5]),
                                                ({"a": [1.0]}, [math.nan])])  # fmt: skip
def test_a_profile_of_nothing_is_refused(scores, limits):
    with pytest.raises(ValueError, match="statistics need"):
        performance_profile(scores, limits)


def test_ties_count_for_at_least_and_tasks_of_one_side_not_at_all():
    assert count_at_least({"a": 1.0, "b": 2.0, "c": 3.0}, {"a": 1.0, "b": 5.0, "d": 0.0}) == (1, 2)
    assert count_at_least({"a": 1.0}, {}) == (0, 0)


# --- intervals over five seeds: how often do they hold what they should?


def gaussian(rng, *shape):
    return rng.normal(size=shape)


def skewed(rng, *shape):
    return rng.gamma(2.0, size=shape)


def bimodal(rng, *shape):
    """Three runs in ten learn nothing."""
    return np.where(rng.random(shape) < 0.3, 0.0, 3.0) + 0.3 * rng.normal(size=shape)


@pytest.mark.parametrize(
    ("draw", "least"),
    [(gaussian, {"iqm": 0.94, "mean": 0.94}), (skewed, {"iqm": 0.94, "mean": 0.9}),
     (bimodal, {"iqm": 0.85, "mean": 0.8})],
)  # fmt: skip
def test_intervals_of_five_seeds_cover_the_truth(draw, least):
    rng = np.random.default_rng(0)
    many = np.sort(draw(rng, 1_000_000))
    truth = {"mean": many.mean(), "iqm": many[250_000:750_000].mean()}
    covered = dict.fromkeys(least, 0)
    samples = draw(rng, 1000, 5)
    for sample in samples:
        intervals = aggregate_intervals({"task": sample})
        for name in least:
            low, high = intervals[name]
            covered[name] += low <= truth[name] <= high
    for name, share in least.items():
        assert covered[name] / len(samples) >= share, name


def test_intervals_over_tasks_cover_the_truth():
    rng, levels, spreads = np.random.default_rng(1), np.array([[0.0], [1.0], [2.0]]), np.array([[0.2], [2.0], [0.5]])
    many = np.sort((levels + spreads * rng.normal(size=(3, 300_000))).ravel())
    truth = {"mean": levels.mean(), "iqm": many[225_000:675_000].mean()}
    samples = levels + spreads * rng.normal(size=(1000, 3, 5))
    intervals = [aggregate_intervals(dict(zip("abc", sample, strict=True))) for sample in samples]
    for name, value in truth.items():
        assert np.mean([ends[name][0] <= value <= ends[name][1] for ends in intervals]) >= 0.94, name


@pytest.mark.parametrize("tasks", [1, 3])
def test_equal_algorithms_are_rarely_told_apart(tasks):
    """Every order in which the ten runs of a task can end is equally likely, so the rate of false verdicts is exact,
    and the same for all distributions without ties: normal, skewed or bimodal."""
    orders = {}  # {Mann-Whitney's U: the ranks of the first five runs, for each order}
    for first in itertools.combinations(range(10), 5):
        orders.setdefault(sum(first) - 10, []).append(first)
    share = np.array([len(orders[u]) for u in range(26)]) / 252
    chances = share
    for _ in range(tasks - 1):
        chances = np.convolve(chances, share)  # of the sum of U over tasks
    false = 0.0
    for total, chance in enumerate(chances):
        parts = [(total + task) // tasks for task in range(tasks)]  # any split will do: the mean decides
        one = {task: orders[u][0] for task, u in enumerate(parts)}
        other = {task: [rank for rank in range(10) if rank not in one[task]] for task in one}
        low, high = improvement_interval(one, other)
        false += chance * (not low <= 0.5 <= high)
    assert 0.03 < false <= 0.06


@pytest.mark.parametrize("distance", [0.5, 1.0, 2.0, 3.0])
def test_the_chance_of_improvement_is_covered(distance):
    rng, covered = np.random.default_rng(3), 0
    truth = 0.5 * (1.0 + math.erf(distance / 2.0))
    for one, other in zip(distance + gaussian(rng, 1000, 5), gaussian(rng, 1000, 5), strict=True):
        low, high = improvement_interval({"task": one}, {"task": other})
        covered += low <= truth <= high
    assert covered / 1000 >= 0.94


def test_paired_differences_are_covered():
    rng, covered = np.random.default_rng(4), 0
    for one, other in zip(3.0 + gaussian(rng, 1000, 5, 2), 2.0 * gaussian(rng, 1000, 5, 2), strict=True):
        finals = [[dict(enumerate(run)) for run in side] for side in (one, other)]
        low, high = paired_interval([tuple(finals)])
        covered += low <= 3.0 <= high
    assert covered / 1000 >= 0.94

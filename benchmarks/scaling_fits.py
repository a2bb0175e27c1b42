"""Numbers of the scaling study: power laws, ratios and equal errors, with intervals over training seeds.

Errors of one net are {seed: error}. Errors are averaged and compared as logarithms. All intervals over seeds are
Student's, of 95 %: one value per seed, for nets that all have the same seeds. Where they do not, or have one seed,
there is no interval, and both its ends are NaN. (A bootstrap of three seeds covers the truth in 80 % of cases.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

RESAMPLES = 1000
NAN = float("nan")

Errors = Mapping[int, float]
"""{seed: error} of one net, in any order."""


class Interval(NamedTuple):
    """A value and its 95 % interval. An end may be infinite, or NaN when nothing is known of it."""

    value: float
    low: float = NAN
    high: float = NAN


class PowerLaw(NamedTuple):
    """error ~ x ** -exponent. spread: standard deviation of the log errors about the line; points: how many nets."""

    exponent: Interval
    spread: float
    points: int


class Equal(NamedTuple):
    """The size at which a family of nets has an error. where: inside of its range, beyond its largest net (the size is
    then that net's, and the true one is larger), or below its smallest one (the true one is smaller)."""

    size: float
    where: str


def middle(errors: Errors) -> float:
    """Geometric mean over seeds."""
    return float(np.exp(np.log(list(errors.values())).mean()))


def slope(x: np.ndarray, y: np.ndarray) -> float:
    """Of the straight line through log y over log x, (P,) each."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def by_seed(nets: Sequence[Errors]) -> np.ndarray | None:
    """(S, P) errors of P nets that have the same S seeds, at least two; None where their seeds differ."""
    seeds = sorted(nets[0])
    if len(seeds) < 2 or any(net.keys() != nets[0].keys() for net in nets):
        return None
    return np.array([[net[seed] for net in nets] for seed in seeds])


def percentiles(values: Sequence[float]) -> tuple[float, float]:
    """The middle 95 %; values may be infinite."""
    low, high = np.quantile(np.asarray(values), (0.025, 0.975), method="inverted_cdf")
    return float(low), float(high)


def power_law(x: Sequence[float], nets: Sequence[Errors]) -> PowerLaw | None:
    """Fitted to P nets of size x (P,), its interval over seeds; None when there are not two sizes."""
    size, error = np.asarray(x, float), np.array([middle(errors) for errors in nets])
    if len(np.unique(size)) < 2:
        return None
    exponent = -slope(size, error)
    line = np.polyval(np.polyfit(np.log(size), np.log(error), 1), np.log(size))
    spread = float(np.std(np.log(error) - line))
    seeds = by_seed(nets)
    if seeds is None:
        return PowerLaw(Interval(exponent), spread, len(size))
    return PowerLaw(student(np.array([-slope(size, errors) for errors in seeds])), spread, len(size))


def student(values: np.ndarray) -> Interval:
    """Mean of one value per seed (S,), with Student's interval."""
    mean, count = float(values.mean()), len(values)
    if count < 2:
        return Interval(mean)
    half = float(stats.t.ppf(0.975, count - 1) * values.std(ddof=1) / count**0.5)
    return Interval(mean, mean - half, mean + half)


def ratio(one: np.ndarray, other: np.ndarray) -> Interval:
    """one / other, (S,) each in the same order of seeds, with the interval over seeds."""
    return Interval(*(float(np.exp(part)) for part in student(np.log(one / other))))


def ratio_over_episodes(one: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """The interval of the same ratio over held-out episodes, by bootstrap: errors (S, E) each, seeds as they are."""
    count = one.shape[1]
    if count < 2:
        return NAN, NAN
    picks = np.random.default_rng(0).integers(0, count, (RESAMPLES, count))
    # (S, E) -> (S, RESAMPLES)
    means = [errors[:, picks].mean(-1) for errors in (one, other)]
    return percentiles(np.exp(np.log(means[0] / means[1]).mean(0)).tolist())


def growth(x: Sequence[float], ratios: np.ndarray) -> Interval:
    """b of ratio ~ x ** b, where ratios (S, P) are of P values of x; its interval over seeds."""
    return student(np.array([slope(np.asarray(x, float), row) for row in ratios]))


def size_at(sizes: Sequence[float], errors: Sequence[float] | np.ndarray, wanted: float) -> Equal:
    """Where a family of nets reaches an error, between its nets along straight lines of log error over log size.

    A net that is worse than a smaller one counts as that smaller one.
    """
    order = np.argsort(sizes)
    size, best = np.asarray(sizes, float)[order], np.minimum.accumulate(np.asarray(errors, float)[order])
    if wanted >= best[0]:
        return Equal(float(size[0]), "inside" if wanted == best[0] else "below")
    if wanted < best[-1]:
        return Equal(float(size[-1]), "beyond")
    at = int(np.argmax(best <= wanted))  # the first that is good enough
    log_size, log_best = np.log(size[at - 1 : at + 1]), np.log(best[at - 1 : at + 1])
    part = (np.log(wanted) - log_best[0]) / (log_best[1] - log_best[0])
    return Equal(float(np.exp(log_size[0] + part * (log_size[1] - log_size[0]))), "inside")


def equal_size(sizes: Sequence[float], family: Sequence[Errors], net: Errors) -> tuple[Interval, str]:
    """The size at which the family is as good as the net, and where that lies; its interval over seeds.

    The upper end is infinite where the net of a seed is better than the family's largest net of that seed, the lower
    end 0 where it is worse than the smallest one; both, where that is so for every seed.
    """
    found = size_at(sizes, [middle(errors) for errors in family], middle(net))
    seeds = by_seed([*family, net])
    if seeds is None:
        return Interval(found.size), found.where
    each = [size_at(sizes, errors[:-1], float(errors[-1])) for errors in seeds]
    half = student(np.log([size for size, _ in each]))
    places, spread = {where for _, where in each}, float(np.exp(half.high - half.value))
    low = 0.0 if "below" in places else float("inf") if places == {"beyond"} else found.size / spread
    high = float("inf") if "beyond" in places else 0.0 if places == {"below"} else found.size * spread
    return Interval(found.size, low, high), found.where


def between(x: Sequence[float], errors: Sequence[float], wanted: float) -> float:
    """Error at the size `wanted`, along straight lines of log error over log size; NaN outside of the sizes."""
    order = np.argsort(x)
    log_x, log_error = np.log(np.asarray(x, float)[order]), np.log(np.asarray(errors, float)[order])
    return float(np.exp(np.interp(np.log(wanted), log_x, log_error, left=NAN, right=NAN)))

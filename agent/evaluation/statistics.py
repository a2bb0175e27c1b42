"""Statistics of returns: over the episodes of one agent, and over the seeds and tasks of an algorithm.

Everything here works on plain numbers. Of one agent they are one per episode, in the units of the task's reward.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

Numbers = Sequence[float] | np.ndarray


def _finite(values: Numbers) -> np.ndarray:
    """Return `values` as a flat float64 array; ValueError when it is empty or holds NaN or infinity."""
    array = np.asarray(values, dtype=np.float64).ravel()
    if array.size == 0:
        raise ValueError("statistics need at least one value")
    if not np.isfinite(array).all():
        # Sorting puts NaN last, where the interquartile mean would cut it off unseen.
        raise ValueError("statistics need finite values, got NaN or infinity")
    return array


def iqm(values: Numbers) -> float:
    """Interquartile mean: the mean of the middle half.

    floor(N / 4) of the `values` (N,) are dropped at each end, so up to three values this is the plain mean. Less noisy
    than the mean when a few episodes fail, and it uses more of them than the median.
    Raises ValueError when `values` is empty or not finite.
    """
    return float(stats.trim_mean(_finite(values), 0.25))


def bootstrap_interval(
    samples: Sequence[Numbers],
    statistic: Callable[..., Any],
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> np.ndarray:
    """Percentile bootstrap interval of `statistic(*samples)`.

    Every sample (N_i,) is drawn N_i at a time with replacement, `resamples` times; the interval cuts off
    (1 - confidence) / 2 of the resulting statistics at each side. The same `seed` gives the same interval.
    Returns (2, ...): the low and high end for each number that the statistic returns.
    Raises ValueError for empty or non-finite samples, or a confidence outside (0, 1).
    """
    arrays = [_finite(sample) for sample in samples]
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}")
    if resamples < 1:
        raise ValueError(f"resamples must be positive, got {resamples}")
    sizes = [array.size for array in arrays]
    rng, ends = np.random.default_rng(seed), np.cumsum(sizes)[:-1]
    # (resamples, N_1 + N_2 + ..): positions within each sample
    picks = rng.integers(0, np.repeat(sizes, sizes), size=(resamples, sum(sizes)))
    results = []
    for row in picks:
        drawn = [array[pick] for array, pick in zip(arrays, np.split(row, ends), strict=True)]
        results.append(statistic(*drawn))
    tail = 50.0 * (1.0 - confidence)
    return np.percentile(results, [tail, 100.0 - tail], axis=0)


def summary(returns: Numbers, loops: Numbers | None = None) -> dict[str, float]:
    """Describe an evaluation of N episodes.

    `returns` (N,) are undiscounted episode returns, `loops` (N,) the mean number of loops per step of
    each episode. Keys: mean, std (of these episodes: divided by N, not N - 1), iqm, low and high
    (95 % bootstrap interval of the iqm), min, max, episodes, and loops when it was given.
    Raises ValueError for empty or non-finite input.
    """
    array = _finite(returns)
    low, high = bootstrap_interval([array], iqm).tolist()
    result = {
        "mean": float(array.mean()),
        "std": float(array.std()),
        "iqm": iqm(array),
        "low": low,
        "high": high,
        "min": float(array.min()),
        "max": float(array.max()),
        "episodes": array.size,
    }
    if loops is not None:
        result["loops"] = float(_finite(loops).mean())
    return result


def format_summary(result: dict[str, float]) -> str:
    """Write the dictionary that `summary` made as one line.

    For example: return 812.4 +- 35.1 (IQM 820.0, 95 % interval [790.0, 838.0]) over 20 episodes | loops 1.8
    """
    largest = max(abs(result["min"]), abs(result["max"]))
    digits = 1 if largest >= 10 else 3  # toy tasks return at most 1

    def text(key: str) -> str:
        return f"{result[key]:.{digits}f}"

    episodes = int(result["episodes"])
    line = (
        f"return {text('mean')} +- {text('std')} "
        f"(IQM {text('iqm')}, 95 % interval [{text('low')}, {text('high')}]) "
        f"over {episodes} episode{'' if episodes == 1 else 's'}"
    )
    if "loops" in result:
        line += f" | loops {result['loops']:.1f}"
    return line


# ---------------------------------------------------------------------- over runs and tasks

Scores = Mapping[str, Numbers]
"""{task: one score per training seed}: the runs of one algorithm, in units that tasks share (1 = solved)."""

FEWEST_SEEDS = 5
"""Below this many seeds of a task no interval is given: the bootstrap of three numbers says nothing."""


def aggregates(scores: Scores) -> dict[str, float]:
    """Mean, median, IQM and optimality gap of the runs of one algorithm (Agarwal et al. 2021, as rliable has them).

    mean and median are over the tasks' means, with a single task the median is over its runs; the IQM is over all runs
    of all tasks; the optimality gap is 1 - mean(min(score, 1)) over all runs. Raises ValueError for empty or non-finite
    scores.
    """
    rows = {task: _finite(values) for task, values in scores.items()}
    if not rows:
        raise ValueError("statistics need at least one task")
    means, every = np.array([row.mean() for row in rows.values()]), np.concatenate(list(rows.values()))
    return {
        "mean": float(means.mean()),
        "median": float(np.median(means if len(means) > 1 else every)),
        "iqm": iqm(every),
        "optimality_gap": float(1.0 - np.minimum(every, 1.0).mean()),
    }


def stratified_intervals(scores: Scores, **bootstrap: Any) -> dict[str, tuple[float, float]]:
    """Percentile bootstrap intervals of `aggregates`: seeds are drawn with replacement within each task.

    bootstrap: confidence, resamples and seed of `bootstrap_interval`. Empty where a task has fewer than `FEWEST_SEEDS`
    seeds. Raises ValueError as `aggregates`.
    """
    rows = {task: _finite(values) for task, values in scores.items()}
    if not rows or min(row.size for row in rows.values()) < FEWEST_SEEDS:
        return {}

    def statistic(*drawn: np.ndarray) -> list[float]:
        return list(aggregates(dict(zip(rows, drawn, strict=True))).values())

    low, high = bootstrap_interval(list(rows.values()), statistic, **bootstrap)
    return {name: (float(low[i]), float(high[i])) for i, name in enumerate(aggregates(rows))}


def probability_of_improvement(one: Scores, other: Scores) -> float:
    """Chance that a run of `one` scores higher than a run of `other`, ties half, mean over the tasks both have.

    Mann-Whitney's U over the number of pairs (Agarwal et al. 2021). Raises ValueError without a common task.
    """
    tasks = [task for task in one if task in other]
    if not tasks:
        raise ValueError("the probability of improvement needs a task that both have")
    chances = []
    for task in tasks:
        x, y = _finite(one[task])[:, None], _finite(other[task])[None, :]
        chances.append(float(((x > y) + 0.5 * (x == y)).mean()))
    return float(np.mean(chances))


def improvement_interval(one: Scores, other: Scores, **bootstrap: Any) -> tuple[float, float] | None:
    """Percentile bootstrap interval of `probability_of_improvement`; None below `FEWEST_SEEDS` seeds of a task."""
    tasks = [task for task in one if task in other]
    samples = [_finite(scores[task]) for scores in (one, other) for task in tasks]
    if not tasks or min(sample.size for sample in samples) < FEWEST_SEEDS:
        return None

    def statistic(*drawn: np.ndarray) -> float:
        x, y = (dict(zip(tasks, side, strict=True)) for side in (drawn[: len(tasks)], drawn[len(tasks) :]))
        return probability_of_improvement(x, y)

    low, high = bootstrap_interval(samples, statistic, **bootstrap).tolist()
    return low, high


def paired_difference(one: Sequence[Mapping[int, float]], other: Sequence[Mapping[int, float]]) -> float | None:
    """Mean over the evaluation episodes that all runs played of (mean of `one` - mean of `other`).

    Each run is {seed of the episode: return}. Pairing takes away that some start states are worth more than
    others. None where no episode is common to all runs.
    """
    runs = [*one, *other]
    common = set.intersection(*(set(run) for run in runs)) if runs else set()
    if not common or not one or not other:
        return None
    mean = [np.mean([[run[episode] for episode in sorted(common)] for run in side], axis=0) for side in (one, other)]
    return float((mean[0] - mean[1]).mean())


Finals = Sequence[Mapping[int, float]]
"""{seed of the episode: return} of each run."""


def paired_interval(tasks: Sequence[tuple[Finals, Finals]], **bootstrap: Any) -> tuple[float, float] | None:
    """Percentile bootstrap interval of the mean over tasks of `paired_difference`: the runs of either side are drawn
    anew within each task. None below `FEWEST_SEEDS` runs, or where a task has no common episode."""
    samples = []
    for one, other in tasks:
        common = sorted(set.intersection(*(set(run) for run in [*one, *other])))
        if not common or min(len(one), len(other)) < FEWEST_SEEDS:
            return None
        samples += [np.array([np.mean([run[episode] for episode in common]) for run in side]) for side in (one, other)]
    if not samples:
        return None

    def statistic(*drawn: np.ndarray) -> float:
        means = [sample.mean() for sample in drawn]
        return float(np.mean(np.subtract(means[::2], means[1::2])))

    low, high = bootstrap_interval(samples, statistic, **bootstrap).tolist()
    return low, high

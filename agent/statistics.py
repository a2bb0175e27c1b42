"""Statistics of evaluation returns: interquartile mean, bootstrap interval, one-line summary.

Everything here works on plain numbers, one per episode, in the units of the task's reward.
"""

from collections.abc import Callable, Sequence

import numpy as np

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

    `values` (N,) are sorted and floor(N / 4) of them dropped at each end, so up to three values this
    is the plain mean. Less noisy than the mean when a few episodes fail, less blind than the median.
    Raises ValueError when `values` is empty or not finite.
    """
    array = np.sort(_finite(values))
    drop = array.size // 4
    return float(array[drop : array.size - drop].mean())


def bootstrap_interval(
    values: Numbers,
    statistic: Callable[[np.ndarray], float] = iqm,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval (low, high) of `statistic` over episodes.

    `values` (N,) are drawn N at a time with replacement, `resamples` times; the interval cuts off
    (1 - confidence) / 2 of the resulting statistics at each side. The same `seed` gives the same
    interval. It speaks about the episodes of one trained agent and not about other training seeds.
    Raises ValueError for empty or non-finite values, or a confidence outside (0, 1).
    """
    array = _finite(values)
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}")
    if resamples < 1:
        raise ValueError(f"resamples must be positive, got {resamples}")
    picks = np.random.default_rng(seed).integers(0, array.size, size=(resamples, array.size))
    results = [statistic(sample) for sample in array[picks]]
    tail = 50.0 * (1.0 - confidence)
    low, high = np.percentile(results, [tail, 100.0 - tail])
    return float(low), float(high)


def summary(returns: Numbers, loops: Numbers | None = None) -> dict[str, float]:
    """Describe an evaluation of N episodes.

    `returns` (N,) are undiscounted episode returns, `loops` (N,) the mean number of loops per step of
    each episode. Keys: mean, std (of these episodes: divided by N, not N - 1), iqm, low and high
    (95 % bootstrap interval of the iqm), min, max, episodes, and loops when it was given.
    Raises ValueError for empty or non-finite input.
    """
    array = _finite(returns)
    low, high = bootstrap_interval(array)
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

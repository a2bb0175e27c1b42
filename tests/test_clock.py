"""benchmarks/clock.py: what is learned after so many minutes, and when a return is reached."""

from pathlib import Path

import numpy as np
from conftest import benchmark

from agent.runs.run_record import RunRecord


def record(agent, returns, seconds):
    """One evaluation of two episodes every 1,000 steps, logged at these seconds."""
    steps = 1000 * (1 + np.arange(len(returns)))
    evaluations = {int(step): {0: value - 1.0, 1: value + 1.0} for step, value in zip(steps, returns, strict=True)}
    settings = {"agent": agent, "seed": 3}
    return RunRecord(Path(agent), "dmc:a", settings, {}, evaluations, [], (steps, np.array(seconds)))


def test_the_table_holds_the_last_evaluation_by_each_minute_and_the_first_that_reaches_the_return():
    clock = benchmark("clock")
    runs = [record("sac", [10.0, 20.0, 30.0], [50.0, 100.0, 150.0]), record("dreamer", [5.0, 40.0], [60.0, 180.0])]
    assert clock.table(runs, [1.0, 2.0, 3.0], 20.0)[2:] == [
        "| dmc:a | dreamer | 3 | 5 | 5 | 40 | 2,000 | 3.0 |",
        "| dmc:a | sac | 3 | 10 | 20 | 30 | 3,000 | 1.7 |",
    ]
    assert clock.table(runs, [0.5], None)[3] == "| dmc:a | sac | 3 |  | 3,000 |"
    assert clock.reached(runs[0], 31.0) is None
    assert [(row["step"], row["minutes"], row["return"]) for row in clock.rows_of(runs[1:])] == [
        (1000, "1.000", "5"),
        (2000, "3.000", "40"),
    ]

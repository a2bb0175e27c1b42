"""benchmarks/suite_curves.py: medians over seeds, and a panel for each task."""

import pytest
from conftest import benchmark


def test_the_table_holds_medians_over_seeds_beside_published_returns(tmp_path):
    module = benchmark("suite_curves")
    for seed, shift in ((10, 0.0), (11, 30.0), (12, 6.0)):
        rows = [f"{step},0,1,{step / 1000 + shift + noise},500,1.0" for step in (10000, 100000) for noise in (-1, 1)]
        text = "\n".join(["step,episode,seed,return,length,mean_loops", *rows])
        (tmp_path / f"walker_walk-s{seed}.csv").write_text(text + "\n")
    (tmp_path / "cheetah_run-s10.csv").write_text("step,episode,seed,return,length,mean_loops\n10000,0,1,5,1,1\n")
    curves = module.read(tmp_path)
    header, _, cheetah, walker = module.table(curves)
    assert header.startswith("| | seeds | 10k | 100k | DreamerV3")
    assert cheetah.startswith("| cheetah_run | 1 | 5 |  | 297")
    assert walker.startswith("| walker_walk | 3 | 16 | 106 | 478")
    assert module.over_tasks(curves)[2:] == [
        "| mean of 1 | 106 | 478 | 962 | 963 |",
        "| median of 1 | 106 | 478 | 962 | 963 |",
        "| interquartile mean of 1 | 106 | 478 | 962 | 963 |",
        "| tasks on which this agent is at least as good | | 0 | 0 | 0 |",
    ]
    figure = module.draw(curves)
    titles = [axis.get_title() for axis in figure.axes]
    assert titles[:2] == ["cheetah_run", "walker_walk"]
    assert len(figure.axes[1].lines) == 3 + 3


def test_a_curve_is_the_mean_of_each_evaluation(tmp_path):
    module = benchmark("suite_curves")
    (tmp_path / "a-s1.csv").write_text("step,return\n1,2\n1,4\n2,8\n")
    assert module.read(tmp_path) == {"a": {1: {1: pytest.approx(3.0), 2: pytest.approx(8.0)}}}

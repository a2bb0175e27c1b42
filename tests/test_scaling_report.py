"""The report of benchmarks/scaling.py: fits of known laws, tables of made-up rows, pictures."""

import sys

import numpy as np
import pytest
from conftest import ROOT

from agent.errors import UsageError

sys.path.insert(0, str(ROOT / "benchmarks"))  # as when the command is started
import scaling_fits as fits
import scaling_nets as nets
import scaling_report as report

# ---------------------------------------------------------------------- fits


def of_seeds(errors):
    """{seed: error}, seeds from 0 on."""
    return dict(enumerate(np.atleast_1d(errors)))


def test_exponents_of_known_power_laws_are_recovered():
    rng, x = np.random.default_rng(0), np.array([1e3, 4e3, 2e4, 9e4])
    exact = fits.power_law(x, [of_seeds(3.0 * size**-0.7) for size in x])
    assert exact.exponent.value == pytest.approx(0.7)
    assert np.isnan(exact.exponent.low)
    noisy = fits.power_law(x, [of_seeds(3.0 * size**-0.7 * np.exp(0.05 * rng.normal(size=5))) for size in x])
    assert noisy.exponent.low < 0.7 < noisy.exponent.high
    assert 0.0 < noisy.exponent.high - noisy.exponent.low < 0.1
    other = fits.power_law(x, [of_seeds(np.full(3 if size > 2e4 else 2, 3.0 * size**-0.7)) for size in x])
    assert np.isnan(other.exponent.low)  # other seeds for one of the nets
    assert fits.power_law([10, 10], [of_seeds(np.ones(2))] * 2) is None


def test_fits_pair_nets_by_seed_whatever_the_order_of_their_rows():
    """Cells of two processes arrive in any order. Each seed has its own level, and the same exponent."""
    small, large = {1: 1.0, 2: 2.0, 3: 4.0}, {3: 2.0, 1: 0.5, 2: 1.0}
    law = fits.power_law([100, 400], [small, large]).exponent
    assert law == pytest.approx((0.5, 0.5, 0.5))
    size, _ = fits.equal_size([100, 400], [small, large], {2: 2.0**0.5, 3: 2.0**1.5, 1: 0.5**0.5})
    assert size == pytest.approx((200, 200, 200))
    others = {4: 0.5, 5: 1.0, 6: 2.0}
    assert np.isnan(fits.power_law([100, 400], [small, others]).exponent.low)
    assert np.isnan(fits.equal_size([100, 400], [small, others], small)[0].low)


def test_the_size_of_equal_error_is_interpolated_and_marked_where_it_is_not_reached():
    sizes, errors = [100, 1000, 10_000], [1.0, 0.1, 0.01]
    assert fits.size_at(sizes, errors, 0.1) == (pytest.approx(1000), "inside")
    assert fits.size_at(sizes, errors, 0.1**1.5) == (pytest.approx(10**3.5), "inside")
    assert fits.size_at(sizes, errors, 0.005) == (10_000, "beyond")
    assert fits.size_at(sizes, errors, 2.0) == (100, "below")
    assert fits.size_at([100, 1000, 10_000], [1.0, 3.0, 0.01], 0.1) == (pytest.approx(10**3.5), "inside")


def test_intervals_at_equal_error_may_be_open():
    family = [of_seeds([1.0, 1.1]), of_seeds([0.1, 0.11])]
    size, where = fits.equal_size([100, 1000], family, of_seeds([0.09, 0.3]))
    assert where == "inside"
    assert 0 < size.low < size.value < 1000
    assert size.high == np.inf


def test_intervals_of_three_seeds_hold_the_truth_as_often_as_they_say():
    """A bootstrap of three seeds holds it in four of five cases."""
    rng, x = np.random.default_rng(1), np.array([1e3, 4e3, 2e4])
    held = {"exponent": 0, "size": 0}
    for _ in range(400):
        family = [of_seeds(10.0 * size**-0.7 * np.exp(0.1 * rng.normal(size=3))) for size in x]
        law = fits.power_law(x, family).exponent
        held["exponent"] += law.low <= 0.7 <= law.high
        size, _ = fits.equal_size(x, family, of_seeds(10.0 * 6e3**-0.7 * np.exp(0.1 * rng.normal(size=3))))
        held["size"] += size.low <= 6e3 <= size.high
    assert all(count / 400 > 0.92 for count in held.values()), held
    assert held["exponent"] < 0.98 * 400


def test_ratios_are_paired_by_seed_and_by_episode():
    one, other = np.array([2.0, 8.0, 4.0]), np.array([1.0, 4.0, 2.0])
    assert fits.ratio(one, other) == pytest.approx((2.0, 2.0, 2.0))
    assert np.isnan(fits.ratio(one[:1], other[:1]).low)
    episodes = np.array([[1.0, 2.0, 30.0]])
    assert fits.ratio_over_episodes(3.0 * episodes, episodes) == pytest.approx((3.0, 3.0))
    assert fits.growth([1, 4, 16], np.array([[1.0, 2.0, 4.0]] * 3)) == pytest.approx((0.5, 0.5, 0.5))


# ---------------------------------------------------------------------- the report


def made_up(core, width, loops, k, params, flops, error, seeds=(0, 1, 2), match="none", share="1"):
    values = {"data": "made", "task": "t", "core": core, "match": match, "width": width, "loops": loops, "k": k}
    values |= {"share": share, "params": params, "flops": flops, "pairs": round(1000 * float(share)), "seconds": 60}
    return [
        {name: str(value) for name, value in values.items()}
        | {"seed": str(seed), "test_error": str(error * 1.01**seed), "episodes": f"{error} {error}"}
        for seed in seeds
    ]


def surface():
    """error = params^-0.5 * loops^-(k / 16)."""
    rows = []
    for k in (1, 16):
        for width in (10, 100, 1000):
            for loops in (1, 4):
                error = width**-1.0 * loops ** -(k / 16)
                rows += made_up("looped", width, loops, k, width**2, width**2 * loops, error)
    return rows


def test_the_tables_say_what_the_rows_hold():
    found, diverged = nets.nets_of([*surface(), *made_up("looped", 10, 8, 1, 100, 100, float("nan"))])
    assert diverged == 3
    gain = {(row["k"], row["width"]): row for row in report.gain_rows(found)}
    assert gain[16, 100]["gain"] == pytest.approx(4.0)
    assert gain[1, 100]["gain"] == pytest.approx(4.0 ** (1 / 16))
    assert report.growth_of(found, "made", 10, 4).value == pytest.approx(np.log(4 ** (15 / 16)) / np.log(16))
    replaced = {(row["k"], row["width"]): row for row in report.replaced_rows(found)}
    assert replaced[16, 10]["times"] == pytest.approx(16.0)
    assert replaced[16, 1000]["where"] == "beyond"
    laws = {(row["k"], row["axis"], row["family"]): row["value"] for row in report.exponent_rows(found)}
    assert laws[1, "parameters", "looped, T=4"] == pytest.approx(0.5)
    assert laws[16, "loops", "looped, width 100"] == pytest.approx(1.0)


def test_controls_are_compared_with_their_looped_net():
    rows = [*surface(), *made_up("stacked", 10, 4, 16, 99, 9, 0.05, match="params")]
    rows += made_up("gru", 10, 1, 16, 99, 9, 0.05, match="params")
    found = report.control_rows(nets.nets_of(rows)[0])
    ratios = {(row["control"], row["loops"]): row["ratio"] for row in found}
    assert ratios == pytest.approx({("stacked", 4): 2.0, ("gru", 4): 2.0, ("gru", 1): 0.5})


def test_data_has_its_exponent():
    rows = made_up("looped", 10, 1, 1, 100, 100, 0.1) + made_up("looped", 10, 1, 1, 100, 100, 0.2, share="0.25")
    laws = [row for row in report.exponent_rows(nets.nets_of(rows)[0]) if row["axis"] == "data"]
    assert [row["value"] for row in laws] == [pytest.approx(0.5)]


def test_the_report_is_written_with_its_pictures(tmp_path):
    rows = [*surface(), *made_up("gru", 10, 1, 16, 99, 9, 0.05, match="params")]
    assert report.write_report(rows, tmp_path) == f"report: {tmp_path / 'report.md'}"
    text = (tmp_path / "report.md").read_text()
    assert "| > 1,000,000 | > 1 [beyond, beyond] | beyond the range |" in text
    for name in ("gain", "parameters", "operations", "loops"):
        assert f"({name}.png)" in text
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    for name in ("gain", "controls", "replaced", "exponents"):
        assert len((tmp_path / f"{name}.csv").read_text().splitlines()) > 1
    with pytest.raises(UsageError, match="holds no finished cell"):
        report.write_report([], tmp_path)


def test_one_seed_has_a_report_without_intervals(tmp_path):
    rows = []
    for loops, error in ((1, 0.0521), (2, 0.0249266), (4, 0.0140776)):  # exp(log(x)) is not x
        rows += made_up("looped", 10, loops, 1, 100, 100 * loops, error, seeds=(0,))
    report.write_report(rows, tmp_path)
    assert "| made | 10 | 4 | 3.7 |" in (tmp_path / "report.md").read_text()

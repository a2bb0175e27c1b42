"""Orbits of loops: known maps are recognised."""

import math

import pytest
import torch

from world_model.attack import Points
from world_model.orbits import KINDS, classify, orbits, spectral_radius

POINTS = Points(torch.tensor([[[1.0, 0.5]]] * 3, dtype=torch.float64), torch.zeros(3, 1, dtype=torch.float64))


def turn(angle, shrink=1.0):
    c, s = math.cos(angle), math.sin(angle)
    matrix = shrink * torch.tensor([[c, -s], [s, c]], dtype=torch.float64)
    return lambda x, given: x @ matrix.t()


@pytest.mark.parametrize(
    ("f", "kind", "period"),
    [
        (lambda x, given: 0.5 * x + 1.0, "fixed point", 0),
        (lambda x, given: x, "fixed point", 0),
        (lambda x, given: -x, "cycle", 2),
        (turn(2 * math.pi / 5), "cycle", 5),
        (lambda x, given: x + 1.0, "drift", 0),
        (turn(1.0), "unsettled", 0),
    ],
)
def test_known_maps_are_recognised(f, kind, period):
    found = orbits(f, POINTS)
    assert [KINDS[place] for place in found.kind] == [kind] * 3
    assert found.period.tolist() == [period] * 3
    assert found.shares()[kind] == 1.0
    assert found.states.shape == (65, 3, 2)


def test_every_sample_is_classified_by_itself():
    one, other = (orbits(f, POINTS).states[:, :1] for f in (lambda x, given: -x, lambda x, given: 0.5 * x))
    kind, period = classify(torch.cat([one, other], 1))
    assert [KINDS[place] for place in kind] == ["cycle", "fixed point"]
    assert period.tolist() == [2, 0]


@pytest.mark.parametrize("radius", [0.3, 0.9, 1.5])
def test_the_spectral_radius_is_that_of_the_jacobian_and_not_its_norm(radius):
    skew = torch.tensor([[radius, 0.0], [5.0, 0.1]], dtype=torch.float64)  # its norm is above 5
    at_zero = Points(torch.zeros_like(POINTS.state), POINTS.given)
    found = spectral_radius(lambda x, given: torch.tanh(x @ skew.t()), at_zero)
    assert found.tolist() == pytest.approx([radius] * 3, rel=1e-3)
    assert spectral_radius(turn(1.0, radius), POINTS).tolist() == pytest.approx([radius] * 3, rel=1e-6)

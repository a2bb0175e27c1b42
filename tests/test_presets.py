"""The presets and what suits the machine: every preset can be built and updated, threads are chosen."""

from dataclasses import replace

import pytest
import torch
from small import ACTIONS, SIZES, make_batch

from agent.actor_critic import ActionSpec
from agent.config import PRESETS, preset, set_threads
from agent.dreamer import Dreamer, Spaces


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_can_be_trained(name):
    config = preset(name)
    behavior = replace(config.behavior, starts=0, horizon=2)
    agent = Dreamer(config.model, behavior, config.optimizer, Spaces(SIZES, ActionSpec(ACTIONS, False)))
    before = agent.adams["world"].flat.detach().clone()
    agent.update(make_batch(agent.world, size=2, length=4))
    assert not torch.equal(before, agent.adams["world"].flat)
    assert torch.isfinite(agent.adams["world"].flat).all()


def test_base_has_tokens_that_attend_to_each_other():
    assert preset("base").model.loop.tokens > 1


def test_threads_are_taken_as_given_or_measured():
    try:
        assert set_threads(3) == torch.get_num_threads() == 3
        chosen = set_threads(0)
        assert chosen in (1, 2)
        assert torch.get_num_threads() == chosen
    finally:
        torch.set_num_threads(1)

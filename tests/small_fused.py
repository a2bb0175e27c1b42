"""Small agents whose layers are fused, shared by the tests of kernels, scans and dreams."""

import shutil
from dataclasses import replace

import pytest
import torch
from conftest import benchmark

from agent.learning.dreamer import Dreamer
from agent.runs.presets import preset
from agent.spaces import ActionSpec, Spaces

VECTOR = Spaces({"state": 5, "speed": 2}, ActionSpec(3, False))
CHOICE = Spaces({"state": 5}, ActionSpec(4, True))
IMAGE = Spaces({"image": (64, 64, 3)}, ActionSpec(2, False))
COMPILERS = "g++", "c++", "clang++"
compiler = pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="no C++ compiler")


def config_of(tokens=1, width=24, units=20, jump=1, core="looped", latents="categorical", **loop):
    """Small networks whose widths fill no vector of numbers."""
    debug = preset("debug")
    sizes = replace(debug.model.loop, tokens=tokens, width=width, units=units, **loop)
    model = replace(debug.model, loop=sizes, units=units, groups=3, classes=5, jump=jump, core=core, latents=latents)
    return replace(debug, model=model, behavior=replace(debug.behavior, units=units, jump=jump))


def by(gradient, **sizes):
    """The actor learns by this gradient."""
    config = config_of(**sizes)
    return replace(config, behavior=replace(config.behavior, actor_gradient=gradient))


def make(config, spaces):
    torch.manual_seed(0)
    agent = Dreamer(config.model, config.behavior, config.optimizer, spaces)
    if agent.world.observation_model.images:  # bfloat16 would round what differs in the last place to other numbers
        agent.world.observation_model.images.precision = "float32"
    return agent


def batch_of(agent, size=4, length=6):
    torch.manual_seed(1)
    batch = benchmark("update_time").random_batch(agent, size, length)
    first, last = torch.zeros(2, size, length, dtype=torch.bool)
    first[0, 2] = last[1, 4] = True
    start = batch.start.map(torch.clone)  # it was a view of this agent's weights
    batch = batch._replace(is_first=first, is_last=last, start=start)
    longest = agent.world.cfg.jump
    if longest == 1:
        return batch
    actions = torch.rand(size, length, longest, agent.spaces.action.size) * 2 - 1
    return batch._replace(prev_action=actions, span=torch.randint(1, longest + 1, (size, length)))


def one_update(execution, batch, seed=2):
    torch.manual_seed(seed)
    return execution.update(batch), torch.get_rng_state()


CASES = {
    "vectors": (config_of(), VECTOR),
    "widths of whole vectors": (config_of(width=32, units=48), VECTOR),
    "choices": (config_of(), CHOICE),
    "choices, through the dynamics": (by("dynamics"), CHOICE),
    "REINFORCE": (by("reinforce"), VECTOR),
    "images": (config_of(), IMAGE),
    "two tokens": (config_of(tokens=2), VECTOR),
    "more tokens than are written out": (config_of(tokens=9, width=8), CHOICE),
    "jumps": (config_of(jump=3), VECTOR),
    "jumps of choices": (config_of(jump=3), CHOICE),
    "fixed loops": (config_of(depth="fixed", exit="fixed", mean_loops=3), VECTOR),
    "free retention": (config_of(retention="free", gain="leaky"), VECTOR),
    "exits that ask the prior": (config_of(exit="kl"), VECTOR),
    "stacked layers": (config_of(core="stacked"), VECTOR),
    "gru": (config_of(core="gru"), VECTOR),
    "gru, tokens, and blocks of whole vectors": (config_of(core="gru", tokens=2, width=64, units=32), CHOICE),
    "certified": (config_of(core="certified"), VECTOR),
    "certified, a hidden width of no whole vectors": (config_of(core="certified", width=12, expand=1.9), CHOICE),
    "certified, tokens": (config_of(core="certified", tokens=2), VECTOR),
    "contracting": (config_of(core="contracting"), VECTOR),
    "simplicial latents": (config_of(latents="simplicial"), VECTOR),
    "gaussian latents": (config_of(latents="gaussian"), VECTOR),
}
MANY_TOKENS = {"two tokens", "more tokens than are written out", "certified, tokens"}
GRUS = {case for case in CASES if "gru" in case}
PLAIN_SCANS = MANY_TOKENS | GRUS | {"stacked layers", "contracting", "gaussian latents"}
"""Cases whose rows are computed one by one."""

"""Small cores, world models, batches and pictures that several test files share."""

import numpy as np
import torch
from torch import Tensor

from world_model import (
    Batch,
    CoreSizes,
    LatentState,
    LoopConfig,
    LoopedCore,
    ModelConfig,
    Posterior,
    WorldModel,
)

CORE_INPUTS = 5
SIZES = {"joints": 3, "touch": 2}
ACTIONS = 2


def make_core(seed: int = 0, double: bool = False, **settings) -> LoopedCore:
    """A small core; sizes and depth by keyword."""
    torch.manual_seed(seed)
    cfg = LoopConfig(**{"tokens": 3, "width": 8, "units": 16, "mean_loops": 3.0} | settings)
    core = LoopedCore(cfg, CoreSizes(groups=1, classes=CORE_INPUTS - 2, actions=2))
    return core.double() if double else core


def core_input(core: LoopedCore, batch: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Random deter (B, N, D) and inputs (B, I)."""
    gen = torch.Generator().manual_seed(seed)
    dtype = core.start.dtype
    deter = torch.randn(batch, core.cfg.tokens, core.cfg.width, generator=gen, dtype=dtype)
    return deter, torch.randn(batch, CORE_INPUTS, generator=gen, dtype=dtype)


def forward_at(core: LoopedCore, deter: Tensor, inputs: Tensor, depth: Tensor) -> Tensor:
    """The next deter where sample i runs depth[i] loops: read out of a run of the deepest."""
    _, trace = core(deter, inputs, int(depth.max()), core.prepare())
    x = torch.stack(trace.states)[depth, torch.arange(len(deter))]
    return core.readout(deter, x, trace.gate)


def exit_bias(core: LoopedCore, value: float) -> LoopedCore:
    with torch.no_grad():
        core.rule.state.bias.fill_(value)
    return core


def make_world(seed: int = 0, sizes: dict[str, int] | None = None, jump: int = 1, **loop) -> WorldModel:
    """A tiny world model; loop settings by keyword. Reward and exit heads are not left at zero."""
    torch.manual_seed(seed)
    loop = {"tokens": 2, "width": 8, "units": 16, "mean_loops": 2.0, "depth": "fixed"} | loop
    cfg = ModelConfig(LoopConfig(**loop), groups=3, classes=4, units=16, jump=jump)
    world = WorldModel(cfg, sizes or SIZES, ACTIONS)
    with torch.no_grad():
        world.reward.out.weight.normal_()
        if loop.get("exit", "gate") == "gate":
            world.core.rule.state.weight.normal_()
            world.core.rule.change.weight.normal_()
    return world


def make_batch(world: WorldModel, size: int = 3, length: int = 6, seed: int = 1) -> Batch:
    gen = torch.Generator().manual_seed(seed)
    off = torch.zeros(size, length, dtype=torch.bool)
    return Batch(
        {k: torch.randn(size, length, o, generator=gen) for k, o in world.obs_sizes.items()},
        torch.rand(size, length, ACTIONS, generator=gen) * 2 - 1,
        torch.randn(size, length, generator=gen),
        off.clone(),
        off.clone(),
        off.clone(),
    )


def observe(world: WorldModel, batch: Batch, loops: int | None = None) -> Posterior:
    """The posterior of a batch, at a sampled depth where none is given."""
    return world.observe_sequence(batch, world.sample_depth() if loops is None else loops)


def world_loss(
    world: WorldModel, batch: Batch, loops: int | None = None
) -> tuple[Tensor, Posterior, dict[str, Tensor]]:
    post = observe(world, batch, loops)
    loss, metrics = world.loss(post, batch)
    return loss, post, metrics


def random_state(world: WorldModel, size: int = 3, seed: int = 2) -> LatentState:
    gen = torch.Generator().manual_seed(seed)
    zero = world.initial(size)
    stoch = torch.nn.functional.one_hot(torch.randint(0, 4, zero.stoch.shape[:2], generator=gen), 4)
    return LatentState(torch.randn(zero.deter.shape, generator=gen), stoch.float())


def gradients(world: WorldModel, loss: Tensor) -> dict[str, Tensor | None]:
    names, params = zip(*world.named_parameters(), strict=True)
    grads = torch.autograd.grad(loss, params, allow_unused=True, retain_graph=True)
    return dict(zip(names, grads, strict=True))


def moving_square(steps: int = 6, side: int = 16) -> np.ndarray:
    frames = np.zeros((steps, side, side, 3), np.uint8)
    for t in range(steps):
        frames[t, :, 2 * t : 2 * t + 2] = 255
    return frames


def step_of(core, *args, compact, **options):
    """`core.adaptive_step`, in which finished samples are taken out, or frozen in place as on a GPU."""
    core.static_shapes = not compact
    try:
        return core.adaptive_step(*args, **options)
    finally:
        core.static_shapes = False

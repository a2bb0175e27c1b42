"""torch.compile for the parts of a step that every loop and every imagined step runs."""

from __future__ import annotations

import warnings

import torch
from torch import nn

from world_model import WorldModel


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile works here, tried out: it needs a C compiler and a GPU that is not too old."""
    try:
        torch.compile(lambda x: x + 1.0)(torch.zeros(1, device=device))
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        warnings.warn(f"nothing is compiled, and updates take longer: {reason}", stacklevel=2)
        return False
    return True


def compile_world_model(world: WorldModel) -> None:
    """Let torch.compile fuse the operations of a step; it compiles once for every batch size that it meets.

    The compiled methods belong to a subclass: bound to the instance, those of a copied network would compute with
    the weights of the original.
    """
    torch._dynamo.config.recompile_limit = 64
    methods: dict[nn.Module, tuple[str, ...]] = {
        world: ("reset", "posterior", "prior_probs", "draw"),
        world.core: ("prelude", "refine", "readout", "adaptive_step"),
    }
    for module, names in methods.items():
        kind = type(module)
        compiled = {name: torch.compile(getattr(kind, name), dynamic=False) for name in names if hasattr(kind, name)}
        module.__class__ = type(kind.__name__, (kind,), compiled)

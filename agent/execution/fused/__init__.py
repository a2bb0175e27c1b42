"""Layers of an update as single kernels on a CPU, where there is a C++ compiler; the same mathematics, in less time."""

from agent.execution.fused.modules import fuse, fuse_modules
from agent.execution.fused.scope import fused_layers

__all__ = ["fuse", "fuse_modules", "fused_layers"]

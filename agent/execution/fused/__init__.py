"""Layers of an update as single kernels on a CPU, where there is a C++ compiler; the same mathematics, in less time.

    *.cpp, vectors.h, build   the kernels, compiled for this processor at the first start
    scope                     when layers are fused, and for which weights
    functions, values, gru    kernels as differentiable functions: layers, loops, samples, two-hot values, a GRU's step
    scan, dream               whole scans along a batch and whole dreams, as one such function each; the loops of a
    scan_loops, dream_gradient    step in them, and the gradient of a dream
    networks, behavior, world subclasses of the plain modules that use them
    modules                   what becomes what
"""

from agent.execution.fused.modules import fuse, fuse_modules
from agent.execution.fused.scope import fused_layers

__all__ = ["fuse", "fuse_modules", "fused_layers"]

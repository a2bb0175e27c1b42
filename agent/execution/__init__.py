"""How an update runs, and never what it computes: eager, fused layers, CUDA graphs, torch.compile, data parallel."""

from __future__ import annotations

import torch

from agent.execution.compiled import can_compile, compile_world_model
from agent.execution.cuda_graphs import CudaGraphs
from agent.execution.data_parallel import DataParallel
from agent.execution.eager import Eager
from agent.execution.fused import fuse
from agent.learning.dreamer import Dreamer

__all__ = ["CudaGraphs", "DataParallel", "Eager", "make_execution"]


def make_execution(agent: Dreamer) -> Eager:
    """The execution that the agent's `OptimizerConfig` asks for on its device."""
    cfg = agent.optimizer
    if agent.device.type != "cuda":
        fuse(agent)
        return DataParallel(agent, cfg.workers) if cfg.workers > 1 else Eager(agent)
    torch.set_float32_matmul_precision("high")  # TF32: float32 with 10 bits of mantissa, for the whole process
    compiled = cfg.gpu == "compiled" and can_compile(agent.device)
    if compiled:
        compile_world_model(agent.world)
    return Eager(agent) if cfg.gpu == "eager" else CudaGraphs(agent, compiled)

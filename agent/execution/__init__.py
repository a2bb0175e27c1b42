"""How an update runs, and never what it computes: eager, fused layers, CUDA graphs, torch.compile, data parallel."""

from __future__ import annotations

import torch

from agent.execution.compiled import can_compile, compile_world_model
from agent.execution.cuda_graphs import CudaGraphs
from agent.execution.data_parallel import DataParallel
from agent.execution.eager import Eager
from agent.execution.fused import fuse
from agent.execution.ranks import Ranks
from agent.learning.dreamer import Dreamer

__all__ = ["CudaGraphs", "DataParallel", "Eager", "Ranks", "make_execution"]


def make_execution(agent: Dreamer, ranks: Ranks | None = None) -> Eager:
    """The execution that the agent's `OptimizerConfig` asks for on its device; ranks: those that torchrun started."""
    cfg, ranks = agent.optimizer, ranks or Ranks()
    if agent.device.type != "cuda":
        fuse(agent)
        return DataParallel(agent, cfg.workers) if cfg.workers > ranks.size == 1 else Eager(agent, ranks=ranks)
    torch.set_float32_matmul_precision("high")  # TF32: float32 with 10 bits of mantissa, for the whole process
    compiled = cfg.gpu == "compiled" and can_compile(agent.device)
    if compiled:
        compile_world_model(agent.world)
    # A message between ranks has not been tried inside of a graph.
    return Eager(agent, compiled, ranks) if cfg.gpu == "eager" or ranks.size > 1 else CudaGraphs(agent, compiled)

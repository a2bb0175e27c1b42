"""Which modules use the kernels, and how they come to do so."""

from __future__ import annotations

from torch import nn

from agent.execution.fused.behavior import FusedActorCritic, FusedCritic
from agent.execution.fused.build import load
from agent.execution.fused.networks import (
    FusedCertifiedCore,
    FusedCertifiedLoop,
    FusedGRUCore,
    FusedLayer,
    FusedLoopedCore,
    FusedMLP,
    FusedStackedCore,
    FusedTwoHot,
)
from agent.execution.fused.scope import Scope
from agent.execution.fused.world import FusedWorldModel
from agent.learning.actor_critic import ActorCritic, Critic
from agent.learning.dreamer import Dreamer
from world_model import TwoHot, WorldModel
from world_model.certified import CertifiedCore, CertifiedLoop
from world_model.controls.gru import GRUCore
from world_model.controls.stacked import Layer, StackedCore
from world_model.looped import LoopedCore
from world_model.nets import MLP

KINDS: dict[type[nn.Module], type[nn.Module]] = {
    MLP: FusedMLP,
    TwoHot: FusedTwoHot,
    LoopedCore: FusedLoopedCore,
    CertifiedCore: FusedCertifiedCore,
    CertifiedLoop: FusedCertifiedLoop,
    StackedCore: FusedStackedCore,
    GRUCore: FusedGRUCore,
    Layer: FusedLayer,
    WorldModel: FusedWorldModel,
    Critic: FusedCritic,
    ActorCritic: FusedActorCritic,
}


def fuse(agent: Dreamer) -> None:
    """Let the agent's networks use the kernels inside of `fused_layers`."""
    fuse_modules(agent.policy)


def fuse_modules(net: nn.Module) -> None:
    """Let a network use the kernels inside of `fused_layers`; cores of one's own keep what they have.

    Compiles the kernels, the first time on a machine; where that fails, nothing is changed.
    """
    Scope.kernels = load()  # for all threads
    if Scope.kernels is None:
        return
    for module in net.modules():
        if type(module) in KINDS:
            module.__class__ = KINDS[type(module)]

"""The looped world model. Torch only; knows sizes, not spaces."""

from world_model.distributions import TwoHot, symexp, symlog
from world_model.latent import LatentState
from world_model.looped import LoopConfig, LoopedCore, LoopStats
from world_model.model import ModelConfig, WorldModel
from world_model.types import Batch, Posterior, Rollout

__all__ = [
    "Batch",
    "LatentState",
    "LoopConfig",
    "LoopStats",
    "LoopedCore",
    "ModelConfig",
    "Posterior",
    "Rollout",
    "TwoHot",
    "WorldModel",
    "symexp",
    "symlog",
]

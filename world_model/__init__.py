"""The looped world model. Torch only; knows sizes, not spaces."""

from world_model.controls import Cost, cost
from world_model.core import Core, CoreSizes, LoopStats, Trace
from world_model.diagnostics import stability
from world_model.distributions import TwoHot, symexp, symlog
from world_model.exits import ExitRule, Moment, RandomExit, make_rule
from world_model.gru import GRUConfig
from world_model.latent import LatentState
from world_model.looped import LoopConfig, LoopedCore, sample_depth
from world_model.model import ModelConfig, WorldModel
from world_model.senses import ObsSize, Senses
from world_model.stacked import StackConfig
from world_model.types import Batch, Posterior, Rollout

__all__ = [
    "Batch",
    "Core",
    "CoreSizes",
    "Cost",
    "ExitRule",
    "GRUConfig",
    "LatentState",
    "LoopConfig",
    "LoopStats",
    "LoopedCore",
    "ModelConfig",
    "Moment",
    "ObsSize",
    "Posterior",
    "RandomExit",
    "Rollout",
    "Senses",
    "StackConfig",
    "Trace",
    "TwoHot",
    "WorldModel",
    "cost",
    "make_rule",
    "sample_depth",
    "stability",
    "symexp",
    "symlog",
]

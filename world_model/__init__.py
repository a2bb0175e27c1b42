"""The looped world model. Torch only; knows sizes, not spaces."""

from world_model.certified import Certificate, CertifiedCore, certificate
from world_model.controls.exit_rules import RandomExit
from world_model.controls.matching import Cost, cost
from world_model.core import Core, CoreSizes, LoopStats, Trace
from world_model.distributions import TwoHot, symexp, symlog
from world_model.exits import ExitRule, HaltingBatch, HaltingState, make_rule
from world_model.latent import LatentState
from world_model.looped import LoopConfig, LoopedCore, sample_depth
from world_model.model import ModelConfig, WorldModel
from world_model.observation import ObservationModel, ObsSize
from world_model.stability import stability
from world_model.types import Batch, Posterior, Rollout

__all__ = [
    "Batch",
    "Certificate",
    "CertifiedCore",
    "Core",
    "CoreSizes",
    "Cost",
    "ExitRule",
    "HaltingBatch",
    "HaltingState",
    "LatentState",
    "LoopConfig",
    "LoopStats",
    "LoopedCore",
    "ModelConfig",
    "ObsSize",
    "ObservationModel",
    "Posterior",
    "RandomExit",
    "Rollout",
    "Trace",
    "TwoHot",
    "WorldModel",
    "certificate",
    "cost",
    "make_rule",
    "sample_depth",
    "stability",
    "symexp",
    "symlog",
]

"""The observation model: encoder, decoder and reconstruction losses, or an objective that needs no decoder; vectors and
images side by side.

Symbols as in `types.py`; H, W, C sides and colours of an image; P all numbers of an observation together.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from world_model.averages import Average, alone, moments
from world_model.distributions import symexp, symlog
from world_model.images import ImageConfig, Images, Shape
from world_model.nets import MLP
from world_model.objectives import SIGReg, make_objective

ObsSize = int | Shape
"""A vector's length, or an image's height, width and colours."""

DECODER_LAYERS = 2
"""Hidden layers of the vectors' decoder; the encoder has one."""

REC_SCALE = 1.0
"""Weight of the squared error of vectors, summed over their standardised entries (DreamerV3: of entries in symlog)."""
STATISTICS_RATE = 0.002
"""Of the running mean and variance of vectors, per update; the first 1 / rate updates count alike."""
SMALLEST_STD = 0.02
"""Entries of a vector that vary less are not blown up."""
FARTHEST = 10.0
"""Standard deviations at which a standardised entry is cut off: what was constant so far may move all at once."""


class Standardiser(nn.Module):
    """Entries (..., O) of vectors, in symlog, with mean 0 and variance 1 over the replayed rows.

    Velocities are often twenty times as large as positions. Without this a squared error hardly sees the positions, and
    latents, which cost nats, leave them out (results/notes/suite.md).
    """

    mean: Tensor
    var: Tensor
    updates: Tensor

    def __init__(self, size: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("var", torch.ones(size))
        self.register_buffer("updates", torch.zeros(()))

    @torch.no_grad()
    def track(self, x: Tensor, average: Average = alone) -> None:
        """Take in a batch (..., O), if it is finite; the buffers change in place."""
        mean, var = moments(x.flatten(0, -2), average)
        finite = (mean + var).isfinite().all()
        mean, var = torch.where(finite, mean, self.mean), torch.where(finite, var, self.var)
        good = finite.to(mean.dtype)
        rate = good / self.updates.add_(good).clamp(1.0, 1.0 / STATISTICS_RATE)
        self.var.lerp_(var, rate).add_(rate * (1.0 - rate) * (mean - self.mean).square())
        self.mean.lerp_(mean, rate)

    def std(self) -> Tensor:
        return self.var.sqrt().clamp(min=SMALLEST_STD)

    def forward(self, x: Tensor) -> Tensor:
        return ((x - self.mean) / self.std()).clamp(-FARTHEST, FARTHEST)

    def undo(self, y: Tensor) -> Tensor:
        """The inverse of `forward`, without the cut."""
        return torch.addcmul(self.mean, self.std(), y)


class ObservationModel(nn.Module):
    """sizes {name: O, or (H, W, C) for an image}; feat: F, of which the first `deter` numbers are the state's deter."""

    def __init__(
        self, sizes: Mapping[str, ObsSize], feat: int, units: int, image: ImageConfig,
        objective: str = "reconstruct", deter: int = 0,
    ):  # fmt: skip
        super().__init__()
        self.vectors = {name: size for name, size in sizes.items() if isinstance(size, int)}
        shapes = {name: size for name, size in sizes.items() if not isinstance(size, int)}
        total = sum(self.vectors.values())
        self.encoder = MLP(total, units, 1) if total else None
        self.objective = make_objective(objective, feat, deter, units)
        self.decoder = MLP(feat, units, DECODER_LAYERS, total) if total and self.objective is None else None
        self.standardise = Standardiser(total)
        self.images = Images(image, shapes, feat, units, self.objective is None) if shapes else None

    @property
    def decodes(self) -> bool:
        """Whether states can be decoded to observations."""
        return self.objective is None

    def forward(self, obs: Mapping[str, Tensor]) -> Tensor:
        """{name: (..., O) or (..., H, W, C)} -> (..., U), the embedding of all of them."""
        embeds = [self.encoder(self.standardise(symlog(self.flatten(obs))))] if self.encoder else []
        embeds += [self.images.embed(obs)] if self.images else []
        return embeds[0] if len(embeds) == 1 else embeds[0] + embeds[1]

    def watched(self, embed: Tensor) -> Tensor:
        """(..., U) -> (..., E), the embedding that must not collapse."""
        return self.objective.projector(embed) if isinstance(self.objective, SIGReg) else embed

    def flatten(self, obs: Mapping[str, Tensor]) -> Tensor:
        """The vectors side by side, (..., sum of O)."""
        parts = [obs[name] for name in self.vectors]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def fit_normaliser(self, obs: Mapping[str, Tensor], average: Average = alone) -> None:
        """See `Images.fit_normaliser`; statistics of vectors are running ones, see `track`."""
        if self.images:
            self.images.fit_normaliser(obs, average)

    def track(self, obs: Mapping[str, Tensor], average: Average = alone) -> None:
        """Let the statistics of vectors follow a batch {name: (B, T, O)}: once per update, before it is encoded."""
        if self.vectors:
            self.standardise.track(symlog(self.flatten(obs)), average)

    def share_statistics(self, other: ObservationModel) -> None:
        """Use the statistics of another copy from now on: they are no weights to be averaged."""
        self.standardise = other.standardise

    def anneal(self, updates: int) -> None:
        """See `Images.anneal`; vectors keep their weight."""
        if self.images:
            self.images.anneal(updates)

    def targets(self, obs: Mapping[str, Tensor]) -> Tensor:
        """(..., P) the numbers that `predictions` predicts: vectors in symlog, then pixels from 0 to 1."""
        parts = [symlog(self.flatten(obs))] if self.decoder else []
        if self.images and self.images.decodes:
            parts += [obs[name].flatten(-3) / 255.0 for name in self.images.shapes]
        return torch.cat(parts, -1)

    def predictions(self, feat: Tensor) -> Tensor:
        """(..., F) -> (..., P)"""
        parts = [self.standardise.undo(self.decoder(feat))] if self.decoder else []
        if self.images:
            parts += [image.flatten(-3) for image in self.images.decode(feat).values()]
        return torch.cat(parts, -1)

    def decode(self, feat: Tensor) -> dict[str, Tensor]:
        """(..., F) -> {name: (..., O), or (..., H, W, C) from 0 to 1}"""
        decoded = self.images.decode(feat) if self.images else {}
        if self.decoder:
            parts = symexp(self.standardise.undo(self.decoder(feat))).split(list(self.vectors.values()), -1)
            decoded |= dict(zip(self.vectors, parts, strict=True))
        return decoded

    def losses(
        self, feat: Tensor, obs: Mapping[str, Tensor], embed: Tensor, average: Average = alone
    ) -> dict[str, Tensor]:
        """feat (B, T, F), obs {name: (B, T, ...)}, embed (B, T, U) as of `forward` -> weighted losses (B, T)."""
        if self.objective is not None:
            return self.objective.losses(feat, embed, average)
        losses = self.images.losses(feat, obs) if self.images else {}
        if self.decoder:
            error = self.decoder(feat) - self.standardise(symlog(self.flatten(obs)))  # (B, T, sum of O)
            losses["reconstruction"] = REC_SCALE * error.square().sum(-1)
        return losses

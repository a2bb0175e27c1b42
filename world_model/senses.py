"""What a world model makes of observations, and what its states say about them: vectors and images side by side.

Symbols: O size of a vector, H, W, C sides and colours of an image, U units, F features, P all numbers together.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from world_model.distributions import symexp, symlog
from world_model.nets import MLP
from world_model.vision import ImageConfig, Images, Shape

ObsSize = int | Shape
"""A vector's length, or an image's height, width and colours."""


class Senses(nn.Module):
    """sizes {name: O, or (H, W, C) for an image}; F features, U units; `layers` of the vectors' decoder are hidden."""

    def __init__(
        self, sizes: Mapping[str, ObsSize], feat: int, units: int, layers: int, rec_scale: float, image: ImageConfig
    ):
        super().__init__()
        self.rec_scale = rec_scale
        self.vectors = {name: size for name, size in sizes.items() if isinstance(size, int)}
        shapes = {name: size for name, size in sizes.items() if not isinstance(size, int)}
        total = sum(self.vectors.values())
        self.encoder = MLP(total, units, 1) if total else None
        self.decoder = MLP(feat, units, layers, total) if total else None
        self.images = Images(image, shapes, feat, units) if shapes else None

    @property
    def blind(self) -> bool:
        """Whether states cannot say what is seen: only images, and no decoder."""
        return self.decoder is None and not (self.images and self.images.decodes)

    def forward(self, obs: Mapping[str, Tensor]) -> Tensor:
        """{name: (..., O) or (..., H, W, C)} -> (..., U), what all of them say together."""
        seen = [self.encoder(symlog(self.flatten(obs)))] if self.encoder else []
        seen += [self.images.embed(obs)] if self.images else []
        return seen[0] if len(seen) == 1 else seen[0] + seen[1]

    def flatten(self, obs: Mapping[str, Tensor]) -> Tensor:
        """The vectors side by side, (..., sum of O)."""
        parts = [obs[name] for name in self.vectors]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def fit_normaliser(self, obs: Mapping[str, Tensor]) -> None:
        """See `Images.get_used_to`; vectors come as they are."""
        if self.images:
            self.images.get_used_to(obs)

    def anneal(self, updates: int) -> None:
        """See `Images.ease`; vectors keep their weight."""
        if self.images:
            self.images.ease(updates)

    def truth(self, obs: Mapping[str, Tensor]) -> Tensor:
        """(..., P) the numbers that `guess` guesses: vectors in symlog, then pixels from 0 to 1."""
        parts = [symlog(self.flatten(obs))] if self.decoder else []
        if self.images and self.images.decodes:
            parts += [obs[name].flatten(-3) / 255.0 for name in self.images.shapes]
        return torch.cat(parts, -1)

    def guess(self, feat: Tensor) -> Tensor:
        """(..., F) -> (..., P)"""
        parts = [self.decoder(feat)] if self.decoder else []
        if self.images:
            parts += [image.flatten(-3) for image in self.images.decode(feat).values()]
        return torch.cat(parts, -1)

    def decode(self, feat: Tensor) -> dict[str, Tensor]:
        """(..., F) -> {name: (..., O), or (..., H, W, C) from 0 to 1}"""
        found = self.images.decode(feat) if self.images else {}
        if self.decoder:
            parts = symexp(self.decoder(feat)).split(list(self.vectors.values()), -1)
            found |= dict(zip(self.vectors, parts, strict=True))
        return found

    def losses(self, feat: Tensor, obs: Mapping[str, Tensor], seen: Tensor) -> dict[str, Tensor]:
        """feat (B, T, F), obs {name: (B, T, ...)}, seen (B, T, U) as `forward` gave it -> weighted losses (B, T)."""
        losses = self.images.losses(feat, obs, seen) if self.images else {}
        if self.decoder:
            wrong = self.decoder(feat) - symlog(self.flatten(obs))
            losses["reconstruction"] = self.rec_scale * wrong.square().sum(-1)
        return losses

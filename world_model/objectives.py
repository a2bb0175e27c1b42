"""What latents are trained by where nothing is decoded: prediction of the observation's embedding.

    redundancy   predict each number of the embedding, and let no two say the same (R2-Dreamer, arXiv 2603.18202)
    sigreg       predict the next embedding, and let embeddings be distributed like a standard normal
                 (LeJEPA, arXiv 2511.08544; as a world model LeWorldModel, arXiv 2603.19312)

A loss on predictions alone is lowest where all embeddings are equal. Redundancy does not move what is predicted, and
sigreg has a penalty against that collapse.

Symbols as in `types.py`; M samples, E numbers of a projected embedding, P directions.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from world_model.averages import Average, alone, moments
from world_model.nets import MLP, linear

REDUNDANCY_SCALE = 0.05
"""Weight of the objective redundancy."""
REDUNDANCY_OFF = 5e-4
"""Weight of its off-diagonal part."""

EMBEDDING = 16
"""E: as many directions as embeddings can fill; images of a cart and a pole fill no more."""
DIRECTIONS = 64
"""P, new ones in every update."""
FREQUENCIES, HIGHEST = 17, 3.0
"""Points of the integral over t from 0 to the highest (LeJEPA)."""
SIGREG_SCALE = 500.0
"""Weight of the penalty, against a squared error that is summed over E. The statistic of so few samples is noisy, and
its gradient must not hide that of the other losses from the encoder: chosen with E on cartpole_balance@pixels."""


class Redundancy(nn.Module):
    """States predict the embedding of their observation, which is not moved by it."""

    def __init__(self, feat: int, deter: int, units: int):
        super().__init__()
        self.predictor = linear(feat, units)

    def losses(self, feat: Tensor, embed: Tensor, average: Average = alone) -> dict[str, Tensor]:
        """feat (B, T, F), embed (B, T, U) -> weighted losses (B, T)."""
        prediction, target = self.predictor(feat).flatten(0, 1), embed.detach().flatten(0, 1)  # (M, U)
        loss = redundancy_loss(prediction, target, REDUNDANCY_OFF, average).view(feat.shape[:2])
        return {"redundancy": REDUNDANCY_SCALE * loss}


class SIGReg(nn.Module):
    """Two predictions of the projected embedding, whose gradients reach both sides, and one penalty.

    From deter alone: deter_t knows the observations before t and the action, so this is the next embedding, which the
    encoder is to make predictable. From deter and stoch: so the latents keep what the prediction missed.
    """

    def __init__(self, feat: int, deter: int, units: int):
        super().__init__()
        self.deter = deter
        self.projector = linear(units, EMBEDDING)
        self.ahead, self.stored = MLP(deter, units, 1, EMBEDDING), MLP(feat, units, 1, EMBEDDING)

    def losses(self, feat: Tensor, embed: Tensor, average: Average = alone) -> dict[str, Tensor]:
        """feat (B, T, F), embed (B, T, U) -> weighted losses (B, T)."""
        target = self.projector(embed)  # (B, T, E)
        ahead, stored = self.ahead(feat[..., : self.deter]), self.stored(feat)
        error = (ahead - target).square().sum(-1) + (stored - target).square().sum(-1)
        # Over the sequences at each time: rows of one sequence are alike, and to count them as independent samples
        # would punish embeddings that change slowly.
        penalty = sigreg(target.transpose(0, 1), random_directions(EMBEDDING, DIRECTIONS, target, average), average)
        return {"embedding": error, "sigreg": SIGREG_SCALE * penalty.expand(error.shape)}


def make_objective(name: str, feat: int, deter: int, units: int) -> Redundancy | SIGReg | None:
    """The objective of that name, on features of size F and embeddings of size U; None: observations are decoded."""
    kinds: dict[str, type[Redundancy] | type[SIGReg]] = {"redundancy": Redundancy, "sigreg": SIGReg}
    return kinds[name](feat, deter, units) if name in kinds else None


# ---------------------------------------------------------------------- redundancy


def redundancy_loss(prediction: Tensor, target: Tensor, off: float, average: Average = alone) -> Tensor:
    """(M, U) twice -> (M,) sum_i (1 - C_ii)^2 + off * sum_{i != j} C_ij^2, repeated, so that the mean is the loss.

    C is the cross-correlation over the M samples of the embedding that states predict and the embedding itself: each
    number is to be predicted, and no two are to say the same (R2-Dreamer, arXiv 2603.18202, after Barlow Twins,
    arXiv 2103.03230).
    """
    one, two = (standardised(x, average) for x in (prediction, target))
    correlation = average(one.t() @ two / len(prediction))  # (U, U)
    diagonal = correlation.diagonal()
    loss = (1.0 - diagonal).square().sum() + off * (correlation.square().sum() - diagonal.square().sum())
    return loss.expand(len(prediction))


def standardised(x: Tensor, average: Average) -> Tensor:
    """(M, U) with mean 0 and variance 1 over the samples of all processes; what never varies is left as 0."""
    mean, var = moments(x, average)
    return (x - mean) / (var.clamp(min=1e-12).sqrt() + 1e-3)  # the root has no slope at 0


# ---------------------------------------------------------------------- sketched isotropic Gaussian


def random_directions(size: int, count: int, like: Tensor, average: Average = alone) -> Tensor:
    """(E, P) unit vectors, the same in all processes: a mean of normal numbers points anywhere with equal chance."""
    drawn = average(torch.randn(size, count, device=like.device, dtype=torch.float32))
    return drawn / drawn.norm(dim=0)


def sigreg(z: Tensor, directions: Tensor, average: Average = alone) -> Tensor:
    """How far M independent samples z (..., M, E) are from a standard normal along directions (E, P), 0-d.

    The Epps-Pulley statistic over M: the integral over t of |phi(t) - exp(-t^2/2)|^2 exp(-t^2/2), where phi is the
    characteristic function of the samples, by the trapezoid rule, mean over the directions and over the leading
    dimensions. About 1 / M for normal samples, 0.40 where all are zero. Few samples pull a little inwards: for normal
    ones of standard deviation s its mean is least at s = 0.94 with M = 16, at 0.74 with M = 4.
    """
    t = torch.linspace(0.0, HIGHEST, FREQUENCIES, device=z.device)
    normal = torch.exp(-0.5 * t.square())
    weights = 2.0 * HIGHEST / (FREQUENCIES - 1) * normal  # twice: t < 0 says the same
    weights[0], weights[-1] = 0.5 * weights[0], 0.5 * weights[-1]
    angle = (z.float() @ directions)[..., None] * t  # (..., M, P, points)
    real, imaginary = average(angle.cos().mean(-3)), average(angle.sin().mean(-3))  # (..., P, points)
    return (((real - normal).square() + imaginary.square()) @ weights).mean()


# ---------------------------------------------------------------------- collapse


@torch.no_grad()
def effective_rank(z: Tensor) -> Tensor:
    """(M, E) -> 0-d, from 1 to E: how many directions the samples fill (Roy and Vetterli 2007).

    exp of the entropy of the eigenvalues of the covariance, as shares of their sum; 0 where nothing varies.
    """
    x = (z - z.mean(0)).double()
    variance = torch.linalg.eigvalsh(x.t() @ x).clamp(min=0.0)
    total = variance.sum()
    share = variance / total.clamp(min=1e-300)
    entropy = -(share * share.clamp(min=1e-300).log()).sum()
    return torch.where(total > 1e-12 * len(z), entropy.exp(), torch.zeros_like(total)).to(z.dtype)

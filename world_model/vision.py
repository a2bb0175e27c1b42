"""Images: convolutional encoder and decoder in DreamerV3's form, and an objective that needs no decoder.

Images are uint8, (..., H, W, C), and stay so until they are on the device of the model. Four stages halve (encoder)
or double (decoder) the sides, so H and W are multiples of 16 and the inner map of a 64 x 64 image is 4 x 4.

Symbols: M images, H, W sides, C colours, U units, F features of a state, P numbers of the inner map.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from world_model.nets import Norm, linear
from world_model.ranges import ABOVE_ZERO, AT_LEAST_ONE, NOT_NEGATIVE, require

Shape = tuple[int, int, int]
"""(H, W, C)."""

STAGES = (2, 3, 4, 4)
"""Channels of the stages in units of `depth` (DreamerV3)."""


@dataclass(frozen=True)
class ImageConfig:
    """Image observations."""

    depth: int = 8
    """Channels of the convolutions: 2, 3, 4 and 4 times this from stage to stage (DreamerV3: 4 to 96 by size)."""
    kernel: int = 5
    """Side of the kernels (odd)."""
    halve: Literal["patch", "stride", "pool"] = "patch"
    """How a stage changes the sides: by strided convolutions, or at full size and then pooled (DreamerV3; four times
    the work of strided ones). patch: strided, and the outermost stage is no convolution but patches of 2 x 2 pixels;
    the last convolution of the decoder (3 x 3) doubles twice. Little more than half the time on a CPU."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Numbers that the convolutions compute with; auto: bfloat16 on GPUs and on CPUs that have it in hardware."""
    relative: bool = True
    """See, say and judge how an image differs from the mean of 256 of the first ones, in their standard deviation."""
    first_logits: float = 4.0
    """How many times larger the posterior's logits are at first where there are images: latents that begin as noise
    say nothing of them, and nothing is learned from what nobody can read."""
    objective: Literal["decode", "redundancy"] = "decode"
    """What latents of images are trained by: decoding the image, or predicting its embedding without redundancy."""
    scale: float = 1.0
    """Weight of the squared error of decoded images, summed over the pixels (colours from 0 to 1). It is meant for
    images whose standard deviation is 0.2; where `relative`, those that vary less weigh more, up to 25 times."""
    ease: bool = False
    """Take that additional weight back once images are seen. Without it they are seen late; with it for good, latents
    say of an image what no state foresees, and rewards are learned last."""
    ease_begin: int = 500
    """Update from which the additional weight falls, each time by the same factor."""
    ease_end: int = 1500
    """Update from which there is none."""
    redundancy_scale: float = 0.05
    """Weight of the objective without a decoder."""
    redundancy_off: float = 5e-4
    """Weight of its off-diagonal part."""

    def __post_init__(self) -> None:
        require(self, "", depth=AT_LEAST_ONE, kernel=AT_LEAST_ONE, scale=ABOVE_ZERO, first_logits=ABOVE_ZERO)
        require(self, "", redundancy_scale=ABOVE_ZERO, redundancy_off=NOT_NEGATIVE)
        require(self, "", ease_begin=NOT_NEGATIVE, ease_end=(self.ease_begin + 1, math.inf))
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel must be odd, got {self.kernel}")

    def channels(self) -> list[int]:
        """Of the convolutions, outermost first."""
        return [self.depth * stage for stage in STAGES[self.halve == "patch" :]]


def check_shape(name: str, shape: Shape) -> None:
    """Raise ValueError unless the sides suit four stages and the colours are grey or RGB."""
    height, width, colours = shape
    if height % 16 or width % 16 or min(height, width) < 16 or colours not in (1, 3):
        raise ValueError(
            f"the image {name!r} has shape {shape}; expected sides that are multiples of 16, and 1 or 3 colours"
        )


def computes_in(precision: str, device: torch.device) -> torch.dtype:
    """What `ImageConfig.precision` means on this device."""
    if precision == "auto":
        # Where the processor lacks it, it is emulated, and several times slower than float32.
        native = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
        able = device.type == "cuda" or (torch.backends.mkldnn.is_available() and native())
        return torch.bfloat16 if able else torch.float32
    return torch.bfloat16 if precision == "bfloat16" else torch.float32


class ChannelNorm(nn.Module):
    """Normalisation over the channels at every place: (M, C, H, W) -> the same."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = Norm(channels)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.movedim(1, -1)
        return (self.written_out(rows) if x.is_cuda else self.norm(rows)).movedim(-1, 1)

    def written_out(self, x: Tensor) -> Tensor:
        """(..., C) normalised. The layer norm of a GPU takes a block of threads for each of a million rows of 16
        numbers: 17 of the 45 ms of an update."""
        x = x.float()
        x = x - x.mean(-1, keepdim=True)
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.norm.eps) * self.norm.gain


def convolution(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    """With a truncated-normal fan-in initialisation, and zero bias."""
    layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2)
    std = 1.0 / math.sqrt(inputs * kernel**2) / 0.8796
    nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return layer


LEAST_SPREAD = 2.0
"""Steps of colour, of 255, in which differences between images are measured where they are smaller than that."""
USUAL_SPREAD = 0.2 * 255
"""Steps of colour by which images differ from their mean that have the weight `ImageConfig.scale`."""
MOST_WEIGHT = 25.0
"""How many times more images weigh that differ less than that."""


class Usual(nn.Module):
    """What images (H, W, C) of a task usually look like: their mean and standard deviation, in steps of colour."""

    mean: Tensor
    spread: Tensor

    def __init__(self, shape: Shape, spread: float):
        super().__init__()
        self.register_buffer("mean", torch.full(shape, 127.5))
        self.register_buffer("spread", torch.tensor(spread))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Networks of before knew of no usual image, and took every one as it is."""
        for name in ("mean", "spread"):
            state_dict.setdefault(prefix + name, getattr(self, name))
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def get_used_to(self, image: Tensor) -> None:
        """Take mean and standard deviation from these images (M, H, W, C)."""
        image = image.to(self.mean.dtype)
        self.mean.copy_(image.mean(0))
        self.spread.copy_((image - self.mean).square().mean().sqrt().clamp(min=LEAST_SPREAD))


class ConvEncoder(Usual):
    """(M, H, W, C) uint8 -> (M, U).

    What is seen is how an image differs from the usual one. Otherwise all images of a task look alike to the first
    layers, what moves is a few pixels of 12,288, and the latents begin as noise that drowns it.
    """

    def __init__(self, shape: Shape, cfg: ImageConfig, units: int):
        super().__init__(shape, 255.0)
        stages: list[nn.Module] = [nn.PixelUnshuffle(2)] if cfg.halve == "patch" else []
        before = shape[2] * (4 if cfg.halve == "patch" else 1)
        for channels in cfg.channels():
            stages.append(convolution(before, channels, cfg.kernel, 1 if cfg.halve == "pool" else 2))
            stages += [nn.MaxPool2d(2)] if cfg.halve == "pool" else []
            stages += [ChannelNorm(channels), nn.SiLU()]
            before = channels
        self.stages = nn.Sequential(*stages)
        self.out = linear(before * (shape[0] // 16) * (shape[1] // 16), units)

    def forward(self, image: Tensor) -> Tensor:
        x = ((image.to(self.mean.dtype) - self.mean) / self.spread).movedim(-1, 1)
        return self.out(self.stages(x.contiguous(memory_format=torch.channels_last)).flatten(1))


class Doubled(nn.Module):
    """Twice the sides and `outputs` channels: by a transposed convolution, or repeated and then convolved."""

    def __init__(self, inputs: int, outputs: int, cfg: ImageConfig):
        super().__init__()
        self.repeat = cfg.halve == "pool"
        if self.repeat:
            self.layer: nn.Module = convolution(inputs, outputs, cfg.kernel)
        else:
            self.layer = nn.ConvTranspose2d(inputs, outputs, cfg.kernel, 2, cfg.kernel // 2, output_padding=1)
            std = 2.0 / math.sqrt(inputs * cfg.kernel**2) / 0.8796  # every fourth weight meets a place
            nn.init.trunc_normal_(self.layer.weight, std=std, a=-2 * std, b=2 * std)
            nn.init.zeros_(self.layer.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(F.interpolate(x, scale_factor=2.0, mode="nearest") if self.repeat else x)
        return out


class ConvDecoder(Usual):
    """(M, F) -> (M, H, W, C) colours.

    What the convolutions say is how the image differs from the usual one; else many updates go into a
    picture of what never moves. The colours are then not quite held between 0 and 1.
    """

    def __init__(self, shape: Shape, cfg: ImageConfig, feat: int):
        super().__init__(shape, USUAL_SPREAD)
        self.cfg, self.relative = cfg, cfg.relative
        channels = cfg.channels()[::-1]
        self.inner = channels[0], shape[0] // 16, shape[1] // 16
        self.start = linear(feat, math.prod(self.inner), bias=True)
        stages: list[nn.Module] = [ChannelNorm(channels[0]), nn.SiLU()]
        for before, after in zip(channels, channels[1:], strict=False):
            stages += [Doubled(before, after, cfg), ChannelNorm(after), nn.SiLU()]
        if cfg.halve == "patch":  # both of the last doublings at once
            stages += [convolution(channels[-1], shape[2] * 16, 3), nn.PixelShuffle(4)]
        else:
            stages.append(Doubled(channels[-1], shape[2], cfg))
        self.stages = nn.Sequential(*stages)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Decoders of before said the colours themselves."""
        self.relative = self.cfg.relative and prefix + "mean" in state_dict
        super()._load_from_state_dict(state_dict, prefix, *args)

    @property
    def weight(self) -> Tensor | float:
        """How much more an error weighs because images of this task differ little, 0-d."""
        return (USUAL_SPREAD / self.spread).square().clamp(max=MOST_WEIGHT) if self.relative else 1.0

    def forward(self, feat: Tensor) -> Tensor:
        x = self.start(feat).view(-1, *self.inner)
        out: Tensor = self.stages(x.contiguous(memory_format=torch.channels_last)).movedim(1, -1)
        return (self.mean + self.spread * out) / 255.0 if self.relative else torch.sigmoid(out)


def redundancy_loss(guess: Tensor, truth: Tensor, off: float) -> Tensor:
    """(M, U) twice -> (M,) each sample's part of sum_i (1 - C_ii)^2 + off * sum_{i != j} C_ij^2.

    C is the cross-correlation over the M samples of what the state says about the embedding and the embedding
    itself: each number is to be predicted, and no two are to say the same (R2-Dreamer, arXiv 2603.18202, after
    Barlow Twins, arXiv 2103.03230). It is one number for all samples, spread evenly over them.
    """
    one, two = ((x - x.mean(0)) / (x.std(0, unbiased=False) + 1e-3) for x in (guess, truth))
    correlation = one.t() @ two / len(guess)
    diagonal = correlation.diagonal()
    loss = (1.0 - diagonal).square().sum() + off * (correlation.square().sum() - diagonal.square().sum())
    return loss.expand(len(guess))


class Images(nn.Module):
    """All image observations of a world model: what they say, what states say about them, and the loss between.

    shapes {name: (H, W, C)}; F features, U units.
    """

    share: Tensor

    def __init__(self, cfg: ImageConfig, shapes: Mapping[str, Shape], feat: int, units: int):
        super().__init__()
        for name, shape in shapes.items():
            check_shape(name, shape)
        self.cfg, self.shapes, self.decodes = cfg, dict(shapes), cfg.objective == "decode"
        self.register_buffer("share", torch.ones(()))  # of the logarithm of the additional weight, at this moment
        self.encoders = nn.ModuleDict({name: ConvEncoder(shape, cfg, units) for name, shape in shapes.items()})
        if self.decodes:
            self.decoders = nn.ModuleDict({name: ConvDecoder(shape, cfg, feat) for name, shape in shapes.items()})
        else:
            self.guess = linear(feat, units)

    def fast(self, device: torch.device) -> torch.autocast:
        """Inside of this, convolutions compute with the numbers of `cfg.precision`; weights stay float32."""
        kind = computes_in(self.cfg.precision, device)
        return torch.autocast(device.type, kind, enabled=kind != torch.float32)

    def get_used_to(self, obs: Mapping[str, Tensor]) -> None:
        """Let the networks know what images {name: (..., H, W, C)} usually look like: once, before training."""
        nets = [*self.encoders.items(), *(self.decoders.items() if self.decodes else ())]
        for name, net in nets if self.cfg.relative else ():
            assert isinstance(net, Usual)
            net.get_used_to(obs[name].flatten(0, -4))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Images of before kept their additional weight."""
        state_dict.setdefault(prefix + "share", self.share)
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[no-untyped-call]

    def ease(self, updates: int) -> None:
        """Let decoded images weigh what they are to weigh after so many updates."""
        begin, end = self.cfg.ease_begin, self.cfg.ease_end
        if self.cfg.ease:
            self.share.fill_(1.0 - min(1.0, max(0.0, (updates - begin) / (end - begin))))

    def embed(self, obs: Mapping[str, Tensor]) -> Tensor:
        """{name: (..., H, W, C)} -> (..., U)"""
        parts = []
        for name, encoder in self.encoders.items():
            image = obs[name]
            with self.fast(image.device):
                seen = encoder(image.flatten(0, -4))
            parts.append(seen.float().view(*image.shape[:-3], -1))
        return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]

    def decode(self, feat: Tensor) -> dict[str, Tensor]:
        """(..., F) -> {name: (..., H, W, C)} colours from 0 to 1; nothing where there is no decoder."""
        return {name: image.clamp(0.0, 1.0) for name, image in self.shown(feat).items()}

    def shown(self, feat: Tensor) -> dict[str, Tensor]:
        """The same as the decoders say it, which may be a little below 0 or above 1."""
        if not self.decodes:
            return {}
        flat = feat.flatten(0, -2)
        with self.fast(feat.device):
            shown = {name: net(flat) for name, net in self.decoders.items()}
        return {name: image.float().view(*feat.shape[:-1], *self.shapes[name]) for name, image in shown.items()}

    def losses(self, feat: Tensor, obs: Mapping[str, Tensor], embed: Tensor) -> dict[str, Tensor]:
        """feat (B, T, F), obs {name: (B, T, H, W, C)}, embed (B, T, U) as `embed` gave it -> weighted losses (B, T)."""
        if not self.decodes:
            guess, truth = self.guess(feat).flatten(0, 1), embed.detach().flatten(0, 1)
            loss = redundancy_loss(guess, truth, self.cfg.redundancy_off).view(feat.shape[:2])
            return {"redundancy": self.cfg.redundancy_scale * loss}
        shown, wrong = self.shown(feat), []
        for name, net in self.decoders.items():
            assert isinstance(net, ConvDecoder)
            guess = shown[name]  # float32 whatever the features are: in bfloat16 colours would be a step or two off
            squared = (guess - obs[name].to(guess.dtype) / 255.0).square().flatten(2).sum(-1)
            wrong.append(net.weight**self.share * squared)
        return {"image": self.cfg.scale * torch.stack(wrong).sum(0)}

"""Images: convolutional encoder and decoder in DreamerV3's form.

Images are uint8, (..., H, W, C), and stay so until they are on the device of the model. Four stages halve (encoder)
or double (decoder) the sides, so H and W are multiples of 16 and the inner map of a 64 x 64 image is 4 x 4.

Symbols as in `types.py`; M images, H, W sides, C colours (in the layers: channels).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from world_model.averages import Average, alone
from world_model.nets import Norm, linear, truncated_normal
from world_model.ranges import AT_LEAST_ONE, require

Shape = tuple[int, int, int]
"""(H, W, C)."""

STAGES = (2, 3, 4, 4)
"""Channels of the stages in units of `base_channels` (DreamerV3)."""
KERNEL = 5
"""Side of the kernels (odd)."""
FIRST_LOGITS = 4.0
"""Factor of the posterior's logits at initialisation where there are images: latents that begin as noise carry no
information about them, and the decoder learns nothing."""
ANNEAL_BEGIN, ANNEAL_END = 500, 1500
"""Updates between which `ImageConfig.anneal` takes the additional weight back, by the same factor each time."""
LEAST_SPREAD = 2.0
"""Standard deviation, in steps of colour of 255, that the images of a task are taken to have at least."""
REFERENCE_SPREAD = 0.2 * 255
"""Standard deviation of images whose squared error, summed over the pixels (colours from 0 to 1), has the weight 1."""
MOST_WEIGHT = 25.0
"""Largest factor of that weight for images with a smaller one."""


@dataclass(frozen=True)
class ImageConfig:
    """Image observations."""

    base_channels: int = 8
    """Channels of the convolutions: 2, 3, 4 and 4 times this from stage to stage (DreamerV3: 4 to 96 by size)."""
    downsample: Literal["patch", "stride"] = "patch"
    """stride: four strided convolutions. patch: the outermost stage is patches of 2 x 2 pixels instead, and the last
    convolution of the decoder (3 x 3) doubles twice; little more than half the time on a CPU."""
    anneal: bool = False
    """Images of little contrast have their loss raised by a factor of up to 25, or they are learned late. With this it
    goes back to 1 between update 500 and 1,500: kept for good, latents store details that no state predicts, and
    rewards are learned last. Of no use to objectives without a decoder."""

    def __post_init__(self) -> None:
        require(self, "", base_channels=AT_LEAST_ONE)

    def channels(self) -> list[int]:
        """Of the convolutions, outermost first."""
        return [self.base_channels * stage for stage in STAGES[self.downsample == "patch" :]]


def check_shape(name: str, shape: Shape) -> None:
    """Raise ValueError unless the sides suit four stages and the colours are grey or RGB."""
    height, width, colours = shape
    if height % 16 or width % 16 or min(height, width) < 16 or colours not in (1, 3):
        raise ValueError(
            f"the image {name!r} has shape {shape}; expected sides that are multiples of 16, and 1 or 3 colours"
        )


# ---------------------------------------------------------------------- layers


class ChannelNorm(nn.Module):
    """Normalisation over the channels at every place: (M, C, H, W) -> the same."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = Norm(channels)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.movedim(1, -1)  # (M, H, W, C)
        return (self.written_out(rows) if x.is_cuda else self.norm(rows)).movedim(-1, 1)

    def written_out(self, x: Tensor) -> Tensor:
        """(..., C) normalised. The layer norm of a GPU takes a block of threads for each of a million rows of 16
        numbers: 17 of the 45 ms of an update."""
        x = x.float()
        x = x - x.mean(-1, keepdim=True)
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.norm.eps) * self.norm.gain


def initialised(layer: nn.Conv2d | nn.ConvTranspose2d, std: float) -> nn.Module:
    """Truncated-normal weights of this standard deviation, and zero bias."""
    truncated_normal(layer.weight, std)
    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return layer


def convolution(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Module:
    """(M, inputs, H, W) -> (M, outputs, H / stride, W / stride), with fan-in initialisation."""
    layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2)
    return initialised(layer, 1.0 / math.sqrt(inputs * kernel**2))


def upsample(inputs: int, outputs: int) -> nn.Module:
    """(M, inputs, H, W) -> (M, outputs, 2H, 2W): a transposed convolution with fan-in initialisation."""
    layer = nn.ConvTranspose2d(inputs, outputs, KERNEL, 2, KERNEL // 2, output_padding=1)
    return initialised(layer, 2.0 / math.sqrt(inputs * KERNEL**2))  # every fourth weight meets a place


# ---------------------------------------------------------------------- encoder and decoder


class ImageNormaliser(nn.Module):
    """Mean (H, W, C) and standard deviation of a task's images, in steps of colour: fitted once, before training.

    Otherwise all images of a task look alike to the first layers, what moves is a few pixels of 12,288, and the latents
    begin as noise that drowns it; and the decoder spends many updates on what never moves.
    """

    mean: Tensor
    spread: Tensor

    def __init__(self, shape: Shape, spread: float):
        super().__init__()
        self.register_buffer("mean", torch.full(shape, 127.5))
        self.register_buffer("spread", torch.tensor(spread))

    @torch.no_grad()
    def fit(self, image: Tensor, average: Average = alone) -> None:
        """Take mean and standard deviation from these images (M, H, W, C)."""
        image = image.to(self.mean.dtype)
        self.mean.copy_(average(image.mean(0)))
        self.spread.copy_(average((image - self.mean).square().mean()).sqrt().clamp(min=LEAST_SPREAD))

    def forward(self, image: Tensor) -> Tensor:
        """(M, H, W, C) uint8 -> how they differ from the mean, in standard deviations."""
        return (image.to(self.mean.dtype) - self.mean) / self.spread

    def inverse(self, x: Tensor) -> Tensor:
        """(M, H, W, C) -> colours, not quite held between 0 and 1."""
        return (self.mean + self.spread * x) / 255.0

    @property
    def weight(self) -> Tensor:
        """How much more an error weighs because images of this task differ little, 0-d."""
        return (REFERENCE_SPREAD / self.spread).square().clamp(max=MOST_WEIGHT)


class ConvEncoder(nn.Module):
    """(M, H, W, C) uint8 -> (M, U)."""

    def __init__(self, shape: Shape, cfg: ImageConfig, units: int):
        super().__init__()
        self.normaliser = ImageNormaliser(shape, 255.0)
        patch = 2 if cfg.downsample == "patch" else 1
        stages: list[nn.Module] = [nn.PixelUnshuffle(patch)] if patch > 1 else []
        before = shape[2] * patch**2
        for channels in cfg.channels():
            stages += [convolution(before, channels, KERNEL, 2), ChannelNorm(channels), nn.SiLU()]
            before = channels
        self.stages = nn.Sequential(*stages)
        self.out = linear(before * (shape[0] // 16) * (shape[1] // 16), units)

    def forward(self, image: Tensor) -> Tensor:
        x = self.normaliser(image).movedim(-1, 1)  # (M, C, H, W)
        return self.out(self.stages(x.contiguous(memory_format=torch.channels_last)).flatten(1))


class ConvDecoder(nn.Module):
    """(M, F) -> (M, H, W, C) colours, not quite held between 0 and 1."""

    def __init__(self, shape: Shape, cfg: ImageConfig, feat: int):
        super().__init__()
        self.normaliser = ImageNormaliser(shape, REFERENCE_SPREAD)
        channels = cfg.channels()[::-1]
        self.inner = channels[0], shape[0] // 16, shape[1] // 16
        self.start = linear(feat, math.prod(self.inner), bias=True)
        stages: list[nn.Module] = [ChannelNorm(channels[0]), nn.SiLU()]
        for before, after in zip(channels, channels[1:], strict=False):
            stages += [upsample(before, after), ChannelNorm(after), nn.SiLU()]
        if cfg.downsample == "patch":  # both of the last doublings at once
            stages += [convolution(channels[-1], shape[2] * 16, 3), nn.PixelShuffle(4)]
        else:
            stages.append(upsample(channels[-1], shape[2]))
        self.stages = nn.Sequential(*stages)

    def forward(self, feat: Tensor) -> Tensor:
        x = self.start(feat).view(-1, *self.inner)  # (M, C, H/16, W/16)
        x = self.stages(x.contiguous(memory_format=torch.channels_last)).movedim(1, -1)  # (M, H, W, C)
        return self.normaliser.inverse(x)


# ---------------------------------------------------------------------- all images of a task


class Images(nn.Module):
    """All image observations of a world model: their embedding, their reconstruction, and the loss between.

    shapes {name: (H, W, C)}; decodes: whether there are decoders. precision: what convolutions compute with, "float32",
    "bfloat16", or "auto": bfloat16 on GPUs and on CPUs that have it in hardware.
    """

    share: Tensor

    def __init__(self, cfg: ImageConfig, shapes: Mapping[str, Shape], feat: int, units: int, decodes: bool = True):
        super().__init__()
        for name, shape in shapes.items():
            check_shape(name, shape)
        self.cfg, self.shapes, self.decodes = cfg, dict(shapes), decodes
        self.precision: Literal["auto", "float32", "bfloat16"] = "auto"
        self.register_buffer("share", torch.ones(()))  # of the logarithm of the additional weight, at this moment
        self.encoders = nn.ModuleDict({name: ConvEncoder(shape, cfg, units) for name, shape in shapes.items()})
        made = shapes.items() if decodes else ()
        self.decoders = nn.ModuleDict({name: ConvDecoder(shape, cfg, feat) for name, shape in made})

    def autocast(self, device: torch.device) -> torch.autocast:
        """Inside of this, convolutions compute with the numbers of `precision`; weights stay float32."""
        half = self.precision == "bfloat16"
        if self.precision == "auto":
            # Where the processor lacks it, it is emulated, and several times slower than float32.
            native = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
            half = device.type == "cuda" or (torch.backends.mkldnn.is_available() and native())
        return torch.autocast(device.type, torch.bfloat16 if half else torch.float32, enabled=half)

    def fit_normaliser(self, obs: Mapping[str, Tensor], average: Average = alone) -> None:
        """Fit the normalisers of encoders and decoders to images {name: (..., H, W, C)}: once, before training."""
        for name, net in [*self.encoders.items(), *self.decoders.items()]:
            assert isinstance(net, ConvEncoder | ConvDecoder)
            net.normaliser.fit(obs[name].flatten(0, -4), average)

    def anneal(self, updates: int) -> None:
        """Set the weight that decoded images have after so many updates."""
        if self.cfg.anneal:
            self.share.fill_(1.0 - min(1.0, max(0.0, (updates - ANNEAL_BEGIN) / (ANNEAL_END - ANNEAL_BEGIN))))

    def embed(self, obs: Mapping[str, Tensor]) -> Tensor:
        """{name: (..., H, W, C)} -> (..., U)"""
        parts = []
        for name, encoder in self.encoders.items():
            image = obs[name]
            with self.autocast(image.device):
                embed = encoder(image.flatten(0, -4))  # (M, U)
            parts.append(embed.float().view(*image.shape[:-3], -1))
        return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]

    def decode(self, feat: Tensor) -> dict[str, Tensor]:
        """(..., F) -> {name: (..., H, W, C)} colours from 0 to 1; nothing where there is no decoder."""
        return {name: image.clamp(0.0, 1.0) for name, image in self.reconstruct(feat).items()}

    def reconstruct(self, feat: Tensor) -> dict[str, Tensor]:
        """The same before it is clamped."""
        flat = feat.flatten(0, -2)  # (M, F)
        with self.autocast(feat.device):
            decoded = {name: net(flat) for name, net in self.decoders.items()}
        return {name: image.float().view(*feat.shape[:-1], *self.shapes[name]) for name, image in decoded.items()}

    def losses(self, feat: Tensor, obs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """feat (B, T, F), obs {name: (B, T, H, W, C)} -> weighted losses (B, T); none without decoders."""
        if not self.decodes:
            return {}
        decoded, errors = self.reconstruct(feat), []
        for name, net in self.decoders.items():
            assert isinstance(net, ConvDecoder)
            image = decoded[name]  # float32 whatever the features are: in bfloat16 colours would be a step or two off
            squared = (image - obs[name].to(image.dtype) / 255.0).square().flatten(2).sum(-1)  # (B, T)
            errors.append(net.normaliser.weight**self.share * squared)
        return {"image": torch.stack(errors).sum(0)}

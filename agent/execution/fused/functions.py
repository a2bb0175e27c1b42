"""The kernels as differentiable functions. Symbols as in `world_model/types.py`; M rows; what a function keeps for its
gradient and does not return lies in one tensor, as layers.cpp says."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from agent.execution.fused.scope import SCOPE
from world_model.latent import UNIMIX


def at(x: Tensor | None) -> int | None:
    """Where the numbers lie. A kernel gets plain numbers, so x must have a name until it returns: what has none may be
    freed before."""
    return None if x is None else x.data_ptr()


def parts(x: Tensor, *sizes: int) -> list[int]:
    """Where parts of so many numbers begin that lie in x one behind the other."""
    begin = x.data_ptr()
    return [begin + 4 * before for before in itertools.accumulate((0, *sizes[:-1]))]


def like(x: Tensor | None, wanted: bool) -> Tensor | None:
    """Room for a gradient."""
    return torch.empty_like(x) if wanted and x is not None else None


def zeros(x: Tensor | None, wanted: bool) -> Tensor | None:
    """Where the gradient of a weight is added up."""
    return torch.zeros_like(x) if wanted and x is not None else None


def unless_frozen(weights: Iterable[Tensor | None]) -> list[Tensor | None]:
    """Weights as a function takes them: without gradient where they are frozen."""
    return [None if w is None else w.detach() for w in weights] if SCOPE.frozen else list(weights)


class Chain(Function):
    """x (..., I) -> (..., O) through layers one behind the other.

    Of each layer w, bias and gain follow (None: it has none): linear, and with a gain norm and silu. base (..., O) is
    added to the first product. With classes K the outputs are logits, and become probabilities (..., S, K). known: an
    empty list takes what is computed; given again with the same x, it is not computed again.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, base: Tensor | None, classes: int, turned: list[Tensor], known: list[Any] | None,
        *tensors: Tensor | None,
    ) -> Tensor:  # fmt: skip
        ctx.shape, ctx.classes = x.shape, classes
        if known:
            kept, out = known
            ctx.save_for_backward(*tensors, *kept)
            return out.view(ctx.shape[:-1] + out.shape[1:])
        x, added = x.contiguous(), None if base is None else base.contiguous()
        rows, kept = x.numel() // x.shape[-1], []
        for w, bias, gain, t in zip(tensors[::3], tensors[1::3], tensors[2::3], turned, strict=True):
            assert w is not None
            outputs, inputs = w.shape
            full, added = added is not None, bias if added is None else added
            y = x.new_empty(rows, outputs)
            z, stats = (y, None) if gain is None else (torch.empty_like(y), x.new_empty(2 * rows))
            SCOPE.kernels.layer_forward(
                rows, inputs, outputs, at(x), at(t), at(added), full, at(gain), at(z), at(stats), at(y)
            )  # fmt: skip
            kept += [x, None if gain is None else z, stats]
            x, added = y, None
        out, probs = x, None
        if classes:
            out = probs = x.new_empty(rows, x.shape[-1] // classes, classes)
            SCOPE.kernels.categorical_forward(x.numel() // classes, classes, UNIMIX, at(x), at(probs))
        kept.append(probs)
        if known is not None:
            known += kept, out
        ctx.save_for_backward(*tensors, *kept)
        return out.view(ctx.shape[:-1] + out.shape[1:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        *saved, probs = ctx.saved_tensors
        want_x, want_base, _, _, _, *want = ctx.needs_input_grad
        count = len(want)
        gradients: list[Tensor | None] = [None] * count
        gradient: Tensor | None = dy.contiguous()  # of what a layer gives on
        dz: Any = None
        if ctx.classes:
            dlogits = torch.empty_like(probs).flatten(1)
            groups = probs.numel() // ctx.classes
            SCOPE.kernels.categorical_backward(groups, ctx.classes, UNIMIX, at(probs), at(gradient), at(dlogits))
            gradient = dlogits
        for i in range(count - 3, -1, -3):
            w, bias, gain = saved[i : i + 3]
            x, z, stats = saved[count + i : count + i + 3]
            outputs, inputs = w.shape
            dz = gradient if gain is None else torch.empty_like(z)
            dx = like(x, want_x or i > 0)
            dw, dbias, dgain = gradients[i : i + 3] = [zeros(saved[j], want[j]) for j in range(i, i + 3)]
            SCOPE.kernels.layer_backward(
                x.numel() // inputs, inputs, outputs, at(x), at(w), at(gain), at(z), at(stats), at(gradient), at(dz),
                at(dx), at(dw), at(dbias), at(dgain),
            )  # fmt: skip
            gradient = dx
        dx = gradient.view(ctx.shape) if want_x and gradient is not None else None
        dbase = dz.view(*ctx.shape[:-1], dz.shape[-1]) if want_base else None
        return dx, dbase, None, None, None, *gradients


LayerWeights = tuple[Tensor, Tensor | None, Tensor | None]
"""w, bias and gain."""


def chain(
    x: Tensor, layers: Sequence[LayerWeights], base: Tensor | None = None, classes: int = 0,
    known: list[Any] | None = None,
) -> Tensor:  # fmt: skip
    turned = [SCOPE.transposed(w) for w, _, _ in layers]
    if base is not None:
        base = base.expand(*x.shape[:-1], len(layers[0][0]))
    return Chain.apply(x, base, classes, turned, known, *unless_frozen(itertools.chain.from_iterable(layers)))


class Prelude(Function):
    """deter (M, N, D), inputs (M, I) -> e (M, N, D) and the outer gate (M, N, D)."""

    @staticmethod
    def forward(ctx: Any, deter: Tensor, inputs: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        w_in, gain_in, w_out, gain_out, w_gate, bias, t_in, t_out, t_gate = tensors
        deter, inputs = deter.contiguous(), inputs.contiguous()
        (rows, tokens, width), units = deter.shape, len(w_in)
        ctx.sizes = rows, tokens, width, inputs.shape[1], units
        e, gate = torch.empty_like(deter), torch.empty_like(deter)
        ctx.kept = rows * units, rows * units, rows * tokens * width, 2 * rows * (1 + tokens)
        kept = deter.new_empty(sum(ctx.kept))
        SCOPE.kernels.prelude_forward(
            *ctx.sizes, at(deter), at(inputs), at(t_in), at(gain_in), at(t_out), at(gain_out), at(t_gate), at(bias),
            *parts(kept, *ctx.kept), at(e), at(gate),
        )  # fmt: skip
        ctx.save_for_backward(deter, inputs, w_in, gain_in, w_out, gain_out, w_gate, kept, gate)
        return e, gate

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, de: Tensor, dgate: Tensor) -> tuple[Tensor | None, ...]:
        deter, inputs, w_in, gain_in, w_out, gain_out, w_gate, kept, gate = ctx.saved_tensors
        want = any(ctx.needs_input_grad[2:])
        rows, tokens, width, _, units = ctx.sizes
        de, dgate = de.contiguous(), dgate.contiguous()
        scratch = deter.new_empty(2 * rows * (tokens * width + units))
        gradients = [torch.empty_like(deter), torch.empty_like(inputs)]
        weights = [zeros(w, want) for w in (w_in, gain_in, w_out, gain_out, w_gate)]
        weights.append(deter.new_zeros(tokens * width) if want else None)
        SCOPE.kernels.prelude_backward(
            *ctx.sizes, at(deter), at(inputs), at(w_in), at(gain_in), at(w_out), at(gain_out), at(w_gate),
            *parts(kept, *ctx.kept), at(gate), at(de), at(dgate), at(scratch), *map(at, gradients), *map(at, weights),
        )  # fmt: skip
        return *gradients, *weights, None, None, None


def prelude(deter: Tensor, inputs: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
    """weights: w_in, gain_in, w_out, gain_out, w_gate, bias."""
    turned = [SCOPE.transposed(weights[i]) for i in (0, 2, 4)]
    return Prelude.apply(deter, inputs, *unless_frozen(weights), *turned)


class Loop(Function):
    """x, injected (M, N, D) -> the next state (M, N, D); without x injected is what the MLP sees."""

    @staticmethod
    def forward(ctx: Any, x: Tensor | None, injected: Tensor, decay: Tensor | None, *tensors: Tensor) -> Tensor:
        gain_mlp, w_up, w_down, gain, t_up, t_down = tensors
        x, injected = None if x is None else x.contiguous(), injected.contiguous()
        width, hidden = w_down.shape
        rows = injected.numel() // width
        ctx.sizes = rows, width, hidden
        each = rows * width
        ctx.kept = each, each, 2 * rows * hidden, rows * hidden, each, 4 * rows
        y, kept = torch.empty_like(injected), injected.new_empty(sum(ctx.kept))
        SCOPE.kernels.loop_forward(
            *ctx.sizes, at(x), at(injected), at(decay), at(gain_mlp), at(t_up), at(t_down), at(gain),
            *parts(kept, *ctx.kept), at(y),
        )  # fmt: skip
        ctx.save_for_backward(x, decay, gain_mlp, w_up, w_down, gain, kept)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, decay, gain_mlp, w_up, w_down, gain, kept = ctx.saved_tensors
        rows, width, hidden = ctx.sizes
        want = any(ctx.needs_input_grad[2:])
        dy = dy.contiguous()
        scratch = dy.new_empty(rows * (width + 3 * hidden))
        ds = torch.empty_like(dy)
        dx = None if x is None else torch.empty_like(dy)
        ddecay = zeros(decay, want)
        weights = [zeros(w, want) for w in (gain_mlp, w_up, w_down, gain)]
        SCOPE.kernels.loop_backward(
            *ctx.sizes, at(x), at(decay), at(gain_mlp), at(w_up), at(w_down), at(gain), *parts(kept, *ctx.kept),
            at(dy), at(scratch), at(ds), at(dx), at(ddecay), *map(at, weights),
        )  # fmt: skip
        return dx, ds, ddecay, *weights, None, None


def loop(x: Tensor | None, injected: Tensor, decay: Tensor | None, *weights: Tensor) -> Tensor:
    """weights: gain_mlp, w_up, w_down, gain."""
    turned = [SCOPE.transposed(weights[i]) for i in (1, 2)]
    decay = decay.detach() if decay is not None and SCOPE.frozen else decay
    return Loop.apply(x, injected, decay, *unless_frozen(weights), *turned)


class CertifiedLoop(Function):
    """x (M, 1, D), injected (M, 1, D + 2h) -> the next state (M, 1, D) of a certified core."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, injected: Tensor, *tensors: Tensor) -> Tensor:
        decay, coupling, w_up, w_down, t_up, t_down = tensors
        x, injected = x.contiguous(), injected.contiguous()
        hidden, width = w_up.shape
        rows = x.numel() // width
        ctx.sizes = rows, width, hidden
        ctx.kept = rows * width, rows * width, rows * hidden, rows * hidden
        out, kept = torch.empty_like(x), x.new_empty(sum(ctx.kept))
        SCOPE.kernels.certified_forward(
            *ctx.sizes, at(x), at(injected), at(decay), at(coupling), at(t_up), at(t_down), *parts(kept, *ctx.kept),
            at(out),
        )  # fmt: skip
        ctx.save_for_backward(x, injected, decay, coupling, w_up, w_down, kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, injected, decay, coupling, w_up, w_down, kept = ctx.saved_tensors
        rows, width, hidden = ctx.sizes
        want, dout = any(ctx.needs_input_grad[2:]), dout.contiguous()
        scratch = dout.new_empty(2 * rows * (width + hidden))
        gradients = [torch.empty_like(x), torch.empty_like(injected)]
        weights = [zeros(w, want) for w in (decay, coupling, w_up, w_down)]
        SCOPE.kernels.certified_backward(
            *ctx.sizes, at(x), at(injected), at(decay), at(coupling), at(w_up), at(w_down), *parts(kept, *ctx.kept),
            at(dout), at(scratch), *map(at, gradients), *map(at, weights),
        )  # fmt: skip
        return *gradients, *weights, None, None


def certified_loop(x: Tensor, injected: Tensor, *weights: Tensor) -> Tensor:
    """weights: decay, coupling, w_up, w_down. injected holds the gate before its sigmoid."""
    turned = [SCOPE.transposed(weights[i]) for i in (2, 3)]
    return CertifiedLoop.apply(x, injected, *unless_frozen(weights), *turned)


class Readout(Function):
    """deter, x, gate (..., D) -> the state that goes on (..., D)."""

    @staticmethod
    def forward(ctx: Any, deter: Tensor, x: Tensor, gate: Tensor, w: Tensor, gain: Tensor, t: Tensor) -> Tensor:
        deter, x, gate = deter.contiguous(), x.contiguous(), gate.contiguous()
        width = len(w)
        rows = x.numel() // width
        ctx.kept = rows * width, rows * width, 2 * rows
        y, kept = torch.empty_like(x), x.new_empty(sum(ctx.kept))
        SCOPE.kernels.readout_forward(
            rows, width, at(deter), at(x), at(gate), at(t), at(gain), *parts(kept, *ctx.kept), at(y)
        )  # fmt: skip
        ctx.save_for_backward(deter, x, gate, w, gain, kept)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        deter, x, gate, w, gain, kept = ctx.saved_tensors
        width = len(w)
        dy = dy.contiguous()
        scratch, ddeter, dx, dgate = (torch.empty_like(dy) for _ in range(4))
        weights = [zeros(part, any(ctx.needs_input_grad[3:])) for part in (w, gain)]
        SCOPE.kernels.readout_backward(
            x.numel() // width, width, at(deter), at(x), at(gate), at(w), at(gain), *parts(kept, *ctx.kept),
            at(dy), at(scratch), at(ddeter), at(dx), at(dgate), *map(at, weights),
        )  # fmt: skip
        return ddeter, dx, dgate, *weights, None


def readout(deter: Tensor, x: Tensor, gate: Tensor, *weights: Tensor) -> Tensor:
    """weights: the coda's w and gain."""
    return Readout.apply(deter, x, gate, *unless_frozen(weights), SCOPE.transposed(weights[0]))

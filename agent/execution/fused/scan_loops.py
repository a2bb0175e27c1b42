"""The loops of one step of a scan or a dream: of the looped core and of the certified one, forward and backward.

Between prelude and read-out the two cores differ, and nowhere else. Symbols as in `scan.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor


class Sizes(NamedTuple):
    """B, D, I, units of the prelude, h, S*K and units of the posterior."""

    size: int
    width: int
    inputs: int
    units: int
    hidden: int
    latents: int
    post: int


class At:
    """Where the numbers of each row t begin in a contiguous tensor (T, ...), or of loop r and row t in (R, T, ...)."""

    def __init__(self, x: Tensor):
        self.begin, self.row, self.inner = x.data_ptr(), 4 * x.stride(0), 4 * x.stride(1)

    def __call__(self, t: int) -> int:
        return self.begin + t * self.row

    def of(self, r: int, t: int) -> int:
        return self.begin + r * self.row + t * self.inner


class LoopPlace(NamedTuple):
    """Loop r of row t, of its first `rows` samples: where x lies, what is injected, the new state or its gradient."""

    r: int
    t: int
    rows: int
    x: int
    injected: int
    y: int


Addresses = Mapping[str, int | None]
"""Of weights, their transposes, their gradients (None: not wanted), or buffers, by name."""
Places = dict[str, At]
"""Of what all rows leave for the gradient."""


class LoopedRows:
    """x_r = norm(block(decay x_{r-1} + injected)), with the names of layers.cpp for what is kept:

    s = decay x + injected,  n = norm(s),  h = (g, v) = up n,  a = silu(g) v,  o = s + down a,  x_r = norm(o)
    """

    reads = "injection"
    """The weight that is multiplied with e, once for all loops."""
    weights = "injection", "decay", "gain_mlp", "w_up", "w_down", "gain_loop"
    turned = "injection", "w_up", "w_down"

    @staticmethod
    def injected(sizes: Sizes) -> int:
        """Numbers that the loops of a sample read beside x."""
        return sizes.width

    @staticmethod
    def kept(sizes: Sizes) -> dict[str, tuple[int, ...]]:
        """Shapes of what a loop keeps of a row."""
        size, width, hidden = sizes.size, sizes.width, sizes.hidden
        states = dict.fromkeys(("s", "n", "o"), (size, width))
        return {**states, "h": (size, 2 * hidden), "a": (size, hidden), "loop_stats": (2 * size, 2)}

    @staticmethod
    def forward(run: Any, sizes: Sizes, at: Places, loop: LoopPlace, p: Addresses, turned: Addresses) -> None:
        r, t, rows, x, injected, y = loop
        run.loop_forward(
            rows, sizes.width, sizes.hidden, x, injected, p["decay"], p["gain_mlp"], turned["w_up"], turned["w_down"],
            p["gain_loop"], at["s"].of(r, t), at["n"].of(r, t), at["h"].of(r, t), at["a"].of(r, t), at["o"].of(r, t),
            at["loop_stats"].of(r, t), y,
        )  # fmt: skip

    @staticmethod
    def backward(
        run: Any, sizes: Sizes, at: Places, loop: LoopPlace, dx: int, b: Addresses, w: Addresses, g: Addresses
    ) -> None:
        """From the gradient dy of the new state that of the old one, and in b["dloop"] that of what is injected."""
        r, t, rows, x, _, dy = loop
        run.loop_backward(
            rows, sizes.width, sizes.hidden, x, w["decay"], w["gain_mlp"], w["w_up"], w["w_down"], w["gain_loop"],
            at["s"].of(r, t), at["n"].of(r, t), at["h"].of(r, t), at["a"].of(r, t), at["o"].of(r, t),
            at["loop_stats"].of(r, t), dy, b["scratch"], b["dloop"], dx, g["decay"], g["gain_mlp"], g["w_up"],
            g["w_down"], g["gain_loop"],
        )  # fmt: skip


class CertifiedRows:
    """x_r = decay x_{r-1} + coupling T(coupling x_{r-1}; e) + B e, of `world_model/certified.py`. Kept are coupling x
    as s, T as o, and its hidden units before and behind maxmin and gate as h and a."""

    reads = "reads"
    weights = "reads", "decay", "coupling", "w_up", "w_down"
    turned = "reads", "w_up", "w_down"

    @staticmethod
    def injected(sizes: Sizes) -> int:
        return sizes.width + 2 * sizes.hidden

    @staticmethod
    def kept(sizes: Sizes) -> dict[str, tuple[int, ...]]:
        state, units = (sizes.size, sizes.width), (sizes.size, sizes.hidden)
        return {"s": state, "o": state, "h": units, "a": units}

    @staticmethod
    def forward(run: Any, sizes: Sizes, at: Places, loop: LoopPlace, p: Addresses, turned: Addresses) -> None:
        r, t, rows, x, injected, y = loop
        run.certified_forward(
            rows, sizes.width, sizes.hidden, x, injected, p["decay"], p["coupling"], turned["w_up"], turned["w_down"],
            at["s"].of(r, t), at["o"].of(r, t), at["h"].of(r, t), at["a"].of(r, t), y,
        )  # fmt: skip

    @staticmethod
    def backward(
        run: Any, sizes: Sizes, at: Places, loop: LoopPlace, dx: int, b: Addresses, w: Addresses, g: Addresses
    ) -> None:
        r, t, rows, x, injected, dy = loop
        run.certified_backward(
            rows, sizes.width, sizes.hidden, x, injected, w["decay"], w["coupling"], w["w_up"], w["w_down"],
            at["s"].of(r, t), at["o"].of(r, t), at["h"].of(r, t), at["a"].of(r, t), dy, b["scratch"], dx, b["dloop"],
            g["decay"], g["coupling"], g["w_up"], g["w_down"],
        )  # fmt: skip


Rows = type[LoopedRows] | type[CertifiedRows]

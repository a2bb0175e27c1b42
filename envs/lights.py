"""Lights Out: a board of lamps to be put out, where a press toggles a lamp and its neighbours.

Boards are sets of cells, written as whole numbers: bit `row * side + column`. A press toggles the same cells whatever
else is lit, and twice is as good as not at all, so that presses and boards are vectors over the field of two numbers,
and the fewest presses that solve a board follow from linear algebra (Anderson and Feil, Mathematics Magazine 71, 1998).
"""

from functools import lru_cache
from typing import Any

import numpy as np
from gymnasium import spaces

from envs.errors import TaskError
from envs.toy_world import ToyWorld

SIDES = range(3, 8)


def toggled(side: int) -> list[int]:
    """For each cell the cells that a press on it toggles: itself, and those above, below, left and right of it."""
    cells = []
    for row in range(side):
        for column in range(side):
            places = [(row, column), (row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)]
            inside = [(r, c) for r, c in places if 0 <= r < side and 0 <= c < side]
            cells.append(sum(1 << r * side + c for r, c in inside))
    return cells


class Solver:
    """Fewest presses of boards of one size, by elimination over the field of two numbers.

    A board may be solved by several sets of presses. They differ by quiet sets, which toggle nothing: on 5 x 5 there
    are 4 of them and on 4 x 4 there are 16, the empty one included; on 3 x 3, 6 x 6 and 7 x 7 there is only that one.

    Attributes:
        presses: for each cell the cells that a press on it toggles.
        quiet: all quiet sets.
    """

    def __init__(self, side: int) -> None:
        self.presses = toggled(side)
        # Row i: the presses that toggle cell i (the relation is symmetric), and the rows that were added up in it.
        rows = [(presses, 1 << cell) for cell, presses in enumerate(self.presses)]
        order, free = list[int](), list[int]()  # presses that a row decides, and those that may be chosen
        for press in range(len(rows)):
            done = len(order)
            found = next((i for i in range(done, len(rows)) if rows[i][0] >> press & 1), None)
            if found is None:
                free.append(press)
                continue
            rows[done], rows[found] = rows[found], rows[done]
            left, right = rows[done]
            for i, (one, other) in enumerate(rows):
                if i != done and one >> press & 1:
                    rows[i] = one ^ left, other ^ right
            order.append(press)
        # A press, with the lamps whose parity says whether it is needed; and lamps of which an even number must be lit.
        self._needs = [(press, rows[i][1]) for i, press in enumerate(order)]
        self._checks = [lamps for _, lamps in rows[len(order) :]]
        self.quiet = [0]
        for press in free:
            quiet = 1 << press | sum(1 << pivot for i, pivot in enumerate(order) if rows[i][0] >> press & 1)
            self.quiet += [quiet ^ other for other in self.quiet]

    def solve(self, board: int) -> int | None:
        """A smallest set of presses that puts out the lamps of `board`; None where there is none."""
        if any((board & lamps).bit_count() & 1 for lamps in self._checks):
            return None
        presses = sum(1 << press for press, lamps in self._needs if (board & lamps).bit_count() & 1)
        return min((presses ^ quiet for quiet in self.quiet), key=int.bit_count)

    def after(self, presses: int) -> int:
        """The board that a set of presses makes of a dark one."""
        board = 0
        for cell, cells in enumerate(self.presses):
            if presses >> cell & 1:
                board ^= cells
        return board


@lru_cache(maxsize=len(SIDES))
def solver(side: int) -> Solver:
    """The solver of a size, made once."""
    return Solver(side)


class Lights(ToyWorld):
    """Put out all lamps of a board.

    A level is made by pressing distinct cells of a dark board, drawn uniformly, their number drawn uniformly from
    `presses`; so it can be solved, in at most as many presses. An action presses a cell. Reward 1, and the end, where
    all lamps are out, else 0; truncated after 2 side^2 actions.

    Observation, side^2 numbers, row by row: 1 where a lamp is lit, else 0.
    Info: `least_presses`, the fewest presses that solve the board that is observed (at most `presses`, on 4 x 4 and
    5 x 5 sometimes fewer).

    Optimal return 1; `random_return` is that of uniformly random presses, on 4 x 4 and 5 x 5 without what luck with
    another set of presses adds.

    Args:
        side: cells of a side, from 3 to 7.
        presses: fewest and most presses of a level, from 1 to side^2; by default 1 to 2 side.
        render_mode: None or "rgb_array".
    """

    optimal_return = 1.0

    def __init__(self, side: int = 5, presses: tuple[int, int] | None = None, render_mode: str | None = None) -> None:
        if side not in SIDES:
            raise TaskError(f"the board of lights must have {SIDES[0]} to {SIDES[-1]} cells a side, not {side}")
        self.side, self.cells, self.steps = side, side**2, 2 * side**2
        self.presses = presses or (1, 2 * side)
        if not 1 <= self.presses[0] <= self.presses[1] <= self.cells:
            shown = "-".join(map(str, dict.fromkeys(self.presses)))
            raise TaskError(f"lights{side} must have 1 to {self.cells} presses, the fewest first, not {shown}")
        super().__init__(0.0, 1.0, self.cells, render_mode)
        self.action_space = spaces.Discrete(self.cells)
        self.random_return = _luck(self.cells, self.presses, self.steps)
        self._solver, self._board, self._time = solver(side), 0, 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Draw a level that is not solved yet."""
        super().reset(seed=seed)
        self._time, self._board = 0, 0
        count = int(self.np_random.integers(self.presses[0], self.presses[1] + 1))
        while not self._board:  # quiet sets make a dark board; there is no size at which all sets are quiet
            chosen = self.np_random.choice(self.cells, count, replace=False)
            self._board = self._solver.after(sum(1 << int(cell) for cell in chosen))
        self._show()
        return self._observe(), self._info()

    def step(self, action: Any) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Press a cell."""
        self._time += 1
        self._board ^= self._solver.presses[int(action)]
        self._show()
        solved = self._board == 0
        return self._observe(), float(solved), solved, not solved and self._time >= self.steps, self._info()

    def _show(self) -> None:
        self._state[:] = [self._board >> cell & 1 for cell in range(self.cells)]

    def _info(self) -> dict[str, int]:
        presses = self._solver.solve(self._board)
        assert presses is not None, "a board that presses made can be solved"
        return {"least_presses": presses.bit_count()}

    def _shades(self) -> np.ndarray:
        return self._state.reshape(self.side, self.side)


def _luck(cells: int, presses: tuple[int, int], steps: int) -> float:
    """The chance that `steps` random presses undo a level's own: a walk on the number of cells still to be pressed."""
    chance = np.zeros(cells + 1)
    chance[presses[0] : presses[1] + 1] = 1.0 / (presses[1] - presses[0] + 1)
    left = np.arange(cells + 1)
    for _ in range(steps):
        moving = np.where(left > 0, chance, 0.0)  # none left: solved
        chance = chance - moving
        chance[:-1] += (moving * left / cells)[1:]
        chance[1:] += (moving * (cells - left) / cells)[:-1]
    return float(chance[0])

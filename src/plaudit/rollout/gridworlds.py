"""Gridworlds with exact answers: the mazes of Dyna and the four rooms of options. Needs the extra `control`.

A cell is a state; reaching the goal pays 1 and ends the episode. Everything is a table `[S, A, S]`, so optimal values
and expected numbers of steps are solved, not estimated. Time limits belong to `gymnasium.wrappers.TimeLimit`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

MOVES = ((-1, 0), (1, 0), (0, -1), (0, 1))
"""Up, down, left, right."""


@dataclass(frozen=True)
class Grid:
    """A map of walls (`#`) and free cells (anything else), with starts and goals.

    Attributes:
        rows: the map, one string per row.
        starts: cells `(row, column)` in which episodes begin, each as likely as the others; empty for every free cell
            that is no goal.
        goals: cells that end an episode; one of them is drawn per environment, see `GridWorld`.
        slip: after a move that succeeded, the probability of another step to a random free neighbour.
    """

    rows: tuple[str, ...]
    starts: tuple[tuple[int, int], ...]
    goals: tuple[tuple[int, int], ...]
    slip: float = 0.0

    def cells(self) -> list[tuple[int, int]]:
        """The free cells in reading order: the states."""
        return [(r, c) for r, row in enumerate(self.rows) for c, mark in enumerate(row) if mark != "#"]

    def transitions(self) -> NDArray[np.float64]:
        """`P(s' | s, a)`, `[S, 4, S]`, whatever the goal."""
        cells = self.cells()
        place = {cell: index for index, cell in enumerate(cells)}
        table = np.zeros((len(cells), len(MOVES), len(cells)))
        for index, (row, column) in enumerate(cells):
            for action, (down, right) in enumerate(MOVES):
                target = place.get((row + down, column + right), index)
                table[index, action, target] += 1 if target == index else 1 - self.slip
                if target != index and self.slip:
                    r, c = cells[target]
                    near = [place[r + d, c + e] for d, e in MOVES if (r + d, c + e) in place]
                    table[index, action, near] += self.slip / len(near)
        return table

    def optimal_values(self, goal: tuple[int, int], discount: float) -> NDArray[np.float64]:
        """`V*(s)`, `[S]`, by value iteration; 0 at the goal itself, where episodes have ended."""
        return np.asarray(self.optimal_action_values(goal, discount).max(1) * self._elsewhere(goal))

    def optimal_action_values(self, goal: tuple[int, int], discount: float) -> NDArray[np.float64]:
        """`Q*(s, a)`, `[S, 4]`."""
        table, elsewhere = self.transitions(), self._elsewhere(goal)
        values = np.zeros(len(elsewhere))
        while True:
            found = table @ (1 - elsewhere + discount * elsewhere * values)
            if np.abs(found.max(1) - values).max() < 1e-14:
                return np.asarray(found)
            values = found.max(1)

    def expected_steps(self, goal: tuple[int, int], policy: NDArray[np.float64]) -> float:
        """Mean length of an episode under a policy `[S, 4]` of probabilities, averaged over the starts."""
        elsewhere = self._elsewhere(goal).astype(bool)
        moves = np.einsum("sa,sat->st", policy, self.transitions())[np.ix_(elsewhere, elsewhere)]
        steps = np.zeros(len(elsewhere))
        steps[elsewhere] = np.linalg.solve(np.eye(len(moves)) - moves, np.ones(len(moves)))
        return float(np.mean([steps[index] for index in self.start_states(goal)]))

    def greedy_policy(self, goal: tuple[int, int], discount: float, *, exploration: float = 0.0) -> NDArray[np.float64]:
        """The ε-greedy policy on `Q*`, `[S, 4]`; equally good actions share."""
        values = self.optimal_action_values(goal, discount)
        best = values > values.max(1, keepdims=True) - 1e-9
        return np.asarray((1 - exploration) * best / best.sum(1, keepdims=True) + exploration / len(MOVES))

    def start_states(self, goal: tuple[int, int]) -> list[int]:
        """Numbers of the states in which episodes may begin."""
        cells = self.cells()
        return [cells.index(cell) for cell in (self.starts or cells) if cell != goal]

    def _elsewhere(self, goal: tuple[int, int]) -> NDArray[np.float64]:
        cells = self.cells()
        if goal not in cells:
            raise ValueError(f"the goal {goal} is not a free cell of the map")
        return np.array([float(cell != goal) for cell in cells])


class GridWorld(gymnasium.Env[np.int64, np.int64]):
    """A `Grid` as a Gymnasium environment: observation = cell, four moves, 1 at the goal.

    Attributes:
        grid: the map in force.
        goal: the goal in force; `new_goal` draws another.
    """

    metadata = {"render_modes": []}  # noqa: RUF012 Gymnasium's own form

    def __init__(
        self, grid: Grid, *, later: Sequence[tuple[int, Grid]] = (), goal: tuple[int, int] | None = None
    ) -> None:
        """Begin with `grid`; each `(steps, grid)` of `later` takes over once that many steps were taken in all.

        Raises:
            ValueError: if the maps differ in size, or the goal is not free in one of them.
        """
        grids = [grid, *(changed for _, changed in later)]
        sizes = {(len(each.rows), *map(len, each.rows)) for each in grids}
        if len(sizes) > 1:
            raise ValueError(f"maps that follow each other must have the same size, got {sorted(sizes)}")
        self._schedule = list(later)
        self._taken = 0
        self.goal = goal or grid.goals[0]
        if any(self.goal not in each.cells() for each in grids):
            raise ValueError(f"the goal {self.goal} is not a free cell of every map")
        cells = [(r, c) for r, row in enumerate(grid.rows) for c in range(len(row))]
        # States are numbered over the whole rectangle where maps change, so that a number keeps its cell.
        self._numbers = {cell: index for index, cell in enumerate(cells if later else grid.cells())}
        self.observation_space = spaces.Discrete(len(self._numbers))
        self.action_space = spaces.Discrete(len(MOVES))
        self._use(grid)
        self._cell = self.grid.start_states(self.goal)[0]

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.int64, dict[str, Any]]:
        """Begin in one of the starts."""
        super().reset(seed=seed)
        starts = self.grid.start_states(self.goal)
        self._cell = int(starts[self.np_random.integers(len(starts))])
        return self._observation(), {}

    def step(self, action: np.int64) -> tuple[np.int64, float, bool, bool, dict[str, Any]]:
        """Move; terminated at the goal, never truncated."""
        drawn = self.np_random.random()
        self._cell = int(np.searchsorted(self._cumulative[self._cell, int(action)], drawn, side="right"))
        reached = self._cells[self._cell] == self.goal
        observation = self._observation()
        self._taken += 1
        if self._schedule and self._taken >= self._schedule[0][0]:
            cell = self._cells[self._cell]
            self._use(self._schedule.pop(0)[1])
            if cell in self._cells:
                self._cell = self._cells.index(cell)
            else:  # a wall rose where the walker stood
                self._cell = self.grid.start_states(self.goal)[0]
                observation = self._observation()
        return observation, float(reached), reached, False, {}

    def new_goal(self, seed: int) -> tuple[int, int]:
        """Draw one of the grid's goals, in force from now on; begin a new episode afterwards."""
        goals = self.grid.goals
        self.goal = goals[int(np.random.default_rng(seed).integers(len(goals)))]
        return self.goal

    def _use(self, grid: Grid) -> None:
        self.grid = grid
        self._cells = grid.cells()
        self._cumulative = grid.transitions().cumsum(-1)
        # Exactly 1 from the last cell that can be reached on, so that rounding never leads behind it.
        self._cumulative /= self._cumulative[..., -1:]

    def _observation(self) -> np.int64:
        return np.int64(self._numbers[self._cells[self._cell]])


def dyna_maze() -> Grid:
    """The maze of Sutton and Barto, second edition, example 8.1: 14 steps from start to goal."""
    rows = (".......#.", "..#....#.", "..#....#.", "..#......", ".....#...", ".........")
    return Grid(rows, starts=((2, 0),), goals=((0, 8),))


def blocking_maze() -> tuple[Grid, Grid]:
    """Example 8.2: the short way, at the right, closes (after 1000 steps in the book) and one at the left opens."""
    before = Grid((".........",) * 3 + ("########.",) + (".........",) * 2, starts=((5, 3),), goals=((0, 8),))
    return before, replace(before, rows=(*before.rows[:3], ".########", *before.rows[4:]))


def shortcut_maze() -> tuple[Grid, Grid]:
    """Example 8.3: the way at the left stays open, and (after 3000 steps) a shorter one opens at the right."""
    before = blocking_maze()[1]
    return before, replace(before, rows=(*before.rows[:3], ".#######.", *before.rows[4:]))


def four_rooms() -> Grid:
    """The four rooms of Sutton, Precup, Singh (1999) as Bacon et al. (arXiv:1609.05140) use them.

    Starts are all free cells; a third of the successful moves slip on. The first goal is the east doorway; the others
    are the cells of the lower right room and its west doorway, one of which it moves to.
    """
    rows = (
        *("#############", "#.....#.....#", "#.....#.....#", "#...........#", "#.....#.....#", "#.....#.....#"),
        *("##.####.....#", "#.....###.###", "#.....#.....#", "#.....#.....#", "#...........#", "#.....#.....#"),
        "#############",
    )
    room = tuple((r, c) for r in range(8, 12) for c in range(7, 12))
    return Grid(rows, starts=(), goals=((7, 9), (10, 6), *room), slip=1 / 3)


class GridWalks:
    """Many independent walks on one grid, side by side, each with a goal of its own: for averages over runs.

    Steps are those of `GridWorld`; episodes are begun by their owner, since every run counts its own.

    Attributes:
        grid: the map.
        states, goals: `[R]` int64, where each walk is and where its episode ends.
    """

    def __init__(self, grid: Grid, num_walks: int, *, seed: int = 0) -> None:
        """Begin `num_walks` episodes towards the grid's first goal."""
        self.grid = grid
        self._cells = grid.cells()
        self._random = np.random.default_rng(seed)
        self._cumulative = grid.transitions().cumsum(-1)
        self._cumulative /= self._cumulative[..., -1:]
        self.goals = np.full(num_walks, self._cells.index(grid.goals[0]))
        self.states = np.zeros(num_walks, dtype=np.int64)
        self.restart(np.ones(num_walks, dtype=bool))

    def step(self, actions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Move each walk by its action `[R]`; where they are then, and which have reached their goal."""
        drawn = self._random.random(len(actions))[:, None]
        self.states = (self._cumulative[self.states, actions] <= drawn).sum(1)
        return self.states, self.states == self.goals

    def restart(self, rows: NDArray[np.bool_]) -> None:
        """Put the walks `[R]` bool into a random start that is not their goal."""
        allowed = np.array([self._cells.index(cell) for cell in (self.grid.starts or self._cells)])
        while rows.any():
            self.states = np.where(rows, allowed[self._random.integers(len(allowed), size=len(rows))], self.states)
            rows = rows & (self.states == self.goals)

    def move_goals(self, rows: NDArray[np.bool_]) -> None:
        """Draw one of the grid's other goals for each of the walks `[R]` bool."""
        others = np.array([self._cells.index(cell) for cell in self.grid.goals[1:]])
        self.goals = np.where(rows, others[self._random.integers(len(others), size=len(rows))], self.goals)

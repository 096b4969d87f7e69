"""Tasks whose reward lies behind a memory: a key at one end of a corridor and its door at the other, and text alike."""

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from plaudit.rollout.environments import TokenMDPEnvironment
from plaudit.rollout.token_mdp import TokenMDP


class ReturningCorridor(gymnasium.Env[np.int64, np.int64]):
    """A corridor of `length` cells: right (1) leads on, left (0) back to the start; only the last cell pays, and ends.

    Chance gets there in one of `2^length` tries; an episode is cut off after `length + 2` steps. What is seen is the
    cell, `0..length`.
    """

    metadata = {"render_modes": []}  # noqa: RUF012 Gymnasium's own form

    def __init__(self, length: int = 14) -> None:
        """Raises `ValueError` for no cells."""
        if length < 1:
            raise ValueError(f"length must be at least 1, got {length}")
        self.length = length
        self.observation_space = spaces.Discrete(length + 1)
        self.action_space = spaces.Discrete(2)
        self._cell = self._steps = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.int64, dict[str, Any]]:
        """Begin at the start."""
        super().reset(seed=seed)
        self._cell = self._steps = 0
        return np.int64(0), {}

    def step(self, action: np.int64) -> tuple[np.int64, float, bool, bool, dict[str, Any]]:
        """Move on or back; 1 at the end, else 0."""
        self._steps, self._cell = self._steps + 1, self._cell + 1 if action == 1 else 0
        there = self._cell == self.length
        return np.int64(self._cell), float(there), there, self._steps >= self.length + 2, {}


class KeyDoorCorridor(gymnasium.Env[np.int64, np.int64]):
    """`N` cells in a row, the key in the first, the door in the last; 1 for reaching the door with the key.

    Episodes begin in the middle, `(N - 1) // 2`. Actions: 0 left, 1 right. What is seen is the cell, `0..N-1`, and with
    the key `N..2N-1`; with `key_seen` false the cell alone, so that having the key has to be remembered. The best
    policy takes `(N - 1) // 2 + N - 1` steps. Truncated after `max_steps`.
    """

    metadata = {"render_modes": []}  # noqa: RUF012 Gymnasium's own form

    def __init__(self, num_cells: int = 20, *, max_steps: int = 200, key_seen: bool = True) -> None:
        """Raises `ValueError` for fewer than two cells or no steps."""
        if num_cells < 2 or max_steps < 1:
            raise ValueError(f"num_cells ≥ 2 and max_steps ≥ 1, got {num_cells} and {max_steps}")
        self.num_cells, self.max_steps, self.key_seen = num_cells, max_steps, key_seen
        self.observation_space = spaces.Discrete(2 * num_cells if key_seen else num_cells)
        self.action_space = spaces.Discrete(2)
        self._cell, self._has_key, self._steps = 0, False, 0

    @property
    def shortest(self) -> int:
        """Steps of the best policy."""
        return (self.num_cells - 1) // 2 + self.num_cells - 1

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.int64, dict[str, Any]]:
        """Begin in the middle without the key."""
        super().reset(seed=seed)
        self._cell, self._has_key, self._steps = (self.num_cells - 1) // 2, False, 0
        return self._observation(), {}

    def step(self, action: np.int64) -> tuple[np.int64, float, bool, bool, dict[str, Any]]:
        """Move; walls at both ends."""
        self._cell = int(np.clip(self._cell + (1 if action else -1), 0, self.num_cells - 1))
        self._has_key |= self._cell == 0
        self._steps += 1
        reached = self._has_key and self._cell == self.num_cells - 1
        truncated = self._steps >= self.max_steps and not reached
        return self._observation(), float(reached), reached, truncated, {}

    def success_of_random_walk(self) -> float:
        """Probability that a walk of fair coin tosses reaches the door with the key in time, exactly."""
        size = self.num_cells
        moves = np.zeros((2 * size, 2 * size))
        for key in (0, 1):
            for cell in range(size):
                for target in (max(cell - 1, 0), min(cell + 1, size - 1)):
                    held = key or target == 0
                    if not (key and cell == size - 1):
                        moves[key * size + cell, held * size + target] += 0.5
        moves[2 * size - 1, 2 * size - 1] = 1
        start = np.zeros(2 * size)
        start[(size - 1) // 2] = 1
        return float((start @ np.linalg.matrix_power(moves, self.max_steps))[-1])

    def _observation(self) -> np.int64:
        return np.int64(self._cell + (self.num_cells if self.key_seen and self._has_key else 0))


class LastTokenEnvironment(TokenMDPEnvironment):
    """A `TokenMDP` of which only the last token is seen, and before the first one the prompt.

    Observation `v` is the token v, `V + p` the beginning of prompt p. With the reward `key_and_door` the key of the
    prompt has to be remembered to the last word.
    """

    def __init__(self, mdp: TokenMDP | None = None) -> None:
        super().__init__(mdp)
        self.observation_space = spaces.Discrete(self.mdp.vocabulary + self.mdp.num_prompts)
        self._last = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.int64, dict[str, Any]]:
        """Begin a string; the prompt is seen."""
        _, information = super().reset(seed=seed, options=options)
        self._last = self.mdp.vocabulary + int(information["prompt"])
        return np.int64(self._last), information

    def step(self, action: np.int64) -> tuple[np.int64, float, bool, bool, dict[str, Any]]:
        """Append a token, and see it."""
        _, reward, terminated, truncated, information = super().step(action)
        self._last = int(action)
        return np.int64(self._last), reward, terminated, truncated, information

"""Dyna with tables: every real step teaches the values and a model of the world; the model then teaches the values.

    Q(s, a) ← Q(s, a) + α [r + γ c max_b Q(s', b) - Q(s, a)],    Model(s, a) ← (r, s', c)

after each real step, and then `planning_steps` times the same with steps out of the model (`c` is 0 at an end, else 1).

Sources: Sutton, "Integrated architectures for learning, planning, and reacting" (ICML 1990); Sutton and Barto, second
edition, sections 8.2 (Dyna-Q), 8.3 (Dyna-Q+) and 8.4 (prioritised sweeping). As in the book the model is that of a
deterministic world: it keeps what happened last. Departures: ties are broken at random everywhere; a step that was cut
off by a time limit is learned from with its bootstrap, as any other; an action that was never tried has waited since
its state was first met, not since the beginning; in prioritised sweeping the real step is an update like any other,
taken in its turn, and a step whose error stays above the threshold (α < 1) waits in the queue again.
"""

import heapq
import random
from collections.abc import Iterator
from typing import Any

import torch

from plaudit.configs.dyna import DynaConfig

Outcome = tuple[float, int, float]
"""What a step led to: reward, following state, `continues`."""


class DynaTables:
    """Action values, the model, and how both learn: Dyna-Q, Dyna-Q+ or prioritised sweeping.

    Attributes:
        config: the options.
        values: `Q`, `[S][A]`, 0 at first.
        model: what each tried action last led to, `{state: {action: outcome}}`.
        last_tried: the real step at which each action was last tried in each state that was acted in.
        num_steps: real steps so far.
    """

    def __init__(self, config: DynaConfig, num_states: int, num_actions: int, *, seed: int = 0) -> None:
        """Tables of zeros.

        Raises:
            ValueError: for sizes below 1.
        """
        if min(num_states, num_actions) < 1:
            raise ValueError(f"states and actions must be at least 1, got {num_states} and {num_actions}")
        self.config = config
        self.values = [[0.0] * num_actions for _ in range(num_states)]
        self.model: dict[int, dict[int, Outcome]] = {}
        self.last_tried: dict[int, list[int]] = {}
        self.num_steps = 0
        self._seen: list[int] = []
        self._before: dict[int, set[tuple[int, int]]] = {}
        self._queue: list[tuple[float, int, int]] = []
        self._priorities: dict[tuple[int, int], float] = {}
        self._random = random.Random(seed)

    def greedy(self, state: int) -> int:
        """An action of the highest value, drawn among equals."""
        row = self.values[state]
        best = max(row)
        places = [action for action, value in enumerate(row) if value == best]
        return places[0] if len(places) == 1 else self._random.choice(places)

    def act(self, state: int) -> int:
        """ε-greedy."""
        if self._random.random() < self.config.exploration:
            return self._random.randrange(len(self.values[state]))
        return self.greedy(state)

    def learn(self, state: int, action: int, reward: float, following: int, continues: float) -> float:
        """One real step: values, model, then `planning_steps` imagined ones.

        Returns:
            the temporal-difference error of the real step.
        """
        self.num_steps += 1
        outcome = (reward, following, continues)
        self._remember(state, action, outcome)
        error = self._error(state, action, outcome)
        if self.config.planning == "prioritised":
            self._push(state, action)
            self._sweep()
        else:
            self.values[state][action] += self.config.learning_rate * error
            self._imagine()
        return error

    def play(self, world: Any, *, seed: int) -> Iterator[tuple[float, bool]]:
        """Act and learn in a Gymnasium environment with discrete observations, for as long as somebody asks.

        Args:
            world: is reset with `seed` first, and again after every end.
            seed: of the world.

        Yields:
            the reward of each step, and whether an episode ended with it.
        """
        state = int(world.reset(seed=seed)[0])
        while True:
            action = self.act(state)
            observation, reward, terminated, truncated, _ = world.step(action)
            self.learn(state, action, float(reward), int(observation), float(not terminated))
            ended = bool(terminated or truncated)
            state = int(world.reset()[0]) if ended else int(observation)
            yield float(reward), ended

    def state_dict(self) -> dict[str, Any]:
        """Everything as tensors and numbers."""
        version, words, gauss = self._random.getstate()
        rows = [(s, a, *outcome) for s, known in self.model.items() for a, outcome in known.items()]
        return {
            "values": torch.tensor(self.values, dtype=torch.float64),
            "model": torch.tensor(rows, dtype=torch.float64).reshape(-1, 5),
            "last_tried": torch.tensor([(s, *self.last_tried[s]) for s in self._seen], dtype=torch.int64),
            "queue": torch.tensor([(*k, p) for k, p in self._priorities.items()], dtype=torch.float64).reshape(-1, 3),
            "num_steps": self.num_steps,
            "random": {"version": version, "words": torch.tensor(words), "gauss": gauss},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.values = state["values"].tolist()
        self.last_tried = {row[0]: row[1:] for row in state["last_tried"].tolist()}
        self._seen = list(self.last_tried)
        self.model, self._before = {s: {} for s in self._seen}, {}
        for s, a, reward, following, continues in state["model"].tolist():
            self.model[int(s)][int(a)] = (reward, int(following), continues)
            if continues:
                self._before.setdefault(int(following), set()).add((int(s), int(a)))
        self._priorities = {(int(s), int(a)): priority for s, a, priority in state["queue"].tolist()}
        self._queue = sorted((-priority, *key) for key, priority in self._priorities.items())
        self.num_steps = state["num_steps"]
        drawn = state["random"]
        self._random.setstate((drawn["version"], tuple(drawn["words"].tolist()), drawn["gauss"]))

    def _error(self, state: int, action: int, outcome: Outcome) -> float:
        """`r + γ c max_b Q(s', b) - Q(s, a)`."""
        reward, following, continues = outcome
        ahead = self.config.discount * max(self.values[following]) if continues else 0.0
        return reward + ahead - self.values[state][action]

    def _remember(self, state: int, action: int, outcome: Outcome) -> None:
        if state not in self.model:
            self._seen.append(state)
            # What was never tried counts as tried when the state was first met.
            self.model[state], self.last_tried[state] = {}, [self.num_steps] * len(self.values[state])
        old = self.model[state].get(action)
        if old is not None and old[1] in self._before:
            self._before[old[1]].discard((state, action))
        if outcome[2]:
            self._before.setdefault(outcome[1], set()).add((state, action))
        self.model[state][action] = outcome
        self.last_tried[state][action] = self.num_steps

    def _imagine(self) -> None:
        """Steps from states that were seen, each as likely, with an action that was tried there (Dyna-Q+: any)."""
        config, drawn, values = self.config, self._random.random, self.values
        for _ in range(config.planning_steps):
            state = self._seen[int(drawn() * len(self._seen))]
            known = self.model[state]
            if config.bonus:
                action = int(drawn() * len(values[state]))
                # An action that was never tried is imagined to lead nowhere (section 8.3, note).
                reward, following, continues = known.get(action, (0.0, state, 1.0))
                reward += config.bonus * (self.num_steps - self.last_tried[state][action]) ** 0.5
                outcome = (reward, following, continues)
            else:
                tried = tuple(known)
                action = tried[int(drawn() * len(tried))]
                outcome = known[action]
            values[state][action] += config.learning_rate * self._error(state, action, outcome)

    def _push(self, state: int, action: int) -> None:
        """Into the queue by the size of its error, or up in it."""
        error = abs(self._error(state, action, self.model[state][action]))
        if error > max(self.config.threshold, self._priorities.get((state, action), 0.0)):
            self._priorities[state, action] = error
            heapq.heappush(self._queue, (-error, state, action))

    def _sweep(self) -> None:
        """The most surprising steps first; then whatever leads to the states whose values have moved (section 8.4).

        `planning_steps` + 1 updates: the real step itself is one where it is among the most surprising.
        """
        updates = 0
        while self._queue and updates <= self.config.planning_steps:
            priority, state, action = heapq.heappop(self._queue)
            if self._priorities.get((state, action)) != -priority:
                continue  # it has moved up since, and its turn was then
            del self._priorities[state, action]
            updates += 1
            error = self._error(state, action, self.model[state][action])
            self.values[state][action] += self.config.learning_rate * error
            # With α < 1 the step itself is still wrong by a part of its error.
            self._push(state, action)
            for before in sorted(self._before.get(state, ())):
                self._push(*before)

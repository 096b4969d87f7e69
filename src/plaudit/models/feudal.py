"""The network of a feudal agent: a manager that points, a worker that moves.

Vezhnevets et al., "FeUdal networks for hierarchical reinforcement learning" (arXiv:1703.01161), section 3:

    z_t = f_percept(x_t),  s_t = f_space(z_t),  g_t = normalised pooled output of a dilated LSTM over s_t,
    w_t = φ(Σ_{i=t-c}^t g_i),  U_t = f_worker(z_t) in R^{A×k},  π_t = softmax(U_t w_t).

Departures: `f_space` ends in tanh where the paper has a rectifier, since a latent space of a few dimensions would lose
half of them; the worker reads the mean of the last goals and not their sum, so that a longer horizon does not make its
steps larger; perceptrons in place of convolutions; goals are never random. No gradient goes from the worker into the
manager: the goals that it reads are constants to it.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from plaudit.models.recurrent import start_orthogonal


class FeudalOutputs(NamedTuple):
    """One step of both levels.

    Attributes:
        logits: `[B, A]`, of the worker.
        values: `[B]`, `V^D`, the worker's value of rewards and intrinsic rewards.
        manager_values: `[B]`, `V^M`, the manager's value of rewards.
        goals: `[B, D]`, `g_t` of length 1, with the manager's gradient.
        states: `[B, D]`, `s_t`.
    """

    logits: Tensor
    values: Tensor
    manager_values: Tensor
    goals: Tensor
    states: Tensor


class FeudalMemory(NamedTuple):
    """What both levels remember between two steps; `FeudalNetwork` packs it into one row of numbers.

    Attributes:
        worker: `[B, 2, H]`, its LSTM's output and cell.
        manager: `[B, r, 2, D]`, those of the r cores of the dilated LSTM, the one whose turn is next in front.
        goals: `[B, c, D]`, the last c goals, the latest at the end; 0 before the episode.
        states: `[B, c, D]`, the latent states in which they were set.
        age: `[B]`, steps since the episode began.
    """

    worker: Tensor
    manager: Tensor
    goals: Tensor
    states: Tensor
    age: Tensor


class FeudalNetwork(nn.Module):
    """Manager and worker over a shared percept; satisfies `RecurrentNetwork`.

    **Dilated LSTM** (equation 9): r cores with shared weights take turns, so each sees every r-th state and remembers r
    times as long; what goes out is the mean of all their latest outputs. With `r = 1` it is a plain LSTM.

    Attributes:
        observation_size, num_actions, memory_size: `O`, `A`, `M`.
        horizon: `c`.
        dilation: `r`.
    """

    def __init__(
        self,
        observation_size: int,
        num_actions: int,
        *,
        percept_size: int = 32,
        manager_size: int = 16,
        goal_size: int = 8,
        horizon: int = 10,
        dilation: int | None = None,
        seed: int = 0,
    ) -> None:
        """Draw the weights from `seed`; the global generator is left as it was.

        Args:
            observation_size, num_actions: `O`, `A`.
            percept_size: `H`, of the percept and the worker's LSTM.
            manager_size: `D`, of latent states and goals.
            goal_size: `k`, of the goal as the worker reads it.
            horizon: `c`.
            dilation: `r`; None for `c`, as in the paper.
            seed: of the weights.

        Raises:
            ValueError: for sizes below 1.
        """
        super().__init__()
        self.observation_size, self.num_actions = observation_size, num_actions
        self.horizon, self.dilation = horizon, dilation or horizon
        sizes = (observation_size, num_actions, percept_size, manager_size, goal_size, self.horizon, self.dilation)
        if min(sizes) < 1:
            raise ValueError(f"sizes must be at least 1, got {sizes}")
        self._hidden, self._latent, self._goal_size = percept_size, manager_size, goal_size
        self._sizes = [2 * percept_size, 2 * self.dilation * manager_size, *[horizon * manager_size] * 2, 1]
        self.memory_size = sum(self._sizes)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.percept = nn.Linear(observation_size, percept_size)
            self.worker = nn.ModuleDict(
                {
                    "core": nn.LSTMCell(percept_size, percept_size),
                    "actions": nn.Linear(percept_size, num_actions * goal_size),
                    "goal": nn.Linear(manager_size, goal_size, bias=False),
                    "critic": nn.Linear(percept_size, 1),
                }
            )
            self.manager = nn.ModuleDict(
                {
                    "space": nn.Linear(percept_size, manager_size),
                    "core": nn.LSTMCell(manager_size, manager_size),
                    "critic": nn.Linear(manager_size, 1),
                }
            )
            start_orthogonal(self)
            nn.init.orthogonal_(self.worker["actions"].get_parameter("weight"), 0.1)

    def forward(self, observations: Tensor, memory: Tensor) -> tuple[FeudalOutputs, Tensor]:
        """One step of `[B, O]` observations with memory `[B, M]`."""
        past = self.unpack(memory)
        seen = torch.tanh(self.percept(observations))
        states = torch.tanh(self.manager["space"](seen))
        turn = past.manager[:, 0]
        core = torch.stack(self.manager["core"](states, (turn[:, 0], turn[:, 1])), 1)
        manager = torch.cat([past.manager[:, 1:], core.unsqueeze(1)], 1)
        pooled = manager[:, :, 0].mean(1)
        goals = nn.functional.normalize(pooled, dim=1)
        known = past.age.clamp_max(self.horizon).unsqueeze(1) + 1
        direction = self.worker["goal"]((past.goals.sum(1) + goals.detach()) / known)
        worker = torch.stack(self.worker["core"](seen, (past.worker[:, 0], past.worker[:, 1])), 1)
        hidden = worker[:, 0]
        actions = self.worker["actions"](hidden).unflatten(1, (self.num_actions, self._goal_size))
        found = FeudalOutputs(
            torch.einsum("bak,bk->ba", actions, direction),
            self.worker["critic"](hidden).squeeze(1),
            self.manager["critic"](pooled).squeeze(1),
            goals,
            states,
        )
        set_goals = torch.cat([past.goals[:, 1:], goals.detach().unsqueeze(1)], 1)
        left = torch.cat([past.states[:, 1:], states.detach().unsqueeze(1)], 1)
        return found, self.pack(FeudalMemory(worker, manager, set_goals, left, past.age + 1))

    def latent_states(self, observations: Tensor) -> Tensor:
        """`s` of observations `[..., O]`, which need no memory; `[..., D]`."""
        found: Tensor = torch.tanh(self.manager["space"](torch.tanh(self.percept(observations))))
        return found

    def pack(self, memory: FeudalMemory) -> Tensor:
        """One row `[B, M]`."""
        return torch.cat([part.flatten(1) if part.ndim > 1 else part.unsqueeze(1) for part in memory], 1)

    def unpack(self, memory: Tensor) -> FeudalMemory:
        """The parts of rows `[B, M]`."""
        rows = len(memory)
        worker, manager, goals, states, age = torch.split(memory, self._sizes, 1)
        return FeudalMemory(
            worker.reshape(rows, 2, self._hidden),
            manager.reshape(rows, self.dilation, 2, self._latent),
            goals.reshape(rows, self.horizon, self._latent),
            states.reshape(rows, self.horizon, self._latent),
            age.squeeze(1),
        )

"""Goals of a language model: a manager that reads its states every c tokens, and bends the words that follow.

Feudal networks (Vezhnevets et al., arXiv:1703.01161) over the states `h_t` of a language model:

    s_t = tanh(f_space(norm h_t)),   g_k = normalised output of an LSTM over s_0, s_c, s_2c, …,
    π(·|y_<t) = softmax(head(h_t + φ g_k) / temperature),   k = ⌊t / c⌋.

A goal is a function of the text before it, so this is an ordinary policy: log-probabilities are exact, and what it can
reach with φ = 0, where it begins, is what the language model can. An LSTM that steps every c tokens is one core of the
paper's dilated LSTM with r = c. Departures: one goal is in force at a time, not the mean of the last c; φ is added to
what the vocabulary head reads, where the paper multiplies; no gradient of either level goes through the other, nor from
the manager into the language model, whose states are its percept as they are.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, normalize

from plaudit.core.entropy import logprobs_and_entropy
from plaudit.models.aggregation import TokenSpans
from plaudit.models.beside import read_beside, write_beside
from plaudit.models.recurrent import start_orthogonal


class ManagerOutputs(NamedTuple):
    """What the manager says at each of its `K` steps.

    Attributes:
        states: `[C, K, D]`, `s`, the latent states in which the goals are set.
        goals: `[C, K, D]`, of length 1.
        values: `[C, K]`, `V^M`, what the rest of the answer will earn.
    """

    states: Tensor
    goals: Tensor
    values: Tensor


class GoalHeads(nn.Module):
    """Manager and goal embedding beside a language model; satisfies `plaudit.models.steering.Steering`.

    Attributes:
        horizon: `c`, tokens for which a goal is in force.
        manager: `space` (`H → D`), `core` (LSTM) and `critic` (`D → 1`).
        embedding: `φ`, linear `D → H` without bias, 0 at first: the policy begins as the language model.
        spread: `1 - |mean goal|` of the last evaluation, see `metrics`.
    """

    kind = "goals"

    def __init__(self, hidden_size: int, *, horizon: int = 8, manager_size: int = 32, seed: int = 0) -> None:
        """Draw the manager from `seed`; the global generator is left as it was.

        Raises:
            ValueError: for sizes below 1.
        """
        super().__init__()
        if min(hidden_size, horizon, manager_size) < 1:
            raise ValueError(f"sizes must be at least 1, got {hidden_size}, {horizon} and {manager_size}")
        self.horizon = horizon
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.manager = nn.ModuleDict(
                {
                    "space": nn.Linear(hidden_size, manager_size),
                    "core": nn.LSTMCell(manager_size, manager_size),
                    "critic": nn.Linear(manager_size, 1),
                }
            )
            start_orthogonal(self.manager)
            self.embedding = nn.Linear(manager_size, hidden_size, bias=False)
        nn.init.zeros_(self.embedding.weight)
        nn.init.zeros_(self.manager["critic"].get_parameter("weight"))
        self.spread = 0.0

    @property
    def manager_size(self) -> int:
        """`D`."""
        return int(self.embedding.in_features)

    def latent(self, states: Tensor) -> Tensor:
        """`s` of the language model's states `[..., H]`, into which no gradient goes; `[..., D]` float32."""
        with torch.autocast(states.device.type, enabled=False):
            seen = states.detach().float()
            found: Tensor = torch.tanh(self.manager["space"](layer_norm(seen, seen.shape[-1:])))
        return found

    def unroll(self, states: Tensor) -> ManagerOutputs:
        """The manager along the language model's states `[C, K, H]` at its own steps, from the first one on."""
        latent = self.latent(states)
        memory = latent.new_zeros(2, len(latent), self.manager_size)
        goals, values = [], []
        for step in range(latent.shape[1]):
            goal, value, memory = self.step(latent[:, step], memory)
            goals.append(goal)
            values.append(value)
        return ManagerOutputs(latent, torch.stack(goals, 1), torch.stack(values, 1))

    def step(self, latent: Tensor, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One step of the manager in latent states `[C, D]` with the LSTM's output and cell `[2, C, D]`.

        Returns:
            the goals `[C, D]`, the values `[C]`, and the memory after it.
        """
        with torch.autocast(latent.device.type, enabled=False):
            hidden, cell = self.manager["core"](latent, (memory[0], memory[1]))
            value = self.manager["critic"](hidden).squeeze(1)
        return normalize(hidden, dim=1), value, torch.stack([hidden, cell])

    def terms(
        self,
        states: Tensor,
        last_tokens: Tensor,
        targets: Tensor,
        spans: TokenSpans,
        *,
        head: tuple[Tensor, Tensor | None, float | None],
        temperature: float,
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies `[M]` of tokens; see `plaudit.models.steering.Steering`."""
        with torch.no_grad():
            begun, place = spans.step % self.horizon == 0, spans.step // self.horizon
            count = (int(spans.lengths.max()) + self.horizon - 1) // self.horizon
            table = states.new_zeros(spans.lengths.shape[0], count, states.shape[-1])
            goals = self.unroll(table.index_put((spans.owner[begun], place[begun]), states[begun])).goals
            set_ones = goals[spans.owner[begun], place[begun]]
            self.spread = float(1 - set_ones.mean(0).norm())
        bent = states + self.embedding(goals[spans.owner, place]).to(states.dtype)
        weight, bias, softcap = head
        return logprobs_and_entropy(bent, weight, targets, bias=bias, temperature=temperature, softcap=softcap)

    def metrics(self) -> dict[str, float]:
        """`manager/goal_spread`, as of the last evaluation: 0 where all goals point the same way."""
        return {"manager/goal_spread": self.spread}

    def save(self, folder: Path) -> None:
        """Write the heads beside a saved model."""
        write_beside(self, folder, self.kind, {"horizon": self.horizon})

    @classmethod
    def load(cls, folder: Path) -> "GoalHeads":
        """The heads that `save` wrote.

        Raises:
            ValueError: if the folder holds none.
        """
        weights, description = read_beside(folder, cls.kind)
        hidden_size, manager_size = weights["embedding.weight"].shape
        found = cls(hidden_size, horizon=description["horizon"], manager_size=manager_size)
        found.load_state_dict(weights)
        return found

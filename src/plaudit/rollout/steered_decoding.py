"""Decoding of a language model that is steered: heads that follow every row, by its styles or by its manager's goals.

To be used in this order for each step: call, `read` the tokens that were drawn, and `keep` the rows that go on.
"""

import torch
from torch import Tensor, nn

from plaudit.core.hierarchy_losses import next_belief
from plaudit.models.causal_lm import CausalLM
from plaudit.models.goals import GoalHeads
from plaudit.models.styles import StyleHeads


class _Head:
    """States `[R, H]` to float32 logits `[R, V]`."""

    def __init__(self, model: CausalLM) -> None:
        self._weight, self._bias, self._softcap = model.head
        self.scale = model.logit_scale

    def __call__(self, states: Tensor) -> Tensor:
        logits = nn.functional.linear(states, self._weight.to(states.dtype), self._bias).float()
        return logits if self._softcap is None else self._softcap * torch.tanh(logits / self._softcap)


class StyleHead:
    """The marginal over styles, by a belief that follows every row: `T log Σ_ω b(ω) π_ω`.

    Dividing it by the temperature gives the mixture of the styles at that temperature, which is what `StyleHeads.terms`
    evaluates.

    Attributes:
        belief: `[R, W]`, log-probability of the style in force after the last token; None before the first.
    """

    def __init__(self, model: CausalLM, styles: StyleHeads, temperature: float) -> None:
        self._head, self._styles, self._temperature = _Head(model), styles, temperature
        self.belief: Tensor | None = None
        self._last: Tensor | None = None
        self._joint: Tensor | None = None

    def __call__(self, states: Tensor) -> Tensor:
        """States `[R, H]` to float32 logits `[R, V]`."""
        states = states * self._head.scale
        each = [
            torch.log_softmax(self._head(states + vector.to(states.dtype)) / self._temperature, -1)
            for vector in self._styles.vectors
        ]
        choices = self._styles.choices(states)
        if self.belief is None or self._last is None:
            arrived = choices
        else:
            arrived = next_belief(self.belief, choices, self._styles.terminations(states, self._last))
        self._joint = torch.stack(each, 1) + arrived.unsqueeze(2)
        return self._temperature * torch.logsumexp(self._joint, 1)

    def read(self, tokens: Tensor) -> None:
        """What was drawn, `[R]` int64, says which style it was likely of."""
        assert self._joint is not None
        chosen = self._joint.gather(2, tokens.view(-1, 1, 1).expand(-1, self._joint.shape[1], 1)).squeeze(2)
        self.belief, self._last = torch.log_softmax(chosen, -1), tokens

    def keep(self, order: Tensor) -> None:
        """Only the rows `[R']` int64 go on, in this order."""
        assert self.belief is not None
        assert self._last is not None
        self.belief, self._last = self.belief[order], self._last[order]


class GoalHead:
    """The vocabulary head behind a manager that sets every row a goal at its first token and every c tokens.

    Attributes:
        shifts: `[R, H]`, `φ g` of the goals in force.
        memory: `[2, R, D]`, the manager's LSTM.
    """

    def __init__(self, model: CausalLM, goals: GoalHeads) -> None:
        self._head, self._goals, self._step = _Head(model), goals, 0
        self.shifts: Tensor | None = None
        self.memory: Tensor | None = None

    def __call__(self, states: Tensor) -> Tensor:
        """States `[R, H]` to float32 logits `[R, V]`."""
        states = states * self._head.scale
        if self._step % self._goals.horizon == 0:
            latent = self._goals.latent(states)
            if self.memory is None:
                self.memory = latent.new_zeros(2, *latent.shape)
            goals, _, self.memory = self._goals.step(latent, self.memory)
            self.shifts = self._goals.embedding(goals)
        assert self.shifts is not None
        return self._head(states + self.shifts.to(states.dtype))

    def read(self, tokens: Tensor) -> None:
        """One more token of every row; which one it was, the next state says."""
        self._step += 1

    def keep(self, order: Tensor) -> None:
        """Only the rows `[R']` int64 go on, in this order."""
        assert self.shifts is not None
        assert self.memory is not None
        self.shifts, self.memory = self.shifts[order], self.memory[:, order]


def steered_head(model: CausalLM, temperature: float) -> StyleHead | GoalHead | None:
    """A head for new rows of a steered model, to be divided by this temperature; None for a model that is not."""
    if isinstance(model.steering, StyleHeads):
        return StyleHead(model, model.steering, temperature)
    return None if model.steering is None else GoalHead(model, model.steering)

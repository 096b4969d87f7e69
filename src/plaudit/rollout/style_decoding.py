"""Decoding with styles: the marginal over them, by a belief that follows every row."""

import torch
from torch import Tensor, nn

from plaudit.core.hierarchy_losses import next_belief
from plaudit.models.causal_lm import CausalLM
from plaudit.models.styles import StyleHeads


class StyleHead:
    """A vocabulary head that remembers: states of rows to logits of the marginal, `T log Σ_ω b(ω) π_ω`.

    They are made so that dividing them by the temperature gives the mixture of the styles at that temperature, which is
    what `StyleHeads.terms` evaluates. To be used in this order for each step: call, `read` the tokens that were drawn,
    and `keep` the rows that go on.

    Attributes:
        belief: `[R, W]`, log-probability of the style in force after the last token; None before the first.
    """

    def __init__(self, model: CausalLM, styles: StyleHeads, temperature: float) -> None:
        self._weight, self._bias, self._softcap = model.head
        self._scale, self._styles, self._temperature = model.logit_scale, styles, temperature
        self.belief: Tensor | None = None
        self._last: Tensor | None = None
        self._joint: Tensor | None = None

    def __call__(self, states: Tensor) -> Tensor:
        """States `[R, H]` to float32 logits `[R, V]`."""
        states = states * self._scale if self._scale != 1.0 else states
        each = []
        for vector in self._styles.vectors:
            seen = states + vector.to(states.dtype)
            logits = nn.functional.linear(seen, self._weight.to(seen.dtype), self._bias).float()
            if self._softcap is not None:
                logits = self._softcap * torch.tanh(logits / self._softcap)
            each.append(torch.log_softmax(logits / self._temperature, -1))
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

"""A policy with options for control tasks: it acts by the option in force until that one ends."""

import torch
from torch import Tensor, nn

from plaudit.core.hierarchy_losses import option_state_values
from plaudit.models.options import OptionNetwork, OptionOutputs
from plaudit.rollout.control import observation_vectors
from plaudit.rollout.trajectory import Evaluation, Sampled, Trajectory, evaluation_of


class OptionPolicy(nn.Module):
    """Call and return: upon arrival the option in force ends with `β_ω(s)`; the next one is ε-greedy in `Q_Ω`.

    Satisfies `StepPolicy` and `StatefulPolicy`; its memory is the option in force of each row, -1 before an episode.

    Attributes:
        network: of the options.
        exploration: `ε` of the policy over options; may be changed while learning.
        greedy: take each option's likeliest action, and no exploration. Terminations are drawn all the same.
    """

    def __init__(self, network: OptionNetwork, *, exploration: float = 0.0, greedy: bool = False) -> None:
        super().__init__()
        self.network = network
        self.exploration = 0.0 if greedy else exploration
        self.greedy = greedy
        self._options = torch.zeros(0, dtype=torch.int64)

    def memory(self, num_rows: int) -> Tensor:
        """`[B]` int64, the option in force of each row; -1 for rows that have none yet."""
        if len(self._options) != num_rows:
            self._options = torch.full((num_rows,), -1)
        return self._options

    def end_episodes(self, ended: Tensor) -> None:
        """Nothing is in force in the rows `[B]` bool whose episode has ended."""
        self._options = self._options.masked_fill(ended, -1)

    @torch.no_grad()
    def sample(self, observations: Tensor, *, generator: torch.Generator | None = None) -> Sampled:
        """One action for each of `[B, O]` observations (or `[B]` discrete ones); the column `options` says by which."""
        found = self.outputs(observations)
        options = self.memory(len(observations))
        rows = torch.arange(len(options))
        ends = torch.rand(len(options), generator=generator) < found.terminations[rows, options]
        drawn = torch.randint(self.network.num_options, options.shape, generator=generator)
        explores = torch.rand(len(options), generator=generator) < self.exploration
        chosen = torch.where(explores, drawn, found.values.argmax(-1))
        self._options = options = torch.where(ends | (options < 0), chosen, options)
        logprobs = torch.log_softmax(found.logits[rows, options], -1)
        if self.greedy:
            actions = logprobs.argmax(-1)
        else:
            actions = torch.multinomial(logprobs.exp(), 1, generator=generator).squeeze(1)
        return Sampled(actions, logprobs[rows, actions], found.values[rows, options], {"options": options})

    def values(self, observations: Tensor) -> Tensor:
        """`V_Ω(s)` of observations `[..., O]`, `[...]`: before any option is chosen."""
        return option_state_values(self.outputs(observations).values, exploration=self.exploration)

    def evaluate(self, trajectory: Trajectory) -> Evaluation:
        """Log-probabilities and entropies `[B, T]` of the options' policies, and `Q_Ω(s, ω)`, with gradients.

        Raises:
            ValueError: if the trajectory has no observations or options.
        """
        if trajectory.observations is None or trajectory.options is None:
            raise ValueError("a policy with options reads trajectory.observations and .options, and one is None")
        found = self.outputs(trajectory.observations)
        logprobs = torch.log_softmax(of_option(found.logits, trajectory.options), -1)
        return evaluation_of(logprobs, trajectory.actions, of_option(found.values, trajectory.options))

    def outputs(self, observations: Tensor) -> OptionOutputs:
        """What the network says of observations `[..., O]` (or discrete ones `[...]`)."""
        found: OptionOutputs = self.network(observation_vectors(observations, self.network.observation_size))
        return found


def of_option(table: Tensor, options: Tensor) -> Tensor:
    """The entry of one option: `[..., W]` or `[..., W, A]` and options `[...]` to `[...]` or `[..., A]`."""
    place = options.unsqueeze(-1)
    if table.ndim == options.ndim + 1:
        return table.gather(-1, place).squeeze(-1)
    return table.gather(-2, place.unsqueeze(-1).expand(*place.shape, table.shape[-1])).squeeze(-2)

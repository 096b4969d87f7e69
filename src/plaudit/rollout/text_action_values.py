"""A language model whose critic has a value for every token: tables over the whole vocabulary, and the average policy.

Tables `[N, V]` in float32 exist for one micro-batch at a time: the policy's and the critic's with gradients, the
average policy's and the reference's without. That is 16 bytes for each token of the vocabulary and of the micro-batch
before gradients, which suits small vocabularies or small budgets (`tokens_per_micro_batch`).
"""

import copy

import torch
from torch import Tensor

from plaudit.core.layout import PackedBatch
from plaudit.core.vocabulary_head import HeadOptions, head_logits
from plaudit.models.aggregation import token_spans
from plaudit.models.causal_lm import CausalLM
from plaudit.models.policy import ReferencePolicy
from plaudit.rollout.action_values import ActionTables
from plaudit.rollout.text_policy import TextPolicy
from plaudit.rollout.trajectory import Trajectory


class TextActionValues:
    """Satisfies `plaudit.rollout.action_values.ActionTablePolicy` over answers.

    Attributes:
        text_policy: the policy, with `action_values` in its language policy; prompts and temperature are its.
        reference: the frozen starting point.
        average: the average policy, a copy of the language model; None where none is wanted.
    """

    def __init__(self, text_policy: TextPolicy, reference: ReferencePolicy, *, averaged: bool) -> None:
        """The average begins where the policy is.

        Raises:
            ValueError: if the language policy has no `action_values`.
        """
        if text_policy.policy.action_values is None:
            raise ValueError("the policy has no action values: set policy.action_values = Critic.of_actions(…)")
        self.text_policy = text_policy
        self.reference = reference
        self.critic = text_policy.policy.action_values
        self.average: CausalLM | None = None
        if averaged:
            self.average = copy.deepcopy(self.language_model).requires_grad_(False).eval()

    @property
    def language_model(self) -> CausalLM:
        """The model that learns."""
        return self.text_policy.policy.language_model

    def micro_batches(self, trajectory: Trajectory) -> list[Tensor]:
        """As `TextPolicy.micro_batches`."""
        return self.text_policy.micro_batches(trajectory)

    def tables(self, trajectory: Trajectory) -> ActionTables:
        """See `ActionTablePolicy`.

        Raises:
            ValueError: for an empty prompt, behind which the first token has no state to be predicted from.
        """
        batch, places = self._places(trajectory)
        states = self.language_model(batch)
        seen = states / self.language_model.logit_scale if self.critic.backbone is None else self.critic.states(batch)
        with torch.no_grad():
            average = None if self.average is None else self._table(self.average, batch, places)
            with self.reference.opened() as model:
                reference = self._table(model, batch, places)
        own = self._table(self.language_model, batch, places, states)
        return ActionTables(own, self.critic(seen[places]), average, reference)

    def logprobs(self, trajectory: Trajectory) -> Tensor:
        """See `ActionTablePolicy`; one forward of the policy alone.

        Raises:
            ValueError: as `tables`.
        """
        return self._table(self.language_model, *self._places(trajectory))

    @torch.no_grad()
    def move_average(self, decay: float) -> None:
        """See `ActionTablePolicy`."""
        if self.average is not None:
            for name, mine in self._moving().items():
                self.average.get_parameter(name).lerp_(mine, 1 - decay)

    def average_state(self) -> dict[str, Tensor]:
        """See `ActionTablePolicy`; the weights that move."""
        if self.average is None:
            return {}
        return {name: self.average.get_parameter(name).detach() for name in self._moving()}

    @torch.no_grad()
    def load_average_state(self, state: dict[str, Tensor]) -> None:
        """See `ActionTablePolicy`."""
        for name, saved in state.items():
            assert self.average is not None
            self.average.get_parameter(name).copy_(saved)

    def _moving(self) -> dict[str, Tensor]:
        return {name: each for name, each in self.language_model.named_parameters() if each.requires_grad}

    def _places(self, trajectory: Trajectory) -> tuple[PackedBatch, Tensor]:
        """The answers packed, and the place in the pack of what predicts each counted step, by rows and steps."""
        batch, rows = self.text_policy.pack(trajectory)
        spans = token_spans(batch.layout)
        counted = (trajectory.mask.flatten().cumsum(0) - 1).view(trajectory.mask.shape).to(rows.device)
        # The packed row has its own order; tables go by rows and steps.
        order = counted[rows[spans.owner], spans.step].argsort()
        places = batch.layout.predictor_index[spans.places][order]
        if bool((places < 0).any()):
            raise ValueError("the first token after an empty prompt is predicted by nothing: give every prompt a token")
        return batch, places

    def _table(self, model: CausalLM, batch: PackedBatch, places: Tensor, states: Tensor | None = None) -> Tensor:
        """Log-probabilities `[N, V]` of what follows the states at these places."""
        weight, bias, softcap = model.head
        states = model(batch) if states is None else states
        options = HeadOptions(len(places), softcap, self.text_policy.temperature)
        return torch.log_softmax(
            head_logits(states[places], lambda rows: rows @ weight.to(rows.dtype).T, bias, options), -1
        )

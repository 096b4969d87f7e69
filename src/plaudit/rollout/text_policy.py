"""A language model as the policy of a trajectory: rows of one prompt are packed behind it and evaluated together."""

from collections.abc import Sequence

import torch
from torch import Tensor

from plaudit.core.layout import PackedBatch
from plaudit.data.batching import fill_batches
from plaudit.data.packing import pack_groups
from plaudit.data.tokenising import TokenisedBlock, TokenisedGroup
from plaudit.models.aggregation import token_spans
from plaudit.models.goals import GoalHeads
from plaudit.models.policy import LanguagePolicy, ReferencePolicy
from plaudit.rollout.trajectory import Evaluation, Trajectory


class TextPolicy:
    """Evaluates trajectories of answers, `group_ids` being places in `prompts`.

    The answers of a prompt share one pass over it. Row `b` of a trajectory holds the tokens of one answer in its first
    steps: `actions[b, :n]` with `mask[b, :n]` True.

    Attributes:
        policy: the language model with its critic.
        temperature: logits are divided by it, as they were when the tokens were drawn.
        token_budget: most tokens of a forward pass; the answers of a prompt go together as far as that allows, and an
            answer that is longer goes alone.
        max_rows: most answers that are sampled together.
        prompts: token ids of the prompts that `group_ids` name.
    """

    def __init__(
        self,
        policy: LanguagePolicy,
        *,
        temperature: float = 1.0,
        token_budget: int = 8192,
        max_rows: int = 256,
        prompts: Sequence[Sequence[int]] = (),
    ) -> None:
        self.policy = policy
        self.temperature = temperature
        self.token_budget = token_budget
        self.max_rows = max_rows
        self.prompts = [list(prompt) for prompt in prompts]

    @property
    def goals(self) -> GoalHeads:
        """The manager of a language model that has one.

        Raises:
            ValueError: if it has none.
        """
        if not isinstance(self.policy.language_model.steering, GoalHeads):
            raise ValueError("this language model has no manager; set its `steering` to `GoalHeads`")
        return self.policy.language_model.steering

    def micro_batches(self, trajectory: Trajectory) -> list[Tensor]:
        """The rows, cut into few parts within the token budget: `[n]` int64 each.

        A group is divided only where it is larger than the budget, since its prompt is then read once more.
        """
        lengths = trajectory.mask.sum(1).tolist()
        pieces: list[list[int]] = []
        sizes: list[int] = []
        for group, rows in self._rows_by_group(trajectory).items():
            prompt, fresh = len(self.prompts[group]), True
            for row in rows:
                if fresh or sizes[-1] + lengths[row] > self.token_budget:
                    pieces.append([])
                    sizes.append(prompt)
                    fresh = False
                pieces[-1].append(row)
                sizes[-1] += lengths[row]
        filled = fill_batches(range(len(pieces)), sizes, self.token_budget)
        return [torch.tensor([row for index in sorted(part) for row in pieces[index]]) for part in filled]

    def evaluate(self, trajectory: Trajectory) -> Evaluation:
        """Log-probabilities, entropies and values `[B, T]` in float32, with gradients; 0 at masked steps."""
        batch, rows = self.pack(trajectory)
        found = self.policy.evaluate(batch, self.temperature)
        zeros = found.logprobs.new_zeros(trajectory.actions.shape)
        where = (rows[found.spans.owner], found.spans.step)
        logprobs, entropy = zeros.index_put(where, found.logprobs), zeros.index_put(where, found.entropy)
        return Evaluation(logprobs, entropy, zeros if found.values is None else zeros.index_put(where, found.values))

    def critic_values(self, trajectory: Trajectory) -> Tensor:
        """Values `[B, T]` of the critic alone, 0 at masked steps: no gradient goes into the policy, and a separate
        critic needs no pass through it."""
        batch, rows = self.pack(trajectory)
        found, spans = self.policy.values(batch), token_spans(batch.layout)
        zeros = found.new_zeros(trajectory.actions.shape)
        return zeros.index_put((rows[spans.owner], spans.step), found)

    def evaluate_at_once(self, trajectory: Trajectory) -> Evaluation | None:
        """As `evaluate`, where one pass takes all rows; None where the token budget asks for several."""
        return self.evaluate(trajectory) if len(self.micro_batches(trajectory)) == 1 else None

    @torch.no_grad()
    def evaluate_all(self, trajectory: Trajectory) -> Evaluation:
        """As `evaluate` without gradients, in as many passes as the token budget asks for."""
        tables = tuple(torch.zeros_like(trajectory.rewards) for _ in range(3))
        for part in self.micro_batches(trajectory):
            for table, found in zip(tables, self.evaluate(trajectory.select(part)), strict=True):
                table[part] = found
        return Evaluation(*tables)

    @torch.no_grad()
    def states(self, trajectory: Trajectory) -> Tensor:
        """`[B, T, H]`, the states of the language model that predict each token, 0 at masked steps; one pass."""
        batch, rows = self.pack(trajectory)
        spans, model = token_spans(batch.layout), self.policy.language_model
        predictors = batch.layout.predictor_index[spans.places]
        states: Tensor = model(batch)
        found = states.new_zeros((*trajectory.actions.shape, states.shape[-1]))
        # A token without a predictor (an answer that begins a text) has the state 0.
        found[rows[spans.owner], spans.step] = states[predictors] * (predictors >= 0).unsqueeze(1)
        return found

    @torch.no_grad()
    def reference_logprobs(self, reference: ReferencePolicy, trajectory: Trajectory) -> Tensor:
        """Log-probabilities `[B, T]` of the answers under the frozen starting point, at the same temperature."""
        table = torch.zeros_like(trajectory.rewards)
        for part in self.micro_batches(trajectory):
            batch, rows = self.pack(trajectory.select(part))
            found, spans = reference.logprobs(batch, self.temperature), token_spans(batch.layout)
            table[part.to(table.device)[rows[spans.owner]], spans.step] = found
        return table

    def _rows_by_group(self, trajectory: Trajectory) -> dict[int, list[int]]:
        """The rows of each group that have a token, groups in the order in which they appear."""
        if trajectory.group_ids is None:
            raise ValueError("a trajectory of answers needs group_ids: the places of their prompts")
        found: dict[int, list[int]] = {}
        counted = trajectory.mask.any(1).tolist()
        for row, group in enumerate(trajectory.group_ids.tolist()):
            if counted[row]:
                found.setdefault(group, []).append(row)
        return found

    def pack(self, trajectory: Trajectory) -> tuple[PackedBatch, Tensor]:
        """The answers as one packed row, and for each completion in it the row `[C]` it came from."""
        by_group = self._rows_by_group(trajectory)
        if not by_group:
            raise ValueError("no row of the trajectory has a step that counts")
        lengths = trajectory.mask.sum(1)
        steps = torch.arange(trajectory.num_steps, device=lengths.device)
        if not torch.equal(trajectory.mask, steps < lengths[:, None]):
            raise ValueError("an answer must stand in the first steps of its row, without masked ones between")
        ids = [row[:length] for row, length in zip(trajectory.actions.tolist(), lengths.tolist(), strict=True)]
        groups = [
            TokenisedGroup((TokenisedBlock(self.prompts[group], [ids[row] for row in rows], list(range(len(rows)))),))
            for group, rows in by_group.items()
        ]
        device = next(self.policy.parameters()).device
        order = torch.tensor([row for rows in by_group.values() for row in rows], device=device)
        return pack_groups(groups, causal=True).to(device), order

"""Aggregations with weights of their own on frozen token states, fitted beside the head: no randomness in them.

With `s_t = W·h_t` of every token of an answer, a learned weighted sum is `(1/T) Σ_t c(u_t) s_t` and attention pooling
`Σ_t softmax_t(q·h_t/√H) s_t`: the formulas of `plaudit.models.aggregation` with the head drawn inside the sum, so that
only numbers per token have to be kept. Both are the mean at first (`c = 1`, `q = 0`), and start from the head that was
fitted to the mean. How far they may go from there is a second ridge, `ρ/2` times the mean of `(c - 1)²`, or the spread
of the attention's logits, chosen on a fifth of the training records; the mean itself is among the choices.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from frozen import Fit, States, fit
from torch import Tensor

from plaudit.configs.reward import RewardTrainingConfig
from plaudit.data.records import Comparison
from plaudit.data.splits import kfold
from plaudit.data.targets import make_targets
from plaudit.models.aggregation import TokenSpans, span_softmax, span_sum
from plaudit.training.objectives import PreferenceObjective, loss_of

RIDGES = (math.inf, 1.0, 0.1, 0.01, 0.001)
"""`ρ`; infinite is the mean."""
KNOTS = 9


@dataclass(frozen=True)
class Answers:
    """The tokens of many answers, end to end.

    Attributes:
        states: `[M, H]`.
        spans: which tokens belong to which of the `C` answers.
        counts: answers of each record; they add up to `C`.
    """

    states: Tensor
    spans: TokenSpans
    counts: list[int]

    @classmethod
    def of(cls, tokens: Sequence[Sequence[Tensor]]) -> "Answers":
        """From `[T, H]` of every answer of every record."""
        flat = [each for row in tokens for each in row]
        lengths = torch.tensor([len(each) for each in flat])
        owner = torch.repeat_interleave(torch.arange(len(flat)), lengths)
        step = torch.arange(len(owner)) - (lengths.cumsum(0) - lengths)[owner]
        spans = TokenSpans(torch.arange(len(owner)), owner, step, lengths)
        return cls(torch.cat(flat).float(), spans, [len(row) for row in tokens])

    def hats(self) -> Tensor:
        """`[M, 9]`: with `c` `[9]`, `hats @ c` is the curve of `PositionWeighted` at every token."""
        lengths = self.spans.lengths[self.spans.owner].float()
        knot = (self.spans.step.float() + 0.5) / lengths * (KNOTS - 1)
        return (1 - (knot[:, None] - torch.arange(KNOTS)).abs()).clamp(min=0)


def pooled_scores(answers: Answers, name: str, weight: Tensor, extra: Tensor, hats: Tensor | None = None) -> Tensor:
    """`W·agg(h_1..h_T)` of every answer, `[C]`.

    Args:
        answers: `C` of them.
        name: `attention`, with `extra` its query `[H]`; or `weighted_sum`, with `extra` its curve `[9]`.
        weight: `W` `[H]`.
        extra: the aggregation's own weights.
        hats: `answers.hats()`, where it has been computed.
    """
    each = answers.states @ weight
    if name == "attention":
        shares = span_softmax(answers.states @ extra / extra.shape[0] ** 0.5, answers.spans)
        return span_sum(each * shares, answers.spans)
    curve = (answers.hats() if hats is None else hats) @ extra
    return span_sum(each * curve, answers.spans) / answers.spans.lengths


def table_of(scores: Tensor, counts: Sequence[int], width: int) -> Tensor:
    """`[C]` scores as `[P, K]`, 0 where there is no answer."""
    present = torch.arange(width) < torch.tensor(counts)[:, None]
    return torch.zeros(present.shape, dtype=scores.dtype).masked_scatter(present, scores)


def loss_of_table(
    records: Sequence[Comparison], objective: PreferenceObjective, width: int
) -> Callable[[Tensor], Tensor]:
    """The loss per unit of weight of a `[P, K]` table of scores of these records."""
    config = objective.config
    targets = make_targets(records, num_slots=width, tie_threshold=config.tie_threshold)
    losses = [loss_of(record, config) for record in records]
    normaliser = targets.weights.sum().item()

    def loss(table: Tensor) -> Tensor:
        found: Tensor = objective(table, table, targets, losses, normaliser=normaliser)[0]
        return found

    return loss


def fit_pooling(
    answers: Answers, head: Fit, records: Sequence[Comparison], name: str, config: RewardTrainingConfig, ridge: float
) -> tuple[Tensor, Tensor]:
    """`W` and the aggregation's own weights from the fitted mean on, by 25 steps of L-BFGS at most."""
    attends = name == "attention"
    first = torch.zeros_like(head.weight) if attends else torch.ones(KNOTS)
    if math.isinf(ridge):
        return head.weight, first
    width = max(answers.counts)
    loss_at = loss_of_table(records, PreferenceObjective(config), width)
    spread = answers.states.std(0) if attends else torch.ones(KNOTS)
    weight, extra = head.weight.clone().requires_grad_(), first.clone().requires_grad_()
    hats = None if attends else answers.hats()
    optimizer = torch.optim.LBFGS([weight, extra], max_iter=25, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        table = table_of(pooled_scores(answers, name, weight, extra, hats), answers.counts, width)
        total = loss_at(table) + head.ridge / 2 * (weight * head.spread).square().sum()
        total = total + ridge / 2 * ((extra - first) * spread).square().mean()
        weight.grad, extra.grad = torch.autograd.grad(total, (weight, extra))
        return total.detach()

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return weight.detach(), extra.detach()


def learned_scores(
    states: States, settings: dict[str, Any], train: Sequence[Comparison], test: Sequence[Comparison]
) -> list[list[float]]:
    """Fit head and aggregation to `train` and score `test` with them."""
    name = settings["model"]["aggregation"]
    config = RewardTrainingConfig.model_validate({**settings, "model": {**settings["model"], "aggregation": "mean"}})
    whole = fit(states, config, train)
    inside, outside = kfold(whole.records, 5, "prompt", seed=7)[0]
    part, held_out = fit(states, config, inside), Answers.of(states.tokens_of(outside))
    learned_from = Answers.of(states.tokens_of(part.records))
    width = max(held_out.counts)
    loss_at = loss_of_table(outside, PreferenceObjective(config), width)
    losses = {}
    for ridge in RIDGES:
        found = fit_pooling(learned_from, part, part.records, name, config, ridge)
        table = table_of(pooled_scores(held_out, name, *found), held_out.counts, width)
        losses[ridge] = loss_at(table).item()
    ridge = min(losses, key=lambda each: losses[each])
    print(f"  {name}: rho {ridge} of { ({each: round(loss, 4) for each, loss in losses.items()}) }", flush=True)
    found = fit_pooling(Answers.of(states.tokens_of(whole.records)), whole, whole.records, name, config, ridge)
    answers = Answers.of(states.tokens_of(test))
    scores = pooled_scores(answers, name, *found)
    return [row.tolist() for row in scores.split(answers.counts)]

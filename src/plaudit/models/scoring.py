"""Scores of tokenised groups within a token budget, every distinct prompt processed once."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from plaudit.core.layout import PackedBatch
from plaudit.data.packing import pack_groups
from plaudit.data.tokenising import TokenisedBlock, TokenisedGroup
from plaudit.models.aggregation import token_spans

if TYPE_CHECKING:
    from plaudit.models.reward_model import RewardModel


ADDING = ("sum", "discounted_sum")
"""Aggregations by which a score is the sum of what its tokens add."""


@dataclass
class _Job:
    """Completions behind one prefix, and which group and slot each belongs to."""

    prefix: list[int]
    completions: list[list[int]] = field(default_factory=list)
    owners: list[tuple[int, int]] = field(default_factory=list)
    num_tokens: int = 0

    def __post_init__(self) -> None:
        self.num_tokens = len(self.prefix)

    def add(self, ids: list[int], owner: tuple[int, int]) -> None:
        """Put one more completion behind the prefix."""
        self.completions.append(ids)
        self.owners.append(owner)
        self.num_tokens += len(ids)

    @property
    def longest(self) -> int:
        """Tokens of the longest text."""
        return len(self.prefix) + max(map(len, self.completions))

    def group(self) -> TokenisedGroup:
        """The job as a group of its own."""
        block = TokenisedBlock(self.prefix, self.completions, list(range(len(self.completions))))
        return TokenisedGroup((block,))


@torch.no_grad()
def score_groups(model: "RewardModel", groups: Sequence[TokenisedGroup], *, token_budget: int = 8192) -> list[Tensor]:
    """Raw scores of tokenised groups, without dropout.

    Completions behind the same prefix share it, also across groups, so that a packed model reads each distinct prompt
    once; a group that is larger than the budget is cut into several that repeat its prompt. No score depends on what
    else is scored with it.

    Args:
        model: the reward model, on any device; left in the mode it was in.
        groups: `P` groups from `model.text_tokeniser`.
        token_budget: most tokens in one forward, padding included where the model is not packed; a completion that is
            larger with its prompt goes alone.

    Returns:
        For each group `[K]` float32 on the CPU by slot, or `[K, A]` with attributes.

    Raises:
        ValueError: if the budget is below 1.
    """
    results = [torch.full((group.num_slots, model.num_outputs), torch.nan) for group in groups]
    for batch, owners in _forwards(model, groups, token_budget):
        scores = model(batch).float().cpu().reshape(len(owners), -1)
        for row, (group, slot) in zip(scores, owners, strict=True):
            results[group][slot] = row
    return results if model.attributes else [result.squeeze(-1) for result in results]


@torch.no_grad()
def score_tokens(
    model: "RewardModel", groups: Sequence[TokenisedGroup], *, token_budget: int = 8192
) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Raw scores, and what each token of a completion adds to them: `w_t W·h_t` of a (discounted) sum over tokens.

    What the tokens leave of a score is the head's bias, and what the prompt's tokens add where they are read too.

    Args:
        model, groups, token_budget: as in `score_groups`; the model's aggregation is `sum` or `discounted_sum`.

    Returns:
        For each of the `P` groups its scores as `score_groups` gives them, and by slot the tokens' parts `[T, A]`
        (`[T, 1]` without attributes).

    Raises:
        ValueError: for another aggregation, or a budget below 1.
    """
    if model.parts.aggregation not in ADDING:
        raise ValueError(f"the tokens of a model that aggregates by {model.parts.aggregation!r} do not add up")
    results = [torch.full((group.num_slots, model.num_outputs), torch.nan) for group in groups]
    tokens: list[list[Tensor]] = [[torch.empty(0)] * group.num_slots for group in groups]
    aggregation: Any = model.aggregation
    for batch, owners in _forwards(model, groups, token_budget):
        states = model.states(batch)
        spans = token_spans(batch.layout, aggregation.over)
        weights = aggregation.weights(spans).float()[:, None]
        added = (states.float()[spans.places] @ model.head.weight.float().T * weights).cpu()
        scores = model.head_scores(states, batch).cpu()
        own = batch.layout.completion_ends - batch.layout.completion_starts
        ends = spans.lengths.cumsum(0).tolist()
        for row, end, length, (group, slot) in zip(scores, ends, own.tolist(), owners, strict=True):
            results[group][slot] = row
            tokens[group][slot] = added[end - length : end]
    return (results if model.attributes else [result.squeeze(-1) for result in results]), tokens


def _forwards(
    model: "RewardModel", groups: Sequence[TokenisedGroup], token_budget: int
) -> Iterator[tuple[PackedBatch, list[tuple[int, int]]]]:
    """Batches within the budget, and the group and slot of each of their completions; evaluation mode meanwhile.

    Gradients are for the caller to switch off: in a generator `no_grad` holds only while the generator itself runs.
    """
    if token_budget < 1:
        raise ValueError(f"token_budget is {token_budget}; it must be at least 1")
    training = model.training
    model.eval()
    try:
        # Padded rows repeat the prefix anyway: only rows of their own can keep the budget.
        jobs_of_all = _jobs(groups, token_budget, share=model.causal and model.packed)
        for jobs in _batches(jobs_of_all, token_budget, packed=model.packed):
            batch = pack_groups([job.group() for job in jobs], causal=model.causal).to(model.device)
            places = zip(batch.layout.group_index.tolist(), batch.layout.slot_index.tolist(), strict=True)
            yield batch, [jobs[job].owners[slot] for job, slot in places]
    finally:
        model.train(training)


def _jobs(groups: Sequence[TokenisedGroup], token_budget: int, *, share: bool) -> list[_Job]:
    jobs: list[_Job] = []
    by_prefix: dict[tuple[int, ...], _Job] = {}
    for index, group in enumerate(groups):
        for block in group.blocks:
            key = tuple(block.prefix)
            for slot, ids in zip(block.slots, block.completions, strict=True):
                job = by_prefix.get(key) if share else None
                if job is None or job.num_tokens + len(ids) > token_budget:
                    job = by_prefix[key] = _Job(block.prefix)
                    jobs.append(job)
                job.add(ids, (index, slot))
    return jobs


def _batches(jobs: Sequence[_Job], token_budget: int, *, packed: bool) -> Iterator[list[_Job]]:
    # Similar lengths go together, so that padded rows waste little.
    chosen: list[_Job] = []
    tokens = rows = 0
    for job in sorted(jobs, key=lambda job: job.longest):
        rows += len(job.completions)
        tokens += job.num_tokens
        if chosen and (tokens if packed else rows * job.longest) > token_budget:
            yield chosen
            chosen, tokens, rows = [], job.num_tokens, len(job.completions)
        chosen.append(job)
    if chosen:
        yield chosen

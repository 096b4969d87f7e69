"""Fluency: how likely an answer is under a language model; the nearest that counting comes to grammar."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from plaudit.data.packing import pack_groups
from plaudit.data.records import Prompt
from plaudit.data.tokenising import TextTokeniser, TextTooLongError, TokenisedBlock, TokenisedGroup
from plaudit.rewards.base import Sample, Score, score_values
from plaudit.rewards.model import Frozen, frozen

if TYPE_CHECKING:
    from plaudit.models.causal_lm import CausalLM


@dataclass(frozen=True)
class FluencyReward:
    """`r = (1/T) Σ_t log p(y_t | x, y_<t)`, in −∞..0 nats: the mean log-probability of the answer's tokens.

    The end token counts as a token of a finished answer. Likely is not the same as good: dull and repeated text is
    likely too, so combine it with something that asks for more. Too long a text is invalid.

    Attributes:
        model: the language model; it is frozen here. Its tokenizer may be another than the policy's.
        name: its name in logs.
        given_prompt: whether the answer is read behind its prompt, or alone.
        token_budget: most tokens in one forward; a text that is longer goes alone.
        frozen: the model's weights as they were; `check` compares.
    """

    model: "CausalLM"
    name: str = "fluency"
    given_prompt: bool = True
    token_budget: int = 8192
    frozen: Frozen = field(init=False, repr=False, compare=False)
    tokeniser: TextTokeniser = field(init=False, repr=False, compare=False)

    is_checked = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "frozen", frozen(self.model))
        template = "auto" if self.given_prompt else "raw"
        object.__setattr__(self, "tokeniser", self.model.text_tokeniser(template=template))

    def check(self) -> None:
        """See that the model has not changed since; see `plaudit.rewards.model.Frozen.check`."""
        self.frozen.check()

    @torch.no_grad()
    def __call__(self, samples: Sequence[Sample]) -> Score:
        """The mean log-probability of each answer."""
        jobs: dict[tuple[int, ...], list[tuple[int, list[int]]]] = {}
        values: list[float | None] = [None] * len(samples)
        problems: dict[int, str] = {}
        for place, sample in enumerate(samples):
            if not sample.completion and not sample.finished:
                problems[place] = "nothing was said"
                continue
            prompt: Prompt = sample.prompt if self.given_prompt else ""
            try:
                group = self.tokeniser.group(prompt, [sample.completion], cut_off=[not sample.finished])
            except TextTooLongError as error:
                problems[place] = str(error)
                continue
            block = group.blocks[0]
            jobs.setdefault(tuple(block.prefix), []).append((place, block.completions[0]))
        for batch in _batches(jobs, self.token_budget):
            for place, value in self._means(batch):
                values[place] = value
                if value is None:
                    problems[place] = "its only token is predicted by nothing"
        return score_values(samples, values, name=self.name, problems=problems)

    def _means(self, batch: list["_Job"]) -> Iterator[tuple[int, float | None]]:
        """The place of each answer of a batch, and its mean log-probability."""
        groups = [
            TokenisedGroup((TokenisedBlock(list(prefix), [ids for _, ids in answers], list(range(len(answers)))),))
            for prefix, answers in batch
        ]
        packed = pack_groups(groups, causal=True).to(next(self.model.parameters()).device)
        layout = packed.layout
        logprobs, spans = self.model.completion_logprobs(packed)
        # Behind an empty prompt nothing predicts the first token; it does not count then.
        predicted = (layout.predictor_index[spans.places] >= 0).float()
        zeros = torch.zeros(layout.num_completions, device=logprobs.device)
        sums, counts = (zeros.index_add(0, spans.owner, each) for each in (logprobs.float(), predicted))
        owners = zip(layout.group_index.tolist(), layout.slot_index.tolist(), strict=True)
        for (job, slot), total, count in zip(owners, sums.tolist(), counts.tolist(), strict=True):
            yield batch[job][1][slot][0], total / count if count else None


def fluency(
    model: Any,
    *,
    given_prompt: bool = True,
    token_budget: int = 8192,
    max_length: int | None = None,
    device: str | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    trust_remote_code: bool = False,
) -> FluencyReward:
    """A fluency reward from a language model, its folder or Hugging Face name.

    Args:
        model: the language model (a `CausalLM`); what follows the token budget is for one that is opened here.
        given_prompt: see `FluencyReward`.
        token_budget: see `FluencyReward`.
        max_length: most tokens of a text; None is what the model reads.
        device: where it runs; None takes the accelerator where there is one.
        dtype: number type of its weights.
        trust_remote_code: whether code in the folder may run.

    Raises:
        ValueError: if it is no causal language model.
    """
    if isinstance(model, str | Path):
        from plaudit.models.causal_lm import CausalLM

        model = CausalLM.from_pretrained(model, dtype=dtype, max_length=max_length, trust_remote_code=trust_remote_code)
        model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return FluencyReward(model, given_prompt=given_prompt, token_budget=token_budget)


_Job = tuple[tuple[int, ...], list[tuple[int, list[int]]]]
"""A prefix, and the answers behind it with their places."""


def _batches(jobs: Mapping[tuple[int, ...], list[tuple[int, list[int]]]], budget: int) -> Iterator[list[_Job]]:
    """Batches of at most `budget` tokens, every prefix once where its answers fit behind it."""
    batch: list[_Job] = []
    filled = 0
    for prefix, answers in jobs.items():
        fresh = True
        for answer in answers:
            needed = len(answer[1]) + (len(prefix) if fresh else 0)
            if batch and filled + needed > budget:
                yield batch
                batch, filled, fresh = [], 0, True
                needed = len(answer[1]) + len(prefix)
            if fresh:
                batch.append((prefix, []))
            batch[-1][1].append(answer)
            filled, fresh = filled + needed, False
    if batch:
        yield batch

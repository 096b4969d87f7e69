"""What a reward is: samples in, a `Score` out, in which what could not be scored is invalid and never 0."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from plaudit.data.records import Prompt, prompt_text

Span = tuple[int, int, float]
"""`(start, end, score)`: characters `start` to `end` (exclusive) of the completion, and what they earn."""

TOTALS = ("mean", "std", "min", "max", "invalid")
"""What is logged of a total; no part may have such a name."""

_SHOWN = 2000


@dataclass(frozen=True)
class Sample:
    """One completion to be scored.

    Attributes:
        prompt: text, or the messages of a conversation.
        completion: the answer as text, so that the reward's tokenizer may differ from the policy's.
        finished: whether it ended by itself; False where the token limit (or a person) cut it off.
        columns: whatever else the record holds, e.g. `{"answer": "#### 4"}`.
    """

    prompt: Prompt
    completion: str
    finished: bool = True
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Score:
    """The rewards of `B` samples.

    Attributes:
        total: `[B]` float32 on the CPU, the reward of each sample with everything in it; NaN where invalid.
        valid: `[B]` bool, False where a reward failed or has nothing to say. Leave these out of baselines, whitening
            and losses.
        parts: by name `[B]`, what the total is made of, for logging; NaN where that part is invalid. Plain values,
            not yet weighted.
        spans: for each sample the pieces of the total that are earned before the end, as character spans; None where
            nothing is. What they leave of the total (`remainder`) is earned by the last token.
        problems: why samples are invalid, by their place.

    Raises:
        ValueError: if shapes or types do not fit together.
    """

    total: Tensor
    valid: Tensor
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    spans: Sequence[Sequence[Span]] | None = None
    problems: Mapping[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        count = self.total.shape[:1]
        if self.total.ndim != 1 or self.total.dtype != torch.float32:
            raise ValueError(f"total is {self.total.dtype} {tuple(self.total.shape)}; it must be float32 [B]")
        if self.valid.shape != count or self.valid.dtype != torch.bool:
            raise ValueError(f"valid is {self.valid.dtype} {tuple(self.valid.shape)}; it must be bool {tuple(count)}")
        for name, part in self.parts.items():
            if part.shape != count:
                raise ValueError(f"part {name!r} is {tuple(part.shape)}; it must be {tuple(count)}")
        if self.spans is not None and len(self.spans) != len(self.total):
            raise ValueError(f"{len(self.spans)} lists of spans for {len(self.total)} samples")
        # Whoever forgets the mask meets NaN, not a number that looks like a reward.
        object.__setattr__(self, "total", self.total.masked_fill(~self.valid, torch.nan))

    def remainder(self) -> Tensor:
        """What the last token of each completion earns: `[B]`, the total minus what its spans earn."""
        if self.spans is None:
            return self.total
        earned = [math.fsum(score for _, _, score in spans) for spans in self.spans]
        return self.total - torch.tensor(earned, dtype=torch.float32)

    def metrics(self, prefix: str = "reward") -> dict[str, float]:
        """Numbers to log: `{prefix}/mean`, `/std`, `/min`, `/max` over valid samples, `/{part}`, `/invalid` (a share).

        What has no valid sample is left out; `invalid` is always there.
        """
        found: dict[str, float] = {f"{prefix}/invalid": float((~self.valid).sum()) / max(len(self.valid), 1)}
        values = self.total[self.valid]
        if len(values):
            found[f"{prefix}/mean"] = float(values.mean())
            found[f"{prefix}/std"] = float(values.std(correction=1)) if len(values) > 1 else 0.0
            found[f"{prefix}/min"], found[f"{prefix}/max"] = float(values.min()), float(values.max())
        for name, part in self.parts.items():
            if name not in TOTALS and len(known := part[~part.isnan()]):
                found[f"{prefix}/{name}"] = float(known.mean())
        return found


@runtime_checkable
class Reward(Protocol):
    """Anything that scores samples; `as_reward` makes one of plain functions, models, folders and addresses."""

    def __call__(self, samples: Sequence[Sample]) -> Score:
        """One reward per sample, in order."""
        ...


class NonFiniteRewardError(ValueError):
    """A reward that is NaN or infinite: nothing may be learned from it."""


def as_reward(reward: Any, *, name: str | None = None, conversational: bool = False) -> Reward:
    """Whatever scores completions, as a `Reward` whose numbers are checked.

    Args:
        reward: one of
            a plain function `f(prompts, completions, **columns) -> list[float | None]`, sync or async;
            a function (or object) of `samples` that returns a `Score`;
            a `RewardModel`; a folder or Hugging Face name of a reward model, Plaudit's or somebody else's;
            `http://…` or `https://…`, the address of a scoring server (see `plaudit.rewards.remote`);
            a rule by name with its option, `"length_penalty=0.01"`, or a function by name, `"my_rewards.py:polite"`
            (see `plaudit.rewards.named`).
        name: what it is called in logs and errors; by default the function's, the rule's or the folder's name.
        conversational: hand plain functions the completions of conversations as lists of messages, as TRL does; by
            default completions are text.

    Returns:
        The reward. Rewards from here refuse numbers that are not finite (`NonFiniteRewardError`, which shows the text)
        and results of the wrong length; None becomes an invalid sample.

    Raises:
        ValueError: if it is nothing of that.
    """
    if getattr(reward, "is_checked", False):
        checked: Reward = reward
        return checked
    if isinstance(reward, torch.nn.Module):
        from plaudit.models.reward_model import RewardModel
        from plaudit.rewards.model import ModelReward

        if isinstance(reward, RewardModel):
            return ModelReward(reward, name=name or "model")
    if isinstance(reward, str | Path):
        from plaudit.rewards.named import named_reward

        return named_reward(str(reward), name=name)
    if callable(reward):
        from plaudit.rewards.functions import CheckedReward, FunctionReward, takes_samples

        if takes_samples(reward):
            return CheckedReward(reward, name or _name_of(reward))
        return FunctionReward(reward, name or _name_of(reward), conversational=conversational)
    raise ValueError(
        f"{reward!r} is no reward; give a function f(prompts, completions, **columns), a reward model, its folder or "
        "name, an address (http://…), or a rule such as 'length_penalty=0.01'"
    )


def score_values(
    samples: Sequence[Sample],
    values: Sequence[float | None],
    *,
    name: str,
    parts: Mapping[str, Sequence[float | None]] | None = None,
    spans: Sequence[Sequence[Span]] | None = None,
    problems: Mapping[int, str] | None = None,
) -> Score:
    """Plain numbers as a checked `Score`; None is an invalid sample.

    Args:
        samples: the `B` samples that were scored.
        values: one number or None per sample.
        name: whose numbers these are, for errors and, without `parts`, the name of the one part.
        parts: named parts; by default the values themselves under `name`.
        spans: see `Score`.
        problems: why values are None, where known.

    Raises:
        NonFiniteRewardError: for NaN or infinite numbers, with the text they belong to.
        ValueError: if the number of values is wrong, or a value is no number.
    """
    if len(values) != len(samples):
        raise ValueError(f"reward {name!r} gave {len(values)} values for {len(samples)} samples; it must give one each")
    total = _tensor(values, name)
    valid = torch.tensor([value is not None for value in values], dtype=torch.bool)
    given = {name: total} if parts is None else {key: _tensor(part, f"{name}/{key}") for key, part in parts.items()}
    known = dict(problems or {})
    for place in (~valid).nonzero().squeeze(-1).tolist():
        known.setdefault(place, f"{name} gave no value")
    return check_score(Score(total, valid, given, spans, known), samples, name=name)


def check_score(score: Score, samples: Sequence[Sample], *, name: str) -> Score:
    """The score as it is, if it has one finite number per valid sample and spans that lie in their completions.

    Raises:
        NonFiniteRewardError: for the first valid sample whose total or span is NaN or infinite; shows its text.
        ValueError: if the number of scores is wrong, or a span lies outside its completion.
    """
    if len(score.total) != len(samples):
        raise ValueError(f"reward {name!r} gave {len(score.total)} scores for {len(samples)} samples")
    bad = (score.valid & ~score.total.isfinite()).nonzero().squeeze(-1).tolist()
    if bad:
        raise NonFiniteRewardError(_shown(name, float(score.total[bad[0]]), samples[bad[0]], bad[0], len(bad)))
    for place, spans in enumerate(score.spans or ()):
        for start, end, value in spans:
            if not math.isfinite(value):
                raise NonFiniteRewardError(_shown(f"{name} (a span)", value, samples[place], place, 1))
            if not 0 <= start <= end <= len(samples[place].completion):
                length = len(samples[place].completion)
                raise ValueError(f"reward {name!r}: span {start}..{end} of sample {place}, whose text has {length}")
    return score


def _tensor(values: Sequence[Any], name: str) -> Tensor:
    numbers = []
    for value in values:
        if value is None:
            numbers.append(math.nan)
            continue
        try:
            if isinstance(value, str):
                raise TypeError
            numbers.append(float(value))
        except (TypeError, ValueError):
            raise ValueError(f"reward {name!r} gave {value!r}; it must give a number, or None for no reward") from None
    return torch.tensor(numbers, dtype=torch.float64).float()


def _shown(name: str, value: float, sample: Sample, place: int, count: int) -> str:
    prompt, completion = (
        repr(text if len(text) <= _SHOWN else f"{text[: _SHOWN // 2]} … {text[-_SHOWN // 2 :]}")
        for text in (prompt_text(sample.prompt), sample.completion)
    )
    more = f" ({count} of this batch)" if count > 1 else ""
    return f"reward {name!r} is {value} for sample {place}{more}\nprompt: {prompt}\ncompletion: {completion}"


def _name_of(reward: Any) -> str:
    return str(getattr(reward, "__name__", None) or type(reward).__name__)

"""Several rewards as one: a weighted sum that keeps its parts, and limits."""

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from plaudit.rewards.base import TOTALS, Reward, Sample, Score, Span, as_reward, check_score

Missing = Literal["invalid", "skip"]


@dataclass(frozen=True)
class CombinedReward:
    """`r = Σ_i w_i r_i`, with every `r_i` kept as a part.

    Attributes:
        rewards: by name.
        weights: by name; a reward with weight 0 is computed and logged, and decides nothing, not even validity.
        missing: where a part is invalid, the sum is `invalid`; or it is taken over the others (`skip`), which is what
            TRL does, and is invalid where none is left.
    """

    rewards: Mapping[str, Reward]
    weights: Mapping[str, float]
    missing: Missing = "invalid"

    is_checked = True

    @property
    def waits(self) -> bool:
        """Whether all of it is waiting for others."""
        return all(getattr(reward, "waits", False) for reward in self.rewards.values())

    def __call__(self, samples: Sequence[Sample]) -> Score:
        """The sum for each sample. Rewards that wait (async functions, servers) run beside the others."""
        scores = self._scores(samples)
        count = len(samples)
        total = torch.zeros(count, dtype=torch.float64)
        valid = torch.full((count,), self.missing == "invalid")
        spans: list[list[Span]] = [[] for _ in samples]
        problems: dict[int, str] = {}
        parts: dict[str, Tensor] = {}
        for name, score in scores.items():
            parts |= _parts_of(name, score)
            weight = self.weights[name]
            if weight == 0:
                continue
            total += weight * score.total.double().where(score.valid, torch.zeros(()).double())
            valid = valid & score.valid if self.missing == "invalid" else valid | score.valid
            for place in score.valid.nonzero().squeeze(-1).tolist() if score.spans is not None else ():
                spans[place] += [(start, end, weight * value) for start, end, value in score.spans[place]]  # type: ignore[index]
            for place, why in score.problems.items():
                problems[place] = f"{problems[place]}; {name}: {why}" if place in problems else f"{name}: {why}"
        has_spans = any(score.spans is not None for score in scores.values())
        problems = {place: why for place, why in problems.items() if not valid[place]}
        combined = Score(total.float(), valid, parts, spans if has_spans else None, problems)
        return check_score(combined, samples, name=" + ".join(self.rewards))

    def check(self) -> None:
        """See that the models among the rewards have not changed."""
        for reward in self.rewards.values():
            if (check := getattr(reward, "check", None)) is not None:
                check()

    def state_dict(self) -> dict[str, Any]:
        """The state of the parts that have one, by name."""
        return {name: r.state_dict() for name, r in self.rewards.items() if hasattr(r, "state_dict")}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put the parts' state back.

        Raises:
            ValueError: if the names are not those of the parts that have a state.
        """
        mine = {name: reward for name, reward in self.rewards.items() if hasattr(reward, "load_state_dict")}
        if set(mine) != set(state):
            raise ValueError(f"state of the rewards {sorted(state)}, but those with a state are {sorted(mine)}")
        for name, reward in mine.items():
            reward.load_state_dict(state[name])

    def _scores(self, samples: Sequence[Sample]) -> dict[str, Score]:
        waiting = {name: reward for name, reward in self.rewards.items() if getattr(reward, "waits", False)}
        if not waiting:
            return {name: reward(samples) for name, reward in self.rewards.items()}
        with ThreadPoolExecutor(len(waiting)) as threads:
            futures = {name: threads.submit(reward, samples) for name, reward in waiting.items()}
            found = {name: reward(samples) for name, reward in self.rewards.items() if name not in waiting}
            found |= {name: future.result() for name, future in futures.items()}
        return {name: found[name] for name in self.rewards}


def combine(rewards: Mapping[str, Any], *, missing: Missing = "invalid") -> CombinedReward:
    """A weighted sum of rewards: `combine({"helpful": (model, 1.0), "brief": (rule, 0.2)})`.

    Args:
        rewards: from a name to a reward, or to `(reward, weight)`; whatever `as_reward` takes. Limits and
            normalisers go around a single reward: `(clipped(model, -3, 3), 1.0)`, `(normalised(rule, Running()), 0.2)`.
        missing: what becomes of samples that a reward with a weight gives nothing for; see `CombinedReward`.

    Raises:
        ValueError: if there is none, a weight is not finite, all weights are 0, a name holds `/` or is one of `TOTALS`.
    """
    built: dict[str, Reward] = {}
    weights: dict[str, float] = {}
    for name, given in rewards.items():
        reward, weight = given if isinstance(given, tuple) else (given, 1.0)
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            raise ValueError(f"the weight of reward {name!r} is {weight!r}; it must be a finite number")
        if not name or "/" in name:
            raise ValueError(f"reward name {name!r}: it must not be empty or hold '/', which marks parts of parts")
        if name in TOTALS:
            raise ValueError(f"reward name {name!r}: in the logs it would hide that of the sum; call it something else")
        built[name], weights[name] = as_reward(reward, name=name), float(weight)
    if not any(weights.values()):
        raise ValueError(f"no reward with a weight other than 0 among {sorted(weights)}; give at least one")
    if missing not in ("invalid", "skip"):
        raise ValueError(f"missing is {missing!r}; it must be 'invalid' or 'skip'")
    return CombinedReward(built, weights, missing)


@dataclass(frozen=True)
class ClippedReward:
    """`min(max(r, low), high)`. Parts and spans stay as they were: what is cut off is taken from the last token.

    Attributes:
        reward: the reward.
        low: least total.
        high: greatest total.
    """

    reward: Reward
    low: float
    high: float

    is_checked = True

    @property
    def waits(self) -> bool:
        """Whether the reward inside waits."""
        return bool(getattr(self.reward, "waits", False))

    def __call__(self, samples: Sequence[Sample]) -> Score:
        """The reward within its limits."""
        score = self.reward(samples)
        return Score(score.total.clamp(self.low, self.high), score.valid, score.parts, score.spans, score.problems)

    def __getattr__(self, name: str) -> Any:
        # `check`, `state_dict` and `load_state_dict` are the inner reward's, and missing where it has none.
        if name in ("check", "state_dict", "load_state_dict"):
            return getattr(self.reward, name)
        raise AttributeError(name)


def clipped(reward: Any, low: float, high: float, *, name: str | None = None) -> ClippedReward:
    """A reward whose total is kept between two numbers.

    Raises:
        ValueError: if `low` is not below `high`.
    """
    if not low < high:
        raise ValueError(f"limits {low} and {high}: the first must be below the second")
    return ClippedReward(as_reward(reward, name=name), low, high)


def _parts_of(name: str, score: Score) -> dict[str, Tensor]:
    """The total under the reward's name, and below it those of its own parts that are something else."""
    inner = {
        f"{name}/{key}": part
        for key, part in score.parts.items()
        if len(score.parts) > 1 or not torch.equal(part.nan_to_num(), score.total.nan_to_num())
    }
    return {name: score.total, **inner}

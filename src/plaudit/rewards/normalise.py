"""Normalisers: a reward's numbers brought to a common scale, with a state that belongs into checkpoints.

They act on the task reward, before any penalty towards a reference model is subtracted. Each is a function of a `Score`
and the group of every sample; only valid samples count, and only they get a number.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor

from plaudit.rewards.base import Reward, Sample, Score, as_reward, check_score
from plaudit.rewards.combine import CombinedReward

if TYPE_CHECKING:
    from plaudit.models.reward_model import RewardModel

_MIN_STD = 1e-8


class Normaliser(Protocol):
    """From scores to scores on another scale; parts stay as they are."""

    def __call__(self, score: Score, group_ids: Tensor | None = None, *, update: bool = True) -> Score:
        """The score on the new scale.

        Args:
            score: `B` samples.
            group_ids: `[B]` int64, which samples share a prompt; None is one group.
            update: whether running statistics take these samples in first.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """Numbers and strings to save."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state."""
        ...


@dataclass
class Stored:
    """`(r − mean) / std` with numbers that never change, such as a reward model's own over its demonstrations.

    Attributes:
        mean: what becomes 0.
        std: what becomes 1; above 0.
    """

    mean: float
    std: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.mean) and math.isfinite(self.std) and self.std > 0):
            raise ValueError(f"mean {self.mean} and std {self.std}: both must be finite and std above 0")

    def __call__(self, score: Score, group_ids: Tensor | None = None, *, update: bool = True) -> Score:
        """The score in standard deviations from the mean."""
        return _affine(score, torch.tensor(self.mean), torch.tensor(self.std))

    def state_dict(self) -> dict[str, Any]:
        """Mean and deviation."""
        return {"kind": "stored", "mean": self.mean, "std": self.std}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with saved numbers."""
        _check_kind(state, {"kind": "stored"})
        self.mean, self.std = float(state["mean"]), float(state["std"])


def stored_of(model: "RewardModel") -> Stored:
    """The spread that was stored with a reward model; its `normalised` scores have their mean subtracted already.

    Raises:
        ValueError: if the model has none, or several outputs.
    """
    if not bool(model.is_normalised):
        raise ValueError("this reward model has no stored mean and spread; train it with normalise: true")
    if model.num_outputs != 1:
        raise ValueError(f"the stored spread is of {model.num_outputs} outputs, not of their total; use Running()")
    return Stored(0.0, float(model.normalisation_std[0]))


@dataclass
class Running:
    """Whitening by the mean and the standard deviation of everything seen so far.

    `(r − mean) / std`, or `r / std` without shifting, which keeps the sign of a reward and what 0 means (Engstrom et
    al. 2020, arXiv:2005.12729, describe the scaling alone). A batch is taken in before it is normalised. The sums are
    Chan's pairwise update in float64, with the population's variance `Σ(r − mean)² / n`. A spread of 0 (one value, or
    all equal) leaves the scale alone.

    Attributes:
        shift: whether the mean is subtracted.
        count: valid rewards seen.
        mean: their mean.
        squares: their summed squared distance from it.
    """

    shift: bool = True
    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    @property
    def std(self) -> float:
        """The standard deviation so far; 1 where there is none."""
        std = math.sqrt(self.squares / self.count) if self.count else 0.0
        return std if std > _MIN_STD else 1.0

    def __call__(self, score: Score, group_ids: Tensor | None = None, *, update: bool = True) -> Score:
        """The score on the running scale; see `Normaliser`."""
        if update:
            self.take_in(score.total[score.valid])
        return _affine(score, torch.tensor(self.mean if self.shift else 0.0), torch.tensor(self.std))

    def take_in(self, values: Tensor) -> None:
        """Count `[n]` more rewards."""
        if not len(values):
            return
        values = values.double()
        count, mean = len(values), float(values.mean())
        gap, total = mean - self.mean, self.count + count
        self.squares += float((values - mean).square().sum()) + gap**2 * self.count * count / total
        self.mean += gap * count / total
        self.count = total

    def state_dict(self) -> dict[str, Any]:
        """Counts and sums."""
        state = {"kind": "running", "shift": self.shift}
        return {**state, "count": self.count, "mean": self.mean, "squares": self.squares}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from saved sums.

        Raises:
            ValueError: if they were kept with another `shift`, or by another normaliser.
        """
        _check_kind(state, {"kind": "running", "shift": self.shift})
        self.count, self.mean, self.squares = int(state["count"]), float(state["mean"]), float(state["squares"])


@dataclass
class PerGroup:
    """`(r − mean_g) / std_g` within the samples of each prompt, or `r − mean_g` without scaling.

    The deviation divides by `n − 1`. Samples that are all equal get 0. A group with fewer than two valid samples has
    nothing to compare and becomes invalid.

    Attributes:
        scale: whether to divide by the deviation.
    """

    scale: bool = True

    def __call__(self, score: Score, group_ids: Tensor | None = None, *, update: bool = True) -> Score:
        """The score relative to its group; see `Normaliser`."""
        shift, scale = torch.zeros_like(score.total).double(), torch.ones_like(score.total).double()
        valid, problems = score.valid.clone(), dict(score.problems)
        for places in _groups(score, group_ids):
            if len(places) < 2:
                _drop_lonely(places, valid, problems)
                continue
            # In float64 the mean of equal float32 numbers is that number: nothing is left to be divided.
            values = score.total[places].double()
            shift[places] = values.mean()
            std = values.std(correction=1)
            if self.scale and std > _MIN_STD:
                scale[places] = std
        return _affine(score, shift, scale, valid, problems)

    def state_dict(self) -> dict[str, Any]:
        """Nothing but what it is: groups stand for themselves."""
        return {"kind": "per_group", "scale": self.scale}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See that the saved run did the same."""
        _check_kind(state, self.state_dict())


@dataclass
class Ranks:
    """The place of a reward among the others of its prompt (or of the batch): blind to its scale, and to outliers.

    With the rank `k` in `1..n` (ties share their mean rank): `uniform` gives `2(k − 1)/(n − 1) − 1` in −1..1, `normal`
    gives `Φ⁻¹((k − ½)/n)`. Fewer than two valid samples are invalid. The whole reward is earned by the last token.

    Attributes:
        within: `group` or `batch`.
        shape: `uniform` or `normal`.
    """

    within: Literal["group", "batch"] = "group"
    shape: Literal["uniform", "normal"] = "uniform"

    def __call__(self, score: Score, group_ids: Tensor | None = None, *, update: bool = True) -> Score:
        """The ranks; see `Normaliser`."""
        from scipy.stats import norm, rankdata

        total, valid, problems = score.total.clone(), score.valid.clone(), dict(score.problems)
        for places in _groups(score, group_ids if self.within == "group" else None):
            if len(places) < 2:
                _drop_lonely(places, valid, problems)
                continue
            ranks = torch.from_numpy(rankdata(score.total[places].numpy()))
            if self.shape == "uniform":
                total[places] = (2 * (ranks - 1) / (len(places) - 1) - 1).float()
            else:
                total[places] = torch.from_numpy(norm.ppf((ranks.numpy() - 0.5) / len(places))).float()
        return Score(total, valid, score.parts, None, problems)

    def state_dict(self) -> dict[str, Any]:
        """What it is."""
        return {"kind": "ranks", "within": self.within, "shape": self.shape}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See that the saved run did the same."""
        _check_kind(state, self.state_dict())


@dataclass
class NormalisedReward:
    """A reward behind a normaliser; its parts keep the plain numbers.

    Attributes:
        reward: the reward.
        normaliser: what is done to its total. Samples with the same prompt are one group.
        update: whether running statistics go on; see `without_updates`.
    """

    reward: Reward
    normaliser: Normaliser
    update: bool = True

    is_checked = True

    @property
    def waits(self) -> bool:
        """Whether the reward inside waits."""
        return bool(getattr(self.reward, "waits", False))

    def __call__(self, samples: Sequence[Sample]) -> Score:
        """The reward on the normaliser's scale."""
        groups: dict[Any, int] = {}
        ids = torch.tensor([groups.setdefault(sample.prompt, len(groups)) for sample in samples], dtype=torch.int64)
        score = self.normaliser(self.reward(samples), ids, update=self.update)
        return check_score(score, samples, name=type(self.normaliser).__name__)

    def check(self) -> None:
        """See that the models inside have not changed."""
        if (check := getattr(self.reward, "check", None)) is not None:
            check()

    def state_dict(self) -> dict[str, Any]:
        """The normaliser's state, and that of the reward inside where it has one."""
        inner = getattr(self.reward, "state_dict", None)
        return {"normaliser": self.normaliser.state_dict(), "reward": inner() if inner is not None else {}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state."""
        self.normaliser.load_state_dict(state["normaliser"])
        if (load := getattr(self.reward, "load_state_dict", None)) is not None:
            load(state["reward"])


def normalised(reward: Any, normaliser: Normaliser, *, name: str | None = None) -> NormalisedReward:
    """A reward behind a normaliser: `normalised(model, Running(shift=False))`; whatever `as_reward` takes."""
    return NormalisedReward(as_reward(reward, name=name), normaliser)


@contextmanager
def without_updates(reward: Reward) -> Iterator[None]:
    """Score without moving running statistics, for evaluation: `with without_updates(reward): …`."""
    found = list(_normalised_in(reward))
    before = [each.update for each in found]
    for each in found:
        each.update = False
    try:
        yield
    finally:
        for each, update in zip(found, before, strict=True):
            each.update = update


def _normalised_in(reward: Any) -> Iterator[NormalisedReward]:
    if isinstance(reward, NormalisedReward):
        yield reward
    if isinstance(reward, CombinedReward):
        for part in reward.rewards.values():
            yield from _normalised_in(part)
    elif (inner := getattr(reward, "reward", None)) is not None:
        yield from _normalised_in(inner)


def _affine(
    score: Score,
    shift: Tensor,
    scale: Tensor,
    valid: Tensor | None = None,
    problems: Mapping[int, str] | None = None,
) -> Score:
    """`(total − shift) / scale`; spans are divided too, so that the shift is borne by the last token."""
    scales = scale.expand(len(score.total))
    spans = score.spans and [
        [(start, end, value / by) for start, end, value in pieces]
        for pieces, by in zip(score.spans, scales.tolist(), strict=True)
    ]
    return Score(
        ((score.total - shift) / scales).float(),
        score.valid if valid is None else valid,
        score.parts,
        spans,
        score.problems if problems is None else problems,
    )


def _groups(score: Score, group_ids: Tensor | None) -> Iterator[Tensor]:
    """The places of the valid samples of each group that has any."""
    ids = torch.zeros(len(score.total), dtype=torch.int64) if group_ids is None else group_ids
    if ids.shape != score.total.shape:
        raise ValueError(f"group_ids {tuple(ids.shape)} for {len(score.total)} samples")
    for group in sorted(set(ids[score.valid].tolist())):
        yield ((ids == group) & score.valid).nonzero().squeeze(-1)


def _drop_lonely(places: Tensor, valid: Tensor, problems: dict[int, str]) -> None:
    for place in places.tolist():
        valid[place] = False
        problems[place] = "no other valid sample of its prompt to compare with"


def _check_kind(state: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    found = {key: state.get(key) for key in wanted}
    if found != dict(wanted):
        raise ValueError(f"a normaliser's saved state is {found}, but this run's is {dict(wanted)}")

"""Which rewards a run is given, how they are weighed, limited and normalised."""

from typing import Any, Literal

from pydantic import Field, model_validator

from plaudit.configs.base import Config

Normalisation = Literal["none", "stored", "running", "running_scale", "group", "group_mean", "rank"]
RELATIVE = ("group", "group_mean", "rank")
"""Scales on which one answer alone has no place."""


class RewardPartConfig(Config):
    """One reward of a sum."""

    reward: str
    """A reward model's folder or Hugging Face name, a server's address (`http://…/classify`, `http://…/get_reward`), a
    rule such as `length_penalty=0.01`, or a function by name (`my_rewards.py:polite`, `module:polite`)."""
    weight: float = 1.0
    """Its weight in the sum; 0 computes and logs it only."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Options of the rule (`free: 100`), of the model (`normalised: false`, `dtype: bfloat16`) or of the server
    (`timeout: 30`, `tokenizer: FOLDER` to render texts as its model reads them); keywords of a function."""
    normalise: Normalisation = "none"
    """`stored` divides by the spread stored with a reward model, `running` whitens by everything seen so far,
    `running_scale` only divides by that spread, `group` whitens within a prompt, `group_mean` subtracts its mean,
    `rank` takes the rank within a prompt."""
    clip: tuple[float, float] | None = None
    """Least and greatest value, after normalising and before weighing."""

    @model_validator(mode="after")
    def _check_part(self) -> "RewardPartConfig":
        _check_clip(self.clip)
        return self


class RewardsConfig(Config):
    """The reward of a run: a weighted sum of parts."""

    parts: dict[str, RewardPartConfig]
    """The parts by the name under which they are logged."""
    missing: Literal["invalid", "skip"] = "invalid"
    """A completion for which a part has nothing to say is left out (`invalid`), or judged by the others (`skip`)."""
    normalise: Normalisation = "none"
    """The same for the sum; `stored` belongs to a part."""
    clip: tuple[float, float] | None = None
    """Least and greatest value of the sum, after normalising."""

    @property
    def compares_answers(self) -> bool:
        """Whether an answer has a reward only beside other answers to its prompt."""
        parts = [part.normalise for part in self.parts.values() if part.weight and self.missing == "invalid"]
        return any(kind in RELATIVE for kind in (self.normalise, *parts))

    @model_validator(mode="after")
    def _check_parts(self) -> "RewardsConfig":
        _check_clip(self.clip)
        if not any(part.weight for part in self.parts.values()):
            raise ValueError("parts: at least one reward needs a weight other than 0")
        if self.normalise == "stored":
            raise ValueError("normalise: stored is the spread of one reward model; set it on that part")
        return self


def _check_clip(clip: tuple[float, float] | None) -> None:
    if clip is not None and clip[0] >= clip[1]:
        raise ValueError(f"clip: {list(clip)}: the first limit must be below the second")

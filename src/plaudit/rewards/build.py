"""The reward that a configuration describes."""

from plaudit.configs.rewards import RewardPartConfig, RewardsConfig
from plaudit.rewards.base import Reward
from plaudit.rewards.combine import clipped, combine
from plaudit.rewards.model import ModelReward
from plaudit.rewards.named import named_reward
from plaudit.rewards.normalise import Normaliser, PerGroup, Ranks, Running, normalised, stored_of


def build_reward(config: RewardsConfig, *, device: str | None = None) -> Reward:
    """A weighted sum whose parts are opened, normalised and limited as configured.

    Args:
        config: the parts.
        device: where models run whose options do not say; None takes the accelerator where there is one.

    Raises:
        ValueError: for a part that cannot be built, or a stored spread where there is none.
    """
    parts = {name: (_part(name, part, device), part.weight) for name, part in config.parts.items()}
    reward: Reward = combine(parts, missing=config.missing)
    if config.normalise != "none":
        reward = normalised(reward, _normaliser(config.normalise))
    return reward if config.clip is None else clipped(reward, *config.clip)


def _part(name: str, part: RewardPartConfig, device: str | None) -> Reward:
    reward = named_reward(part.reward, name=name, options=part.options, device=device)
    if part.normalise == "stored":
        if not isinstance(reward, ModelReward):
            raise ValueError(f"reward {name!r}: normalise: stored needs a reward model, not {part.reward!r}")
        if not reward.normalised:
            raise ValueError(f"reward {name!r}: normalise: stored needs normalised: true")
        reward = normalised(reward, stored_of(reward.model))
    elif part.normalise != "none":
        reward = normalised(reward, _normaliser(part.normalise))
    return reward if part.clip is None else clipped(reward, *part.clip)


def _normaliser(kind: str) -> Normaliser:
    match kind:
        case "running":
            return Running()
        case "running_scale":
            return Running(shift=False)
        case "group":
            return PerGroup()
        case "group_mean":
            return PerGroup(scale=False)
        case "rank":
            return Ranks()
        case _:
            raise ValueError(f"normalise: {kind} is not known here")

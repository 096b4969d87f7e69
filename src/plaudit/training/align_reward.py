"""What an alignment run is rewarded by: opened or handed over, and the reward models in it."""

from typing import Any

from plaudit.configs.align import AlignConfig
from plaudit.models.reward_model import RewardModel
from plaudit.rewards.base import Reward, as_reward
from plaudit.rewards.build import build_reward
from plaudit.rewards.combine import CombinedReward
from plaudit.rewards.model import ModelReward


def open_reward(config: AlignConfig, handed: Any = None, *, device: str | None = None) -> Reward:
    """The reward of a run, configured (and then on `device`) or handed over.

    Raises:
        ValueError: if there is none, or one in two places.
    """
    wanted = config.reward_config()
    if (wanted is None) == (handed is None):
        problem = "no reward is configured" if handed is None else "a reward is configured and one was handed over"
        raise ValueError(f"reward: {problem}; name one, for example --reward runs/reward/model")
    return build_reward(wanted, device=device) if wanted is not None else as_reward(handed)


def check_unchanged(reward: Reward) -> None:
    """See that the models among the rewards are what they were.

    Raises:
        RuntimeError: if the weights of one have changed.
    """
    if (check := getattr(reward, "check", None)) is not None:
        check()


def reward_model_of(reward: Any) -> RewardModel:
    """The first reward model among the parts of a reward, to start a critic from.

    Raises:
        ValueError: if there is none.
    """
    if (found := _first_model(reward)) is None:
        raise ValueError(
            "critic_start: reward needs a reward model among the rewards; start the critic from the policy"
        )
    return found.model


def model_reward_of(reward: Any) -> ModelReward:
    """The same with what freezes it, to be refreshed.

    Raises:
        ValueError: if there is none.
    """
    if (found := _first_model(reward)) is None:
        raise ValueError("refresh_reward: there is no reward model among the rewards that could learn")
    return found


def _first_model(reward: Any) -> ModelReward | None:
    if isinstance(reward, ModelReward):
        return reward
    if isinstance(reward, CombinedReward):
        return next((found for part in reward.rewards.values() if (found := _first_model(part)) is not None), None)
    inner = getattr(reward, "reward", None)
    return None if inner is None else _first_model(inner)

"""What an alignment run learns: the policy with its critic, styles or goals, and how an algorithm sees it."""

from typing import Any

import torch

from plaudit.configs.acer import AcerTextConfig
from plaudit.configs.align import AlignConfig
from plaudit.configs.feudal import FeudalTextConfig
from plaudit.configs.option_critic import StyledConfig
from plaudit.models.causal_lm import CausalLM
from plaudit.models.goals import GoalHeads
from plaudit.models.policy import Critic, CriticKind, LanguagePolicy, ReferencePolicy
from plaudit.models.reward_model import RewardModel
from plaudit.models.steering import steering_beside
from plaudit.models.styles import StyleHeads, build_styles
from plaudit.rollout.text_action_values import TextActionValues
from plaudit.rollout.text_policy import TextPolicy
from plaudit.training.messages import warn

HEADS = ("critic.head", "action_values.head", "language_model.steering")
"""How the names of parameters begin that start afresh; `optimizer.head_learning_rate` is theirs."""


def build_policy(
    config: AlignConfig, language_model: CausalLM, device: torch.device, *, reward_model: RewardModel | None
) -> tuple[LanguagePolicy, ReferencePolicy]:
    """The policy with what its algorithm has to learn beside it, and the frozen reference.

    Args:
        config: of the run.
        language_model: the start; it is changed.
        device: of the run, where the model is already.
        reward_model: where a separate critic begins, with `critic_start: reward`.
    """
    language_model.steering, steering = None, build_steering(language_model, config)
    reference = ReferencePolicy(language_model)
    replays = isinstance(config.algorithm, AcerTextConfig)
    learned: CriticKind = "separate" if config.critic == "auto" else config.critic
    critic: CriticKind = learned if config.algorithm.needs_critic and not replays else "none"
    policy = LanguagePolicy.build(language_model, critic=critic, reward_model=reward_model).to(device)
    if replays:
        policy.action_values = Critic.of_actions(language_model, shared=learned == "shared").to(device)
    language_model.steering = None if steering is None else steering.to(device)
    # Dropout stays off: the updates must see the policy that sampled.
    policy.eval()
    if config.gradient_checkpointing:
        policy.gradient_checkpointing_enable()
    return policy, reference


def build_steering(model: CausalLM, config: AlignConfig) -> StyleHeads | GoalHeads | None:
    """New styles or goals, where the algorithm learns some; those that the start has are left behind, aloud."""
    backbone = config.model.backbone
    if model.steering is not None or (backbone is not None and steering_beside(backbone) is not None):
        warn("the start has styles or goals beside it; they are left behind, and the language model alone goes on")
    if isinstance(config.algorithm, StyledConfig):
        return build_styles(model, config.algorithm, seed=config.seed)
    if isinstance(config.algorithm, FeudalTextConfig):
        sizes = {"horizon": config.algorithm.horizon, "manager_size": config.algorithm.manager_size}
        return GoalHeads(model.head[0].shape[1], **sizes, seed=config.seed)
    return None


def build_learner(config: AlignConfig, policy: TextPolicy, reference: ReferencePolicy) -> Any:
    """The policy as the run's algorithm updates it: with whole distributions and action values for ACER."""
    if isinstance(config.algorithm, AcerTextConfig):
        return TextActionValues(policy, reference, averaged=config.algorithm.trust_region is not None)
    return policy

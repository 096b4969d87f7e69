"""`plaudit reward`: train a reward model."""

from plaudit.cli.verb import Words, run_verb
from plaudit.configs.reward import RewardTrainingConfig


def reward(*words: Words) -> None:
    """Train a reward model from human judgements."""
    run_verb(words, RewardTrainingConfig, "plaudit.training.reward:main", verb="reward", about=reward.__doc__ or "")

"""`plaudit gym`: train an agent in a Gymnasium environment, or watch one that was saved."""

from plaudit.cli.verb import Words, run_verb
from plaudit.configs.gym import GymConfig


def gym(*words: Words) -> None:
    """Train an agent in a Gymnasium environment with discrete actions, or evaluate one that was saved."""
    run_verb(words, GymConfig, "plaudit.training.gym:main", verb="gym", about=gym.__doc__ or "")

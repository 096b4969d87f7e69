"""`plaudit align`: improve a language model against a reward."""

from plaudit.cli.verb import Words, run_verb
from plaudit.configs.align import AlignConfig


def align(*words: Words) -> None:
    """Align a language model with a reward: PPO, RLOO, GRPO, REINFORCE, A2C on sampled answers."""
    run_verb(words, AlignConfig, "plaudit.training.align:main", verb="align", about=align.__doc__ or "")

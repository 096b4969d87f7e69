"""`plaudit sft`: supervised fine-tuning."""

from plaudit.cli.verb import Words, run_verb
from plaudit.configs.sft import SftConfig


def sft(*words: Words) -> None:
    """Train a language model on demonstrations; only the tokens of the completions count."""
    run_verb(words, SftConfig, "plaudit.training.sft:main", verb="sft", about=sft.__doc__ or "")

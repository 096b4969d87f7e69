"""`plaudit evaluate reward`: measure reward models."""

from plaudit.cli.verb import Words, run_verb
from plaudit.configs.evaluate import EvaluateRewardConfig


def reward(*words: Words) -> None:
    """Measure reward models on human judgements: accuracy, calibration, floors, shortcuts; JSON, CSV and a page."""
    run_verb(
        words,
        EvaluateRewardConfig,
        "plaudit.evaluation.reward:evaluate_reward",
        verb="evaluate reward",
        about=reward.__doc__ or "",
        positional="models",
    )

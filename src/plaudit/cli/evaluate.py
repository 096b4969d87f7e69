"""`plaudit evaluate`: measure reward models, and policies."""

from plaudit.cli.verb import Words, run_verb


def reward(*words: Words) -> None:
    """Measure reward models on human judgements: accuracy, calibration, floors, shortcuts; JSON, CSV and a page."""
    from plaudit.configs.evaluate import EvaluateRewardConfig

    run_verb(
        words,
        EvaluateRewardConfig,
        "plaudit.evaluation.reward:evaluate_reward",
        verb="evaluate reward",
        about=reward.__doc__ or "",
        positional="models",
    )


def policy(*words: Words) -> None:
    """Measure language models against the one they started from: win rate, reward, divergence, diversity, best of n."""
    from plaudit.configs.evaluate_policy import EvaluatePolicyConfig

    run_verb(
        words,
        EvaluatePolicyConfig,
        "plaudit.evaluation.policy:evaluate_policy",
        verb="evaluate policy",
        about=policy.__doc__ or "",
        positional="policies",
    )

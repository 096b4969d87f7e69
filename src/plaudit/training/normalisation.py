"""After training: where the scores' zero is."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from plaudit.data.records import Comparison, Demonstration, Prompt
from plaudit.models.reward_model import RewardModel
from plaudit.training.messages import warn

PROMPTS_AT_ONCE = 256


@dataclass(frozen=True)
class ScoreStatistics:
    """Mean and standard deviation of raw scores, one number per output, and how many prompts they are from."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    num_prompts: int


def score_statistics(model: RewardModel, texts: dict[Prompt, list[str]], *, token_budget: int) -> ScoreStatistics:
    """Mean and deviation over prompts, each prompt weighing the same however many completions it has.

    Equation, with `m_x` the mean over the completions of prompt x:
        `mean = (1/P) Σ_x m_x`, `std² = (1/P) Σ_x (1/K_x) Σ_k (r_xk − mean)²`.

    Args:
        model: scores with its raw outputs, without dropout.
        texts: completions by prompt.
        token_budget: tokens of one forward pass.
    """
    prompts = list(texts)
    values: list[Tensor] = []
    for start in range(0, len(prompts), PROMPTS_AT_ONCE):
        chosen = prompts[start : start + PROMPTS_AT_ONCE]
        for result in model.score(chosen, [texts[prompt] for prompt in chosen], token_budget=token_budget):
            scores = result.raw[:, None] if result.attributes is None else result.attributes
            values.append(scores.double())
    mean = torch.stack([each.mean(0) for each in values]).mean(0)
    variance = torch.stack([(each - mean).square().mean(0) for each in values]).mean(0)
    return ScoreStatistics(tuple(mean.tolist()), tuple(variance.sqrt().tolist()), len(prompts))


def texts_by_prompt(records: Iterable[Comparison | Demonstration]) -> dict[Prompt, list[str]]:
    """Every prompt with its different completions, in order of first appearance."""
    texts: dict[Prompt, dict[str, None]] = {}
    for record in records:
        completions = record.completions if isinstance(record, Comparison) else (record.completion,)
        texts.setdefault(record.prompt, {}).update(dict.fromkeys(completions))
    return {prompt: list(completions) for prompt, completions in texts.items()}


def normalise_model(
    model: RewardModel,
    comparisons: Sequence[Comparison],
    demonstrations: Sequence[Demonstration],
    *,
    token_budget: int,
) -> ScoreStatistics:
    """Store mean and deviation of the demonstrations' scores (without any: of the training completions') in the model.

    Comparative losses leave a constant undetermined; afterwards a normalised score of 0 is an average demonstration.
    Where all scores are equal (a single text) the deviation is stored as 1.

    Returns:
        What was stored.
    """
    texts = texts_by_prompt(demonstrations or comparisons)
    statistics = score_statistics(model, texts, token_budget=token_budget)
    std = tuple(value if value > 0 and math.isfinite(value) else 1.0 for value in statistics.std)
    if std != statistics.std:
        warn(f"the scores of {statistics.num_prompts} prompts do not vary: their standard deviation is stored as 1")
    model.set_normalisation(list(statistics.mean), list(std))
    return ScoreStatistics(statistics.mean, std, statistics.num_prompts)

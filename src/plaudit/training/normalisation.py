"""After training: where the scores' zero is."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from plaudit.data.packing import pack_groups
from plaudit.data.records import Comparison, Demonstration, Prompt
from plaudit.data.splitting import split_group
from plaudit.data.tokenising import TokenisedGroup
from plaudit.models.reward_model import RewardModel
from plaudit.training.messages import warn
from plaudit.training.parallel import Network
from plaudit.training.reading import RecordCounts, TokenisedRecords

PROMPTS_AT_ONCE = 256


@dataclass(frozen=True)
class ScoreStatistics:
    """Mean and standard deviation of raw scores, one number per output, and how many prompts they are from."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    num_prompts: int


def score_statistics(
    model: RewardModel, texts: dict[Prompt, list[str]], *, token_budget: int, network: Network | None = None
) -> ScoreStatistics:
    """Mean and deviation over prompts, each prompt weighing the same however many completions it has.

    Equation, with `m_x` the mean over the completions of prompt x:
        `mean = (1/P) Σ_x m_x`, `std² = (1/P) Σ_x (1/K_x) Σ_k (r_xk − mean)²`.

    Args:
        model: scores with its raw outputs, without dropout.
        texts: completions by prompt.
        token_budget: tokens of one forward pass.
        network: the model as several processes share it; each scores a part. All of them have to call this.
    """
    prompts = list(texts)
    values: list[Tensor] = []
    if network is not None and network.processes.several:
        groups = [model.text_tokeniser.group(prompt, texts[prompt]) for prompt in prompts]
        values = [scores.double() for scores in shared_scores(model, network, groups, token_budget)]
        prompts = []
    for start in range(0, len(prompts), PROMPTS_AT_ONCE):
        chosen = prompts[start : start + PROMPTS_AT_ONCE]
        for result in model.score(chosen, [texts[prompt] for prompt in chosen], token_budget=token_budget):
            scores = result.raw[:, None] if result.attributes is None else result.attributes
            values.append(scores.double())
    mean = torch.stack([each.mean(0) for each in values]).mean(0)
    variance = torch.stack([(each - mean).square().mean(0) for each in values]).mean(0)
    return ScoreStatistics(tuple(mean.tolist()), tuple(variance.sqrt().tolist()), len(texts))


@torch.no_grad()
def shared_scores(
    model: RewardModel, network: Network, groups: Sequence[TokenisedGroup], token_budget: int
) -> list[Tensor]:
    """Raw scores of tokenised groups without dropout, computed by all processes together and known to all of them.

    Args:
        model: the reward model.
        network: the same as the processes share it.
        groups: `P` groups.
        token_budget: most tokens of one forward pass, as far as single completions allow.

    Returns:
        For each group `[K, A]`, on the CPU; `A` is 1 without attributes.
    """
    processes, mine = network.processes, dict[int, list[list[float]]]()
    records: TokenisedRecords[Comparison] = TokenisedRecords(
        [], list(groups), [], RecordCounts(), model.causal, model.packed
    )
    idle = [min(groups, key=lambda group: group.num_tokens)]
    training = model.training
    model.eval()
    for chosen, passes in processes.share(records.micro_batches(token_budget)):
        parts = [[groups[index] for index in chosen]] if chosen else []
        if len(chosen) == 1:
            parts = [[part] for part in split_group(groups[chosen[0]], token_budget, packed=model.packed)]
        mine.update({index: [[0.0]] * groups[index].num_slots for index in chosen})
        for number in range(passes):
            useful = number < len(parts)
            batch = pack_groups(parts[number] if useful else idle, causal=model.causal).to(processes.device)
            scores = network(batch).float().reshape(batch.layout.num_completions, -1).tolist()
            places = zip(batch.layout.group_index.tolist(), batch.layout.slot_index.tolist(), strict=True)
            for row, (group, slot) in zip(scores, places, strict=True) if useful else ():
                mine[chosen[group]][slot] = row
    model.train(training)
    network.reshard()
    found = {index: rows for part in processes.gather(mine) for index, rows in part.items()}
    return [torch.tensor(found[index]) for index in range(len(groups))]


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
    network: Network | None = None,
) -> ScoreStatistics:
    """Store mean and deviation of the demonstrations' scores (without any: of the training completions') in the model.

    Comparative losses leave a constant undetermined; afterwards a normalised score of 0 is an average demonstration.
    Where all scores are equal (a single text) the deviation is stored as 1.

    Returns:
        What was stored.
    """
    texts = texts_by_prompt(demonstrations or comparisons)
    statistics = score_statistics(model, texts, token_budget=token_budget, network=network)
    std = tuple(value if value > 0 and math.isfinite(value) else 1.0 for value in statistics.std)
    if std != statistics.std:
        warn(f"the scores of {statistics.num_prompts} prompts do not vary: their standard deviation is stored as 1")
    model.set_normalisation(list(statistics.mean), list(std))
    return ScoreStatistics(statistics.mean, std, statistics.num_prompts)

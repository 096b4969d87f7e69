"""Comparisons that nobody has to judge: a good completion beside good completions of other prompts."""

import random
from collections.abc import Sequence

from plaudit.data.records import Best, Comparison, Demonstration


def beside_others(demonstrations: Sequence[Demonstration], *, others: int = 3, seed: int = 0) -> list[Comparison]:
    """Every demonstration beside the completions of `others` other prompts, its own one being the pick.

    People who rank answers to one prompt seldom see one that answers another, and a reward model can go far by the
    manner of a text alone, without reading the prompt. Where all completions are equally good and only one belongs to
    the prompt, nothing but reading both tells it: a few hundred such picks among the rankings teach that.

    Args:
        demonstrations: `N` of them; those of one prompt are never held against each other.
        others: completions of other prompts beside each, drawn without replacement; fewer where there are not so many.
        seed: of what is drawn and of the order in which completions stand.

    Returns:
        A `Best` for each demonstration that has at least one other beside it, in their order, with its weight and
        group; `subset` is `others`.

    Raises:
        ValueError: if `others` is not positive.
    """
    if others < 1:
        raise ValueError(f"others must be at least 1, got {others}")
    rng = random.Random(seed)
    found = []
    for number, own in enumerate(demonstrations):
        texts = [own.completion]
        # Drawn twice over, which leaves enough nearly always; what is in the way is passed over.
        for other in rng.sample(demonstrations, min(len(demonstrations), 2 * others + 2)):
            if len(texts) <= others and other.prompt != own.prompt and other.completion not in texts:
                texts.append(other.completion)
        if len(texts) == 1:
            continue
        order = rng.sample(range(len(texts)), len(texts))
        found.append(
            Comparison(
                prompt=own.prompt,
                completions=tuple(texts[place] for place in order),
                judgement=Best(order.index(0)),
                id=f"{own.id or number}-beside-others",
                weight=own.weight,
                group=own.group,
                subset="others",
            )
        )
    return found

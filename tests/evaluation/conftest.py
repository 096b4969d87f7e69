"""Simulated comparisons whose true rewards are known."""

import numpy as np
import pytest

from plaudit.data.records import Best, Comparison, Ranking, Scores, Votes

TEXT = "the answer is here because rivers run downhill and people like short clear words about tea trains and rain"
WORDS = TEXT.split()


def simulate(
    prompts=60, seed=0, sizes=(2, 4, 6), annotators=("ann", "bob"), kinds=("ranking", "best", "votes", "scores")
):
    """`(comparisons, rewards)`: people rank by true reward plus Gumbel noise, so that pairs follow sigma(d) exactly
    and picks the softmax."""
    generator = np.random.default_rng(seed)
    comparisons, rewards = [], []
    for index in range(prompts):
        size = int(sizes[index % len(sizes)])
        true = generator.normal(0.0, 1.5, size)
        felt = true + generator.gumbel(size=size)
        texts = []
        for slot in range(size):
            words = generator.choice(WORDS, int(generator.integers(3, 30)))
            texts.append(f"{' '.join(words)} ({index}.{slot})")
        order = np.argsort(-felt)
        kind = kinds[index % len(kinds)]
        if kind == "ranking":
            judgement = Ranking(tuple((int(slot),) for slot in order))
        elif kind == "best":
            judgement = Best(int(order[0]))
        elif kind == "votes":
            draws = np.argmax(true + generator.gumbel(size=(5, size)), axis=1)
            judgement = Votes(tuple(float(count) for count in np.bincount(draws, minlength=size)))
        else:
            judgement = Scores(tuple(float(np.round(value)) for value in felt))
        comparisons.append(
            Comparison(
                prompt=f"Question {index}: what about {generator.choice(WORDS)}?",
                completions=tuple(texts),
                judgement=judgement,
                id=f"id-{index}",
                annotator=annotators[index % len(annotators)],
                subset="odd" if index % 2 else "even",
            )
        )
        rewards.append([float(value) for value in true])
    return comparisons, rewards


@pytest.fixture(scope="session")
def simulated():
    return simulate


def permuted(comparison, scores, order):
    """The same comparison with its completions in another order: `order[new] = old`."""
    place = {old: new for new, old in enumerate(order)}
    judgement = comparison.judgement
    match judgement:
        case Ranking(tiers):
            judgement = Ranking(tuple(tuple(place[slot] for slot in tier) for tier in tiers))
        case Best(index):
            judgement = Best(place[index])
        case Votes(counts):
            judgement = Votes(tuple(counts[old] for old in order))
        case Scores(values):
            judgement = Scores(tuple(values[old] for old in order))
    moved = {**comparison.__dict__, "completions": tuple(comparison.completions[old] for old in order)}
    return Comparison(**{**moved, "judgement": judgement}), [scores[old] for old in order]


@pytest.fixture(scope="session")
def permute():
    return permuted

"""Best of n: by hand, against all choices, against the exactly known distribution on the test-bed."""

import itertools
import math

import numpy as np
import pytest
import torch

from plaudit.evaluation.best_of_n import (
    best_of_n_kl,
    best_of_n_means,
    best_of_n_sizes,
    best_of_n_weights,
    joint,
)
from plaudit.rollout.token_mdp import TokenMDP


def test_by_hand():
    # Of {0, 1, 2, 3} two are drawn: 6 choices, whose favourites are 1, 2, 2, 3, 3, 3.
    assert best_of_n_weights(np.array([2.0, 0.0, 3.0, 1.0]), 2) == pytest.approx([2 / 6, 0, 3 / 6, 1 / 6])
    assert best_of_n_weights(np.array([1.0, 1.0, 1.0]), 2) == pytest.approx([1 / 3] * 3)
    assert best_of_n_kl(1) == 0.0
    assert best_of_n_kl(16) == pytest.approx(math.log(16) - 15 / 16)
    assert best_of_n_sizes(16) == (1, 2, 4, 8, 16)
    assert best_of_n_sizes(6) == (1, 2, 4, 6)
    assert best_of_n_sizes(0) == ()


@pytest.mark.parametrize("n", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("ties", [False, True])
def test_equals_the_mean_over_all_choices(n, ties):
    generator = np.random.default_rng(n)
    proxy = generator.integers(0, 4, 7).astype(float) if ties else generator.normal(size=7)
    gold = generator.normal(size=7)
    means = []
    for chosen in itertools.combinations(range(7), n):
        highest = max(proxy[i] for i in chosen)
        means.append(np.mean([gold[i] for i in chosen if proxy[i] == highest]))
    if not ties:
        assert best_of_n_weights(proxy, n) @ gold == pytest.approx(np.mean(means))
    # With ties every order of the equal ones is as likely, so the shared weight is the mean over tie-breaks too.
    broken = []
    for order in itertools.permutations(range(7)) if ties and n in (2, 5) else ():
        rank = {item: place for place, item in enumerate(order)}
        sizes = sorted(range(7), key=lambda i: (proxy[i], rank[i]))
        weights = np.diff([math.comb(m, n) / math.comb(7, n) for m in range(8)])
        broken.append(sum(w * gold[i] for w, i in zip(weights, sizes, strict=True)))
    if broken:
        assert best_of_n_weights(proxy, n) @ gold == pytest.approx(np.mean(broken))


def test_the_estimator_is_unbiased_for_the_exact_distribution():
    """On the test-bed the expected reward of the best of n is known by enumeration; the estimator from N = 12 samples
    has it as its mean: within 4 standard errors over 4000 repetitions, for gold and for the proxy that chooses."""
    mdp = TokenMDP(vocabulary=4, max_length=3, seed=3)
    generator = torch.Generator().manual_seed(0)
    probabilities = mdp.string_logprobs(mdp.reference_logprobs)[0].exp()
    # A proxy with many ties: the reward in steps of a half.
    gold = mdp.string_rewards[0]
    coarse = TokenMDP(
        vocabulary=4, max_length=3, seed=3, reward=lambda _, tokens: float(2 * gold[mdp.strings.index(tokens)]) // 1 / 2
    )
    rounded = coarse.string_rewards[0]
    assert len(rounded.unique()) < len(rounded) / 4
    drawn = torch.multinomial(probabilities.expand(4000, -1), 12, replacement=True, generator=generator)
    for n in (1, 3, 12):
        exact = coarse.best_of_n(n)[0]
        for values in (gold, rounded):
            found = best_of_n_means(rounded[drawn].numpy(), values[drawn].numpy(), n)
            wanted = float((exact * values).sum())
            assert abs(found.mean() - wanted) < 4 * found.std() / math.sqrt(4000)
            # Choosing once from the first n is unbiased too, and varies more.
        once = rounded[drawn[:, :n]].max(1).values.numpy()
        every = best_of_n_means(rounded[drawn].numpy(), rounded[drawn].numpy(), n)
        assert every.var() <= once.var() + 1e-12


def test_the_bound_holds_on_the_test_bed():
    mdp = TokenMDP(vocabulary=4, max_length=3, seed=1)
    own = mdp.string_logprobs(mdp.reference_logprobs)[0]
    for n in (1, 2, 4, 16):
        best = mdp.best_of_n(n)[0]
        kl = float((best * (best.clamp_min(1e-300).log() - own)).sum())
        assert kl <= best_of_n_kl(n) + 1e-12
    # Without ties and with many strings of little mass it is nearly reached.
    uniform, n = np.full(20_000, 1 / 20_000), 8
    weights = np.diff((np.arange(20_001) / 20_000) ** n)
    assert float((weights * np.log(weights / uniform)).sum()) == pytest.approx(best_of_n_kl(n), abs=1e-3)


def test_what_is_missing_is_left_out():
    proxy = np.array([[1.0, 2.0, np.nan, 3.0], [np.nan, np.nan, np.nan, 1.0]])
    gold = np.array([[10.0, 20.0, 99.0, np.nan], [1.0, 1.0, 1.0, 5.0]])
    assert best_of_n_means(proxy, gold, 2)[0] == 20.0
    assert np.isnan(best_of_n_means(proxy, gold, 2)[1])
    assert best_of_n_means(proxy, gold, 1) == pytest.approx([15.0, 5.0])
    both = joint([proxy, gold])
    assert (
        np.isnan(both[0]).tolist() == np.isnan(both[1]).tolist() == [[False, False, True, True], [True] * 3 + [False]]
    )


def test_faults():
    with pytest.raises(ValueError, match="best of 3 needs at least that many"):
        best_of_n_weights(np.array([1.0, 2.0]), 3)
    with pytest.raises(ValueError, match="leave out answers without a reward"):
        best_of_n_weights(np.array([1.0, np.nan]), 1)
    with pytest.raises(ValueError, match=r"must both be \[P, N\]"):
        best_of_n_means(np.zeros((2, 3)), np.zeros((3, 2)), 1)
    with pytest.raises(ValueError, match="n is 0"):
        best_of_n_means(np.zeros((2, 3)), np.zeros((2, 3)), 0)
    with pytest.raises(ValueError, match="n is 0"):
        best_of_n_kl(0)

"""The tilt: by hand, against the exactly known optimum on the test-bed, its identities, and where it gives up."""

import math

import numpy as np
import pytest
import torch

from plaudit.data.records import PromptRecord
from plaudit.evaluation.best_of_n import best_of_n_kl, best_of_n_means
from plaudit.evaluation.policy_answers import given_answers
from plaudit.evaluation.policy_compare import BEST_OF_N, TILT, CompareOptions, Scored, compare_policies
from plaudit.evaluation.tilt import effective_answers, tilt_coefficients, tilt_kl, tilt_weights, tilted_means
from plaudit.rollout.token_mdp import TokenMDP

NAN = float("nan")


def test_by_hand():
    proxy = np.array([[0.0, math.log(3.0)], [1.0, NAN]])
    assert tilt_weights(proxy, 1.0) == pytest.approx(np.array([[0.25, 0.75], [1.0, 0.0]]))
    assert tilted_means(proxy, np.array([[4.0, 8.0], [5.0, NAN]]), 1.0) == pytest.approx([7.0, 5.0])
    assert tilt_kl(proxy, 1.0) == pytest.approx([0.25 * math.log(0.5) + 0.75 * math.log(1.5), 0.0])
    assert effective_answers(proxy, 1.0) == pytest.approx((1.6 + 1.0) / 2)


def test_many_answers_give_the_exact_optimum():
    """Expected reward and divergence of `π*`, from samples of the reference alone."""
    mdp = TokenMDP(vocabulary=4, max_length=3, seed=3, coefficient=0.5)
    start = mdp.string_logprobs(mdp.reference_logprobs)[0].exp()
    drawn = torch.multinomial(start, 40_000, replacement=True, generator=torch.Generator().manual_seed(0))
    proxy = mdp.string_rewards[0, drawn].numpy()[None]
    optimum = mdp.tilted_string_logprobs()[0]
    reward = float((optimum.exp() * mdp.string_rewards[0]).sum())
    divergence = float((optimum.exp() * (optimum - start.log())).sum())
    assert tilted_means(proxy, proxy, 0.5)[0] == pytest.approx(reward, abs=0.02)
    assert tilt_kl(proxy, 0.5)[0] == pytest.approx(divergence, abs=0.02)
    assert divergence > 0.5


def test_identities():
    generator = np.random.default_rng(0)
    proxy, gold = generator.normal(size=(5, 12)), generator.normal(size=(5, 12))
    proxy[2, 3] = proxy[2, 7] = NAN
    weights = tilt_weights(proxy, 0.3)
    assert weights.sum(1) == pytest.approx(np.ones(5))
    assert tilt_weights(proxy + 7.0, 0.3) == pytest.approx(weights)
    assert tilt_weights(4.0 * proxy, 1.2) == pytest.approx(weights)
    kept = ~np.isnan(proxy[2])
    assert tilted_means(proxy, gold, 0.3)[2] == pytest.approx(tilted_means(proxy[2:3, kept], gold[2:3, kept], 0.3)[0])
    # β E[r] = E[r] − β KL is the free energy β log Z, which the plain mean can only be below.
    whole = proxy[:2]
    free = 0.3 * np.log(np.exp(whole / 0.3).mean(1))
    assert tilted_means(whole, whole, 0.3) - 0.3 * tilt_kl(whole, 0.3) == pytest.approx(free)
    assert (free > whole.mean(1)).all()


def test_extremes():
    proxy = np.array([[1e4, -1e4, 0.0], [NAN, NAN, NAN]])
    assert tilted_means(proxy, proxy, 1.0)[0] == 1e4
    assert tilt_kl(proxy, 1.0)[0] == pytest.approx(math.log(3))
    assert np.isnan(tilted_means(proxy, proxy, 1.0)[1])
    assert np.isnan(tilt_kl(proxy, 1.0)[1])
    assert tilt_kl(proxy, 1e12)[0] == pytest.approx(0, abs=1e-12)
    assert tilt_coefficients(np.ones((3, 4))) == {}
    assert tilt_coefficients(np.full((3, 4), NAN)) == {}
    for faulty, coefficient, words in ((proxy[0], 1.0, "P, N"), (proxy, 0.0, "positive")):
        with pytest.raises(ValueError, match=words):
            tilt_weights(faulty, coefficient)
    with pytest.raises(ValueError, match="one shape"):
        tilted_means(proxy, proxy[:1], 1.0)


@pytest.mark.parametrize(("answers", "share"), [(16, 0.9), (32, 0.95)])
def test_one_nat_is_reached_and_the_points_lie_a_little_below_the_frontier(answers, share):
    """Under a Gaussian reward the tilt at divergence d gains `σ √(2 d)` exactly."""
    proxy = np.random.default_rng(1).normal(size=(2000, answers))
    found = tilt_coefficients(proxy, (0.1, 0.25, 0.5, 0.75, 1.0))
    assert list(found) == [0.1, 0.25, 0.5, 0.75, 1.0]
    for target, coefficient in found.items():
        assert tilt_kl(proxy, coefficient).mean() == pytest.approx(target, rel=1e-6)
        gain = tilted_means(proxy, proxy, coefficient).mean()
        assert share * math.sqrt(2 * target) < gain < math.sqrt(2 * target)
    # And best of n lies below the tilt of its own divergence.
    two = best_of_n_means(proxy, proxy, 2).mean()
    (coefficient,) = tilt_coefficients(proxy, (best_of_n_kl(2),)).values()
    assert two < tilted_means(proxy, proxy, coefficient).mean()


def test_the_tilt_stands_among_the_points():
    generator = np.random.default_rng(2)
    texts, proxy, gold = [["a"] * 16] * 40, generator.normal(size=(40, 16)), generator.normal(size=(40, 16))
    proxy[3] = NAN
    start = Scored(given_answers(texts), {"proxy": proxy, "gold": gold + proxy})
    prompts = [PromptRecord(prompt=str(place)) for place in range(40)]
    options = CompareOptions(resamples=30, length_control=False)
    found = compare_policies(start, {}, prompts, proxy="proxy", gold="gold", options=options)
    points = [point for point in found.points if point.run == TILT]
    assert [point.kl.value for point in points] == pytest.approx([0.1, 0.25, 0.5, 0.75, 1.0], rel=1e-6)
    gains = [point.gains["gold"].value for point in points]
    assert 0 < gains[0] < gains[1] < gains[2]
    first = next(point for point in found.points if point.run == BEST_OF_N)
    assert points[0].values["gold"].value - gains[0] == pytest.approx(first.values["gold"].value)
    assert points[0].label.startswith("β = ")
    assert not [run for run, _ in found.fits if run == TILT]

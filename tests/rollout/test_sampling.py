"""Filters against transformers' processors, draws against their probabilities, streams by name."""

import itertools
import math

import pytest
import torch
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from plaudit.configs.generation import SamplingConfig
from plaudit.rollout.sampling import draw, filter_logits, invert, row_uniforms


def peer(logits: torch.Tensor, top_k: int | None, top_p: float | None, min_p: float | None) -> torch.Tensor:
    for value, warper in ((top_k, TopKLogitsWarper), (top_p, TopPLogitsWarper), (min_p, MinPLogitsWarper)):
        if value is not None:
            logits = warper(value)(None, logits)
    return logits


@pytest.mark.parametrize("vocabulary", [50, 3000])
def test_filters_equal_transformers(vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for scale in (0.5, 3.0, 8.0):
        logits = torch.randn(8, vocabulary, generator=generator) * scale
        choices = itertools.product((None, 1, 5, 2000), (None, 0.1, 0.5, 0.9, 0.99), (None, 0.01, 0.3, 1.0))
        for top_k, top_p, min_p in choices:
            found = filter_logits(logits, top_k=top_k, top_p=top_p, min_p=min_p).softmax(-1)
            # Where a cumulative sum is rounded may decide over one token at the border.
            torch.testing.assert_close(found, peer(logits, top_k, top_p, min_p).softmax(-1), atol=1e-6, rtol=0)


def test_ties_at_the_border_of_top_k_stay() -> None:
    logits = torch.tensor([[1.0, 3.0, 1.0, 0.0]])
    assert filter_logits(logits, top_k=2).isfinite().tolist() == [[True, True, True, False]]


def test_draws_follow_the_probabilities() -> None:
    logits = torch.tensor([0.0, 2.0, -1.0, 1.0, -math.inf])
    config = SamplingConfig(temperature=0.8)
    count = 20_000
    # Evenly spaced numbers: shares are exact to one part in `count`.
    uniforms = (torch.arange(count) + 0.5) / count
    found = draw(logits.expand(count, -1), uniforms, config)
    wanted = (logits / 0.8).softmax(-1)
    shares = torch.bincount(found.tokens, minlength=5) / count
    torch.testing.assert_close(shares, wanted, atol=2 / count, rtol=0)
    torch.testing.assert_close(found.logprobs, wanted.log()[found.tokens], atol=1e-5, rtol=0)


@pytest.mark.parametrize("uniform", [0.0, 1.0 - 2**-24])
def test_the_ends_of_the_interval_give_possible_tokens(uniform: float) -> None:
    logits = torch.full((3, 1000), -math.inf)
    logits[:, 500] = 1.0
    logits[1, 501] = -2.0
    tokens = draw(logits, torch.full((3,), uniform), SamplingConfig()).tokens
    assert set(tokens.tolist()) <= {500, 501}


@pytest.mark.parametrize("vocabulary", [1, 5, 64, 65, 200, 4096])
def test_the_two_levels_find_the_token_of_one_running_sum(vocabulary: int) -> None:
    """The reference sums in float64, one token after the other; only numbers next to a border may fall elsewhere."""
    generator = torch.Generator().manual_seed(vocabulary)
    weights = torch.rand(50, vocabulary, generator=generator) * (torch.rand(50, vocabulary, generator=generator) < 0.6)
    weights[:, vocabulary // 2] += 0.1
    weights[0] = 0.0
    weights[0, -1] = 3.0
    numbers = torch.rand(50, generator=generator)
    numbers[1:3] = torch.tensor([0.0, 1.0 - 2**-24])
    found = invert(weights, numbers)
    assert bool((weights.gather(1, found[:, None]) > 0).all())
    assert int(found[0]) == vocabulary - 1
    for row in range(50):
        sums = weights[row].double().cumsum(0)
        wanted = float(numbers[row]) * float(sums[-1])
        place = int(found[row])
        before = float(sums[place - 1]) if place else 0.0
        assert before - 1e-5 * float(sums[-1]) <= wanted <= float(sums[place]) + 1e-5 * float(sums[-1])


def test_what_is_recorded_under_filters() -> None:
    logits = torch.randn(64, 40, generator=torch.Generator().manual_seed(0))
    uniforms = torch.rand(64, generator=torch.Generator().manual_seed(1))
    config = SamplingConfig(temperature=1.5, top_k=5, top_p=0.8)
    found = draw(logits, uniforms, config)
    rows = torch.arange(64)
    warm = logits / 1.5
    torch.testing.assert_close(found.logprobs, warm.log_softmax(-1)[rows, found.tokens])
    kept = peer(warm, 5, 0.8, None).log_softmax(-1)
    torch.testing.assert_close(found.behaviour_logprobs, kept[rows, found.tokens])
    assert bool((found.behaviour_logprobs > found.logprobs).any())


def test_greedy() -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0]])
    found = draw(logits, torch.zeros(1), SamplingConfig(method="greedy"))
    assert found.tokens.tolist() == [1]
    assert found.behaviour_logprobs.tolist() == [0.0]
    assert found.logprobs.item() == pytest.approx(logits.log_softmax(-1)[0, 1].item())


@pytest.mark.parametrize("method", ["sample", "greedy"])
def test_a_broken_model_is_noticed(method: str) -> None:
    logits = torch.tensor([[0.0, math.nan]])
    with pytest.raises(ValueError, match="not finite"):
        draw(logits, torch.full((1,), 0.5), SamplingConfig(method=method))


def test_streams_belong_to_names() -> None:
    first = row_uniforms(3, [(0, 0), (0, 1), (4, 1)], 5)
    assert torch.equal(row_uniforms(3, [(4, 1)], 9)[0, :5], first[2])
    assert len(set(first.flatten().tolist())) == 15
    assert not torch.equal(row_uniforms(4, [(0, 0)], 5)[0], first[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "greedy", "top_k": 3}, "top_k"),
        ({"method": "beam"}, "num_beams"),
        ({"num_beams": 4}, "num_beams"),
        ({"method": "beam", "num_beams": 2, "stop_strings": ("a",)}, "stop_strings"),
        ({"method": "beam", "num_beams": 2, "temperature": 0.5}, "temperature"),
        ({"stop_strings": ("",)}, "empty string"),
        ({"temperature": 0.0}, "temperature"),
    ],
)
def test_combinations_without_meaning(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**settings)  # type: ignore[arg-type]

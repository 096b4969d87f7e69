"""Aggregations by hand, and against slow loops over single completions."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from plaudit.core.layout import PackedBatch
from plaudit.models.aggregation import (
    AttentionPool,
    PositionWeighted,
    SmallTransformer,
    build_aggregation,
    sinusoids,
    span_softmax,
    token_spans,
)
from tests.models.conftest import random_batch

NAMES = ("last", "mean", "sum", "weighted_sum", "discounted_sum", "attention", "transformer")
SHAPES = [(3, [2, 5, 1]), (1, [4]), (6, [1, 1])]


def read_states(states: Tensor, batch: PackedBatch, completion: int, over: str) -> Tensor:
    """`[T, H]` of one completion, cut out by hand."""
    layout = batch.layout
    own = states[layout.completion_starts[completion] : layout.completion_ends[completion]]
    if over == "completion":
        return own
    return torch.cat((states[layout.prefix_starts[completion] : layout.prefix_ends[completion]], own))


def slow_weighted(module: nn.Module, read: Tensor) -> Tensor:
    assert isinstance(module, PositionWeighted)
    knots, total = module.curve.shape[0], torch.zeros(read.shape[1])
    for step in range(read.shape[0]):
        place = (step + 0.5) / read.shape[0] * (knots - 1)
        left = min(math.floor(place), knots - 2)
        weight = module.curve[left] * (left + 1 - place) + module.curve[left + 1] * (place - left)
        total = total + weight * read[step] / read.shape[0]
    return total


def slow_attention(module: nn.Module, read: Tensor) -> Tensor:
    assert isinstance(module, AttentionPool)
    weights = torch.softmax(read @ module.query / math.sqrt(read.shape[1]), 0)
    return weights @ read


def slow_transformer(module: nn.Module, read: Tensor) -> Tensor:
    assert isinstance(module, SmallTransformer)
    rows = module.project(read) + sinusoids(torch.arange(read.shape[0]), module.output_size)
    row = torch.cat((module.summary[None], rows))[None]
    result: Tensor = module.norm(module.layer(row)[0, 0])
    return result


SLOW: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "last": lambda _, read: read[-1],
    "mean": lambda _, read: read.mean(0),
    "sum": lambda _, read: read.sum(0),
    "weighted_sum": slow_weighted,
    "discounted_sum": lambda _, read: sum((0.9**t * read[t] for t in range(len(read))), torch.zeros(read.shape[1])),
    "attention": slow_attention,
    "transformer": slow_transformer,
}


@pytest.mark.parametrize("over", ["completion", "text"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("causal", [True, False])
def test_values_and_gradients_equal_a_loop_over_completions(name: str, over: str, causal: bool) -> None:
    batch = random_batch(SHAPES, causal=causal)
    torch.manual_seed(0)
    module = build_aggregation(name, 16, over=over, discount=0.9).train()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    states = torch.randn(batch.layout.num_tokens, 16, requires_grad=True)
    fast = module(states, batch.layout)
    count = batch.layout.num_completions
    slow = torch.stack([SLOW[name](module, read_states(states, batch, c, over)) for c in range(count)])
    assert fast.shape == (count, module.output_size)
    assert torch.allclose(fast, slow, atol=1e-5)
    mix = torch.randn(fast.shape)
    wanted = [states, *module.parameters()]
    ours = torch.autograd.grad((fast * mix).sum(), wanted)
    theirs = torch.autograd.grad((slow * mix).sum(), wanted)
    for mine, reference in zip(ours, theirs, strict=True):
        assert torch.allclose(mine, reference, atol=1e-5)


def test_by_hand() -> None:
    # A prompt of 2 tokens with states 1, 2; completions with states (3, 5) and (10).
    batch = random_batch([(2, [2, 1])])
    states = torch.tensor([[1.0], [2.0], [3.0], [5.0], [10.0]])

    def values(name: str, over: str = "completion") -> list[float]:
        result: list[float] = build_aggregation(name, 1, over=over, discount=0.5)(states, batch.layout)[:, 0].tolist()
        return result

    assert values("last") == [5.0, 10.0]
    assert values("mean") == [4.0, 10.0]
    assert values("sum") == [8.0, 10.0]
    assert values("discounted_sum") == [5.5, 10.0]
    assert values("weighted_sum") == pytest.approx([4.0, 10.0])
    assert values("attention") == pytest.approx([4.0, 10.0])
    assert values("mean", "text") == pytest.approx([11 / 4, 13 / 3])
    assert values("sum", "text") == [11.0, 13.0]
    assert values("discounted_sum", "text") == pytest.approx([1 + 1 + 0.75 + 0.625, 1 + 1 + 2.5])


@pytest.mark.parametrize("name", NAMES)
def test_states_of_other_tokens_do_not_matter(name: str) -> None:
    batch = random_batch(SHAPES)
    module = build_aggregation(name, 16).eval()
    states = torch.randn(batch.layout.num_tokens, 16, requires_grad=True)
    # Not the plain sum: that of a normalised layer's outputs is the same whatever comes in.
    found = module(states, batch.layout)[1]
    (found * torch.randn_like(found)).sum().backward()
    assert states.grad is not None
    touched = states.grad.abs().sum(-1) > 0
    layout = batch.layout
    inside = torch.zeros_like(touched)
    inside[layout.completion_starts[1] : layout.completion_ends[1]] = True
    assert not (touched & ~inside).any()
    assert touched.sum() == (1 if name == "last" else 5)


def test_spans_and_softmax_at_extremes() -> None:
    batch = random_batch([(2, [2, 1])])
    spans = token_spans(batch.layout, "text")
    assert spans.places.tolist() == [0, 1, 2, 3, 0, 1, 4]
    assert spans.owner.tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert spans.step.tolist() == [0, 1, 2, 3, 0, 1, 2]
    weights = span_softmax(torch.tensor([1e4, -1e4, 0.0, 1e4, -1e4, -1e4, -1e4]), spans)
    assert torch.allclose(weights, torch.tensor([0.5, 0, 0, 0.5, 1 / 3, 1 / 3, 1 / 3]))


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown aggregation 'max'; known: last, mean"):
        build_aggregation("max", 8)
    with pytest.raises(ValueError, match="aggregate_over is 'prompt'"):
        token_spans(random_batch([(1, [1])]).layout, "prompt")

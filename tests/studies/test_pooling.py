"""Learned aggregations on kept token states must be those of the library."""

import math

import pytest
import torch
from frozen import Fit
from pooling import KNOTS, Answers, fit_pooling, loss_of_table, pooled_scores, table_of
from reward_why import NUMBERS, number_table, numbers_of

from plaudit.configs.model import RewardModelConfig
from plaudit.configs.reward import RewardTrainingConfig
from plaudit.data.records import Comparison, Ranking
from plaudit.models.aggregation import AttentionPool, PositionWeighted
from plaudit.training.objectives import PreferenceObjective
from tests.models.conftest import random_batch

SIZE, SHAPES = 8, [(3, [2, 5, 1]), (1, [4]), (6, [1, 9])]
CONFIG = RewardTrainingConfig(model=RewardModelConfig(backbone="unused"), loss="pairwise")


@pytest.mark.parametrize("name", ["attention", "weighted_sum"])
def test_scores_are_those_of_the_librarys_aggregation(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    layout = random_batch(SHAPES).layout
    states, weight = torch.randn(layout.num_tokens, SIZE, generator=generator), torch.randn(SIZE, generator=generator)
    extra = torch.randn(SIZE if name == "attention" else KNOTS, generator=generator)
    spans = zip(layout.completion_starts, layout.completion_ends, strict=True)
    flat = [states[start:end] for start, end in spans]
    answers = Answers.of([flat[:3], flat[3:4], flat[4:]])
    module = AttentionPool(SIZE, "completion") if name == "attention" else PositionWeighted(SIZE, "completion")
    with torch.no_grad():
        next(module.parameters()).copy_(extra)
        expected = module(states, layout) @ weight
    found = pooled_scores(answers, name, weight, extra)
    assert torch.allclose(found, expected, atol=1e-5)
    table = table_of(found, answers.counts, 3)
    assert torch.equal(table[0], found[:3])
    assert table[1].tolist() == [found[3].item(), 0, 0]


def test_attention_finds_the_token_that_decides() -> None:
    """Feature 0 of one token in twelve says who wins, feature 1 marks it; the others are noise the mean drowns in."""
    generator = torch.Generator().manual_seed(1)
    rows, records = [], []
    for row in range(60):
        row_tokens = torch.randn(2, 12, SIZE, generator=generator)
        row_tokens[..., 1] = 0
        row_tokens[:, row % 12, 1] = 4
        winner = int(row_tokens[1, row % 12, 0] > row_tokens[0, row % 12, 0])
        rows.append(list(row_tokens))
        records.append(
            Comparison(prompt=f"q{row}", completions=("a", "b"), judgement=Ranking(((winner,), (1 - winner,))))
        )
    answers, loss_at = Answers.of(rows), loss_of_table(records, PreferenceObjective(CONFIG), 2)
    start = Fit(records, torch.eye(SIZE)[0], 1e-3, torch.ones(SIZE))
    losses = []
    for ridge in (math.inf, 1e-3):
        weight, query = fit_pooling(answers, start, records, "attention", CONFIG, ridge)
        table = table_of(pooled_scores(answers, "attention", weight, query), answers.counts, 2)
        losses.append(loss_at(table).item())
        if math.isinf(ridge):
            assert torch.equal(weight, start.weight)
            assert not query.any()
    assert query.abs().argmax() == 1
    assert losses[1] < 0.3 < losses[0]


def test_numbers_of_an_answer_by_hand() -> None:
    found = numbers_of("The cat sat on 12 mats", "the cat sat and the dog 7")
    # Words: the cat sat and the dog 7; threes of which only "the cat sat" is in the prompt.
    assert found == pytest.approx([math.log(8), 4 / 7, 1 / 5, 1, 1 / 7])
    assert numbers_of("a", "") == [0, 0, 0, 0, 1]
    table = number_table([Comparison(prompt="x", completions=("x", "y z"), judgement=Ranking(((0,), (1,))))], 3)
    assert table.shape == (1, 3, len(NUMBERS))
    assert not table[0, 2].any()

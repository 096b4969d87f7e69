"""The evolution strategy: against an optimum that is known, and the same again from the same seed."""

import sys

import pytest
import torch

from plaudit.algorithms.evolution import evolve

TARGET = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, -1.0]])
SETTINGS = {"spread": 0.5, "population": 10, "generations": 120, "seed": 0}


def quadratic(candidates):
    """Best at `TARGET`, and a hundred times steeper in one direction than in the others."""
    away = (candidates - TARGET).flatten(1)
    return -(away.square().sum(1) + 99 * away[:, 0].square())


def test_it_finds_the_top_and_says_how_it_went():
    pytest.importorskip("cma")
    seen = []
    found = evolve(torch.zeros(2, 3), quadratic, **SETTINGS, report=lambda number, all_: seen.append((number, all_)))
    torch.testing.assert_close(found, TARGET, atol=1e-2, rtol=0)
    assert [number for number, _ in seen] == list(range(120))
    assert all(each.shape == (10,) for _, each in seen)
    assert seen[-1][1].mean() > seen[0][1].mean()
    assert torch.equal(found, evolve(torch.zeros(2, 3), quadratic, **SETTINGS))


def test_the_first_candidates_are_as_far_apart_as_was_asked():
    pytest.importorskip("cma")
    asked, begin = [], torch.full((2, 3), 7.0, dtype=torch.float64)

    def judge(candidates):
        asked.append(candidates)
        return candidates.sum((1, 2))

    evolve(begin, judge, spread=0.5, population=400, generations=1, seed=0)
    assert asked[0].shape == (400, 2, 3)
    torch.testing.assert_close(asked[0].mean(0), begin, atol=0.1, rtol=0)
    torch.testing.assert_close(asked[0].std(0), torch.full_like(begin, 0.5), atol=0.07, rtol=0)


def test_without_generations_nothing_moves():
    pytest.importorskip("cma")
    begin = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = evolve(begin, quadratic, spread=0.5, population=4, generations=0, seed=0)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, begin)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "cma", None)
    with pytest.raises(ValueError, match="pip install 'plaudit\\[world\\]'"):
        evolve(torch.zeros(2), quadratic, **SETTINGS)

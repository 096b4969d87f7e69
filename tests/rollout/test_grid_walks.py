"""Walks side by side are those of the environment: same moves, same lengths, each with its own goal."""

import numpy as np
import pytest

from plaudit.rollout.gridworlds import GridWalks, dyna_maze, four_rooms


def test_moves_have_the_table_s_probabilities():
    grid = four_rooms()
    walks = GridWalks(grid, 20_000, seed=1)
    cell = grid.cells().index((1, 1))
    walks.states = np.full(20_000, cell)
    arrived, _ = walks.step(np.full(20_000, 1))
    found = np.bincount(arrived, minlength=len(grid.cells())) / 20_000
    assert np.abs(found - grid.transitions()[cell, 1]).max() < 0.015


def test_random_walks_have_the_exact_length():
    """868.7 steps on average from start to goal (`Grid.expected_steps`), here over 400 walks."""
    walks, lengths = GridWalks(dyna_maze(), 400, seed=2), np.zeros(400)
    generator, over = np.random.default_rng(3), np.zeros(400, dtype=bool)
    while not over.all():
        lengths += ~over
        over |= walks.step(generator.integers(4, size=400))[1]
    assert lengths.mean() == pytest.approx(868.7, abs=4 * lengths.std() / 20)


def test_starts_are_never_the_goal_and_goals_move_by_row():
    grid = four_rooms()
    walks = GridWalks(grid, 300, seed=0)
    first, rows = walks.goals.copy(), np.arange(300) % 2 == 0
    walks.move_goals(rows)
    assert (walks.goals[~rows] == first[~rows]).all()
    allowed = {grid.cells().index(goal) for goal in grid.goals[1:]}
    assert set(walks.goals[rows].tolist()) <= allowed
    assert len(set(walks.goals[rows].tolist())) > 10
    kept = walks.states.copy()
    walks.restart(rows)
    assert (walks.states[~rows] == kept[~rows]).all()
    assert (walks.states[rows] != walks.goals[rows]).all()

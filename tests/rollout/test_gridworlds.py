import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from plaudit.rollout.corridor import KeyDoorCorridor, ReturningCorridor
from plaudit.rollout.gridworlds import Grid, GridWorld, blocking_maze, dyna_maze, four_rooms, shortcut_maze

GOAL = (0, 8)
UP, DOWN, LEFT, RIGHT = range(4)


def test_the_dyna_maze_has_the_known_answers():
    maze = dyna_maze()
    assert len(maze.cells()) == 47
    start = maze.cells().index((2, 0))
    assert maze.optimal_values(GOAL, 0.95)[start] == pytest.approx(0.95**13, abs=1e-12)
    assert maze.expected_steps(GOAL, maze.greedy_policy(GOAL, 0.95)) == pytest.approx(14)
    # A random walk, and the ε-greedy optimum, from the table of known figures.
    assert maze.expected_steps(GOAL, np.full((47, 4), 0.25)) == pytest.approx(868.7, abs=0.05)
    assert maze.expected_steps(GOAL, maze.greedy_policy(GOAL, 0.95, exploration=0.1)) == pytest.approx(15.88, abs=0.005)


def test_four_rooms_has_the_known_answers():
    grid = four_rooms()
    cells, (first, *others) = grid.cells(), grid.goals
    assert len(cells) == 104
    assert cells.index(first) == 62
    assert grid.expected_steps(first, grid.greedy_policy(first, 0.99)) == pytest.approx(8.4, abs=0.05)
    later = [grid.expected_steps(goal, grid.greedy_policy(goal, 0.99)) for goal in others]
    assert len(later) == 21
    assert np.mean(later) == pytest.approx(9.5, abs=0.05)
    np.testing.assert_allclose(grid.transitions().sum(-1), 1)


def test_changing_mazes_by_hand():
    (before, after), (old, new) = blocking_maze(), shortcut_maze()
    assert [g.expected_steps(GOAL, g.greedy_policy(GOAL, 0.95)) for g in (before, after)] == [10, 16]
    assert [g.expected_steps(GOAL, g.greedy_policy(GOAL, 0.95)) for g in (old, new)] == [16, 10]
    world = GridWorld(before, later=[(3, after)])
    world.reset(seed=0)
    assert world.observation_space.n == 54
    seen = [int(world.step(np.int64(action))[0]) for action in (RIGHT, UP, LEFT, RIGHT, RIGHT)]
    # Start (5, 3) is number 48; rows are nine wide.
    assert seen == [49, 40, 39, 40, 41]
    assert world.grid is after


def test_a_wall_that_rises_under_the_walker_sends_it_to_the_start():
    before, after = blocking_maze()
    world = GridWorld(before, later=[(7, after)])
    world.reset(seed=0)
    for action in (RIGHT, RIGHT, RIGHT, RIGHT, RIGHT, UP):
        world.step(np.int64(action))
    assert int(world.step(np.int64(UP))[0]) == 48


@pytest.mark.parametrize("make", [dyna_maze, four_rooms, lambda: blocking_maze()[0]])
def test_gymnasium_s_own_check(make):
    check_env(GridWorld(make()), skip_render_check=True)


@pytest.mark.parametrize("make", [ReturningCorridor, KeyDoorCorridor, lambda: KeyDoorCorridor(4, key_seen=False)])
def test_corridors_pass_it_too(make):
    check_env(make(), skip_render_check=True)


def test_a_corridor_that_leads_back_by_hand():
    world = ReturningCorridor(3)
    world.reset(seed=0)
    seen = [tuple(world.step(np.int64(action))[:4]) for action in (1, 1, 0, 1, 1)]
    assert [int(cell) for cell, *_ in seen] == [1, 2, 0, 1, 2]
    assert all((paid, ended) == (0, False) for _, paid, ended, _ in seen)
    assert [cut for *_, cut in seen] == [False] * 4 + [True]  # after length + 2 steps
    world.reset()
    assert [tuple(world.step(np.int64(1))[:4]) for _ in range(3)][-1] == (3, 1.0, True, False)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        ReturningCorridor(0)


def test_steps_follow_the_table():
    grid = four_rooms()
    world = GridWorld(grid)
    table = grid.transitions()
    world.reset(seed=1)
    counts = np.zeros_like(table)
    generator = np.random.default_rng(0)
    state = int(world.reset()[0])
    for _ in range(12_000):
        action = int(generator.integers(4))
        observation, reward, terminated, truncated, _ = world.step(np.int64(action))
        counts[state, action, int(observation)] += 1
        assert terminated is (grid.cells()[int(observation)] == world.goal)
        assert reward == float(terminated)
        assert not truncated
        state = int(world.reset()[0]) if terminated else int(observation)
    expected = table * counts.sum(-1, keepdims=True)
    assert (counts[table == 0] == 0).all()
    possible = table > 0
    statistic = ((counts - expected)[possible] ** 2 / np.maximum(expected[possible], 1e-9)).sum()
    freedom = (possible.sum(-1) - 1)[counts.sum(-1) > 0].sum()
    assert abs(statistic - freedom) < 5 * np.sqrt(2 * freedom)


def test_slips_by_hand():
    # A corridor of three cells: a move right from the left end slips on to one of the two neighbours of the middle.
    grid = Grid(("...",), starts=((0, 0),), goals=((0, 2),), slip=0.5)
    table = grid.transitions()
    assert table[0, RIGHT].tolist() == [0.25, 0.5, 0.25]
    assert table[0, LEFT].tolist() == table[0, UP].tolist() == [1, 0, 0]
    # From the middle, right reaches the end and slips back half of the time; but the episode is over only at the end.
    assert table[1, RIGHT].tolist() == [0, 0.5, 0.5]


def test_goals_move_among_the_grid_s_own_and_faults_are_named():
    world = GridWorld(four_rooms())
    assert world.goal == (7, 9)
    assert {world.new_goal(seed) for seed in range(200)} <= set(four_rooms().goals)
    assert world.new_goal(3) == world.new_goal(3)
    with pytest.raises(ValueError, match="not a free cell"):
        GridWorld(dyna_maze(), goal=(0, 7))
    with pytest.raises(ValueError, match="same size"):
        GridWorld(dyna_maze(), later=[(10, four_rooms())])
    with pytest.raises(ValueError, match="not a free cell"):
        dyna_maze().optimal_values((0, 7), 0.9)

"""Options where they are said to help: four rooms with a goal that moves; and as styles of a text.

python studies/hierarchy.py rooms --runs 30
python studies/hierarchy.py exact
python studies/hierarchy.py styles --seeds 0 1 2 3 4
Goals (feudal networks) are in `studies/hierarchy_goals.py`.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from plaudit.algorithms.build import build_algorithm
from plaudit.algorithms.option_critic_table import TabularOptionCritic
from plaudit.configs.algorithm import AlgorithmConfig
from plaudit.rollout.gridworlds import Grid, GridWalks, four_rooms
from plaudit.rollout.options_text import StylePolicy, marginal_table, style_policy
from plaudit.rollout.token_mdp import TokenMDP

EPISODES, MOVED_AFTER, LONGEST = 2000, 1000, 1000
SHOWN = (0, 250, 950, 1000, 1100, 1500, 1950)
"""Episodes of the table; each figure but those of 0 and 1000 is the mean of fifty episodes from there on."""


class Walker(Protocol):
    """A tabular learner over several runs."""

    def begin(self, states: Tensor, fresh: Tensor) -> None: ...
    def act(self, states: Tensor) -> Tensor: ...
    def learn(self, states: Tensor, actions: Tensor, rewards: Tensor, arrived: Tensor, reached: Tensor) -> None: ...


class Sarsa:
    """`Q(s, a) += α (r + γ Q(s', a') - Q(s, a))` with Boltzmann exploration: the paper's primitive agent."""

    def __init__(self, num_runs: int, num_states: int, num_actions: int, *, rate: float, temperature: float, seed: int):
        self.values = torch.zeros(num_runs, num_states, num_actions, dtype=torch.float64)
        self.rate, self.temperature = rate, temperature
        self._rows = torch.arange(num_runs)
        self._generator = torch.Generator().manual_seed(seed)
        self._waiting: tuple[Tensor, ...] | None = None

    def begin(self, states: Tensor, fresh: Tensor) -> None:
        """The next action decides what the last step is worth, so it is drawn here."""
        chances = torch.softmax(self.values[self._rows, states] / self.temperature, 1).cumsum(1)
        drawn = torch.rand(len(chances), 1, dtype=torch.float64, generator=self._generator)
        self._actions = (chances[:, :-1] <= drawn).sum(1)

    def act(self, states: Tensor) -> Tensor:
        return self._actions

    def learn(self, states: Tensor, actions: Tensor, rewards: Tensor, arrived: Tensor, reached: Tensor) -> None:
        self.begin(arrived, reached)
        following = self.values[self._rows, arrived, self._actions].masked_fill(reached, 0.0)
        here = (self._rows, states, actions)
        self.values[here] += self.rate * (rewards + 0.99 * following - self.values[here])


def play(learner: Walker, runs: int, seed: int, *, episodes: int = EPISODES, moved_after: int = MOVED_AFTER) -> Any:
    """Steps of every episode `[R, E]`; each run's goal moves after its own `moved_after` episodes."""
    walks = GridWalks(four_rooms(), runs, seed=seed)
    steps = np.zeros((runs, episodes), dtype=np.int64)
    done, length = np.zeros(runs, dtype=np.int64), np.zeros(runs, dtype=np.int64)
    states = torch.as_tensor(walks.states)
    learner.begin(states, torch.ones(runs, dtype=torch.bool))
    while done.min() < episodes:
        actions = learner.act(states)
        _, reached = walks.step(actions.numpy())
        arrived = torch.as_tensor(walks.states)
        learner.learn(states, actions, torch.as_tensor(reached).double(), arrived, torch.as_tensor(reached))
        length += 1
        over = reached | (length >= LONGEST)
        counted = over & (done < episodes)
        steps[counted, done[counted]] = length[counted]
        done += over
        length[over] = 0
        walks.move_goals(over & (done == moved_after))
        walks.restart(over)
        states = torch.as_tensor(walks.states)
        learner.begin(states, torch.as_tensor(over))
    return steps


def rooms_row(name: str, steps: Any) -> str:
    """The table's figures with the standard error of the mean over runs."""
    cells = []
    for first in SHOWN:
        of_run = steps[:, first : first + (1 if first in (0, MOVED_AFTER) else 50)].mean(1)
        cells.append(f"{of_run.mean():.1f} ± {of_run.std(ddof=1) / len(of_run) ** 0.5:.1f}")
    return f"| {name} | {' | '.join(cells)} |"


def rooms(runs: int, seed: int) -> None:
    """Option-critic and SARSA in the four rooms, beside the exact optimum."""
    grid = four_rooms()
    states = len(grid.cells())
    learners: dict[str, Callable[[], Walker]] = {
        "option-critic": lambda: TabularOptionCritic(runs, states, 4, seed=seed),
        "option-critic, η = 0.01": lambda: TabularOptionCritic(runs, states, 4, seed=seed, deliberation_cost=0.01),
        "SARSA": lambda: Sarsa(runs, states, 4, rate=0.5, temperature=0.01, seed=seed),
    }
    print(
        f"| steps per episode, {runs} runs | {' | '.join(map(str, SHOWN))} |\n|{'---|' * (len(SHOWN) + 1)}", flush=True
    )
    for name, make in learners.items():
        begun, learner = time.process_time(), make()
        print(rooms_row(name, play(learner, runs, seed)), flush=True)
        used = {"cpu_seconds": round(time.process_time() - begun)}
        if isinstance(learner, TabularOptionCritic):
            used["duration"] = round(float(learner.durations.median()), 1)
        print(json.dumps({"name": name} | used), flush=True)
    exact()


def exact() -> None:
    """What can be computed of the table: the optimum, and an agent that has learned nothing."""
    grid = four_rooms()
    best = [grid.expected_steps(goal, grid.greedy_policy(goal, 0.99)) for goal in grid.goals]
    walks = [steps_of_random_walk(grid, goal) for goal in grid.goals]
    print(f"optimum: {best[0]:.2f} steps before, {np.mean(best[1:]):.2f} after (mean over goals)")
    print(f"random walk, cut off at {LONGEST}: {walks[0]:.1f} steps before, {np.mean(walks[1:]):.1f} after")


def steps_of_random_walk(grid: Grid, goal: tuple[int, int]) -> float:
    """`Σ_{t < LONGEST} P(goal not reached after t steps)` of uniformly random moves, from a random start."""
    goes_on = np.array([cell != goal for cell in grid.cells()])
    moves = grid.transitions().mean(1)[np.ix_(goes_on, goes_on)]
    starts = grid.start_states(goal)
    chances, total = np.bincount(starts, minlength=len(goes_on))[goes_on] / len(starts), 0.0
    for _ in range(LONGEST):
        total, chances = total + chances.sum(), chances @ moves
    return float(total)


def learn_styles(mdp: TokenMDP, name: str, *, updates: int, rows: int, num_options: int, seed: int) -> StylePolicy:
    """A policy of styles after `updates` batches of `rows` strings, four to a prompt, the rate decayed to 0."""
    policy = style_policy(mdp, num_options=num_options, spread=0.5, seed=seed)
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, updates)
    algorithm = build_algorithm(AlgorithmConfig(name=name, kl_coefficient=mdp.coefficient), policy, optimizer)
    generator = torch.Generator().manual_seed(seed)
    groups = torch.arange(rows) // 4
    for _ in range(updates):
        batch = mdp.sample(policy, groups % mdp.num_prompts, generator=generator).with_fields(group_ids=groups)
        algorithm.update(batch, generator=generator)
        schedule.step()
    return policy


def styles(seeds: list[int], updates: int, rows: int) -> None:
    """Gap of the marginal policy to `π*`, and how its styles are used, for one and for three styles."""
    print("| reward | styles | algorithm | largest gap (all) | usage entropy | β where sentences end | CPU s a run |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for reward in ("consistent_style", "random"):
        for num_options in (1, 3):
            for name in ("rloo", "ppo"):
                gaps, usage, ends, begun = [], [], [], time.process_time()
                for seed in seeds:
                    mdp = TokenMDP(reward=reward, coefficient=0.5, seed=seed)
                    steps = updates if name == "rloo" else updates // 2
                    policy = learn_styles(mdp, name, updates=steps, rows=rows, num_options=num_options, seed=seed)
                    gaps.append(mdp.gap(marginal_table(mdp, policy)))
                    with torch.no_grad():
                        found = mdp.sample(policy, torch.zeros(4096, dtype=torch.int64))
                        shares = policy.beliefs(found)[found.mask].mean(0)
                        stops = policy.endings.sigmoid()[found.observations[found.mask]]
                        stops = stops[policy.may_end[found.observations[found.mask]]]
                    usage.append(float(torch.special.entr(shares).sum() / math.log(max(num_options, 2))))
                    ends.append(float(stops.mean()))
                seconds = (time.process_time() - begun) / len(seeds)
                each = ", ".join(f"{gap:.4f}" for gap in gaps)
                cells = [reward, num_options, name, f"{max(gaps):.4f} ({each})", f"{np.mean(usage):.2f}"]
                print(f"| {' | '.join(map(str, [*cells, f'{np.mean(ends):.2f}', f'{seconds:.1f}']))} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["rooms", "styles", "exact"])
    parser.add_argument("--runs", type=int, default=30, help="rooms: runs side by side")
    parser.add_argument("--seed", type=int, default=0, help="rooms: of all runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="styles")
    parser.add_argument("--updates", type=int, default=300, help="styles: batches; PPO takes half as many")
    parser.add_argument("--rows", type=int, default=512, help="styles: strings in a batch")
    arguments = parser.parse_args()
    if arguments.part == "exact":
        exact()
    elif arguments.part == "rooms":
        rooms(arguments.runs, arguments.seed)
    else:
        styles(arguments.seeds, arguments.updates, arguments.rows)


if __name__ == "__main__":
    main()

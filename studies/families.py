"""Every family of algorithms on the same problems, at equal true feedback and at equal compute, beside the optimum.

    python studies/families.py tune
    python studies/families.py run [--problems strings dialogue cartpole] [--agents ppo dqn …] [--seeds 0 1 2 3 4]
    python studies/families.py table

`tune` tries the settings of `GRIDS` on strings and dialogues of other seeds; the best of each agent, by its mean gap,
is what `run` takes. On CartPole every agent keeps the defaults of `plaudit gym`, which were made for it. `run` trains
each agent on each problem, one process for a pair and a table. Both add lines to `docs/studies/families.jsonl`; what
is there is not run again. `table` writes the tables and the plot of `docs/studies/families.md`.

Equal feedback: every agent gets the same number of true steps of the environment. Equal compute: every agent gets
the same processor time; how many steps that is follows from its rate in the other table, so that its schedules end
with the run.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from costs import peak_memory, processor_seconds
from pydantic import TypeAdapter

from plaudit.algorithms.agents import build_agent, task_sizes
from plaudit.configs.agents import AgentConfig
from plaudit.rollout.dialogue import DialogueMDP
from plaudit.rollout.environments import (
    Collector,
    DialogueEnvironment,
    MakeEnvironment,
    TokenMDPEnvironment,
    evaluate_policy,
    make_environments,
)
from plaudit.rollout.token_mdp import TokenMDP

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "studies" / "families.jsonl"
PAGE = ROOT / "docs" / "studies" / "families.md"
PICTURE = ROOT / "docs" / "images" / "studies" / "families.png"
TABLES = {"feedback": "equal true feedback", "compute": "equal compute"}


@dataclass(frozen=True)
class Problem:
    """A task with a known answer.

    Attributes:
        make: the environment that a seed gives.
        bounds: of a seed, the mean return of a uniformly random policy and of the best policy there is.
        steps: true steps in the table of equal feedback.
        seconds: processor time in the table of equal compute.
        episodes: that judge the trained agent.
    """

    make: Callable[[int], str | MakeEnvironment]
    bounds: Callable[[int], tuple[float, float]]
    steps: int
    seconds: float
    episodes: int


def string_bounds(seed: int) -> tuple[float, float]:
    """Exact, by enumeration."""
    mdp = TokenMDP(seed=seed)
    uniform = torch.zeros_like(mdp.reference_logprobs).log_softmax(-1)
    return float(mdp.objective(uniform, coefficient=0.0)), float(mdp.hard_solution().values.flatten()[0])


def dialogue_bounds(seed: int) -> tuple[float, float]:
    """Exact, by dynamic programming; a coefficient of 1e-9 is the hard optimum to that precision."""
    mdp = DialogueMDP(seed=seed)
    uniform = torch.zeros_like(mdp.reference_logprobs).log_softmax(-1)
    best = mdp.optimal_solution(coefficient=1e-9).values[0]
    return float(mdp.objective(uniform, coefficient=0.0)), float(best)


def cartpole_bounds(seed: int) -> tuple[float, float]:
    """A random policy keeps the pole up for 22 steps or so; 500 is the limit."""
    return 22.0, 500.0


PROBLEMS = {
    "strings": Problem(
        lambda seed: lambda: TokenMDPEnvironment(TokenMDP(seed=seed)),
        string_bounds,
        steps=5_000,
        seconds=5,
        episodes=8,
    ),
    "dialogue": Problem(
        lambda seed: lambda: DialogueEnvironment(DialogueMDP(seed=seed)),
        dialogue_bounds,
        steps=3_000,
        seconds=5,
        episodes=2000,
    ),
    "cartpole": Problem(lambda seed: "CartPole-v1", cartpole_bounds, steps=20_000, seconds=10, episodes=50),
}

AGENTS: dict[str, dict[str, Any]] = {
    "reinforce": {"name": "reinforce"},
    "actor-critic": {"name": "actor_critic"},
    "a2c": {"name": "a2c"},
    "ppo": {"name": "ppo"},
    "acer": {"name": "acer"},
    "dqn": {"name": "dqn"},
    "double dqn": {"name": "double_dqn"},
    "dyna-q": {"name": "dyna"},
    "world model": {"name": "world_model"},
    "option-critic": {"name": "option_critic"},
    "feudal": {"name": "feudal"},
}
"""Every family, with the defaults of `plaudit gym`; A3C with one worker is A2C, and with more it has no one process."""

SHORT: dict[str, dict[str, Any]] = {
    "reinforce": {"discount": 1.0, "rollout_steps": 16},
    "actor-critic": {"discount": 1.0},
    "a2c": {"discount": 1.0},
    "ppo": {"discount": 1.0},
    "acer": {"discount": 1.0, "learning_starts": 200},
    "dqn": {"discount": 1.0, "learning_starts": 200, "hidden": [64, 64]},
    "double dqn": {"discount": 1.0, "learning_starts": 200, "hidden": [64, 64]},
    "dyna-q": {"discount": 1.0},
    "world model": {"horizon": 6, "epochs": 20, "generations": 20},
    "option-critic": {"discount": 1.0},
    "feudal": {"manager_discount": 1.0, "discount": 1.0, "horizon": 2, "rollout_steps": 8},
}
"""What changes where an episode is three or four steps long, before anything is tried: nothing is discounted, the
first update comes before the last episode, and neither goals nor dreams outlast an episode. `rollout_steps` of the
feudal network was set after its first results, which were poor with 640 steps to an update."""


def grid(**options: Sequence[Any]) -> list[dict[str, Any]]:
    """Every combination of the values given."""
    return [dict(zip(options, values, strict=True)) for values in itertools.product(*options.values())]


ENTROPY = (0.01, 0.1, 0.3)
GRIDS: dict[str, list[dict[str, Any]]] = {
    "reinforce": grid(learning_rate=(3e-3, 1e-2), entropy_coefficient=ENTROPY),
    "actor-critic": grid(learning_rate=(7e-4, 3e-3), entropy_coefficient=ENTROPY),
    "a2c": grid(learning_rate=(7e-4, 3e-3), entropy_coefficient=ENTROPY),
    "ppo": grid(learning_rate=(1e-3, 3e-3), entropy_coefficient=ENTROPY),
    "acer": grid(learning_rate=(7e-4, 3e-3), entropy_coefficient=ENTROPY),
    "dqn": grid(learning_rate=(2.3e-3, 5e-4), exploration_fraction=(0.16, 0.4, 0.8)),
    "double dqn": grid(learning_rate=(2.3e-3, 5e-4), exploration_fraction=(0.16, 0.4, 0.8)),
    "dyna-q": grid(learning_rate=(0.1, 0.3), exploration=(0.1, 0.3, 0.5)),
    "world model": grid(temperature=(0.5, 1.0)),
    "option-critic": grid(learning_rate=(1e-3, 5e-3), entropy_coefficient=ENTROPY),
    "feudal": grid(learning_rate=(3e-3, 1e-2), entropy_coefficient=ENTROPY),
}
"""Six settings of each agent, the rate and what makes it explore; two of the world model, which is the dearest."""
TUNING_SEEDS = (100, 101, 102)

TABULAR = ("dyna-q",)
"""Tables, which have no place for a pole's angle."""


def train(problem: Problem, options: dict[str, Any], seed: int, steps: int) -> dict[str, float]:
    """One agent: what it earns after `steps` true steps, and what that cost."""
    begun, wall = processor_seconds(), time.perf_counter()
    config: Any = TypeAdapter(AgentConfig).validate_python(options)
    make = problem.make(seed)
    environments = make_environments(make, 1)
    sizes = task_sizes(environments)
    environments.close()
    agent = build_agent(config, sizes, total_steps=steps, seed=seed)
    collector = Collector(make_environments(make, agent.num_environments), seed=1000 * seed)
    while collector.num_steps_taken < steps:
        agent.update(collector.collect(agent.policy, agent.num_steps))
    cost = {"seconds": processor_seconds() - begun, "wall": time.perf_counter() - wall}
    collector.environments.close()
    returns = evaluate_policy(make, agent.greedy_policy(), num_episodes=problem.episodes, seed=12345 + seed)
    low, high = problem.bounds(seed)
    earned = statistics.fmean(returns)
    return {
        "return": earned,
        "gap": (high - earned) / (high - low),
        "steps": collector.num_steps_taken,
        "memory": peak_memory(),
    } | cost


def settings(name: str, agent: str) -> dict[str, Any]:
    """Options of an agent on a problem: on strings and dialogues the best of its grid."""
    if name == "cartpole":
        return AGENTS[agent]
    best = min(kept("tuning", name, agent), key=lambda one: statistics.fmean(one["gaps"]))
    return AGENTS[agent] | SHORT[agent] | best["options"]


def kept(table: str, problem: str, agent: str) -> list[dict[str, Any]]:
    """The results that there are of an agent on a problem, in one of `TABLES` or in `tuning`."""
    lines = RESULTS.read_text(encoding="utf-8").splitlines() if RESULTS.exists() else []
    wanted = {"table": table, "problem": problem, "agent": agent}
    return [row for row in map(json.loads, lines) if wanted.items() <= row.items()]


def keep(**row: Any) -> None:
    """Add a result; several processes may, since a line is written at once."""
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def tune(name: str, agent: str) -> None:
    """The gaps of every setting of an agent's grid at equal feedback."""
    tried = [one["options"] for one in kept("tuning", name, agent)]
    for options in GRIDS[agent]:
        if options in tried:
            continue
        whole = AGENTS[agent] | SHORT[agent] | options
        gaps = [train(PROBLEMS[name], whole, seed, PROBLEMS[name].steps)["gap"] for seed in TUNING_SEEDS]
        keep(table="tuning", problem=name, agent=agent, options=options, gaps=gaps)
        print(f"{name}, {agent}, {options}: {', '.join(f'{gap:.3f}' for gap in gaps)}", flush=True)


def run_one(name: str, agent: str, table: str, seeds: Sequence[int]) -> None:
    """All seeds of an agent on a problem, each kept as soon as it is there."""
    problem, options = PROBLEMS[name], settings(name, agent)
    for seed in seeds:
        if any(one["seed"] == seed for one in kept(table, name, agent)):
            continue
        steps = problem.steps
        if table == "compute":
            found = next(one for one in kept("feedback", name, agent) if one["seed"] == seed)
            steps = max(1000, round(problem.seconds * found["steps"] / found["seconds"]))
        result = train(problem, options, seed, steps)
        keep(table=table, problem=name, agent=agent, seed=seed, **result)
        print(
            f"{name}, {agent}, {table}, seed {seed}: gap {result['gap']:.3f} in {result['seconds']:.1f} s", flush=True
        )


def rows(problem: str, table: str) -> list[str]:
    """The lines of a table, smallest median gap first."""
    lines = []
    for agent in AGENTS:
        found = kept(table, problem, agent)
        if not found:
            continue
        gaps = sorted(round(100 * one["gap"], 1) + 0.0 for one in found)  # + 0.0: no "-0.0 %"
        median = {key: statistics.median(one[key] for one in found) for key in ("steps", "seconds", "wall", "memory")}
        cells = [agent, f"{statistics.median(gaps):.1f} %", f"{gaps[0]:.1f} to {gaps[-1]:.1f}", str(len(gaps))]
        cells += [f"{median['steps']:,.0f}", f"{median['seconds']:.1f}", f"{median['wall']:.1f}"]
        cells += [f"{median['memory']:.0f}"]
        lines.append((statistics.median(gaps), f"| {' | '.join(cells)} |"))
    return [line for _, line in sorted(lines)]


def write_page() -> None:
    """The tables into the page, between their marks, and the plot beside it.

    Raises:
        SystemExit: where a table would be empty; the page is left as it is.
    """
    missing = [
        f"{problem}, {table}" for problem, table in itertools.product(PROBLEMS, TABLES) if not rows(problem, table)
    ]
    if missing:
        raise SystemExit(f"no results in {RESULTS} of {'; '.join(missing)}: run them first. The page was not changed.")
    text = PAGE.read_text(encoding="utf-8")
    head = "| agent | median gap | of the seeds | seeds | true steps | processor seconds | seconds | MiB |\n|---|"
    head += "---:|" * 7
    for problem in PROBLEMS:
        for table in TABLES:
            mark, end = f"<!-- table: {problem} {table} -->", "<!-- end of table -->"
            before, _, rest = text.partition(mark)
            after = rest.partition(end)[2]
            text = f"{before}{mark}\n\n{head}\n" + "\n".join(rows(problem, table)) + f"\n\n{end}{after}"
    PAGE.write_text(text, encoding="utf-8")
    draw()


def draw() -> None:
    """Gaps of all seeds by family, problem and table."""
    figure, axes = plt.subplots(1, len(PROBLEMS), figsize=(11, 4.2), sharey=True, layout="constrained")
    places = range(len(AGENTS))
    for axis, problem in zip(axes, PROBLEMS, strict=True):
        for (table, label), shift, marker in zip(TABLES.items(), (-0.15, 0.15), ("o", "s"), strict=True):
            points = [
                (one["gap"], place + shift) for place, agent in enumerate(AGENTS) for one in kept(table, problem, agent)
            ]
            if points:
                axis.plot(*zip(*points, strict=True), marker, markersize=4, alpha=0.7, label=label)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.axvline(1, color="black", linewidth=0.8, linestyle=":")
        axis.set_title(problem)
        axis.set_xlabel("gap to the optimum (1: random)")
    axes[0].set_yticks(places, AGENTS)
    axes[0].invert_yaxis()
    axes[1].legend(loc="upper right", fontsize=8)
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("tune", "run", "one", "table"))
    parser.add_argument("--problems", nargs="+", default=list(PROBLEMS), choices=PROBLEMS)
    parser.add_argument("--agents", nargs="+", default=list(AGENTS), choices=AGENTS)
    parser.add_argument("--tables", nargs="+", default=list(TABLES), choices=TABLES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    pairs = [
        (problem, agent)
        for problem, agent in itertools.product(arguments.problems, arguments.agents)
        if not (agent in TABULAR and problem == "cartpole")
    ]
    if arguments.action == "table":
        write_page()
    elif arguments.action == "tune":
        for problem, agent in pairs:
            if problem != "cartpole":
                tune(problem, agent)
    else:
        for table, (problem, agent) in itertools.product(arguments.tables, pairs):
            if arguments.action == "one":
                run_one(problem, agent, table, arguments.seeds)
                continue
            # A process of its own, so that its memory is its own.
            words = ["one", "--problems", problem, "--agents", agent, "--tables", table, "--seeds"]
            subprocess.run([sys.executable, __file__, *words, *map(str, arguments.seeds)], check=True)


if __name__ == "__main__":
    main()

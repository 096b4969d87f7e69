"""Feudal networks beside a recurrent A2C of the same size, and without each of their parts; resumable.

python studies/hierarchy_goals.py run corridor text --seeds 0 1 2 3 4 5 6 7 8 9
python studies/hierarchy_goals.py run text --seeds 0 --variants "recurrent A2C" feudal --learning-rate 6e-3
python studies/hierarchy_goals.py table

`run` adds to `docs/studies/hierarchy-goals.jsonl`; what is there is not run again.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from control_peer import bootstrap_interval, interquartile_mean
from scipy import stats
from torch.nn.utils import clip_grad_norm_

from plaudit.algorithms.base import TaskSizes
from plaudit.algorithms.feudal import Feudal
from plaudit.configs.feudal import FeudalConfig
from plaudit.core.masked import masked_mean, masked_whiten
from plaudit.core.policy_losses import policy_gradient_loss
from plaudit.core.returns import lambda_returns
from plaudit.core.value_losses import squared_value_loss
from plaudit.models.recurrent import LSTMActorCritic
from plaudit.rollout.corridor import KeyDoorCorridor, LastTokenEnvironment
from plaudit.rollout.environments import Collector, make_environments
from plaudit.rollout.recurrent import RecurrentPolicy
from plaudit.rollout.token_mdp import TokenMDP
from plaudit.rollout.trajectory import Trajectory, evaluation_of

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "studies" / "hierarchy-goals.jsonl"
VARIANTS: dict[str, dict[str, Any] | None] = {
    "recurrent A2C": None,
    "feudal": {},
    "α = 0": {"intrinsic_weight": 0.0},
    "c = 1": {"horizon": 1},
    "no dilation": {"dilation": 1},
}
TASKS: dict[str, dict[str, Any]] = {
    "corridor": {"sizes": TaskSizes(40, 2), "steps": 150_000, "config": {"horizon": 10}},
    "text": {"sizes": TaskSizes(9, 5), "steps": 150_000, "config": {"horizon": 3}},
}
SHARED: dict[str, Any] = {
    "num_environments": 32,
    "rollout_steps": 20,
    "intrinsic_weight": 0.01,
    "entropy_coefficient": 0.001,
    "whiten_advantages": False,
    "learning_rate": 3e-3,
    "discount": 0.99,
    "manager_discount": 0.99,
}
"""The same for all; the discount of A2C is that of both levels."""


class RecurrentA2C:
    """Advantage actor-critic over one LSTM, with returns, whitening, optimizer and schedule as `Feudal` has them."""

    def __init__(self, config: FeudalConfig, sizes: TaskSizes, *, total_steps: int, seed: int) -> None:
        self.config, self.num_environments, self.num_steps = config, config.num_environments, config.rollout_steps
        wanted = sum(p.numel() for p in Feudal(config, sizes, total_steps=1).network.parameters())
        networks = [LSTMActorCritic(*sizes, hidden_size=size, seed=seed) for size in range(24, 56, 2)]
        self.network = min(networks, key=lambda network: abs(sum(p.numel() for p in network.parameters()) - wanted))
        self.policy = RecurrentPolicy(self.network)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=config.learning_rate, eps=1e-5)
        self.total_updates = max(total_steps // (self.num_environments * self.num_steps), 1)
        self.num_updates = 0

    def update(self, trajectory: Trajectory) -> dict[str, float]:
        config, mask = self.config, trajectory.mask
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate * max(1 - self.num_updates / self.total_updates, 0.0)
        self.num_updates += 1
        outputs, following = self.policy.unroll(trajectory)
        returns = lambda_returns(
            trajectory.rewards,
            following.values,
            trajectory.continues,
            trajectory.truncated,
            mask,
            discount=config.discount,
            return_lambda=config.gae_lambda,
        )
        evaluation = evaluation_of(torch.log_softmax(outputs.logits, -1), trajectory.actions, outputs.values)
        advantages = returns - evaluation.values.detach()
        if config.whiten_advantages:
            advantages = masked_whiten(advantages, mask)
        loss, _ = policy_gradient_loss(evaluation.logprobs, advantages, mask, reduction="per_token")
        value_loss, _ = squared_value_loss(evaluation.values, returns, mask)
        entropy = masked_mean(evaluation.entropy, mask)
        self.optimizer.zero_grad(set_to_none=True)
        (loss + config.value_coefficient * value_loss - config.entropy_coefficient * entropy).backward()
        clip_grad_norm_(self.network.parameters(), config.max_gradient_norm or float("inf"))
        self.optimizer.step()
        return {"policy/entropy": float(entropy.detach())}


def environment(task: str) -> Any:
    """A function that makes one: the corridor of 20 cells, or text of up to four words with a key for each prompt."""
    if task == "corridor":
        return lambda: KeyDoorCorridor(20, max_steps=200)
    mdp = TokenMDP(vocabulary=5, max_length=4, num_prompts=4, reward="key_and_door")
    return lambda: LastTokenEnvironment(mdp)


def run(
    task: str, variant: str, seed: int, *, steps: int | None = None, verbose: bool = False, **options: Any
) -> dict[str, Any]:
    """Train one agent; the share of episodes that succeed and their length over the run, and at its end."""
    chosen, changes = TASKS[task], VARIANTS[variant]
    config = FeudalConfig(**(SHARED | chosen["config"] | (changes or {}) | options))
    total = steps or chosen["steps"]
    make = RecurrentA2C if changes is None else Feudal
    agent = make(config, chosen["sizes"], total_steps=total, seed=seed)
    collector = Collector(make_environments(environment(task), agent.num_environments), seed=1000 * seed)
    begun = time.process_time()
    curve, known = [], 0
    for update in range(agent.total_updates):
        metrics = agent.update(collector.collect(agent.policy, agent.num_steps))
        if (update + 1) % max(agent.total_updates // 10, 1) == 0:
            recent = collector.episode_returns[known:]
            curve.append(round(float(np.mean(recent)), 3) if recent else 0.0)
            known = len(collector.episode_returns)
            if verbose:
                length = float(np.mean(collector.episode_lengths[-100:]))
                print(task, variant, seed, curve[-1], length, {k: round(v, 3) for k, v in metrics.items()}, flush=True)
    collector.environments.close()
    return {
        "task": task,
        "variant": variant,
        "seed": seed,
        "learning_rate": config.learning_rate,
        "curve": curve,
        "success": curve[-1],
        "length": round(float(np.mean(collector.episode_lengths[-100:])), 1),
        "parameters": sum(p.numel() for p in agent.network.parameters()),
        "cpu_seconds": round(time.process_time() - begun, 1),
    }


def table(rows: list[dict[str, Any]]) -> None:
    """Interquartile mean of the success in the last tenth with its interval, all seeds, and the mean over the run."""
    columns = (
        *("task", "variant", "seeds", "success, last tenth: interquartile mean", "95 % interval", "all", "above 0.9"),
        *("mean over the run", "paired with feudal", "parameters", "CPU s"),
    )
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    rates = sorted({row["learning_rate"] for row in rows})
    for task, rate in ((task, rate) for task in TASKS for rate in rates):
        mine = [row for row in rows if (row["task"], row["learning_rate"]) == (task, rate)]
        whole = {row["seed"]: float(np.mean(row["curve"])) for row in mine if row["variant"] == "feudal"}
        for variant in VARIANTS:
            chosen = [row for row in mine if row["variant"] == variant]
            if not chosen:
                continue
            ends = sorted(row["success"] for row in chosen)
            low, high = bootstrap_interval(ends)
            over = np.mean([np.mean(row["curve"]) for row in chosen])
            cells = [
                task,
                variant if rate == SHARED["learning_rate"] else f"{variant}, rate {rate:g}",
                len(ends),
                f"{float(interquartile_mean(ends)):.2f}",
                f"{low:.2f} to {high:.2f}",
                ", ".join(f"{end:.2f}" for end in ends),
                f"{sum(end > 0.9 for end in ends)} of {len(ends)}",
                f"{over:.2f}",
                paired([np.mean(row["curve"]) - whole[row["seed"]] for row in chosen if row["seed"] in whole]),
                chosen[0]["parameters"],
                f"{np.mean([row['cpu_seconds'] for row in chosen]):.0f}",
            ]
            print(f"| {' | '.join(map(str, cells))} |")


def paired(differences: list[float]) -> str:
    """Mean difference of the mean over the run and half a 95 % interval by Student's t."""
    if len(differences) < 2 or not any(differences):
        return ""
    half = stats.t.ppf(0.975, len(differences) - 1) * np.std(differences, ddof=1) / len(differences) ** 0.5
    return f"{np.mean(differences):+.2f} ± {half:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["run", "table"])
    parser.add_argument("tasks", nargs="*", default=list(TASKS))
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--learning-rate", type=float, default=SHARED["learning_rate"])
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = [json.loads(line) for line in arguments.output.read_text().splitlines()] if arguments.output.exists() else []
    if arguments.action == "table":
        table(rows)
        return
    rate = arguments.learning_rate
    done = {(row["task"], row["variant"], row["seed"], row["learning_rate"]) for row in rows}
    for seed in arguments.seeds:
        for task in arguments.tasks:
            for variant in arguments.variants:
                if (task, variant, seed, rate) not in done:
                    row = run(task, variant, seed, learning_rate=rate)
                    print(json.dumps(row, ensure_ascii=False), flush=True)
                    with arguments.output.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(row, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()

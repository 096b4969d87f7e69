"""ACER: CartPole-v1 beside the published figure, and strings needed on `TokenMDP` beside PPO.

python -m studies.acer cartpole --seeds 0 1 2 --output acer-cartpole.jsonl
python -m studies.acer strings --seeds 0 1 2 3 4
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from plaudit.algorithms.acer_agent import AcerAgent
from plaudit.algorithms.acer_text import AcerText
from plaudit.algorithms.base import TaskSizes
from plaudit.configs.acer import AcerConfig, AcerTextConfig
from plaudit.rollout.action_values import TabularActionValues
from plaudit.rollout.environments import Collector, evaluate_policy, make_environments
from plaudit.rollout.token_mdp import TokenMDP
from studies.algorithms import learn

ENVIRONMENT = "CartPole-v1"


def cartpole(seed: int, total: int, episodes: int) -> dict[str, Any]:
    """One agent with the published settings: its greedy returns, and those of its last 100 episodes of learning."""
    begun = time.process_time()
    config = AcerConfig()
    agent = AcerAgent(config, TaskSizes(4, 2), total_steps=total, seed=seed)
    environments = make_environments(ENVIRONMENT, config.num_environments, disable_env_checker=True)
    collector = Collector(environments, seed=1000 * seed)
    while collector.num_steps_taken < total:
        agent.update(collector.collect(agent.policy, agent.num_steps))
    environments.close()
    spent = time.process_time() - begun
    found = {"seed": seed, "steps": collector.num_steps_taken, "cpu_seconds": round(spent)}
    for name, policy in (("greedy", agent.greedy_policy()), ("sampled", agent.policy)):
        returns = evaluate_policy(ENVIRONMENT, policy, num_episodes=episodes, seed=12345 + seed)
        found |= {name: sum(returns) / len(returns), f"{name}_deviation": round(torch.tensor(returns).std().item(), 1)}
    return found


ROUTES: dict[str, dict[str, Any]] = {
    "acer, 4 replays": {"name": "acer"},
    "acer, 4 replays, no trust region": {"name": "acer", "trust_region": None},
    "acer, no replay": {"name": "acer", "replay_ratio": 0.0},
    "acer, 4 replays, 2 of 5 tokens kept": {"name": "acer", "behaviour_tokens": 2},
    "ppo, 4 epochs": {"name": "ppo"},
    "ppo, 16 epochs": {"name": "ppo", "epochs": 16},
    "rloo": {"name": "rloo"},
}
"""What is compared by the strings that it has to sample; each batch has 64."""
ROWS = 64


def learn_by_replay(mdp: TokenMDP, options: dict[str, Any], *, updates: int, seed: int, rate: float = 0.1) -> float:
    """The gap after `updates` batches of fresh strings, the rate decayed to 0."""
    policy = TabularActionValues(mdp.policy(), mdp.reference_logprobs.flatten(0, 1))
    optimizer = torch.optim.Adam([policy.policy.logits, policy.action_values], lr=rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, updates)
    algorithm = AcerText(AcerTextConfig(**{"kl_coefficient": mdp.coefficient} | options), policy, optimizer, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.arange(ROWS) % mdp.num_prompts
    for _ in range(updates):
        algorithm.update(mdp.sample(policy, prompts, generator=generator))
        schedule.step()
    return mdp.gap(mdp.logprob_table(policy).detach())


def strings(seeds: list[int], budgets: list[int]) -> None:
    """Gaps to the exact optimum by strings sampled, one line for each route and budget."""
    print("| algorithm | strings | mean gap | gaps of the seeds | CPU seconds a run |")
    print("|---|---|---|---|---|", flush=True)
    for route, options in ROUTES.items():
        for budget in budgets:
            gaps, begun = [], time.process_time()
            for seed in seeds:
                mdp = TokenMDP(seed=seed)
                if options["name"] == "acer":
                    gaps.append(learn_by_replay(mdp, options, updates=budget // ROWS, seed=seed))
                else:
                    table = learn(mdp, options, updates=budget // ROWS, rows=ROWS, seed=seed)
                    gaps.append(mdp.gap(table))
            seconds = (time.process_time() - begun) / len(seeds)
            each = ", ".join(f"{gap:.3f}" for gap in gaps)
            print(f"| {route} | {budget:,} | {sum(gaps) / len(gaps):.3f} | {each} | {seconds:.1f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["cartpole", "strings"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--total", type=int, default=500_000, help="environment steps")
    parser.add_argument("--budgets", type=int, nargs="+", default=[1024, 4096, 16384], help="strings of a run")
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument(
        "--output", type=Path, help="lines are added to this file; seeds that it holds are not run again"
    )
    arguments = parser.parse_args()
    if arguments.what == "strings":
        strings(arguments.seeds, arguments.budgets)
        return
    lines = arguments.output.read_text().splitlines() if arguments.output and arguments.output.exists() else []
    done = {json.loads(line)["seed"] for line in lines}
    for seed in arguments.seeds:
        if seed in done:
            continue
        line = json.dumps(cartpole(seed, arguments.total, arguments.episodes))
        print(line, flush=True)
        if arguments.output:
            with arguments.output.open("a") as file:
                file.write(line + "\n")


if __name__ == "__main__":
    main()

"""Every algorithm for text on `TokenMDP`, five seeds: how far from the exact optimum it ends.

python studies/algorithms.py
python studies/algorithms.py --only ppo rloo --seeds 0 1 --updates 1500
"""

import argparse
import time
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor

from plaudit.algorithms.build import build_algorithm
from plaudit.configs.agents import AlignAlgorithm
from plaudit.rollout.token_mdp import TokenMDP

ROUTES: dict[str, dict[str, Any]] = {
    "reinforce, no baseline": {"name": "reinforce", "baseline": "none"},
    "reinforce, running mean": {"name": "reinforce"},
    "reinforce, prompt mean": {"name": "reinforce", "baseline": "prompt_mean"},
    "reinforce, greedy answer (ReMax)": {"name": "reinforce", "baseline": "greedy", "view": "answer"},
    "reinforce, learned value": {"name": "reinforce", "baseline": "value", "gae_lambda": 1.0},
    "reinforce, learned value of the prompt": {"name": "reinforce", "baseline": "value", "view": "answer"},
    "rloo": {"name": "rloo"},
    "grpo, penalty in the reward": {"name": "grpo", "kl_placement": "reward"},
    "grpo, unbiased": {
        "name": "grpo",
        "baseline": "prompt_mean",
        "reduction": "sequence_sum",
        "kl_placement": "reward",
    },
    "reinforce++": {"name": "reinforce_pp"},
    "actor-critic": {"name": "actor_critic"},
    "a2c": {"name": "a2c"},
    "a2c, two steps": {"name": "a2c", "num_steps": 2},
    "ppo, clip": {"name": "ppo"},
    "ppo, clip, minibatches, early stop": {"name": "ppo", "minibatches": 2, "target_kl": 0.02},
    "ppo, penalty": {"name": "ppo", "surrogate": "kl"},
    "ppo, both": {"name": "ppo", "surrogate": "both", "old_kl_target": 0.01},
    "dqn, one step": {"name": "dqn", "target_lambda": 0.0},
    "dqn": {"name": "dqn"},
    "dpo, pairs labelled by the reward": {"name": "dpo"},
}
"""Options whose optimum is `π* ∝ π_ref exp(r/β)`."""


def number_of_updates(options: dict[str, Any], steps: int) -> int:
    """Half as many batches for PPO, which takes four steps on each, and for soft Q-learning, which takes two."""
    return steps // 2 if options["name"] in ("ppo", "dqn") else steps


def greedy_returns(mdp: TokenMDP, logits: Tensor, discount: float = 1.0) -> Tensor:
    """`[P]`: the discounted reward of the answer that takes the likeliest token everywhere."""
    best = logits.detach().argmax(-1).view(mdp.num_prompts, -1)
    found = []
    for prompt in range(mdp.num_prompts):
        prefix, total, factor = 0, 0.0, 1.0
        while prefix >= 0:
            token = int(best[prompt, prefix])
            total += factor * float(mdp.rewards[prompt, prefix, token])
            prefix, factor = int(mdp.next_prefix[prefix, token]), factor * discount
        found.append(total)
    return torch.tensor(found, dtype=torch.float64)


def learn(
    mdp: TokenMDP,
    options: dict[str, Any],
    *,
    updates: int,
    rows: int = 1024,
    samples: int = 4,
    rate: float = 0.1,
    seed: int = 0,
) -> Tensor:
    """The table of log-probabilities after `updates` batches of `rows` sampled strings, the rate decayed to 0."""
    policy = mdp.policy()
    optimizer = torch.optim.Adam(policy.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, updates)
    penalty = {} if options.get("kl_placement") == "none" else {"kl_coefficient": mdp.coefficient}
    config: Any = TypeAdapter(AlignAlgorithm).validate_python({"name": "ppo"} | penalty | options)
    algorithm = build_algorithm(config, policy, optimizer, total_updates=updates)
    generator = torch.Generator().manual_seed(seed)
    groups = torch.arange(rows) // samples
    prompts = groups % mdp.num_prompts
    for _ in range(updates):
        found = mdp.sample(policy, prompts, generator=generator).with_fields(group_ids=groups)
        baselines = None
        if algorithm.needs_greedy:
            baselines = greedy_returns(mdp, policy.logits, config.discount)[prompts]
        algorithm.update(found, baselines=baselines, generator=generator)
        schedule.step()
    return mdp.logprob_table(policy).detach()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], help="routes that begin with one of these words")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--updates", type=int, default=400, help="batches; PPO takes half as many")
    parser.add_argument("--rows", type=int, default=1024, help="strings in a batch")
    arguments = parser.parse_args()
    print("| algorithm | strings | largest gap | all gaps | largest total variation | CPU seconds a run |")
    print("|---|---|---|---|---|---|", flush=True)
    for route, options in ROUTES.items():
        if not route.startswith(tuple(arguments.only)):
            continue
        updates = number_of_updates(options, arguments.updates)
        gaps, distances, begun = [], [], time.process_time()
        for seed in arguments.seeds:
            mdp = TokenMDP(seed=seed)
            table = learn(mdp, options, updates=updates, rows=arguments.rows, seed=seed)
            gaps.append(mdp.gap(table))
            distances.append(mdp.total_variation(table, mdp.optimal_solution().logprobs).item())
        seconds = (time.process_time() - begun) / len(gaps)
        each = ", ".join(f"{gap:.4f}" for gap in gaps)
        sizes = f"{updates} × {arguments.rows}"
        row = [route, sizes, f"{max(gaps):.4f}", each, f"{max(distances):.3f}", f"{seconds:.1f}"]
        print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()

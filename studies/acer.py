"""ACER: CartPole-v1 beside the published figure, and the samples it needs beside PPO, of strings and of answers.

python studies/acer.py cartpole --seeds 0 1 2 3 4
python studies/acer.py table
python studies/acer.py strings --seeds 0 1 2 3 4
python studies/acer.py kept
python studies/acer.py text --seeds 0 1 2

`cartpole` adds to `docs/studies/acer-cartpole.jsonl`, and seeds that are there are not run again; `table` shows them.
"""

import argparse
import json
import math
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from control_peer import bootstrap_interval, interquartile_mean
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from plaudit.algorithms.acer_agent import AcerAgent
from plaudit.algorithms.acer_text import AcerText
from plaudit.algorithms.base import TaskSizes
from plaudit.algorithms.build import build_algorithm
from plaudit.configs.acer import AcerConfig, AcerTextConfig
from plaudit.configs.algorithm import AlgorithmConfig
from plaudit.configs.align import AlignConfig
from plaudit.core.acer_losses import action_utilities, corrected_score_weights
from plaudit.data.records import PromptRecord
from plaudit.models.causal_lm import CausalLM
from plaudit.rollout.action_values import TabularActionValues
from plaudit.rollout.environments import Collector, evaluate_policy, make_environments
from plaudit.rollout.token_mdp import TokenMDP
from plaudit.training import align

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "studies" / "acer-cartpole.jsonl"
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
    "acer, 16 replays": {"name": "acer", "replay_ratio": 16.0},
    "acer, 4 replays, no trust region": {"name": "acer", "trust_region": None},
    "acer, no replay": {"name": "acer", "replay_ratio": 0.0},
    "acer, 4 replays, c = 1": {"name": "acer", "truncation": 1.0},
    "acer, 4 replays, c = 1, 2 of 5 tokens kept": {"name": "acer", "truncation": 1.0, "behaviour_tokens": 2},
    "ppo, 4 epochs": {"name": "ppo"},
    "ppo, 16 epochs": {"name": "ppo", "epochs": 16},
    "rloo": {"name": "rloo"},
}
"""What is compared by the strings that it has to sample; each batch has 64."""
ROWS = 64


def learn_by_replay(mdp: TokenMDP, options: dict[str, Any], *, updates: int, seed: int, rate: float) -> float:
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


def learn_by_gradient(mdp: TokenMDP, options: dict[str, Any], *, updates: int, seed: int, rate: float) -> float:
    """The same for an algorithm of the policy-gradient family, four strings to a group."""
    policy = mdp.policy()
    optimizer = torch.optim.Adam(policy.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, updates)
    algorithm = build_algorithm(AlgorithmConfig(**{"kl_coefficient": mdp.coefficient} | options), policy, optimizer)
    generator = torch.Generator().manual_seed(seed)
    groups = torch.arange(ROWS) // 4
    for _ in range(updates):
        found = mdp.sample(policy, groups % mdp.num_prompts, generator=generator).with_fields(group_ids=groups)
        algorithm.update(found, generator=generator)
        schedule.step()
    return mdp.gap(mdp.logprob_table(policy).detach())


def strings(seeds: list[int], budgets: list[int], only: list[str], rate: float) -> None:
    """Gaps to the exact optimum by strings sampled, one line for each budget and each route that is asked for."""
    print("| algorithm | strings | mean gap | gaps of the seeds | CPU seconds a run |")
    print("|---|---|---|---|---|", flush=True)
    for route, options in ROUTES.items():
        for budget in budgets if not only or route in only else []:
            gaps, begun = [], time.process_time()
            for seed in seeds:
                mdp = TokenMDP(seed=seed)
                learn = learn_by_replay if options["name"] == "acer" else learn_by_gradient
                gaps.append(learn(mdp, options, updates=budget // ROWS, seed=seed, rate=rate))
            print(row(route, budget, gaps, (time.process_time() - begun) / len(seeds)), flush=True)


def kept_bias(mdp: TokenMDP, kept: int, truncation: float) -> float:
    """How far the expected step is off where the `kept` likeliest actions of μ and the sampled one are remembered.

    `‖E g - g‖ / ‖g‖` over all states, exactly, each as often as μ comes by; μ is the reference, π half of the way to
    the optimum by log-probabilities, and the critic is right.
    """
    behaviour = mdp.reference_logprobs
    logprobs = (behaviour + 0.5 * (mdp.optimal_solution().logprobs - behaviour)).log_softmax(-1)
    found = action_utilities(
        logprobs, mdp.evaluate(logprobs).action_values, mdp.reference_logprobs, coefficient=mdp.coefficient
    )
    advantages = found.utilities - found.values.unsqueeze(-1)
    likely = torch.zeros_like(behaviour, dtype=torch.bool).scatter(-1, behaviour.topk(kept).indices, True)
    expected = torch.zeros_like(logprobs)
    for action in range(mdp.vocabulary):
        known = likely.clone()
        known[..., action] = True
        weights = corrected_score_weights(
            logprobs,
            behaviour.masked_fill(~known, math.inf),
            torch.full(logprobs.shape[:-1], action),
            advantages[..., action],
            advantages,
            truncation=truncation,
        )
        expected += behaviour[..., action].exp().unsqueeze(-1) * weights
    chances = mdp.string_logprobs(behaviour).exp()
    visits = torch.zeros_like(found.values)
    for step in range(mdp.max_length):
        rows = mdp.string_mask[:, step]
        visits.index_add_(1, mdp.string_prefixes[rows, step], chances[:, rows])
    # From weights of ∇ log π to the gradient by logits.
    wanted = logprobs.exp() * advantages
    steps = [visits.unsqueeze(-1) * (each - logprobs.exp() * each.sum(-1, keepdim=True)) for each in (expected, wanted)]
    return float((steps[0] - steps[1]).norm() / steps[1].norm())


def kept_table(seeds: list[int]) -> str:
    """Mean of `kept_bias` over problems, by how many of the five tokens are kept and by c."""
    truncations = (0.5, 1.0, 2.0, 10.0)
    lines = [f"| tokens kept | {' | '.join(f'c = {each:g}' for each in truncations)} |", "|---|---|---|---|---|"]
    for kept in range(1, 6):
        cells = []
        for truncation in truncations:
            found = [kept_bias(TokenMDP(seed=seed), kept, truncation) for seed in seeds]
            cells.append(f"{100 * sum(found) / len(found):.1f} %")
        lines.append(f"| {kept} of 5 | {' | '.join(cells)} |")
    return "\n".join(lines)


WORDS = ("the", "a", "cat", "dog", "sat", "ran", "on", "mat", "why", "is", "it", "so", "good", "bad", "very", "yes")
PROMPTS = [PromptRecord(prompt=text) for text in ("why is it", "the cat")]
COEFFICIENT = 0.5
ANSWERS = 16
"""To both prompts together in an iteration."""
TEXT_ROUTES: dict[str, dict[str, Any]] = {
    "acer, 4 replays": {"name": "acer"},
    "acer, 4 replays, 4 of 20 tokens kept": {"name": "acer", "behaviour_tokens": 4},
    "acer, no replay": {"name": "acer", "replay_ratio": 0.0},
    "ppo, 4 epochs": {"name": "ppo", "epochs": 4},
    "rloo": {"name": "rloo"},
}


def count_good(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    """+1 for every `good`, -1 for every `bad`."""
    return [float(text.split().count("good") - text.split().count("bad")) for text in completions]


def save_tokenizer(folder: str) -> None:
    """One token per word, with begin, end and pad tokens: 20 in all."""
    vocabulary = {word: index for index, word in enumerate(["<unk>", "<s>", "</s>", "<pad>", *WORDS])}
    inner = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = Whitespace()
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=inner, **names).save_pretrained(folder)


def answer_logprobs(model: CausalLM, record: PromptRecord) -> tuple[list[str], torch.Tensor]:
    """Every answer of at most two tokens, with its log-probability in float64, from plain forwards."""
    end, prompt = model.text_tokeniser().end_token_id, model.text_tokeniser().prompt(record.prompt)
    hub: Any = model.model
    with torch.no_grad():
        first = hub(input_ids=torch.tensor([prompt])).logits[0, -1].double().log_softmax(-1)
        rows = torch.tensor([[*prompt, token] for token in range(len(first))])
        second = hub(input_ids=rows).logits[:, -1].double().log_softmax(-1)
    texts, logprobs = [""], [first[end]]
    for token in range(len(first)):
        if token != end:
            texts += [model.tokenizer.decode([token, other], skip_special_tokens=True) for other in range(len(first))]
            logprobs += list(first[token] + second[token])
    return texts, torch.stack(logprobs)


def text_gap(start: CausalLM, aligned: CausalLM, record: PromptRecord) -> float:
    """`(J* - J(π)) / (J* - J(π_ref))` by listing every answer, `J* = β log Σ_y π_ref(y) exp(r(y)/β)`."""
    (texts, before), (_, after) = answer_logprobs(start, record), answer_logprobs(aligned, record)
    rewards = torch.tensor(count_good([], texts), dtype=torch.float64)
    best = COEFFICIENT * torch.logsumexp(before + rewards / COEFFICIENT, 0)
    reached = (after.exp() * (rewards - COEFFICIENT * (after - before))).sum()
    return float((best - reached) / (best - (before.exp() * rewards).sum()))


def align_once(options: dict[str, Any], tokenizer: str, *, iterations: int, seed: int, rate: float) -> float:
    """The mean gap of both prompts after a run of `plaudit align` with a Llama of one layer and 16 dimensions."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    with tempfile.TemporaryDirectory() as folder:
        config = AlignConfig.model_validate(
            {
                "model": {
                    "model_type": "llama",
                    "backbone_config": sizes | {"num_key_value_heads": 2, "max_position_embeddings": 128},
                    "tokenizer": tokenizer,
                    "template": "raw",
                },
                "output": folder,
                "prompts_per_iteration": 2,
                "samples_per_prompt": ANSWERS // 2,
                "iterations": iterations,
                "sampling": {"max_new_tokens": 2},
                "missing_end_penalty": 0.0,
                "algorithm": options | {"kl_coefficient": COEFFICIENT},
                "optimizer": {"learning_rate": rate, "schedule": "linear", "max_gradient_norm": None},
                "save_every": None,
                "evaluate_every": None,
                "seed": seed,
                "quiet": True,
            }
        )
        torch.manual_seed(seed)
        model = CausalLM.from_backbone(config.model).eval()
        start = CausalLM.from_backbone(config.model).eval()
        start.load_state_dict(model.state_dict())
        align.main(config, prompts=PROMPTS, reward=count_good, model=model)
    return sum(text_gap(start, model, record) for record in PROMPTS) / len(PROMPTS)


def text(seeds: list[int], budgets: list[int], only: list[str], rate: float) -> None:
    """Gaps to the exact optimum by answers sampled from a small language model."""
    print("| algorithm | answers | mean gap | gaps of the seeds | CPU seconds a run |")
    print("|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as tokenizer:
        save_tokenizer(tokenizer)
        for route, options in TEXT_ROUTES.items():
            for budget in budgets if not only or route in only else []:
                begun = time.process_time()
                gaps = [
                    align_once(options, tokenizer, iterations=budget // ANSWERS, seed=seed, rate=rate) for seed in seeds
                ]
                print(row(route, budget, gaps, (time.process_time() - begun) / len(seeds)), flush=True)


def row(route: str, budget: int, gaps: list[float], seconds: float) -> str:
    """A line of a table."""
    each = ", ".join(f"{gap:.3f}" for gap in gaps)
    return f"| {route} | {budget:,} | {sum(gaps) / len(gaps):.3f} | {each} | {seconds:.1f} |"


def rows() -> list[dict[str, Any]]:
    """The seeds of CartPole so far."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def table() -> str:
    """The seeds of CartPole as a Markdown table, with the interquartile mean and its bootstrap interval."""
    found = sorted(rows(), key=lambda each: each["seed"])
    lines = ["| policy | mean return of each seed | interquartile mean | 95 % interval |", "|---|---|---|---|"]
    for name, title in (("greedy", "likeliest action"), ("sampled", "sampled actions")):
        means = [each[name] for each in found]
        low, high = bootstrap_interval(means)
        shown = ", ".join(f"{mean:.1f}" for mean in means)
        lines.append(f"| {title} | {shown} | {float(interquartile_mean(means)):.1f} | {low:.1f} to {high:.1f} |")
    return "\n".join(lines)


def arguments_of() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["cartpole", "table", "strings", "kept", "text"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--total", type=int, default=500_000, help="environment steps of CartPole-v1")
    parser.add_argument("--episodes", type=int, default=100, help="of CartPole-v1 that an agent is judged by")
    parser.add_argument("--budgets", type=int, nargs="+", help="strings or answers of a run")
    parser.add_argument("--only", nargs="+", default=[], help="routes, of those of `strings` or `text`")
    parser.add_argument("--rate", type=float, help="Adam's; 0.1 for `strings`, 0.02 for `text`")
    return parser.parse_args()


def main() -> None:
    arguments = arguments_of()
    if arguments.what == "table":
        print(table())
    elif arguments.what == "kept":
        print(kept_table([0, 1, 2, 3, 4]))
    elif arguments.what == "strings":
        strings(arguments.seeds, arguments.budgets or [1024, 4096, 16384], arguments.only, arguments.rate or 0.1)
    elif arguments.what == "text":
        text(arguments.seeds, arguments.budgets or [240, 480, 960], arguments.only, arguments.rate or 0.02)
    else:
        for seed in sorted(set(arguments.seeds) - {each["seed"] for each in rows()}):
            found = cartpole(seed, arguments.total, arguments.episodes)
            with RESULTS.open("a") as file:
                file.write(json.dumps(found) + "\n")
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()

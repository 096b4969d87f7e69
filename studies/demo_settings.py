"""Why the demo's PPO fell short of best of four, and what it takes: the study behind docs/studies/demo.md.

    python studies/demo_settings.py run --seeds 10 11 12 13
    python studies/demo_settings.py read --model runs/demo/sft/model --seed 0
    python studies/demo_settings.py table

`run` makes the demo's first stages for each seed, then PPO by every setting below, and writes a line for each to
`docs/studies/demo.jsonl`; seeds 0, 1 and 2 are the demo's own and no setting is chosen on them. `read` says how much
likelier replies are under their own letter than under another.
"""

import argparse
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from plaudit.configs.demo import DemoConfig
from plaudit.configs.generation import SamplingConfig
from plaudit.data.packing import pack_groups
from plaudit.demo import pipeline
from plaudit.demo.world import World, gold_reward
from plaudit.demo.world_gold import sides
from plaudit.evaluation.best_of_n import best_of_n_means
from plaudit.evaluation.policy_answers import answer_prompts
from plaudit.models.causal_lm import CausalLM
from plaudit.models.policy import LanguagePolicy

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "studies" / "demo.jsonl"
SETTINGS: dict[str, dict[str, Any]] = {
    "rate 6e-4, β 0.1": {},
    "rate 3e-4, β 0.1": {"learning_rate": 3e-4},
    "rate 1e-3, β 0.2": {"learning_rate": 1e-3, "kl_coefficient": 0.2},
}
LETTERS, SAMPLES, BEST_OF = 64, 4, 16


def first_stages(folder: Path, seed: int, **sizes: Any) -> pipeline.DemoRun:
    """World, fine-tuned model, rankings and reward model of a seed, as the demo makes them."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "data").mkdir(parents=True)
    run = pipeline.DemoRun(DemoConfig(output=folder, seed=seed, **sizes), World(seed))
    for name in ("make_world", "fine_tune", "collect_rankings", "train_reward_model", "evaluate"):
        pipeline.STAGES[name](run)
    return run


def measure(run: pipeline.DemoRun, model: CausalLM, name: str, samples: int) -> dict[str, Any]:
    """Gold and proxy `[P, K]` of answers to held-out letters, the divergence per answer, two sides of the answers."""
    assert run.policy is not None
    assert run.reward_model is not None
    letters = run.world.prompts(LETTERS, "test")
    answers = answer_prompts(
        model,
        letters,
        samples=samples,
        sampling=SamplingConfig(max_new_tokens=run.config.max_new_tokens),
        seed=run.config.seed,
        name=name,
        reference=CausalLM.from_pretrained(str(run.policy.model_folder)),
    )
    scored = run.reward_model.model.score(letters, [list(row) for row in answers.completions])
    pairs = [(letter, text) for letter, row in zip(letters, answers.completions, strict=True) for text in row]
    return {
        "gold": np.array([gold_reward(*pair) for pair in pairs]).reshape(LETTERS, samples),
        "proxy": np.array([each.normalised.tolist() for each in scored]),
        "kl": float(answers.measures["kl_k3"].mean()),
        **{side: float(np.mean([getattr(sides(*pair), side) for pair in pairs])) for side in ("product", "topic")},
    }


def start_row(run: pipeline.DemoRun) -> dict[str, Any]:
    """The fine-tuned model: its gold, best of n by the reward model, and whether its answers fit the letter."""
    assert run.policy is not None
    assert run.report is not None
    assert run.optimum is not None
    found = measure(run, CausalLM.from_pretrained(str(run.policy.model_folder)), "start", BEST_OF)
    best = {f"best_of_{n}": float(best_of_n_means(found["proxy"], found["gold"], n).mean()) for n in (1, 4, 16)}
    accuracy = {"accuracy": run.report.models[0].metrics["accuracy"].value, "optimum": run.optimum.drawn_accuracy}
    return {"setting": "start", **accuracy, **best, "product": found["product"], "topic": found["topic"]}


def aligned_row(run: pipeline.DemoRun, setting: str) -> dict[str, Any]:
    """PPO by one setting."""
    shutil.rmtree(run.file("align"), ignore_errors=True)
    config = run.config.model_copy(update=SETTINGS[setting])
    other = pipeline.DemoRun(config, run.world, policy=run.policy, reward_model=run.reward_model)
    begun = time.process_time()
    pipeline.align_policy(other)
    seconds = time.process_time() - begun
    assert other.aligned is not None
    found = measure(run, other.aligned.model, "PPO", SAMPLES)
    error = float(found["gold"].mean(1).std(ddof=1) / LETTERS**0.5)
    numbers = {key: found[key] for key in ("kl", "product", "topic")}
    return {"setting": setting, "gold": float(found["gold"].mean()), "error": error, **numbers, "seconds": seconds}


def read(folder: str, seed: int, letters: int = 60) -> list[float]:
    """Nats per reply of the shop's held-out replies: under their own letters, and each under the next one's."""
    model = CausalLM.from_pretrained(folder).eval()
    book, tokeniser = World(seed).letter_book(letters, "test"), model.text_tokeniser()
    found = []
    for shift in (0, 1):
        prompts = [book[(place + shift) % letters].prompt for place in range(letters)]
        groups = [tokeniser.group(prompt, [each.completion]) for prompt, each in zip(prompts, book, strict=True)]
        with torch.no_grad():
            logprobs = LanguagePolicy(model).evaluate(pack_groups(groups, causal=True)).logprobs
        found.append(-float(logprobs.sum()) / letters)
    return found


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A line per seed: the start, best of n, and gold (divergence) by every setting."""
    head = ["seed", "product", "topic", "accuracy (possible)", "start", "best of 4", "best of 16", *SETTINGS]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for seed in sorted({row["seed"] for row in rows}):
        mine = {row["setting"]: row for row in rows if row["seed"] == seed}
        start = mine["start"]
        cells = [str(seed), f"{start['product']:+.2f}", f"{start['topic']:+.2f}"]
        cells += [f"{100 * start['accuracy']:.1f} ({100 * start['optimum']:.1f}) %"]
        cells += [f"{start[f'best_of_{n}']:+.2f}" for n in (1, 4, 16)]
        cells += [f"{mine[s]['gold']:+.2f} ({mine[s]['kl']:.1f})" if s in mine else "" for s in SETTINGS]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run")
    running.add_argument("--seeds", type=int, nargs="+", default=[10, 11, 12, 13])
    running.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    running.add_argument("--output", type=Path, default=ROOT / "runs" / "studies" / "demo")
    running.add_argument("--results", type=Path, default=RESULTS)
    reading = commands.add_parser("read")
    reading.add_argument("--model", required=True, help="folder of a fine-tuned decoder")
    reading.add_argument("--seed", type=int, default=0)
    commands.add_parser("table")
    given = parser.parse_args(arguments)
    if given.command == "table":
        print(table([json.loads(line) for line in RESULTS.read_text().splitlines()]))
    elif given.command == "read":
        print("own letter {:.1f} nats a reply, another's {:.1f}".format(*read(given.model, given.seed)))
    else:
        for seed in given.seeds:
            run = first_stages(given.output / str(seed), seed)
            for row in (start_row(run), *(aligned_row(run, setting) for setting in given.settings)):
                with given.results.open("a") as file:
                    file.write(json.dumps({"seed": seed, **row}) + "\n")


if __name__ == "__main__":
    main()

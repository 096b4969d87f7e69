"""Does refreshing the reward model delay over-optimisation, and what does it cost in labels? On the built-in world.

python studies/refresh.py run --seeds 0 1 2
python studies/refresh.py table

Per seed a small decoder is fine-tuned on the letter book and a reward model learns from a few rankings; then PPO climbs
that reward with a weak penalty, so that it is over-optimised. Arms, all from the same start and on the same letters:

    never       the reward model stays as it is
    refresh     the annotators rank answers of the current policy a few times on the way
    at once     as many rankings of the fine-tuned model's answers before the run, none on the way

Gold is watched, never learned from.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from plaudit.configs.align import AlignConfig
from plaudit.configs.data import DataConfig
from plaudit.configs.demo import DemoConfig
from plaudit.configs.reward import RewardTrainingConfig
from plaudit.data.io import read_data
from plaudit.data.records import Comparison, PromptRecord
from plaudit.demo import pipeline
from plaudit.demo.annotators import Shop
from plaudit.demo.world import World, gold_reward
from plaudit.models.causal_lm import CausalLM
from plaudit.models.reward_model import RewardModel
from plaudit.rewards.annotators import Question
from plaudit.rewards.combine import combine
from plaudit.rewards.normalise import Running, normalised
from plaudit.training import align, reward
from plaudit.training.trackers import read_metrics

SIZES = {
    "letter_book": 1600,
    "demonstrations": 100,
    "rankings": 100,
    "test_rankings": 100,
    "vocabulary": 1000,
    "hidden_size": 96,
    "layers": 2,
    "max_new_tokens": 64,
}
ITERATIONS, LETTERS, SAMPLES = 24, 12, 6
LABELS, EVERY = 60, 6


def gold(prompts: list[str], completions: list[str], **columns: object) -> list[float]:
    """The world's own reward."""
    return [gold_reward(prompt, text) for prompt, text in zip(prompts, completions, strict=True)]


def prepare(folder: Path, seed: int) -> None:
    """World, fine-tuned model, rankings and reward model of a seed, by the stages of the demo."""
    if (folder / "reward" / "model").exists():
        return
    config = DemoConfig(output=folder, seed=seed, **SIZES)
    pipeline._clear(folder)
    run = pipeline.DemoRun(config, World(seed))
    for stage in (
        pipeline.make_world,
        pipeline.fine_tune,
        pipeline.collect_rankings,
        pipeline.train_reward_model,
    ):
        stage(run)


def learn_at_once(folder: Path, seed: int, model: RewardModel, rankings: list[Comparison]) -> None:
    """As many new rankings as a refreshed run asks for in all, of the fine-tuned model's answers, before the run."""
    policy = CausalLM.from_pretrained(str(folder / "sft" / "model"))
    run = pipeline.DemoRun(DemoConfig(output=folder, seed=seed, **SIZES), World(seed))
    prompts = run.world.prompts(LABELS)
    answers = pipeline._sample(run, policy, prompts, samples=4, seed=seed + 77)
    asked = [
        Question(id=f"once-{number}", prompt=prompt, completions=tuple(dict.fromkeys(filter(None, texts))))
        for number, (prompt, texts) in enumerate(zip(prompts, answers, strict=True))
    ]
    judged = Shop(seed=seed)([question for question in asked if len(question.completions) > 1])
    settings = {
        "model": {"backbone": "handed over"},
        "output": folder / "at-once-reward",
        "overwrite": True,
        "epochs": 2.0,
        "records_per_step": 4,
        "optimizer": {"learning_rate": 2e-4, "head_learning_rate": 5e-4, "warmup": 0.1},
        "seed": seed,
        "quiet": True,
    }
    reward.main(RewardTrainingConfig.model_validate(settings), train=[*judged, *rankings], model=model)


def run_arm(folder: Path, seed: int, arm: str, coefficient: float) -> None:
    """One aligned policy; its metrics stay in the arm's folder."""
    output = folder / arm.replace(" ", "-")
    if (output / "result.json").exists():
        return
    rankings = read_data(DataConfig(path=str(folder / "data" / "train.jsonl"))).records
    model = RewardModel.from_pretrained(folder / "reward" / "model")
    if arm == "at once":
        learn_at_once(folder, seed, model, rankings)
    first = RewardModel.from_pretrained(folder / "reward" / "model")
    scorer = combine(
        {
            "proxy": (normalised(model, Running(shift=False)), 1.0),
            "first": (first, 0.0),
            "gold": (gold, 0.0),
        }
    )
    refresh = {
        "every": EVERY,
        "budget": LABELS,
        "completions": 4,
        "old_per_new": 2.0,
        "epochs": 2.0,
        "learning_rate": 2e-4,
        "head_learning_rate": 5e-4,
        "records_per_step": 4,
    }
    settings: dict[str, Any] = {
        "model": {"backbone": str(folder / "sft" / "model")},
        "algorithm": {
            "name": "ppo",
            "baseline": "leave_one_out",
            "epochs": 1,
            "minibatches": 2,
            "kl_coefficient": coefficient,
        },
        "sampling": {"max_new_tokens": SIZES["max_new_tokens"]},
        "iterations": ITERATIONS,
        "prompts_per_iteration": LETTERS,
        "samples_per_prompt": SAMPLES,
        "optimizer": {"learning_rate": 1e-3, "epsilon": 1e-3},
        "evaluate_every": None,
        "save_every": None,
        "seed": seed,
        "output": output,
        "overwrite": True,
        "log_every": ITERATIONS,
        "tokens_per_micro_batch": 4096,
        "refresh_reward": refresh if arm == "refresh" else None,
    }
    prompts = [PromptRecord(prompt=text) for text in World(seed).prompts(ITERATIONS * LETTERS)]
    begun = time.process_time()
    align.main(
        AlignConfig.model_validate(settings),
        prompts=prompts,
        reward=scorer,
        comparisons=rankings if arm == "refresh" else None,
        annotator=Shop(seed=seed) if arm == "refresh" else None,
    )
    print(json.dumps({"seed": seed, "arm": arm, "cpu_seconds": round(time.process_time() - begun)}), flush=True)


ARMS = ("never", "refresh", "at once")


def curves(folder: Path) -> dict[str, np.ndarray]:
    """Gold, the first and the learning proxy, and `√KL` of each iteration's answers."""
    lines = read_metrics(folder / "metrics.jsonl")
    names = {"gold": "reward/gold", "first": "reward/first", "proxy": "reward/proxy", "kl": "objective/kl"}
    found = {short: np.array([line[name] for line in lines if name in line]) for short, name in names.items()}
    found["distance"] = np.sqrt(np.maximum(found.pop("kl"), 0.0))
    labels = [line["refresh/labels"] for line in lines if "refresh/labels" in line]
    found["labels"] = np.array(labels[-1:] or [0.0])
    for name in ("refresh/accuracy_before", "refresh/accuracy_after"):
        found[name.split("/")[1]] = np.array([line[name] for line in lines if name in line])
    return found


def table(root: Path) -> None:
    """One row per arm and seed: means over the first and the last four iterations, and the best four in a row."""
    print(
        "| seed | arm | labels | gold at first | best | at the end | lost since its best "
        "| first proxy at the end | √KL |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    rows: dict[str, list[list[float]]] = {arm: [] for arm in ARMS}
    for folder in sorted(root.glob("seed*")):
        for arm in ARMS:
            if not (folder / arm.replace(" ", "-") / "result.json").exists():
                continue
            found = curves(folder / arm.replace(" ", "-"))
            smooth = np.convolve(found["gold"], np.ones(4) / 4, "valid")
            row = [smooth[0], smooth.max(), smooth[-1], smooth.max() - smooth[-1]]
            row += [found["first"][-4:].mean(), found["distance"][-4:].mean()]
            rows[arm].append(row)
            shown = " | ".join(f"{value:.2f}" for value in row)
            print(f"| {folder.name[4:]} | {arm} | {found['labels'][0]:.0f} | {shown} |")
            if arm == "refresh":
                before, after = (np.round(found[name], 2).tolist() for name in ("accuracy_before", "accuracy_after"))
                print(f"refreshes of seed {folder.name[4:]}: accuracy before {before}, after {after}")
    for arm, found_rows in rows.items():
        if found_rows:
            means = np.mean(found_rows, 0)
            print(f"| mean of {len(found_rows)} | {arm} | | " + " | ".join(f"{value:.2f}" for value in means) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["run", "table"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--kl-coefficient", type=float, default=0.02)
    parser.add_argument("--output", type=Path, default=Path("runs/studies/refresh"))
    arguments = parser.parse_args()
    if arguments.part == "table":
        table(arguments.output)
        return
    for seed in arguments.seeds:
        folder = arguments.output / f"seed{seed}"
        begun = time.process_time()
        prepare(folder, seed)
        print(json.dumps({"seed": seed, "prepared_cpu_seconds": round(time.process_time() - begun)}), flush=True)
        for arm in arguments.arms:
            run_arm(folder, seed, arm, arguments.kl_coefficient)


if __name__ == "__main__":
    main()

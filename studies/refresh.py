"""Does refreshing the reward model delay over-optimisation, and what does it cost in labels? On the built-in world.

python studies/refresh.py run --seeds 0 1 2 3 4
python studies/refresh.py table --plot docs/images/studies/refresh.png

Per seed a small decoder is fine-tuned on the letter book and a reward model learns from a few rankings; then PPO climbs
that reward with a weak penalty, so that it is over-optimised. Arms, all from the same start and on the same letters:

    never             the reward model stays as it is
    refresh           the annotators rank answers of the current policy three times on the way, 48 sets of four in all
    refresh, fourfold the same with 192
    at once           48 rankings of the fine-tuned model's answers before the run, none on the way

Gold is watched, never learned from.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

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
ITERATIONS, LETTERS, SAMPLES = 24, 8, 6
EVERY = 6
ARMS = {"never": 0, "refresh": 48, "refresh, fourfold": 192, "at once": 48}
"""Rankings of four answers that each asks for."""


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
    prompts = run.world.prompts(ARMS["at once"])
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


def arm_folder(folder: Path, arm: str) -> Path:
    """Where an arm of a seed's folder is."""
    return folder / arm.replace(",", "").replace(" ", "-")


def run_arm(folder: Path, seed: int, arm: str, coefficient: float) -> None:
    """One aligned policy; its metrics stay in the arm's folder."""
    output, refreshed = arm_folder(folder, arm), arm.startswith("refresh")
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
        "budget": ARMS[arm],
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
        "refresh_reward": refresh if refreshed else None,
    }
    prompts = [PromptRecord(prompt=text) for text in World(seed).prompts(ITERATIONS * LETTERS)]
    begun = time.process_time()
    align.main(
        AlignConfig.model_validate(settings),
        prompts=prompts,
        reward=scorer,
        comparisons=rankings if refreshed else None,
        annotator=Shop(seed=seed) if refreshed else None,
    )
    print(json.dumps({"seed": seed, "arm": arm, "cpu_seconds": round(time.process_time() - begun)}), flush=True)


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


def summary(found: dict[str, np.ndarray]) -> dict[str, float]:
    """Means over the first and the last four iterations, the best four in a row, and what was lost since."""
    smooth = np.convolve(found["gold"], np.ones(4) / 4, "valid")
    return {
        "gold_first": smooth[0],
        "gold_best": smooth.max(),
        "gold_last": smooth[-1],
        "lost": smooth.max() - smooth[-1],
        "first_proxy_last": found["first"][-4:].mean(),
        "distance_last": found["distance"][-4:].mean(),
    }


def differences(rows: dict[str, dict[str, dict[str, float]]], arm: str) -> str:
    """An arm minus `never`, paired by seed: mean and standard error of final gold and of what was lost."""
    shown = []
    for name in ("gold_last", "lost"):
        found = np.array([rows[arm][seed][name] - rows["never"][seed][name] for seed in rows[arm]])
        error = found.std(ddof=1) / len(found) ** 0.5 if len(found) > 1 else float("nan")
        shown.append(f"{found.mean():+.2f} ± {error:.2f}")
    return " | ".join(shown)


def table(root: Path) -> None:
    """One row per arm and seed, the means, and the paired differences from the arm that never asks."""
    print("| seed | arm | gold at first | best | at the end | lost since its best | first proxy at the end | √KL |")
    print("|---|---|---|---|---|---|---|---|")
    rows: dict[str, dict[str, dict[str, float]]] = {arm: {} for arm in ARMS}
    trust: dict[str, list[list[float]]] = {}
    for folder in sorted(root.glob("seed*")):
        for arm in ARMS:
            if not (arm_folder(folder, arm) / "result.json").exists():
                continue
            found = curves(arm_folder(folder, arm))
            row = rows[arm][folder.name[4:]] = summary(found)
            print(f"| {folder.name[4:]} | {arm} | " + " | ".join(f"{value:.2f}" for value in row.values()) + " |")
            if found["labels"][0]:
                trust.setdefault(f"{arm}: accuracy before", []).append(found["accuracy_before"].tolist())
                trust.setdefault(f"{arm}: accuracy after", []).append(found["accuracy_after"].tolist())
    for arm, by_seed in rows.items():
        if by_seed:
            means = np.mean([list(row.values()) for row in by_seed.values()], 0)
            print(f"| mean of {len(by_seed)} | {arm} | " + " | ".join(f"{value:.2f}" for value in means) + " |")
    print("\n| arm minus never | labels | gold at the end | lost since its best |\n|---|---|---|---|")
    for arm, by_seed in rows.items():
        if arm != "never" and by_seed:
            print(f"| {arm} | {ARMS[arm]} | {differences(rows, arm)} |")
    print()
    for name, values in trust.items():
        print(f"{name}, at each refresh, mean over seeds: {np.round(np.mean(values, 0), 2).tolist()}")


def plot(root: Path, path: Path) -> None:
    """Gold and the first proxy by iteration, mean over seeds, four iterations smoothed; as picture and CSV."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    axes = figure.subplots(1, 2)
    lines = ["arm,iteration,gold,first_proxy,distance"]
    for arm in ARMS:
        folders = [arm_folder(each, arm) for each in sorted(root.glob("seed*"))]
        found = [curves(each) for each in folders if (each / "result.json").exists()]
        if not found:
            continue
        means = {name: np.mean([each[name] for each in found], 0) for name in ("gold", "first", "distance")}
        smooth = {name: np.convolve(values, np.ones(4) / 4, "valid") for name, values in means.items()}
        for place, name in enumerate(("gold", "first")):
            axes[place].plot(np.arange(4, len(means[name]) + 1), smooth[name], label=f"{arm} ({len(found)} seeds)")
        rows = zip(means["gold"], means["first"], means["distance"], strict=True)
        lines += [f'"{arm}",{n},{a:.4f},{b:.4f},{c:.4f}' for n, (a, b, c) in enumerate(rows, 1)]
    for place, title in enumerate(("gold", "the first reward model's score")):
        axes[place].set_title(title)
        axes[place].set_xlabel("iteration")
        axes[place].set_xticks(range(4, ITERATIONS + 1, 4))
        for refresh in range(EVERY, ITERATIONS, EVERY):
            axes[place].axvline(refresh, color="0.85", linewidth=0.8, zorder=0)
    axes[0].legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    path.with_suffix(".csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["run", "table"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--kl-coefficient", type=float, default=0.02)
    parser.add_argument("--plot", type=Path, help="of table: a picture, with a CSV beside it")
    parser.add_argument("--output", type=Path, default=Path("runs/studies/refresh"))
    arguments = parser.parse_args()
    if arguments.part == "table":
        table(arguments.output)
        if arguments.plot is not None:
            plot(arguments.output, arguments.plot)
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

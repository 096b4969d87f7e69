"""Does refreshing the reward model delay over-optimisation, and what does it cost in labels? On the built-in world.

python studies/refresh.py run --seeds 0 1 2 3 4
python studies/refresh.py table --plot docs/images/studies/refresh.png

Per seed a small decoder is fine-tuned on the letter book and a reward model learns from few rankings; then PPO climbs
that reward with hardly a penalty and at a constant rate, long enough that gold rises and falls again. Gold is watched,
never learned from. Arms, all from the same start and on the same letters:

    never        the reward model stays as it is
    refresh 48   five times on the way annotators rank answers of the current policy, 48 sets of four in all
    refresh 192  the same with four times as many
    at once 48   as many rankings of the fine-tuned model's answers before the run, none on the way
    at once 192  the same with four times as many
    again 48     no new ones: as much training as `at once 48` has, on rankings that the reward model knows already

Each arm adds a line with its curves to the results, `docs/studies/refresh.jsonl`; what stands there is not run again.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy import stats

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

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "studies" / "refresh.jsonl"
SIZES = {
    "letter_book": 2400,
    "demonstrations": 100,
    "rankings": 300,
    "test_rankings": 60,
    "vocabulary": 1000,
    "hidden_size": 96,
    "layers": 2,
    "max_new_tokens": 80,
    # As the demo's were when the study was made.
    "initial_spread": 0.02,
    "reward_epochs": 1.0,
}
ITERATIONS, LETTERS, SAMPLES = 42, 8, 8
EVERY = 7
WINDOW = 6
"""Iterations of which gold is averaged: 48 letters, 384 answers."""
SETTINGS = {"learning_rate": 2e-4, "kl_coefficient": 0.005}
ARMS = {"never": 0, "refresh 192": 192, "at once 192": 192, "refresh 48": 48, "at once 48": 48, "again 48": 0}
"""Rankings of four answers that each asks for."""
LEARNING = {"epochs": 2.0, "learning_rate": 2e-4, "head_learning_rate": 5e-4, "records_per_step": 4}
"""How the reward model learns from new rankings, on the way or at once."""
OLD_PER_NEW = 1.0

Curve = NDArray[np.float64]


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


def rankings_of_the_start(folder: Path, seed: int, count: int) -> list[Comparison]:
    """As many new rankings as a refreshed run asks for in all, of the fine-tuned model's answers."""
    policy = CausalLM.from_pretrained(str(folder / "sft" / "model"))
    run = pipeline.DemoRun(DemoConfig(output=folder, seed=seed, **SIZES), World(seed))
    prompts = run.world.prompts(count)
    answers = pipeline._sample(run, policy, prompts, samples=4, seed=seed + 77)
    asked = [
        Question(id=f"once-{number}", prompt=prompt, completions=tuple(dict.fromkeys(filter(None, texts))))
        for number, (prompt, texts) in enumerate(zip(prompts, answers, strict=True))
    ]
    return Shop(seed=seed)([question for question in asked if len(question.completions) > 1])


def learn_before(folder: Path, seed: int, arm: str, model: RewardModel, rankings: list[Comparison]) -> None:
    """Train the reward model before the run, on new rankings with `OLD_PER_NEW` earlier ones each, or on earlier ones.

    In a refreshed run as many earlier rankings accompany each new one.
    """
    kind, number = arm.rsplit(" ", 1)
    judged = rankings_of_the_start(folder, seed, int(number)) if kind == "at once" else []
    whole = round((1 + OLD_PER_NEW) * int(number))
    earlier = rankings[: round(OLD_PER_NEW * len(judged))] if judged else rankings[:whole]
    settings = {
        "model": {"backbone": "handed over"},
        "output": folder / f"{arm.replace(' ', '-')}-reward",
        "overwrite": True,
        "epochs": LEARNING["epochs"],
        "records_per_step": LEARNING["records_per_step"],
        "optimizer": {
            "learning_rate": LEARNING["learning_rate"],
            "head_learning_rate": LEARNING["head_learning_rate"],
            "warmup": 0.1,
        },
        "seed": seed,
        "quiet": True,
    }
    reward.main(RewardTrainingConfig.model_validate(settings), train=[*judged, *earlier], model=model)


def settings_of(folder: Path, seed: int, arm: str, iterations: int) -> dict[str, Any]:
    """The run of an arm."""
    return {
        "model": {"backbone": str(folder / "sft" / "model")},
        "algorithm": {
            "name": "ppo",
            "baseline": "leave_one_out",
            "epochs": 1,
            "minibatches": 4,
            "kl_coefficient": SETTINGS["kl_coefficient"],
        },
        "sampling": {"max_new_tokens": SIZES["max_new_tokens"]},
        "iterations": iterations,
        "prompts_per_iteration": LETTERS,
        "samples_per_prompt": SAMPLES,
        "optimizer": {
            "learning_rate": SETTINGS["learning_rate"],
            "warmup": 3,
            "epsilon": 1e-5,
            "weight_decay": 0.0,
        },
        "evaluate_every": None,
        "save_every": None,
        "seed": seed,
        "output": folder / arm.replace(" ", "-"),
        "overwrite": True,
        "log_every": iterations,
        "tokens_per_micro_batch": 4096,
        "refresh_reward": {"every": EVERY, "budget": ARMS[arm], "completions": 4, "old_per_new": OLD_PER_NEW} | LEARNING
        if arm.startswith("refresh")
        else None,
    }


def run_arm(folder: Path, seed: int, arm: str, iterations: int) -> dict[str, Any]:
    """One aligned policy: what it asked for, its curves by iteration, and the processor time it took."""
    begun = time.process_time()
    rankings = read_data(DataConfig(path=str(folder / "data" / "train.jsonl"))).records
    model = RewardModel.from_pretrained(folder / "reward" / "model")
    if arm.startswith(("at once", "again")):
        learn_before(folder, seed, arm, model, rankings)
    first = RewardModel.from_pretrained(folder / "reward" / "model")
    scorer = combine(
        {
            "proxy": (normalised(model, Running(shift=False)), 1.0),
            "first": (first, 0.0),
            "gold": (gold, 0.0),
        }
    )
    settings = AlignConfig.model_validate(settings_of(folder, seed, arm, iterations))
    refreshed = settings.refresh_reward is not None
    result = align.main(
        settings,
        prompts=[PromptRecord(prompt=text) for text in World(seed).prompts(iterations * LETTERS)],
        reward=scorer,
        comparisons=rankings if refreshed else None,
        annotator=Shop(seed=seed) if refreshed else None,
    )
    assert isinstance(result, align.TrainingResult)
    if not result.complete:
        sys.exit(result.exit_code)
    return {
        "seed": seed,
        "arm": arm,
        "cpu_seconds": round(time.process_time() - begun),
        **curves(read_metrics(settings.output / "metrics.jsonl")),
    }


def curves(lines: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Gold, the first reward model's score and nats from the start by iteration; how far each refresh was trusted."""
    names = {
        "gold": "reward/gold",
        "first": "reward/first",
        "kl": "objective/kl",
        "before": "refresh/accuracy_before",
        "after": "refresh/accuracy_after",
    }
    return {short: [round(line[name], 3) for line in lines if name in line] for short, name in names.items()}


def smooth(values: list[float]) -> Curve:
    """Means of `WINDOW` iterations in a row."""
    return np.convolve(np.array(values), np.ones(WINDOW) / WINDOW, "valid")


def summary(row: dict[str, Any]) -> dict[str, float]:
    """Gold at the start, its peak, where that is (nats, iteration) and the end; the proxy's way from the peak on."""
    golden, kl, first = (smooth(row[name]) for name in ("gold", "kl", "first"))
    peak = int(golden.argmax())
    return {
        "gold at first": golden[0],
        "peak": golden[peak],
        "iteration of the peak": peak + WINDOW,
        "KL at the peak": kl[peak],
        "gold at the end": golden[-1],
        "lost since the peak": golden[peak] - golden[-1],
        "mean gold of the run": float(np.mean(row["gold"])),
        "first proxy at the peak": first[peak],
        "first proxy at the end": first[-1],
        "KL at the end": kl[-1],
    }


def interval(values: list[float]) -> str:
    """Mean and half a 95 % interval by Student's t."""
    if len(values) < 2:
        return f"{np.mean(values):.2f}"
    half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    return f"{np.mean(values):.2f} ± {half:.2f}"


def table(rows: list[dict[str, Any]]) -> None:
    """Means over seeds by arm, every seed's peak and end, the paired differences from `never`, and trust."""
    found = {arm: {row["seed"]: summary(row) for row in rows if row["arm"] == arm} for arm in ARMS}
    found = {arm: by_seed for arm, by_seed in found.items() if by_seed}
    columns = list(next(iter(next(iter(found.values())).values())))
    print(f"| arm | labels | seeds | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 3)}")
    for arm, by_seed in found.items():
        cells = [interval([each[name] for each in by_seed.values()]) for name in columns]
        print(f"| {arm} | {ARMS[arm]} | {len(by_seed)} | {' | '.join(cells)} |")
    print("\n| seed | arm | gold at first | peak | KL at the peak | gold at the end |\n|---|---|---|---|---|---|")
    for seed in sorted({row["seed"] for row in rows}):
        for arm in (arm for arm in found if seed in found[arm]):
            shown = [found[arm][seed][name] for name in ("gold at first", "peak", "KL at the peak", "gold at the end")]
            print(f"| {seed} | {arm} | {' | '.join(f'{value:.2f}' for value in shown)} |")
    compared = ("peak", "KL at the peak", "gold at the end", "lost since the peak", "mean gold of the run")
    for other in ("never", "at once 48", "at once 192"):
        print(f"\n| arm minus {other} | seeds | {' | '.join(compared)} |\n|---|---|{'---|' * len(compared)}")
        for arm, by_seed in found.items():
            if arm == other or (other != "never" and ARMS[arm] != ARMS[other]):
                continue
            both = sorted(set(by_seed) & set(found.get(other, {})))
            if both:
                cells = [
                    interval([by_seed[seed][name] - found[other][seed][name] for seed in both]) for name in compared
                ]
                print(f"| {arm} | {len(both)} | {' | '.join(cells)} |")
    print()
    for arm in found:
        for name in ("before", "after"):
            values = [row[name] for row in rows if row["arm"] == arm and row[name]]
            if values:
                print(f"{arm}: pairs ordered alike {name} each refresh: {np.round(np.mean(values, 0), 2).tolist()}")
        print(f"{arm}: processor seconds {np.mean([row['cpu_seconds'] for row in rows if row['arm'] == arm]):.0f}")


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Gold and the first reward model's score by iteration, means over seeds and `WINDOW` iterations; also as CSV."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    axes = figure.subplots(1, 2)
    lines = ["arm,iteration,gold,first_proxy,kl"]
    for arm in ARMS:
        chosen = [row for row in rows if row["arm"] == arm]
        if not chosen:
            continue
        means = {name: np.mean([row[name] for row in chosen], 0) for name in ("gold", "first", "kl")}
        for place, name in enumerate(("gold", "first")):
            along = smooth(means[name].tolist())
            label = f"{arm} ({len(chosen)} seed{'s' * (len(chosen) > 1)})"
            axes[place].plot(np.arange(WINDOW, len(means[name]) + 1), along, label=label)
        columns = zip(means["gold"], means["first"], means["kl"], strict=True)
        lines += [f'"{arm}",{n},{a:.4f},{b:.4f},{c:.4f}' for n, (a, b, c) in enumerate(columns, 1)]
    for place, title in enumerate(("gold", "the first reward model's score")):
        axes[place].set_title(title)
        axes[place].set_xlabel("iteration")
        for refresh in range(EVERY, len(rows[0]["gold"]), EVERY):
            axes[place].axvline(refresh, color="0.85", linewidth=0.8, zorder=0)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    path.with_suffix(".csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def read(path: Path) -> list[dict[str, Any]]:
    """The results so far."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["run", "table"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--iterations", type=int, default=ITERATIONS)
    parser.add_argument("--plot", type=Path, help="of table: a picture, with a CSV beside it")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--output", type=Path, default=Path("runs/studies/refresh"), help="folder of the models")
    arguments = parser.parse_args()
    if arguments.part == "table":
        table(read(arguments.results))
        if arguments.plot is not None:
            plot(read(arguments.results), arguments.plot)
        return
    for seed in arguments.seeds:
        folder = arguments.output / f"seed{seed}"
        for arm in arguments.arms:
            if any((row["seed"], row["arm"]) == (seed, arm) for row in read(arguments.results)):
                continue
            prepare(folder, seed)
            line = json.dumps(run_arm(folder, seed, arm, arguments.iterations))
            with arguments.results.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
            print(line, flush=True)


if __name__ == "__main__":
    main()

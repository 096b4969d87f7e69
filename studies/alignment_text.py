"""Alignment on real text: school sums, a decoder from random weights, rewards that can be checked.

    python studies/alignment_text.py run --data PATH/TO/gsm8k/demonstrations.jsonl.gz
    python studies/alignment_text.py table

`run` fine-tunes a small decoder on the shortest worked solutions of GSM8K and then rewards its own answers to other
questions, once per reward below. What is finished is not made again. `table` draws the curves and writes the JSON.
"""

import argparse
import ast
import json
import operator
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from plaudit.configs.align import AlignConfig
from plaudit.configs.sft import SftConfig
from plaudit.data.io import read_demonstrations
from plaudit.data.records import Demonstration, PromptRecord
from plaudit.data.vocabulary import train_tokenizer
from plaudit.rewards.combine import combine
from plaudit.rewards.rules import matches, numeric_match
from plaudit.training import align, sft
from plaudit.training.trackers import read_metrics

ROOT = Path(__file__).resolve().parents[1]
IMAGE = ROOT / "docs" / "images" / "studies" / "alignment-gsm8k.png"
RESULTS = ROOT / "docs" / "studies" / "alignment-gsm8k.json"
DEMONSTRATIONS, QUESTIONS = 2000, 400
HIDDEN, LAYERS, VOCABULARY, NEW_TOKENS = 128, 2, 1200, 120
ITERATIONS, PROMPTS, SAMPLES = 24, 8, 8
ENDING = r".*#### -?\$?[\d,]*\.?\d+"
REWARDS: dict[str, dict[str, float]] = {
    "match": {"match": 1.0, "arithmetic": 0.0, "ending": 0.0},
    "dense": {"match": 1.0, "arithmetic": 1.0, "ending": 0.5},
}
"""Weights of the parts: the right number alone; or also right equations on the way and an ending as asked."""

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def value_of(text: str) -> float | None:
    """The value of a sum of numbers, `+ - * /` and brackets; None for anything else."""

    def evaluate(node: ast.expr) -> float:
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            return float(OPERATORS[type(node.op)](evaluate(node.left), evaluate(node.right)))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -evaluate(node.operand)
        if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
            return float(node.value)
        raise ValueError(text)

    try:
        return evaluate(ast.parse(text.replace(",", "").lstrip("0 ") or "0", mode="eval").body)
    except (ValueError, SyntaxError, ZeroDivisionError, RecursionError, OverflowError):
        return None


def arithmetic(prompts: list[str], completions: list[str], **columns: object) -> list[float]:
    """Share of an answer's calculations, `<<48/2=24>>`, that hold; 0 without any."""
    shares = []
    for text in completions:
        found = [(value_of(left), value_of(right)) for left, right in re.findall(r"<<([^<>=]*)=([^<>=]*)>>", text)]
        right = [a is not None and b is not None and abs(a - b) <= 0.01 * max(1.0, abs(a)) for a, b in found]
        shares.append(sum(right) / len(right) if right else 0.0)
    return shares


def records_of(data: Path) -> tuple[list[Demonstration], list[Demonstration]]:
    """The shortest solved questions: those to fine-tune on, and others to be answered."""
    found = sorted(read_demonstrations(data).records, key=lambda each: len(f"{each.prompt}{each.completion}"))
    shortest = found[: DEMONSTRATIONS + QUESTIONS]
    order = np.random.default_rng(0).permutation(len(shortest))
    shuffled = [shortest[place] for place in order]
    return shuffled[QUESTIONS:], shuffled[:QUESTIONS]


def fine_tune(train: Sequence[Demonstration], held_out: Sequence[Demonstration], output: Path) -> Path:
    """A small decoder, from random weights to one that writes like the solutions."""
    folder = output / "sft"
    if (folder / "model").exists():
        return folder / "model"
    shutil.rmtree(folder, ignore_errors=True)
    train_tokenizer([f"{each.prompt} {each.completion}" for each in train], VOCABULARY).save_pretrained(output / "tok")
    settings = {
        "model": {
            "model_type": "llama",
            "tokenizer": str(output / "tok"),
            "backbone_config": {
                "hidden_size": HIDDEN,
                "intermediate_size": 3 * HIDDEN,
                "num_hidden_layers": LAYERS,
                "num_attention_heads": HIDDEN // 64,
                "num_key_value_heads": HIDDEN // 64,
                "max_position_embeddings": 512,
                "tie_word_embeddings": True,
            },
        },
        "epochs": 2,
        "records_per_step": 8,
        "optimizer": {"learning_rate": 6e-3, "betas": (0.9, 0.95), "warmup": 0.05},
        "output": folder,
        "log_every": 50,
    }
    sft.main(SftConfig.model_validate(settings), train=train, held_out=held_out[:100])
    return folder / "model"


def run(data: Path, output: Path) -> None:
    """Fine-tune, and align once per reward."""
    train, questions = records_of(data)
    model = fine_tune(train, questions, output)
    parts = {"match": numeric_match(find="marked"), "arithmetic": arithmetic, "ending": matches(ENDING)}
    prompts = [PromptRecord(prompt=each.prompt, columns={"answer": each.completion}) for each in questions]
    for name, weights in REWARDS.items():
        folder = output / name
        if (folder / "model").exists():
            continue
        shutil.rmtree(folder, ignore_errors=True)
        settings: dict[str, Any] = {
            "model": {"backbone": str(model)},
            "algorithm": {"name": "ppo", "baseline": "leave_one_out", "epochs": 1, "minibatches": 2},
            "sampling": {"max_new_tokens": NEW_TOKENS},
            "missing_end_penalty": 0.5,
            "iterations": ITERATIONS,
            "prompts_per_iteration": PROMPTS,
            "samples_per_prompt": SAMPLES,
            "optimizer": {"learning_rate": 5e-4, "schedule": "linear", "warmup": 2, "epsilon": 1e-5, "weight_decay": 0},
            "evaluate_every": None,
            "save_every": None,
            "log_every": 8,
            "output": folder,
        }
        reward = combine({part: (parts[part], weight) for part, weight in weights.items()})
        align.main(AlignConfig.model_validate(settings), prompts=prompts, reward=reward)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def table(output: Path) -> None:
    """The curves as a picture and as JSON, and the first and last quarter as a table."""
    import matplotlib.pyplot as plt

    shown = {
        "reward/ending": "ends with “#### number”",
        "reward/arithmetic": "calculations that hold",
        "reward/match": "right answers",
        "objective/kl": "nats per answer",
    }
    curves = {name: read_metrics(output / name / "metrics.jsonl") for name in REWARDS}
    figure, panels = plt.subplots(1, len(shown), figsize=(13, 3), layout="constrained")
    for panel, (key, title) in zip(panels, shown.items(), strict=True):
        for (name, curve), colour in zip(curves.items(), ("#1b6ca8", "#d1495b"), strict=True):
            panel.plot([each["step"] for each in curve], [each[key] for each in curve], color=colour, label=name)
        panel.set(title=title, xlabel="iteration", ylim=(0, None))
        panel.grid(alpha=0.25)
    panels[0].legend()
    IMAGE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(IMAGE, dpi=100)
    print("| reward | " + " | ".join(shown.values()) + " |\n|---" * 1 + "|---" * len(shown) + "|")
    rows = {}
    for name, curve in curves.items():
        quarter = len(curve) // 4
        ends = {
            key: [float(np.mean([e[key] for e in part])) for part in (curve[:quarter], curve[-quarter:])]
            for key in shown
        }
        rows[name] = {
            "first and last quarter": ends,
            "curve": [{key: e[key] for key in ("step", *shown)} for e in curve],
        }
        print(f"| {name} | " + " | ".join(f"{a:.3f} → {b:.3f}" for a, b in ends.values()) + " |")
    sizes = {
        "hidden": HIDDEN,
        "layers": LAYERS,
        "demonstrations": DEMONSTRATIONS,
        "answers": ITERATIONS * PROMPTS * SAMPLES,
    }
    described = {"command": "python studies/alignment_text.py table", "python": sys.version.split()[0], "sizes": sizes}
    RESULTS.write_text(json.dumps({**described, "rewards": rows}, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "studies" / "alignment-gsm8k")
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run")
    running.add_argument("--data", type=Path, required=True, help="gsm8k/demonstrations.jsonl.gz")
    commands.add_parser("table")
    given = parser.parse_args()
    if given.command == "run":
        given.output.mkdir(parents=True, exist_ok=True)
        run(given.data, given.output)
    else:
        table(given.output)


if __name__ == "__main__":
    main()

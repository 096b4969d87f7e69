"""Alignment on real text: school sums, a decoder from random weights, rewards that can be checked.

    python studies/alignment_text.py [--scale large] run --data PATH/TO/gsm8k/demonstrations.jsonl.gz [--device cuda]
    python studies/alignment_text.py [--scale large] table

`run` fine-tunes a decoder from random weights on the shortest worked solutions of GSM8K and then rewards its own
answers to other questions, once per reward below; at the larger scales a third set is answered before and after. What
is finished is not made again. `table` draws the curves and writes the JSON, also of a run that has not come to its end.

Scales: `small`, two layers of 128 on 2,000 solutions, for a CPU; `large`, twelve layers of 512 (about 40 million
weights) on 6,800, for a GPU; `tiny` only to try the script.
"""

import argparse
import ast
import json
import operator
import platform
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

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
IMAGES = ROOT / "docs" / "images" / "studies"
RESULTS = ROOT / "docs" / "studies"
ENDING = r".*#### -?\$?[\d,]*\.?\d+"
REWARDS: dict[str, dict[str, float]] = {
    "dense": {"match": 1.0, "arithmetic": 1.0, "ending": 0.5},
    "match": {"match": 1.0, "arithmetic": 0.0, "ending": 0.0},
}
"""Weights of the parts: the right number alone; or also right equations on the way and an ending as asked."""


@dataclass(frozen=True)
class Scale:
    """Sizes of a run.

    Attributes:
        demonstrations: solutions to fine-tune on, `epochs` times, `records_per_step` to a step.
        questions: answered and rewarded.
        held_out: further questions, answered before and after, once each; 0 for none.
        hidden: width of the decoder.
        layers: its layers.
        vocabulary: tokens of its tokenizer.
        new_tokens: most tokens of an answer.
        iterations: of alignment, `prompts` questions with `samples` answers each.
        learning_rates: of fine-tuning and of alignment.
        precision: of both.
    """

    demonstrations: int = 2000
    questions: int = 400
    held_out: int = 0
    epochs: float = 2
    records_per_step: int = 8
    hidden: int = 128
    layers: int = 2
    vocabulary: int = 1200
    new_tokens: int = 120
    iterations: int = 24
    prompts: int = 8
    samples: int = 8
    learning_rates: tuple[float, float] = (6e-3, 5e-4)
    precision: str = "float32"


SCALES = {
    "tiny": Scale(60, 20, 8, 1, 8, 64, 1, 400, 24, 2, 4, 4),
    "small": Scale(),
    "large": Scale(6800, 500, 170, 4, 32, 512, 12, 4000, 200, 40, 16, 8, (1e-3, 1e-4), "bf16"),
}

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


def records_of(data: Path, scale: Scale) -> tuple[list[Demonstration], list[Demonstration], list[Demonstration]]:
    """The shortest solved questions: those to fine-tune on, others to be answered, and those held out."""
    found = sorted(read_demonstrations(data).records, key=lambda each: len(f"{each.prompt}{each.completion}"))
    shortest = found[: scale.demonstrations + scale.questions + scale.held_out]
    order = np.random.default_rng(0).permutation(len(shortest))
    shuffled = [shortest[place] for place in order]
    asked = scale.questions + scale.held_out
    return shuffled[asked:], shuffled[: scale.questions], shuffled[scale.questions : asked]


def fine_tune(
    train: Sequence[Demonstration], held_out: Sequence[Demonstration], output: Path, scale: Scale, device: str
) -> Path:
    """A decoder, from random weights to one that writes like the solutions."""
    folder = output / "sft"
    if (folder / "model").exists():
        return folder / "model"
    shutil.rmtree(folder, ignore_errors=True)
    texts = [f"{each.prompt} {each.completion}" for each in train]
    train_tokenizer(texts, scale.vocabulary).save_pretrained(output / "tok")
    heads = max(1, scale.hidden // 64)
    settings = {
        "model": {
            "model_type": "llama",
            "tokenizer": str(output / "tok"),
            "backbone_config": {
                "hidden_size": scale.hidden,
                "intermediate_size": 3 * scale.hidden,
                "num_hidden_layers": scale.layers,
                "num_attention_heads": heads,
                "num_key_value_heads": heads,
                "max_position_embeddings": 768,
                "tie_word_embeddings": True,
            },
        },
        "epochs": scale.epochs,
        "records_per_step": scale.records_per_step,
        "optimizer": {"learning_rate": scale.learning_rates[0], "betas": (0.9, 0.95), "warmup": 0.05},
        "output": folder,
        "log_every": 50,
        "device": device,
        "precision": scale.precision,
        "tokens_per_micro_batch": 16_384,
    }
    sft.main(SftConfig.model_validate(settings), train=train, held_out=held_out)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return folder / "model"


def run(data: Path, output: Path, scale: Scale, device: str) -> None:
    """Fine-tune, and align once per reward."""
    train, questions, held_out = records_of(data, scale)
    card = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    described = {"device": card, "python": platform.python_version(), "torch": torch.__version__, **asdict(scale)}
    (output / "run.json").write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
    model = fine_tune(train, held_out or questions[:100], output, scale, device)
    parts = {"match": numeric_match(find="marked"), "arithmetic": arithmetic, "ending": matches(ENDING)}
    prompts, held = (
        [PromptRecord(prompt=each.prompt, columns={"answer": each.completion}) for each in some]
        for some in (questions, held_out)
    )
    for name, weights in REWARDS.items():
        folder = output / name
        if (folder / "model").exists():
            continue
        shutil.rmtree(folder, ignore_errors=True)
        settings: dict[str, Any] = {
            "model": {"backbone": str(model)},
            "algorithm": {"name": "ppo", "baseline": "leave_one_out", "epochs": 1, "minibatches": 2},
            "sampling": {"max_new_tokens": scale.new_tokens},
            "missing_end_penalty": 0.5,
            "iterations": scale.iterations,
            "prompts_per_iteration": scale.prompts,
            "samples_per_prompt": scale.samples,
            "optimizer": {
                "learning_rate": scale.learning_rates[1],
                "schedule": "linear",
                "warmup": 2,
                "epsilon": 1e-5,
                "weight_decay": 0,
            },
            "evaluate_every": None,
            "save_every": None,
            "log_every": 8,
            "output": folder,
            "device": device,
            "precision": scale.precision,
            "tokens_per_micro_batch": 16_384,
        }
        reward = combine({part: (parts[part], weight) for part, weight in weights.items()})
        config = AlignConfig.model_validate(settings)
        result = align.main(config, prompts=prompts, held_out=held or None, reward=reward)
        if not result.complete:
            sys.exit(result.exit_code)  # Stopped by a signal: half a run is no result.
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)


SHOWN = {
    "reward/ending": "ends with “#### number”",
    "reward/arithmetic": "calculations that hold",
    "reward/match": "right answers",
    "objective/kl": "nats per answer",
}


def curves_of(output: Path) -> dict[str, list[dict[str, Any]]]:
    """The metrics of every iteration by reward, of those that have begun."""
    files = {name: output / name / "metrics.jsonl" for name in REWARDS}
    found = {name: read_metrics(file) for name, file in files.items() if file.exists()}
    return {name: [each for each in lines if "reward/match" in each] for name, lines in found.items()}


def draw(curves: dict[str, list[dict[str, Any]]], image: Path) -> None:
    """One panel per metric, one line per reward, averaged over three iterations."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(SHOWN), figsize=(13, 3), layout="constrained")
    for panel, (key, title) in zip(panels, SHOWN.items(), strict=True):
        for (name, curve), colour in zip(curves.items(), ("#1b6ca8", "#d1495b"), strict=False):
            values = np.array([each[key] for each in curve])
            means = [float(values[max(0, place - 2) : place + 1].mean()) for place in range(len(values))]
            panel.plot([each["step"] for each in curve], means, color=colour, label=name)
        panel.set(title=title, xlabel="iteration", ylim=(0, None))
        panel.grid(alpha=0.25)
    panels[0].legend()
    image.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(image, dpi=100)


def table(output: Path, name: str) -> None:
    """The curves as a picture and as JSON; first and last quarter, and the held-out questions, as a table."""
    suffix = "" if name == "small" else f"-{name}"
    images, results = (output, output) if name == "tiny" else (IMAGES, RESULTS)
    curves = curves_of(output)
    draw(curves, images / f"alignment-gsm8k{suffix}.png")
    described = json.loads((output / "run.json").read_text(encoding="utf-8"))
    tuned = read_metrics(output / "sft" / "metrics.jsonl")
    print("| reward | iterations | " + " | ".join(SHOWN.values()) + " |\n|---|---:" + "|---" * len(SHOWN) + "|")
    rows = {}
    for reward, curve in curves.items():
        quarter = max(1, len(curve) // 4)
        ends = {
            key: [float(np.mean([e[key] for e in part])) for part in (curve[:quarter], curve[-quarter:])]
            for key in SHOWN
        }
        lines = read_metrics(output / reward / "metrics.jsonl")
        held = [{k: v for k, v in each.items() if k.startswith("eval/")} for each in lines]
        held = [each for each in held if each]
        rows[reward] = {
            "first and last quarter": ends,
            "held out, before and after": held[:1] + held[-1:],
            "curve": [{key: e[key] for key in ("step", *SHOWN)} for e in curve],
        }
        shown = " | ".join(f"{a:.3f} → {b:.3f}" for a, b in ends.values())
        print(f"| {reward} | {len(curve)} of {described['iterations']} | {shown} |")
    command = f"python studies/alignment_text.py --scale {name} table"
    whole = {"command": command, "run": described, "fine-tuning": tuned[-2:], "rewards": rows}
    (results / f"alignment-gsm8k{suffix}.json").write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="where the run stands; by default runs/studies/…")
    parser.add_argument("--scale", choices=tuple(SCALES), default="small")
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run")
    running.add_argument("--data", type=Path, required=True, help="gsm8k/demonstrations.jsonl.gz")
    running.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    commands.add_parser("table")
    given = parser.parse_args()
    output = given.output or ROOT / "runs" / "studies" / f"alignment-gsm8k-{given.scale}"
    if given.command == "run":
        output.mkdir(parents=True, exist_ok=True)
        run(given.data, output, SCALES[given.scale], given.device)
    else:
        table(output, given.scale)


if __name__ == "__main__":
    main()

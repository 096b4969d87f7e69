"""Asynchronous against synchronous alignment of a tiny model, with the same amount of feedback: time and reward.

python studies/asynchronous.py run --seeds 0 1 2 3 4
python studies/asynchronous.py table

`run` adds to `docs/studies/asynchronous.jsonl`; what is there is not run again. A run uses as many cores as it has
workers, and one more.
The reward counts letters, so that it is clear what is learned. Every run gets the same number of answers scored. Sides
take turns within each seed, so that what else the machine does meets all of them alike. On a machine with one free core
the processes only take turns, and nothing can be gained: the table says how many cores there were and how busy.
"""

import argparse
import json
import os
import resource
import tempfile
import time
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from scipy import stats

from plaudit.configs.align import AlignConfig
from plaudit.data.records import PromptRecord
from plaudit.data.vocabulary import train_tokenizer
from plaudit.training.align import TrainingResult, main
from plaudit.training.trackers import read_metrics

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "studies" / "asynchronous.jsonl"
WARM = 6
"""Iterations before the clock counts: workers are still starting."""
WORDS = ("the", "a", "cat", "dog", "sat", "ran", "on", "mat", "why", "is", "it", "so")
PROMPTS = [PromptRecord(prompt=f"{one} {two}") for one in WORDS[:6] for two in WORDS[6:12]]
PER_ITERATION = 64
"""Answers in an iteration, eight to a prompt."""
ROUTES: dict[str, dict[str, Any]] = {
    "by turns": {},
    "1 worker, staleness ≤ 1": {"asynchronous": {"workers": 1, "max_staleness": 1}},
    "2 workers, staleness ≤ 2": {"asynchronous": {"workers": 2, "max_staleness": 2}},
    "3 workers, staleness ≤ 3": {"asynchronous": {"workers": 3, "max_staleness": 3}},
    "3 workers, staleness ≤ 12": {"asynchronous": {"workers": 3, "max_staleness": 12}},
    "3 workers, staleness ≤ 12, not weighed": {"asynchronous": {"workers": 3, "max_staleness": 12}, "cap": None},
}


def letters(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """The share of small Latin letters in an answer, times 5; an untrained model writes about one in ten."""
    return [5 * sum("a" <= each <= "z" for each in text) / max(1, len(text)) for text in completions]


def processor_seconds(who: int) -> float:
    """Of this process, or of those that it has started and seen end."""
    usage = resource.getrusage(who)
    return usage.ru_utime + usage.ru_stime


def run(route: dict[str, Any], seed: int, settings: argparse.Namespace, tokenizer: str) -> dict[str, float]:
    """One run; what the last quarter of its iterations earned, and where the time went."""
    options = dict(route)
    cap = options.pop("cap", 2.0)
    algorithm = {"name": "rloo", "view": "token", "importance_cap": 2.0, "kl_coefficient": 0.02}
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    with tempfile.TemporaryDirectory() as folder:
        config = AlignConfig.model_validate(
            {
                "model": {
                    "model_type": "llama",
                    "backbone_config": sizes | {"num_key_value_heads": 4},
                    "tokenizer": tokenizer,
                    "template": "raw",
                },
                "output": folder,
                "prompts_per_iteration": PER_ITERATION // 8,
                "samples_per_prompt": 8,
                "iterations": settings.iterations,
                "sampling": {"max_new_tokens": settings.new_tokens},
                "missing_end_penalty": 0.0,
                "algorithm": algorithm,
                "optimizer": {"learning_rate": settings.rate},
                "save_every": None,
                "evaluate_every": None,
                "seed": seed,
                "quiet": True,
            }
            | options
        )
        if cap is None:  # a configuration refuses this for good reasons; here it is the control
            plain = config.algorithm.model_copy(update={"importance_cap": None})
            config = config.model_copy(update={"algorithm": plain})
        begun = time.perf_counter()
        used = [processor_seconds(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        result = main(config, prompts=PROMPTS, reward=letters)
        assert isinstance(result, TrainingResult)
        seconds = time.perf_counter() - begun
        spent = [processor_seconds(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        lines = read_metrics(Path(folder) / "metrics.jsonl")
    late, steady = lines[-max(1, len(lines) // 4) :], lines[WARM:]
    return {
        "first": lines[0]["reward/mean"],
        "reward": mean(line["reward/mean"] for line in late),
        "staleness": mean(line.get("workers/staleness", 0.0) for line in lines),
        "seconds": seconds,
        "learner": spent[0] - used[0],
        "workers": spent[1] - used[1],
        "iteration": mean(line["time/iteration"] for line in steady),
        "waiting": mean(line.get("workers/wait", line.get("time/generation", 0.0)) for line in steady),
        "until": seconds_until(lines),
        "weighed": mean(line.get("policy/importance_mean", 1.0) for line in lines),
    }


def seconds_until(lines: list[dict[str, Any]], wanted: float = 3.0) -> float | None:
    """Wall-clock seconds of the iterations up to the first four in a row that earn `wanted`; None if none do."""
    earned = [line["reward/mean"] for line in lines]
    for end in range(4, len(lines) + 1):
        if mean(earned[end - 4 : end]) >= wanted:
            return sum(line["time/iteration"] for line in lines[:end])
    return None


def arguments_of() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("run", "table"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--iterations", type=int, default=30)
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--rate", type=float, default=4e-3)
    parser.add_argument("--only", nargs="+", default=list(ROUTES))
    return parser.parse_args()


COLUMNS = (
    "sampling",
    "seeds",
    "first reward",
    "reward at the end",
    "mean staleness",
    "answers a second",
    "times those of by turns",
    "seconds an iteration",
    "of them waiting for answers",
    "seconds until 3.0",
    "CPU seconds a run: learner",
    "workers",
)


def table(found: dict[str, list[dict[str, Any]]]) -> str:
    """Means over seeds as a Markdown table."""
    lines = [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    alone = {each["seed"]: each["iteration"] for each in found.get("by turns", [])}
    for name, runs in found.items():
        averages = {
            key: mean(each[key] for each in runs)
            for key in ("first", "staleness", "iteration", "waiting", "learner", "workers")
        }
        faster = [alone[each["seed"]] / each["iteration"] for each in runs if each["seed"] in alone]
        arrived = [each["until"] for each in runs if each.get("until") is not None]
        cells = [name, str(len(runs)), f"{averages['first']:.2f}", interval([each["reward"] for each in runs])]
        cells += [f"{averages['staleness']:.2f}", f"{PER_ITERATION / averages['iteration']:.0f}", interval(faster)]
        cells += [f"{averages[key]:.2f}" for key in ("iteration", "waiting")]
        cells += [f"{mean(arrived):.1f} ({len(arrived)} of {len(runs)})" if arrived else ""]
        cells += [f"{averages[key]:.1f}" for key in ("learner", "workers")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def interval(values: list[float]) -> str:
    """Mean and half a 95 % interval by Student's t."""
    if len(values) < 2:
        return ", ".join(f"{each:.2f}" for each in values)
    half = stats.t.ppf(0.975, len(values) - 1) * stdev(values) / len(values) ** 0.5
    return f"{mean(values):.2f} ± {half:.2f}"


def rows() -> list[dict[str, Any]]:
    """The results so far."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


if __name__ == "__main__":
    chosen = arguments_of()
    if chosen.task == "table":
        loads = [each["load"] for each in rows()]
        print(
            f"{max(each['cores'] for each in rows())} cores; load {min(loads):.1f} to {max(loads):.1f}, "
            "this study's own processes included\n"
        )
        for tokens, iterations in dict.fromkeys((each["tokens"], each["iterations"]) for each in rows()):
            found = [each for each in rows() if (each["tokens"], each["iterations"]) == (tokens, iterations)]
            print(f"answers of at most {tokens} tokens, {iterations} iterations\n")
            names = dict.fromkeys(each["name"] for each in found)
            print(table({name: [each for each in found if each["name"] == name] for name in names}) + "\n")
    else:
        with tempfile.TemporaryDirectory() as place:
            train_tokenizer([" ".join(WORDS)] * 4, 300).save_pretrained(place)
            for number in chosen.seeds:
                for name in chosen.only:
                    asked: dict[str, Any] = {"name": name, "seed": number}
                    asked |= {"tokens": chosen.new_tokens, "iterations": chosen.iterations}
                    if any(asked.items() <= each.items() for each in rows()):
                        continue
                    done = asked | run(ROUTES[name], number, chosen, place)
                    line = json.dumps(done | {"load": os.getloadavg()[0], "cores": os.cpu_count()})
                    with RESULTS.open("a") as file:
                        file.write(line + "\n")
                    print(line, flush=True)

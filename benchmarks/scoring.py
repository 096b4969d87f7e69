"""Scoring, from text to numbers: Plaudit, transformers' pipeline, and a padded loop over texts sorted by length.

    python benchmarks/scoring.py [SET …] [--repetitions 5] [--data FOLDER] [--processor-time]

All read the same saved model; the benchmark fails if a score differs. The pipeline is shown at the better of two batch
sizes: one text at a time (no padding) and 16.
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import torch
from common import REPETITIONS, ROOT, alternate, median_ratio, save, table
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline
from workloads import CACHE, DATA, FILES, WORKLOADS, build_model

from plaudit.data.io import read_comparisons
from plaudit.data.records import Comparison, Message
from plaudit.models.reward_model import RewardModel

TOLERANCE = 1e-4
PLACES = 8192
SETS = {"hh": (64, 2), "fgrlhf_qa": (16, 4), "wmt_mqm": (32, 9)}
"""Prompts and completions of each."""
WAYS = ("pipeline, 1 at once", "pipeline, 16 at once", "sorted loop", "plaudit")


@dataclass(frozen=True)
class Texts:
    """What is scored: prompts with completions, and the same as whole texts in the model's own chat format."""

    records: list[Comparison]
    whole: list[str]


def choose(source: str, tokenizer: Any, data: Path, prompts: int | None = None) -> Texts:
    """The first prompts of a data set that have the wanted number of completions."""
    count, completions = SETS[source]
    found = read_comparisons(data / FILES[source], on_error="skip").records
    records = [record for record in found if len(record.completions) == completions][: prompts or count]
    return Texts(records, [text for record in records for text in whole_texts(record, tokenizer)])


def whole_texts(record: Comparison, tokenizer: Any) -> list[str]:
    """Each completion with its prompt, by the chat template."""
    turns = record.prompt if not isinstance(record.prompt, str) else (Message(role="user", content=record.prompt),)
    before = [{"role": turn.role, "content": turn.content} for turn in turns]
    return [
        tokenizer.apply_chat_template([*before, {"role": "assistant", "content": text}], tokenize=False)
        for text in record.completions
    ]


@torch.no_grad()
def sorted_loop(model: Any, tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """Scores `[C]`: texts sorted by length, padded, at most `PLACES` places at once."""
    ids = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    scores = torch.zeros(len(ids))
    batch: list[int] = []
    order = sorted(range(len(ids)), key=lambda index: -len(ids[index]))
    for place, index in enumerate(order):
        batch.append(index)
        if place + 1 == len(order) or (len(batch) + 1) * len(ids[batch[0]]) > PLACES:
            padded = tokenizer.pad({"input_ids": [ids[i] for i in batch]}, return_tensors="pt")
            scores[batch] = model(**padded, use_cache=False).logits.squeeze(-1).float()
            batch = []
    return scores


def measure(
    source: str,
    repetitions: int,
    data: Path,
    clock: Callable[[], float] = perf_counter,
    ways: Sequence[str] = WAYS,
    prompts: int | None = None,
) -> dict[str, Any]:
    """Seconds of these ways for one data set (or its first prompts), and how far their scores are from Plaudit's."""
    folder = CACHE / "scoring"
    if not (folder / "model").exists():
        folder.mkdir(parents=True, exist_ok=True)
        build_model(WORKLOADS["hh-8"], data, folder)
    model = RewardModel.from_pretrained(folder / "model").eval()
    plain = AutoModelForSequenceClassification.from_pretrained(folder / "model", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    texts = choose(source, tokenizer, data, prompts)
    classify = pipeline("text-classification", model=plain, tokenizer=tokenizer, function_to_apply="none")
    scores: dict[str, Tensor] = {}

    def piped(batch_size: int) -> None:
        # A data set as a list is what the pipeline's own batching is for.
        results = classify(texts.whole, batch_size=batch_size, add_special_tokens=False)
        scores[f"pipeline, {batch_size} at once"] = torch.tensor([result["score"] for result in results])

    def looped() -> None:
        scores["sorted loop"] = sorted_loop(plain, tokenizer, texts.whole)

    def ours() -> None:
        results = model.score([r.prompt for r in texts.records], [list(r.completions) for r in texts.records])
        scores["plaudit"] = torch.cat([result.raw for result in results])

    runs: dict[str, Callable[[], object]] = dict(
        zip(WAYS, (lambda: piped(1), lambda: piped(16), looped, ours), strict=True)
    )
    times = alternate({name: runs[name] for name in ways}, repetitions, clock=clock)
    apart = {name: (values - scores["plaudit"]).abs().max().item() for name, values in scores.items()}
    if max(apart.values()) > TOLERANCE:
        raise RuntimeError(f"{source}: scores differ: {apart}")
    return {"data": source, "completions": len(texts.whole), "seconds": times, "largest_difference": apart}


def rows(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per data set: completions per second, and how much faster Plaudit is."""
    shown = []
    for each in results:
        times, count = each["seconds"], each["completions"]
        best = min((name for name in times if "pipeline" in name), key=lambda name: statistics.median(times[name]))
        shown.append(
            {
                "data": f"{each['data']}, K = {SETS[each['data']][1]}",
                "pipeline, texts/s": count / statistics.median(times[best]),
                "its batch": best.split()[1],
                "sorted loop, texts/s": count / statistics.median(times["sorted loop"]),
                "Plaudit, texts/s": count / statistics.median(times["plaudit"]),
                "pipeline / Plaudit": median_ratio(times[best], times["plaudit"]),
                "loop / Plaudit": median_ratio(times["sorted loop"], times["plaudit"]),
                "largest difference of a score": max(each["largest_difference"].values()),
            }
        )
    return shown


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="*", default=[], metavar="SET", help=", ".join(SETS))
    parser.add_argument("--repetitions", type=int, default=REPETITIONS, help="measured runs of each")
    parser.add_argument("--data", type=Path, default=DATA, help="the folder of the preference data")
    parser.add_argument("--processor-time", action="store_true", help="by the processor's clock: for a busy machine")
    parser.add_argument("--save-as", default="scoring", help="start of names in benchmarks/results; empty: not saved")
    arguments = parser.parse_args()
    clock = process_time if arguments.processor_time else perf_counter
    for source in arguments.sets or SETS:
        found = measure(source, arguments.repetitions, arguments.data, clock)
        print(table(rows([found])), flush=True)
        if arguments.save_as:
            command = f"python benchmarks/scoring.py {source} --repetitions {arguments.repetitions}"
            command += " --processor-time" * arguments.processor_time
            print(save(f"{arguments.save_as}-{source}", command, [found]).relative_to(ROOT))


if __name__ == "__main__":
    main()

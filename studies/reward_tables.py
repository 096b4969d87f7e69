"""Tables of the studies on real data: every model beside a bag of words, and beside the one trained on all pairs."""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from plaudit.evaluation.evaluate import compare

ROOT = Path(__file__).resolve().parents[1]


def write_table(label: str, command: str, evaluations: Sequence[Any], seconds: dict[str, float], records: int) -> None:
    """Print the Markdown table and write `docs/studies/reward-models-<label>.json`."""
    compared = compare(evaluations, metrics_compared=("accuracy", "log_loss"))
    differences = {(d.first, d.second, d.metric): d.difference for d in compared}
    reference = "bag of words"
    lines = [
        "| model | accuracy | minus bag of words | log-loss | minus bag of words | calibration error | best of K "
        "| Kendall τ | seconds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    rows = []
    for one in evaluations:
        gains = {
            metric: None if found is None else (-found.value, -found.high, -found.low)
            for metric in ("accuracy", "log_loss")
            for found in (differences.get((reference, one.name, metric)),)
        }
        cells = {
            "accuracy": one.metrics["accuracy"],
            "log_loss": one.metrics["log_loss"],
            "calibration_error": one.metrics["calibration_error"],
            "best_of_k_accuracy": one.metrics["best_of_k_accuracy"],
            "kendall_tau": one.metrics["kendall_tau"],
        }
        rows.append(
            {
                "model": one.name,
                **{name: (cell.value, cell.low, cell.high) for name, cell in cells.items()},
                "minus_bag_of_words": gains,
                "seconds": seconds.get(one.name),
            }
        )
        text = [f"{cell.value:.3f} [{cell.low:.3f}, {cell.high:.3f}]" for cell in cells.values()]
        beside = ["" if gain is None else f"{gain[0]:+.3f} [{gain[1]:+.3f}, {gain[2]:+.3f}]" for gain in gains.values()]
        spent = f"{seconds[one.name]:.0f}" if one.name in seconds else ""
        row = [one.name, text[0], beside[0], text[1], beside[1], *text[2:], spent]
        lines.append(f"| {' | '.join(row)} |")
    print("\n".join(lines))
    against = against_all_pairs(evaluations)
    file = ROOT / "docs" / "studies" / f"reward-models-{label}.json"
    file.write_text(
        json.dumps(
            {
                "command": command,
                "records": records,
                "versions": {"python": sys.version.split()[0], "torch": torch.__version__},
                "rows": rows,
                "against_all_pairs": against,
            },
            indent=1,
        )
        + "\n"
    )


def against_all_pairs(evaluations: Sequence[Any]) -> list[dict[str, Any]]:
    """Print each model beside the one trained on all pairs, and its distance from chance in standard errors."""
    names = [one.name for one in evaluations]
    plain = ("pairwise, seed", "pairwise, small decoder from scratch, seed")
    reference = next((name for start in plain for name in names if name.startswith(start)), None)
    if reference is None:
        return []
    lines = [
        "",
        "| model | standard errors above chance | accuracy minus all pairs | log-loss minus all pairs "
        "| best of K minus all pairs |",
        "|---|---|---|---|---|",
    ]
    compared = ("accuracy", "log_loss", "best_of_k_accuracy")
    differences: dict[tuple[str, str], Any] = {}
    for found in compare(evaluations, metrics_compared=compared):
        if found.second == reference:
            differences[found.first, found.metric] = found.difference
        if found.first == reference:
            turned = found.difference
            differences[found.second, found.metric] = replace(
                turned, value=-turned.value, low=-turned.high, high=-turned.low
            )
    rows = []
    for one in evaluations:
        draws = torch.as_tensor(one.draws["accuracy"])
        above = (one.metrics["accuracy"].value - 0.5) / draws[draws.isfinite()].std().item()
        gains = {metric: differences.get((one.name, metric)) for metric in compared}
        rows.append(
            {
                "model": one.name,
                "standard_errors_above_chance": above,
                **{name: None if gain is None else (gain.value, gain.low, gain.high) for name, gain in gains.items()},
            }
        )
        text = [
            "" if gain is None else f"{gain.value:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]" for gain in gains.values()
        ]
        lines.append(f"| {one.name} | {above:.1f} | {' | '.join(text)} |")
    print("\n".join(lines))
    return rows

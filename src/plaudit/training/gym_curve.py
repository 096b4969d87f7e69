"""The learning curve of an agent as a table and a picture."""

from pathlib import Path

from plaudit.data.pages import csv_text, new_figure
from plaudit.training.trackers import read_metrics

COLUMNS = ("steps", "return", "return_deviation", "train_return", "train_episodes")


def write_curve(output: Path, title: str) -> None:
    """Write `curve.csv` and `curve.png` from the metrics of a run: returns of evaluations and of training."""
    entries = [row for row in read_metrics(output / "metrics.jsonl") if "train/return" in row or "eval/return" in row]
    names = ("step", "eval/return", "eval/return_deviation", "train/return", "train/episodes")
    rows = [tuple(row.get(name, "") for name in names) for row in entries]
    (output / "curve.csv").write_text(csv_text(COLUMNS, rows), encoding="utf-8")
    figure, (axes,) = new_figure(7.2, 3.6)
    played = [(row["step"], row["train/return"]) for row in entries if "train/return" in row]
    if played:
        axes.plot(*zip(*played, strict=True), linewidth=1, alpha=0.6, label="training, last 100 episodes")
    judged = [(row["step"], row["eval/return"]) for row in entries if "eval/return" in row]
    if judged:
        axes.plot(*zip(*judged, strict=True), marker="o", label="evaluation, without exploration")
    axes.set_xlabel("environment steps")
    axes.set_ylabel("return")
    axes.set_title(title)
    axes.legend(frameon=False)
    figure.savefig(output / "curve.png", dpi=120)

"""Plaudit's own training loop on a prepared folder: `plaudit.training.reward`, every service of a run included."""

import json
import sys
from pathlib import Path

from lockstep import Turns
from torch import Tensor
from workloads import training_config

import plaudit
from plaudit.data.io import read_comparisons
from plaudit.models.reward_model import RewardModel
from plaudit.training.folder import prepare_output
from plaudit.training.reward import prepare, run_steps
from plaudit.training.reward_trainer import RewardTrainer
from plaudit.training.session import Session
from plaudit.training.trackers import read_metrics


def open_run(folder: Path) -> tuple[RewardTrainer, Session]:
    """Everything up to the first step."""
    config = training_config(folder)
    records = read_comparisons(folder / "records.jsonl").records
    attention = json.loads((folder / "steps.json").read_text()).get("attention", "auto")
    model = RewardModel.from_pretrained(folder / "model", attn_implementation=attention)
    trainer, data_hash, _ = prepare(config, train=records, model=model)
    check_ids(trainer, folder)
    prepare_output(config)
    return trainer, Session(config, trainer.trained, trainer.optimizer, data_hash=data_hash)


def main(folder: Path, gradient_file: Path) -> None:
    """Train once through all steps of the folder."""
    trainer, session = open_run(folder)
    turns = Turns(shared_names(trainer.model), gradient_file)
    run_steps(trainer, session)
    metrics = read_metrics(trainer.config.output / "metrics.jsonl")
    losses = [line["loss"] for line in metrics if "loss" in line]
    turns.finish(losses, plaudit=plaudit.__version__, packed=trainer.model.packed)


def check_ids(trainer: RewardTrainer, folder: Path) -> None:
    """See that the schedule visits the folder's steps, and that every token id is the one the peers get.

    Raises:
        RuntimeError: if not; the comparison would mean nothing.
    """
    settings = json.loads((folder / "steps.json").read_text())
    tokenised = trainer.train.tokenised
    count = len(settings["steps"])
    for step, expected in zip(tokenised.schedule(trainer.config).steps(0, count), settings["steps"], strict=True):
        groups = [tokenised.groups[index] for index in step.indices]
        ids = sorted(
            [*block.prefix, *completion] for g in groups for block in g.blocks for completion in block.completions
        )
        if ids != sorted(row for group in expected for row in group["rows"]):
            raise RuntimeError(f"step {step.number} does not hold the ids that the peers are given")


def shared_names(model: RewardModel) -> dict[str, Tensor]:
    """The model's parameters under the names that every worker uses."""
    return {name.removeprefix("backbone."): value for name, value in model.named_parameters()}


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[-1]))

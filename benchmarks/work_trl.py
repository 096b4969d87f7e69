"""TRL's RewardTrainer on a prepared folder, in TRL's own environment: nothing of its training step is replaced.

At its fair best: token ids made beforehand, its own collator, float32, no gradient checkpointing, no evaluation, no
saving, no logging during the steps, its default optimizer (fused AdamW).
"""

import json
import sys
from pathlib import Path
from typing import Any

import transformers
import trl
from datasets import Dataset
from lockstep import Turns
from peer_model import TRAINER, exploded_pairs, load, shared_names
from transformers import AutoTokenizer
from trl import RewardConfig, RewardTrainer


class LossKeepingTrainer(RewardTrainer):  # type: ignore[misc]
    """Keeps the losses; the step itself is untouched."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """The loss that TRL computes, remembered."""
        loss = super().compute_loss(*args, **kwargs)
        self.kept.append((loss[0] if isinstance(loss, tuple) else loss).detach())
        return loss


def main(folder: Path, gradient_file: Path) -> None:
    """Train once through all steps of the folder."""
    settings = json.loads((folder / "steps.json").read_text())
    workload, steps = settings["workload"], settings["steps"]
    accumulate = workload["pairs"] // workload["peer_pairs"]
    model = load(folder)
    arguments = RewardConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=workload["peer_pairs"],
        gradient_accumulation_steps=accumulate,
        max_steps=len(steps),
        learning_rate=settings["learning_rate"],
        max_length=None,
        train_sampling_strategy="sequential",
        use_cpu=settings["changes"].get("device", "cpu") == "cpu",
        **TRAINER,
    )
    tokenizer = AutoTokenizer.from_pretrained(folder / ("backbone" if (folder / "backbone").exists() else "model"))
    trainer = LossKeepingTrainer(model=model, args=arguments, train_dataset=elements(steps), processing_class=tokenizer)
    trainer.kept = []
    turns = Turns(shared_names(model), gradient_file)
    trainer.train()
    losses = [
        sum(loss.item() for loss in trainer.kept[start : start + accumulate]) / accumulate
        for start in range(0, len(trainer.kept), accumulate)
    ]
    turns.finish(losses, trl=trl.__version__, transformers=transformers.__version__)


def elements(steps: list[list[dict[str, Any]]]) -> Dataset:
    """Every pair of every step as an element of TRL's data."""
    pairs = [pair for step in exploded_pairs(steps) for pair in step]
    return Dataset.from_dict({"chosen_ids": [better for better, _ in pairs], "rejected_ids": [w for _, w in pairs]})


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[-1]))

"""TRL's `GRPOTrainer` or `RLOOTrainer` on a prepared folder, in TRL's own environment; its step is not replaced.

At its fair best: float32, all answers of an iteration in one forward pass, its fused head, no gradient checkpointing,
no logging of completions, no evaluation, no saving, its default optimizer (fused AdamW).

With `--keep` it takes one step only, from weights that have moved away from the reference, and keeps what it saw:
answers, rewards, advantages, loss and gradient.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset
from lockstep import Turns
from peer_model import TRAINER, move_weights
from phases import Phases
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

KEPT = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "rewards", "advantages", "loss")


def main(folder: Path, algorithm: str, keep: Path | None = None) -> None:
    """Train once through all iterations of the folder; or one step, and keep it in a file."""
    settings = json.loads((folder / "settings.json").read_text())
    config, trainer_class = {"grpo": (GRPOConfig, GRPOTrainer), "rloo": (RLOOConfig, RLOOTrainer)}[algorithm]
    more: dict[str, Any] = {"loss_type": "grpo", "use_bias_correction_kl": False} if algorithm == "grpo" else {}
    arguments = config(
        output_dir=str(folder / f"trl-{algorithm}"),
        per_device_train_batch_size=settings["prompts"] * settings["samples"],
        num_generations=settings["samples"],
        max_completion_length=settings["new_tokens"],
        max_steps=1 if keep else settings["iterations"],
        beta=settings["kl_coefficient"],
        learning_rate=settings["learning_rate"],
        temperature=1.0,
        shuffle_dataset=False,
        use_cpu=settings["device"] == "cpu",
        **TRAINER,
        **more,
    )
    phases = Phases(device=settings["device"])
    kept: dict[str, Any] = {}

    class Timed(trainer_class):  # type: ignore[misc, valid-type]
        """Counts the tokens; the step itself is untouched."""

        def _generate(self, *args: Any, **kwargs: Any) -> Any:
            found = super()._generate(*args, **kwargs)
            phases.sampled(sum(map(len, found[1])))
            return found

        def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Any:
            kept["rewards"] = super()._calculate_rewards(*args, **kwargs)
            return kept["rewards"]

        def _compute_loss(self, model: Any, inputs: Any) -> Any:
            loss = super()._compute_loss(model, inputs)
            kept["loss"] = loss.detach()
            return loss

        def _generate_and_score_completions(self, inputs: Any) -> Any:
            found = super()._generate_and_score_completions(inputs)
            kept.update(found)  # the rows are shuffled behind this
            return found

    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    trainer = Timed(
        model=model,
        reward_funcs=str(folder / "reward"),
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": settings["texts"]}),
        processing_class=AutoTokenizer.from_pretrained(folder / "model", padding_side="left"),
    )
    if keep is not None:
        move_weights(trainer.model)

        def gradients(*_: object) -> None:
            found = {name: parameter.grad.clone() for name, parameter in trainer.model.named_parameters()}
            torch.save({name: kept[name] for name in KEPT} | {"gradients": found}, keep)

        register_optimizer_step_pre_hook(gradients)
        trainer.train()
        return
    phases.wrap(trainer, "_generate", "generation")
    phases.wrap(trainer, "_calculate_rewards", "scoring")
    # The same method serves old and reference log-probabilities (without gradient) and the update.
    phases.wrap(trainer, "_get_per_token_logps_and_entropies", "evaluation", when=lambda: not torch.is_grad_enabled())
    turns = Turns({}, on_step=phases.end)
    trainer.train()
    turns.finish([], phases=phases.steps, tokens=phases.tokens, trl=trl.__version__)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[4]) if sys.argv[3] == "--keep" else None)

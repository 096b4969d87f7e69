"""Plaudit's own alignment loop on a prepared folder: `plaudit.training.align`, every service of a run included."""

import json
import sys
from pathlib import Path

from lockstep import Turns
from phases import Phases

import plaudit
from plaudit.configs.align import AlignConfig
from plaudit.data.records import PromptRecord
from plaudit.models.reward_model import RewardModel
from plaudit.rewards.model import ModelReward
from plaudit.rollout import text_rollout
from plaudit.rollout.generate import GenerationResult
from plaudit.training import align


def align_config(folder: Path, algorithm: str) -> AlignConfig:
    """The run that a prepared folder asks for; RLOO with TRL's clip, so that the two have the same loss."""
    settings = json.loads((folder / "settings.json").read_text())
    clip = {"surrogate": "clip"} if algorithm == "rloo" else {}
    return AlignConfig.model_validate(
        {
            "model": {"backbone": str(folder / "model"), "template": "raw"},
            "device": settings["device"],
            "algorithm": {"name": algorithm, "kl_coefficient": settings["kl_coefficient"], **clip},
            "missing_end_penalty": 0.0,
            "prompts_per_iteration": settings["prompts"],
            "samples_per_prompt": settings["samples"],
            "iterations": settings["iterations"],
            "sampling": {"max_new_tokens": settings["new_tokens"]},
            "optimizer": {
                "learning_rate": settings["learning_rate"],
                "weight_decay": 0.0,
                "schedule": "constant",
                "warmup": 0,
                "max_gradient_norm": 1e6,
            },
            "save_every": None,
            "output": folder / f"plaudit-{algorithm}",
            "overwrite": True,
            "quiet": True,
        }
    )


def main(folder: Path, algorithm: str) -> None:
    """Train once through all iterations of the folder."""
    settings, config = json.loads((folder / "settings.json").read_text()), align_config(folder, algorithm)
    phases = Phases(device=settings["device"])
    sample = text_rollout.sample_answers

    def counted(*args: object, **kwargs: object) -> tuple[GenerationResult, list[object]]:
        found = sample(*args, **kwargs)  # type: ignore[arg-type]
        phases.sampled(found[0].num_tokens)
        return found  # type: ignore[return-value]

    text_rollout.sample_answers = counted  # type: ignore[assignment]
    phases.wrap(text_rollout, "sample_answers", "generation")
    phases.wrap(ModelReward, "__call__", "scoring")
    phases.wrap(text_rollout, "_evaluated", "evaluation")
    turns = Turns({}, on_step=phases.end)
    align.main(
        config,
        prompts=[PromptRecord(prompt=text) for text in settings["texts"]],
        reward=RewardModel.from_pretrained(folder / "reward"),
    )
    turns.finish([], phases=phases.steps, tokens=phases.tokens, plaudit=plaudit.__version__)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])

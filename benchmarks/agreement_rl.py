"""Whether Plaudit makes of a batch that TRL kept what TRL made of it: rewards, advantages, loss and gradient.

The policy has moved away from the reference, so the divergence counts. The answers are TRL's; everything else is what
`plaudit.training.align` does with them.
"""

from pathlib import Path
from typing import Any

import torch
from peer_model import move_weights
from torch import Tensor

from plaudit.algorithms.build import build_algorithm
from plaudit.algorithms.updating import PolicyGradient
from plaudit.configs.align import AlignConfig
from plaudit.data.records import PromptRecord
from plaudit.models.causal_lm import CausalLM
from plaudit.models.policy import LanguagePolicy, ReferencePolicy
from plaudit.models.reward_model import RewardModel
from plaudit.rewards.base import Sample, Score, score_values
from plaudit.rewards.model import ModelReward
from plaudit.rollout.generate import GenerationResult
from plaudit.rollout.stopping import decode
from plaudit.rollout.text_policy import TextPolicy
from plaudit.rollout.text_rollout import collect_text


def agreement(folder: Path, kept_file: Path, config: AlignConfig) -> dict[str, float]:
    """Largest differences between what TRL kept and what Plaudit finds.

    Args:
        folder: as `against_trl_rl.prepare` writes it.
        kept_file: what `work_trl_rl.py --keep` wrote.
        config: Plaudit's run.

    Returns:
        `rewards` (as each tool scores by itself, difference over TRL's spread), and `advantages`, `loss`, `gradient`
        where both have TRL's rewards: differences over the largest entry, that of the loss as it is, since without a
        divergence in it the loss is 0 up to rounding.
    """
    kept = torch.load(kept_file, weights_only=True, map_location="cpu")
    model = CausalLM.from_pretrained(folder / "model").eval()
    reference = ReferencePolicy(model)
    move_weights(model.model)
    answers = answers_of(kept, model, config.samples_per_prompt)
    prompts = [PromptRecord(prompt=decode(model.tokenizer, ids)) for ids in answers.prompt_ids]
    theirs = kept["rewards"].flatten()
    found: dict[str, Tensor] = {}

    def reward(samples: list[Sample]) -> Score:
        found["rewards"] = ModelReward(RewardModel.from_pretrained(folder / "reward"))(samples).total
        return score_values(samples, theirs.tolist(), name="kept")

    policy = TextPolicy(LanguagePolicy(model), temperature=config.sampling.temperature)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    experience = collect_text(
        policy,
        reward,
        prompts,
        answers.prompt_ids,
        sampling=config.sampling,
        samples_per_prompt=config.samples_per_prompt,
        reference=reference,
        generated=answers,
    )
    algorithm = build_algorithm(config.algorithm, policy, optimizer)
    assert isinstance(algorithm, PolicyGradient)
    prepared = algorithm.prepare(experience.trajectory)
    (rows,) = algorithm.minibatches(prepared)
    metrics = algorithm.step(prepared, rows)
    loss = metrics["policy/loss"] + config.algorithm.kl_coefficient * metrics.get("policy/kl_loss", 0.0)
    first = prepared.advantages[:, 0]
    gradients = {name: p.grad for name, p in model.model.named_parameters() if p.grad is not None}
    return {
        "rewards": float((found["rewards"] - theirs).abs().max() / theirs.std()),
        "advantages": relative(first, kept["advantages"]),
        "loss": abs(loss - float(kept["loss"])),
        "loss_value": float(kept["loss"]),
        "gradient": relative_gradient(gradients, kept["gradients"]),
    }


def answers_of(kept: dict[str, Any], model: CausalLM, samples: int) -> GenerationResult:
    """TRL's answers, padding gone, as Plaudit's own."""
    ids = [row[mask.bool()].tolist() for row, mask in zip(kept["completion_ids"], kept["completion_mask"], strict=True)]
    prompts = [row[mask.bool()].tolist() for row, mask in zip(kept["prompt_ids"], kept["prompt_mask"], strict=True)]
    end = model.tokenizer.eos_token_id
    return GenerationResult(
        prompt_ids=prompts[::samples],
        prompt_index=[row // samples for row in range(len(ids))],
        sample_index=[row % samples for row in range(len(ids))],
        token_ids=ids,
        logprobs=[[0.0] * len(row) for row in ids],
        behaviour_logprobs=[[0.0] * len(row) for row in ids],
        finished=[row[-1] == end for row in ids],
        text=[decode(model.tokenizer, row) for row in ids],
    )


def relative(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference of an entry over the largest entry."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


def relative_gradient(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The same over all parameters.

    Raises:
        ValueError: if the two do not have the same parameters.
    """
    if ours.keys() != theirs.keys():
        raise ValueError(f"parameters of one side alone: {sorted(ours.keys() ^ theirs.keys())}")
    largest = max(float(gradient.abs().max()) for gradient in theirs.values())
    return max(float((ours[name] - theirs[name]).abs().max()) for name in theirs) / largest

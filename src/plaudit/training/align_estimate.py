"""What an alignment run would need, from one small batch of answers."""

import sys
import time
from dataclasses import dataclass

import torch

from plaudit.algorithms.acer_text import AcerText
from plaudit.algorithms.base import Prepared
from plaudit.algorithms.feudal_text import FeudalText, manager_loss
from plaudit.configs.acer import AcerTextConfig
from plaudit.configs.align import AlignConfig
from plaudit.rewards.normalise import without_updates
from plaudit.rollout.text_action_values import TextActionValues
from plaudit.rollout.text_rollout import Experience, collect_text
from plaudit.rollout.trajectory import Trajectory
from plaudit.training.align_job import AlignJob
from plaudit.training.doctor import total_memory
from plaudit.training.estimates import BYTES_PER_OPTIMIZER_STATE, size_text
from plaudit.training.progress import duration_text

TRIAL_PROMPTS = 4


@dataclass(frozen=True, kw_only=True)
class AlignEstimate:
    """What a run would need.

    Attributes:
        prompts: prompts to learn on.
        answers: answers sampled in the whole run.
        critic_first: of those, the answers from which the critic alone learns.
        parameters: of policy and critic, `trainable` of them trained.
        state_bytes: weights, reference, gradients and optimizer state: computed.
        replay_bytes: answers that are remembered, with their distributions: computed.
        seconds: for all iterations, from one small batch that was sampled, scored and put through the network.
    """

    prompts: int
    answers: int
    critic_first: int
    parameters: int
    trainable: int
    state_bytes: int
    replay_bytes: int
    seconds: float

    def print(self) -> None:
        """Print the estimate to the standard output, one fact a line."""
        remembered = f"                 + {size_text(self.replay_bytes)} for remembered answers"
        alone = f", the first {self.critic_first:,} for the critic alone" if self.critic_first else ""
        lines = [
            f"prompts          {self.prompts:,}",
            f"answers          {self.answers:,} in the whole run{alone}",
            f"parameters       {self.parameters:,}, {self.trainable:,} of them trained",
            f"memory           {size_text(self.state_bytes)} for weights, reference and optimizer (computed)",
            *([remembered] if self.replay_bytes else []),
            f"time             about {duration_text(self.seconds)} (from one small batch; evaluation not included)",
        ]
        sys.stdout.write("\n".join(lines) + "\n")


def estimate_alignment(job: AlignJob) -> AlignEstimate:
    """Sample, score and evaluate a few prompts, run a backward pass, and reckon from that; no weight moves."""
    config, algorithm = job.config, job.algorithm
    count = min(TRIAL_PROMPTS, len(job.prompts))
    started = time.perf_counter()
    with job.autocast(), without_updates(job.reward):
        found = collect_text(
            job.text_policy,
            job.reward,
            job.prompts[:count],
            job.prompt_ids[:count],
            sampling=config.sampling,
            samples_per_prompt=config.samples_per_prompt,
            reference=job.reference,
            greedy_baselines=algorithm.needs_greedy,
        )
        trajectory = found.trajectory
        # What feudal networks reckon before their steps is a pass of the manager over the states of all answers.
        prepared = _manager_columns(job, found)
        stepping = time.perf_counter()
        for part in job.text_policy.micro_batches(trajectory):
            _judged(job, trajectory.select(part)).backward()  # type: ignore[no-untyped-call]
        if prepared is not None:
            _manager_judged(job, prepared).backward()  # type: ignore[no-untyped-call]
    now = time.perf_counter()
    job.trained.zero_grad(set_to_none=True)
    batch = stepping - started + config.algorithm.passes * (now - stepping)
    parameters = list(job.trained.parameters())
    trainable = [each for each in parameters if each.requires_grad]
    held = parameters + list(job.reference.parameters())
    if (learner := _action_values(job)) is not None and learner.average is not None:
        held += list(learner.average.parameters())
    each_iteration = config.prompts_per_iteration * config.samples_per_prompt
    return AlignEstimate(
        prompts=len(job.prompts),
        answers=config.iterations * each_iteration,
        critic_first=(getattr(config.algorithm, "critic_warmup", None) or 0) * each_iteration,
        parameters=sum(each.numel() for each in parameters),
        trainable=sum(each.numel() for each in trainable),
        state_bytes=sum(each.numel() * each.element_size() for each in held)
        + sum(
            each.numel() * (each.element_size() + BYTES_PER_OPTIMIZER_STATE[config.optimizer.name])
            for each in trainable
        ),
        replay_bytes=replay_bytes(config, job.policy.language_model.head[0].shape[0]),
        seconds=config.iterations * config.prompts_per_iteration / count * batch,
    )


def _action_values(job: AlignJob) -> TextActionValues | None:
    """What ACER learns with; None for other algorithms."""
    learner = job.algorithm.policy if isinstance(job.algorithm, AcerText) else None
    return learner if isinstance(learner, TextActionValues) else None


def _judged(job: AlignJob, trajectory: Trajectory) -> torch.Tensor:
    """A number that depends on all that an update puts through the network."""
    if (learner := _action_values(job)) is not None:
        tables = learner.tables(trajectory)
        return tables.logprobs.sum() + tables.action_values.sum()
    evaluation = job.text_policy.evaluate(trajectory)
    return evaluation.logprobs.sum() + evaluation.values.sum()


def _manager_columns(job: AlignJob, found: Experience) -> Prepared | None:
    """The batch with what a feudal network's manager learns from; None for other algorithms."""
    if not isinstance(job.algorithm, FeudalText):
        return None
    return job.algorithm.prepare(found.trajectory, baselines=found.baselines)


def _manager_judged(job: AlignJob, prepared: Prepared) -> torch.Tensor:
    """The loss of the manager's step, which comes after each of the worker's."""
    assert isinstance(job.algorithm, FeudalText)
    algorithm, mask = job.algorithm, prepared.trajectory.mask
    loss, _ = manager_loss(algorithm.policy.goals, prepared.columns, mask, config=algorithm.config)
    return loss


def replay_bytes(config: AlignConfig, vocabulary: int) -> int:
    """Bytes of the distributions that are remembered with answers, when the memory is full and answers are long."""
    algorithm = config.algorithm
    if not isinstance(algorithm, AcerTextConfig) or not algorithm.replay_ratio:
        return 0
    kept = algorithm.behaviour_tokens
    # A float32 each, in the vocabulary's order; of a part of it, its numbers too.
    each = 4 * vocabulary if kept is None or kept >= vocabulary else 12 * kept
    return algorithm.buffer_size * config.sampling.max_new_tokens * each


def check_replay(config: AlignConfig, vocabulary: int) -> None:
    """Refuse a memory of answers that this machine has no room for.

    Raises:
        ValueError: saying how much it would need, and how much with few tokens of each distribution.
    """
    needed, room = replay_bytes(config, vocabulary), total_memory()
    if room is None or needed <= room:
        return
    algorithm = config.algorithm
    assert isinstance(algorithm, AcerTextConfig)
    few = algorithm.model_copy(update={"behaviour_tokens": min(64, algorithm.behaviour_tokens or 64)})
    less = replay_bytes(config.model_copy(update={"algorithm": few}), vocabulary)
    raise ValueError(
        f"algorithm.buffer_size: {algorithm.buffer_size} remembered answers of up to {config.sampling.max_new_tokens} "
        f"tokens with distributions over {vocabulary:,} tokens need {size_text(needed)}, and this machine has "
        f"{size_text(room)}; algorithm.behaviour_tokens: {few.behaviour_tokens} would need {size_text(less)}"
    )

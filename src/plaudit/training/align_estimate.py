"""What an alignment run would need, from one small batch of answers."""

import sys
import time
from dataclasses import dataclass

from plaudit.rewards.normalise import without_updates
from plaudit.rollout.text_rollout import collect_text
from plaudit.training.align_job import AlignJob
from plaudit.training.estimates import BYTES_PER_OPTIMIZER_STATE, size_text
from plaudit.training.progress import duration_text

TRIAL_PROMPTS = 4


@dataclass(frozen=True, kw_only=True)
class AlignEstimate:
    """What a run would need.

    Attributes:
        prompts: prompts to learn on.
        answers: answers sampled in the whole run.
        parameters: of policy and critic, `trainable` of them trained.
        state_bytes: weights, reference, gradients and optimizer state: computed.
        seconds: for all iterations, from one small batch that was sampled, scored and put through the network.
    """

    prompts: int
    answers: int
    parameters: int
    trainable: int
    state_bytes: int
    seconds: float

    def print(self) -> None:
        """Print the estimate to the standard output, one fact a line."""
        lines = [
            f"prompts          {self.prompts:,}",
            f"answers          {self.answers:,} in the whole run",
            f"parameters       {self.parameters:,}, {self.trainable:,} of them trained",
            f"memory           {size_text(self.state_bytes)} for weights, reference and optimizer (computed)",
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
        updating = time.perf_counter()
        trajectory = found.trajectory
        for part in job.text_policy.micro_batches(trajectory):
            evaluation = job.text_policy.evaluate(trajectory.select(part))
            (evaluation.logprobs.sum() + evaluation.values.sum()).backward()  # type: ignore[no-untyped-call]
    now = time.perf_counter()
    job.trained.zero_grad(set_to_none=True)
    batch = updating - started + config.algorithm.passes * (now - updating)
    parameters = list(job.trained.parameters())
    trainable = [each for each in parameters if each.requires_grad]
    held = parameters + list(job.reference.parameters())
    return AlignEstimate(
        prompts=len(job.prompts),
        answers=config.iterations * config.prompts_per_iteration * config.samples_per_prompt,
        parameters=sum(each.numel() for each in parameters),
        trainable=sum(each.numel() for each in trainable),
        state_bytes=sum(each.numel() * each.element_size() for each in held)
        + sum(
            each.numel() * (each.element_size() + BYTES_PER_OPTIMIZER_STATE[config.optimizer.name])
            for each in trainable
        ),
        seconds=config.iterations * config.prompts_per_iteration / count * batch,
    )

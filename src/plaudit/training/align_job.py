"""What an alignment run works with: policy, reference, reward, algorithm, prompts; and one iteration of it."""

import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from plaudit.algorithms.base import Algorithm, Prepared
from plaudit.algorithms.feudal_text import FeudalText
from plaudit.algorithms.updating import PolicyGradient, combine_metrics
from plaudit.configs.acer import AcerTextConfig
from plaudit.configs.align import AlignConfig
from plaudit.core.kl import kl_k1
from plaudit.data.records import PromptRecord
from plaudit.models.policy import LanguagePolicy, ReferencePolicy
from plaudit.rewards.base import Reward
from plaudit.rewards.normalise import without_updates
from plaudit.rollout.engine import Engine
from plaudit.rollout.generate import GenerationResult
from plaudit.rollout.text_policy import TextPolicy
from plaudit.rollout.text_rollout import Answers, Experience, collect_text, start_values
from plaudit.rollout.trajectory import Trajectory
from plaudit.training.align_guards import Guards
from plaudit.training.messages import warn
from plaudit.training.precision import autocast
from plaudit.training.reading import RecordCounts
from plaudit.training.refresh import RewardRefresher
from plaudit.training.rollout_workers import Request, RolloutWorkers

EVALUATION_SEED = 0x5EED
"""Added to the run's seed for the answers of evaluations, which are the same draws every time."""


@dataclass
class Iteration:
    """One batch of experience on its way through the updates; all of it fits into a checkpoint.

    Attributes:
        prepared: what the algorithm learns from.
        prompt_ids: the prompts that its groups name.
        plan: rows of every optimizer step, in order.
        metrics: of the collection.
        rows: sampled texts for the log.
        tokens: sampled tokens.
        temperature: at which they were sampled.
        taken: metrics of the steps of the plan that have been taken.
        collecting: wall-clock seconds that the collection took.
        updating: wall-clock seconds of the steps taken.
    """

    prepared: Prepared
    prompt_ids: list[list[int]]
    plan: list[Tensor]
    metrics: dict[str, float]
    rows: list[dict[str, Any]]
    tokens: int
    temperature: float
    taken: list[dict[str, float]] = field(default_factory=list)
    collecting: float = 0.0
    updating: float = 0.0

    @property
    def done(self) -> int:
        """How many steps of the plan have been taken."""
        return len(self.taken)

    def state(self) -> dict[str, Any]:
        """Numbers, tensors and strings."""
        return {**vars(self), "prepared": self.prepared.state()}

    @classmethod
    def from_state(cls, state: Mapping[str, Any], device: torch.device) -> "Iteration":
        """The iteration as it was saved; checkpoints are read on the CPU, the steps go on where the policy is."""
        return cls(**{**state, "prepared": Prepared.from_state(state["prepared"]).to(device)})


@dataclass
class AlignJob:
    """The parts of one run, put together by `plaudit.training.align.prepare`.

    Attributes:
        config: of the run.
        policy: the language model that learns, with its critic.
        reference: its frozen start.
        reward: what scores answers.
        text_policy: the policy as trajectories see it.
        algorithm: what learns.
        prompts: prompts to learn on, with their token ids.
        held_out: prompts to evaluate on.
        guards: what warns.
        pending: an iteration that was broken off, or None.
        rollouts: processes that answer ahead, while an asynchronous run goes on.
        engine: samples instead of the policy itself; None where it does not.
        refresher: lets the reward model learn from judgements of the policy's answers; None where it does not.
    """

    config: AlignConfig
    policy: LanguagePolicy
    reference: ReferencePolicy
    reward: Reward
    text_policy: TextPolicy
    algorithm: Algorithm
    prompts: list[PromptRecord]
    prompt_ids: list[list[int]]
    held_out: list[PromptRecord]
    held_out_ids: list[list[int]]
    device: torch.device
    guards: Guards
    pending: Iteration | None = None
    rollouts: RolloutWorkers | None = None
    engine: Engine | None = None
    refresher: RewardRefresher | None = None

    @property
    def trained(self) -> nn.Module:
        """Everything with weights that move."""
        return self.policy

    @property
    def takes_one_step(self) -> bool:
        """Whether one optimizer step learns from a batch: then its forward pass is that of the experience."""
        settings = self.config.algorithm
        return isinstance(self.algorithm, PolicyGradient | FeudalText) and settings.passes * settings.least_prompts == 1

    def autocast(self) -> AbstractContextManager[object]:
        """The precision of the run."""
        return autocast(self.device, self.config.precision)

    def chosen_prompts(self, iteration: int) -> list[int]:
        """The prompts of an iteration: passes over all of them, each in an order of its own."""
        size, count = self.config.prompts_per_iteration, len(self.prompts)
        places = range(iteration * size, (iteration + 1) * size)
        orders = {epoch: self._order(epoch).tolist() for epoch in {place // count for place in places}}
        return [orders[place // count][place % count] for place in places]

    def generator(self, purpose: str, iteration: int) -> torch.Generator:
        """A stream of random numbers for one purpose in one iteration: nothing of it has to be saved."""
        number = ("order", "answers", "minibatches").index(purpose)
        words = np.random.SeedSequence([self.config.seed, number, iteration]).generate_state(1, np.uint64)
        return torch.Generator().manual_seed(int(words[0]) % 2**63)

    def collect(self, iteration: int) -> Iteration:
        """Sample, score, evaluate, and make the plan of the updates."""
        started = time.perf_counter()
        config, chosen = self.config, self.chosen_prompts(iteration)
        temperature = config.temperature(iteration)
        self.text_policy.temperature = temperature
        generated, asynchronous = self.take_answers(iteration)
        with self.autocast():
            found = collect_text(
                self.text_policy,
                self.reward,
                [self.prompts[index] for index in chosen],
                [self.prompt_ids[index] for index in chosen],
                sampling=config.sampling.model_copy(update={"temperature": temperature}),
                samples_per_prompt=config.samples_per_prompt,
                reference=self.reference,
                missing_end_penalty=config.missing_end_penalty,
                greedy_baselines=self.algorithm.needs_greedy,
                generator=self.generator("answers", iteration),
                generated=generated,
                differentiable=self.takes_one_step,
            )
        found = start_values(self.text_policy, found, discount=config.algorithm.discount)
        trajectory, prompt_ids = found.trajectory.to(self.device), found.prompt_ids
        if isinstance(config.algorithm, AcerTextConfig):
            # Answers of other iterations are learned from beside these: prompts go by their place among all.
            trajectory, prompt_ids = self._among_all_prompts(trajectory, chosen), self.prompt_ids
            self.text_policy.prompts = prompt_ids
        with self.autocast():  # some put the answers through the network once more
            prepared = self.algorithm.prepare(trajectory, baselines=found.baselines)
        plan = self.algorithm.minibatches(prepared, self.generator("minibatches", iteration))
        if found.evaluation is not None and _takes_all(plan, prepared, trajectory):
            prepared = replace(prepared, evaluation=found.evaluation)
        metrics = {**experience_metrics(found, "objective"), **prepared.metrics}
        metrics |= found.answers.score.metrics("reward")
        if self.policy.language_model.steering is not None:
            metrics |= self.policy.language_model.steering.metrics()
        metrics |= {f"time/{name}": seconds for name, seconds in found.seconds.items()} | asynchronous
        if config.final_temperature is not None:
            metrics["temperature"] = temperature
        rows = sample_rows(found.answers, config.samples_logged)
        tokens = found.answers.generation.num_tokens
        collecting = time.perf_counter() - started
        return Iteration(prepared, prompt_ids, plan, metrics, rows, tokens, temperature, collecting=collecting)

    def take_answers(self, iteration: int) -> tuple[GenerationResult | None, dict[str, float]]:
        """The answers that something else has sampled for an iteration; None where the policy itself samples."""
        if self.engine is not None:
            return self.answers_of_engine(self.engine, iteration)
        if self.rollouts is None:
            return None, {}
        self.ask_ahead()
        return self.rollouts.take(iteration)

    def answers_of_engine(self, engine: Engine, iteration: int) -> tuple[GenerationResult, dict[str, float]]:
        """Hand the weights over and have the prompts of an iteration answered, with the time of both."""
        started, model = time.perf_counter(), self.policy.language_model
        engine.load_weights(model.model.state_dict().items())
        found = engine.generate(
            [self.prompt_ids[index] for index in self.chosen_prompts(iteration)],
            samples_per_prompt=self.config.samples_per_prompt,
            sampling=self.config.sampling.model_copy(update={"temperature": self.config.temperature(iteration)}),
            end_token_ids=model.end_token_ids,
            generator=self.generator("answers", iteration),
        )
        return found, {"time/generation": time.perf_counter() - started}

    def ask_ahead(self) -> None:
        """Ask workers for the answers of every iteration that may be begun now."""
        assert self.rollouts is not None
        for iteration in self.rollouts.wanted(self.config.iterations):
            sampling = self.config.sampling.model_copy(update={"temperature": self.config.temperature(iteration)})
            prompt_ids = [self.prompt_ids[index] for index in self.chosen_prompts(iteration)]
            state = self.generator("answers", iteration).get_state()
            size = self.config.samples_per_prompt
            self.rollouts.ask(Request(iteration, prompt_ids, size, sampling, state, self.config.max_rows))

    def publish(self, updates: int) -> None:
        """Let workers go on with the weights after so many updates."""
        if self.rollouts is not None:
            self.rollouts.publish(self.policy.language_model, updates)
            self.ask_ahead()

    def take_step(self, iteration: Iteration) -> bool:
        """The next optimizer step of the plan; False if the algorithm wants no further one on this batch."""
        started = time.perf_counter()
        self.text_policy.prompts, self.text_policy.temperature = iteration.prompt_ids, iteration.temperature
        with self.autocast():
            found = self.algorithm.step(iteration.prepared, iteration.plan[iteration.done])
        iteration.taken.append(found)
        iteration.updating += time.perf_counter() - started
        return not self.algorithm.stop_early(found)

    def finish(self, iteration: Iteration) -> dict[str, float]:
        """Adapt what is adapted; the metrics of the whole iteration, with its time before and after a break."""
        seconds = {
            "time/update": iteration.updating,
            "time/iteration": iteration.collecting + iteration.updating,
        }
        return self.algorithm.finish({**iteration.metrics, **combine_metrics(iteration.taken)}) | seconds

    def evaluate(self, iteration: int) -> dict[str, float]:
        """Reward, divergence, entropy and length on the held-out prompts, by the same random numbers every time.

        Args:
            iteration: whose temperature is taken.
        """
        config = self.config
        self.text_policy.temperature = config.temperature(iteration)
        with self.autocast(), without_updates(self.reward):
            found = collect_text(
                self.text_policy,
                self.reward,
                self.held_out,
                self.held_out_ids,
                sampling=config.sampling.model_copy(update={"temperature": self.text_policy.temperature}),
                samples_per_prompt=config.evaluation_samples,
                reference=self.reference,
                missing_end_penalty=config.missing_end_penalty,
                generator=torch.Generator().manual_seed(config.seed + EVALUATION_SEED),
            )
        return {**found.answers.score.metrics("reward"), **experience_metrics(found, "objective")}

    def save_model(self, folder: Path) -> None:
        """Write the aligned model as a plain transformers folder, with what steers it beside it."""
        self.policy.language_model.save_pretrained(folder)

    def state_dict(self) -> dict[str, Any]:
        """What the run has besides weights, optimizer and random numbers."""
        reward = getattr(self.reward, "state_dict", dict)
        return {
            "algorithm": self.algorithm.state_dict(),
            "reward": reward(),
            "guards": self.guards.state_dict(),
            "pending": None if self.pending is None else self.pending.state(),
            "refresher": None if self.refresher is None else self.refresher.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.algorithm.load_state_dict(state["algorithm"])
        # A reward that is handed over is no part of the configuration, whose changes are noticed elsewhere.
        if bool(state["reward"]) != bool(getattr(self.reward, "state_dict", dict)()):
            raise ValueError(
                "the reward of the saved run and that of this one differ: one keeps a running state, the other none"
            )
        if state["reward"]:
            self.reward.load_state_dict(state["reward"])  # type: ignore[attr-defined]
        self.guards.load_state_dict(state["guards"])
        if self.refresher is not None:
            self.refresher.load_state_dict(state["refresher"])
        self.pending = None if state["pending"] is None else Iteration.from_state(state["pending"], self.device)

    def _among_all_prompts(self, trajectory: Trajectory, chosen: list[int]) -> Trajectory:
        """`group_ids` as places in `prompt_ids` of the job, not among the prompts of an iteration."""
        assert trajectory.group_ids is not None
        return trajectory.with_fields(group_ids=torch.tensor(chosen, device=self.device)[trajectory.group_ids])

    def _order(self, epoch: int) -> Tensor:
        return torch.randperm(len(self.prompts), generator=self.generator("order", epoch))


def _takes_all(plan: list[Tensor], prepared: Prepared, trajectory: Trajectory) -> bool:
    """Whether the plan is one step on every row and step of a trajectory, in its own order."""
    same = torch.equal(prepared.trajectory.mask, trajectory.mask)
    return same and len(plan) == 1 and torch.equal(plan[0].cpu(), torch.arange(trajectory.num_rows))


def experience_metrics(found: Experience, prefix: str) -> dict[str, float]:
    """Numbers of a batch of answers that need no algorithm.

    Returns:
        `{prefix}/kl`, `k1` from the reference in nats per answer; `/kl_per_token`; `/entropy` in nats per token;
        `/length` in tokens; `/unfinished` (a share); `/equal_groups`, the share of prompts with several valid answers
        that all earn the same (left out where there is none).
    """
    trajectory = found.trajectory
    mask, tokens = trajectory.mask, float(trajectory.mask.sum())
    divergence = kl_k1(trajectory.old_logprobs, trajectory.reference_logprobs).masked_fill(~mask, 0.0)
    metrics = {
        "kl": float(divergence.sum()) / trajectory.num_rows,
        "kl_per_token": float(divergence.sum()) / tokens,
        "entropy": float(found.entropy.masked_fill(~mask, 0.0).sum()) / tokens,
        "length": float(found.answers.lengths.mean()),
        "unfinished": found.answers.unfinished,
    }
    assert trajectory.group_ids is not None
    totals = trajectory.rewards.masked_fill(~mask, 0.0).sum(1)
    groups = [totals[trajectory.group_ids == group] for group in sorted(set(trajectory.group_ids.tolist()))]
    several = [values for values in groups if len(values) > 1]
    if several:
        metrics["equal_groups"] = sum(bool((values == values[0]).all()) for values in several) / len(several)
    return {f"{prefix}/{name}": value for name, value in metrics.items()}


def sample_rows(answers: Answers, count: int) -> list[dict[str, Any]]:
    """The first answers to the first `count` prompts as rows for people: prompt, completion, rewards, finished."""
    found, score = answers.generation, answers.score
    first = [place for place, number in enumerate(found.sample_index) if number == 0][:count]
    rows = []
    for place in first:
        sample, valid = answers.samples[place], bool(score.valid[place])
        prompt = sample.prompt if isinstance(sample.prompt, str) else [vars(turn) for turn in sample.prompt]
        parts = {name: float(part[place]) for name, part in score.parts.items() if not part[place].isnan()}
        rows.append(
            {
                "prompt": prompt,
                "completion": sample.completion,
                "reward": float(score.total[place]) if valid else None,
                "parts": parts,
                "finished": sample.finished,
            }
        )
    return rows


def fitting_prompts(
    policy: LanguagePolicy, prompts: Sequence[PromptRecord], counts: RecordCounts, config: AlignConfig
) -> tuple[list[PromptRecord], list[list[int]]]:
    """The prompts that leave room for an answer, with their token ids; the others are counted as refused.

    Raises:
        ValueError: for a prompt that leaves no room, unless `config.on_error` is `skip`; or if none is left.
    """
    tokeniser = policy.language_model.text_tokeniser(template=config.model.template)
    limit = config.sampling.max_new_tokens
    longest = policy.language_model.max_length - limit
    kept: list[PromptRecord] = []
    ids: list[list[int]] = []
    for number, record in enumerate(prompts):
        found = tokeniser.prompt(record.prompt)
        if config.model.too_long == "truncate_prompt" and longest > 1:
            found = tokeniser.cut_prompt(found, longest)
        if len(found) <= longest:
            kept.append(record)
            ids.append(found)
            continue
        if config.on_error == "refuse":
            raise ValueError(
                f"prompt {record.id or f'number {number}'} has {len(found)} tokens, and {longest} is the most that "
                f"leaves room for sampling.max_new_tokens {limit}; lower that, or on_error: skip leaves it out"
            )
        counts.refused["too long"] += 1
        counts.used -= 1
    if not kept:
        raise ValueError(f"no prompt is left to answer: {counts}")
    if cut := tokeniser.counts["prompts_truncated"]:
        dropped = tokeniser.counts["prompt_tokens_dropped"]
        warn(
            f"{cut} of {len(kept)} prompts lost tokens on the left, {dropped} in all, to leave room for "
            f"sampling.max_new_tokens {limit}"
        )
    return kept, ids

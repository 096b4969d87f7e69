"""Experience with text: answers are sampled, scored, and become a trajectory that any algorithm can learn from."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from plaudit.configs.generation import SamplingConfig
from plaudit.core.masked import masked_mean
from plaudit.core.returns import discounted_returns
from plaudit.data.records import PromptRecord
from plaudit.models.policy import ReferencePolicy
from plaudit.rewards.base import Reward, Sample, Score
from plaudit.rewards.normalise import without_updates
from plaudit.rewards.spans import token_ends, token_rewards
from plaudit.rollout.answering import as_samples, sample_answers
from plaudit.rollout.generate import GenerationResult
from plaudit.rollout.text_policy import TextPolicy
from plaudit.rollout.trajectory import Evaluation, Trajectory, new_trajectory


@dataclass(frozen=True)
class Answers:
    """Sampled answers and what they earn.

    Attributes:
        generation: `B` answers to `P` prompts.
        samples: the same as text, as the reward saw them.
        score: their rewards, before any penalty.
        seconds: wall-clock time of `generation` and `scoring`.
    """

    generation: GenerationResult
    samples: list[Sample]
    score: Score
    seconds: dict[str, float]

    @property
    def unfinished(self) -> float:
        """Share of answers that reached the token limit without an end."""
        return 1 - sum(self.generation.finished) / len(self.generation.finished)

    @property
    def lengths(self) -> Tensor:
        """`[B]` float32, tokens of each answer, its end included."""
        return torch.tensor([float(len(ids)) for ids in self.generation.token_ids])


@dataclass(frozen=True)
class Experience:
    """What an update learns from.

    Attributes:
        trajectory: `[B', T]`, the answers with a valid reward, where the policy is; `group_ids` are places in
            `prompt_ids`.
        prompt_ids: `P` prompts as token ids.
        answers: everything that was sampled, the invalid included.
        entropy: `[B', T]`, of the policy's distribution at each token.
        baselines: `[B']`, the reward of the greedy answer to the same prompt; None where it was not asked for.
        seconds: wall-clock time by phase: `generation`, `scoring`, `evaluation`.
        evaluation: what the policy says of the trajectory, with gradients; None where it was not asked for, or one pass
            does not take all rows.
    """

    trajectory: Trajectory
    prompt_ids: list[list[int]]
    answers: Answers
    entropy: Tensor
    baselines: Tensor | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    evaluation: Evaluation | None = None


def answer_prompts(
    policy: TextPolicy,
    reward: Reward,
    prompts: Sequence[PromptRecord],
    prompt_ids: Sequence[Sequence[int]],
    *,
    sampling: SamplingConfig,
    samples_per_prompt: int = 1,
    generator: torch.Generator | None = None,
    generated: GenerationResult | None = None,
) -> Answers:
    """Sample answers and score them.

    Args:
        policy: the policy.
        reward: what scores the answers, as text.
        prompts: `P` prompts; their columns reach the reward.
        prompt_ids: the same as token ids.
        sampling: how tokens are chosen.
        samples_per_prompt: `K`.
        generator: draws the seed of all answers; None takes `sampling.seed`.
        generated: answers that have been sampled already, by another process perhaps; None samples them.

    Returns:
        `P · K` answers.
    """
    started = time.perf_counter()
    if generated is None:
        found, samples = sample_answers(
            policy.policy.language_model,
            prompts,
            prompt_ids=prompt_ids,
            samples_per_prompt=samples_per_prompt,
            sampling=sampling,
            generator=generator,
            max_rows=policy.max_rows,
        )
    else:
        found, samples = generated, as_samples(generated, prompts)
    sampled = time.perf_counter()
    score = reward(samples)
    seconds = {"generation": sampled - started, "scoring": time.perf_counter() - sampled}
    return Answers(found, samples, score, seconds)


def collect_text(
    policy: TextPolicy,
    reward: Reward,
    prompts: Sequence[PromptRecord],
    prompt_ids: Sequence[Sequence[int]],
    *,
    sampling: SamplingConfig,
    samples_per_prompt: int,
    reference: ReferencePolicy | None = None,
    missing_end_penalty: float = 0.0,
    greedy_baselines: bool = False,
    generator: torch.Generator | None = None,
    generated: GenerationResult | None = None,
    differentiable: bool = False,
) -> Experience:
    """Sample, score and evaluate: one batch of experience.

    The reward stands at the last token of the whole answer, the end token where there is one; pieces that a reward
    gives for parts of an answer (`Score.spans`) stand at the tokens that complete them. The token limit is an end, not
    a truncation. Answers whose reward is invalid (or that of their greedy answer) are left out of the trajectory.

    Args:
        policy: the policy; `policy.prompts` becomes `prompt_ids`, its temperature must be that of `sampling`.
        reward, prompts, prompt_ids, sampling, samples_per_prompt, generator, generated: see `answer_prompts`.
        reference: for `reference_logprobs`; without it they equal the policy's own.
        missing_end_penalty: taken off the reward of an answer that reached the token limit.
        greedy_baselines: also answer every prompt greedily and score that.
        differentiable: keep the evaluation with its gradients, for a batch that one step learns from.

    Returns:
        The experience.

    Raises:
        ValueError: if no answer has a valid reward, or the temperatures differ.
    """
    if sampling.temperature != policy.temperature:
        raise ValueError(f"sampling at {sampling.temperature}, but the policy is evaluated at {policy.temperature}")
    policy.prompts = [list(prompt) for prompt in prompt_ids]
    answers = answer_prompts(
        policy,
        reward,
        prompts,
        prompt_ids,
        sampling=sampling,
        samples_per_prompt=samples_per_prompt,
        generator=generator,
        generated=generated,
    )
    seconds, usable, greedy = dict(answers.seconds), answers.score.valid, None
    problems = dict(answers.score.problems)
    if greedy_baselines:
        greedy, best = _greedy_rewards(policy, reward, prompts, sampling, missing_end_penalty)
        seconds = {name: value + best.seconds[name] for name, value in seconds.items()}
        problems |= best.score.problems
        usable = usable & ~greedy.isnan()[torch.tensor(answers.generation.prompt_index)]
    valid = usable.nonzero().squeeze(-1)
    if not len(valid):
        why = next(iter(problems.values()), "no reason given")
        raise ValueError(f"none of {len(answers.samples)} answers has a valid reward ({why})")
    tokenizer = policy.policy.language_model.tokenizer
    trajectory = _trajectory(answers, valid.tolist(), tokenizer, missing_end_penalty)
    assert trajectory.group_ids is not None
    baselines = None if greedy is None else greedy[trajectory.group_ids]
    started = time.perf_counter()
    device = next(policy.policy.parameters()).device
    trajectory = trajectory.to(device)
    kept = policy.evaluate_at_once(trajectory) if differentiable else None
    own = policy.evaluate_all(trajectory) if kept is None else Evaluation(*(table.detach() for table in kept))
    trajectory = _evaluated(policy, trajectory, own, reference)
    seconds["evaluation"] = time.perf_counter() - started
    return Experience(trajectory, policy.prompts, answers, own.entropy, baselines, seconds, kept)


def start_values(policy: TextPolicy, found: Experience, *, discount: float) -> Experience:
    """Let a critic whose head is still 0 begin at the mean return `b` of its first answers: its bias becomes `b`.

    At 0 it would be wrong by `b` everywhere, and an advantage with λ < 1 would hold `λⁿ b` for the step n before the
    end, whatever the answer is worth; where nothing is whitened, every sampled token would be pulled by b. AdamW, which
    moves a bias by its rate a step, needs `b / rate` steps for that. Action values begin at b for every action.

    Args:
        policy: the policy; one without a critic, or whose critic has learned, is left as it is.
        found: its first experience, with the values of a head at 0.
        discount: γ of the returns.

    Returns:
        the experience with the values that the critic has now.
    """
    whole = policy.policy
    critic = whole.critic if whole.action_values is None else whole.action_values
    if critic is None or bool(critic.head.weight.any()) or bool(critic.head.bias.any()):
        return found
    trajectory, mask = found.trajectory, found.trajectory.mask
    ends = (trajectory.continues, trajectory.truncated, mask)
    returns = discounted_returns(trajectory.rewards, torch.zeros_like(trajectory.rewards), *ends, discount=discount)
    mean = masked_mean(returns, mask)
    with torch.no_grad():
        critic.head.bias.fill_(mean)
    if whole.action_values is not None:
        # Every action begins at b; what they say of the experience is asked for when it is learned from.
        return found
    values = mean * mask
    following = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], 1)
    trajectory = trajectory.with_fields(values=values, next_values=following * trajectory.continues)
    evaluation = found.evaluation
    if evaluation is not None:
        # A value is linear in the bias: the same gradients, from values that are higher by it.
        evaluation = evaluation._replace(values=evaluation.values + values)
    return replace(found, trajectory=trajectory, evaluation=evaluation)


def _evaluated(
    policy: TextPolicy, trajectory: Trajectory, own: Evaluation, reference: ReferencePolicy | None
) -> Trajectory:
    """The trajectory with log-probabilities and values from the training forward."""
    theirs = own.logprobs if reference is None else policy.reference_logprobs(reference, trajectory)
    values = own.values.masked_fill(~trajectory.mask, 0.0)
    following = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], 1)
    return trajectory.with_fields(
        old_logprobs=own.logprobs,
        reference_logprobs=theirs,
        values=values,
        next_values=following * trajectory.continues,
    )


def _trajectory(answers: Answers, rows: list[int], tokenizer: object, missing_end_penalty: float) -> Trajectory:
    """The answers of these rows as `[B', T]`, without what needs a forward pass."""
    found, score = answers.generation, answers.score
    width = max(len(found.token_ids[row]) for row in rows)
    actions = torch.zeros(len(rows), width, dtype=torch.int64)
    behaviour, rewards, continues = (torch.zeros(len(rows), width) for _ in range(3))
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    remainder = score.remainder()
    for place, row in enumerate(rows):
        ids = found.token_ids[row]
        length = len(ids)
        actions[place, :length] = torch.tensor(ids)
        behaviour[place, :length] = torch.tensor(found.behaviour_logprobs[row])
        mask[place, :length] = True
        continues[place, : length - 1] = 1.0
        if score.spans is not None and score.spans[row]:
            rewards[place, :length] = token_rewards(
                score, row, token_ends(tokenizer, ids, answers.samples[row].completion)
            )
        else:
            rewards[place, length - 1] = remainder[row]
        if not found.finished[row]:
            rewards[place, length - 1] -= missing_end_penalty
    return new_trajectory(
        actions=actions,
        behaviour_logprobs=behaviour,
        rewards=rewards,
        continues=continues,
        mask=mask,
        group_ids=torch.tensor([found.prompt_index[row] for row in rows]),
    )


def _greedy_rewards(
    policy: TextPolicy,
    reward: Reward,
    prompts: Sequence[PromptRecord],
    sampling: SamplingConfig,
    missing_end_penalty: float,
) -> tuple[Tensor, Answers]:
    """`[P]` rewards of the greedy answers, penalty included (NaN where invalid), and the answers."""
    options = {"method": "greedy", "max_new_tokens": sampling.max_new_tokens, "stop_strings": sampling.stop_strings}
    greedy = SamplingConfig.model_validate(options)
    with without_updates(reward):
        answers = answer_prompts(policy, reward, prompts, policy.prompts, sampling=greedy)
    unfinished = ~torch.tensor(answers.generation.finished)
    return answers.score.total - missing_end_penalty * unfinished, answers

"""Answers as trajectories: where rewards stand, what is left out, and the packed evaluation against plain forwards."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from plaudit.configs.generation import SamplingConfig
from plaudit.data.records import PromptRecord
from plaudit.models.causal_lm import CausalLM
from plaudit.models.policy import Critic, LanguagePolicy, ReferencePolicy
from plaudit.rewards.base import Reward, Sample, Score, as_reward
from plaudit.rewards.normalise import PerGroup, Running, normalised
from plaudit.rollout.answering import answer_rows, sample_answers
from plaudit.rollout.text_policy import TextPolicy
from plaudit.rollout.text_rollout import Experience, answer_prompts, collect_text, start_values
from plaudit.rollout.trajectory import Trajectory
from tests.rollout.language_models import random_prompts, tiny_lm

PROMPT_IDS = random_prompts((5, 1, 9))
PROMPTS = [PromptRecord(prompt=f"p{number}", columns={"answer": number}) for number in range(len(PROMPT_IDS))]
SAMPLING = SamplingConfig(max_new_tokens=6)


@pytest.fixture(scope="module")
def model() -> CausalLM:
    """One tiny model for all tests; none of them trains it."""
    return tiny_lm()


def word_count(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    """A reward that anyone can recompute."""
    return [float(len(text.split())) for text in completions]


def collect(model: CausalLM, reward: Any = word_count, *, critic: Any = "none", **options: Any) -> Experience:
    """Three samples of each prompt."""
    policy = LanguagePolicy.build(model, critic=critic)
    text_policy = TextPolicy(policy, token_budget=options.pop("token_budget", 8192))
    scorer: Reward = as_reward(reward)
    sampling = SAMPLING.model_copy(update={"max_new_tokens": options.pop("max_new_tokens", 6)})
    samples = options.pop("samples_per_prompt", 3)
    return collect_text(
        text_policy, scorer, PROMPTS, PROMPT_IDS, sampling=sampling, samples_per_prompt=samples, **options
    )


def plain_logprobs(model: CausalLM, prompt: list[int], ids: list[int], temperature: float = 1.0) -> Tensor:
    """The model's own logits over one unpadded row."""
    hub: Any = model.model
    with torch.no_grad():
        logits: Tensor = hub(input_ids=torch.tensor([prompt + ids])).logits[0].float() / temperature
    return logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, torch.tensor(ids)[:, None])[:, 0]


def rows_of(trajectory: Trajectory) -> list[list[int]]:
    """The tokens of each row."""
    return [row[mask].tolist() for row, mask in zip(trajectory.actions, trajectory.mask, strict=True)]


def test_the_reward_stands_at_the_last_token_of_the_whole_answer(model: CausalLM) -> None:
    found = collect(model)
    trajectory = found.trajectory
    last = trajectory.mask.sum(1) - 1
    expected = torch.tensor(word_count([], [sample.completion for sample in found.answers.samples]))
    assert_close(trajectory.rewards.gather(1, last[:, None])[:, 0], expected)
    assert_close(trajectory.rewards.sum(1), expected)
    assert rows_of(trajectory) == found.answers.generation.token_ids
    ends = trajectory.mask & (trajectory.continues == 0)
    assert ends.sum(1).tolist() == [1] * 9
    assert bool(ends.gather(1, last[:, None]).all())
    assert not bool(trajectory.truncated.any()), "the token limit is an end, not a truncation"


def test_unfinished_answers_lose_the_penalty_and_only_they(model: CausalLM) -> None:
    many: dict[str, Any] = {"max_new_tokens": 40, "samples_per_prompt": 8}
    plain, penalised = collect(model, **many), collect(model, missing_end_penalty=2.5, **many)
    finished = torch.tensor(plain.answers.generation.finished)
    assert 0 < int(finished.sum()) < len(finished), "the draw must hold both kinds"
    difference = plain.trajectory.rewards.sum(1) - penalised.trajectory.rewards.sum(1)
    assert_close(difference, torch.where(finished, 0.0, 2.5))


@pytest.mark.parametrize("token_budget", [8192, 30, 1])
def test_logprobs_are_those_of_a_plain_forward_and_of_the_sampler(model: CausalLM, token_budget: int) -> None:
    found = collect(model, token_budget=token_budget)
    trajectory = found.trajectory
    assert trajectory.group_ids is not None
    for row, ids in enumerate(rows_of(trajectory)):
        expected = plain_logprobs(model, PROMPT_IDS[int(trajectory.group_ids[row])], ids)
        assert_close(trajectory.old_logprobs[row, : len(ids)], expected, atol=1e-5, rtol=1e-5)
    counted = trajectory.mask
    assert_close(trajectory.old_logprobs[counted], trajectory.behaviour_logprobs[counted], atol=1e-4, rtol=0)
    assert_close(trajectory.reference_logprobs, trajectory.old_logprobs)


def test_temperature_divides_the_logits_of_rollout_update_and_reference_alike(model: CausalLM) -> None:
    policy = LanguagePolicy.build(model)
    text_policy = TextPolicy(policy, temperature=2.0)
    sampling = SAMPLING.model_copy(update={"temperature": 2.0})
    found = collect_text(
        text_policy,
        as_reward(word_count),
        PROMPTS,
        PROMPT_IDS,
        sampling=sampling,
        samples_per_prompt=2,
        reference=ReferencePolicy(model),
    )
    trajectory = found.trajectory
    assert trajectory.group_ids is not None
    for row, ids in enumerate(rows_of(trajectory)):
        expected = plain_logprobs(model, PROMPT_IDS[int(trajectory.group_ids[row])], ids, 2.0)
        for table in (trajectory.old_logprobs, trajectory.reference_logprobs, trajectory.behaviour_logprobs):
            assert_close(table[row, : len(ids)], expected, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match=r"sampling at 1.0, but the policy is evaluated at 2.0"):
        collect_text(text_policy, as_reward(word_count), PROMPTS, PROMPT_IDS, sampling=SAMPLING, samples_per_prompt=2)


def test_answers_without_a_reward_are_left_out_and_not_counted_as_zero(model: CausalLM) -> None:
    def sometimes(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        return [None if number % 3 == 0 else 1.0 for number in range(len(completions))]

    found = collect(model, sometimes)
    assert found.trajectory.num_rows == 6
    assert found.trajectory.rewards.sum(1).tolist() == [1.0] * 6
    assert found.trajectory.group_ids is not None
    assert found.trajectory.group_ids.tolist() == [0, 0, 1, 1, 2, 2]
    assert found.answers.score.metrics()["reward/invalid"] == pytest.approx(1 / 3)

    def never(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        return [None] * len(completions)

    with pytest.raises(ValueError, match="none of 9 answers has a valid reward"):
        collect(model, never)


def test_pieces_of_a_reward_stand_at_the_tokens_that_complete_them(model: CausalLM) -> None:
    def first_word(samples: Sequence[Sample]) -> Score:
        spans = [[(0, len(sample.completion.split(" ")[0]), 0.75)] if sample.completion else [] for sample in samples]
        return Score(torch.ones(len(samples)), torch.ones(len(samples), dtype=torch.bool), spans=spans)

    found = collect(model, first_word)
    for row, sample in enumerate(found.answers.samples):
        rewards = found.trajectory.rewards[row]
        assert float(rewards.sum()) == pytest.approx(1.0)
        ids = found.answers.generation.token_ids[row]
        word = sample.completion.split(" ")[0]
        written = [
            model.tokenizer.decode(ids[: count + 1], skip_special_tokens=True).strip() for count in range(len(ids))
        ]
        complete = next((place for place, text in enumerate(written) if word and text.startswith(word)), None)
        if complete is not None and complete < len(ids) - 1:
            assert float(rewards[complete]) == pytest.approx(0.75)
            assert float(rewards[len(ids) - 1]) == pytest.approx(0.25)


def test_values_are_the_critics_and_nothing_follows_the_last_token(model: CausalLM) -> None:
    policy = LanguagePolicy.build(model, critic="shared")
    assert policy.critic is not None
    torch.nn.init.normal_(policy.critic.head.weight, generator=torch.Generator().manual_seed(0))
    text_policy = TextPolicy(policy)
    found = collect_text(
        text_policy, as_reward(word_count), PROMPTS, PROMPT_IDS, sampling=SAMPLING, samples_per_prompt=3
    )
    trajectory = found.trajectory
    hub: Any = model.model
    assert trajectory.group_ids is not None
    for row, ids in enumerate(rows_of(trajectory)):
        prompt = PROMPT_IDS[int(trajectory.group_ids[row])]
        with torch.no_grad():
            states = hub.base_model(input_ids=torch.tensor([prompt + ids])).last_hidden_state[0]
            expected = policy.critic(states[len(prompt) - 1 : -1])
        assert_close(trajectory.values[row, : len(ids)], expected, atol=1e-5, rtol=1e-5)
        assert_close(trajectory.next_values[row, : len(ids) - 1], expected[1:], atol=1e-5, rtol=1e-5)
        assert float(trajectory.next_values[row, len(ids) - 1]) == 0.0


@pytest.mark.parametrize("discount", [1.0, 0.9])
def test_a_critic_with_a_head_at_zero_begins_at_the_mean_return_and_one_that_has_learned_stays(
    model: CausalLM, discount: float
) -> None:
    policy = LanguagePolicy.build(model, critic="shared")
    assert policy.critic is not None
    text_policy = TextPolicy(policy)
    found = collect_text(
        text_policy,
        as_reward(word_count),
        PROMPTS,
        PROMPT_IDS,
        sampling=SAMPLING,
        samples_per_prompt=3,
        differentiable=True,
    )
    before = found.trajectory
    returns = []
    for row, ids in enumerate(rows_of(before)):
        returns += [discount ** (len(ids) - 1 - step) * float(before.rewards[row].sum()) for step in range(len(ids))]
    mean = sum(returns) / len(returns)
    begun = start_values(text_policy, found, discount=discount)
    assert float(policy.critic.head.bias.detach()) == pytest.approx(mean, rel=1e-5)
    # As if it had been evaluated again.
    again = text_policy.evaluate(before)
    assert_close(begun.trajectory.values, again.values.detach())
    assert begun.evaluation is not None
    assert_close(begun.evaluation.values, again.values)
    following = torch.cat([again.values[:, 1:], torch.zeros(before.num_rows, 1)], 1).detach() * before.continues
    assert_close(begun.trajectory.next_values, following)
    kept = start_values(text_policy, found, discount=discount)
    assert kept is found
    assert float(policy.critic.head.bias.detach()) == pytest.approx(mean, rel=1e-5)
    policy.action_values = Critic.of_actions(model, shared=True)
    assert start_values(text_policy, found, discount=discount) is found
    bias = policy.action_values.head.bias.detach()
    assert_close(bias, torch.full_like(bias, mean), rtol=1e-5, atol=1e-6)
    without = collect(model)
    assert start_values(TextPolicy(LanguagePolicy.build(model)), without, discount=1.0) is without


def test_greedy_baselines_are_the_rewards_of_the_greedy_answers(model: CausalLM) -> None:
    found = collect(model, greedy_baselines=True, missing_end_penalty=1.0)
    greedy = SamplingConfig(method="greedy", max_new_tokens=6)
    from plaudit.rollout.generate import generate

    answers = generate(model, model.tokenizer, PROMPT_IDS, sampling=greedy)
    expected = torch.tensor(word_count([], [text.strip() for text in answers.text]))
    expected -= (~torch.tensor(answers.finished)).float()
    assert found.baselines is not None
    assert found.trajectory.group_ids is not None
    assert_close(found.baselines, expected[found.trajectory.group_ids])
    with pytest.raises(ValueError, match="no other valid sample of its prompt"):
        collect(model, normalised(word_count, PerGroup()), greedy_baselines=True)


def test_greedy_answers_do_not_move_a_running_scale(model: CausalLM) -> None:
    scale = Running(shift=False)
    collect(model, normalised(word_count, scale), greedy_baselines=True)
    assert scale.count == 9


def test_columns_reach_the_reward_and_prompts_keep_their_order(model: CausalLM) -> None:
    seen: list[int] = []

    def answers(prompts: list[str], completions: list[str], answer: list[int], **columns: Any) -> list[float]:
        seen.extend(answer)
        return [0.0] * len(completions)

    collect(model, answers)
    assert seen == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_one_function_samples_for_every_job(model: CausalLM) -> None:
    """Alignment, evaluation and `plaudit generate` give the same answers to the same prompts from the same draws."""
    prompts = [PromptRecord(prompt=text, columns={"answer": text}) for text in ("alpha beta", "gamma")]
    tokeniser = model.text_tokeniser()
    ids = [tokeniser.prompt(each.prompt) for each in prompts]
    found, samples = sample_answers(model, prompts, sampling=SAMPLING, samples_per_prompt=2)
    assert [sample.completion for sample in samples] == [text.strip() for text in found.text]
    assert [sample.columns["answer"] for sample in samples] == ["alpha beta"] * 2 + ["gamma"] * 2
    assert [sample.finished for sample in samples] == found.finished
    assert found.prompt_ids == ids
    rows = answer_rows(model, [{"prompt": each.prompt} for each in prompts], samples_per_prompt=2, sampling=SAMPLING)
    texts = [text for row in rows for text in row["completions"]]
    assert texts == [sample.completion for sample in samples]
    answers = answer_prompts(
        TextPolicy(LanguagePolicy.build(model)),
        as_reward(word_count),
        prompts,
        ids,
        sampling=SAMPLING,
        samples_per_prompt=2,
    )
    assert answers.samples == samples


def test_gradients_of_micro_batches_add_up_to_those_of_one_piece(model: CausalLM) -> None:
    found = collect(model)
    policy = LanguagePolicy.build(model)
    weights = torch.randn(found.trajectory.actions.shape, generator=torch.Generator().manual_seed(1))
    gradients = []
    lengths, ids = found.trajectory.mask.sum(1), found.trajectory.group_ids
    assert ids is not None
    largest = max(len(PROMPT_IDS[group]) + int(lengths[ids == group].sum()) for group in range(len(PROMPTS)))
    for budget in (8192, largest, 12, 1):
        text_policy = TextPolicy(policy, token_budget=budget, prompts=PROMPT_IDS)
        model.zero_grad()
        parts = text_policy.micro_batches(found.trajectory)
        assert len(parts) == {8192: 1, largest: len(PROMPTS), 1: found.trajectory.num_rows}.get(budget, len(parts))
        assert sorted(torch.cat(parts).tolist()) == list(range(found.trajectory.num_rows))
        for part in parts:
            size = sum(len(PROMPT_IDS[group]) for group in set(ids[part].tolist())) + int(lengths[part].sum())
            assert size <= budget or len(part) == 1  # a group that is too large is divided, an answer is not
        for part in parts:
            evaluation = text_policy.evaluate(found.trajectory.select(part))
            (evaluation.logprobs * weights[part]).sum().backward()  # type: ignore[no-untyped-call]
        gradients.append(torch.cat([each.grad.flatten() for each in model.parameters() if each.grad is not None]))
    model.zero_grad()
    for other in gradients[1:]:
        assert_close(gradients[0], other, atol=1e-5, rtol=1e-4)


def test_rows_that_count_nothing_are_passed_over(model: CausalLM) -> None:
    trajectory = collect(model).trajectory
    mask = trajectory.mask.clone()
    mask[[0, 4, 8]] = False
    text_policy = TextPolicy(LanguagePolicy.build(model), prompts=PROMPT_IDS)
    part = text_policy.evaluate(trajectory.with_fields(mask=mask))
    assert_close(part.logprobs[1], trajectory.old_logprobs[1], atol=1e-6, rtol=1e-5)
    assert float(part.logprobs[0].detach().abs().sum()) == 0.0
    assert sorted(torch.cat(text_policy.micro_batches(trajectory.with_fields(mask=mask))).tolist()) == [
        1,
        2,
        3,
        5,
        6,
        7,
    ]
    gap = trajectory.mask.clone()
    gap[:, 0] = False
    with pytest.raises(ValueError, match="first steps of its row"):
        text_policy.evaluate(trajectory.with_fields(mask=gap))
    with pytest.raises(ValueError, match="group_ids"):
        text_policy.evaluate(trajectory.with_fields(group_ids=None))

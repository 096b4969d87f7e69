"""Implicit Q-learning: the behaviour's values, the hard optimum, and the language model that its values make."""

import copy

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from plaudit.algorithms.implicit_q import ImplicitQ
from plaudit.configs.q_learning import ImplicitQConfig
from plaudit.core.finite import NonFiniteError
from plaudit.core.q_learning import advantage_weighted_logprobs, expectile_loss
from plaudit.models.policy import LanguagePolicy
from plaudit.models.q_heads import QHeads, with_action_values
from plaudit.rewards.base import as_reward
from plaudit.rollout.text_policy import TextPolicy
from plaudit.rollout.text_rollout import collect_text
from plaudit.rollout.token_mdp import TokenMDP
from plaudit.rollout.trajectory import new_trajectory
from tests.algorithms.problems import SMALL, random_logits
from tests.rollout.language_models import tiny_lm
from tests.rollout.test_text_rollout import PROMPT_IDS, PROMPTS, SAMPLING


def test_an_expectile_by_hand_and_against_its_definition():
    values, targets = torch.tensor([[1.0, 1.0]], dtype=torch.float64), torch.tensor([[3.0, 0.0]], dtype=torch.float64)
    mask = torch.ones(1, 2, dtype=torch.bool)
    loss, metrics = expectile_loss(values, targets, mask, expectile=0.9)
    assert loss.item() == pytest.approx((0.9 * 4 + 0.1 * 1) / 2)
    assert metrics["mean_advantage"].item() == pytest.approx(0.5)
    half, _ = expectile_loss(values, targets, mask, expectile=0.5)
    assert half.item() == pytest.approx((4 + 1) / 4)
    assert expectile_loss(values, targets, mask & torch.tensor([[True, False]]), expectile=0.9)[
        0
    ].item() == pytest.approx(3.6, rel=1e-15)
    draws = torch.randn(1, 400, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    everything = torch.ones_like(draws, dtype=torch.bool)
    value = torch.zeros((), dtype=torch.float64)
    for _ in range(200):  # the τ-expectile is where the weighted errors balance
        sides = 0.2 + 0.6 * (draws > value).double()
        value = (sides * draws).sum() / sides.sum()
    level = value.clone().requires_grad_()
    expectile_loss(level.expand_as(draws), draws, everything, expectile=0.8)[0].backward()
    assert abs(level.grad.item()) < 1e-12
    check = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    full = torch.ones(2, 3, dtype=torch.bool)
    assert torch.autograd.gradcheck(
        lambda each: expectile_loss(each, draws[:, :6].view(2, 3), full, expectile=0.7)[0], check
    )
    with pytest.raises(ValueError, match="expectile must lie"):
        expectile_loss(values, targets, mask, expectile=1.0)


def learned(mdp, behaviour, expectile, steps):
    """Heads over one-hot states from every step of the problem, each as likely as the behaviour makes it."""
    states = torch.arange(mdp.num_states).repeat_interleave(mdp.vocabulary)
    actions = torch.arange(mdp.vocabulary).repeat(mdp.num_states)
    following = mdp.next_prefix.flatten()
    table = torch.eye(mdp.num_states, dtype=torch.float64)
    batch = new_trajectory(
        actions=actions[:, None],
        behaviour_logprobs=behaviour.flatten()[:, None],
        rewards=mdp.rewards.flatten()[:, None],
        continues=(following >= 0).double()[:, None],
        mask=torch.ones(len(states), 1, dtype=torch.bool),
    )
    heads = QHeads(mdp.num_states, mdp.vocabulary, dtype=torch.float64)
    # What a step of 0.5 does to a state's squared error of weight 1 is all of it; the bias would share it.
    heads.value.bias.requires_grad_(False)
    optimizer = torch.optim.SGD([heads.weight, heads.value.weight], lr=0.5)
    learner = ImplicitQ(ImplicitQConfig(expectile=expectile, polyak=1.0), heads, optimizer)
    weights = behaviour.exp().flatten()[:, None]
    for _ in range(steps):
        learner.update(table[states][:, None], table[following.clamp(min=0)][:, None], batch, weights=weights)
    return heads.action_values(table).detach(), heads.values(table).detach()


def test_values_are_taught_by_the_target_and_the_target_follows():
    heads = QHeads(2, 3)
    learner = ImplicitQ(ImplicitQConfig(polyak=0.25), heads)
    with torch.no_grad():
        heads.weight.fill_(1.0)  # the target's stay 0
        heads.value.bias.fill_(0.5)
    batch = new_trajectory(
        actions=torch.zeros(2, 1, dtype=torch.int64),
        behaviour_logprobs=torch.zeros(2, 1),
        rewards=torch.zeros(2, 1),
        continues=torch.zeros(2, 1),
        mask=torch.ones(2, 1, dtype=torch.bool),
    )
    states = torch.eye(2)[:, None]
    assert learner.update(states, states, batch)["value/mean_advantage"] == pytest.approx(-0.5)
    torch.testing.assert_close(learner.learned.target.weight, 0.25 * heads.weight.detach())


def test_one_step_is_the_gradient_of_the_three_losses_written_out():
    options = {"expectile": 0.8, "discount": 0.9, "conservative_coefficient": 0.7, "polyak": 0.25}
    heads, generator = QHeads(3, 4, dtype=torch.float64), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    learner = ImplicitQ(ImplicitQConfig(**options), heads, torch.optim.SGD(heads.parameters(), lr=1.0))
    with torch.no_grad():
        learner.learned.target.weight.add_(0.5)
        learner.learned.target.value.weight.add_(0.5)  # what follows is worth what the values say now
    target = learner.learned.target.weight.clone()
    states, after = torch.randn(2, 2, 3, 3, generator=generator, dtype=torch.float64)
    batch = new_trajectory(
        actions=torch.tensor([[0, 3, 1], [2, 2, 0]]),
        behaviour_logprobs=torch.zeros(2, 3, dtype=torch.float64),
        rewards=torch.randn(2, 3, generator=generator, dtype=torch.float64),
        continues=torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]]).double(),
        mask=torch.tensor([[True, True, True], [True, True, False]]),
    )
    weight, slope, bias = (each.detach().clone().requires_grad_() for each in heads.parameters())
    loss = torch.zeros((), dtype=torch.float64)
    for row, step in batch.mask.nonzero().tolist():
        state, action = states[row, step], int(batch.actions[row, step])
        value = slope[0] @ state + bias[0]
        error = float(target[action] @ state) - value
        side = 0.8 if error > 0 else 0.2
        following = float((slope[0] @ after[row, step] + bias[0]).detach()) * float(batch.continues[row, step])
        own = weight @ state
        squared = (float(batch.rewards[row, step]) + 0.9 * following - own[action]) ** 2
        loss = loss + (side * error**2 + squared - 0.7 * own.log_softmax(0)[action]) / 5
    wanted = torch.autograd.grad(loss, (weight, slope, bias))
    before = [each.detach().clone() for each in heads.parameters()]
    metrics = learner.update(states, after, batch)
    for new, old, gradient in zip(heads.parameters(), before, wanted, strict=True):
        assert_close(new.detach(), old - gradient)
    assert metrics["value/q_loss"] > 0
    assert_close(learner.learned.target.weight, 0.25 * heads.weight.detach() + 0.75 * target)


def test_half_an_expectile_values_the_behaviour_and_a_high_one_the_best():
    mdp = TokenMDP(**SMALL)
    behaviour = (0.5 * random_logits(mdp)).log_softmax(-1)
    exact = mdp.evaluate(behaviour, coefficient=0.0)
    found, values = learned(mdp, behaviour[0], 0.5, 250)
    assert_close(found, exact.action_values[0], atol=1e-6, rtol=0)
    assert_close(values, exact.values[0], atol=1e-6, rtol=0)
    best = mdp.hard_solution()
    found, values = learned(mdp, behaviour[0], 0.999, 250)
    assert_close(values, best.values[0], atol=0.02, rtol=0)
    assert_close(found, best.action_values[0], atol=0.02, rtol=0)
    assert torch.equal(found.argmax(-1), best.action_values[0].argmax(-1))


def test_decoding_by_advantages_is_the_optimum_with_soft_values_alone():
    mdp = TokenMDP(**SMALL)
    scale = 1 / mdp.coefficient
    soft, hard = mdp.optimal_solution(), mdp.hard_solution()
    found = advantage_weighted_logprobs(mdp.reference_logprobs, soft.action_values, scale=scale)
    assert_close(found, soft.logprobs)
    other = advantage_weighted_logprobs(mdp.reference_logprobs, hard.action_values, scale=scale)
    assert mdp.gap(other) > 1e-3
    assert_close(
        advantage_weighted_logprobs(mdp.reference_logprobs, hard.action_values, scale=0.0), mdp.reference_logprobs
    )
    with pytest.raises(ValueError, match="negative"):
        advantage_weighted_logprobs(mdp.reference_logprobs, hard.action_values, scale=-1.0)


def good_tokens(prompts, completions, **columns):
    """Pays for every token of an arbitrary half of the vocabulary."""
    return [float(sum(len(word) % 2 for word in text.split())) for text in completions]


@pytest.mark.parametrize("name", ["gpt2", pytest.param("llama", marks=pytest.mark.slow)])
def test_a_language_model_with_another_output_matrix_is_the_tilted_one(name, tmp_path):
    model = tiny_lm(name)
    policy = TextPolicy(LanguagePolicy.build(model))
    batch = collect_text(
        policy, as_reward(good_tokens), PROMPTS, PROMPT_IDS, sampling=SAMPLING, samples_per_prompt=2,
        generator=torch.Generator().manual_seed(0),
    ).trajectory  # fmt: skip
    policy.prompts = PROMPT_IDS
    states = policy.states(batch)
    weight, bias, _ = model.head
    logits = states @ weight.T + (0 if bias is None else bias)
    chosen = logits.log_softmax(-1).gather(2, batch.actions[:, :, None]).squeeze(2).masked_fill(~batch.mask, 0.0)
    assert_close(chosen, batch.old_logprobs.masked_fill(~batch.mask, 0.0), atol=1e-5, rtol=0)

    heads = QHeads(weight.shape[1], weight.shape[0])
    torch.nn.init.normal_(heads.weight, generator=torch.Generator().manual_seed(1))
    changed = with_action_values(model, heads, scale=0.3)
    tilted = TextPolicy(LanguagePolicy.build(changed), prompts=PROMPT_IDS)
    wanted = advantage_weighted_logprobs(logits, heads.action_values(states), scale=0.3)
    wanted = wanted.gather(2, batch.actions[:, :, None]).squeeze(2).masked_fill(~batch.mask, 0.0)
    assert_close(tilted.evaluate_all(batch).logprobs, wanted.detach(), atol=1e-4, rtol=0)
    assert torch.equal(
        changed.model.get_input_embeddings().weight, model.model.get_input_embeddings().weight
    )  # what is read stays, tied or not
    changed.save_pretrained(tmp_path / "changed")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "changed")
    assert torch.equal(again.get_output_embeddings().weight, changed.head[0])
    with pytest.raises(ValueError, match="do not fit"):
        with_action_values(model, QHeads(4, 5), scale=1.0)


@pytest.mark.slow
def test_recorded_answers_make_a_better_model():
    model = tiny_lm()
    policy = TextPolicy(LanguagePolicy.build(model))
    options = {"sampling": SAMPLING, "samples_per_prompt": 96}
    recorded = collect_text(
        policy, as_reward(good_tokens), PROMPTS, PROMPT_IDS, generator=torch.Generator().manual_seed(0), **options
    ).trajectory
    states = policy.states(recorded)
    heads = QHeads(states.shape[-1], model.head[0].shape[0])
    learner = ImplicitQ(ImplicitQConfig(expectile=0.7, learning_rate=0.02, polyak=0.05), heads)
    following = torch.cat([states[:, 1:], torch.zeros_like(states[:, :1])], 1)
    first = learner.update(states, following, recorded)
    for _ in range(150):
        last = learner.update(states, following, recorded)
    assert last["value/q_loss"] < first["value/q_loss"]
    means = []
    for each in (model, with_action_values(model, heads, scale=3.0)):
        fresh = collect_text(
            TextPolicy(LanguagePolicy.build(each)), as_reward(good_tokens), PROMPTS, PROMPT_IDS,
            generator=torch.Generator().manual_seed(1), **options,
        ).trajectory  # fmt: skip
        means.append(fresh.rewards.sum(1).mean().item())
    assert means[1] > 1.2 * means[0], means


def test_the_conservative_term_lowers_what_was_not_recorded_and_the_state_goes_on():
    heads = QHeads(3, 4)
    learner = ImplicitQ(ImplicitQConfig(conservative_coefficient=1.0, learning_rate=0.1), heads)
    batch = new_trajectory(
        actions=torch.tensor([[2]]),
        behaviour_logprobs=torch.zeros(1, 1),
        rewards=torch.ones(1, 1),
        continues=torch.zeros(1, 1),
        mask=torch.ones(1, 1, dtype=torch.bool),
    )
    states = torch.ones(1, 1, 3)
    for _ in range(30):
        learner.update(states, states, batch)
    values = heads.action_values(states)[0, 0].tolist()
    assert values.index(max(values)) == 2
    assert max(values[:2] + values[3:]) < -0.5
    other = ImplicitQ(ImplicitQConfig(conservative_coefficient=1.0, learning_rate=0.1), QHeads(3, 4))
    other.load_state_dict(copy.deepcopy(learner.state_dict()))
    assert learner.update(states, states, batch) == other.update(states, states, batch)
    assert torch.equal(other.learned.heads.weight, heads.weight)  # with Adam's moments, not anew
    with pytest.raises(NonFiniteError, match="look at the rewards"):
        learner.update(states, states, batch.with_fields(rewards=torch.full((1, 1), float("inf"))))

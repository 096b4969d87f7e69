"""A manager over the states of a language model: exact probabilities, decoding, who learns from what, alignment."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, layer_norm, normalize

from plaudit.algorithms.build import build_algorithm
from plaudit.algorithms.feudal_text import FeudalText, manager_loss, manager_returns
from plaudit.configs.align import AlignConfig
from plaudit.configs.feudal import FeudalTextConfig
from plaudit.configs.generation import SamplingConfig
from plaudit.data.packing import pack_groups
from plaudit.models.causal_lm import CausalLM
from plaudit.models.goals import GoalHeads
from plaudit.models.policy import LanguagePolicy
from plaudit.rollout.generate import generate
from plaudit.rollout.text_policy import TextPolicy
from plaudit.rollout.trajectory import Trajectory, new_trajectory
from tests.models.conftest import random_batch, texts_of
from tests.rollout.language_models import random_prompts, tiny_lm

SHAPES = [(5, [3, 1, 7]), (2, [4])]
CONFIG = FeudalTextConfig(horizon=3, baseline="none", intrinsic_weight=0.5, manager_discount=0.9, kl_coefficient=0.1)


def shaken(model: CausalLM, *, horizon: int = 3) -> GoalHeads:
    """A manager whose goals matter."""
    heads = GoalHeads(model.head[0].shape[1], horizon=horizon, manager_size=5)
    with torch.no_grad():
        heads.embedding.weight.normal_(generator=torch.Generator().manual_seed(0))
    return heads


def written_out(heads: GoalHeads, states: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Latent states of every token and goals of every c-th one, for the states `[T, H]` of one answer."""
    manager, memory = heads.manager, None
    latent = [torch.tanh(manager["space"](layer_norm(state, state.shape))) for state in states]
    goals = []
    for step in range(0, len(states), heads.horizon):
        memory = manager["core"](latent[step][None], memory)
        goals.append(normalize(memory[0][0], dim=0))
    return latent, goals


@pytest.mark.parametrize("name", ["llama", "gemma2-window-softcap"])
def test_words_are_as_likely_as_written_out_token_by_token(name: str) -> None:
    model, batch, temperature = tiny_lm(name), random_batch(SHAPES), 0.7
    model.steering = heads = shaken(model)
    found = LanguagePolicy(model).evaluate(batch, temperature)
    weight, bias, softcap = model.head
    layout = batch.layout
    for row, text in enumerate(texts_of(batch)):
        length = int(layout.completion_ends[row] - layout.completion_starts[row])
        own = model.model(text[None], output_hidden_states=True).hidden_states[-1][0][-length - 1 : -1]  # type: ignore[operator]
        _, goals = written_out(heads, own)
        bent = torch.stack([state + heads.embedding.weight @ goals[step // 3] for step, state in enumerate(own)])
        logits = bent @ weight.T + (0.0 if bias is None else bias)
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        logprobs = (logits / temperature).log_softmax(-1)
        mine = found.spans.owner == row
        wanted = logprobs.gather(1, text[-length:, None]).squeeze(1)
        torch.testing.assert_close(found.logprobs[mine], wanted, atol=3e-5, rtol=0)
        torch.testing.assert_close(found.entropy[mine], -(logprobs.exp() * logprobs).sum(1), atol=3e-5, rtol=0)


@pytest.mark.parametrize(("horizon", "temperature"), [(1, 1.0), (3, 0.6), (20, 1.0)])
def test_decoding_draws_what_the_training_forward_evaluates(horizon: int, temperature: float) -> None:
    model = tiny_lm()
    sampling = SamplingConfig(max_new_tokens=9, temperature=temperature)
    plain = generate(model, model.tokenizer, random_prompts((4, 7)), samples_per_prompt=24, sampling=sampling)
    model.steering = shaken(model, horizon=horizon)
    found = generate(model, model.tokenizer, random_prompts((4, 7)), samples_per_prompt=24, sampling=sampling)
    assert len({len(ids) for ids in found.token_ids}) > 1  # rows leave, the others keep their managers
    output = LanguagePolicy(model).evaluate(pack_groups(found.groups(), causal=True), temperature)
    wanted = torch.tensor([value for answer in found.logprobs for value in answer])
    torch.testing.assert_close(output.logprobs, wanted, atol=3e-5, rtol=0)
    assert plain.token_ids != found.token_ids


def test_a_new_manager_leaves_the_language_model_as_it_is() -> None:
    model, batch = tiny_lm(), random_batch(SHAPES)
    plain = LanguagePolicy(model).evaluate(batch)
    model.steering = GoalHeads(model.head[0].shape[1])
    steered = LanguagePolicy(model).evaluate(batch)
    assert torch.equal(steered.logprobs, plain.logprobs)
    steered.logprobs.sum().backward()
    assert bool(model.steering.embedding.weight.grad.any())  # and learns all the same


def answered(*, budget: int = 8192) -> tuple[CausalLM, TextPolicy, Trajectory]:
    """Answers of a model with a manager, with a reward at random tokens."""
    model, prompts = tiny_lm(), random_prompts((4, 7, 3))
    model.steering = shaken(model)
    sampling = SamplingConfig(max_new_tokens=8)
    found = generate(model, model.tokenizer, prompts, samples_per_prompt=2, sampling=sampling)
    lengths = torch.tensor([len(ids) for ids in found.token_ids])
    mask = torch.arange(8) < lengths[:, None]
    actions = torch.zeros(6, 8, dtype=torch.int64)
    for row, ids in enumerate(found.token_ids):
        actions[row, : len(ids)] = torch.tensor(ids)
    generator = torch.Generator().manual_seed(1)
    trajectory = new_trajectory(
        actions=actions,
        behaviour_logprobs=torch.zeros(6, 8),
        old_logprobs=-torch.rand(6, 8, generator=generator),
        reference_logprobs=-torch.rand(6, 8, generator=generator),
        rewards=torch.randn(6, 8, generator=generator),
        continues=(torch.arange(8) < lengths[:, None] - 1).float(),
        mask=mask,
        group_ids=torch.tensor(found.prompt_index),
    )
    return model, TextPolicy(LanguagePolicy(model), token_budget=budget, prompts=prompts), trajectory


def learner(model: CausalLM, policy: TextPolicy) -> FeudalText:
    found = build_algorithm(CONFIG, policy, torch.optim.Adam(policy.policy.parameters(), lr=1e-3))
    assert isinstance(found, FeudalText)
    return found


@pytest.mark.parametrize("budget", [8192, 20])
def test_both_levels_are_paid_as_written_out(budget: int) -> None:
    model, policy, trajectory = answered(budget=budget)
    heads, algorithm = model.steering, learner(model, policy)
    assert isinstance(heads, GoalHeads)
    prepared = algorithm.prepare(trajectory)
    with torch.no_grad():
        states = policy.states(trajectory)
    penalty = 0.1 * (trajectory.old_logprobs - trajectory.reference_logprobs)
    for row, length in enumerate(trajectory.mask.sum(1).tolist()):
        latent, goals = written_out(heads, states[row, :length])
        intrinsic = [
            cosine_similarity(latent[t + 1] - latent[t - t % 3], goals[t // 3], 0).item() / 3 if t + 1 < length else 0.0
            for t in range(length)
        ]
        paid = [(trajectory.rewards[row, t] - penalty[row, t]).item() + 0.5 * intrinsic[t] for t in range(length)]
        returns = [sum(paid[t:]) for t in range(length)]
        torch.testing.assert_close(prepared.returns[row, :length], torch.tensor(returns), atol=1e-5, rtol=0)
        by_goal = [
            sum((trajectory.rewards - penalty)[row, t].item() for t in range(k, min(k + 3, length)))
            for k in range(0, length, 3)
        ]
        wanted = [sum(0.9 ** (j - k) * by_goal[j] for j in range(k, len(by_goal))) for k in range(len(by_goal))]
        own = prepared.columns["manager_returns"][row, : len(wanted)]
        torch.testing.assert_close(own, torch.tensor(wanted), atol=1e-5, rtol=0)
        for k in range(len(by_goal)):
            ended = prepared.columns["manager_arrivals"][row, k]
            torch.testing.assert_close(ended, states[row, min(3 * k + 3, length - 1)], atol=1e-4, rtol=0)


def test_no_level_s_loss_reaches_the_other_and_a_step_moves_both() -> None:
    model, policy, trajectory = answered()
    heads, algorithm = model.steering, learner(model, policy)
    assert isinstance(heads, GoalHeads)
    policy.evaluate(trajectory).logprobs.sum().backward()
    assert all(parameter.grad is None for parameter in heads.manager.parameters())
    assert bool(heads.embedding.weight.grad.any())
    policy.policy.zero_grad(set_to_none=True)
    states = policy.states(trajectory).requires_grad_()
    heads.unroll(states[:, ::3]).goals.sum().backward()
    assert states.grad is None  # the language model is the manager's percept as it is
    policy.policy.zero_grad(set_to_none=True)
    prepared = algorithm.prepare(trajectory)
    loss, _ = manager_loss(heads, prepared.columns, trajectory.mask, config=CONFIG)
    loss.backward()
    touched = {name for name, each in policy.policy.named_parameters() if each.grad is not None}
    assert touched == {f"language_model.steering.manager.{name}" for name, _ in heads.manager.named_parameters()}
    before = {name: each.detach().clone() for name, each in policy.policy.named_parameters()}
    metrics = algorithm.update(trajectory)
    moved = {name for name, each in policy.policy.named_parameters() if not torch.equal(each, before[name])}
    assert {"language_model.steering.embedding.weight", "language_model.steering.manager.space.weight"} <= moved
    assert {"manager/goal_cosine", "manager/explained_variance", "worker/intrinsic_reward"} <= set(metrics)


@pytest.mark.parametrize("limit", [None, 1e-3])
def test_each_level_s_gradient_has_a_limit_of_its_own(limit: float | None) -> None:
    model, policy, trajectory = answered()
    heads = model.steering
    assert isinstance(heads, GoalHeads)
    optimizer = torch.optim.SGD(policy.policy.parameters(), lr=1.0)
    algorithm = build_algorithm(CONFIG, policy, optimizer, max_gradient_norm=limit)
    managers = {f"language_model.steering.manager.{name}" for name, _ in heads.manager.named_parameters()}
    before = {name: each.detach().clone() for name, each in policy.policy.named_parameters()}
    algorithm.update(trajectory)
    moved = {
        name: float((each.detach() - before[name]).square().sum()) for name, each in policy.policy.named_parameters()
    }
    for level in (managers, moved.keys() - managers):
        size = sum(moved[name] for name in level) ** 0.5
        if limit is None:
            assert size > 0.01
        else:
            assert size == pytest.approx(limit, rel=1e-3)


def test_the_manager_s_gradient_is_that_of_finite_differences() -> None:
    """Advantages and transitions are constants of equation 7, so they are held where they were."""
    heads = GoalHeads(6, horizon=2, manager_size=4).double()
    with torch.no_grad():
        heads.manager["critic"].weight.normal_(generator=torch.Generator().manual_seed(3))
    heads.latent = lambda states: torch.tanh(heads.manager["space"](layer_norm(states, (6,))))  # type: ignore[method-assign]
    generator = torch.Generator().manual_seed(0)
    states, arrivals = torch.randn(2, 3, 4, 6, generator=generator, dtype=torch.float64)
    returns = torch.randn(3, 4, generator=generator, dtype=torch.float64).float()
    mask = torch.arange(8) < torch.tensor([8, 5, 2])[:, None]  # the goal at the fifth of five tokens is not judged
    judged = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]], dtype=torch.bool)
    columns = {"manager_states": states, "manager_arrivals": arrivals, "manager_returns": returns}
    config = FeudalTextConfig(horizon=2, manager_value_coefficient=0.0)
    loss, _ = manager_loss(heads, columns, mask, config=config)
    with torch.no_grad():
        fixed = heads.unroll(states)
        moved, advantages = heads.latent(arrivals) - fixed.states, returns - fixed.values
    weights = (heads.manager["core"].weight_hh, heads.manager["space"].weight)
    for weight, found in zip(weights, torch.autograd.grad(loss, weights), strict=True):
        direction = torch.randn(weight.shape, generator=generator, dtype=torch.float64)

        def objective(shift: float, weight: Tensor = weight, direction: Tensor = direction) -> float:
            with torch.no_grad():
                weight.add_(shift * direction)
                goals = heads.unroll(states).goals
                weight.sub_(shift * direction)
            return float(-(advantages * cosine_similarity(moved, goals, -1))[judged].mean())

        assert objective(0.0) == pytest.approx(loss.item(), abs=1e-12)
        numeric = (objective(1e-5) - objective(-1e-5)) / 2e-5
        assert float((found * direction).sum()) == pytest.approx(numeric, rel=1e-6)


def test_returns_of_the_manager_by_hand() -> None:
    rewards = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0], [1.0, 1.0, 0.0, 0.0, 0.0]])
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    found = manager_returns(rewards, mask, horizon=2, discount=0.5)
    assert found.tolist() == [[3 + 3.5 + 1.25, 7 + 2.5, 5.0], [2.0, 0.0, 0.0]]


def test_heads_are_saved_and_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    model, policy, _ = answered()
    heads = model.steering
    assert isinstance(heads, GoalHeads)
    heads.save(tmp_path)
    loaded = GoalHeads.load(tmp_path)
    assert (loaded.horizon, loaded.manager_size) == (3, 5)
    for name, tensor in heads.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    with pytest.raises(ValueError, match="no goals"):
        GoalHeads.load(tmp_path / "elsewhere")
    optimizer = torch.optim.SGD(policy.policy.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="every 3 tokens, not 8"):
        build_algorithm(FeudalTextConfig(), policy, optimizer)
    model.steering = None
    with pytest.raises(ValueError, match="no manager"):
        build_algorithm(FeudalTextConfig(horizon=3), policy, optimizer)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("a3c", "a2c whose answers"),
        ("dyna", "refresh_reward"),
        ("ilql", "recorded"),
        ("world_model", "world_dialogue"),
        ("double_dqn", "no maximum"),
    ],
)
def test_families_that_align_has_elsewhere_say_where(name: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        AlignConfig.model_validate({"model": {"backbone": "x"}, "reward": "length", "algorithm": {"name": name}})

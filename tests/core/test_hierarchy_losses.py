"""Options and goals: the two theorems against the exactly solved value, the forward algorithm against enumeration."""

import itertools
import math

import pytest
import torch

from plaudit.core.hierarchy_losses import (
    arrival_values,
    cosine,
    ending_probabilities,
    goal_direction_loss,
    horizon_transitions,
    intrinsic_rewards,
    marginal_option_logprobs,
    option_metrics,
    option_state_values,
    termination_loss,
)
from plaudit.core.policy_losses import policy_gradient_loss

STATES, ACTIONS, OPTIONS, DISCOUNT = 4, 3, 2, 0.9


class OptionMDP:
    """A random problem whose option values are solved as a linear system, differentiably."""

    def __init__(self, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.moves = draw(STATES, ACTIONS, STATES).softmax(-1) * 0.95  # the rest ends the episode
        self.rewards = draw(STATES, ACTIONS)
        self.action_logits = draw(STATES, OPTIONS, ACTIONS).requires_grad_()
        self.termination_logits = draw(STATES, OPTIONS).requires_grad_()
        self.choice = draw(STATES, OPTIONS).softmax(-1)

    def option_values(self, cost=0.0):
        """`Q_Ω [S, W]`: `Q = R + γ P U`, `U` linear in Q; solved."""
        policy, ends = self.action_logits.softmax(-1), self.termination_logits.sigmoid()
        rewards = torch.einsum("swa,sa->sw", policy, self.rewards)
        moves = torch.einsum("swa,sat->swt", policy, self.moves)
        eye = torch.eye(OPTIONS, dtype=torch.float64)
        # Which option acts in the next state, given that ω arrives there.
        switch = (1 - ends)[..., None] * eye + ends[..., None] * self.choice[:, None, :]
        step = torch.einsum("swt,twv->swtv", moves, switch)
        fee = cost * torch.einsum("swt,tw->sw", moves, ends)
        size = STATES * OPTIONS
        matrix = torch.eye(size, dtype=torch.float64) - DISCOUNT * step.reshape(size, size)
        return torch.linalg.solve(matrix, (rewards - DISCOUNT * fee).flatten()).view(STATES, OPTIONS), step, moves

    def occupancy(self, state, option):
        """`Σ_t γ^t P(s_t, ω_t | s_0, ω_0)`, `[S, W]`."""
        _, step, _ = self.option_values()
        size = STATES * OPTIONS
        matrix = torch.eye(size, dtype=torch.float64) - DISCOUNT * step.detach().reshape(size, size)
        start = torch.zeros(size, dtype=torch.float64)
        start[state * OPTIONS + option] = 1
        return torch.linalg.solve(matrix.T, start).view(STATES, OPTIONS)


def test_the_intra_option_policy_gradient_is_that_of_the_exact_value():
    mdp = OptionMDP()
    values, _, _ = mdp.option_values()
    (wanted,) = torch.autograd.grad(values[1, 0], mdp.action_logits)
    values = values.detach()
    ends = mdp.termination_logits.sigmoid().detach()
    upon_arrival = arrival_values(values, ends, (mdp.choice * values).sum(-1))
    action_values = mdp.rewards[:, None] + DISCOUNT * torch.einsum("sat,tw->swa", mdp.moves, upon_arrival)
    logprobs = mdp.action_logits.log_softmax(-1)
    assert torch.allclose((logprobs.exp() * action_values).sum(-1), values, atol=1e-12)
    weights = mdp.occupancy(1, 0)[..., None] * logprobs.detach().exp()
    advantages = action_values - values[..., None]
    mask = torch.ones(STATES, OPTIONS * ACTIONS, dtype=torch.bool)
    flat = (tensor.reshape(STATES, -1) for tensor in (logprobs, advantages))
    loss, _ = policy_gradient_loss(*flat, mask, reduction=weights.reshape(STATES, -1))
    (found,) = torch.autograd.grad(loss, mdp.action_logits)
    assert torch.allclose(-found, wanted, atol=1e-12)


@pytest.mark.parametrize("cost", [0.0, 0.3])
def test_the_termination_gradient_is_that_of_the_exact_value(cost):
    """Theorem 2 weighs arrivals `(s_{t+1}, ω_t)`, beginning with `(s_1, ω_0)`."""
    mdp = OptionMDP(seed=1)
    values, _, moves = mdp.option_values(cost)
    ends = mdp.termination_logits.sigmoid()
    state_values = (mdp.choice * values).sum(-1)
    state, option = 2, 1
    arrived = arrival_values(values, ends, state_values, deliberation_cost=cost)[state, option]
    (wanted,) = torch.autograd.grad(arrived, mdp.termination_logits)
    values, moves, state_values = values.detach(), moves.detach(), state_values.detach()
    # Arrivals: the first one; then one step on from every (s, ω) that was occupied after it.
    weights = torch.zeros(STATES, OPTIONS, dtype=torch.float64)
    weights[state, option] = 1
    stays = (1 - ends.detach()[state, option]) * torch.eye(OPTIONS, dtype=torch.float64)[option]
    for first, chance in enumerate(stays + ends.detach()[state, option] * mdp.choice[state]):
        weights += DISCOUNT * chance * torch.einsum("sw,swt->tw", mdp.occupancy(state, first), moves)
    expanded = state_values[:, None].expand_as(values)
    mask = torch.ones_like(values, dtype=torch.bool)
    ends = mdp.termination_logits.sigmoid()
    loss, metrics = termination_loss(ends, values, expanded, mask, reduction=weights, deliberation_cost=cost)
    (found,) = torch.autograd.grad(loss, mdp.termination_logits)
    assert torch.allclose(-found, wanted, atol=1e-12)
    assert metrics["termination_rate"] == pytest.approx(ends.mean().item())


def test_values_upon_arrival_by_hand_and_their_identities():
    values, ends = torch.tensor([[1.0, 3.0]]), torch.tensor([[0.5, 0.25]])
    state_values = option_state_values(values, exploration=0.2)
    assert state_values.tolist() == pytest.approx([0.8 * 3 + 0.2 * 2])
    found = arrival_values(values, ends, state_values, deliberation_cost=0.1)
    assert found[0].tolist() == pytest.approx([0.5 * 1 + 0.5 * 2.7, 0.75 * 3 + 0.25 * 2.7])
    always = arrival_values(values, torch.ones_like(ends), state_values)
    assert always[0].tolist() == pytest.approx([2.8, 2.8])
    assert torch.equal(arrival_values(values, torch.zeros_like(ends), state_values), values)
    with pytest.raises(ValueError, match="state_values"):
        arrival_values(values, ends, state_values[:, None])
    with pytest.raises(ValueError, match="probability"):
        option_state_values(values, exploration=1.5)


def test_a_cost_makes_options_last_and_masked_arrivals_never_matter():
    ends = torch.full((1, 3), 0.4, requires_grad=True)
    values = torch.tensor([[1.0, 2.0, float("nan")]])
    mask = torch.tensor([[True, True, False]])
    for cost, signs in ((0.0, [-1, 0, 0]), (1.5, [1, 1, 0])):
        loss, metrics = termination_loss(
            ends, values, torch.full((1, 3), 2.0), mask, reduction="per_token", deliberation_cost=cost
        )
        (gradient,) = torch.autograd.grad(loss, ends)
        assert gradient.sign()[0].tolist() == signs
        assert metrics["termination_rate"] == pytest.approx(0.4)
        assert metrics["option_advantage"] == pytest.approx(-0.5)


def brute_force(actions, choices, ends, mask):
    """`Σ` over every sequence of options and of "ended here or not"."""
    steps = [step for step in range(len(mask)) if mask[step]]
    options = range(actions.shape[1])
    total = 0.0
    for path in itertools.product(options, repeat=len(steps)):
        chance = choices[steps[0], path[0]].exp() * actions[steps[0], path[0]].exp()
        for before, after, step in zip(path, path[1:], steps[1:], strict=False):
            stays = (1 - ends[step, before]) * (before == after)
            chance = chance * (stays + ends[step, before] * choices[step, after].exp()) * actions[step, after].exp()
        total = total + chance
    return total.log()


@pytest.mark.parametrize("seed", range(3))
def test_the_forward_algorithm_sums_over_every_sequence_of_options(seed):
    generator = torch.Generator().manual_seed(seed)
    shape = (3, 5, 3)
    actions = torch.randn(shape, generator=generator, dtype=torch.float64) - 1
    choices = torch.randn(shape, generator=generator, dtype=torch.float64).log_softmax(-1)
    ends = torch.rand(shape, generator=generator, dtype=torch.float64)
    ends[0, 2] = torch.tensor([0.0, 1.0, 0.5])
    mask = torch.tensor([[True] * 5, [False, True, True, False, True], [True, False, False, False, False]])
    found, beliefs = marginal_option_logprobs(actions, choices, ends, mask)
    for row in range(3):
        wanted = brute_force(actions[row], choices[row], ends[row], mask[row].tolist())
        assert found[row].sum().item() == pytest.approx(wanted.item(), abs=1e-12)
    assert (found[~mask] == 0).all()
    assert torch.allclose(beliefs.exp().sum(-1)[mask], torch.ones(9, dtype=torch.float64))


@pytest.mark.parametrize("seed", range(2))
def test_endings_are_as_likely_as_in_every_sequence_of_options(seed):
    """`P(ends at t | a_<t)`: the sequences up to the step before, each weighed by its own β."""
    generator = torch.Generator().manual_seed(seed)
    shape = (2, 4, 3)
    actions = torch.randn(shape, generator=generator, dtype=torch.float64) - 1
    choices = torch.randn(shape, generator=generator, dtype=torch.float64).log_softmax(-1)
    ends = torch.rand(shape, generator=generator, dtype=torch.float64)
    mask = torch.tensor([[True] * 4, [False, True, False, True]])
    found, beliefs = marginal_option_logprobs(actions, choices, ends, mask)
    likely = ending_probabilities(beliefs, actions, found, ends, mask)
    wanted = torch.zeros(2, 4, dtype=torch.float64)
    for row in range(2):
        steps = mask[row].nonzero().flatten().tolist()
        for place in range(1, len(steps)):
            chances = torch.zeros(3, dtype=torch.float64)
            for path in itertools.product(range(3), repeat=place):
                chance = choices[row, steps[0], path[0]].exp() * actions[row, steps[0], path[0]].exp()
                for (before, after), step in zip(itertools.pairwise(path), steps[1:place], strict=True):
                    stop = ends[row, step, before]
                    chance = chance * ((1 - stop) * (before == after) + stop * choices[row, step, after].exp())
                    chance = chance * actions[row, step, after].exp()
                chances[path[-1]] += chance
            wanted[row, steps[place]] = (chances / chances.sum()) @ ends[row, steps[place]]
    torch.testing.assert_close(likely, wanted)
    with pytest.raises(ValueError, match="mask"):
        ending_probabilities(beliefs, actions, found, ends, mask[:, :2])


def test_options_that_act_alike_change_nothing_and_gradients_are_right():
    generator = torch.Generator().manual_seed(7)
    actions = torch.randn(2, 4, 1, generator=generator, dtype=torch.float64).expand(2, 4, 3)
    choices = torch.randn(2, 4, 3, generator=generator, dtype=torch.float64).log_softmax(-1)
    ends = torch.rand(2, 4, 3, generator=generator, dtype=torch.float64)
    mask = torch.ones(2, 4, dtype=torch.bool)
    found, _ = marginal_option_logprobs(actions, choices, ends, mask)
    assert torch.allclose(found, actions[..., 0], atol=1e-14)
    inputs = [tensor.clone().requires_grad_() for tensor in (actions, choices, ends)]
    assert torch.autograd.gradcheck(lambda *tensors: marginal_option_logprobs(*tensors, mask)[0], inputs)
    hard = torch.zeros_like(ends, requires_grad=True)
    total = marginal_option_logprobs(inputs[0], inputs[1], hard, mask)[0].sum()
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(total, [*inputs[:2], hard]))


def test_collapse_is_seen_both_ways():
    mask = torch.ones(2, 100, dtype=torch.bool)
    mixed, one = torch.arange(200).view(2, 100) % 4, torch.zeros(2, 100, dtype=torch.int64)
    often, seldom = torch.full((2, 100), 0.97), torch.full((2, 100), 0.1)
    healthy = option_metrics(mixed, seldom, mask, num_options=4)
    assert healthy["usage_entropy"] == pytest.approx(1)
    assert healthy["duration"] == pytest.approx(10)
    assert healthy["collapsed"] == 0
    assert healthy["share_3"] == pytest.approx(0.25)
    assert option_metrics(one, seldom, mask, num_options=4)["collapsed"] == 1
    assert option_metrics(mixed, often, mask, num_options=4)["collapsed"] == 1


def test_the_manager_s_gradient_by_finite_differences():
    generator = torch.Generator().manual_seed(0)
    transitions, goals = (torch.randn(2, 3, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    advantages = torch.randn(2, 3, generator=generator, dtype=torch.float64)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    goals.requires_grad_()
    transitions.requires_grad_()

    def loss(goals):
        return goal_direction_loss(transitions, goals, advantages, mask, reduction="per_token")[0]

    assert torch.autograd.gradcheck(loss, goals)
    assert torch.autograd.grad(loss(goals), transitions, allow_unused=True) == (None,)
    # Length does not matter, so the gradient is at a right angle to the goal; it turns it towards the transition.
    (gradient,) = torch.autograd.grad(loss(goals), goals)
    assert (gradient * goals).sum(-1).abs().max() < 1e-12
    turned = cosine(transitions, goals - 0.1 * gradient * advantages.sign()[..., None])
    assert (turned >= cosine(transitions, goals) - 1e-12).all()


def test_transitions_end_with_the_episode_and_with_the_data():
    states = torch.arange(12.0).view(2, 6, 1)
    ends = torch.tensor([[False, False, True, False, False, False], [False] * 6])
    found = horizon_transitions(states, states + 1, ends, horizon=3)
    assert found[0, :, 0].tolist() == [3, 2, 1, 3, 2, 1]
    assert found[1, :, 0].tolist() == [3, 3, 3, 3, 2, 1]
    one = horizon_transitions(states, states + 1, ends, horizon=1)
    assert torch.equal(one, torch.ones_like(one))


def test_intrinsic_rewards_against_the_sum_as_written():
    generator = torch.Generator().manual_seed(3)
    horizon, steps = 3, 5
    states, goals = (torch.randn(2, horizon - 1 + steps, 4, generator=generator) for _ in range(2))
    arrivals = torch.randn(2, steps, 4, generator=generator)
    episodes = torch.tensor([[-1, 0, 0, 0, 1, 1, 1], [5, 5, 5, 5, 5, 5, 5]])
    found = intrinsic_rewards(arrivals, states, goals, episodes, horizon=horizon)
    for row, step in itertools.product(range(2), range(steps)):
        wanted, here = 0.0, step + horizon - 1
        for place in (here, here - 1, here - 2):
            if episodes[row, place] == episodes[row, here]:
                first, second = (arrivals[row, step] - states[row, place]).tolist(), goals[row, place].tolist()
                dot = sum(a * b for a, b in zip(first, second, strict=True))
                wanted += dot / math.hypot(*first) / math.hypot(*second)
        assert found[row, step].item() == pytest.approx(wanted / horizon, abs=1e-5)
    straight = torch.arange(7.0).view(1, 7, 1).expand(1, 7, 4)
    right = intrinsic_rewards(straight[:, 2:] + 1, straight, torch.ones(1, 7, 4), episodes[1:], horizon=horizon)
    assert torch.allclose(right, torch.ones(1, 5))
    assert (intrinsic_rewards(arrivals, arrivals, arrivals * 0, episodes[:, 2:], horizon=1) == 0).all()

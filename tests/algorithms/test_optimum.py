"""Every algorithm reaches the optimum that its options have, by sampling alone."""

import pytest
import torch

from plaudit.algorithms.build import build_algorithm
from plaudit.configs.algorithm import AlgorithmConfig
from plaudit.rollout.token_mdp import TokenMDP
from studies.algorithms import ROUTES, learn, number_of_updates
from tests.algorithms.problems import SMALL

QUICK = (
    "reinforce, running mean",
    "reinforce, greedy answer (ReMax)",
    "reinforce, learned value",
    "rloo",
    "grpo, penalty in the reward",
    "reinforce++",
    "actor-critic",
    "a2c",
    "ppo, clip",
    "ppo, both",
    "dpo, pairs labelled by the reward",
)


@pytest.mark.parametrize("route", QUICK)
def test_reaches_the_tilted_optimum(route):
    mdp = TokenMDP(**SMALL, seed=2)
    table = learn(mdp, ROUTES[route], updates=number_of_updates(ROUTES[route], 120), rows=256)
    assert mdp.gap(table) < 0.01


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("route", ROUTES)
def test_reaches_the_tilted_optimum_on_the_full_problem(route, seed):
    mdp = TokenMDP(seed=seed)
    table = learn(mdp, ROUTES[route], updates=number_of_updates(ROUTES[route], 400), seed=seed)
    optimum = mdp.optimal_solution().logprobs
    assert mdp.gap(table) < 0.01
    assert mdp.total_variation(table, optimum).item() < 0.1


def test_several_prompts_with_rewards_of_other_sizes():
    mdp = TokenMDP(**SMALL, num_prompts=3, reward_scales=[1.0, 3.0, 0.3], seed=4)
    for name in ("rloo", "ppo"):
        table = learn(mdp, {"name": name}, updates=150 if name == "rloo" else 60, rows=240)
        assert mdp.gap(table) < 0.01, name


@pytest.mark.parametrize("options", [{"name": "a2c"}, {"name": "rloo"}, {"name": "ppo", "gae_lambda": 0.5}])
def test_discount_and_rewards_of_transitions(options):
    """γ < 1 and rewards along the way: the optimum is that of the discounted problem, not of the other."""
    shape = (1, 7, 3)
    extra = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    mdp = TokenMDP(**SMALL, transition_rewards=extra, seed=1)
    updates = number_of_updates(options, 120)
    table = learn(mdp, options | {"discount": 0.6}, updates=updates, rows=256)
    assert mdp.gap(table, discount=0.6) < 0.01
    assert mdp.gap(table) > 0.02


def test_where_all_answers_earn_much_a_baseline_is_what_lets_one_learn():
    """The same samples, steps and rate; 10 more for every answer, which changes no optimum."""
    paid = 10.0 * (TokenMDP(**SMALL).next_prefix < 0).double().expand(1, -1, -1)
    mdp = TokenMDP(**SMALL, transition_rewards=paid, seed=2)
    gaps = {}
    for baseline in ("none", "running_mean", "leave_one_out"):
        options = {"name": "reinforce", "baseline": baseline}
        gaps[baseline] = mdp.gap(learn(mdp, options, updates=120, rows=256))
    assert max(gaps["running_mean"], gaps["leave_one_out"]) < 0.02, gaps
    assert gaps["none"] > 5 * max(gaps["running_mean"], gaps["leave_one_out"]), gaps


def test_pairs_drawn_once_lead_to_the_optimum_too():
    """DPO without new samples: one batch of the reference's answers, many steps on it."""
    mdp = TokenMDP(**SMALL, seed=2)
    policy = mdp.policy()
    generator = torch.Generator().manual_seed(0)
    groups = torch.arange(1024) // 8
    batch = mdp.sample(policy, torch.zeros_like(groups), generator=generator).with_fields(group_ids=groups)
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.1)
    config = AlgorithmConfig(name="dpo", kl_coefficient=mdp.coefficient, epochs=60)
    metrics = build_algorithm(config, policy, optimizer).update(batch, generator=generator)
    assert mdp.gap(mdp.logprob_table(policy).detach()) < 0.01
    assert metrics["policy/steps"] == 60
    assert metrics["preference/accuracy"] > 0.8
    assert metrics["preference/margin"] > 0


def test_without_a_penalty_the_best_string_wins():
    mdp = TokenMDP(**SMALL, seed=2)
    table = learn(mdp, {"name": "ppo", "kl_placement": "none"}, updates=30, rows=256)
    best = mdp.string_rewards.max().item()
    assert mdp.expected_reward(table).item() == pytest.approx(best, abs=0.02)
    assert mdp.gap(table) > 0.1


def test_an_entropy_bonus_keeps_the_policy_open():
    """`J + c₂ Σ_t H` has its optimum where the policy is the softmax of `Q / c₂`: of the uniform reference."""
    mdp = TokenMDP(**SMALL, reference_scale=0.0, coefficient=0.3, seed=2)
    options = {"name": "a2c", "kl_placement": "none", "entropy_coefficient": 0.3, "reduction": "sequence_sum"}
    table = learn(mdp, options, updates=160, rows=1024)
    # Per step the bonus is the entropy at that state alone, with the states held fixed, so the soft values of later
    # states carry no bonus: π(a|s) ∝ exp(Q(s, a) / c₂), Q of the reward.
    values = mdp.evaluate(table, coefficient=0.0).action_values
    wanted = (values / 0.3).log_softmax(-1)
    assert (table.exp() - wanted.exp()).abs().max() < 0.05
    assert (table.exp() - mdp.reference_logprobs.exp()).abs().max() > 0.2

"""The mechanics of an update: what the first step sees, what is left out, micro-batches, resuming, faults."""

import io

import pytest
import torch

from plaudit.algorithms.base import Prepared
from plaudit.algorithms.build import build_algorithm
from plaudit.algorithms.minibatches import micro_batches
from plaudit.algorithms.updating import combine_metrics
from plaudit.configs.algorithm import AlgorithmConfig
from plaudit.core.finite import NonFiniteError
from plaudit.rollout.tabular import TabularPolicy
from plaudit.rollout.token_mdp import TokenMDP
from plaudit.rollout.trajectory import concatenate
from tests.algorithms.problems import SMALL

EXACT = {"rtol": 0, "atol": 1e-12}


class InPieces(TabularPolicy):
    """A tabular policy that wants its rows in pieces, groups torn apart."""

    def micro_batches(self, trajectory):
        rows = torch.randperm(trajectory.num_rows, generator=torch.Generator().manual_seed(3))
        return list(rows.split([2, 5, 1, trajectory.num_rows - 8]))


def problem(prompts=3):
    return TokenMDP(**SMALL, num_prompts=prompts, seed=1)


def batch_of(mdp, rows=24, *, policy=None, seed=0):
    policy = policy or mdp.policy()
    with torch.no_grad():
        policy.critic.uniform_(-1, 1, generator=torch.Generator().manual_seed(seed))
    prompts = torch.arange(rows) % mdp.num_prompts
    return mdp.sample(policy, prompts, generator=torch.Generator().manual_seed(seed))


def algorithm_of(policy, rate=0.1, sgd=False, limit=None, total=None, **options):
    optimizer = (torch.optim.SGD if sgd else torch.optim.Adam)(policy.parameters(), lr=rate)
    return build_algorithm(AlgorithmConfig(**options), policy, optimizer, max_gradient_norm=limit, total_updates=total)


@pytest.mark.parametrize("options", [{}, {"view": "answer"}, {"surrogate": "both"}, {"baseline": "leave_one_out"}])
def test_the_first_step_of_ppo_sees_a_ratio_of_one(options):
    mdp = problem()
    policy = mdp.policy()
    batch = batch_of(mdp, policy=policy)
    algorithm = algorithm_of(policy, name="ppo", epochs=3, **options)
    prepared = algorithm.prepare(batch)
    steps = [algorithm.step(prepared, rows) for rows in algorithm.minibatches(prepared)]
    first = steps[0]
    for name in ("mean", "min", "max"):
        assert first[f"policy/ratio_{name}"] == 1
    assert first["policy/clip_fraction"] == 0
    assert first["policy/approximate_kl"] == 0
    assert steps[-1]["policy/approximate_kl"] > 0
    assert steps[-1]["policy/ratio_min"] < 1 < steps[-1]["policy/ratio_max"]


def test_metrics_of_a_batch_by_hand():
    mdp = problem(prompts=1)
    policy = mdp.policy()
    batch = batch_of(mdp, rows=6, policy=policy)
    batch = batch.with_fields(reference_logprobs=batch.old_logprobs - 0.25 * batch.mask)
    algorithm = algorithm_of(policy, name="rloo", kl_coefficient=0.4)
    prepared = algorithm.prepare(batch)
    lengths = batch.mask.sum(1).double()
    penalised = batch.rewards.sum(1) - 0.4 * 0.25 * lengths
    others = (penalised.sum() - penalised) / 5
    assert prepared.metrics == pytest.approx(
        {
            "objective/kl": 0.25 * lengths.mean().item(),
            "objective/kl_per_token": 0.25,
            "objective/kl_coefficient": 0.4,
            "objective/advantage_std": (penalised - others).std().item(),
            "objective/penalised_reward": penalised.mean().item(),
            "objective/rows_left_out": 0,
        }
    )
    assert (prepared.advantages[:, 1:] == 0).all()
    torch.testing.assert_close(prepared.advantages[:, 0], penalised - others, **EXACT)
    torch.testing.assert_close(prepared.returns[:, 0], penalised, **EXACT)
    metrics = algorithm.update(batch)
    entropy = mdp.enumerate()  # the first step's entropies are the reference's: p log p over its table
    table = mdp.reference_logprobs[0]
    states = -(table.exp() * table).sum(-1)
    assert entropy.num_rows == mdp.num_strings
    expected = states[batch.observations][batch.mask].mean().item()
    assert metrics["policy/entropy"] == pytest.approx(expected)
    assert metrics["policy/steps"] == 1
    assert combine_metrics([{"policy/ratio_min": 1.0, "policy/ratio_max": 1.0, "a": 1.0}, {"policy/ratio_min": 0.5,
                            "policy/ratio_max": 3.0, "a": 2.0}]) == {
        "policy/steps": 2, "policy/ratio_min": 0.5, "policy/ratio_max": 3.0, "a": 1.5}  # fmt: skip


@pytest.mark.parametrize("reduction", ["per_token", "per_sequence", "sequence_sum", "per_prompt"])
@pytest.mark.parametrize("view", ["token", "answer"])
def test_micro_batches_give_the_step_of_one_piece(reduction, view):
    mdp = problem()
    found = []
    for kind in (TabularPolicy, InPieces):
        policy = kind(mdp.policy().logits)
        batch = batch_of(mdp, policy=policy)
        algorithm = algorithm_of(
            policy,
            sgd=True,
            limit=0.05,
            name="ppo",
            view=view,
            reduction=reduction,
            epochs=2,
            entropy_coefficient=0.1,
            kl_placement="loss",
            value_clip=0.1,
        )
        metrics = algorithm.update(batch, generator=torch.Generator().manual_seed(0))
        found.append((policy, metrics))
    (whole, one), (pieces, many) = found
    for name, parameter in whole.named_parameters():
        torch.testing.assert_close(dict(pieces.named_parameters())[name], parameter, **EXACT)
    assert many == pytest.approx(one)
    assert one["gradient_norm"] > 0.05
    assert (whole.logits - mdp.policy().logits).abs().max() > 1e-4


def test_pairs_of_answers_go_together_whatever_the_micro_batches():
    mdp = problem()
    found = []
    for kind in (TabularPolicy, InPieces):
        policy = kind(mdp.policy().logits)
        batch = batch_of(mdp, policy=policy)
        parts = micro_batches(policy, batch, whole_groups=True)
        assert sorted(torch.cat(parts).tolist()) == list(range(batch.num_rows))
        assert sum(len(set(batch.group_ids[part].tolist())) for part in parts) == mdp.num_prompts
        metrics = algorithm_of(policy, sgd=True, name="dpo", epochs=2).update(batch)
        found.append((policy.logits.detach(), metrics))
    torch.testing.assert_close(found[1][0], found[0][0], **EXACT)
    assert found[1][1] == pytest.approx(found[0][1])
    assert (found[0][0] - mdp.policy().logits).abs().max() > 1e-4


@pytest.mark.parametrize("name", ["rloo", "grpo", "reinforce", "ppo"])
def test_rows_and_groups_that_say_nothing_change_nothing(name):
    """A row without a counted step, and the only answer to a prompt where answers are compared, are as if not there."""
    mdp = problem(prompts=4)
    found = []
    for extra in (False, True):
        policy = mdp.policy()
        batch = batch_of(mdp, rows=24, policy=policy)
        kept = batch.select(batch.group_ids < 3)
        if extra:
            invalid = kept.select(torch.tensor([0, 4]))
            nothing = torch.zeros_like(invalid.mask)
            invalid = invalid.with_fields(mask=nothing, rewards=torch.full_like(invalid.rewards, float("nan")))
            alone = batch.select(torch.tensor([3])) if name in ("rloo", "grpo") else invalid
            kept = concatenate([invalid, kept, alone])
        options = {"whiten_advantages": True, "kl_coefficient": 0.3}
        algorithm = algorithm_of(policy, sgd=True, name=name, **options)
        prepared = algorithm.prepare(kept)
        rows = torch.cat(algorithm.minibatches(prepared, torch.Generator().manual_seed(0)))
        if extra:
            assert not {0, 1, kept.num_rows - 1} & set(rows.tolist())
            assert prepared.metrics["objective/rows_left_out"] >= 3
            assert (prepared.advantages[[0, 1, -1]] == 0).all()
        algorithm.update(kept)
        found.append(policy.logits.detach())
    torch.testing.assert_close(found[1], found[0], **EXACT)
    assert (found[0] - mdp.policy().logits).abs().max() > 1e-4


def test_minibatches_hold_every_row_once_an_epoch_and_keep_prompts_together():
    mdp = problem(prompts=6)
    policy = mdp.policy()
    batch = batch_of(mdp, rows=30, policy=policy)
    algorithm = algorithm_of(policy, name="ppo", epochs=3, minibatches=4)
    prepared = algorithm.prepare(batch)
    steps = algorithm.minibatches(prepared, torch.Generator().manual_seed(0))
    assert len(steps) == 12
    orders = []
    for epoch in range(3):
        parts = steps[4 * epoch : 4 * epoch + 4]
        orders.append(torch.cat(parts).tolist())
        assert sorted(orders[-1]) == list(range(30))
        prompts = [set(batch.group_ids[part].tolist()) for part in parts]
        assert sum(map(len, prompts)) == 6
    assert len({tuple(order) for order in orders}) == 3
    again = algorithm.minibatches(prepared, torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(again, steps, strict=True))
    # One prompt alone is cut into rows; more parts than rows give fewer steps; nothing to learn from gives none.
    single = algorithm.prepare(batch.select(batch.group_ids == 0))
    assert [len(rows) for rows in algorithm.minibatches(single)] == [1, 1, 1, 2] * 3
    assert len(algorithm.minibatches(algorithm.prepare(batch.select(torch.tensor([1, 2]))))) == 6
    nothing = batch.with_fields(mask=torch.zeros_like(batch.mask))
    assert algorithm.minibatches(algorithm.prepare(nothing)) == []
    before = policy.logits.detach().clone()
    assert algorithm.update(nothing)["policy/steps"] == 0
    assert torch.equal(policy.logits, before)


def test_an_early_stop_leaves_the_other_steps_out():
    mdp = problem()
    taken = {}
    for target in (None, 1e-6):
        policy = mdp.policy()
        algorithm = algorithm_of(policy, name="ppo", epochs=5, target_kl=target)
        taken[target] = algorithm.update(batch_of(mdp, policy=policy))["policy/steps"]
    assert taken == {None: 5, 1e-6: 2}  # the first step sees a divergence of 0, the second the first one's
    limited = algorithm_of(mdp.policy(), name="ppo", epochs=5, target_kl=0.1)
    assert [limited.stop_early({"policy/approximate_kl": kl}) for kl in (0.149, 0.151)] == [False, True]


def test_coefficients_follow_their_targets():
    mdp = problem()
    policy = mdp.policy()
    options = {"kl_target": 2.0, "kl_adaptation": 0.5, "surrogate": "kl", "old_kl_target": 0.01}
    algorithm = algorithm_of(policy, name="ppo", kl_coefficient=0.2, **options)
    # 10 % too much of one, far too little of the other: the error is cut at a fifth.
    found = algorithm.finish({"objective/kl": 2.2, "policy/approximate_kl": 0.001})
    assert found["objective/next_kl_coefficient"] == pytest.approx(0.2 * (1 + 0.5 * 0.1))
    assert found["policy/next_old_kl_coefficient"] == pytest.approx(1.0 * (1 - 0.5 * 0.2))
    assert algorithm.kl_coefficient == found["objective/next_kl_coefficient"]
    assert algorithm.num_updates == 1
    assert algorithm.prepare(batch_of(mdp, policy=policy)).metrics["objective/kl_coefficient"] == pytest.approx(0.21)


def test_while_the_critic_warms_up_the_policy_stays_and_the_critic_learns_as_ever():
    """The value's part of the loss does not depend on the policy's, so a plain step moves the critic just as far."""
    mdp = problem()
    critics = {}
    for updates in (0, 2):
        policy = mdp.policy()
        batch = batch_of(mdp, policy=policy)
        before = policy.logits.detach().clone()
        algorithm = algorithm_of(policy, sgd=True, name="ppo", epochs=1, critic_warmup=updates, kl_target=1.0)
        assert algorithm.warming_up == (updates > 0)
        metrics = algorithm.update(batch)
        critics[updates] = policy.critic.detach().clone()
        assert torch.equal(policy.logits, before) == (updates > 0)
        assert ("policy/loss" in metrics) == (updates == 0)
        assert (algorithm.kl_coefficient == 0.05) == (updates > 0)
    torch.testing.assert_close(critics[2], critics[0], **EXACT)
    algorithm.update(batch)
    assert torch.equal(policy.logits, before)
    going_on = algorithm_of(policy, sgd=True, name="ppo", epochs=1, critic_warmup=2)
    going_on.load_state_dict(algorithm.state_dict())
    going_on.update(batch)
    assert not torch.equal(policy.logits, before)


@pytest.mark.parametrize("kind", [TabularPolicy, InPieces])
def test_a_critic_that_warms_up_reaches_the_mean_return_of_its_states(kind):
    """Against the slow reference: the mean, over all visits, of what came after a state."""
    mdp = problem()
    policy = kind(mdp.policy().logits)
    batch = batch_of(mdp, rows=200, policy=policy)
    options = {"critic_lambda": 1.0, "gae_lambda": 0.9, "value_coefficient": 1.0, "kl_coefficient": 0.0}
    algorithm = algorithm_of(policy, rate=0.3, name="ppo", epochs=300, critic_warmup=1, **options)
    algorithm.update(batch)
    seen: dict[int, list[float]] = {}
    for row in range(batch.num_rows):
        for step in range(int(batch.mask[row].sum())):
            seen.setdefault(int(batch.observations[row, step]), []).append(float(batch.rewards[row, step:].sum()))
    for state, returns in seen.items():
        assert policy.critic[state].item() == pytest.approx(sum(returns) / len(returns), abs=1e-3)


def test_an_untrained_critic_pays_for_places_unless_lambda_is_one():
    """With V = 0 and the same reward b for every answer, λ < 1 leaves `λⁿ b` to the step n before the end; the critic
    is taught b itself only by a λ of 1 of its own."""
    mdp = problem()
    policy = mdp.policy()
    batch = batch_of(mdp, policy=policy)
    mask = batch.mask
    left = mask.flip(1).cumsum(1).flip(1) - 1
    rewards = 3.0 * (mask & (left == 0))
    batch = batch.with_fields(values=torch.zeros_like(batch.values), next_values=torch.zeros_like(batch.values))
    batch = batch.with_fields(rewards=rewards.to(batch.rewards))
    base = {"name": "ppo", "kl_coefficient": 0.0, "whiten_advantages": False}
    plain = algorithm_of(policy, **base, gae_lambda=0.5).prepare(batch)
    expected = torch.where(mask, 3.0 * 0.5**left, 0.0).to(batch.rewards)
    torch.testing.assert_close(plain.advantages, expected, **EXACT)
    torch.testing.assert_close(plain.returns, expected, **EXACT)
    taught = algorithm_of(policy, **base, gae_lambda=0.5, critic_lambda=1.0).prepare(batch)
    torch.testing.assert_close(taught.advantages, expected, **EXACT)
    torch.testing.assert_close(taught.returns, 3.0 * mask.to(batch.rewards), **EXACT)
    whole = algorithm_of(policy, **base, gae_lambda=1.0).prepare(batch)
    torch.testing.assert_close(whole.advantages, 3.0 * mask.to(batch.rewards), **EXACT)


def test_the_clip_shrinks_along_its_schedule():
    """A step that changes ratios by a few per cent is far from a clip of 20 %, and beyond one of 2 %."""
    mdp = problem()
    fractions = []
    for done in (0, 9):
        policy = mdp.policy()
        algorithm = algorithm_of(policy, rate=0.03, total=10, name="ppo", clip_schedule="linear", epochs=2)
        algorithm.load_state_dict(algorithm.state_dict() | {"num_updates": done})
        fractions.append(algorithm.update(batch_of(mdp, policy=policy))["policy/clip_fraction"])
    assert fractions[0] == 0
    assert fractions[1] > 0.1
    with pytest.raises(ValueError, match="needs total_updates"):
        algorithm_of(mdp.policy(), name="ppo", clip_schedule="linear")


@pytest.mark.parametrize("options", [{"name": "ppo", "minibatches": 2, "kl_target": 1.0}, {"name": "reinforce"}])
def test_a_run_that_was_stopped_in_the_middle_of_a_batch_goes_on_bitwise(options):
    mdp = problem()

    def build():
        policy = mdp.policy()
        return policy, algorithm_of(policy, **options)

    def go_on(policy, algorithm, prepared, steps):
        metrics = [algorithm.step(prepared, rows) for rows in steps]
        algorithm.finish(prepared.metrics | combine_metrics(metrics))
        algorithm.update(batch_of(mdp, policy=policy, seed=7), generator=torch.Generator().manual_seed(1))
        return [parameter.detach().clone() for parameter in policy.parameters()], algorithm.state_dict()

    policy, algorithm = build()
    algorithm.update(batch_of(mdp, policy=policy), generator=torch.Generator().manual_seed(0))
    prepared = algorithm.prepare(batch_of(mdp, policy=policy, seed=5))
    steps = algorithm.minibatches(prepared, torch.Generator().manual_seed(2))
    algorithm.step(prepared, steps[0])
    file = io.BytesIO()
    torch.save(
        {
            "policy": policy.state_dict(),
            "optimizer": algorithm.optimizer.state_dict(),
            "algorithm": algorithm.state_dict(),
            "prepared": prepared.state(),
            "steps": steps[1:],
        },
        file,
    )
    straight = go_on(policy, algorithm, prepared, steps[1:])
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    policy, algorithm = build()
    policy.load_state_dict(saved["policy"])
    algorithm.optimizer.load_state_dict(saved["optimizer"])
    algorithm.load_state_dict(saved["algorithm"])
    resumed = go_on(policy, algorithm, Prepared.from_state(saved["prepared"]), saved["steps"])
    assert all(torch.equal(a, b) for a, b in zip(straight[0], resumed[0], strict=True))
    assert straight[1] == resumed[1]


def test_what_is_not_finite_never_reaches_the_weights():
    mdp = problem()
    policy = mdp.policy()
    algorithm = algorithm_of(policy, name="ppo", kl_placement="loss")
    batch = batch_of(mdp, policy=policy)
    rewards = batch.rewards.clone()
    rewards[5, 0] = float("inf")
    with pytest.raises(NonFiniteError, match="rewards of rows 5 are not finite"):
        algorithm.update(batch.with_fields(rewards=rewards))
    before = [parameter.detach().clone() for parameter in policy.parameters()]
    reference = batch.reference_logprobs.clone()
    reference[2, 0] = float("inf")
    with pytest.raises(NonFiniteError, match=r"update 0, rows .*: the loss is .*weights were left as they were"):
        algorithm.update(batch.with_fields(reference_logprobs=reference))
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), before, strict=True))
    assert all(parameter.grad is None for parameter in policy.parameters())
    algorithm.update(batch)
    assert not torch.equal(policy.logits, before[0])


def test_faults_are_named():
    mdp = problem()
    policy = mdp.policy()
    batch = batch_of(mdp, policy=policy)
    with pytest.raises(ValueError, match="greedy baselines are missing"):
        algorithm_of(policy, name="reinforce", baseline="greedy").update(batch)
    with pytest.raises(ValueError, match="were given, but the baseline is leave_one_out"):
        algorithm_of(policy, name="rloo").update(batch, baselines=torch.zeros(24))
    with pytest.raises(ValueError, match="group_ids is None"):
        algorithm_of(policy, name="rloo").update(batch.with_fields(group_ids=None))
    with pytest.raises(ValueError, match="row 0 is not one whole answer"):
        algorithm_of(policy, name="rloo").update(batch.with_fields(continues=torch.ones_like(batch.continues)))
    with pytest.raises(ValueError, match="max_gradient_norm must be positive"):
        algorithm_of(policy, name="rloo", limit=0.0)
    policy.critic.requires_grad_(False)
    with pytest.raises(ValueError, match="needs a critic that learns"):
        algorithm_of(policy, name="a2c").update(batch)


def test_needs_are_told():
    policy = problem().policy()
    needs = {
        name: [getattr(algorithm_of(policy, name=name), f"needs_{what}") for what in ("critic", "groups", "greedy")]
        for name in ("reinforce", "rloo", "grpo", "ppo")
    }
    assert needs == {
        "reinforce": [False, False, False],
        "rloo": [False, True, False],
        "grpo": [False, True, False],
        "ppo": [True, False, False],
    }
    assert algorithm_of(policy, name="reinforce", baseline="greedy").needs_greedy

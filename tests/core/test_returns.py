import math

import pytest
import torch

from plaudit.core.returns import (
    discounted_returns,
    gae,
    lambda_returns,
    n_step_returns,
    next_counted_index,
    off_policy_corrections,
    retrace,
    shift_to_next,
    vtrace,
)

B, T = 6, 11


def wild(seed=0, *, everything_counts=False):
    """Rows with ends, truncations, masked steps, and garbage wherever it must not matter."""
    generator = torch.Generator().manual_seed(seed)

    def normal():
        return torch.randn(B, T, generator=generator, dtype=torch.float64)

    data = {"rewards": normal(), "values": normal(), "next_values": normal()}
    data["continues"] = (torch.rand(B, T, generator=generator) > 0.15).double()
    data["truncated"] = torch.rand(B, T, generator=generator) < 0.15
    data["mask"] = (
        torch.ones(B, T, dtype=torch.bool) if everything_counts else torch.rand(B, T, generator=generator) > 0.3
    )
    factors = {
        "discount": torch.rand(B, T, generator=generator, dtype=torch.float64),
        "lam": torch.rand(B, T, generator=generator, dtype=torch.float64),
        "log_ratios": normal(),
    }
    for name in ("rewards", "values", "next_values"):
        data[name] = data[name].masked_fill(~data["mask"], float("nan"))
    data["next_values"] = data["next_values"].masked_fill(data["continues"] == 0, float("nan"))
    return data, factors


def rows_of(data, factors):
    """Each row as plain lists of its counted steps, with a flag where the data breaks off."""
    for row in range(B):
        steps = [t for t in range(T) if data["mask"][row, t]]
        columns = {name: [float(tensor[row, t]) for t in steps] for name, tensor in {**data, **factors}.items()}
        columns["break"] = [bool(columns["truncated"][i]) or i + 1 == len(steps) for i in range(len(steps))]
        yield row, steps, columns


def bootstrap(c, i):
    return c["next_values"][i] if c["continues"][i] else 0.0


def against_rows(found, data, factors, formula):
    for row, steps, columns in rows_of(data, factors):
        for i, t in enumerate(steps):
            assert float(found[row, t]) == pytest.approx(formula(columns, i), rel=1e-10, abs=1e-10), (row, t)
    assert (found[~data["mask"]] == 0).all()
    assert torch.isfinite(found).all()


def test_by_hand():
    # Three steps, γ = ½, λ = ½, V = (1, 2, 3), rewards (1, 0, 4), true end.
    rewards, values, following = (torch.tensor([x], dtype=torch.float64) for x in ([1, 0, 4], [1, 2, 3], [2, 3, 9]))
    continues, never = torch.tensor([[1.0, 1.0, 0.0]], dtype=torch.float64), torch.zeros(1, 3, dtype=torch.bool)
    common = (continues, never, ~never)
    # δ = (1 + 1 - 1, 0 + 1.5 - 2, 4 - 3) = (1, -.5, 1); A_3 = 1, A_2 = -.5 + ¼ = -.25, A_1 = 1 - ¼·¼ = .9375
    advantages, returns = gae(rewards, values, following, *common, discount=0.5, gae_lambda=0.5)
    assert advantages.tolist() == [[0.9375, -0.25, 1.0]]
    assert returns.tolist() == [[1.9375, 1.75, 4.0]]
    assert discounted_returns(rewards, following, *common, discount=0.5).tolist() == [[2.0, 2.0, 4.0]]
    assert n_step_returns(rewards, following, *common, discount=0.5, num_steps=2).tolist() == [[1.75, 2.0, 4.0]]
    # Truncated in the middle: step 2 bootstraps from its next value 3, and step 1 sees nothing of step 3.
    cut = (continues, torch.tensor([[False, True, False]]), ~never)
    assert discounted_returns(rewards, following, *cut, discount=0.5).tolist() == [[1.75, 1.5, 4.0]]
    advantages, _ = gae(rewards, values, following, *cut, discount=0.5, gae_lambda=0.5)
    assert advantages.tolist() == [[0.875, -0.5, 1.0]]
    # Not an end: the last step bootstraps, 4 + ½·9.
    open_end = (torch.ones_like(continues), never, ~never)
    assert discounted_returns(rewards, following, *open_end, discount=0.5)[0, 2].item() == 8.5


def test_next_counted_step_by_hand():
    mask = torch.tensor([[True, False, True, False], [False, False, False, False]])
    assert next_counted_index(mask).tolist() == [[2, 2, 4, 4], [4, 4, 4, 4]]
    values = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]])
    assert shift_to_next(values, mask, torch.tensor([9.0, -1.0])).tolist() == [[3, 3, 9, 9], [-1, -1, -1, -1]]


@pytest.mark.parametrize("seed", range(4))
def test_gae_equals_the_sum_of_discounted_errors(seed):
    data, factors = wild(seed)

    def formula(c, i):
        total, weight = 0.0, 1.0
        for j in range(i, len(c["rewards"])):
            gamma = c["discount"][j] * c["continues"][j]
            total += weight * (c["rewards"][j] + c["discount"][j] * bootstrap(c, j) - c["values"][j])
            weight *= gamma * c["lam"][j]
            if c["truncated"][j]:
                break
        return total

    found, returns = gae(**data, discount=factors["discount"], gae_lambda=factors["lam"])
    against_rows(found, data, factors, formula)
    assert torch.equal(returns[data["mask"]], (found + data["values"])[data["mask"]])


@pytest.mark.parametrize("seed", range(3))
def test_lambda_returns_equal_the_forward_mixture_of_n_step_returns(seed):
    """The forward view: `(1-λ) Σ λ^(n-1) G^(n)`, the rest of the weight on the longest return there is."""
    data, _ = wild(seed)
    del data["values"]
    gamma, lam = 0.9, 0.7
    parts = [n_step_returns(**data, discount=gamma, num_steps=n) for n in range(1, T + 1)]
    forward = sum((1 - lam) * lam ** (n - 1) * part for n, part in enumerate(parts, 1)) + lam**T * parts[-1]
    found = lambda_returns(**data, discount=gamma, return_lambda=lam)
    torch.testing.assert_close(found, forward, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("num_steps", [1, 2, 3, T, 50])
def test_n_step_returns_equal_a_plain_loop(num_steps):
    data, factors = wild(7)
    del data["values"]

    def formula(c, i):
        total, weight = 0.0, 1.0
        for j in range(i, min(i + num_steps, len(c["rewards"]))):
            total += weight * c["rewards"][j]
            weight *= c["discount"][j] * c["continues"][j]
            if c["break"][j] or j == i + num_steps - 1:
                return total + (weight * c["next_values"][j] if weight else 0.0)
        raise AssertionError

    found = n_step_returns(**data, discount=factors["discount"], num_steps=num_steps)
    against_rows(found, data, factors, formula)


@pytest.mark.parametrize("seed", range(3))
def test_retrace_and_vtrace_equal_their_published_sums(seed):
    data, factors = wild(seed)

    def error(c, j):
        return c["rewards"][j] + c["discount"][j] * bootstrap(c, j) - c["values"][j]

    def published_retrace(c, i):  # Munos et al., equation 3: Q + Σ_j γ^(j-i) (Π_{i<k≤j} c_k) δ_j
        total, weight = c["values"][i], 1.0
        for j in range(i, len(c["rewards"])):
            total += weight * error(c, j)
            if c["break"][j]:
                break
            weight *= c["discount"][j] * c["continues"][j] * 0.9 * min(1.0, math.exp(c["log_ratios"][j + 1]))
        return total

    def published_vtrace(c, i):  # Espeholt et al., equation 1: V + Σ_j γ^(j-i) (Π_{i≤k<j} c_k) ρ_j δ_j
        total, weight = c["values"][i], 1.0
        for j in range(i, len(c["rewards"])):
            total += weight * min(1.5, math.exp(c["log_ratios"][j])) * error(c, j)
            if c["break"][j]:
                break
            weight *= c["discount"][j] * c["continues"][j] * 0.9 * min(1.2, math.exp(c["log_ratios"][j]))
        return total

    arguments = {name: tensor for name, tensor in data.items() if name != "values"}
    ratios, discount = factors["log_ratios"], factors["discount"]
    found = retrace(**arguments, action_values=data["values"], log_ratios=ratios, discount=discount, retrace_lambda=0.9)
    against_rows(found, data, factors, published_retrace)
    targets, advantages = vtrace(
        **data,
        log_ratios=ratios,
        discount=discount,
        trace_lambda=0.9,
        clip_error=1.5,
        clip_trace=1.2,
        clip_advantage=0.8,
    )
    against_rows(targets, data, factors, published_vtrace)

    def published_advantage(c, i):
        behind = c["next_values"][i] if c["break"][i] else published_vtrace(c, i + 1)
        behind = behind if c["continues"][i] else 0.0
        return min(0.8, math.exp(c["log_ratios"][i])) * (c["rewards"][i] + c["discount"][i] * behind - c["values"][i])

    against_rows(advantages, data, factors, published_advantage)


def test_identities_between_the_settings():
    data, factors = wild(3)
    mask, values = data["mask"], data["values"].masked_fill(~data["mask"], 0.0)
    without = {name: tensor for name, tensor in data.items() if name != "values"}
    gamma, lam = factors["discount"], factors["lam"]
    close = {"rtol": 0, "atol": 1e-12}
    plain = discounted_returns(**without, discount=gamma)
    torch.testing.assert_close(lambda_returns(**without, discount=gamma, return_lambda=1.0), plain, **close)
    torch.testing.assert_close(n_step_returns(**without, discount=gamma, num_steps=T), plain, **close)
    one = n_step_returns(**without, discount=gamma, num_steps=1)
    torch.testing.assert_close(lambda_returns(**without, discount=gamma, return_lambda=0.0), one, **close)
    torch.testing.assert_close(gae(**data, discount=gamma, gae_lambda=0.0)[1], one, **close)
    # From here on the next value is the value of the next counted step, as it is on policy.
    following = torch.where(data["truncated"], data["next_values"], shift_to_next(values, mask, 0.3))
    for table in (data, without):
        table["next_values"] = following.masked_fill(~mask, float("nan"))
    advantages, returns = gae(**data, discount=gamma, gae_lambda=1.0)
    torch.testing.assert_close(advantages, (discounted_returns(**without, discount=gamma) - values) * mask, **close)
    returns = gae(**data, discount=gamma, gae_lambda=lam)[1]
    torch.testing.assert_close(lambda_returns(**without, discount=gamma, return_lambda=lam), returns, **close)
    on_policy = torch.zeros_like(values)
    targets, advantages = vtrace(**data, log_ratios=on_policy, discount=gamma, trace_lambda=lam)
    torch.testing.assert_close(targets, returns, **close)
    # With Q(s, a) = V(s), on policy, Retrace is the λ-return; its λ belongs to the step behind.
    found = retrace(**without, action_values=data["values"], log_ratios=on_policy, discount=gamma, retrace_lambda=0.7)
    torch.testing.assert_close(found, gae(**data, discount=gamma, gae_lambda=0.7)[1], **close)


def test_inserting_masked_steps_changes_nothing():
    data, factors = wild(5, everything_counts=True)
    generator = torch.Generator().manual_seed(1)
    places = torch.rand(B, 3 * T, generator=generator).argsort(1)[:, :T].sort(1).values

    def spread(tensor):
        garbage = {torch.bool: True, torch.float64: float("nan")}[tensor.dtype]
        return torch.full((B, 3 * T), garbage, dtype=tensor.dtype).scatter(1, places, tensor)

    spaced = {name: spread(tensor) for name, tensor in data.items()}
    spaced["mask"] = torch.zeros(B, 3 * T, dtype=torch.bool).scatter(1, places, True)
    discount, lam, ratios = (factors[name] for name in ("discount", "lam", "log_ratios"))
    wide = {"discount": spread(discount), "log_ratios": spread(ratios)}
    for dense, sparse in (
        (
            gae(**data, discount=discount, gae_lambda=lam)[0],
            gae(**spaced, discount=wide["discount"], gae_lambda=spread(lam))[0],
        ),
        (vtrace(**data, log_ratios=ratios, discount=discount).advantages, vtrace(**spaced, **wide).advantages),
    ):
        assert torch.equal(sparse.gather(1, places), dense)
    del data["values"], spaced["values"]
    for function, options in (
        (discounted_returns, {}),
        (n_step_returns, {"num_steps": 3}),
        (lambda_returns, {"return_lambda": 0.6}),
    ):
        dense = function(**data, discount=discount, **options)
        assert torch.equal(function(**spaced, discount=wide["discount"], **options).gather(1, places), dense)


def test_extremes():
    data, _ = wild(2)
    nothing = {**data, "mask": torch.zeros(B, T, dtype=torch.bool)}
    for found in gae(**nothing, discount=1.0, gae_lambda=0.95):
        assert (found == 0).all()
    huge = {**data, "rewards": 1e4 * data["rewards"], "values": 1e4 * data["values"]}
    far = torch.full((B, T), 1e4, dtype=torch.float64)
    for log_ratios in (far, -far):
        ratios = log_ratios.clone().requires_grad_()
        for found in vtrace(**huge, log_ratios=ratios, discount=0.99):
            assert torch.isfinite(found).all()
        assert torch.isfinite(torch.autograd.grad(found.sum(), ratios)[0]).all()
    assert torch.equal(gae(**data, discount=torch.tensor(0.9, dtype=torch.float64), gae_lambda=1.0)[0],
                       gae(**data, discount=0.9, gae_lambda=1.0)[0])  # fmt: skip
    single, _ = gae(**{name: tensor[:, :1] for name, tensor in wild(2, everything_counts=True)[0].items()},
                    discount=1.0, gae_lambda=1.0)  # fmt: skip
    assert torch.isfinite(single).all()


def test_gradients_flow_through_and_are_right():
    data, _ = wild(4, everything_counts=True)
    fixed = {name: data[name][:2, :4] for name in ("continues", "truncated", "mask")}
    free = [data[name][:2, :4].nan_to_num().clone().requires_grad_() for name in ("rewards", "values", "next_values")]

    def function(rewards, values, next_values):
        return gae(rewards, values, next_values, **fixed, discount=0.9, gae_lambda=0.8)[1]

    assert torch.autograd.gradcheck(function, free)
    assert torch.autograd.gradcheck(
        lambda r, n: lambda_returns(r, n, **fixed, discount=0.9, return_lambda=0.8), [free[0], free[2]]
    )


def test_faults_are_named():
    data, _ = wild()
    with pytest.raises(ValueError, match=r"values must have shape"):
        gae(**{**data, "values": data["values"][:, :1]}, discount=1.0, gae_lambda=1.0)
    with pytest.raises(ValueError, match="truncated must be boolean"):
        gae(**{**data, "truncated": data["truncated"].double()}, discount=1.0, gae_lambda=1.0)
    with pytest.raises(ValueError, match="discount must have shape"):
        gae(**data, discount=torch.ones(B), gae_lambda=1.0)
    with pytest.raises(ValueError, match="mask must be boolean"):
        off_policy_corrections(**{**data, "mask": data["mask"].double()}, discount=1.0, traces=1.0)
    del data["values"]
    with pytest.raises(ValueError, match="num_steps"):
        n_step_returns(**data, discount=1.0, num_steps=0)

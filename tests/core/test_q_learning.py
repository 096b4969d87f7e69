import math

import pytest
import torch

from plaudit.core.q_learning import bootstrapped_targets, double_q_values, greedy_values, soft_values


def test_backups_by_hand():
    mine = torch.tensor([[1.0, 3.0, 2.0], [0.0, -1.0, -2.0]])
    other = torch.tensor([[5.0, 4.0, 6.0], [7.0, 8.0, 9.0]])
    assert greedy_values(mine).tolist() == [3, 0]
    assert double_q_values(mine, other).tolist() == [4, 7]  # mine chooses, the other values
    reference = torch.tensor([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0]]).log()
    found = soft_values(mine, reference, coefficient=2.0)
    assert found[0].item() == pytest.approx(2 * math.log(0.5 * math.exp(0.5) + 0.25 * (math.exp(1.5) + math.e)))
    assert found[1].item() == pytest.approx(0.0)
    targets = bootstrapped_targets(torch.tensor([1.0, 2.0]), torch.tensor([10.0, math.inf]), torch.tensor([0.5, 0.0]))
    assert targets.tolist() == [6, 2]  # after an end nothing is bootstrapped, not even infinity


def test_the_soft_value_is_the_best_of_reward_minus_divergence_and_lies_between_mean_and_maximum():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(20, 5, generator=generator, dtype=torch.float64)
    reference = torch.randn(20, 5, generator=generator, dtype=torch.float64).log_softmax(-1)
    for coefficient in (0.1, 1.0, 10.0):
        soft = soft_values(values, reference, coefficient=coefficient)
        best = (reference + (values - soft[:, None]) / coefficient).exp()
        torch.testing.assert_close(best.sum(-1), torch.ones(20, dtype=torch.float64))
        earned = (best * (values - coefficient * (best.log() - reference))).sum(-1)
        torch.testing.assert_close(earned, soft)
        assert bool((soft <= values.amax(-1)).all())
        assert bool((soft >= (reference.exp() * values).sum(-1) - 1e-12).all())
    torch.testing.assert_close(soft_values(values, reference, coefficient=1e-4), values.amax(-1), atol=1e-3, rtol=0)
    mean = (reference.exp() * values).sum(-1)
    torch.testing.assert_close(soft_values(values, reference, coefficient=1e5), mean, atol=1e-4, rtol=0)
    shifted = soft_values(values + 7, reference, coefficient=1.0)
    torch.testing.assert_close(shifted, soft_values(values, reference, coefficient=1.0) + 7)


def test_a_maximum_of_noisy_values_is_too_high_and_a_double_one_is_not():
    generator = torch.Generator().manual_seed(1)
    noisy = torch.randn(20_000, 10, generator=generator)  # ten actions that are worth 0, with errors of variance 1
    other = torch.randn(20_000, 10, generator=generator)
    assert greedy_values(noisy).mean().item() == pytest.approx(1.5388, abs=0.02)  # E[max of 10 normals]
    assert double_q_values(noisy, other).mean().item() == pytest.approx(0.0, abs=0.03)


def test_extremes_and_gradients():
    huge = torch.tensor([[1e4, -1e4, 0.0]], dtype=torch.float64)
    reference = torch.full((1, 3), 1 / 3, dtype=torch.float64).log()
    assert soft_values(huge, reference, coefficient=0.01).isfinite().all()
    values = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2), requires_grad=True)
    table = reference.expand(4, 3)
    assert torch.autograd.gradcheck(lambda each: soft_values(each, table, coefficient=0.7), values)
    assert not bootstrapped_targets(values[0], values[1], values[2]).requires_grad


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="other_values"):
        double_q_values(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="must be positive, got 0"):
        soft_values(torch.zeros(2, 3), torch.zeros(2, 3), coefficient=0)
    with pytest.raises(ValueError, match=r"next_values must have shape \(2,\)"):
        bootstrapped_targets(torch.zeros(2), torch.zeros(2, 1), torch.zeros(2))

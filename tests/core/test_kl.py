import math

import pytest
import torch

from plaudit.core.kl import adaptive_kl_coefficient, categorical_entropy, exact_kl, kl_k1, kl_k2, kl_k3

P = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
Q = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
KL = 0.2 * math.log(0.4) + 0.3 * math.log(1.2) + 0.5 * math.log(2)


def test_by_hand():
    # log p - log q = ln 2: k1 = ln 2, k2 = ½ ln² 2, k3 = ½ - 1 + ln 2
    p, q = torch.tensor([0.5]).double().log(), torch.tensor([0.25]).double().log()
    assert kl_k1(p, q).item() == pytest.approx(math.log(2), abs=1e-12)
    assert kl_k2(p, q).item() == pytest.approx(math.log(2) ** 2 / 2, abs=1e-12)
    assert kl_k3(p, q).item() == pytest.approx(math.log(2) - 0.5, abs=1e-12)
    assert exact_kl(P.log(), Q.log()).item() == pytest.approx(KL, abs=1e-12)
    assert categorical_entropy(torch.zeros(4)).item() == pytest.approx(math.log(4))


def test_k1_and_k3_are_unbiased_and_k2_is_not():
    def mean(kind):
        return (P * kind(P.log(), Q.log())).sum().item()

    assert mean(kl_k1) == pytest.approx(KL, abs=1e-12)
    assert mean(kl_k3) == pytest.approx(KL, abs=1e-12)
    assert abs(mean(kl_k2) - KL) > 0.008


def test_expected_gradients_are_those_of_the_table_in_the_module():
    logits = torch.randn(5, dtype=torch.float64, requires_grad=True)
    reference = torch.randn(5, dtype=torch.float64).log_softmax(0)
    logprobs = logits.log_softmax(0)
    weights = logprobs.exp().detach()

    def as_loss(kind):
        return torch.autograd.grad((weights * kind(logprobs, reference)).sum(), logits, retain_graph=True)[0]

    forward = torch.autograd.grad(exact_kl(logprobs, reference), logits, retain_graph=True)[0]
    backward = torch.autograd.grad(exact_kl(reference, logprobs), logits, retain_graph=True)[0]
    close = {"rtol": 0, "atol": 1e-12}
    torch.testing.assert_close(as_loss(kl_k1), torch.zeros_like(logits), **close)
    torch.testing.assert_close(as_loss(kl_k2), forward, **close)
    torch.testing.assert_close(as_loss(kl_k3), backward, **close)
    assert (forward - backward).abs().max() > 0.01
    # Samples of a fixed distribution: k1 and k3 give the gradient of KL(reference‖π).
    for kind in (kl_k1, kl_k3):
        loss = (reference.exp() * kind(reference, logprobs)).sum()
        torch.testing.assert_close(torch.autograd.grad(loss, logits, retain_graph=True)[0], backward, **close)


def test_exact_against_torch_and_its_identities():
    p, q = torch.randn(7, 9, dtype=torch.float64), torch.randn(7, 9, dtype=torch.float64)
    distribution = torch.distributions.Categorical
    expected = torch.distributions.kl_divergence(distribution(logits=p), distribution(logits=q))
    torch.testing.assert_close(exact_kl(p, q), expected)
    torch.testing.assert_close(categorical_entropy(p), distribution(logits=p).entropy())
    torch.testing.assert_close(exact_kl(p + 3, q - 5), exact_kl(p, q))
    assert (exact_kl(p, p).abs() < 1e-14).all()
    torch.testing.assert_close(exact_kl(p, torch.zeros_like(p)), math.log(9) - categorical_entropy(p))


def test_extremes():
    far = torch.tensor([1e4, -1e4, 0.0])
    zero = torch.zeros(3)
    assert torch.isfinite(kl_k1(far, zero)).all()
    assert torch.isfinite(kl_k2(far, zero)).all()
    assert kl_k3(far, zero).tolist() == [pytest.approx(9999.0), math.inf, 0.0]
    assert kl_k3(torch.tensor([1e-4]), torch.zeros(1)).item() == pytest.approx(5e-9, rel=1e-3)
    never = torch.tensor([0.0, float("-inf")], dtype=torch.float64, requires_grad=True)
    half = torch.zeros(2, dtype=torch.float64)
    assert exact_kl(never, half).item() == pytest.approx(math.log(2))
    assert exact_kl(half, never).item() == math.inf
    assert exact_kl(never, never).item() == 0
    assert categorical_entropy(never).item() == 0
    (gradient,) = torch.autograd.grad(exact_kl(never, half) + categorical_entropy(never), never)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("kind", [kl_k1, kl_k2, kl_k3, exact_kl])
def test_gradcheck(kind):
    p, q = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(kind, [p, q])


def test_shapes_that_would_broadcast_are_refused():
    with pytest.raises(ValueError, match="must have shape"):
        kl_k1(torch.zeros(3), torch.zeros(3, 1))
    with pytest.raises(ValueError, match="must have shape"):
        exact_kl(torch.zeros(3, 2), torch.zeros(2))


def test_adaptive_coefficient_by_hand():
    assert adaptive_kl_coefficient(0.2, 6.0, target=6.0) == 0.2
    assert adaptive_kl_coefficient(0.2, 6.6, target=6.0) == pytest.approx(0.2 * 1.01)
    assert adaptive_kl_coefficient(0.2, 600.0, target=6.0) == pytest.approx(0.2 * 1.02)
    assert adaptive_kl_coefficient(0.2, -600.0, target=6.0, gain=0.5) == pytest.approx(0.2 * 0.9)
    for arguments in ((0.2, math.nan, 1.0), (-0.1, 1.0, 1.0), (0.2, 1.0, 0.0)):
        with pytest.raises(ValueError, match="must"):
            adaptive_kl_coefficient(*arguments[:2], target=arguments[2])
    with pytest.raises(ValueError, match="gain times clip"):
        adaptive_kl_coefficient(0.2, 1.0, target=1.0, gain=10.0)


def test_adaptive_coefficient_finds_the_one_that_holds_the_target():
    """A response `KL = 1/β`: the fixed point for a target of 4 is β = ¼."""
    coefficient = 3.0
    for _ in range(2000):
        coefficient = adaptive_kl_coefficient(coefficient, 1 / coefficient, target=4.0)
    assert coefficient == pytest.approx(0.25, rel=1e-3)

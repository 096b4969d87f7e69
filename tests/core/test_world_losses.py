import math

import pytest
import torch
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal, kl_divergence

from plaudit.core.world_losses import (
    autoencoder_loss,
    gaussian_kl,
    mixture_density_loss,
    mixture_log_density,
    reward_continuation_loss,
    sample_mixture,
)

DOUBLE = torch.float64


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def mixture(seed=0, shape=(3, 4), components=5, size=2):
    return (
        drawn(*shape, size, seed=seed),
        drawn(*shape, components, seed=seed + 1),
        drawn(*shape, components, size, seed=seed + 2),
        0.5 * drawn(*shape, components, size, seed=seed + 3),
    )


def test_mixture_by_hand():
    """Two components of equal weight at ±1 with deviation 1, seen from 0: each has density φ(1)."""
    density = mixture_log_density(
        torch.zeros(1, dtype=DOUBLE),
        torch.zeros(2, dtype=DOUBLE),
        torch.tensor([[1.0], [-1.0]], dtype=DOUBLE),
        torch.zeros(2, 1, dtype=DOUBLE),
    )
    assert density.item() == pytest.approx(-0.5 - 0.5 * math.log(2 * math.pi))
    # Weights 3 : 1 and deviation 2 in one of them, seen from 1.
    found = mixture_log_density(
        torch.tensor([1.0], dtype=DOUBLE),
        torch.tensor([math.log(3), 0.0], dtype=DOUBLE),
        torch.tensor([[1.0], [-1.0]], dtype=DOUBLE),
        torch.tensor([[0.0], [math.log(2)]], dtype=DOUBLE),
    )
    by_hand = 0.75 / math.sqrt(2 * math.pi) + 0.25 * math.exp(-0.5) / (2 * math.sqrt(2 * math.pi))
    assert found.item() == pytest.approx(math.log(by_hand))


def test_mixture_is_that_of_torch():
    targets, weights, means, scales = mixture()
    other = MixtureSameFamily(Categorical(logits=weights), Independent(Normal(means, scales.exp()), 1))
    torch.testing.assert_close(mixture_log_density(targets, weights, means, scales), other.log_prob(targets))


def test_a_mixture_beats_a_single_gaussian_on_bimodal_data():
    """±2 with deviation .1 by a coin: the best single Gaussian pays log 2 for nothing but width."""
    generator = torch.Generator().manual_seed(0)
    side = torch.randint(0, 2, (128, 1, 1), generator=generator).to(DOUBLE)
    data = 4 * side - 2 + 0.1 * torch.randn(128, 1, 1, generator=generator, dtype=DOUBLE)
    found = {}
    for components in (1, 2):
        weights = torch.zeros(components, dtype=DOUBLE, requires_grad=True)
        means = drawn(components, 1).requires_grad_()
        scales = torch.zeros(components, 1, dtype=DOUBLE, requires_grad=True)
        optimizer = torch.optim.Adam([weights, means, scales], lr=0.1)
        for _ in range(120):
            loss, _ = mixture_density_loss(
                data,
                weights.expand(128, 1, -1),
                means.expand(128, 1, -1, -1),
                scales.expand(128, 1, -1, -1),
                torch.ones(128, 1, dtype=torch.bool),
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        found[components] = loss.item()
    width = math.log(2 * math.pi * math.e) / 2
    assert found[1] == pytest.approx(width + math.log(data.std(unbiased=False).item()), abs=0.01)
    halves = [data[data < 0], data[data > 0]]
    each = [
        len(half) / 128 * (width + half.std(unbiased=False).log().item() - math.log(len(half) / 128)) for half in halves
    ]
    assert found[2] == pytest.approx(sum(each), abs=0.01)


def test_masked_steps_say_nothing_and_components_may_be_reordered():
    targets, weights, means, scales = mixture()
    mask = torch.rand(3, 4, generator=torch.Generator().manual_seed(1)) > 0.4
    loss, metrics = mixture_density_loss(targets, weights, means, scales, mask)
    broken = targets.masked_fill(~mask.unsqueeze(-1), 1e4)
    order = torch.tensor([3, 0, 4, 1, 2])
    again, _ = mixture_density_loss(broken, weights[..., order], means[..., order, :], scales[..., order, :], mask)
    torch.testing.assert_close(loss, again)
    plain = -mixture_log_density(targets, weights, means, scales)[mask].mean()
    torch.testing.assert_close(loss, plain)
    assert 0 < metrics["mixture_entropy"] < math.log(5)
    assert mixture_density_loss(targets, weights, means, scales, torch.zeros_like(mask))[0] == 0


def test_extremes_stay_finite():
    targets, weights, means, scales = mixture()
    mask = torch.ones(3, 4, dtype=torch.bool)
    leaves = [each.clone().requires_grad_() for each in (1e4 * weights, 1e2 * means, scales)]
    loss, _ = mixture_density_loss(1e2 * targets, *leaves, mask)
    loss.backward()
    assert loss.isfinite()
    assert all(leaf.grad.isfinite().all() for leaf in leaves)


def test_gradients():
    targets, weights, means, scales = mixture(shape=(2, 2), components=3)
    mask = torch.tensor([[True, True], [True, False]])
    leaves = [each.requires_grad_() for each in (weights, means, scales)]
    assert torch.autograd.gradcheck(lambda *each: mixture_density_loss(targets, *each, mask)[0], leaves)
    code = [drawn(3, 2, seed=5).requires_grad_(), drawn(3, 2, seed=6).requires_grad_()]
    assert torch.autograd.gradcheck(gaussian_kl, code)
    pictures = [drawn(3, 4, seed=7).requires_grad_(), drawn(3, 4, seed=8)]
    assert torch.autograd.gradcheck(lambda x, m, v: autoencoder_loss(x, pictures[1], m, v)[0], [pictures[0], *code])
    predicted = [drawn(2, 2, seed=9).requires_grad_(), drawn(2, 2, seed=10).requires_grad_()]
    seen = drawn(2, 2, seed=11), torch.tensor([[1.0, 0.0], [1.0, 1.0]], dtype=DOUBLE)
    assert torch.autograd.gradcheck(lambda r, c: reward_continuation_loss(r, c, *seen, mask)[0], predicted)


def test_samples_have_the_mixture_s_distribution():
    weights = torch.tensor([0.0, math.log(3)], dtype=DOUBLE)
    means = torch.tensor([[-1.0, 5.0], [2.0, 7.0]], dtype=DOUBLE)
    scales = torch.tensor([[0.5, 1.0], [0.1, 2.0]], dtype=DOUBLE).log()
    generator = torch.Generator().manual_seed(0)
    count = 40000
    uniform = torch.rand(count, generator=generator, dtype=DOUBLE)
    normal = torch.randn(count, 2, generator=generator, dtype=DOUBLE)
    found = sample_mixture(
        weights.expand(count, 2), means.expand(count, 2, 2), scales.expand(count, 2, 2), uniform, normal
    )
    assert found.mean(0).tolist() == pytest.approx([1.25, 6.5], abs=0.05)
    second = (found[:, 0] > 0.6).double().mean().item()
    assert second == pytest.approx(0.75, abs=0.01)
    # Temperature ½: weights 1 : 9, deviations divided by √2.
    cooler = sample_mixture(
        weights.expand(count, 2),
        means.expand(count, 2, 2),
        scales.expand(count, 2, 2),
        uniform,
        normal,
        temperature=0.5,
    )
    chosen = cooler[:, 0] > 0.6
    assert chosen.double().mean().item() == pytest.approx(0.9, abs=0.01)
    assert cooler[chosen][:, 1].std().item() == pytest.approx(2 / math.sqrt(2), abs=0.03)


def test_temperature_zero_is_the_mean_of_the_likeliest_component_and_the_last_is_never_passed():
    weights, means = torch.tensor([[0.0, 1.0]]), torch.tensor([[[1.0], [2.0]]])
    scales, last = torch.zeros(1, 2, 1), torch.tensor([1 - 1e-8])
    assert sample_mixture(weights, means, scales, torch.zeros(1), torch.ones(1, 1), temperature=0).item() == 2.0
    assert sample_mixture(weights, means, scales, last, torch.zeros(1, 1)).item() == 2.0
    with pytest.raises(ValueError, match="must not be negative"):
        sample_mixture(weights, means, scales, last, torch.zeros(1, 1), temperature=-1)


def test_the_code_s_divergence_by_hand_and_as_torch_s():
    assert gaussian_kl(torch.tensor([2.0]), torch.tensor([0.0])).item() == 2.0
    means, variances = drawn(4, 3), drawn(4, 3, seed=1)
    other = kl_divergence(Normal(means, (variances / 2).exp()), Normal(torch.zeros_like(means), torch.ones_like(means)))
    torch.testing.assert_close(gaussian_kl(means, variances), other.sum(-1))
    assert gaussian_kl(torch.zeros(3), torch.zeros(3)).item() == 0


def test_the_bound_by_hand_and_below_the_evidence():
    """Linear Gaussian: x = w z + noise. The bound at the true posterior is the evidence."""
    loss, metrics = autoencoder_loss(
        torch.tensor([[1.0, 3.0]]), torch.tensor([[0.0, 1.0]]), torch.tensor([[2.0]]), torch.zeros(1, 1), scale=0.5
    )
    assert loss.item() == pytest.approx((1 + 4) / 0.5 + 2)
    assert metrics["reconstruction"].item() == pytest.approx(10)
    assert metrics["code_kl"].item() == pytest.approx(2)
    w, s, x = 1.5, 0.7, 0.9
    variance = 1 / (1 + w**2 / s**2)
    mean = variance * w * x / s**2
    generator = torch.Generator().manual_seed(0)
    for shift, exact in ((0.0, True), (0.4, False)):
        m = torch.full((200000, 1), mean + shift, dtype=DOUBLE)
        v = torch.full((200000, 1), math.log(variance), dtype=DOUBLE)
        z = m + (v / 2).exp() * torch.randn(m.shape, generator=generator, dtype=DOUBLE)
        bound = -autoencoder_loss(w * z, torch.full_like(m, x), m, v, scale=s)[0].item() - math.log(
            s * math.sqrt(2 * math.pi)
        )
        evidence = Normal(0.0, math.sqrt(w**2 + s**2)).log_prob(torch.tensor(x)).item()
        assert (abs(bound - evidence) < 0.01) == exact
        assert bound < evidence + 0.01


def test_free_nats_cost_nothing():
    means = torch.tensor([[1.0]], requires_grad=True)
    loss, _ = autoencoder_loss(torch.zeros(1, 1), torch.zeros(1, 1), means, torch.zeros(1, 1), free_nats=2.0)
    loss.backward()
    assert loss.item() == 2.0
    assert means.grad.item() == 0.0


def test_reward_and_continuation_by_hand():
    loss, metrics = reward_continuation_loss(
        torch.tensor([[1.0, 5.0]]),
        torch.tensor([[0.0, 7.0]]),
        torch.tensor([[3.0, 0.0]]),
        torch.tensor([[0.0, 1.0]]),
        torch.tensor([[True, False]]),
    )
    assert loss.item() == pytest.approx(0.5 * 4 + math.log(2))
    assert metrics["reward_error"].item() == pytest.approx(2)
    assert metrics["continuation_loss"].item() == pytest.approx(math.log(2))


def test_shapes_are_checked():
    targets, weights, means, scales = mixture()
    with pytest.raises(ValueError, match="means"):
        mixture_log_density(targets, weights, means[..., :1], scales)
    with pytest.raises(ValueError, match="rewards"):
        reward_continuation_loss(*[torch.zeros(2, 1)], *[torch.zeros(2)] * 3, torch.ones(2, dtype=torch.bool))
    with pytest.raises(ValueError, match="scale must be positive"):
        autoencoder_loss(targets, targets, targets[:, 0], targets[:, 0], scale=0)

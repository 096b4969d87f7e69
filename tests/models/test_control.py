import pytest
import torch

from plaudit.models.control import ActorCriticNetwork


def test_weights_begin_orthogonal_and_the_first_policy_nearly_uniform():
    before = torch.get_rng_state()
    network = ActorCriticNetwork(4, 3, hidden=(8, 6), seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    for part, last_gain in ((network.actor, 0.01), (network.critic, 1.0)):
        layers = [layer for layer in part if isinstance(layer, torch.nn.Linear)]
        assert [tuple(layer.weight.shape) for layer in layers[:2]] == [(8, 4), (6, 8)]
        for layer, gain in zip(layers, (2**0.5, 2**0.5, last_gain), strict=True):
            weight = layer.weight if layer.weight.shape[0] <= layer.weight.shape[1] else layer.weight.T
            product = weight @ weight.T
            torch.testing.assert_close(product, gain**2 * torch.eye(len(product)), rtol=1e-4, atol=1e-6)
            assert (layer.bias == 0).all()
    observations = torch.randn(5, 2, 4, generator=torch.Generator().manual_seed(0))
    assert network.logits(observations).shape == (5, 2, 3)
    assert network.values(observations).shape == (5, 2)
    assert (network.logits(observations).softmax(-1) - 1 / 3).abs().max() < 0.02
    again = ActorCriticNetwork(4, 3, hidden=(8, 6), seed=1)
    assert torch.equal(again.logits(observations), network.logits(observations))
    other = ActorCriticNetwork(4, 3, hidden=(8, 6), seed=2)
    assert not torch.equal(other.logits(observations), network.logits(observations))
    with pytest.raises(ValueError, match="at least 1, got 0"):
        ActorCriticNetwork(0, 2)

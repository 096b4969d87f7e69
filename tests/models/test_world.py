import pytest
import torch

from plaudit.algorithms.world_learning import fit_encoder
from plaudit.models.world import PlainEncoder, RecurrentDynamics, VariationalEncoder


def test_all_steps_at_once_are_the_steps_one_by_one():
    dynamics = RecurrentDynamics(3, 2, hidden_size=5, components=4, seed=1)
    generator = torch.Generator().manual_seed(0)
    codes, actions = torch.randn(2, 6, 3, generator=generator), torch.randint(2, (2, 6), generator=generator)
    whole, last = dynamics(codes, actions, dynamics.initial(2))
    memory = dynamics.initial(2)
    for step in range(6):
        found, memory = dynamics.step(codes[:, step], actions[:, step], memory)
        for one, all_of_them in zip(found, whole, strict=True):
            torch.testing.assert_close(one, all_of_them[:, step])
    torch.testing.assert_close(memory, last)
    assert whole.means.shape == (2, 6, 4, 3)
    assert dynamics.features(codes[:, 0], memory).shape == (2, dynamics.feature_size) == (2, 8)


def test_the_memory_matters_and_the_seed_alone_decides_the_weights():
    first, second = RecurrentDynamics(2, 2, seed=3), RecurrentDynamics(2, 2, seed=3)
    state = torch.get_rng_state()
    other = RecurrentDynamics(2, 2, seed=4)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.outcome[0].weight, other.outcome[0].weight)
    codes, actions = torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64)
    fresh, _ = first.step(codes, actions, first.initial(1))
    later, _ = first.step(codes, actions, torch.ones_like(first.initial(1)))
    assert not torch.allclose(fresh.means, later.means)


def test_units_are_those_of_the_data():
    dynamics = RecurrentDynamics(2, 1)
    codes, following = torch.zeros(4, 2), torch.tensor([[3.0, 0.0], [-3.0, 0.0]]).repeat(2, 1)
    before, _ = dynamics.step(codes, torch.zeros(4, dtype=torch.int64), dynamics.initial(4))
    dynamics.set_scales(codes, following, torch.full((4,), 2.0))
    after, _ = dynamics.step(codes, torch.zeros(4, dtype=torch.int64), dynamics.initial(4))
    torch.testing.assert_close(after.means, before.means * torch.tensor([3.0, 1.0]))
    torch.testing.assert_close(after.log_scales - before.log_scales, torch.tensor([3.0, 1.0]).log().expand(4, 5, 2))
    torch.testing.assert_close(after.rewards, 2 * before.rewards)
    dynamics.set_scales(codes, following, torch.tensor([2.0, -1.0, 0.5, 0.0]))
    assert dynamics.reward_range.tolist() == [-1, 2]


def test_plain_codes_are_standardised():
    encoder = PlainEncoder(2)
    encoder.standardise(torch.tensor([[1.0, 7.0], [3.0, 7.0], [5.0, 7.0]]))
    assert encoder.encode(torch.tensor([[[5.0, 8.0]]])).tolist() == [[[1.0, 1.0]]]


@pytest.mark.parametrize("shape", [(6,), (3, 9, 14), (1, 4, 4), (1, 5, 20)])
def test_what_is_decoded_has_the_shape_of_what_was_encoded(shape):
    encoder = VariationalEncoder(shape, 4, width=4)
    seen = torch.rand(2, *shape)
    means, log_variances = encoder.distribution(seen)
    assert means.shape == log_variances.shape == (2, 4)
    assert encoder.decode(means).shape == seen.shape
    assert encoder.encode(seen.unsqueeze(0)).shape == (1, 2, 4)
    torch.testing.assert_close(encoder.encode(seen), means)


def pictures_of_a_spot(count, seed=0):
    """Pictures `[N, 1, 8, 8]` of a blurred spot somewhere."""
    places = 7 * torch.rand(count, 2, generator=torch.Generator().manual_seed(seed))
    down, right = (torch.exp(-((torch.arange(8.0) - places[:, side : side + 1]) ** 2) / 2) for side in (0, 1))
    return (down.unsqueeze(2) * right.unsqueeze(1)).unsqueeze(1)


def centre(pictures):
    """`[N, 2]`, the centre of brightness."""
    pictures = pictures.squeeze(1).clamp_min(0)
    down, right = (pictures.sum(side) @ torch.arange(8.0) / pictures.sum((1, 2)) for side in (2, 1))
    return torch.stack([down, right], 1)


def test_the_code_of_a_picture_says_what_is_to_be_seen():
    """The place of a spot, in pictures that were not learned on, is drawn back from four numbers."""
    encoder = VariationalEncoder((1, 8, 8), 4, width=8, seed=0)
    generator = torch.Generator().manual_seed(0)
    metrics = fit_encoder(
        encoder, pictures_of_a_spot(512), epochs=25, learning_rate=1e-2, noise=0.1, generator=generator
    )
    unseen = pictures_of_a_spot(200, seed=1)
    true, found = centre(unseen), centre(encoder.decode(encoder.encode(unseen)).detach())
    assert (found - true).square().mean() < 0.1 * true.var()
    assert 3 < metrics["encoder/code_kl"] < 20


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"\[size\] or \[channels, height, width\]"):
        VariationalEncoder((3, 3), 2)
    with pytest.raises(ValueError, match="at least 1"):
        RecurrentDynamics(2, 0)

import pytest
import torch

from plaudit.core.value_losses import clipped_value_loss, explained_variance, huber_td_loss, squared_value_loss


def wild(seed=0):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(4, 6, generator=generator) > 0.3
    tables = [torch.randn(4, 6, generator=generator, dtype=torch.float64) for _ in range(3)]
    values, old, returns = (table.masked_fill(~mask, float("nan")) for table in tables)
    return values.requires_grad_(), old, returns, mask


def test_by_hand():
    values, returns = torch.tensor([[1.0, 4.0, 7.0]]), torch.tensor([[0.0, 2.0, 0.0]])
    mask = torch.tensor([[True, True, False]])
    loss, metrics = squared_value_loss(values, returns, mask)
    assert loss.item() == 2.5
    # Returns 0 and 2 have variance 1, errors -1 and -2 have ¼.
    assert metrics["explained_variance"].item() == 0.75
    assert (metrics["mean_value"].item(), metrics["mean_return"].item()) == (2.5, 1)
    # V_old = 0, ε = ½: V_clip = ½; squares 1 and ¼ → 1, 4 and 2.25 → 4.
    loss, metrics = clipped_value_loss(values, torch.zeros(1, 3), returns, mask, clip=0.5)
    assert loss.item() == 2.5
    assert metrics["value_clip_fraction"].item() == 1
    old_values = torch.tensor([[3.0, 4.4, 0.0]])  # moved by -2 and -0.4
    assert clipped_value_loss(values, old_values, returns, mask, clip=0.5)[1]["value_clip_fraction"].item() == 0.5
    # Moving towards the return by more than ε is charged as if it had stopped at ε.
    loss, _ = clipped_value_loss(torch.tensor([[2.0]]), torch.zeros(1, 1), torch.tensor([[2.0]]),
                                 torch.tensor([[True]]), clip=0.5)  # fmt: skip
    assert loss.item() == 2.25


def test_equals_plain_loops_and_nothing_flows_into_masked_steps_or_targets():
    values, old, returns, mask = wild()
    returns, old = returns.requires_grad_(), old.requires_grad_()
    squares, worst = [], []
    for b in range(4):
        for t in range(6):
            if mask[b, t]:
                v, o, r = values[b, t].item(), old[b, t].item(), returns[b, t].item()
                squares.append((v - r) ** 2)
                worst.append(max((v - r) ** 2, (o + min(max(v - o, -0.3), 0.3) - r) ** 2))
    for loss, expected in (
        (squared_value_loss(values, returns, mask)[0], squares),
        (clipped_value_loss(values, old, returns, mask, clip=0.3)[0], worst),
    ):
        assert loss.item() == pytest.approx(sum(expected) / len(expected))
        gradient, *others = torch.autograd.grad(loss, [values, returns, old], allow_unused=True)
        assert others == [None, None]
        assert torch.isfinite(gradient).all()
        assert (gradient[~mask] == 0).all()
    total = squared_value_loss(values, returns, mask, reduction="sequence_sum")[0]
    assert total.item() == pytest.approx(sum(squares) / 4)


def test_huber_by_hand_and_its_limits():
    # Errors .5 and -3 with a threshold of 2: ½ · .25 and 2 · (3 - 1).
    values, targets = torch.tensor([[1.5, 0.0, 9.0]], requires_grad=True), torch.tensor([[1.0, 3.0, 0.0]])
    mask = torch.tensor([[True, True, False]])
    loss, metrics = huber_td_loss(values, targets, mask, threshold=2.0)
    assert loss.item() == pytest.approx((0.125 + 4) / 2)
    assert metrics["absolute_error"].item() == pytest.approx(1.75)
    loss.backward()
    torch.testing.assert_close(values.grad, torch.tensor([[0.25, -1.0, 0.0]]))  # bounded by 2, over two steps
    values, _, returns, mask = wild()
    wide, _ = huber_td_loss(values, returns, mask, threshold=1e6)
    torch.testing.assert_close(2 * wide, squared_value_loss(values, returns, mask)[0])
    torch_own = torch.nn.functional.huber_loss(values[mask], returns[mask], delta=0.7)
    torch.testing.assert_close(huber_td_loss(values, returns, mask, threshold=0.7)[0], torch_own)
    with pytest.raises(ValueError, match="threshold of a Huber loss must be positive, got 0"):
        huber_td_loss(values, returns, mask, threshold=0.0)


def test_identities():
    values, old, returns, mask = wild(1)
    plain = squared_value_loss(values, returns, mask)[0]
    assert torch.equal(clipped_value_loss(values, old, returns, mask, clip=1e9)[0], plain)
    assert clipped_value_loss(values, old, returns, mask, clip=0.1)[0] > plain
    assert explained_variance(returns, returns, mask).item() == 1
    torch.testing.assert_close(explained_variance(returns + 5, returns, mask).item(), 1.0)
    assert explained_variance(0 * returns, returns, mask).item() == 0
    assert explained_variance(-returns, returns, mask).item() == pytest.approx(-3)


def test_extremes():
    values, old, returns, mask = wild()
    assert squared_value_loss(values, returns, torch.zeros_like(mask))[0].item() == 0
    assert explained_variance(values, torch.ones_like(returns), mask).isnan()
    loss, _ = clipped_value_loss(1e4 * values, old, -1e4 * returns, mask, clip=0.2)
    assert torch.isfinite(loss)


def test_gradcheck():
    values, old, returns, mask = wild(4)
    start = values.detach().nan_to_num().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: squared_value_loss(x, returns, mask)[0], [start])
    assert torch.autograd.gradcheck(lambda x: clipped_value_loss(x, old, returns, mask, clip=0.4)[0], [start])
    assert torch.autograd.gradcheck(lambda x: huber_td_loss(x, returns, mask, threshold=0.6)[0], [start])


def test_faults_are_named():
    values, old, returns, mask = wild()
    with pytest.raises(ValueError, match="returns must have shape"):
        squared_value_loss(values, returns[:, :1], mask)
    with pytest.raises(ValueError, match="clip of a value loss must be positive"):
        clipped_value_loss(values, old, returns, mask, clip=0.0)

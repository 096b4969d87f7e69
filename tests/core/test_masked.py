import math

import pytest
import torch

from plaudit.core.masked import (
    masked_log_softmax,
    masked_logsumexp,
    masked_mean,
    masked_sum,
    masked_variance,
    masked_whiten,
)

VALUES = torch.tensor([[1.0, 2.0, float("nan")], [4.0, 10.0, 7.0]], dtype=torch.float64)
MASK = torch.tensor([[True, True, False], [True, False, True]])


def test_by_hand():
    assert masked_sum(VALUES, MASK).item() == 14
    assert masked_mean(VALUES, MASK).item() == 3.5
    assert masked_mean(VALUES, MASK, 1).tolist() == [1.5, 5.5]
    assert masked_variance(VALUES, MASK, 1).tolist() == [0.5, 4.5]
    assert masked_variance(VALUES, MASK, 1, unbiased=False).tolist() == [0.25, 2.25]
    # 1, 2, 4, 7 around 3.5: 6.25 + 2.25 + 0.25 + 12.25 = 21
    assert masked_variance(VALUES, MASK).item() == pytest.approx(7.0, abs=1e-12)
    assert masked_logsumexp(VALUES, MASK).tolist() == pytest.approx(
        [math.log(math.e + math.e**2), math.log(math.e**4 + math.e**7)], abs=1e-12
    )


@pytest.mark.parametrize("dim", [None, 0, 1, -1, (0, 2)])
@pytest.mark.parametrize("unbiased", [True, False])
def test_equals_torch_when_everything_counts(dim, unbiased):
    values = torch.randn(4, 5, 6, dtype=torch.float64)
    mask = torch.ones(4, 5, 6, dtype=torch.bool)
    torch.testing.assert_close(
        masked_variance(values, mask, dim, unbiased=unbiased), values.var(dim, unbiased=unbiased)
    )
    torch.testing.assert_close(masked_mean(values, mask, dim), values.mean(dim) if dim is not None else values.mean())


def test_inserting_masked_entries_changes_nothing_and_nothing_flows_into_them():
    values = torch.randn(7, dtype=torch.float64)
    padded = torch.cat([values, torch.tensor([float("nan"), 1e30], dtype=torch.float64)]).requires_grad_()
    mask = torch.arange(9) < 7
    for function in (masked_sum, masked_mean, masked_variance):
        torch.testing.assert_close(function(padded, mask), function(values, mask[:7]), rtol=0, atol=1e-12)
    torch.testing.assert_close(masked_whiten(padded, mask)[:7], masked_whiten(values, mask[:7]))
    torch.testing.assert_close(masked_log_softmax(padded, mask)[:7], values.log_softmax(0))
    (gradient,) = torch.autograd.grad((masked_log_softmax(padded, mask) ** 2).sum() + masked_sum(padded, mask), padded)
    assert gradient[7:].tolist() == [0, 0]
    assert torch.isfinite(gradient).all()


def test_nothing_counts():
    values = torch.full((2, 3), 5.0, requires_grad=True)
    mask = torch.zeros(2, 3, dtype=torch.bool)
    # Anomaly detection stops at a NaN inside the backward pass even where a later mask would hide it.
    with torch.autograd.set_detect_anomaly(True):
        total = (
            masked_sum(values, mask)
            + masked_mean(values, mask)
            + masked_variance(values, mask)
            + masked_logsumexp(values, mask).sum()
            + masked_log_softmax(values, mask).sum()
        )
        total.backward()
    assert total.item() == 0
    assert values.grad.abs().sum().item() == 0


def test_whiten_has_mean_0_and_variance_1_and_keeps_the_mean_when_asked():
    values, mask = torch.randn(1000, dtype=torch.float64) * 9 + 40, torch.rand(1000) < 0.7
    white = masked_whiten(values, mask)
    assert white[mask].mean().abs() < 1e-9
    assert (white[mask].var() - 1).abs() < 1e-7
    assert (white[~mask] == 0).all()
    torch.testing.assert_close(masked_whiten(values, mask, shift_mean=False)[mask].mean(), values[mask].mean())


def test_a_large_offset_does_not_cancel():
    values = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64) + 1e8
    assert masked_variance(values, torch.ones(3, dtype=torch.bool)).item() == pytest.approx(1.0, abs=1e-6)


def test_refuses_other_masks():
    with pytest.raises(ValueError, match="boolean"):
        masked_sum(torch.ones(3), torch.ones(3))
    with pytest.raises(ValueError, match=r"\(3, 1\)"):
        masked_mean(torch.ones(3), torch.ones(3, 1, dtype=torch.bool))

import math

import pytest
import torch

from plaudit.core.ties import davidson_logprobs, initial_tie_parameter, rao_kupper_logprobs

MODELS = {"davidson": davidson_logprobs, "rao_kupper": rao_kupper_logprobs}
DIFFERENCES = torch.linspace(-8, 8, 33, dtype=torch.float64)


@pytest.mark.parametrize("ties", MODELS)
@pytest.mark.parametrize("parameter", [-30.0, -3.0, 0.0, 2.0, 9.0])
def test_win_tie_and_loss_sum_to_1_and_mirror(ties, parameter):
    probabilities = MODELS[ties](DIFFERENCES, parameter).exp()
    torch.testing.assert_close(probabilities.sum(-1), torch.ones_like(DIFFERENCES), rtol=0, atol=1e-12)
    torch.testing.assert_close(probabilities.flip(-1), MODELS[ties](-DIFFERENCES, parameter).exp())
    assert (probabilities[..., 1].argmax() == 16).item()  # a tie is likeliest between equals


def test_davidson_is_what_the_paper_says():
    first, second = DIFFERENCES.exp(), torch.ones_like(DIFFERENCES)
    nu = math.exp(0.7)
    total = first + second + nu * (first * second).sqrt()
    expected = torch.stack([first / total, nu * (first * second).sqrt() / total, second / total], -1)
    torch.testing.assert_close(davidson_logprobs(DIFFERENCES, 0.7).exp(), expected, rtol=1e-12, atol=1e-14)
    # the paper's defining property: P(tie)² / (P(win) P(loss)) = ν², whatever the strengths
    logs = davidson_logprobs(DIFFERENCES, 0.7)
    torch.testing.assert_close(2 * logs[:, 1] - logs[:, 0] - logs[:, 2], torch.full_like(DIFFERENCES, 1.4))


def test_rao_kupper_is_what_the_paper_says():
    theta = math.exp(math.log1p(math.exp(0.7)))
    first, second = DIFFERENCES.exp(), torch.ones_like(DIFFERENCES)
    win = first / (first + theta * second)
    loss = second / (second + theta * first)
    tie = (theta**2 - 1) * first * second / ((first + theta * second) * (second + theta * first))
    torch.testing.assert_close(
        rao_kupper_logprobs(DIFFERENCES, 0.7).exp(), torch.stack([win, tie, loss], -1), rtol=1e-12, atol=1e-14
    )
    # the paper's other form: an integral of sech² / 4 over the threshold, whatever lies inside is a tie
    torch.testing.assert_close(tie, 1 - win - loss, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("ties", MODELS)
@pytest.mark.parametrize("rate", [0.001, 0.1, 0.5, 0.95])
def test_initial_parameter_gives_the_tie_rate_between_equals(ties, rate):
    logs = MODELS[ties](torch.zeros((), dtype=torch.float64), initial_tie_parameter(ties, rate))
    assert logs[1].exp().item() == pytest.approx(rate, rel=1e-9)


@pytest.mark.parametrize("ties", MODELS)
def test_extremes_are_finite_with_gradients(ties):
    for parameter in (-1e4, -13.0, -12.0, -11.0, 0.0, 1e4):
        raw = torch.tensor(parameter, requires_grad=True)
        difference = torch.tensor([-2e4, 0.0, 2e4], requires_grad=True)
        logs = MODELS[ties](difference, raw)
        logs.sum().backward()
        assert torch.isfinite(logs).all()
        assert torch.isfinite(raw.grad)
        assert torch.isfinite(difference.grad).all()


def test_rao_kupper_is_continuous_where_the_formula_changes():
    below, above = (rao_kupper_logprobs(DIFFERENCES, -12 + offset) for offset in (-1e-9, 1e-9))
    # the limit log 2τ leaves out a term of τ ≈ 6e-6
    torch.testing.assert_close(below, above, rtol=0, atol=1e-5)


def test_refuses_rates_and_names():
    with pytest.raises(ValueError, match=r"1\.0"):
        initial_tie_parameter("davidson", 1.0)
    with pytest.raises(ValueError, match="coin"):
        initial_tie_parameter("coin", 0.2)

"""Log-probabilities and entropies against torch's own distribution, in chunks, and their gradients."""

import math
from typing import Any

import pytest
import torch
from torch.distributions import Categorical

from plaudit.core import entropy
from plaudit.core.entropy import logprobs_and_entropy


def example(rows: int = 7, size: int = 5, vocabulary: int = 11) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, size, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocabulary, size, generator=generator, dtype=torch.float64)
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    return hidden, weight, targets


@pytest.mark.parametrize("chunk", [None, 1, 3, 7, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.3, 2.0])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_equals_a_categorical(chunk: int | None, temperature: float, softcap: float | None) -> None:
    hidden, weight, targets = example()
    bias = torch.linspace(-1, 1, weight.shape[0], dtype=torch.float64)
    found = logprobs_and_entropy(
        hidden, weight, targets, bias=bias, temperature=temperature, chunk=chunk, softcap=softcap
    )
    logits = hidden @ weight.T + bias
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    wanted = Categorical(logits=logits / temperature)
    torch.testing.assert_close(found[0], wanted.log_prob(targets))
    torch.testing.assert_close(found[1], wanted.entropy())


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("kept", [0, 1 << 26])
def test_gradients(softcap: float | None, kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entropy, "_LOGITS_KEPT_CPU", kept)
    hidden, weight, targets = example(rows=3, size=2, vocabulary=4)
    inputs = [hidden, weight, torch.zeros(4, dtype=torch.float64)]
    inputs = [tensor.clone().requires_grad_(True) for tensor in inputs]

    def both(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return logprobs_and_entropy(hidden, weight, targets, bias=bias, temperature=0.7, chunk=2, softcap=softcap)

    assert torch.autograd.gradcheck(both, inputs)
    assert torch.autograd.gradcheck(lambda *a: both(*a)[0], inputs)
    assert torch.autograd.gradcheck(lambda *a: both(*a)[1], inputs)


@pytest.mark.parametrize("kept", [0, 1 << 26])
def test_autocast_does_not_round_the_logits(kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither those of the forward nor those that are computed again in a backward pass inside it."""
    monkeypatch.setattr(entropy, "_LOGITS_KEPT_CPU", kept)
    hidden, weight, targets = (tensor.float() if tensor.is_floating_point() else tensor for tensor in example())
    outcomes = []
    for enabled in (False, True):
        inputs = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            found = logprobs_and_entropy(*inputs, targets)
            (found[0].sum() - found[1].sum()).backward()
        outcomes.append([*found, *(each.grad for each in inputs)])
    assert all(torch.equal(one, other) for one, other in zip(*outcomes, strict=True))


def test_a_backward_pass_keeps_no_more_than_the_forward_did() -> None:
    hidden, weight, targets = example(rows=5)
    found: Any = logprobs_and_entropy(hidden.requires_grad_(), weight, targets, chunk=2)
    kept = found[0].grad_fn.kept
    assert len(kept) == 3
    (found[0].sum() + found[1].sum()).backward(retain_graph=True)
    assert len(kept) == 3


def test_hand_numbers_and_extremes() -> None:
    # Two tokens of equal logits: log-probability -log 2, entropy log 2; a certain one: 0 and 0.
    weight = torch.tensor([[1.0], [1.0]])
    logprob, entropy = logprobs_and_entropy(torch.tensor([[3.0]]), weight, torch.tensor([1]))
    assert logprob.item() == pytest.approx(-math.log(2))
    assert entropy.item() == pytest.approx(math.log(2))
    certain = torch.tensor([[1.0], [-1.0]])
    hidden = torch.tensor([[1e4]], requires_grad=True)
    logprob, entropy = logprobs_and_entropy(hidden, certain, torch.tensor([0]))
    assert (logprob.item(), entropy.item()) == (0.0, 0.0)
    (logprob + entropy).sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.item() == 0.0


def test_a_token_that_cannot_come_gives_no_nan() -> None:
    weight, bias = torch.eye(3), torch.tensor([0.0, 0.0, -math.inf])
    hidden = torch.zeros(1, 3, requires_grad=True)
    logprob, entropy = logprobs_and_entropy(hidden, weight, torch.tensor([0]), bias=bias)
    assert entropy.item() == pytest.approx(math.log(2))
    (logprob + entropy).sum().backward()
    assert hidden.grad is not None
    assert bool(hidden.grad.isfinite().all())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"chunk": 0}, "chunk"),
        ({"targets": torch.zeros(2, dtype=int)}, "targets"),
    ],
)
def test_refuses(change: dict[str, object], message: str) -> None:
    hidden, weight, targets = example()
    with pytest.raises(ValueError, match=message):
        logprobs_and_entropy(hidden, weight, **({"targets": targets} | change))  # type: ignore[arg-type]

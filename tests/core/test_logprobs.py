import pytest
import torch

from plaudit.core.logprobs import sequence_logprobs, token_logprobs


def _problem(dtype=torch.float64, bias=True):
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(11, 4, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(7, 4, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    offset = torch.randn(7, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() if bias else None
    return hidden, weight, offset, torch.randint(7, (11,), generator=generator)


def _plain(hidden, weight, bias, targets, softcap):
    logits = torch.nn.functional.linear(hidden, weight, bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)


def test_by_hand():
    # logits (0, ln 3): probabilities 1/4 and 3/4
    hidden, weight = torch.ones(2, 1), torch.tensor([[0.0], [3.0]]).log1p() * torch.tensor([[0.0], [1.0]])
    weight[1, 0] = torch.tensor(3.0).log()
    result = token_logprobs(hidden, weight, torch.tensor([0, 1]))
    torch.testing.assert_close(result.exp(), torch.tensor([0.25, 0.75]))


@pytest.mark.parametrize("chunk", [1, 3, 11, 100, None])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("bias", [True, False])
def test_equals_the_plain_table_forward_and_backward(chunk, softcap, bias):
    hidden, weight, offset, targets = _problem(bias=bias)
    upstream = torch.randn(11, dtype=torch.float64)
    leaves = [leaf for leaf in (hidden, weight, offset) if leaf is not None]
    ours = token_logprobs(hidden, weight, targets, bias=offset, chunk=chunk, softcap=softcap)
    plain = _plain(hidden, weight, offset, targets, softcap)
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(
        torch.autograd.grad(ours @ upstream, leaves), torch.autograd.grad(plain @ upstream, leaves), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradcheck(softcap):
    hidden, weight, bias, targets = _problem()
    assert torch.autograd.gradcheck(
        lambda h, w, b: token_logprobs(h, w, targets, bias=b, chunk=4, softcap=softcap), (hidden, weight, bias)
    )


def test_half_precision_is_normalised_in_float32():
    hidden, weight, _, targets = _problem(torch.bfloat16, bias=False)
    result = token_logprobs(hidden, weight, targets)
    assert result.dtype == torch.float32
    # The product rounds to bfloat16 (8 bits); the normaliser does not.
    reference = _plain(hidden.double(), weight.double(), None, targets, None)
    torch.testing.assert_close(result.double(), reference, rtol=0, atol=0.05)
    result.sum().backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16


def test_a_backward_pass_inside_autocast_computes_the_logits_of_the_forward_again():
    hidden, weight, _, targets = _problem(torch.float32, bias=False)
    gradients = []
    for enabled in (False, True):
        inputs = [tensor.detach().clone().requires_grad_() for tensor in (hidden, weight)]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            token_logprobs(*inputs, targets).sum().backward()
        gradients.append([each.grad for each in inputs])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_frozen_head_gets_no_gradient():
    hidden, weight, bias, targets = _problem()
    token_logprobs(hidden, weight.detach(), targets, bias=bias.detach()).sum().backward()
    assert hidden.grad is not None
    assert weight.grad is None


def test_keeps_no_table_of_the_vocabulary():
    hidden = torch.randn(64, 4, requires_grad=True)
    weight = torch.randn(5000, 4, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor.numel()) or tensor, lambda t: t):
        token_logprobs(hidden, weight, torch.zeros(64, dtype=torch.int64), chunk=8)
    assert max(saved) == weight.numel() < 64 * 5000


def test_no_rows():
    hidden, weight = torch.zeros(0, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    result = token_logprobs(hidden, weight, torch.zeros(0, dtype=torch.int64))
    result.sum().backward()
    assert result.shape == (0,)
    assert weight.grad.abs().sum() == 0


def test_extreme_logits_stay_finite():
    hidden = torch.tensor([[1e4], [-1e4]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], [0.5]], requires_grad=True)
    result = token_logprobs(hidden, weight, torch.tensor([0, 0]))
    torch.testing.assert_close(result, torch.tensor([0.0, -2e4]))
    result.sum().backward()
    assert torch.isfinite(hidden.grad).all()
    assert torch.isfinite(weight.grad).all()


@pytest.mark.parametrize(
    ("hidden", "weight", "targets", "options"),
    [
        ((3, 4), (7, 5), (3,), {}),
        ((3, 4), (7, 4), (3, 1), {}),
        ((3, 4), (7, 4), (3,), {"bias": torch.zeros(3)}),
        ((3, 4), (7, 4), (3,), {"chunk": 0}),
    ],
)
def test_refuses_what_does_not_fit(hidden, weight, targets, options):
    with pytest.raises(ValueError, match=r"must be"):
        token_logprobs(torch.zeros(hidden), torch.zeros(weight), torch.zeros(targets, dtype=torch.int64), **options)


def test_sequences_sum_their_tokens():
    logprobs = torch.tensor([-1.0, -2.0, -4.0, -8.0], requires_grad=True)
    total = sequence_logprobs(logprobs, torch.tensor([2, 0, 2, 0]), 3)
    assert total.tolist() == [-10, 0, -5]
    (total @ torch.tensor([1.0, 5.0, 2.0])).backward()
    assert logprobs.grad.tolist() == [2, 1, 2, 1]
    with pytest.raises(ValueError, match="must be"):
        sequence_logprobs(logprobs, torch.zeros(4, 1, dtype=torch.int64), 3)

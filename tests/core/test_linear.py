"""Products through oneDNN equal torch's own, values and gradients; where they cannot be used torch does them."""

import pytest
import torch
from torch import Tensor, nn

from plaudit.core import linear, vocabulary_head
from plaudit.core.linear import FEWEST_ROWS, can_lay_out, laid_out_product, quick_linear
from plaudit.core.logprobs import token_logprobs
from plaudit.models import quick_products as products
from plaudit.models.quick_products import quick_products


def made(*sizes: int, seed: int) -> Tensor:
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed), requires_grad=True)


@pytest.mark.parametrize("shape", [(FEWEST_ROWS, 24), (3, 50, 24), (1, 517, 24)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_values_and_gradients_are_those_of_a_product_in_double(shape: tuple[int, ...], with_bias: bool) -> None:
    x, weight, bias = made(*shape, seed=0), made(40, 24, seed=1), made(40, seed=2) if with_bias else None
    mix = made(*shape[:-1], 40, seed=3).detach()
    inputs = [x, weight] + ([] if bias is None else [bias])
    found = quick_linear(x, weight, bias)
    gradients = torch.autograd.grad((found * mix).sum(), inputs)
    wide, wide_mix = [each.detach().double() for each in inputs], mix.double()
    product = wide[0] @ wide[1].T + (wide[2] if with_bias else 0.0)
    rows = wide_mix.flatten(0, -2)
    wanted = [wide_mix @ wide[1], rows.T @ wide[0].flatten(0, -2), rows.sum(0)]
    torch.testing.assert_close(found.double(), product, atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(gradients, wanted, strict=False):
        torch.testing.assert_close(ours.double(), theirs, atol=1e-4, rtol=1e-5)


def test_by_hand() -> None:
    x = torch.tensor([[1.0, 2.0]]).repeat(FEWEST_ROWS, 1).requires_grad_()
    weight = torch.tensor([[3.0, 4.0], [0.0, -1.0], [1.0, 1.0]], requires_grad=True)
    found = quick_linear(x, weight, torch.tensor([0.5, 0.0, 0.0]))
    assert found[7].tolist() == [11.5, -2.0, 3.0]
    found.sum().backward()
    assert x.grad is not None
    assert weight.grad is not None
    assert x.grad[0].tolist() == [4.0, 4.0]
    assert weight.grad[2].tolist() == [FEWEST_ROWS, 2 * FEWEST_ROWS]


def test_only_gradients_that_are_asked_for_and_a_weight_laid_out_once() -> None:
    x, weight = made(FEWEST_ROWS, 8, seed=0).detach(), made(5, 8, seed=1)
    quick_linear(x, weight).sum().backward()
    assert x.grad is None
    torch.testing.assert_close(weight.grad, x.sum(0).expand(5, 8))
    product = laid_out_product(weight, 100)
    torch.testing.assert_close(product(x), x @ weight.detach().T)
    torch.testing.assert_close(laid_out_product(weight.T, 100)(x[:, :5]), x[:, :5] @ weight.detach())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_few_rows_and_autocast_are_torchs(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear._Linear, "apply", None)
    x, weight = made(FEWEST_ROWS, 8, seed=0), made(5, 8, seed=1)
    assert torch.equal(quick_linear(x.to(dtype), weight.to(dtype)), nn.functional.linear(x.to(dtype), weight.to(dtype)))
    assert torch.equal(quick_linear(x[:3], weight), nn.functional.linear(x[:3], weight))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not can_lay_out(weight)
        assert quick_linear(x, weight).dtype == torch.bfloat16


def test_a_model_takes_them_in_one_context_and_not_where_parts_are_computed_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(products, "LEAST_WORK", 0)
    model = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 4))
    x = made(FEWEST_ROWS, 8, seed=0)
    plain = model(x)
    with quick_products(model, len(x)):
        quick = model(x)
    torch.testing.assert_close(quick, plain)
    if can_lay_out(model[0].weight):
        assert type(quick.grad_fn).__name__ != type(plain.grad_fn).__name__
    model[0].gradient_checkpointing = True
    with quick_products(model, len(x)):
        assert type(model(x).grad_fn) is type(plain.grad_fn)


def test_where_compiling_takes_longer_than_it_gains_torch_multiplies_and_the_gradients_are_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 4))
    x, work = made(FEWEST_ROWS, 8, seed=0), FEWEST_ROWS * (8 * 16 + 16 * 4)
    results = []
    for least, quick in ((work, True), (work + 1, False)):
        monkeypatch.setattr(products, "LEAST_WORK", least)
        context = quick_products(model, len(x))
        assert isinstance(context, products._QuickProducts) == (quick and can_lay_out(model[0].weight))
        with context:
            found = model(x)
        results.append([found, *torch.autograd.grad(found.square().sum(), [x, *model.parameters()])])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("chunk", [FEWEST_ROWS, 300])
def test_the_heads_log_probabilities_are_the_same_by_either_product(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, weight = made(300, 8, seed=0), made(40, 8, seed=1)
    targets = torch.arange(300) % 40
    results = []
    for least in (0, 300 * 40 * 8 + 1):
        monkeypatch.setattr(vocabulary_head, "_LEAST_WORK", least)
        found = token_logprobs(hidden, weight, targets, chunk=chunk)
        results.append([found, *torch.autograd.grad(found.sum(), [hidden, weight])])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)

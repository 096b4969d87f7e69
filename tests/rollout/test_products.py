"""Products with weights laid out once, against torch's plain operations, and what keeps to the plain ones."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear, silu
from torch.testing import assert_close

from plaudit.core.linear import can_lay_out
from plaudit.rollout.products import Product

GENERATOR = torch.Generator().manual_seed(0)
WEIGHT, BIAS = torch.randn(37, 19, generator=GENERATOR), torch.randn(37, generator=GENERATOR)
WAYS: dict[str, tuple[Callable[[Product, Tensor, Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "plain": (lambda product, x, y: product(x), lambda found, y: found),
    "silu": (lambda product, x, y: product.silu(x), lambda found, y: silu(found)),
    "times": (lambda product, x, y: product.times(x, y), lambda found, y: found * y),
    "plus": (lambda product, x, y: product.plus(x, y), lambda found, y: found + y),
}


@pytest.mark.parametrize("bias", [None, BIAS])
@pytest.mark.parametrize("laid_out_for", [0, 5])
@pytest.mark.parametrize("way", WAYS)
def test_products_equal_torchs_own(way: str, laid_out_for: int, bias: Tensor | None) -> None:
    product = Product(WEIGHT, bias, rows=laid_out_for)
    assert product.prepared == (laid_out_for > 0 and can_lay_out(WEIGHT))
    run, expected = WAYS[way]
    for rows in (1, 5, 64):
        inputs, other = torch.randn(rows, 19, generator=GENERATOR), torch.randn(rows, 37, generator=GENERATOR)
        before = inputs.clone(), other.clone()
        found = run(product, inputs, other)
        double = linear(inputs.double(), WEIGHT.double(), None if bias is None else bias.double())
        assert_close(found.double(), expected(double, other.double()), atol=1e-5, rtol=1e-5)
        assert torch.equal(inputs, before[0])
        assert torch.equal(other, before[1])


def test_the_laid_out_weights_are_those_of_the_moment_and_others_stay_plain() -> None:
    weight = WEIGHT.clone()
    product = Product(weight, rows=4)
    inputs = torch.ones(2, 19)
    before = product(inputs)
    weight.zero_()
    if product.prepared:
        assert torch.equal(product(inputs), before)
    assert not Product(WEIGHT.bfloat16(), rows=4).prepared
    assert not Product(WEIGHT.to("meta"), rows=4).prepared
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not Product(WEIGHT, rows=4).prepared

"""Dropout with a mask of its own: what nn.Dropout promises."""

import pytest
import torch
from torch import nn

from minillm.dropout import Dropout

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_it_drops_its_share_anywhere_in_the_tensor(p):
    out = Dropout(p)(torch.ones(1000, 1001))
    for dropped in ((out == 0).float().mean(d) for d in (0, 1)):
        assert dropped.mean().item() == pytest.approx(p, abs=5 * (p * (1 - p) / 1e6) ** 0.5)
        assert (dropped - p).abs().max() < 6 * (p * (1 - p) / 1000) ** 0.5


def test_neighbours_are_dropped_independently():
    kept = (Dropout(0.5)(torch.ones(1_000_000)) != 0).double() - 0.5
    for step in range(1, 9):  # four of them share a random number
        assert abs((kept[step:] * kept[:-step]).mean().item() * 4) < 6e-3


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_kept_grows_by_as_much_as_is_dropped(dtype):
    x = torch.randn(64, 33, dtype=dtype)
    out = Dropout(0.25)(x)
    torch.testing.assert_close(out[out != 0], x[out != 0] / 0.75)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_goes_where_the_value_went(dtype):
    x = torch.ones(64, 33, dtype=dtype, requires_grad=True)
    out = Dropout(0.25)(x)
    out.sum().backward()
    assert torch.equal(x.grad, out.detach())


def test_the_same_seed_is_the_same_mask():
    x, layer = torch.ones(7, 13), Dropout(0.3)
    torch.manual_seed(5)
    first = layer(x)
    assert not torch.equal(first, layer(x))
    torch.manual_seed(5)
    assert torch.equal(first, layer(x))


@pytest.mark.parametrize("p", [0.0, 1e-7, 1 - 1e-7, 1.0])
def test_what_16_bits_cannot_tell_from_nothing_or_all_is_pytorchs(p):
    x = torch.randn(5, 6)
    torch.testing.assert_close(Dropout(p)(x), nn.Dropout(p)(x), rtol=1e-6, atol=0)


def test_in_evaluation_it_is_nothing():
    x = torch.randn(5, 6)
    assert Dropout(0.5).eval()(x) is x

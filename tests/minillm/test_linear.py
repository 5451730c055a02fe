"""The products of a CPU, by whichever library: PyTorch's own, in values and gradients."""

import shutil

import pytest
import torch
import torch.nn.functional as F

from minillm.linear import Linear, compile_single_rows, linear
from tests.conftest import MODELS

INPUTS = {
    "one row": lambda: torch.randn(1, 20),
    "a block": lambda: torch.randn(2, 3, 20),
    "no row": lambda: torch.randn(0, 20),
    "a vector": lambda: torch.randn(20),
    "transposed": lambda: torch.randn(20, 5).t(),
    "expanded": lambda: torch.randn(1, 1, 20).expand(2, 3, 20),
    "every other column": lambda: torch.randn(2, 3, 40)[..., ::2],
}


@pytest.fixture(params=[True, False], ids=["MKL preferred", "oneDNN preferred"])
def vendor(request, monkeypatch):
    monkeypatch.setattr("minillm.linear.prefers_mkl", lambda: request.param)


@pytest.mark.usefixtures("vendor")
@pytest.mark.parametrize("bias", [None, torch.randn(33)], ids=["plain", "bias"])
@pytest.mark.parametrize("make", INPUTS.values(), ids=INPUTS)
def test_values_and_gradients_equal_pytorchs(make, bias):
    tensors = [make(), torch.randn(33, 20), *([] if bias is None else [bias])]
    ours, theirs = ([t.clone().requires_grad_() for t in tensors] for _ in range(2))
    out, expected = linear(*ours), F.linear(*theirs)
    slope = torch.randn_like(out)
    out.backward(slope)
    expected.backward(slope)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-5)


def test_switching_onednn_off_gives_pytorchs_bits():
    x, weight = torch.randn(7, 64), torch.randn(32, 64)
    with torch.backends.mkldnn.flags(enabled=False):
        assert torch.equal(linear(x, weight), F.linear(x, weight))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_pytorchs_bits(dtype):
    x, weight = torch.randn(7, 64, dtype=dtype), torch.randn(32, 64, dtype=dtype)
    assert torch.equal(linear(x, weight), F.linear(x, weight))


def test_autocast_still_computes_in_16_bits():
    x, layer = torch.randn(7, 64), Linear(64, 32)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


def test_a_second_derivative_is_refused_not_wrong():
    x, weight = torch.randn(3, 20, requires_grad=True), torch.randn(33, 20, requires_grad=True)
    (slope,) = torch.autograd.grad(linear(x, weight).pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


@pytest.mark.usefixtures("vendor")
@pytest.mark.parametrize("shape", [(3, 20), (3, 7), (1, 20), (20,)])
def test_shapes_that_do_not_fit_are_refused(shape):
    with pytest.raises(RuntimeError):
        linear(torch.randn(shape), torch.randn(33, 21))


@pytest.mark.usefixtures("vendor")
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n_out", [33, 500])
@pytest.mark.parametrize("n_rows", [1, 5])
def test_16_bit_products_are_rounded_once(n_rows, n_out, dtype, has_bias):
    x, weight, bias = (torch.randn(s).to(dtype) for s in ((n_rows, 500), (n_out, 500), (n_out,)))
    bias = bias if has_bias else None
    exact = F.linear(x.double(), weight.double(), bias if bias is None else bias.double())
    out = linear(x, weight, bias).double()
    assert (out - exact).norm() < torch.finfo(dtype).eps / 2 * exact.norm()


def test_a_frozen_layer_keeps_no_input_for_backward():
    layer, kept = Linear(64, 32).requires_grad_(False), []
    x = torch.randn(7, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    assert [t.shape for t in kept] == [layer.weight.shape]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama-gqa", "gpt2"])
def test_compiled_single_rows_equal_plain_ones(kind, dtype, monkeypatch):
    monkeypatch.setattr("minillm.linear.prefers_mkl", lambda: False)  # it has nothing to compile
    model, token = MODELS[kind]().to(dtype).eval(), torch.tensor([[7]])
    with torch.no_grad():
        plain = model(token)
        compile_single_rows(model)
        torch.testing.assert_close(model(token), plain)

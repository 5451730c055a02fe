"""The products of a CPU, by whichever library: PyTorch's own, in values and gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from minillm import add_lora, mark_only_lora_as_trainable
from minillm.linear import Linear, linear, pack_weights, round_up, unpack_weights
from minillm.losses import token_loss
from tests.conftest import MODELS, Products

INPUTS = {
    "one row": lambda: torch.randn(1, 20),
    "a block": lambda: torch.randn(2, 3, 20),
    "no row": lambda: torch.randn(0, 20),
    "a vector": lambda: torch.randn(20),
    "transposed": lambda: torch.randn(20, 5).t(),
    "expanded": lambda: torch.randn(1, 1, 20).expand(2, 3, 20),
    "every other column": lambda: torch.randn(2, 3, 40)[..., ::2],
}


def on_a_cpu(monkeypatch, prefers_mkl: bool, has_avx512: bool, small: int = 2**18):
    """Products are chosen as on another CPU, on which weights of fewer numbers are small."""
    monkeypatch.setattr("minillm.linear.prefers_mkl", lambda: prefers_mkl)
    monkeypatch.setattr("minillm.linear._HAS_AVX512", has_avx512)
    monkeypatch.setattr("minillm.linear._MKL_FORWARD", small)


VENDORS = {
    "MKL preferred": (True, True), "oneDNN preferred": (False, True), "AVX2 alone": (False, False),
    "AVX2 alone, all weights large": (False, False, 0),
}  # fmt: skip


@pytest.fixture(params=VENDORS.values(), ids=VENDORS)
def vendor(request, monkeypatch):
    on_a_cpu(monkeypatch, *request.param)


@pytest.mark.usefixtures("vendor")
@pytest.mark.parametrize("n_out", [33, 32, 0])
@pytest.mark.parametrize("has_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("make", INPUTS.values(), ids=INPUTS)
def test_values_and_gradients_equal_pytorchs(make, has_bias, n_out):
    tensors = [make(), torch.randn(n_out, 20), *([torch.randn(n_out)] if has_bias else [])]
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


@pytest.mark.usefixtures("vendor")
@pytest.mark.parametrize("has_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("make", INPUTS.values(), ids=INPUTS)
def test_values_are_the_same_without_gradients(make, has_bias):
    x, layer = make(), Linear(20, 32, bias=has_bias)
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))


class Operators(TorchDispatchMode):
    """Names of the operators called while it is on."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.__name__.partition(".")[0])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("prefers_mkl", "has_avx512", "n_rows", "n_out", "product"), [
    (True, True, 1, 32, "mv"), (True, False, 1, 32, "mv"), (False, False, 1, 32, "bmm"),
    (False, True, 1, 32, "_linear_pointwise"), (False, False, 2, 4096, "_linear_pointwise"),
    (False, False, 1, 4097, "_linear_pointwise"), (False, False, 2, 32, "mm"),
    (False, False, 1, 33, "mm"),
])  # fmt: skip
def test_a_single_row_goes_to_the_library_that_reads_fastest(
    prefers_mkl, has_avx512, n_rows, n_out, product, monkeypatch
):
    if not torch.backends.mkl.is_available():
        pytest.skip("this PyTorch has no MKL")
    on_a_cpu(monkeypatch, prefers_mkl, has_avx512)
    x, layer = torch.randn(n_rows, 64), Linear(64, n_out, bias=False)
    with torch.no_grad(), Operators() as called:
        layer(x)
    assert called.names & {"mv", "bmm", "_linear_pointwise", "mm", "addmm"} == {product}


@pytest.mark.parametrize(("has_avx512", "width", "forward", "backward"), [
    (False, 2**11, {"mm"}, {"mm"}), (False, 2**12, {"_linear_pointwise"}, {"mm"}),
    (False, 2**17, {"_linear_pointwise"}, {"_linear_pointwise"}),
    (True, 2**11, {"_linear_pointwise"}, {"_linear_pointwise"}),
])  # fmt: skip
def test_with_avx2_alone_small_weights_are_mkls(has_avx512, width, forward, backward, monkeypatch):
    if not torch.backends.mkl.is_available():
        pytest.skip("this PyTorch has no MKL")
    on_a_cpu(monkeypatch, False, has_avx512)
    weight = torch.randn(width, 64)
    for x, w in ((torch.randn(2, 64, requires_grad=True), weight),
                 (torch.randn(2, 64), weight.requires_grad_())):  # fmt: skip
        with Operators() as called:
            out = linear(x, w)
        with Operators() as called_back:
            out.sum().backward()
        products = {"_linear_pointwise", "mm"}
        assert (called.names & products, called_back.names & products) == (forward, backward)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_only_fp32_goes_by_parts(dtype, monkeypatch):
    on_a_cpu(monkeypatch, prefers_mkl=False, has_avx512=False)
    layer = Linear(64, 32, bias=False).to(dtype)
    with torch.no_grad(), Operators() as called:
        layer(torch.randn(1, 64, dtype=dtype))
    assert "bmm" not in called.names


@pytest.mark.usefixtures("vendor")
def test_a_bias_that_does_not_fit_is_refused():
    with pytest.raises(RuntimeError):
        linear(torch.randn(1, 20), torch.randn(64, 20), torch.randn(8))


@pytest.mark.usefixtures("vendor")
def test_a_single_row_meets_a_weight_that_is_a_view():
    x, weight = torch.randn(1, 20), torch.randn(20, 32).t()
    torch.testing.assert_close(linear(x, weight), F.linear(x, weight))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_pytorchs_bits(dtype):
    x, weight = torch.randn(7, 64, dtype=dtype), torch.randn(32, 64, dtype=dtype)
    assert torch.equal(linear(x, weight), F.linear(x, weight))


def test_autocast_still_computes_in_16_bits():
    x, layer = torch.randn(7, 64), Linear(64, 32)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


def test_a_second_derivative_is_refused_not_wrong(monkeypatch):
    on_a_cpu(monkeypatch, prefers_mkl=False, has_avx512=True)
    x, weight = torch.randn(3, 20, requires_grad=True), torch.randn(33, 20, requires_grad=True)
    (slope,) = torch.autograd.grad(linear(x, weight).pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


@pytest.mark.usefixtures("vendor", "emulated")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 20), (40, 20), (3, 7), (1, 20), (20,)])
def test_shapes_that_do_not_fit_are_refused(shape, dtype):
    with pytest.raises(RuntimeError):
        linear(torch.randn(shape, dtype=dtype), torch.randn(33, 21, dtype=dtype))


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("odd", [0, 1, 2])
def test_dtypes_that_differ_are_refused(odd):
    tensors = [torch.randn(s).bfloat16() for s in ((40, 20), (33, 20), (33,))]
    tensors[odd] = tensors[odd].float()
    with pytest.raises(RuntimeError):
        linear(*tensors)


@pytest.mark.usefixtures("emulated")
def test_autocast_leaves_float64_as_it_is():
    x, weight = torch.randn(40, 20).double(), torch.randn(33, 20).double()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(linear(x, weight), F.linear(x, weight))


@pytest.mark.usefixtures("vendor", "emulated")
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n_out", [33, 500])
@pytest.mark.parametrize("n_rows", [1, 5, 40])
def test_16_bit_products_are_rounded_once(n_rows, n_out, dtype, has_bias):
    x, weight, bias = (torch.randn(s).to(dtype) for s in ((n_rows, 500), (n_out, 500), (n_out,)))
    bias = bias if has_bias else None
    exact = F.linear(x.double(), weight.double(), bias if bias is None else bias.double())
    out = linear(x, weight, bias).double()
    assert (out - exact).norm() < torch.finfo(dtype).eps / 2 * exact.norm()


@pytest.mark.usefixtures("vendor", "emulated")
@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "stored"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(40, 500), (2, 20, 500)])
def test_16_bit_gradients_are_rounded_once(shape, dtype, autocast):
    """And come in the dtype of what they belong to."""
    given = [torch.randn(s).to(dtype) for s in (shape, (64, 500), (64,))]
    leaves = [(t.float() if autocast else t.clone()).requires_grad_() for t in given]
    exact = [t.double().requires_grad_() for t in given]
    with torch.autocast("cpu", dtype, enabled=autocast):
        out = linear(*leaves)
    assert out.dtype == dtype
    slope = torch.randn(out.shape).to(dtype)
    out.backward(slope)
    F.linear(*exact).backward(slope.double())
    for got, want in zip(leaves, exact, strict=True):
        assert got.grad.dtype == got.dtype
        assert (got.grad - want.grad).norm() < torch.finfo(dtype).eps / 2 * want.grad.norm()


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n_rows", [7, 40])
def test_a_frozen_layer_keeps_no_input_for_backward(n_rows, dtype):
    layer, kept = Linear(64, 32).requires_grad_(False).to(dtype), []
    x = torch.randn(n_rows, 64, dtype=dtype, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    assert [t.data_ptr() for t in kept] == [layer.weight.data_ptr()]


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "stored"])
@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("kind", ["llama-gqa", "gpt2", "phi"])
def test_a_step_in_16_bits_that_the_cpu_lacks_multiplies_none(kind, method, autocast, monkeypatch):
    monkeypatch.setattr("minillm.linear._EMULATED", {torch.bfloat16})
    model, tokens = MODELS[kind](), torch.randint(2048, (2, 41))
    model.attention = "sdpa"
    if method == "lora":
        add_lora(model, {"gpt2": ["c_attn"], "phi": ["q_proj"]}.get(kind, ["wq", "w2"]))
        mark_only_lora_as_trainable(model)
    model.to(torch.float32 if autocast else torch.bfloat16)
    with Products() as products:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss, _ = token_loss(model, (tokens, tokens, None))
        loss.backward()
    assert products.dtypes <= {torch.float32}


@pytest.fixture(params=[True, False], ids=["AVX512", "AVX2"])
def onednn(request, monkeypatch):
    on_a_cpu(monkeypatch, False, request.param, small=0)


@pytest.mark.usefixtures("onednn")
@pytest.mark.parametrize("n_rows", [1, 3, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", ["llama-gqa", "gpt2", "phi"])
def test_a_packed_model_computes_the_same(kind, dtype, n_rows):
    model, tokens = MODELS[kind]().to(dtype).eval(), torch.tensor([[7]]).expand(n_rows, 1)
    with torch.no_grad():
        plain = model(tokens)
        pack_weights(model)
        packed = model(tokens)
        unpack_weights(model)
        error = 1e-5 if dtype == torch.float32 else 0.0
        torch.testing.assert_close(packed, plain, rtol=error, atol=error)
        assert torch.equal(model(tokens), plain)


def changed_in_place(layer):
    layer.weight.add_(1.0)


def replaced(layer):
    layer.weight = torch.nn.Parameter(layer.weight + 1.0)


@pytest.mark.usefixtures("onednn")
@pytest.mark.parametrize("n_rows", [1, 2])
@pytest.mark.parametrize("change", [changed_in_place, replaced])
def test_a_weight_that_changed_after_it_was_packed_counts(change, n_rows):
    layer, x = Linear(64, 32), torch.randn(n_rows, 64)
    with torch.no_grad():
        pack_weights(layer)
        layer(x)
        change(layer)
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))


@pytest.mark.usefixtures("onednn")
def test_gradients_pass_a_packed_layer():
    layer, x = Linear(64, 32), torch.randn(3, 64)
    pack_weights(layer)
    with torch.no_grad():
        layer(x)
    layer(x).sum().backward()
    torch.testing.assert_close(layer.weight.grad, x.sum(0).expand(32, 64))


@pytest.mark.parametrize(("n_out", "copied"), [(32, False), (2**13, True)])
def test_with_avx2_alone_only_large_weights_are_packed(n_out, copied, monkeypatch):
    if not torch.backends.mkl.is_available():
        pytest.skip("this PyTorch has no MKL")
    on_a_cpu(monkeypatch, prefers_mkl=False, has_avx512=False)
    layer = Linear(64, n_out)
    with torch.no_grad():
        pack_weights(layer)
        layer(torch.randn(2, 64))
    assert (layer.product.copy is not None) == copied


@pytest.mark.usefixtures("onednn")
@pytest.mark.parametrize("shape", [(3, 20), (1, 20), (20,)])
def test_shapes_that_do_not_fit_are_refused_by_a_packed_layer(shape):
    layer = Linear(21, 33)
    with torch.no_grad():
        pack_weights(layer)
        layer(torch.randn(1, 21))
        with pytest.raises(RuntimeError):
            layer(torch.randn(shape))


def test_nothing_is_packed_where_there_is_no_room(monkeypatch):
    monkeypatch.setattr("minillm.linear.free_mib", lambda device: 0.01)
    layer = Linear(64, 32)
    product = layer.product
    pack_weights(layer)
    assert layer.product is product


def test_lengths_are_rounded_to_few_numbers_and_never_far():
    rounded = [round_up(n) for n in range(1, 513)]
    assert all(n <= r < max(n + 16, 1.25 * n) for n, r in enumerate(rounded, 1))
    assert len(set(rounded)) == 20 and not any(r % 16 for r in rounded)


@pytest.mark.usefixtures("onednn")
def test_weights_that_tell_of_no_change_are_not_packed():
    with torch.inference_mode():
        layer, x = Linear(64, 32), torch.randn(2, 64)
        pack_weights(layer)
        layer(x)
        layer.weight.add_(1.0)
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))


def test_shapes_on_no_device_are_those_of_a_product(emulated):
    x, weight = torch.ones(40, 3, device="meta"), torch.ones(2, 3, device="meta")
    assert linear(x, weight).shape == (40, 2)

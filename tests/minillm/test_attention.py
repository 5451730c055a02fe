"""The fused kernel with the explicit backward: what training in 16 bits on a CPU goes through."""

import pytest
import torch
from torch import Tensor

from minillm.attention import attention_mask, causal_attention
from minillm.fused_attention import _FusedForward, _is_slow_backwards
from tests.conftest import Products

CASES = {  # name: (B, H, K, T, S, mask)
    "more than a million weights": (3, 4, 2, 400, 400, None),
    "causal": (2, 4, 4, 9, 9, None),
    "one query": (1, 4, 4, 1, 9, None),
    "grouped heads": (2, 6, 2, 9, 9, None),
    "ragged rows": (3, 4, 2, 9, 9, attention_mask(0, 9, torch.tensor([0, 3, 8]), 0, "cpu")),
    "a mask for each head": (2, 4, 2, 5, 5, torch.ones(2, 4, 5, 5, dtype=torch.bool).tril()),
    "after a prefix": (2, 4, 4, 6, 11, attention_mask(5, 6, None, 5, "cpu")),
}


@pytest.fixture(params=CASES)
def case(request) -> tuple[list[Tensor], Tensor | None]:
    """q, k, v in float64, and the mask."""
    b, h, kv, t, s, mask = CASES[request.param]
    torch.manual_seed(0)
    return [torch.randn(b, n, m, 8).double() for n, m in ((h, t), (kv, s), (kv, s))], mask


def gradients(attend, inputs: list[Tensor]) -> list[Tensor]:
    """Of a sum that tells all outputs apart."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = attend(*inputs)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    return list(torch.autograd.grad((out * weights).sum(), inputs))


def test_its_output_is_the_explicit_paths(case):
    inputs, mask = case
    out = _FusedForward.apply(*inputs, mask).transpose(1, 2).flatten(2)
    torch.testing.assert_close(out, causal_attention(*inputs, mask, "explicit"), atol=1e-12, rtol=0)


def test_its_gradients_are_the_explicit_paths(case):
    inputs, mask = case

    def fused(q, k, v):
        return _FusedForward.apply(q, k, v, mask).transpose(1, 2).flatten(2)

    wanted = gradients(lambda *qkv: causal_attention(*qkv, mask, "explicit"), inputs)
    for got, want in zip(gradients(fused, inputs), wanted, strict=True):
        torch.testing.assert_close(got, want, atol=1e-12, rtol=0)


@pytest.mark.usefixtures("emulated")
def test_in_16_bits_its_gradients_are_as_close_to_the_exact_ones_as_the_explicit_paths(case):
    inputs, mask = case
    narrow = [x.bfloat16() for x in inputs]
    exact = gradients(lambda *qkv: causal_attention(*qkv, mask, "explicit"),
                      [x.double() for x in narrow])  # fmt: skip
    errors = {}
    for mode in ("sdpa", "explicit"):
        found = gradients(lambda *qkv, mode=mode: causal_attention(*qkv, mask, mode), narrow)
        errors[mode] = sum(float((got - want).norm() / want.norm().clamp(min=1e-6))
                           for got, want in zip(found, exact, strict=True))  # fmt: skip
    assert errors["sdpa"] <= 1.5 * errors["explicit"] + 1e-3


@pytest.mark.parametrize("n_keys", [4, 2])
@pytest.mark.parametrize("left_pad", [None, torch.tensor([0, 5])])
def test_a_single_query_in_16_bits_sees_what_the_last_of_several_sees(n_keys, left_pad):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, 9, 8).bfloat16() for n in (4, n_keys, n_keys))
    with torch.no_grad():
        together = causal_attention(q, k, v, attention_mask(0, 9, left_pad, 0, "cpu"), "sdpa")
        mask = attention_mask(8, 1, left_pad, 0, "cpu")
        alone = causal_attention(q[:, :, -1:], k, v, mask, "sdpa")
    assert alone.shape == (2, 1, 4 * 8)
    torch.testing.assert_close(alone, together[:, -1:])


def test_in_16_bits_a_segment_trains_as_it_does_alone():
    torch.manual_seed(0)
    inputs = [torch.randn(1, 4, 12, 8).bfloat16() for _ in range(3)]
    packed = gradients(lambda *qkv: causal_attention(*qkv, [5, 7], "sdpa"), inputs)

    def apart(q, k, v):
        halves = zip(*(x.split([5, 7], dim=2) for x in (q, k, v)), strict=True)
        return torch.cat([causal_attention(*half, None, "sdpa") for half in halves], 1)

    assert all(map(torch.equal, packed, gradients(apart, inputs)))


def test_in_16_bits_segments_of_any_length_mean_few_shapes_of_products():
    with Products() as products:
        for n in range(1, 33):
            q, k, v = (torch.randn(1, 4, n, 8).bfloat16().requires_grad_() for _ in range(3))
            causal_attention(q, k, v, [n], "sdpa").sum().backward()
    assert len(products.shapes) == 2 * 2  # of 16 and of 32 columns: the scores, the gradients


def test_in_16_bits_nothing_as_large_as_the_weights_is_kept_for_backward():
    kept = []
    q, k, v = (torch.randn(2, 4, 64, 8).bfloat16().requires_grad_() for _ in range(3))
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: kept.append(x.numel()) or x, lambda x: x
    ):
        causal_attention(q, k, v, None, "sdpa")
    assert kept and max(kept) < 2 * 4 * 64 * 64


@pytest.mark.parametrize(("taken", "dtype", "columns", "dropout", "grad"), [
    (True, torch.bfloat16, 512, 0.0, True),
    (True, torch.float16, 512, 0.0, True),
    (False, torch.float32, 512, 0.0, True),
    (False, torch.bfloat16, 513, 0.0, True),
    (False, torch.bfloat16, 512, 0.1, True),
    (False, torch.bfloat16, 512, 0.0, False),
])  # fmt: skip
def test_only_short_texts_in_16_bits_train_through_it(taken, dtype, columns, dropout, grad):
    q = torch.zeros(1, 1, 1, 8, dtype=dtype)
    k = torch.zeros(1, 1, columns, 8, dtype=dtype)
    with torch.set_grad_enabled(grad):
        assert _is_slow_backwards(q, k, dropout) is taken

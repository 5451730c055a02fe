"""Cross-entropy at the memory of its logits, or of a slice of them: PyTorch's own values and
gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from minillm import add_lora
from minillm.adapt.bottleneck import AdapterLinear
from minillm.adapt.lora_linear import LoRALinear
from minillm.adapt.methods import MethodOptions, adapt
from minillm.cross_entropy import (
    _slice_width,
    cross_entropy,
    cut_cross_entropy,
    head_cross_entropy,
    is_frozen_head,
)
from minillm.footprint import LiveTensors
from minillm.linear import Linear
from minillm.losses import token_loss
from tests.conftest import MODELS, Products


@pytest.mark.parametrize("n", [1, 16, 50])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_values_and_gradients_equal_pytorchs(dtype, n):
    logits = (4 * torch.randn(n, 300)).to(dtype)
    targets = torch.randint(300, (n,))
    weights = torch.rand(n)  # every row its own slope, as in a sum over sequences
    ours, theirs = (logits.clone().requires_grad_() for _ in range(2))
    wide = torch.promote_types(dtype, torch.float32)
    losses = cross_entropy(ours * 1, targets)  # * 1: backward writes into what it is given
    expected = F.cross_entropy(theirs.to(wide), targets, reduction="none")
    (losses * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_no_row_is_no_loss():
    logits = torch.randn(0, 300, requires_grad=True)
    losses = cross_entropy(logits * 1, torch.empty(0, dtype=torch.int64))
    losses.sum().backward()
    assert losses.shape == (0,) and logits.grad.shape == (0, 300)


def test_a_second_backward_is_refused_not_wrong():
    """The first one has turned the logits into their gradient."""
    logits = torch.randn(4, 300, requires_grad=True)
    loss = cross_entropy(logits * 1, torch.randint(300, (4,))).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_largest_logit_never_overflows():
    logits = torch.tensor([[3e38, -3e38, 0.0]])
    assert cross_entropy(logits, torch.tensor([0])).item() == 0.0


@pytest.mark.parametrize("gap", [3.0, 11.5, 12.0, 14.0, 17.0])
def test_the_gradient_is_right_to_the_last_digits_where_the_model_is_sure(gap):
    logits, target = torch.tensor([[30.0, 30.0 - gap, -3.0]], requires_grad=True), torch.tensor([0])
    exact = logits.detach().double().requires_grad_()
    F.cross_entropy(exact, target).backward()
    cross_entropy(logits * 1.0, target).sum().backward()
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=3e-7, atol=2**-23)


def frozen_head(vocab_size: int, dtype: torch.dtype, bias: bool = True) -> nn.Linear:
    return nn.Linear(48, vocab_size, bias=bias, dtype=dtype).requires_grad_(False)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("vocab_size", [2, 300, 1025, 2500])  # slices of 1,024 and what is left
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_cut_loss_and_its_gradient_are_those_of_whole_logits(dtype, vocab_size, bias):
    head = frozen_head(vocab_size, dtype, bias)
    targets = torch.arange(700) % vocab_size  # in every slice
    slopes = torch.rand(700, dtype=dtype)
    ours, theirs = ((3 * torch.randn(700, 48, dtype=dtype)).requires_grad_() for _ in range(2))
    theirs.data.copy_(ours.data)
    losses = cut_cross_entropy(ours, head, targets)
    expected = F.cross_entropy(head(theirs), targets, reduction="none")
    (losses * slopes).sum().backward()
    (expected * slopes).sum().backward()
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_the_cut_gradient_is_no_further_from_the_exact_one(dtype):
    head, x = frozen_head(2500, dtype), torch.randn(600, 48).to(dtype)
    targets = torch.randint(2500, (600,))

    def gradient(loss, x):
        x = x.detach().requires_grad_()
        loss(x).sum().backward()
        return x.grad.double()

    exact = gradient(lambda x: F.cross_entropy(
        F.linear(x, head.weight.double(), head.bias.double()), targets, reduction="none"
    ), x.double())  # fmt: skip
    cut = gradient(lambda x: cut_cross_entropy(x, head, targets), x)
    whole = gradient(lambda x: cross_entropy(head(x), targets), x)
    assert (cut - exact).norm() <= 1.05 * (whole - exact).norm() < 0.02 * exact.norm()


def test_under_autocast_it_is_the_product_that_is_cast():
    head, x = frozen_head(2500, torch.float32), torch.randn(600, 48, requires_grad=True)
    narrow = frozen_head(2500, torch.bfloat16)
    narrow.load_state_dict(head.state_dict())
    targets = torch.randint(2500, (600,))
    with torch.autocast("cpu", torch.bfloat16):
        losses = cut_cross_entropy(x, head, targets)
    losses.sum().backward()
    y = x.detach().bfloat16().requires_grad_()
    expected = cut_cross_entropy(y, narrow, targets)
    expected.sum().backward()
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad, y.grad.float(), rtol=2e-2, atol=1e-3)
    assert x.grad.dtype == losses.dtype == torch.float32


@pytest.mark.parametrize("gap", [3.0, 11.5, 14.0, 17.0])
def test_the_cut_gradient_is_right_where_the_model_is_sure(gap):
    head = nn.Linear(1, 2048, bias=False).requires_grad_(False)
    nn.init.zeros_(head.weight)
    head.weight[[0, 1500]] = torch.tensor([[30.0], [30.0 - gap]])
    x, target = torch.ones(1, 1, requires_grad=True), torch.tensor([0])
    exact = x.detach().double().requires_grad_()
    F.cross_entropy(exact @ head.weight.double().T, target).backward()
    cut_cross_entropy(x, head, target).sum().backward()
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=3e-6, atol=30 * 2**-23)


def test_no_row_is_no_cut_loss():
    x = torch.randn(0, 48, requires_grad=True)
    losses = cut_cross_entropy(x, frozen_head(300, torch.float32), torch.empty(0).long())
    losses.sum().backward()
    assert losses.shape == (0,) and x.grad.shape == (0, 48)


def test_the_cut_loss_never_holds_more_than_slices_of_the_logits():
    head, x = frozen_head(40_000, torch.float32), torch.randn(512, 48, requires_grad=True)
    with LiveTensors(head.parameters()) as live:
        cut_cross_entropy(x, head, torch.randint(40_000, (512,))).sum().backward()
    assert live.peak < 512 * 40_000 * 4 / 8


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("trained, products_of_a_size", [(False, 2), (True, 3)])
def test_any_number_of_rows_means_few_shapes_of_products(trained, products_of_a_size):
    """Of 32 and of 64 rows: the logits, the gradient of x, and that of a trained head."""
    head = frozen_head(300, torch.bfloat16, bias=False).requires_grad_(trained)
    with Products() as products:
        for n in range(1, 65):
            x = torch.randn(n, 48, dtype=torch.bfloat16, requires_grad=True)
            head_cross_entropy(x, head, torch.randint(300, (n,))).sum().backward()
    assert len(products.shapes) == 2 * products_of_a_size


@pytest.mark.parametrize("method", ["lora", "prompt_tuning", "prefix_tuning"])
@pytest.mark.parametrize("kind", MODELS)
def test_a_frozen_head_changes_no_loss_and_no_gradient(kind, method, tokenizer):
    """The same step with the head's own gradient asked for, which needs the logits."""
    model = MODELS[kind](vocab_size=tokenizer.vocab_size).double()
    targets = {"gpt2": ("c_attn",), "phi": ("q_proj",)}.get(kind, ("wq", "wv"))
    options = MethodOptions(targets=targets, rank=4, lora_dropout=0.0, virtual_tokens=4)
    model, _ = adapt(model, tokenizer, method, options)
    tokens = torch.randint(2048, (2, 40))
    labels = torch.where(torch.rand(2, 40) < 0.5, tokens, -100)
    found = []
    for trains_head in (False, True):
        model.vocabulary_head.requires_grad_(trains_head)
        assert is_frozen_head(model.vocabulary_head) != trains_head
        loss, count = token_loss(model, (tokens, labels))
        loss.backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        found.append((loss.detach(), count, grads))
        model.zero_grad()
    (cut, _, slim), (whole, _, full) = found
    torch.testing.assert_close(cut, whole, rtol=1e-12, atol=1e-12)
    assert slim and slim.keys() < full.keys()
    for name, grad in slim.items():
        torch.testing.assert_close(grad, full[name], rtol=1e-9, atol=1e-11, msg=name)


def test_a_head_with_lora_is_not_cut():
    model = MODELS["phi"]()
    adapt(model, None, "lora", MethodOptions(targets=("lm_head",), rank=4))
    assert not is_frozen_head(model.vocabulary_head)
    with pytest.raises(AssertionError, match="the head is trained"):
        cut_cross_entropy(torch.randn(3, 32), model.vocabulary_head, torch.tensor([1, 2, 3]))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("trains", ["all of it", "LoRA", "an adapter"])
def test_a_trained_head_has_the_loss_and_the_gradient_of_its_logits(trains, autocast):
    head = Linear(48, 300)
    if trains == "LoRA":
        head = LoRALinear.from_linear(head, 4, 8)
        nn.init.normal_(head.lora_B).requires_grad_()
    if trains == "an adapter":
        head = AdapterLinear.from_linear(head, 4)
    x, targets = torch.randn(50, 48, requires_grad=True), torch.randint(300, (50,))
    inputs = [x, *(p for p in head.parameters() if p.requires_grad)]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = head_cross_entropy(x, head, targets)
        expected = F.cross_entropy(head(x).float(), targets, reduction="none")
    torch.testing.assert_close(found, expected)
    pairs = zip(*(torch.autograd.grad(losses.sum(), inputs) for losses in (found, expected)),
                strict=True)  # fmt: skip
    tolerance = 2e-2 if autocast else 1e-5
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("wrong", [-100, 300])
def test_the_loss_of_what_is_no_token_is_no_number(wrong):
    head = frozen_head(300, torch.float32)
    losses = cut_cross_entropy(torch.randn(2, 48), head, torch.tensor([5, wrong]))
    assert losses.isfinite().tolist() == [True, False]


def test_a_model_without_a_vocabulary_head_is_asked_for_its_logits():
    class Bigrams(nn.Module):
        """The call of the engine's contract, and nothing else."""

        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(50, 8)
            self.head = nn.Linear(8, 50).requires_grad_(False)

        def forward(self, tokens, logits_at=...):
            return self.head(self.table(tokens))[logits_at]

    model, tokens = Bigrams(), torch.randint(50, (2, 9))
    loss, count = token_loss(model, (tokens, tokens))
    expected = F.cross_entropy(model(tokens[:, :-1]).mT, tokens[:, 1:], reduction="sum")
    assert int(count) == 16
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize(("rows", "vocabulary"), [(200, 32000), (256, 50257), (7, 32000), (0, 11)])
def test_slices_are_of_one_size_where_the_vocabulary_divides(rows, vocabulary):
    width = _slice_width(torch.empty(rows, 8), vocabulary)
    assert vocabulary % width == 0 and width * max(1, rows) <= 2**19


def test_a_vocabulary_that_does_not_divide_has_a_shorter_last_slice():
    prime = 50021
    assert 0 < prime % _slice_width(torch.empty(256, 8), prime) < 2048


def test_lora_on_a_head_counts_also_where_it_is_frozen():
    """As an adapter that was loaded in 16 bits is: not merged."""
    model, (x, targets) = MODELS["llama-gqa"](), (torch.randn(5, 32), torch.randint(2048, (5,)))
    add_lora(model, ("output",), 4, 8, 0.0)
    nn.init.normal_(model.output.lora_B)
    model.requires_grad_(False)
    want = F.cross_entropy(model.output(x), targets, reduction="none")
    torch.testing.assert_close(head_cross_entropy(x, model.output, targets), want)

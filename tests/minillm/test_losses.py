"""Cross-entropy at the memory of its logits: PyTorch's own values and gradients."""

import pytest
import torch
import torch.nn.functional as F

from minillm.losses import cross_entropy


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

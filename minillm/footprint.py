"""Where the memory of a training step goes, by category: predicted, and measured.

Both are the same code, the model's own forward and backward with every tensor watched: measured on
the real model, predicted on one whose tensors have a shape, a dtype and no memory. So the
prediction takes a moment and no memory for a model of any size, and knows of autocast, gradient
checkpointing and every method what the model knows. All figures in bytes; what a kernel needs
inside itself is in neither (it is in the process's growth, minillm.memory).
"""

import copy
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minillm.losses import IGNORED, question, to_losses
from minillm.precision import Precision

OUTSIDE = "outside"  # of all blocks


@dataclass
class Footprint:
    """Bytes by category at the peak of an accumulated optimizer step. `work` is what the peak holds
    beyond the others: gradients of activations, temporaries (less what is freed by then)."""

    frozen: int
    trainable: int
    gradients: int
    optimizer: int  # AdamW: two moments of every trainable number
    by_place: dict[str, int]  # activations kept for backward: "block 0", ..., OUTSIDE
    logits: int
    copies: int  # of weights, in the dtype that autocast computes in, kept for backward
    work: int
    cache: int  # a KV cache for as many columns as the batch has; not part of training

    @property
    def activations(self) -> int:
        """Kept for backward, without logits and copies of weights."""
        return sum(self.by_place.values())

    @property
    def total(self) -> int:
        """What training holds at its peak."""
        parts = (self.frozen, self.trainable, self.gradients, self.optimizer, self.activations,
                 self.logits, self.copies, self.work)  # fmt: skip
        return sum(parts)

    def rows(self) -> dict[str, int]:
        """The categories under the names that are printed."""
        return {
            "frozen weights": self.frozen, "trainable weights": self.trainable,
            "gradients": self.gradients, "optimizer state": self.optimizer,
            "activations": self.activations, "logits": self.logits,
            "16-bit copies of weights": self.copies, "work": self.work, "total": self.total,
        }  # fmt: skip


def measure_footprint(
    model: nn.Module, batch: tuple, precision: Precision, accumulation_steps: int
) -> Footprint:
    """Of forward and backward of a batch (tokens, labels, ...), done and forgotten: no
    gradient stays, and the stream of random numbers is put back."""
    tokens, labels = (tensor.to(precision.device) for tensor in batch[:2])
    targets = labels[:, 1:]
    at = (targets != IGNORED).nonzero(as_tuple=True)  # rows and columns, (N,) each
    segments = getattr(batch, "segments", None)
    devices = [precision.device] if precision.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        return _watch(
            model, tokens[:, :-1], at, targets[at], precision, accumulation_steps, segments
        )


def predict_footprint(
    model: nn.Module, batch: tuple, precision: Precision, accumulation_steps: int
) -> Footprint:
    """The same for a batch that is never fed, by a model that may be on no device at all (meta):
    nothing is computed, and next to nothing allocated."""
    targets = batch[1][:, 1:]
    n_supervised = int((targets != IGNORED).sum())
    segments = getattr(batch, "segments", None)
    mode = FakeTensorMode()
    with FakeCopyMode(mode):
        model = copy.deepcopy(model)
    with mode:
        _put_on(model, precision.device)
        like = {"dtype": torch.int64, "device": precision.device}
        tokens = torch.zeros(targets.shape, **like)
        index = torch.zeros(n_supervised, **like)
        return _watch(
            model, tokens, (index, index), index, precision, accumulation_steps, segments
        )


def _put_on(model: nn.Module, device: torch.device) -> None:
    """Weights of the same shapes on a device, shared where they were shared."""
    new: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            if p not in new:
                new[p] = nn.Parameter(torch.empty_like(p, device=device), p.requires_grad)
            setattr(module, name, new[p])


def _watch(
    model: nn.Module, tokens: Tensor, at: tuple[Tensor, Tensor], targets: Tensor,
    precision: Precision, accumulation_steps: int, segments: list[int] | None,
) -> Footprint:  # fmt: skip
    trained = [p for p in model.parameters() if p.requires_grad]
    frozen = [p for p in model.parameters() if not p.requires_grad]
    base = getattr(model, "model", model)
    was_training = model.training
    model.train()
    live = LiveTensors(model.parameters())
    saved = Saved(live, base.config.vocab_size)
    with live, _places(base.blocks, saved):
        # a step of packed texts may take several forwards, whatever was asked for
        if accumulation_steps > 1 or segments is not None:
            for p in trained:
                p.grad = torch.zeros_like(p)  # what the backwards before this one have left
        watch = torch.autograd.graph.saved_tensors_hooks(saved, lambda tensor: tensor)
        with watch, precision.autocast():
            out = model(tokens, **question(model, at, targets, segments))
            loss = to_losses(out, targets).sum()
        del out
        loss.backward()
        del loss
    gradients = _nbytes(p.grad for p in trained if p.grad is not None)
    model.train(was_training)
    for p in trained:
        p.grad = None
    kept = sum(saved.by_place.values()) + saved.logits + saved.copies
    cache = model.new_cache(tokens.size(0), tokens.size(1), precision.dtype)
    return Footprint(
        frozen=_nbytes(frozen), trainable=_nbytes(trained), gradients=gradients,
        optimizer=2 * _nbytes(trained), by_place=dict(saved.by_place), logits=saved.logits,
        copies=saved.copies, work=live.peak - gradients - kept, cache=cache.nbytes,
    )  # fmt: skip


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of all tensors made while it is on, for as long as each lives: `now` and
    `peak`. Knows which of them are copies of the given weights in another dtype."""

    def __init__(self, weights):
        super().__init__()
        self.own = {w.untyped_storage()._cdata for w in weights}
        self.sizes: dict[int, int] = {}
        self.copies: set[int] = set()
        self.now = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in (value for value in tree_leaves(out) if isinstance(value, Tensor)):
            self._add(tensor.untyped_storage())
        if function is torch.ops.aten._to_copy.default and _key(args[0]) in self.own:
            self.copies.add(_key(out))
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self.own or key in self.sizes:
            return
        self.sizes[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, key)

    def _remove(self, key: int) -> None:
        self.now -= self.sizes.pop(key, 0)
        self.copies.discard(key)


class Saved:
    """The hook that autograd calls with each tensor it keeps for backward: counts each storage
    once, by the place that is running."""

    def __init__(self, live: LiveTensors, vocab_size: int):
        self.live, self.vocab_size = live, vocab_size
        self.place, self.seen = OUTSIDE, set()
        self.by_place: dict[str, int] = {}
        self.logits = self.copies = 0

    def __call__(self, tensor: Tensor) -> Tensor:
        key, n = _key(tensor), tensor.untyped_storage().nbytes()
        if key in self.live.own or key in self.seen:
            return tensor
        self.seen.add(key)
        if key in self.live.copies:
            self.copies += n
        elif tensor.dim() == 2 and tensor.size(-1) == self.vocab_size:
            self.logits += n
        else:
            self.by_place[self.place] = self.by_place.get(self.place, 0) + n
        return tensor


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _nbytes(tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors)


@contextmanager
def _places(blocks: nn.ModuleList, saved: Saved) -> Iterator[None]:
    """While it is on, `saved.place` names the block that runs forward."""

    def enter(name: str) -> Callable:
        return lambda *_: setattr(saved, "place", name)

    handles = []
    for number, block in enumerate(blocks):
        handles.append(block.register_forward_pre_hook(enter(f"block {number}")))
        handles.append(block.register_forward_hook(enter(OUTSIDE)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

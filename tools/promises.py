"""What the engine promises, as measurements on any model; tools/prove.py runs them.

Each promise computes the same thing in two ways and returns how far apart they are: the largest
difference over the largest value. Equal bits are 0.0; what is not even comparable is infinity.
"""

import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillm.adapt.lora import lora_layers
from minillm.adapt.prompts import Wrapped
from minillm.cross_entropy import is_frozen_head
from minillm.data.batches import Batches, Row, to_device
from minillm.generate import generate
from minillm.losses import IGNORED, supervision, to_losses, token_loss
from minillm.peft_format import load_adapter, save_adapter
from minillm.precision import DTYPES, Precision
from minillm.progress import load_trainable, trainable_state
from minillm.runs import Run
from minillm.text_stream import TextStream
from minillm.training import TrainSettings, train


@dataclass(frozen=True)
class Subject:
    """The model that is asked, adapted and in one dtype; `base()` loads it anew without what was
    added, in that dtype or another."""

    model: nn.Module
    base: Callable[..., nn.Module]
    save: Callable  # (model, tokenizer, folder)
    tokenizer: object
    path: Path
    layers: int | None
    toggles: int

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @property
    def length(self) -> int:
        """Tokens of the longest text that is tried."""
        return max(2, min(48, self.model.config.max_seq_len - 8))

    def tokens(self, *shape: int) -> Tensor:
        """Random token ids, the same in every call."""
        stream = torch.Generator().manual_seed(0)
        n = min(self.model.config.vocab_size, self.tokenizer.vocab_size)
        return torch.randint(n, shape, generator=stream).to(self.device)

    def rows(self) -> list[Row]:
        """Eight texts of different lengths, a different part of each labelled."""
        found = []
        for i, tokens in enumerate(self.tokens(8, self.length).cpu()):
            tokens = tokens[: max(2, self.length * (i + 1) // 8)]
            labels = tokens.clone()
            labels[: len(tokens) * i // 9] = IGNORED
            found.append(Row(tokens, labels))
        return found


def distance(got: Tensor, want: Tensor) -> float:
    """max |got - want| / max |want|, infinite if one of them is no number."""
    got, want = got.detach().double(), want.detach().double()
    worst = float((got - want).abs().max() / want.abs().max().clamp(min=1e-300))
    return worst if math.isfinite(worst) else math.inf


@torch.no_grad()
def cache(subject: Subject) -> float:
    """With the cache, in chunks of any size and one by one, as without; greedy texts as well."""
    model, n = subject.model.eval(), subject.length
    tokens = subject.tokens(2, n)
    whole, worst = model(tokens), 0.0
    for cuts in ([n], [1] * n, [n // 3, 1, n - n // 3 - 1]):
        past = model.new_cache(2, n)
        parts = [model(chunk, past) for chunk in tokens.split(cuts, dim=1)]
        worst = max(worst, distance(torch.cat(parts, 1), whole))
    if whole.dtype == torch.float64:  # else the likeliest of two alike may change by rounding
        prompts = [tokens[0, : n // 2].tolist(), tokens[1, : n // 4 + 1].tolist()]
        texts = [generate(model, prompts, 8, use_cache=on) for on in (True, False)]
        worst = worst if texts[0] == texts[1] else math.inf
    return worst


@torch.no_grad()
def ragged(subject: Subject) -> float:
    """Every row of a padded batch as it is alone, with the cache and without."""
    model, n = subject.model.eval(), subject.length
    rows = [row[:k] for row, k in zip(subject.tokens(4, n), (n, 1, n // 2, n - 1), strict=True)]
    pads = torch.tensor([n - len(row) for row in rows], device=subject.device)
    tokens = torch.stack([F.pad(row, (n - len(row), 0)) for row in rows])
    plain = model(tokens, left_pad=pads)
    past = model.new_cache(len(rows), n)
    cuts = tokens.split([n - 1, 1], dim=1)
    cached = torch.cat([model(chunk, past, pads) for chunk in cuts], 1)
    return max(
        distance(got[pad:], model(row[None])[0])
        for logits in (plain, cached)
        for row, pad, got in zip(rows, pads.tolist(), logits, strict=True)
    )


@torch.no_grad()
def attention(subject: Subject) -> float:
    """Scores, mask, softmax and values one by one as the fused kernel."""
    model, n = subject.model.eval(), subject.length
    tokens, pads = subject.tokens(3, n), torch.tensor([0, n - 1, n // 3], device=subject.device)
    kept, found = model.attention, {}
    for model.attention in ("sdpa", "explicit"):
        found[model.attention] = torch.cat((model(tokens), model(tokens, left_pad=pads)))
    model.attention = kept
    return distance(found["explicit"], found["sdpa"])


@torch.no_grad()
def merged(subject: Subject) -> float:
    """LoRA merged into its weights as LoRA beside them."""
    tokens = subject.tokens(2, subject.length)
    with dropout(subject.model, 0.0):
        apart = subject.model.train()(tokens)
        return distance(subject.model.eval()(tokens), apart)


@torch.no_grad()
def toggled(subject: Subject) -> float:
    """The frozen weights after many eval() and train(), A and B changing in between."""
    layers = lora_layers(subject.model.train()).values()
    before = [layer.weight.clone() for layer in layers]
    factors = trainable_state(subject.model)
    for _ in range(subject.toggles):
        subject.model.eval()
        for layer in layers:
            layer.lora_B.mul_(1.01)
        subject.model.train()
    load_trainable(subject.model, factors)
    return max(distance(layer.weight, w) for layer, w in zip(layers, before, strict=True))


def saved_merged(subject: Subject) -> float:
    """The tensors of a state_dict and the files of an adapter, saved while merged or not."""
    with tempfile.TemporaryDirectory() as folder:
        kept = []
        for mode in (True, False):
            subject.model.train(mode)
            save_adapter(subject.model, f"{folder}/{mode}")
            bytes_ = (Path(folder) / str(mode) / "adapter_model.safetensors").read_bytes()
            # on a GPU what is set aside is in host memory
            state = {k: v.cpu().clone() for k, v in subject.model.state_dict().items()}
            kept.append((state, bytes_))
    (plain, file), (other, other_file) = kept
    return math.inf if file != other_file else _tensors_apart(other, plain)


def accumulation(subject: Subject) -> float:
    """The gradient of a step of 1 x 8 samples as of 8 x 1, with labels of different numbers."""
    with dropout(subject.model, 0.0):
        return distance(gradient(subject, 1), gradient(subject, 8))


def packed(subject: Subject) -> float:
    """The gradient of samples side by side in one forward as of samples apart."""
    with dropout(subject.model, 0.0):
        return distance(gradient(subject, 1, pack=3 * subject.length), gradient(subject, 1))


def cut(subject: Subject) -> float:
    """The losses of a frozen head, taken without the logits, and their gradient, as with them."""
    model = subject.model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    batch = next(iter(Batches(subject.rows(), 8, 0, 0, model.config.max_seq_len)))
    batch = to_device(batch, subject.device)
    targets, told = supervision(model, batch)
    asked_for_logits = {name: value for name, value in told.items() if name != "targets"}
    found = []
    with dropout(model, 0.0):
        for where in (asked_for_logits | {"targets": targets}, asked_for_logits):
            losses = to_losses(model(batch[0][:, :-1], **where), targets)  # (N,)
            grads = torch.autograd.grad(losses.sum(), trained, allow_unused=True)
            found.append((losses, torch.cat([g.flatten() for g in grads if g is not None])))
    return max(distance(without, with_) for without, with_ in zip(*found, strict=True))


def checkpointed(subject: Subject) -> float:
    """The gradient with blocks recomputed in backward as without, dropout on."""
    found = []
    with dropout(subject.model, 0.3):
        for subject.model.gradient_checkpointing in (True, False):
            torch.manual_seed(0)
            found.append(gradient(subject, 8))
    return distance(*found)


def resumed(subject: Subject) -> float:
    """Losses, gradient norms and weights of a run stopped half-way as of one that was not."""
    began = trainable_state(subject.model)
    found = []
    with tempfile.TemporaryDirectory() as folder, dropout(subject.model, 0.3):
        for name, lengths in (("whole", [6]), ("halves", [3, 6])):
            for n_steps in lengths:
                load_trainable(subject.model, began)
                torch.manual_seed(0)
                run = Run(Path(folder) / name, {}, resume=n_steps == 6 and len(lengths) == 2)
                _train(subject, 2, 2, run, lr=1e-3, epochs=3, max_iters=n_steps)
            numbers = [[row["loss"], row["grad_norm"]] for row in run.rows()]
            found.append((torch.tensor(numbers), trainable_state(subject.model)))
    load_trainable(subject.model, began)
    (whole, last), (halves, other) = found
    if whole.shape != halves.shape:
        return math.inf
    return max(distance(halves, whole), _tensors_apart(other, last))


def saved(subject: Subject) -> float:
    """The base written as a Hugging Face folder and read back; what was added likewise."""
    base = subject.base()
    want = {k: v.clone() for k, v in base.state_dict().items()}
    with tempfile.TemporaryDirectory() as folder:
        subject.save(base, subject.tokenizer, Path(folder) / "model")
        again = subject.base(Path(folder) / "model")
        worst = _tensors_apart(again.state_dict(), want)
        save_adapter(subject.model, Path(folder) / "adapter")
        with torch.no_grad():
            tokens = subject.tokens(1, subject.length)
            loaded = load_adapter(again, Path(folder) / "adapter").eval()
            return max(worst, distance(loaded(tokens), subject.model.eval()(tokens)))


def streamed(subject: Subject) -> float:
    """Texts shown token by token as decoded at once: random tokens, many of which are half a
    character, and signs that take several, after prompts that end anywhere in them."""
    tokenizer = subject.tokenizer
    texts = [subject.tokens(subject.length).tolist(), tokenizer.encode("Où ça ? 日本語 👩‍🚀 ½ né")]
    for tokens in texts:
        whole = tokenizer.decode(tokens)
        for n in range(1, len(tokens)):
            stream = TextStream(tokenizer, tokens[:n])
            shown = [*map(stream.push, tokens[n:]), stream.finish()]
            if "".join(shown) != whole[len(tokenizer.decode(tokens[:n])) :]:
                return math.inf
    return 0.0


@torch.no_grad()
def peers(subject: Subject) -> float:
    """Logits of the base as transformers computes them from the same folder."""
    from tools.engines import Setup
    from tools.peers import Peers

    base, tokens = subject.base().eval(), subject.tokens(1, subject.length)
    name = next(name for name, dtype in DTYPES.items() if dtype == next(base.parameters()).dtype)
    setup = Setup(subject.path, subject.layers, name, str(subject.device), ())
    return distance(base(tokens)[0].float().cpu(), Peers(setup).logits(tokens[0].tolist()))


def gradient(subject: Subject, batch_size: int, pack: int | None = None) -> Tensor:
    """What the loop's optimizer is given for one step of all rows: all of it in one vector."""
    optimizer = _train(subject, batch_size, 8 // batch_size, None, pack, lr=0.0, grad_clip=0.0)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    first_moment = 1 - optimizer.defaults["betas"][0]  # after one step, this much of the gradient
    return torch.cat([optimizer.state[p]["exp_avg"].flatten() for p in trained]) / first_moment


def _train(subject, batch_size, accumulation_steps, run, pack=None, **settings):
    context = subject.model.config.max_seq_len
    batches = Batches(subject.rows(), batch_size, 0, 0, context, pack)
    settings = TrainSettings(accumulation_steps=accumulation_steps, **settings)
    plain = Precision("fp32", subject.device)  # the weights are in their dtype: nothing is cast
    return train(subject.model, token_loss, batches, None, settings, plain, run)[1]


def _tensors_apart(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    if got.keys() != want.keys():
        return math.inf
    differing = [k for k in want if not torch.equal(got[k], want[k])]
    return max((distance(got[k], want[k]) or math.inf for k in differing), default=0.0)


@contextmanager
def dropout(model: nn.Module, share: float) -> Iterator[None]:
    """Every dropout layer with this share, while it is on."""
    layers = [m for m in model.modules() if isinstance(m, nn.Dropout)]
    kept = [layer.p for layer in layers]
    for layer in layers:
        layer.p = share
    try:
        yield
    finally:
        for layer, p in zip(layers, kept, strict=True):
            layer.p = p


def needs_lora(subject: Subject) -> str | None:
    """Why a promise about LoRA does not apply."""
    found = bool(lora_layers(subject.model))
    return None if found else "the adapter is no LoRA"


def needs_no_prompt(subject: Subject) -> str | None:
    """Why packing does not apply."""
    wrapped = isinstance(subject.model, Wrapped)
    return "samples with a soft prompt or prefix are not packed" if wrapped else None


def needs_frozen_head(subject: Subject) -> str | None:
    """Why losses are taken from logits."""
    return None if is_frozen_head(subject.model.vocabulary_head) else "the head is trained"


def needs_peers(subject: Subject) -> str | None:
    """Why there is nothing to compare with."""
    import importlib.util

    if not (subject.path / "config.json").exists():
        return "no Hugging Face folder"
    missing = [name for name in ("transformers", "peft") if not importlib.util.find_spec(name)]
    return f"{missing[0]} is not installed" if missing else None


@dataclass(frozen=True)
class Promise:
    """`about` names both sides; `exact`: in the working dtype, to the bit; `in_float64`: whether
    exact arithmetic says more; `applies` returns a reason where it does not."""

    measure: Callable[[Subject], float]
    about: str
    exact: bool = False
    in_float64: bool = True
    applies: Callable[[Subject], str | None] = lambda subject: None


PROMISES = {
    "cache": Promise(cache, "KV cache on = off: whole, chunked, one by one, greedy"),
    "ragged": Promise(ragged, "a padded batch = one prompt at a time"),
    "attention": Promise(attention, "explicit attention = SDPA"),
    "merged": Promise(merged, "merged LoRA = unmerged", applies=needs_lora),
    "toggled": Promise(
        toggled, "frozen weights after N toggles = before", True, False, needs_lora
    ),
    "saved-merged": Promise(
        saved_merged, "a file saved while merged = unmerged", True, False, needs_lora
    ),
    "accumulation": Promise(accumulation, "a step of 1 x 8 samples = 8 x 1"),
    "packed": Promise(packed, "packed samples = apart", applies=needs_no_prompt),
    "cut": Promise(cut, "losses of a frozen head without logits = with", applies=needs_frozen_head),
    "checkpointed": Promise(checkpointed, "gradients of recomputed blocks = plain, dropout on"),
    "resumed": Promise(resumed, "a resumed run = one never stopped", True, False),
    "saved": Promise(saved, "load(save(x)) = x, base and adapter", True, False),
    "streamed": Promise(streamed, "text shown token by token = as a whole", True, False),
    "peers": Promise(peers, "logits = transformers'", in_float64=False, applies=needs_peers),
}

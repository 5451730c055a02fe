"""Every way to fine-tune, by name: what it adds to a model, and which tensors it lets train.

A method is a function (model, tokenizer, options) -> (adapted model, formula of its size); it
leaves exactly its own tensors trainable. LoRA, adapters and the methods that train tensors of the
base return the model itself, prompt and prefix tuning a wrapper with the same call.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn

from minillm.adapt.bottleneck import AdapterLinear, add_adapters
from minillm.adapt.lora import add_lora, lora_layers, mark_only_lora_as_trainable
from minillm.adapt.prompts import PrefixTuning, SoftPrompt, check_virtual, prefix_of_text
from minillm.errors import UserError
from minillm.linear import Linear


@dataclass(frozen=True)
class MethodOptions:
    """What the methods leave open; each reads its own."""

    targets: tuple[str, ...] = ()  # lora: layers, or slices of fused ones
    rank: int = 16
    alpha: float = 32
    rslora: bool = False  # lora: alpha counts over sqrt(rank), not rank (Kalajdzievski 2023)
    lora_dropout: float = 0.05
    bottleneck: int = 16  # adapters: width
    virtual_tokens: int = 20  # prompt_tuning, prefix_tuning: columns
    prompt_text: str = "[SUMMARIZE]"  # what the virtual tokens start as; "" for random
    prefix_hidden: int = 0  # prefix_tuning: width of the re-parametrisation, 0 for none
    add_biases: bool = False  # bitfit: give zero biases to linear layers that have none
    untie: bool = False  # last_layer: train a copy of a tied head, not the embedding with it

    @property
    def effective_alpha(self) -> float:
        """LoRA's alpha as the layers count it, which divide it by the rank."""
        return self.alpha * self.rank**0.5 if self.rslora else self.alpha

    @classmethod
    def from_flags(cls, flags: dict) -> "MethodOptions":
        """Those of the flags (by name, with underscores) that are options of a method; targets
        are one text with commas between."""
        names = tuple(name.strip() for name in flags["targets"].split(",") if name.strip())
        own = {f.name: flags[f.name] for f in fields(cls) if f.name in flags}
        return cls(**(own | {"targets": names}))


@dataclass(frozen=True)
class Method:
    """`adapt` does it and reads the `options`; `lr` is its own default learning rate, None for the
    script's; `in_place` says that it trains tensors of the base, which are then kept in fp32;
    `decays` that weight decay makes sense for what it trains."""

    adapt: Callable[[nn.Module, object, MethodOptions], tuple[nn.Module, str]]
    about: str
    options: tuple[str, ...] = ()
    lr: float | None = None
    in_place: bool = False
    decays: bool = True


def _train_only(model: nn.Module, chosen: set[nn.Parameter] | None) -> int:
    """Makes these the trainable tensors (all, for None); returns how many numbers they hold."""
    for parameter in model.parameters():
        parameter.requires_grad = chosen is None or parameter in chosen
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def full(model: nn.Module, tokenizer, options: MethodOptions) -> tuple[nn.Module, str]:
    """Everything trains."""
    return model, f"full fine-tuning: all {_train_only(model, None):,} parameters"


def last_layer(model: nn.Module, tokenizer, options: MethodOptions) -> tuple[nn.Module, str]:
    """The vocabulary projection. Tied, it is the token embedding as well, and both ends of the
    model move; `untie` trains a copy of its own instead."""
    c, what = model.config, "the head"
    if options.untie:
        untie_head(model)
        what = "a copy of the tied head, which adds as many; the embedding stays"
    elif c.tied_head:
        what = "the tied head, which is the token embedding too: both ends of the model train"
    head = model.vocabulary_head
    count, bias = _train_only(model, set(head.parameters())), getattr(head, "bias", None)
    sizes = f"V D = {c.vocab_size:,} x {c.dim:,}"
    if bias is not None:
        sizes = f"V D + V = {c.vocab_size:,} x {c.dim:,} + {c.vocab_size:,}"
    return model, f"last layer, {what}: {sizes} = {count:,}"


def untie_head(model: nn.Module) -> None:
    """Gives a model with a tied head a copy of its own. Errors: UserError if it has one."""
    if not model.config.tied_head:
        raise UserError("--untie: this model's head is not tied to its embedding; leave it out")
    weight = model.embedding.weight
    head = Linear(model.config.dim, model.config.vocab_size, bias=False, device="meta")
    head.weight = nn.Parameter(weight.detach().clone(), weight.requires_grad)
    setattr(model, model.HEAD, head)
    model.config = replace(model.config, tied_head=False)


def last_block(model: nn.Module, tokenizer, options: MethodOptions) -> tuple[nn.Module, str]:
    """The last transformer block; the final norm and the head stay."""
    count = _train_only(model, set(model.blocks[-1].parameters()))
    sizes = _sum_of_sizes(model.blocks[-1].parameters())
    return model, f"last block of {model.config.n_layers}, all of it: {sizes} = {count:,}"


def bitfit(model: nn.Module, tokenizer, options: MethodOptions) -> tuple[nn.Module, str]:
    """All biases and nothing else (Ben Zaken et al. 2022).

    Errors: UserError for a model without biases, unless `add_biases` gives its linear layers some.
    """
    if options.add_biases:
        add_biases(model)
    named = model.named_parameters()
    biases = dict.fromkeys(p for name, p in named if name.endswith("bias"))
    if not biases:
        raise UserError(
            f"bitfit: a {type(model).__name__} has no biases to train; add --add-biases (zero "
            "ones in every linear layer), or choose another --method"
        )
    count = _train_only(model, set(biases))
    return model, f"bitfit, all {len(biases)} bias vectors: {_sum_of_sizes(biases)} = {count:,}"


def add_biases(model: nn.Module) -> None:
    """A zero bias for every linear layer of the blocks that has none."""
    for module in model.blocks.modules():
        if isinstance(module, nn.Linear) and module.bias is None:
            module.bias = nn.Parameter(module.weight.new_zeros(module.out_features))


def lora(model: nn.Module, tokenizer, options: MethodOptions) -> tuple[nn.Module, str]:
    """Low-rank updates of the named layers. Errors: UserError as add_lora, and for alpha 0."""
    rank, alpha = options.rank, options.effective_alpha
    if alpha == 0:
        raise UserError("--alpha 0: the update would count for nothing; give a positive number")
    counted = f"{options.alpha:g} x sqrt(rank) = " if options.rslora else ""
    n_layers = add_lora(model, options.targets, rank, alpha, options.lora_dropout)
    mark_only_lora_as_trainable(model)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    where = f"{n_layers} layers ({', '.join(options.targets)})"
    return model, (
        f"LoRA rank {rank}, alpha {counted}{alpha:g} (scale {alpha / rank:g}) on {where}: sum of "
        f"r (in + out) = {_lora_sum(model, rank)} = {count:,}"
    )


def _lora_sum(model: nn.Module, rank: int) -> str:
    """5 x 16 x (224 + 672): as many A and B as there are, by their sides."""
    sides = Counter()
    for layer in lora_layers(model).values():
        n = len(layer.lora_A) // rank  # slices of a fused layer have an A and a B each
        sides[layer.in_features, len(layer.lora_B) // n] += n
    return " + ".join(f"{n} x {rank} x ({i:,} + {o:,})" for (i, o), n in sides.items())


def _sum_of_sizes(parameters: Iterable[Tensor]) -> str:
    """4 x 224 + 1 x 672: as many tensors as there are of each size."""
    sizes = Counter(p.numel() for p in parameters)
    return " + ".join(f"{n} x {size:,}" for size, n in sizes.items())


def adapters(model: nn.Module, tokenizer, options: MethodOptions) -> tuple[nn.Module, str]:
    """A bottleneck at the end of both branches of every block."""
    width, c = options.bottleneck, model.config
    n_layers = add_adapters(model, model.BRANCH_ENDS, width)
    layers = [m for m in model.modules() if isinstance(m, AdapterLinear)]
    count = _train_only(model, {p for m in layers for p in (*m.down.parameters(),
                                                            *m.up.parameters())})  # fmt: skip
    return model, (
        f"adapters of width {width} after {n_layers} layers: 2 L (2 D m + D + m) = {n_layers} x "
        f"(2 x {c.dim:,} x {width} + {c.dim:,} + {width}) = {count:,}"
    )


def prompt_tuning(model: nn.Module, tokenizer, options: MethodOptions) -> tuple[nn.Module, str]:
    """Trained rows before the token embeddings, starting as the words of `prompt_text` do."""
    n = options.virtual_tokens
    check_virtual(model, n)
    adapted = SoftPrompt(model, _start_rows(model, tokenizer, options))
    count = _train_only(adapted, {adapted.table})
    return adapted, f"prompt tuning: P D = {n} x {model.config.dim:,} = {count:,}"


def prefix_tuning(model: nn.Module, tokenizer, options: MethodOptions) -> tuple[nn.Module, str]:
    """Trained keys and values before every text, starting as those of `prompt_text`."""
    n, hidden = options.virtual_tokens, options.prefix_hidden
    check_virtual(model, n)
    ids = _text_ids(tokenizer, options)
    start = prefix_of_text(model, ids if ids else [tokenizer.bos_id] * n)
    if not ids:  # random, at the size that real keys and values have
        start = torch.randn_like(start) * start.std()
    adapted = PrefixTuning(model, start, hidden)
    own = {p for name, p in adapted.named_parameters() if not name.startswith("model.")}
    count, each = _train_only(adapted, own), start[0].numel()
    line = f"prefix tuning: P x 2 L K Dh = {n} x {each:,} = {n * each:,}"
    if hidden:
        d = model.config.dim
        line += (
            f" saved, trained through P D + D h + h + (h + 1) x {each:,} = {n} x {d:,} + "
            f"{d:,} x {hidden} + {hidden} + {hidden + 1} x {each:,} = {count:,}"
        )
    return adapted, line


def _text_ids(tokenizer, options: MethodOptions) -> list[int]:
    """One token per virtual column: those of the text over and over, none for no text."""
    ids = tokenizer.encode(options.prompt_text)
    return [ids[i % len(ids)] for i in range(options.virtual_tokens)] if ids else []


def _start_rows(model: nn.Module, tokenizer, options: MethodOptions) -> Tensor:
    """(P, D) rows of the embedding, or random ones of their size."""
    embedding, ids = model.embedding.weight.detach(), _text_ids(tokenizer, options)
    if ids:
        return embedding[torch.tensor(ids, device=embedding.device)]
    size = options.virtual_tokens, embedding.size(1)
    return torch.randn(size, device=embedding.device) * embedding.float().std()


METHODS = {
    "full": Method(full, "every tensor", in_place=True),
    "last_layer": Method(last_layer, "the vocabulary projection", ("untie",), in_place=True),
    "last_block": Method(last_block, "the last transformer block", in_place=True),
    "bitfit": Method(bitfit, "the biases", ("add_biases",), in_place=True),
    "lora": Method(
        lora, "low-rank updates of some matrices",
        ("targets", "rank", "alpha", "rslora", "lora_dropout"),
    ),
    "adapters": Method(
        adapters, "a bottleneck after both branches of every block", ("bottleneck",)
    ),
    "prompt_tuning": Method(
        prompt_tuning, "rows before the token embeddings", ("virtual_tokens", "prompt_text"),
        lr=3e-2, decays=False,
    ),
    "prefix_tuning": Method(
        prefix_tuning, "keys and values before every text",
        ("virtual_tokens", "prompt_text", "prefix_hidden"), lr=1e-2, decays=False,
    ),
}  # fmt: skip


def adapt(
    model: nn.Module, tokenizer, method: str, options: MethodOptions
) -> tuple[nn.Module, str]:
    """The adapted model and a line that explains the number of its trainable parameters.

    Errors: UserError for an unknown method, or one that this model cannot take.
    """
    if method not in METHODS:
        raise UserError(f"method {method!r} is unknown; choose from {', '.join(METHODS)}")
    if options.untie and method != "last_layer":
        raise UserError(f"--untie: {method} does not train the head alone; leave it out")
    base = sum(p.numel() for p in model.parameters())
    adapted, line = METHODS[method].adapt(model, tokenizer, options)
    if method == "full":
        return adapted, line
    count = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    total = sum(p.numel() for p in adapted.parameters())
    share = f"{100 * count / base:.4f} % of the base's {base:,} parameters"
    if total > base:
        what = "LoRA" if method == "lora" else "added"
        share += f" and {100 * count / total:.4f} % of base + {what}"
    return adapted, f"{line} trainable, which is {share}"

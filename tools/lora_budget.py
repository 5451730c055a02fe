"""What K fine-tuned models take on disk, by method, and which LoRA rank meets a budget.

    python tools/lora_budget.py --init gpt-3 --params 175e9 --targets q,v --rank 4 --models 100
    python tools/lora_budget.py --init gpt-3 --targets v --budget 3.774873600e9
    python tools/lora_budget.py --init llama-2-7b --tokens 512
    python tools/lora_budget.py --mlp 1024,512,256,128,64,32,16,8,4,2,1 --rank 4

Full fine-tuning keeps a whole model each time; adapted matrices alone are what full fine-tuning of
the targets would keep; LoRA keeps r (in + out) numbers for every target, and all of them share one
base: whether that is counted is said. --tokens adds the memory of training on a row of so many
tokens, by category, predicted. --mlp counts a plain network's BitFit and bottleneck adapters.
Sources: Hu et al. 2021 (LoRA); Ben Zaken et al. 2022 (BitFit); Houlsby et al. 2019 (adapters).
"""

from itertools import pairwise
from pathlib import Path

import torch
from torch import nn

from gpt2 import GPT2, GPT2Config
from minillm.adapt.lora import (
    LoRAParts,
    add_lora,
    largest_rank,
    lora_layers,
    mark_only_lora_as_trainable,
)
from minillm.checkpoint import empty_model
from minillm.cli import Parser, above_zero, positive, several
from minillm.config import with_layers
from minillm.data.batches import Row, collate
from minillm.errors import UserError, friendly_errors
from minillm.footprint import predict_footprint
from minillm.memory import MIB
from minillm.precision import DTYPES, Precision
from tools.models import family_of, family_of_preset

GPT3 = GPT2Config(12288, 96, 96, 50257, 2048)  # Brown et al. 2020: GPT-2's plan, wider and deeper


def parse_args(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--init", metavar="PRESET|FOLDER",
        help="a published size (gpt-3, llama-2-7b, gpt2-medium, ...), or a folder with config.json")
    add("--layers", type=positive, help="only the first N of its layers")
    add("--params", type=above_zero, help="parameters, where a nominal number is meant (175e9)")
    add("--targets", type=several(str),
        help="layers or slices that get LoRA (default: the model's own)")  # fmt: skip
    add("--rank", type=positive, default=4, help="of LoRA, or width of the network's adapters")
    add("--models", type=positive, default=100, help="how many are kept")
    add("--bytes", type=positive, default=2, help="of a number")
    add("--budget", type=above_zero, help="bytes: the largest rank that all models' LoRA fits in")
    add("--tokens", type=positive, help="also the memory of training on a row of so many tokens")
    add("--precision", choices=[*DTYPES], default="bf16", help="of that training")
    add("--mlp", type=several(positive), metavar="WIDTHS", help="a plain network, input to output")
    return parser.parse_args(argv)


def adapted_model(
    preset: str, layers: int | None, targets: list[str] | None, rank: int
) -> nn.Module:
    """A model of a published size, or of a folder's config.json, without memory, that has LoRA on
    its targets. Errors: UserError as add_lora."""
    file = Path(preset) / "config.json"
    if preset == "gpt-3":
        kind, config, own = GPT2, GPT3, ("q", "v")
    elif file.exists():
        family = family_of(file.parent)
        kind, config, own = family.model, family.read_config(file), family.targets
    else:
        family = family_of_preset(preset)
        kind, config, own = family.model, family.config.preset(preset), family.targets
    config = with_layers(config, layers, preset)
    model = empty_model(lambda: kind(config))
    with torch.device("meta"):
        add_lora(model, targets or own, rank, alpha=2 * rank)
    return mark_only_lora_as_trainable(model)


def adapted_numbers(model: nn.Module) -> int:
    """Numbers of the matrices (or slices of fused ones) that LoRA is on."""
    # B has a row for each adapted row
    return sum(len(layer.lora_B) * layer.in_features for layer in lora_layers(model).values())


def storage(model: nn.Module, params: float | None, n_models: int, n_bytes: int) -> dict:
    """Bytes by method, for one model and for all."""
    lora = sum(p.numel() for p in model.parameters() if p.requires_grad)
    base = params or sum(p.numel() for p in model.parameters()) - lora
    one = {"full fine-tuning": base, "adapted matrices": adapted_numbers(model), "LoRA": lora}
    print(f"LoRA trains {lora:,} parameters: {lora / base:.4%} of the base's {base:,.0f}, "
          f"{lora / (base + lora):.4%} of base + LoRA")  # fmt: skip
    found = {name: n_models * n * n_bytes for name, n in one.items()}
    for name in ("adapted matrices", "LoRA"):
        found[f"{name} and the shared base"] = found[name] + base * n_bytes
    print(f"{n_models} models of {base:,.0f} parameters, {n_bytes} bytes each:")
    for name, total in found.items():
        each = f"{one[name] * n_bytes:,.0f} each" if name in one else ""
        print(f"  {name:<38}{total:>12.3g} B {total / 2**30:>14,.2f} GiB  {each}")
    return found


def rank_for(model: nn.Module, rank: int, n_models: int, n_bytes: int, budget: float) -> int:
    """The largest rank whose LoRA fits (its size is proportional to the rank) and that the matrices
    can have. Errors: UserError if not even rank 1 fits."""
    lora = sum(p.numel() for p in model.parameters() if p.requires_grad)
    of_rank_1 = lora // rank * n_models * n_bytes
    found = int(budget // of_rank_1)
    if found < 1:
        raise UserError(f"--budget {budget:.3g}: rank 1 takes {of_rank_1:.3g} B; give more, or "
                        "fewer --targets")  # fmt: skip
    layers = lora_layers(model).values()
    largest = min(largest_rank(layer, isinstance(layer, LoRAParts)) for layer in layers)
    more = f"; more than {largest}, the smaller side of a matrix, adds nothing"
    print(f"{budget:.4g} B hold LoRA of rank {found}{more if found > largest else ''}")
    return min(found, largest)


def training_memory(model: nn.Module, n_tokens: int, precision: str) -> dict:
    """MiB by category for one row, frozen weights stored in the compute dtype."""
    how = Precision(precision, torch.device("cpu"))
    for p in model.parameters():
        p.data = p.data.to(torch.float32 if p.requires_grad else how.dtype)
    row = torch.zeros(n_tokens + 1, dtype=torch.int64)
    found = predict_footprint(model, collate([Row(row, row)], 0), how, 8).rows()
    print(f"LoRA on a row of {n_tokens} tokens, {precision}, predicted, MiB:")
    for name, size in found.items():
        print(f"  {name:<28}{size / MIB:12,.1f}")
    return found


def network(widths: list[int], rank: int) -> dict:
    """Counts for a plain network of these widths: base, BitFit, a bottleneck after every layer."""
    if len(widths) < 2:
        raise UserError("--mlp: a network has an input and an output; give at least two widths")
    outputs = widths[1:]
    weights, biases = sum(a * b for a, b in pairwise(widths)), sum(outputs)
    base = weights + biases
    adapters = sum(2 * rank * width + rank + width for width in outputs)
    found = {"hidden units": sum(outputs[:-1]), "parameters": base, "bitfit": biases,
             "adapters": adapters}  # fmt: skip
    print(f"{len(outputs)} layers, {found['hidden units']:,} hidden units: {weights:,} weights + "
          f"{biases:,} biases = {base:,} parameters")  # fmt: skip
    print(f"  BitFit: {biases:,}, {biases / base:.2%} of the network")
    print(f"  adapters of rank {rank}: {adapters:,}, {adapters / (base + adapters):.2%} of the "
          f"adapted network, {adapters / base:.2%} of the base")  # fmt: skip
    return found


def main(argv=None) -> dict:
    args = parse_args(argv)
    if (args.init is None) == (args.mlp is None):
        raise UserError("--init or --mlp: give one of the two")
    if args.mlp is not None:
        return network(args.mlp, args.rank)
    model = adapted_model(args.init, args.layers, args.targets, args.rank)
    found = storage(model, args.params, args.models, args.bytes)
    if args.budget is not None:
        found["rank"] = rank_for(model, args.rank, args.models, args.bytes, args.budget)
    if args.tokens is not None:
        found["training"] = training_memory(model, args.tokens, args.precision)
    return found


if __name__ == "__main__":
    with friendly_errors():
        main()

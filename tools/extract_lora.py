"""How much of a full fine-tuning is of low rank: the LoRA that is nearest to it, rank by rank.

    python train/finetune_llama.py --rank 0 --lr 1e-4 --out-dir runs/full
    python tools/extract_lora.py --checkpoint runs/full/model --out-dir runs/extracted
    python tools/extract_lora.py --checkpoint tuned/ --base gpt2 --targets c_attn --rank 32

The change of every target is cut to its r largest singular values: U S V^T becomes A = sqrt(S) V^T
and B = U sqrt(S), and no matrix of rank r is nearer to it (Eckart & Young 1936). The error is
sqrt(sum of the cut values squared), told as a share of the whole change's norm: small where the
spectrum falls fast, as fine-tuning's is said to (Aghajanyan et al. 2020; Hu et al. 2021, section
7). Changes outside the targets are left behind, so the last row, all ranks of the targets, need not
reach the fine-tuned model itself. What adapter/ keeps is the update of --rank (of each slice, where
targets are slices such as q and v).
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from minillm.adapt.lora import add_lora, lora_layers
from minillm.adapt.lora_linear import LoRALinear
from minillm.adapt.lora_parts import LoRAParts
from minillm.cli import Parser, add_model_flags, pick, positive, several
from minillm.data.batches import Batches, Encoded, encode_samples
from minillm.data.tasks import TASKS
from minillm.data.templates import Template, find_template
from minillm.errors import UserError, friendly_errors
from minillm.files import write_json
from minillm.hub import find_checkpoint
from minillm.losses import token_loss
from minillm.peft_format import save_adapter
from minillm.plots import plot_spectrum
from minillm.precision import DTYPES, choose_device, choose_precision
from minillm.runs import fresh_folder
from minillm.training import evaluate
from tools.evaluate import read_data, settings_of_training
from tools.models import ModelOptions, family_of, load_model

RANKS = [1, 2, 4, 8, 16, 32, 64]


def parse_args(argv=None):
    parser = Parser(__doc__)
    add = add_model_flags(parser).add_argument
    add("--base", metavar="NAME|PATH", help="what it was before (default: "
        "what its own notes name, else the bundled model)")  # fmt: skip
    add("--precision", choices=[*DTYPES], default="fp32", help="dtype of both models' weights")
    add = parser.add_argument_group("adapter").add_argument
    add("--targets", type=several(str),
        help="linear layers, comma-separated (default: all of every block)")  # fmt: skip
    add("--rank", type=positive, default=16, help="the rank that is kept as adapter/")
    add("--ranks", type=several(positive), default=RANKS, help="the ranks that are looked at")
    add("--out-dir", help="folder to write (default: a fresh one under runs/)")
    add = parser.add_argument_group("loss").add_argument
    add("--task", choices=[*TASKS], default="alpaca", help="what the loss is measured on")
    add("--data", help="the task's official file or folder (default: tinyworld's stand-in)")
    add("--template", help="prompt text (default: the checkpoint's own, or the task's)")
    add("--held-out", type=positive, default=100, help="samples")
    add("--max-length", type=positive, default=512, help="tokens of a sample, EOS included")
    return parser.parse_args(argv)


class Change:
    """How a layer differs from base to fine-tuned, factored: (U, S, V^T) of each part of it that
    gets an A and a B of its own (all of it, or the slices of a fused layer)."""

    def __init__(self, layer: LoRALinear, tuned: nn.Linear, largest: int):
        """Shapes: of a part with n rows, U (n, r), S (k,), V^T (r, in), r at most `largest` and k
        the smaller side."""
        fused = isinstance(layer, LoRAParts)
        names, adapted = (layer.parts, layer.adapted_parts) if fused else (("all",), ("all",))
        before, after = (w.detach().chunk(len(names)) for w in (layer.weight, tuned.weight))
        rows = [*zip(names, before, after, strict=True)]
        after = [b if name in adapted else a for name, a, b in rows]
        found = [torch.linalg.svd(_wide(b) - _wide(a), full_matrices=False)
                 for name, a, b in rows if name in adapted]  # fmt: skip
        other = torch.cat(after) if fused else tuned.weight.detach()
        self.layer, self.other = layer, nn.Parameter(other, False)
        self.values = [s for _, s, _ in found]
        self.factors = [(u[:, :largest].clone(), vt[:largest].clone()) for u, _, vt in found]

    def cut(self, rank: int) -> None:
        """Makes the layer's update the nearest one of this rank: A (r, in) and B (n, r) of each
        part, part after part."""
        both = [*zip(self.values, self.factors, strict=True)]
        a = [s[:rank].sqrt()[: len(vt), None] * vt[:rank] for s, (_, vt) in both]
        b = [u[:, :rank] * s[:rank].sqrt()[: u.size(1)] for s, (u, _) in both]
        self.layer.lora_A = nn.Parameter(torch.cat(a), False)
        self.layer.lora_B = nn.Parameter(torch.cat(b), False)

    def exchange(self) -> None:
        """The layer's weight and the fine-tuned one (of its adapted parts) change places."""
        self.layer.train()  # not while a merged weight stands in for its own
        self.layer.weight, self.other = self.other, self.layer.weight


def _wide(weight: Tensor) -> Tensor:
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32))


def find_changes(
    base: nn.Module, tuned: nn.Module, targets: list[str], largest: int
) -> dict[str, Change]:
    """Adds LoRA of scale 1 to the base's targets, and factors how `tuned` differs from it there,
    to be cut to ranks up to `largest`.

    Errors: UserError for a target that is no linear layer, or if none of them has changed.
    """
    add_lora(base, targets, rank=1, alpha=1, dropout=0.0)
    there = dict(tuned.named_modules())
    layers = tqdm(lora_layers(base).items(), desc="singular values", unit="layer", leave=False)
    changes = {name: Change(layer, there[name], largest) for name, layer in layers}
    if not any(s.any() for change in changes.values() for s in change.values):
        raise UserError("--checkpoint and --base are equal in every target; name the fine-tuned "
                        "model, and what it was before")  # fmt: skip
    return changes


def energy_kept(values: list[Tensor], rank: int) -> float:
    """The share of the squared change that the `rank` largest singular values of each part hold."""
    return sum_of_squares([s[:rank] for s in values]) / sum_of_squares(values)


def sum_of_squares(tensors: Iterable[Tensor]) -> float:
    """Of all their numbers, in float64."""
    return sum(float(t.double().square().sum()) for t in tensors)


def differences(base: nn.Module, tuned: nn.Module) -> Iterator[Tensor]:
    """Fine-tuned minus base, tensor by tensor. Errors: UserError unless they have the same ones."""
    before, after = (dict(model.named_parameters()) for model in (base, tuned))
    sizes = [{name: p.shape for name, p in each.items()} for each in (before, after)]
    if sizes[0] != sizes[1]:
        raise UserError("--base: its tensors are not those of --checkpoint; name the model that "
                        "was fine-tuned")  # fmt: skip
    return (_wide(after[name]) - _wide(p) for name, p in before.items())


def linear_layers(model: nn.Module) -> list[str]:
    """The last words of the names of all linear layers in a block."""
    modules = model.blocks[0].named_modules()
    return sorted({n.rpartition(".")[2] for n, m in modules if isinstance(m, nn.Linear)})


def look(changes: list[Change], ranks: list[int], loss: Callable[[], float]) -> list[dict]:
    """A row for each rank below the full one, and one for all of them, which is the fine-tuned
    weights themselves: energy kept, parameters of A and B, held-out loss."""
    values = [s for change in changes for s in change.values]
    longest, rows = max(map(len, values)), []
    for rank in sorted({rank for rank in ranks if rank < longest}):
        for change in changes:
            change.cut(rank)
        size = sum(c.layer.lora_A.numel() + c.layer.lora_B.numel() for c in changes)
        energy = energy_kept(values, rank)
        rows.append({"rank": rank, "energy": energy, "parameters": size, "loss": loss()})
    for change in changes:
        change.cut(0)
        change.exchange()
    size = sum(min(u.size(0), vt.size(1)) * (u.size(0) + vt.size(1))
               for change in changes for u, vt in change.factors)  # fmt: skip
    rows.append({"rank": longest, "energy": 1.0, "parameters": size, "loss": loss()})
    for change in changes:
        change.exchange()
    return rows


def show(rows: list[dict], before: float, after: float, kept: int) -> None:
    """Prints the table: the base, each rank, the fine-tuned model."""
    print(f"{'rank':>10}{'energy kept':>14}{'rel. error':>12}{'parameters':>14}{'held-out':>15}")
    print(f"{'base':>10}{0:14.2%}{1:12.3f}{0:14,}{before:15.4f}")
    for row in rows:
        error = max(0.0, 1 - row["energy"]) ** 0.5  # of the Frobenius norm of the change
        print(f"{row['rank']:>10}{row['energy']:14.2%}{error:12.3f}{row['parameters']:14,}"
              f"{row['loss']:15.4f}{'  kept' if row['rank'] == kept else ''}")  # fmt: skip
    print(f"{'fine-tuned':>10}{'':14}{'':12}{'':14}{after:15.4f}")


def held_out_rows(
    task: str, path: str | None, template: Template | None, tokenizer, n: int, max_length: int
) -> tuple[Encoded, Template]:
    """A task's held-out samples, encoded, and the template they are asked in (its own, for None).

    Errors: UserError for a template that does not fit the task, or if nothing is held out.
    """
    kind = TASKS[task]
    template = (template or find_template(kind.template)).check_field(kind.field)
    split = "test" if kind.has_test else "validation"
    samples, _ = read_data(task, path, split, template, n, skip_bad=False)
    held_out = encode_samples(samples, tokenizer, max_length)
    if not held_out.rows:
        raise UserError(f"{path or 'tinyworld'}: no held-out sample fits; give more of them")
    return held_out, template


def main(argv=None) -> list[dict]:
    args = parse_args(argv)
    if args.checkpoint is None:
        raise UserError("--checkpoint: none given; name the folder of the fine-tuned model")
    path = find_checkpoint(args.checkpoint)
    family, device = family_of(path), choose_device(args.device)
    known = vars(args) | {"checkpoint": path, "adapter": None, "force": False}
    tuned, tokenizer, template = load_model(pick(ModelOptions, known))
    precision = choose_precision(args.precision, device)
    noted = settings_of_training(None, args.checkpoint).get("checkpoint")
    origin = find_checkpoint(args.base or noted or family.bundled)
    base, _ = family.load(
        origin, tuned.config.n_layers, precision.dtype, device, args.tokenizer
    )
    base.attention = args.attention  # tuned has it already
    context = tuned.config.max_seq_len
    held_out, template = held_out_rows(
        args.task, args.data, template, tokenizer, args.held_out, min(args.max_length, context)
    )
    print(f"held out: {held_out.summary()}")
    everything = sum_of_squares(differences(base, tuned))
    batches = list(Batches(held_out.rows, 8, tokenizer.pad_id, None, context))
    folder = Path(args.out_dir) if args.out_dir else fresh_folder("runs", "extract-lora")
    if (folder / "adapter").exists():
        raise UserError(f"{folder}: holds an adapter already; name another --out-dir")
    folder.mkdir(parents=True, exist_ok=True)

    def loss(model: nn.Module = base) -> float:
        return evaluate(model, token_loss, batches, precision)

    before, after = loss(), loss(tuned)
    targets = args.targets or linear_layers(base)
    ranks = [*args.ranks, args.rank]
    changes = find_changes(base.train().requires_grad_(False), tuned, targets, max(ranks))
    values = {name: change.values for name, change in changes.items()}
    inside = sum_of_squares([s for found in values.values() for s in found])
    print(f"{len(changes)} layers ({', '.join(targets)}) hold {inside / everything:.2%} of the "
          f"squared change from {origin} to {path}; the rest is left behind")  # fmt: skip

    rows = look([*changes.values()], ranks, loss)
    for change in changes.values():
        change.cut(args.rank)
    kept = min(args.rank, rows[-1]["rank"])
    save_adapter(base, folder / "adapter", str(origin), template.to_dict(), "lora")
    show(rows, before, after, kept)
    write_json(folder / "extract.json", {
        "checkpoint": str(path), "base": str(origin), "targets": targets, "ranks": rows,
        "base_loss": before, "tuned_loss": after, "share_in_targets": inside / everything,
        "singular_values": {name: [s.tolist() for s in found] for name, found in values.items()},
    })  # fmt: skip
    plot_spectrum(values, rows, before, after, folder / "spectrum.png")
    print(f"adapter of rank {kept}, spectrum.png and extract.json are in {folder}")
    return rows


if __name__ == "__main__":
    with friendly_errors():
        main()

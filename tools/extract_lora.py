"""How much of a full fine-tuning is of low rank: the LoRA that is nearest to it, rank by rank.

    python train/finetune_llama.py --rank 0 --lr 1e-4 --out-dir runs/full
    python tools/extract_lora.py --checkpoint runs/full/model --out-dir runs/extracted
    python tools/extract_lora.py --checkpoint tuned/ --base gpt2 --targets c_attn --rank 32

The change of every target is cut to its r largest singular values: U S V^T becomes A = sqrt(S) V^T
and B = U sqrt(S), and no matrix of rank r is nearer to it (Eckart & Young 1936). The error is
sqrt(sum of the cut values squared): small where the spectrum falls fast, as fine-tuning's is said
to (Aghajanyan et al. 2020; Hu et al. 2021, section 7). Changes outside the targets are left behind,
so the last row, all ranks of the targets, need not reach the fine-tuned model itself. What adapter/
keeps is the update of --rank.
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from minillm.adapt.lora import add_lora
from minillm.adapt.lora_linear import LoRALinear, LoRAParts
from minillm.cli import Parser, add_model_flags, positive, several
from minillm.data.batches import Batches, encode_samples
from minillm.data.tasks import TASKS
from minillm.data.templates import find_template
from minillm.errors import UserError, friendly_errors
from minillm.files import write_json
from minillm.hub import find_checkpoint
from minillm.losses import token_loss
from minillm.peft_format import save_adapter
from minillm.peft_lora import lora_layers
from minillm.plots import plot_spectrum
from minillm.precision import DTYPES, choose_device, choose_precision
from minillm.runs import fresh_folder
from minillm.training import evaluate
from tools.models import family_of, load_model

RANKS = [1, 2, 4, 8, 16, 32, 64]


def parse_args(argv=None):
    parser = Parser(__doc__)
    add = add_model_flags(parser).add_argument
    add("--base", metavar="NAME|PATH", help="what it was before (default: the bundled model)")
    add("--precision", choices=[*DTYPES], default="fp32", help="dtype of both models' weights")
    add = parser.add_argument_group("adapter").add_argument
    add("--targets", help="linear layers, comma-separated (default: all of every block)")
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
    """A layer's change from base to fine-tuned, factored: (U, S, V^T) of each part of it that gets
    an A and a B of its own (all of it, or the slices of a fused layer)."""

    def __init__(self, layer: LoRALinear, tuned: nn.Linear):
        """Shapes: of a part with n rows, U (n, k), S (k,), V^T (k, in), k the smaller side."""
        delta = _wide(tuned.weight) - _wide(layer.weight)  # (out, in)
        parts = [delta]
        if isinstance(layer, LoRAParts):
            slices = zip(layer.parts, delta.chunk(len(layer.parts)), strict=True)
            parts = [rows for name, rows in slices if name in layer.adapted_parts]
        self.layer = layer
        self.factors = [torch.linalg.svd(part, full_matrices=False) for part in parts]

    @property
    def values(self) -> list[Tensor]:
        """The singular values of each part, largest first."""
        return [s for _, s, _ in self.factors]

    def cut(self, rank: int | None) -> None:
        """Makes the layer's update the nearest one of this rank, of full rank for None: A (r, in)
        and B (n, r) of each part, part after part."""
        a = [s[:rank].sqrt()[:, None] * vt[:rank] for _, s, vt in self.factors]
        b = [u[:, :rank] * s[:rank].sqrt() for u, s, _ in self.factors]
        self.layer.lora_A = nn.Parameter(torch.cat(a), False)
        self.layer.lora_B = nn.Parameter(torch.cat(b), False)


def _wide(weight: Tensor) -> Tensor:
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32))


def find_changes(base: nn.Module, tuned: nn.Module, targets: list[str]) -> dict[str, Change]:
    """Adds LoRA of scale 1 to the base's targets, and factors how `tuned` differs from it there.

    Errors: UserError for a target that is no linear layer, or if none of them has changed.
    """
    add_lora(base, targets, rank=1, alpha=1, dropout=0.0)
    there = dict(tuned.named_modules())
    layers = tqdm(lora_layers(base).items(), desc="singular values", unit="layer", leave=False)
    changes = {name: Change(layer, there[name]) for name, layer in layers}
    if not any(s.any() for change in changes.values() for s in change.values):
        raise UserError("--checkpoint and --base are equal in every target; name the fine-tuned "
                        "model, and what it was before")  # fmt: skip
    return changes


def energy_kept(values: list[Tensor], rank: int | None) -> float:
    """The share of the squared change that the `rank` largest singular values of each part hold."""
    return sum_of_squares([s[:rank] for s in values]) / sum_of_squares(values)


def sum_of_squares(tensors: list[Tensor]) -> float:
    """Of all their numbers, in float64."""
    return sum(float(t.double().square().sum()) for t in tensors)


def differences(base: nn.Module, tuned: nn.Module) -> list[Tensor]:
    """Fine-tuned minus base, tensor by tensor. Errors: UserError unless they have the same ones."""
    before, after = (dict(model.named_parameters()) for model in (base, tuned))
    sizes = [{name: p.shape for name, p in each.items()} for each in (before, after)]
    if sizes[0] != sizes[1]:
        raise UserError("--base: its tensors are not those of --checkpoint; name the model that "
                        "was fine-tuned")  # fmt: skip
    return [_wide(after[name]) - _wide(p) for name, p in before.items()]


def linear_layers(model: nn.Module) -> list[str]:
    """The last words of the names of all linear layers in a block."""
    modules = model.blocks[0].named_modules()
    return sorted({n.rpartition(".")[2] for n, m in modules if isinstance(m, nn.Linear)})


def look(changes: dict[str, Change], ranks: list[int], kept: int, loss, save) -> list[dict]:
    """A row for each rank, and one for all: energy kept, parameters, held-out loss. Calls `save`
    at rank `kept`, and ends there."""
    values = [s for change in changes.values() for s in change.values]
    longest, rows = max(map(len, values)), []
    wanted = sorted({r for r in (*ranks, kept) if r < longest})
    for rank in [*wanted, None, kept]:
        for change in changes.values():
            change.cut(rank)
        layers = [change.layer for change in changes.values()]
        if len(rows) > len(wanted):
            save()
            break
        rows.append({
            "rank": rank or longest, "energy": energy_kept(values, rank),
            "parameters": sum(m.lora_A.numel() + m.lora_B.numel() for m in layers),
            "loss": loss(),
        })  # fmt: skip
    return rows


def show(rows: list[dict], before: float, after: float, kept: int) -> None:
    """Prints the table: the base, each rank, the fine-tuned model."""
    print(f"{'rank':>10}{'energy kept':>14}{'error':>9}{'parameters':>14}{'held-out loss':>15}")
    print(f"{'base':>10}{0:14.2%}{1:9.3f}{0:14,}{before:15.4f}")
    for row in rows:
        error = max(0.0, 1 - row["energy"]) ** 0.5  # of the Frobenius norm of the change
        print(f"{row['rank']:>10}{row['energy']:14.2%}{error:9.3f}{row['parameters']:14,}"
              f"{row['loss']:15.4f}{'  kept' if row['rank'] == kept else ''}")  # fmt: skip
    print(f"{'fine-tuned':>10}{'':14}{'':9}{'':14}{after:15.4f}")


def main(argv=None) -> list[dict]:
    args = parse_args(argv)
    if args.checkpoint is None:
        raise UserError("--checkpoint: none given; name the folder of the fine-tuned model")
    path = find_checkpoint(args.checkpoint)
    family, device = family_of(path), choose_device(args.device)
    tuned, tokenizer, template = load_model(
        path, None, args.layers, args.tokenizer, args.template, args.device, args.precision, False
    )
    precision = choose_precision(args.precision, device)
    origin = find_checkpoint(args.base or family.bundled)
    base, _ = family.load(
        origin, tuned.config.n_layers, precision.dtype, device, args.tokenizer
    )
    kind, context = TASKS[args.task], tuned.config.max_seq_len
    template = (template or find_template(kind.template)).check_field(kind.field)
    samples = kind.splits(args.data, template, 1, args.held_out).validation[: args.held_out]
    held_out = encode_samples(samples, tokenizer, min(args.max_length, context))
    print(f"held out: {held_out.summary()}")
    batches = list(Batches(held_out.rows, 8, tokenizer.pad_id, None, context))
    folder = Path(args.out_dir) if args.out_dir else fresh_folder("runs", "extract-lora")
    folder.mkdir(parents=True, exist_ok=True)

    def loss(model: nn.Module = base) -> float:
        return evaluate(model, token_loss, batches, precision)

    before, after = loss(), loss(tuned)
    everything = sum_of_squares(differences(base, tuned))
    targets = args.targets.split(",") if args.targets else linear_layers(base)
    changes = find_changes(base.requires_grad_(False), tuned, targets)
    values = {name: change.values for name, change in changes.items()}
    inside = sum_of_squares([s for found in values.values() for s in found])
    print(f"{len(changes)} layers ({', '.join(targets)}) hold {inside / everything:.2%} of the "
          f"squared change of {path}; the rest is left behind")  # fmt: skip

    def save() -> None:
        save_adapter(base, folder / "adapter", str(origin), template.to_dict(), "lora")

    rows = look(changes, args.ranks, args.rank, loss, save)
    show(rows, before, after, args.rank)
    write_json(folder / "extract.json", {
        "checkpoint": str(path), "base": str(origin), "targets": targets, "ranks": rows,
        "base_loss": before, "tuned_loss": after, "share_in_targets": inside / everything,
        "singular_values": {name: [s.tolist() for s in found] for name, found in values.items()},
    })  # fmt: skip
    plot_spectrum(values, rows, before, after, folder / "spectrum.png")
    print(f"adapter of rank {args.rank}, spectrum.png and extract.json are in {folder}")
    return rows


if __name__ == "__main__":
    with friendly_errors():
        main()

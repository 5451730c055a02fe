"""Folds an adapter into its base and writes the result as a model of its own.

    python tools/merge_adapter.py --adapter runs/finetune-llama-001/adapter --out merged

The result is an ordinary Hugging Face folder, whose minillm.json says that it is merged: the
adapter is refused on it, and so is one that does not know its base.
"""

from pathlib import Path

from minillm.adapt.lora import fold_lora, lost_in_merging
from minillm.cli import Parser, pick
from minillm.errors import UserError, friendly_errors
from minillm.files import write_json
from minillm.peft_format import read_notes
from tools.models import ModelOptions, add_adapted_model_flags, load_model, save_model


def parse_args(argv=None):
    parser = Parser(__doc__)
    add_adapted_model_flags(parser)
    parser.add_argument("--out", required=True, help="folder to write (must not exist yet)")
    return parser.parse_args(argv)


def main(argv=None) -> None:
    args = parse_args(argv)
    if args.adapter is None:
        raise UserError("--adapter: none given; name the folder of the adapter to merge")
    if Path(args.out).exists():
        raise UserError(f"{args.out}: exists already; name another --out")
    model, tokenizer, template = load_model(pick(ModelOptions, vars(args)))
    lost = lost_in_merging(model)
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    n_layers = fold_lora(model)
    what = (f"{n_layers} layers merged in {dtype}, whose rounding takes {lost:.2g} of the update's "
            "norm" if n_layers else f"what was trained is in its place, in {dtype}")  # fmt: skip
    save_model(model, tokenizer, Path(args.out), template)
    notes = read_notes(Path(args.adapter))
    write_json(Path(args.out) / "minillm.json", notes | {"adapter": args.adapter, "merged": True})
    print(f"{what}; wrote {args.out}")


if __name__ == "__main__":
    with friendly_errors():
        main()

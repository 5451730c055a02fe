"""The flags that every fine-tuning script takes, whatever its model."""

import argparse
import os
import shutil
import sys
from dataclasses import fields
from pathlib import Path

from minillm.adapt.methods import METHODS, Method, MethodOptions
from minillm.cli import Parser, add_model_flags, amount, positive, share, whole
from minillm.data.tasks import TASKS
from minillm.errors import UserError
from minillm.files import read_json
from minillm.precision import DTYPES
from minillm.runs import check_folder


def add_flags(parser: Parser, targets: str, lr: float) -> None:
    """The flags that every fine-tuning script takes; `targets` (of LoRA) and `lr` are the script's
    defaults."""
    add = add_model_flags(parser).add_argument
    add("--init", metavar="PRESET", help="random weights of a published size: gpt2, llama-2-7b")
    add = parser.add_argument_group("data").add_argument
    add("--task", choices=[*TASKS], default="alpaca", help="what the data is")
    add("--data", "--data-path",
        help="the task's official file or folder (default: tinyworld's stand-in)")  # fmt: skip
    add("--skip-bad", action="store_true", help="leave out broken rows of --data, and count them")
    add("--template", help="prompt text by name, or a .json file (default: the task's own)")
    add("--samples", type=positive, default=200, help="train on the first N samples")
    add("--held-out", type=positive, default=100, help="measure the loss on at most N samples")
    add("--max-length", type=positive, default=512, help="tokens of a sample, EOS included")
    _add_method_flags(parser, targets)
    _add_training_flags(parser, lr)
    _add_run_flags(parser)


def _add_method_flags(parser: Parser, targets: str) -> None:
    add = parser.add_argument_group("method").add_argument
    add("--method", choices=[*METHODS], default="lora", help="what is trained: "
        + "; ".join(f"{name}: {method.about}" for name, method in METHODS.items()))  # fmt: skip
    add("--rank", "--lora-rank", type=whole, default=16,
        help="LoRA: its rank; 0 is full fine-tuning")  # fmt: skip
    add("--alpha", "--lora-alpha", type=amount, default=32,
        help="LoRA: the update is scaled by alpha / rank")  # fmt: skip
    add("--rslora", action="store_true",
        help="LoRA: scale by alpha / sqrt(rank), so that one rate suits all ranks")  # fmt: skip
    add("--lora-dropout", type=share, default=0.05, help="LoRA: dropout on its input")
    add("--targets", default=targets, help=f"LoRA: layers, comma-separated (default: {targets})")
    add("--bottleneck", type=positive, default=16, help="adapters: width")
    add("--virtual-tokens", type=positive, default=20,
        help="prompt_tuning, prefix_tuning: how many virtual tokens are trained")  # fmt: skip
    add("--prompt-text", default="[SUMMARIZE]",
        help="prompt_tuning, prefix_tuning: the words they start as; '' for random")  # fmt: skip
    add("--prefix-hidden", type=whole, default=0,
        help="prefix_tuning: width of the re-parametrisation, 0 for none")  # fmt: skip
    add("--add-biases", action="store_true",
        help="bitfit: zero biases for linear layers that have none, as LLaMA's")  # fmt: skip
    add("--untie", action="store_true",
        help="last_layer: train a copy of a tied head, not the embedding with it")  # fmt: skip


def _add_run_flags(parser: Parser) -> None:
    add = parser.add_argument_group("run folder").add_argument
    add("--out-dir", help="where the run is kept (default: a fresh folder under runs/)")
    add("--keep-last", action="store_true",
        help="also save the last step's weights, beside the best on held-out data")  # fmt: skip
    add("--wandb-project", help="also log to this Weights & Biases project, if it is installed")
    add("--resume", action="store_true", help="continue the run in --out-dir")
    add("--override", action="store_true",
        help="with --resume: go on with other settings than it began with")  # fmt: skip
    add("--overwrite", action="store_true", help="replace the run in --out-dir")
    add("--save-every", type=amount, default=10.0, metavar="MINUTES",
        help="between checkpoints, beside those of every evaluation")  # fmt: skip
    add("--no-save", action="store_true",
        help="keep settings, log and summary, but no weights on disk: to measure")  # fmt: skip
    add("--dry-run", action="store_true", help="only the checks before the first step")


def _add_training_flags(parser: Parser, lr: float) -> None:
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=positive, default=1, help="passes over the samples")
    add("--max-iters", type=positive, help="stop after N optimizer steps")
    own = ", ".join(f"{m.lr:g} for {name}" for name, m in METHODS.items() if m.lr)
    add("--lr", "--learning-rate", type=amount,
        help=f"peak learning rate (default: {lr:g}, but {own})")  # fmt: skip
    add("--schedule", choices=["constant", "cosine", "linear"], default="constant",
        help="of the learning rate after the warm-up")  # fmt: skip
    add("--warmup", type=whole, default=0, help="optimizer steps from lr 0 to the peak")
    add("--batch-size", type=positive, default=1, help="samples in one forward")
    add("--accumulation-steps", "--gradient-accumulation-steps", type=positive, default=8,
        help="forwards in an optimizer step")  # fmt: skip
    add("--pack", type=positive, metavar="TOKENS",
        help="put a step's samples side by side in forwards of up to so many tokens, without "
        "attention between them: the same gradient, sooner")  # fmt: skip
    add("--weight-decay", type=amount, default=0.0, help="AdamW's, on matrices")
    add("--beta2", type=share, default=0.999, help="AdamW's memory of squared gradients")
    add("--grad-clip", type=amount, default=1.0, help="largest gradient norm, 0 for no limit")
    add("--eval-every", "--eval-interval", type=positive,
        help="optimizer steps between held-out losses")  # fmt: skip
    add("--patience", type=positive, help="stop after N evaluations without a new best (one after "
        "each epoch, unless --eval-every says otherwise)")  # fmt: skip
    add("--seed", type=whole, default=0, help="of initialisation, data order and dropout")
    add("--precision", choices=["auto", *DTYPES], default="auto",
        help="of matrix products; auto: bf16 where it runs in hardware")  # fmt: skip
    add("--frozen-dtype", choices=["auto", *DTYPES], default="auto",
        help="how frozen weights are stored; auto: as --precision computes")  # fmt: skip
    add("--gradient-checkpointing", action="store_true",
        help="recompute each block in backward: less memory, half as much time again")  # fmt: skip
    add("--compile", action="store_true",
        help="torch.compile the loss: a minute or more before the first step, then fewer kernels "
        "on a GPU (not measured there; on a CPU steps take longer)")  # fmt: skip


def parse(parser: Parser, argv: list[str] | None, lr: float) -> argparse.Namespace:
    """The flags, with the method's own defaults; `lr` is that of a method without one.

    `--init-from resume` (the course's spelling) takes all settings of the run in --out-dir and
    continues it. Errors: UserError.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    args = parser.parse_args(argv)
    if args.checkpoint == "resume":
        if args.out_dir is None:
            raise UserError("--init-from resume: no run is named; add --out-dir FOLDER")
        if args.config is not None:
            raise UserError("--init-from resume takes the settings of the run; leave --config out")
        kept = Path(args.out_dir) / "config.json"
        began = read_json(kept)
        args = parser.parse_args(["--config", str(kept), *argv, "--resume"])
        args.checkpoint = began.get("checkpoint")
    if args.resume or not args.dry_run:  # before anything is loaded
        check_folder(args.out_dir, args.resume, args.overwrite)
    if args.override and not args.resume:
        print("warning: --override: no effect without --resume", file=sys.stderr)
    if args.keep_last and args.no_save:
        raise UserError("--keep-last and --no-save contradict each other; give one of them")
    if args.compile and not shutil.which(os.environ.get("CXX", "g++")):
        raise UserError("--compile: needs a C++ compiler; install g++, or leave it out")
    if args.method == "lora" and args.rank == 0:
        args.method = "full"
    method = METHODS[args.method]
    if args.pack and "virtual_tokens" in method.options:
        raise UserError(f"--pack: packed samples go with no virtual tokens, which {args.method} "
                        "puts before each; leave it out")  # fmt: skip
    given = [name for name, value in vars(args).items()
             if value and value != parser.own_default(name)]  # fmt: skip
    if idle := _idle_flags(method, given):
        names = ", ".join(f"--{name.replace('_', '-')}" for name in idle)
        print(f"warning: {names}: no effect on --method {args.method}", file=sys.stderr)
    args.lr = args.lr if args.lr is not None else method.lr or lr
    args.weight_decay = args.weight_decay if method.decays else 0.0
    return args


def _idle_flags(method: Method, given: list[str]) -> list[str]:
    """Those of the flags given that do nothing for the method; of --untie `adapt` tells."""
    of_others = {field.name for field in fields(MethodOptions)} - {"untie", *method.options}
    return [name for name in given
            if name in of_others or name == "weight_decay" and not method.decays]  # fmt: skip

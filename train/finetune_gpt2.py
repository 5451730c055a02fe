"""Fine-tunes a GPT-2 to tell good film reviews from bad ones: LoRA on c_attn, or all of it.

    python train/finetune_gpt2.py                                bundled model and data, offline
    python train/finetune_gpt2.py --init-from gpt2-medium --data rotten_tomatoes/ --rank 128
    python train/finetune_gpt2.py --rank 0 --dropout 0.05        full fine-tuning
    python train/finetune_gpt2.py --targets q,v                  LoRA on slices of c_attn
    python train/finetune_gpt2.py --init-from resume --out-dir runs/finetune-gpt2-001
"""

from gpt2 import FAMILY
from minillm import finetune
from minillm.cli import Parser, settings_of, share
from minillm.errors import friendly_errors
from minillm.flags import add_flags, parse
from minillm.job import Options
from minillm.losses import token_loss
from minillm.training import train

LR = 2.5e-4  # the course's


def parse_args(argv=None):
    parser = Parser(__doc__)
    add_flags(parser, targets=",".join(FAMILY.targets), lr=LR)
    parser.add_argument("--dropout", type=share, default=0.0,
        help="of embeddings, attention weights and both branches of every block")  # fmt: skip
    parser.set_defaults(  # near the course's: its samples, batch, lr and decay
        task="rotten_tomatoes", samples=5000, held_out=1066, epochs=2, alpha=64,
        batch_size=4, accumulation_steps=32, weight_decay=0.1,
    )  # fmt: skip
    args = parse(parser, argv, LR)
    if args.patience is None and args.eval_every is None:
        args.eval_every = 10
    return args


def main(argv=None) -> tuple[float, float] | None:
    args = parse_args(argv)
    options = Options.from_flags(vars(args))
    job, held_out = finetune.prepare(FAMILY, options)
    job.base.model.dropout = args.dropout
    run = finetune.begin(job, token_loss, options.run, "finetune-gpt2", settings_of(args))
    if run is None:  # --dry-run
        return None
    progress, optimizer = train(
        job.model, token_loss, job.batches, held_out, options.training, job.base.precision, run
    )
    finetune.finish(job, run, progress, optimizer, args.keep_last)
    return progress.before, progress.best


if __name__ == "__main__":
    with friendly_errors():
        main()

"""Fine-tunes a LLaMA on instructions: one raw loop, LoRA on wq and wv, on one GPU or a laptop.

    python train/finetune_llama.py --layers 1                     bundled model and data, offline
    python train/finetune_llama.py --checkpoint llama-2-7b/ --data alpaca_data.json
    python train/finetune_llama.py --layers 1 --attention explicit    to step into the softmax
"""

from llama import FAMILY
from minillm import finetune
from minillm.cli import Parser, settings_of
from minillm.errors import friendly_errors
from minillm.flags import add_flags, parse
from minillm.job import Options
from minillm.losses import token_loss
from minillm.training import train

LR = 1e-5  # the course's


def parse_args(argv=None):
    parser = Parser(__doc__)
    add_flags(parser, targets=",".join(FAMILY.targets), lr=LR)
    return parse(parser, argv, LR)


def main(argv=None) -> tuple[float, float] | None:
    args = parse_args(argv)
    options = Options.from_flags(vars(args))
    job, held_out = finetune.prepare(FAMILY, options)
    run = finetune.begin(job, token_loss, options.run, "finetune-llama", settings_of(args))
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

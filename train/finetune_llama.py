"""Fine-tunes a LLaMA on instructions: one raw loop, LoRA on wq and wv, on one GPU or a laptop.

    python train/finetune_llama.py --layers 1                     bundled model and data, offline
    python train/finetune_llama.py --checkpoint llama-2-7b/ --data alpaca_data.json
    python train/finetune_llama.py --layers 1 --attention explicit    to step into the softmax
"""

from llama import FAMILY
from minillm import finetune
from minillm.adapt.methods import MethodOptions
from minillm.cli import Parser, pick, settings_of
from minillm.errors import friendly_errors
from minillm.flags import add_flags, parse
from minillm.job import BaseOptions, DataOptions, RunOptions
from minillm.losses import token_loss
from minillm.training import TrainSettings, train

LR = 1e-5  # the course's


def parse_args(argv=None):
    parser = Parser(__doc__)
    add_flags(parser, targets=",".join(FAMILY.targets), lr=LR)
    return parse(parser, argv, LR)


def main(argv=None) -> tuple[float, float] | None:
    args = parse_args(argv)
    flags = vars(args)
    job, held_out = finetune.prepare(
        FAMILY, pick(BaseOptions, flags), MethodOptions.from_flags(flags),
        pick(DataOptions, flags), args.accumulation_steps,
    )  # fmt: skip
    run = finetune.begin(
        job, token_loss, pick(RunOptions, flags), "finetune-llama", settings_of(args)
    )
    if run is None:  # --dry-run
        return None
    settings = TrainSettings.from_flags(flags)
    progress, optimizer = train(
        job.model, token_loss, job.batches, held_out, settings, job.base.precision, run
    )
    finetune.finish(job, run, progress, optimizer, args.keep_last)
    return progress.before, progress.best


if __name__ == "__main__":
    with friendly_errors():
        main()

"""Fine-tunes a LLaMA on instructions: one raw loop, LoRA on wq and wv, on one GPU or a laptop.

    python train/finetune_llama.py --layers 1                     bundled model and data, offline
    python train/finetune_llama.py --checkpoint llama-2-7b/ --data alpaca_data.json
    python train/finetune_llama.py --layers 1 --attention explicit    to step into the softmax
"""

from llama import FAMILY
from minillm import finetune
from minillm.adapt.methods import MethodOptions, adapt
from minillm.cli import Parser, pick, settings_of
from minillm.errors import friendly_errors
from minillm.finetune import BaseOptions, DataOptions, RunOptions
from minillm.flags import add_flags, parse
from minillm.job import Job
from minillm.losses import token_loss
from minillm.memory import peak_mib, reset_peak
from minillm.report import conclude
from minillm.training import TrainSettings, train

LR = 1e-5  # the course's


def parse_args(argv=None):
    parser = Parser(__doc__)
    add_flags(parser, targets=",".join(FAMILY.targets), lr=LR)
    return parse(parser, argv, LR)


def main(argv=None) -> tuple[float, float] | None:
    args = parse_args(argv)
    flags = vars(args)
    base = finetune.load(FAMILY, pick(BaseOptions, flags))
    method = MethodOptions.from_flags(flags)
    model, about = adapt(base.model, base.tokenizer, args.method, method)
    context = model.config.max_seq_len
    options = pick(DataOptions, flags)
    data = finetune.prepare_data(options, base.tokenizer, context)
    batches, held_out = finetune.make_batches(data, options, base.tokenizer.pad_id, context)
    settings = TrainSettings.from_flags(flags)
    job = Job(base, model, args.method, about, data, batches, args.accumulation_steps)
    run = finetune.begin(
        job, token_loss, pick(RunOptions, flags), "finetune-llama", settings_of(args)
    )
    if run is None:  # --dry-run
        return None
    reset_peak(base.precision.device)
    progress, optimizer = train(model, token_loss, batches, held_out, settings, base.precision, run)
    peak = peak_mib(base.precision.device) - base.held_before
    finetune.keep(job, run, progress, args.keep_last)
    conclude(job, run, progress, optimizer, peak)
    return progress.before, progress.best


if __name__ == "__main__":
    with friendly_errors():
        main()

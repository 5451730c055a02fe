"""Fine-tunes Phi-1.5, as for completions of Shakespeare: LoRA on q_proj and v_proj, or all of it.

    python train/finetune_phi.py --config train/tiny_phi.json    bundled model and data, offline
    python train/finetune_phi.py --checkpoint phi-1.5 --data shakespeare.txt
    python train/finetune_phi.py --checkpoint phi-1.5 --data shakespeare.txt --rank 0 --lr 1e-5
    python train/finetune_phi.py --init phi-1.5 --layers 1 --tokenizer checkpoints/phi-1.5

phi-1.5 is the official model (tools/download.py phi-1.5, or a path to its folder). Sources: Li et
al. 2023 (Phi-1.5); Hu et al. 2021 (LoRA).
"""

from minillm import finetune
from minillm.cli import Parser, settings_of
from minillm.errors import friendly_errors
from minillm.flags import add_flags, parse
from minillm.job import Options
from minillm.losses import token_loss
from minillm.training import train
from phi import FAMILY

LR = 2e-4


def parse_args(argv=None):
    parser = Parser(__doc__)
    add_flags(parser, targets=",".join(FAMILY.targets), lr=LR)
    parser.set_defaults(task="shakespeare", samples=5000)
    return parse(parser, argv, LR)


def main(argv=None) -> tuple[float, float] | None:
    args = parse_args(argv)
    options = Options.from_flags(vars(args))
    job, held_out = finetune.prepare(FAMILY, options)
    run = finetune.begin(job, token_loss, options.run, "finetune-phi", settings_of(args))
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

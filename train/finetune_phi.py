"""Fine-tunes Phi-1.5, as for completions of Shakespeare: LoRA on q_proj and v_proj, or all of it.

    python train/finetune_phi.py --config train/tiny_phi.json    bundled model and data, offline
    python train/finetune_phi.py --checkpoint phi-1.5 --data shakespeare.txt
    python train/finetune_phi.py --checkpoint phi-1.5 --data shakespeare.txt --rank 0 --lr 1e-5
    python train/finetune_phi.py --init phi-1.5 --layers 1 --tokenizer checkpoints/phi-1.5

phi-1.5 is the official model (tools/download.py phi-1.5, or a path to its folder). Sources: Li et
al. 2023 (Phi-1.5); Hu et al. 2021 (LoRA).
"""

from pathlib import Path

import torch

from minillm import finetune
from minillm.adapt.methods import MethodOptions, adapt
from minillm.attention import choose_attention
from minillm.cli import Parser, settings_of
from minillm.data.batches import Batches
from minillm.errors import friendly_errors
from minillm.fingerprint import fingerprint
from minillm.flags import add_flags, parse
from minillm.losses import token_loss
from minillm.memory import peak_mib, reset_peak
from minillm.precision import choose_device, choose_precision
from minillm.preflight import preflight
from minillm.runs import Run, fresh_folder
from minillm.training import TrainSettings, train
from phi import FAMILY

LR = 2e-4


def parse_args(argv=None):
    parser = Parser(__doc__)
    add_flags(parser, targets=",".join(FAMILY.targets), lr=LR)
    parser.set_defaults(task="shakespeare", samples=5000)
    return parse(parser, argv, LR)


def main(argv=None) -> tuple[float, float] | None:
    args = parse_args(argv)
    device = choose_device(args.device)
    precision = choose_precision(args.precision, device)
    dtype = finetune.frozen_dtype(args.frozen_dtype, args.method, precision.dtype)
    baseline = reset_peak(device)
    torch.manual_seed(args.seed)
    model, tokenizer, base = finetune.load_base(
        FAMILY, args.checkpoint, args.init, args.layers, args.tokenizer, dtype, device
    )
    model.attention = choose_attention(
        args.attention, precision.dtype, device, args.max_length, model.config.head_dim
    )
    model.gradient_checkpointing = args.gradient_checkpointing
    options = MethodOptions.from_flags(vars(args))
    model, method = adapt(model, tokenizer, args.method, options)
    context = model.config.max_seq_len
    data = finetune.prepare_data(
        args.task, args.data, args.template, tokenizer, args.samples, args.held_out,
        min(args.max_length, context), args.skip_bad,
    )  # fmt: skip
    settings = TrainSettings.from_flags(vars(args))
    batches = Batches(
        data.train.rows, args.batch_size, tokenizer.pad_id, args.seed, context, args.pack
    )
    held_out = list(Batches(
        data.held_out.rows, args.batch_size, tokenizer.pad_id, None, context, args.pack
    ))  # fmt: skip
    folder = Path(args.out_dir) if args.out_dir else fresh_folder("runs", "finetune-phi")
    finetune.announce(model, base, precision, method, data, batches, args.accumulation_steps)
    preflight(
        model, token_loss, batches, data.held_out.rows, tokenizer.eos_id, precision,
        args.accumulation_steps, folder,
    )  # fmt: skip
    if args.dry_run:
        return None
    identity = {"model": fingerprint(model)["bfloat16"], "data": data.hash()}
    run = Run(
        folder, settings_of(args), args.resume, args.overwrite, args.wandb_project, identity,
        args.override,
    )  # fmt: skip
    finetune.show_answers(model, tokenizer, data, "before")
    reset_peak(device)
    progress, optimizer = train(model, token_loss, batches, held_out, settings, precision, run)
    peak = peak_mib(device) - baseline
    finetune.keep(
        model, tokenizer, FAMILY, progress, run, args.method, base, data.template, args.keep_last
    )
    finetune.show_answers(model, tokenizer, data, "after")
    memory = finetune.account(
        model, optimizer, batches, precision, args.accumulation_steps, peak
    )
    finetune.conclude(model, memory, progress, data, run, method)
    return progress.before, progress.best


if __name__ == "__main__":
    with friendly_errors():
        main()

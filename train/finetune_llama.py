"""Fine-tunes a LLaMA on instructions: one raw loop, LoRA on wq and wv, on one GPU or a laptop.

    python train/finetune_llama.py --layers 1                     bundled model and data, offline
    python train/finetune_llama.py --checkpoint llama-2-7b/ --data alpaca_data.json
    python train/finetune_llama.py --layers 1 --attention explicit    to step into the softmax
"""

from dataclasses import replace
from pathlib import Path

import torch

from llama import Llama, LlamaConfig, LlamaTokenizer, load_llama, save_llama
from llama.checkpoint import check_tokenizer
from minillm import finetune
from minillm.cli import Parser, settings_of
from minillm.data.batches import Batches
from minillm.data.templates import find_template
from minillm.errors import UserError, friendly_errors
from minillm.losses import token_loss
from minillm.memory import peak_mib, reset_peak
from minillm.peft_format import save_adapter
from minillm.plots import plot_run
from minillm.precision import choose_device, choose_precision
from minillm.runs import Run, fresh_folder
from minillm.training import TrainSettings, train
from minillm.weights import empty_model, materialize

TINY = Path(__file__).parent.parent / "checkpoints" / "tiny-llama"


def parse_args(argv=None):
    parser = Parser(__doc__)
    finetune.add_flags(parser, targets="wq,wv")
    return parser.parse_args(argv)


def load_model(checkpoint, preset, layers, tokenizer, dtype, device):
    """The model and tokenizer that the flags ask for, and a name for the base."""
    if preset is None:
        path = checkpoint or TINY
        return *load_llama(path, layers, dtype, device, tokenizer), str(path)
    if checkpoint is not None:
        raise UserError("--init and --checkpoint contradict each other; give one of them")
    config = LlamaConfig.preset(preset)
    if layers is not None and layers > config.n_layers:
        raise UserError(f"--layers {layers}: {preset} has {config.n_layers} layers; lower it")
    if tokenizer is None:
        raise UserError("--init: random weights come without a tokenizer; add --tokenizer FILE")
    text = LlamaTokenizer(tokenizer)
    check_tokenizer(text, config, tokenizer)
    config = replace(config, n_layers=layers or config.n_layers)
    model = empty_model(lambda: Llama(config))
    return materialize(model, dtype, device), text, f"{preset} (random weights)"


def main(argv=None) -> tuple[float, float]:
    args = parse_args(argv)
    device = choose_device(args.device)
    precision = choose_precision(args.precision, device)
    dtype = finetune.frozen_dtype(args.frozen_dtype, args.method, precision.dtype)
    baseline = reset_peak(device)
    torch.manual_seed(args.seed)
    model, tokenizer, base = load_model(
        args.checkpoint, args.init, args.layers, args.tokenizer, dtype, device
    )
    model.attention = args.attention
    model.gradient_checkpointing = args.gradient_checkpointing
    template = find_template(args.template)
    max_length = min(args.max_length, model.config.max_seq_len)
    data = finetune.prepare_data(
        args.data, template, tokenizer, args.samples, args.held_out, max_length
    )
    method = finetune.adapt(
        model, args.method, args.targets, args.rank, args.alpha, args.lora_dropout
    )
    settings = TrainSettings(
        lr=args.lr, schedule=args.schedule, warmup=args.warmup, epochs=args.epochs,
        max_iters=args.max_iters, accumulation_steps=args.accumulation_steps,
        grad_clip=args.grad_clip, weight_decay=args.weight_decay,
        eval_every=args.eval_every, patience=args.patience,
    )  # fmt: skip
    pad_id, context = tokenizer.pad_id, model.config.max_seq_len
    batches = Batches(data.train.rows, args.batch_size, pad_id, args.seed, context)
    held_out = Batches(data.held_out.rows, finetune.EVAL_BATCH, pad_id, None, context)
    folder = Path(args.out_dir) if args.out_dir else fresh_folder("runs", "finetune-llama")
    run = Run(folder, settings_of(args), args.resume, args.overwrite)

    finetune.announce(model, base, precision, method, data, batches, args.accumulation_steps)
    finetune.show_sample(model, tokenizer, data.shown, "before")
    progress, optimizer = train(model, token_loss, batches, held_out, settings, precision, run)
    peak = peak_mib(device) - baseline
    finetune.keep_best(model, progress, run)
    finetune.show_sample(model, tokenizer, data.shown, "after")
    if args.method == "full":
        save_llama(model, tokenizer, folder / "model")
    else:
        save_adapter(model, folder / "adapter", base, template.to_dict())
    plot_run(run.rows(), folder / "loss.png")
    print(f"kept in {folder}")
    finetune.conclude(model, optimizer, progress, peak)
    return progress.before, progress.best


if __name__ == "__main__":
    with friendly_errors():
        main()

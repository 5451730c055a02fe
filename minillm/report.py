"""What a fine-tuning shows: what is about to run, answers, memory by category, the outcome."""

import sys
from dataclasses import replace

import torch

from minillm.data.samples import shorten
from minillm.files import read_json, write_json
from minillm.flops import training_flops
from minillm.generate import generate
from minillm.job import Job
from minillm.memory import MIB, reserved_mib
from minillm.metrics import classification_report, describe
from minillm.predict import predict_labels
from minillm.progress import Progress, TrainSettings
from minillm.runs import Run

SHOWN_TOKENS = 60  # of an answer


def announce(job: Job) -> None:
    """Prints what is about to run: model, method, data on both sides, the optimizer step."""
    model, data, batches = job.model, job.data, job.batches
    dtypes = {str(p.dtype).removeprefix("torch.") for p in model.parameters()}
    settings = job.training
    steps = batches.groups_per_epoch(settings.accumulation_steps)
    supervised = sum(row.n_labels for row in data.train.rows)
    precision = job.base.precision
    stored = " and ".join(sorted(dtypes))
    print(f"   model: {job.base.name}, {model.config.n_layers} layers in {stored}; "
          f"{precision.name} products on {precision.device}")  # fmt: skip
    print(f"  method: {job.about}")
    print(f"   train: {data.train.summary()}\nheld out: {data.held_out.summary()}")
    n = min(settings.accumulation_steps, len(batches))
    size = min(batches.batch_size, len(batches.rows))
    cut = f"{n} forwards of {size}" if n > 1 else f"a forward of {size}"
    cut = f"forwards of up to {batches.packed} tokens" if batches.packed else cut
    n_rows = min(settings.accumulation_steps * batches.batch_size, len(batches.rows))
    print(f"    step: {n_rows} {data.train.unit} in {cut}, on average {supervised / steps:.0f} "
          f"supervised tokens; {steps} steps an epoch, {job.n_steps} in all")  # fmt: skip
    print(f"  prompt: {data.shown.prompt!r}\nexpected: {data.shown.response!r}", flush=True)
    warn_of_length(settings, job.n_steps, steps)


def warn_of_length(settings: TrainSettings, n_steps: int, per_epoch: int) -> None:
    """Tells what of the settings does not fit into a run of so many steps."""
    if (settings.max_iters or 0) > n_steps:
        print(f"warning: --max-iters {settings.max_iters}: --epochs {settings.epochs} ends the run "
              f"at step {n_steps}; raise it to go on", file=sys.stderr)  # fmt: skip
    if settings.warmup >= max(2, n_steps):
        print(f"warning: --warmup {settings.warmup}: all {n_steps} steps of the run are warm-up; "
              "lower it", file=sys.stderr)  # fmt: skip
    every = settings.eval_every or per_epoch
    if settings.patience and settings.patience * every >= n_steps:
        print(f"warning: --patience {settings.patience}: evaluated every {every} steps, a run of "
              f"{n_steps} has no more evaluations than that; lower --eval-every",
              file=sys.stderr)  # fmt: skip


def show_answers(job: Job, title: str) -> None:
    """Prints what the model answers, greedily, to one held-out prompt, and where the answer is one
    of a few labels, its accuracy on all held-out samples."""
    model, tokenizer, data = job.model, job.base.tokenizer, job.data
    sample = shorten(data.shown, tokenizer, model.config.max_seq_len - SHOWN_TOKENS)
    tokens = tokenizer.encode(sample.prompt, bos=True)
    (new,) = generate(model, [tokens], SHOWN_TOKENS, eos_id=tokenizer.eos_id)
    print(f"{title:>8}: {tokenizer.decode(new).strip()!r}", flush=True)
    if data.labels:
        answers = predict_labels(model, tokenizer, data.samples, data.labels)
        truth = [sample.label for sample in data.samples]
        report = classification_report([a.label for a in answers], truth, data.labels)
        print(f"{'':>8}  held-out {describe(report)}", flush=True)


def account(job: Job, optimizer: torch.optim.Optimizer, peak: float) -> dict:
    """Where the memory of training went, in MiB: predicted and measured by category, for the
    largest micro-batch of an epoch, and `peak`, the process's own (beyond Python's libraries).
    The KV cache is that of a generation with as many columns; no part of training's total."""
    from minillm.footprint import measure_footprint  # takes 0.7 s: not for --help

    n, precision = job.training.accumulation_steps, job.base.precision
    reserved = reserved_mib(precision.device)
    batch = job.batches.largest(n)
    measured = measure_footprint(job.model, batch, precision, n)
    states = [t for state in optimizer.state.values() for t in state.values()]
    measured = replace(measured, optimizer=sum(t.nbytes for t in states if torch.is_tensor(t)))
    return {
        "peak": peak, "reserved": reserved, "columns": batch.tokens.size(1) - 1,
        "predicted": {name: n / MIB for name, n in job.predicted.rows().items()},
        "measured": {name: n / MIB for name, n in measured.rows().items()},
        "activations of": {name: n / MIB for name, n in measured.by_place.items()},
        "KV cache": [job.predicted.cache / MIB, measured.cache / MIB],
    }  # fmt: skip


def show_memory(memory: dict) -> None:
    """Prints what `account` found."""
    print(f"{'memory, MiB':<26}{'predicted':>12}{'measured':>12}")
    for name, mib in memory["measured"].items():
        print(f"  {name:<24}{memory['predicted'][name]:12.1f}{mib:12.1f}")
    print(f"  {'growth of the process':<24}{'':12}{memory['peak']:12.1f}")
    if memory["reserved"] is not None:
        print(f"  {'reserved on the GPU':<24}{'':12}{memory['reserved']:12.1f}")
    predicted, measured = memory["KV cache"]
    print(f"  {'KV cache of ' + str(memory['columns']) + ' tokens':<24}{predicted:12.1f}"
          f"{measured:12.1f}")  # fmt: skip
    blocks = [f"{mib:.1f}" for name, mib in memory["activations of"].items() if "block" in name]
    if blocks:
        print(f"  activations of the blocks: {', '.join(blocks)}")


def conclude(
    job: Job, run: Run, progress: Progress, optimizer: torch.optim.Optimizer, peak: float
) -> None:
    """Measures and prints memory by category, then speed and losses; the same numbers and the
    method's own line go to summary.json."""
    memory, kept = account(job, optimizer, peak), run.folder / "summary.json"
    before = read_json(kept) if kept.exists() else {}
    if isinstance(before, dict) and before.get("steps") == progress.step:
        memory = before.get("memory_mib", memory)  # resumed after its end: nothing was trained here
    model, rows = job.model, job.data.train.rows
    n_rows = round(progress.tokens * len(rows) / sum(len(row.tokens) for row in rows))
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    write_json(kept, {
        "method": job.about, "trainable": trainable, "parameters": total,
        "added": total - job.base.size, "epochs": n_rows / len(rows), "steps": progress.step,
        "best_step": progress.best_step, "tokens": progress.tokens,
        "supervised_tokens": progress.supervised, "seconds": progress.seconds,
        "flops": training_flops(model, progress.tokens, progress.supervised, n_rows),
        "data": {"train": job.data.train.summary(), "held out": job.data.held_out.summary()},
        "held_out_before": progress.before, "held_out_best": progress.best, "memory_mib": memory,
    })  # fmt: skip
    show_memory(memory)
    speed = progress.tokens / max(progress.seconds, 1e-9)
    print(f"{progress.step} steps, {progress.tokens} tokens in {progress.seconds:.1f} s: "
          f"{speed:.0f} tokens/s")  # fmt: skip
    if progress.step < job.n_steps:
        print(f"ended by --patience: {progress.evaluations_since_best} evaluations without a new "
              f"best; all would have been {job.n_steps} steps")  # fmt: skip
    print(f"held-out loss {progress.before:.4f} -> {progress.best:.4f}")
    if progress.best > progress.before:
        print("warning: held-out loss is higher than before training; lower --lr", file=sys.stderr)

"""The steps that every fine-tuning script shares, whatever its model: base, data, adaptation,
answers before and after, the report, and what is left on disk. Their flags are in flags.py."""

import hashlib
import sys
from dataclasses import dataclass, replace

import torch
from torch import nn

from minillm.adapt.methods import METHODS
from minillm.checkpoint import check_tokenizer, empty_model, materialize
from minillm.data.batches import Batches, Encoded, encode_samples
from minillm.data.samples import Sample, shorten
from minillm.data.tasks import TASKS
from minillm.data.templates import Template, find_template
from minillm.errors import UserError
from minillm.family import Family
from minillm.files import read_json, write_json
from minillm.flops import training_flops
from minillm.generate import generate
from minillm.hub import find_checkpoint
from minillm.losses import IGNORED
from minillm.memory import MIB, reserved_mib
from minillm.metrics import classification_report, describe
from minillm.peft_format import save_adapter
from minillm.plots import plot_run
from minillm.precision import DTYPES, Precision
from minillm.predict import predict_labels
from minillm.progress import Progress, load_trainable
from minillm.runs import Run

SHOWN_TOKENS = 60  # of an answer


def load_base(
    family: Family, checkpoint: str | None, preset: str | None, layers: int | None,
    tokenizer: str | None, dtype: torch.dtype, device: torch.device,
):  # fmt: skip
    """The model and tokenizer that the flags ask for, and a name for the base."""
    if preset is None:
        path = find_checkpoint(checkpoint or family.bundled)
        return *family.load(path, layers, dtype, device, tokenizer), str(path)
    if checkpoint is not None:
        raise UserError("--init and --checkpoint contradict each other; give one of them")
    config = family.config.preset(preset)
    if layers is not None and layers > config.n_layers:
        raise UserError(f"--layers {layers}: {preset} has {config.n_layers} layers; lower it")
    if tokenizer is None:
        raise UserError("--init: random weights come without a tokenizer; add --tokenizer FILE")
    text = family.tokenizer(tokenizer)
    check_tokenizer(text, config.vocab_size, tokenizer)
    config = replace(config, n_layers=layers or config.n_layers)
    model = empty_model(lambda: family.model(config))
    return materialize(model, dtype, device), text, f"{preset} (random weights)"


@dataclass(frozen=True)
class Data:
    """Encoded training and held-out samples, the latter also as text, and what they are of."""

    train: Encoded
    held_out: Encoded
    samples: list[Sample]  # the held-out ones
    labels: tuple[str, ...]
    template: Template

    @property
    def shown(self) -> Sample:
        """One held-out sample to look at."""
        return min(self.samples, key=lambda sample: len(sample.prompt))

    def hash(self) -> str:
        """Of every token and label on both sides."""
        digest = hashlib.sha256()
        for row in (*self.train.rows, *self.held_out.rows):
            digest.update(torch.stack((row.tokens, row.labels)).numpy().tobytes())
        return digest.hexdigest()


def prepare_data(
    task: str, path: str | None, template: str | None, tokenizer, n_train: int, n_held_out: int,
    max_length: int, skip_bad: bool = False,
) -> Data:  # fmt: skip
    """Reads a task's data (or makes tinyworld's) and encodes the first so many of each side.
    `skip_bad` leaves out broken rows, and says how many.

    Errors: UserError naming the file for anything wrong in it, or if no sample is left.
    """
    kind = TASKS[task]
    found = find_template(template or kind.template, kind.field)
    splits = kind.splits(path, found, n_train, n_held_out, skip_bad)
    sides = splits.train[:n_train], splits.validation[:n_held_out]
    if not all(sides):
        raise UserError(f"{path or 'tinyworld'}: a split without samples; give more of them")
    encoded = [encode_samples(side, tokenizer, max_length) for side in sides]
    for side in encoded:
        if not side.rows:
            raise UserError(
                f"{path or 'tinyworld'}: every prompt is longer than --max-length {max_length} (at "
                "most the context without its --virtual-tokens); raise it"
            )
    return Data(*encoded, sides[1], kind.labels, found)


def show_sample(model: nn.Module, tokenizer, sample: Sample, title: str) -> None:
    """Prints what the model answers, greedily, to one held-out prompt."""
    sample = shorten(sample, tokenizer, model.config.max_seq_len - SHOWN_TOKENS)
    tokens = tokenizer.encode(sample.prompt, bos=True)
    (new,) = generate(model, [tokens], SHOWN_TOKENS, eos_id=tokenizer.eos_id)
    print(f"{title:>8}: {tokenizer.decode(new).strip()!r}", flush=True)


def announce(
    model: nn.Module, base: str, precision: Precision, method: str, data: Data,
    batches: Batches, accumulation_steps: int,
) -> None:  # fmt: skip
    """Prints what is about to run: model, method, data on both sides, the optimizer step."""
    dtypes = {str(p.dtype).removeprefix("torch.") for p in model.parameters()}
    steps = batches.groups_per_epoch(accumulation_steps)
    supervised = sum(int((row.labels != IGNORED).sum()) for row in data.train.rows)
    print(f"   model: {base}, {model.config.n_layers} layers in {' and '.join(sorted(dtypes))}; "
          f"{precision.name} products on {precision.device}")  # fmt: skip
    print(f"  method: {method}")
    print(f"   train: {data.train.summary()}\nheld out: {data.held_out.summary()}")
    packed = f", packed into forwards of up to {batches.packed} tokens" if batches.packed else ""
    print(f"    step: {accumulation_steps} x {batches.batch_size} samples{packed}, on average "
          f"{supervised / steps:.0f} supervised tokens; {steps} steps an epoch")  # fmt: skip
    print(f"  prompt: {data.shown.prompt!r}\nexpected: {data.shown.response!r}", flush=True)


def show_answers(model: nn.Module, tokenizer, data: Data, title: str) -> None:
    """Prints what the model answers, greedily, to one held-out prompt, and where the answer is one
    of a few labels, its accuracy on all held-out samples."""
    show_sample(model, tokenizer, data.shown, title)
    if data.labels:
        answers = predict_labels(model, tokenizer, data.samples, data.labels)
        truth = [sample.label for sample in data.samples]
        report = classification_report([a.label for a in answers], truth, data.labels)
        print(f"{'':>8}  held-out {describe(report)}", flush=True)


def account(
    model: nn.Module, optimizer: torch.optim.Optimizer, batches: Batches, precision: Precision,
    accumulation_steps: int, peak: float,
) -> dict:  # fmt: skip
    """Where the memory of training went, in MiB: predicted and measured by category, for the
    largest micro-batch of an epoch, and `peak`, the process's own (beyond Python's libraries).
    The KV cache is that of a generation with as many columns; no part of training's total."""
    from minillm.footprint import measure_footprint, predict_footprint  # 0.7 s: not before the loop

    n, reserved = accumulation_steps, reserved_mib(precision.device)
    batch = batches.largest(n)
    predicted = predict_footprint(model, batch, precision, n)
    measured = measure_footprint(model, batch, precision, n)
    states = [t for state in optimizer.state.values() for t in state.values()]
    measured = replace(measured, optimizer=sum(t.nbytes for t in states if torch.is_tensor(t)))
    return {
        "peak": peak, "reserved": reserved, "columns": batch.tokens.size(1) - 1,
        "predicted": {name: n / MIB for name, n in predicted.rows().items()},
        "measured": {name: n / MIB for name, n in measured.rows().items()},
        "activations of": {name: n / MIB for name, n in measured.by_place.items()},
        "KV cache": [predicted.cache / MIB, measured.cache / MIB],
    }  # fmt: skip


def show_memory(memory: dict) -> None:
    """Prints what `account` found."""
    print(f"{'memory, MiB':<26}{'predicted':>12}{'measured':>12}")
    for name, mib in memory["measured"].items():
        print(f"  {name:<24}{memory['predicted'][name]:12.1f}{mib:12.1f}")
    print(f"  {'peak of the process':<24}{'':12}{memory['peak']:12.1f}")
    if memory["reserved"] is not None:
        print(f"  {'reserved on the GPU':<24}{'':12}{memory['reserved']:12.1f}")
    predicted, measured = memory["KV cache"]
    print(f"  {'KV cache of ' + str(memory['columns']) + ' columns':<24}{predicted:12.1f}"
          f"{measured:12.1f}")  # fmt: skip
    blocks = [f"{mib:.1f}" for name, mib in memory["activations of"].items() if "block" in name]
    print(f"  activations of the blocks: {', '.join(blocks)}")


def conclude(
    model: nn.Module, memory: dict, progress: Progress, data: Data, run: Run, method: str
) -> None:
    """Prints memory by category, speed and losses; the same numbers and the method's own line go
    to summary.json."""
    kept = run.folder / "summary.json"
    before = read_json(kept) if kept.exists() else {}
    if isinstance(before, dict) and before.get("steps") == progress.step:
        memory = before.get("memory_mib", memory)  # resumed after its end: nothing was trained here
    rows = data.train.rows
    n_rows = round(progress.tokens * len(rows) / sum(len(row.tokens) for row in rows))
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    write_json(kept, {
        "method": method, "trainable": trainable,
        "parameters": sum(p.numel() for p in model.parameters()), "steps": progress.step,
        "best_step": progress.best_step, "tokens": progress.tokens,
        "supervised_tokens": progress.supervised, "seconds": progress.seconds,
        "flops": training_flops(model, progress.tokens, progress.supervised, n_rows),
        "held_out_before": progress.before, "held_out_best": progress.best, "memory_mib": memory,
    })  # fmt: skip
    show_memory(memory)
    speed = progress.tokens / max(progress.seconds, 1e-9)
    print(f"{progress.step} steps, {progress.tokens} tokens in {progress.seconds:.1f} s: "
          f"{speed:.0f} tokens/s")  # fmt: skip
    print(f"held-out loss {progress.before:.4f} -> {progress.best:.4f}")


def keep(
    model: nn.Module, tokenizer, family: Family, progress: Progress, run: Run, method: str,
    base: str, template: Template, keep_last: bool,
) -> None:  # fmt: skip
    """Saves the weights with the lowest held-out loss as adapter/ (or model/), which are then the
    model's, the last ones as adapter_last/ if asked, and the picture."""

    def save(suffix: str = "") -> None:
        if method == "full":
            folder = run.folder / f"model{suffix}"
            family.save(model, tokenizer, folder)
            write_json(folder / "template.json", template.to_dict())
        else:
            folder = run.folder / f"adapter{suffix}"
            save_adapter(model, folder, base, template.to_dict(), method)

    if keep_last:
        save("_last")
    if progress.best_step != progress.step:
        try:
            load_trainable(model, run.load_best())
            which = f"step {progress.best_step} of {progress.step}"
            print(f"keeping {which}, the best on held-out data")
        except UserError as error:  # at the end of a run, the last step is better than nothing
            print(f"warning: {error}; keeping the last step instead", file=sys.stderr)
    save()
    plot_run(run.rows(), run.folder / "loss.png")
    print(f"kept in {run.folder}")


def frozen_dtype(name: str, method: str, compute: torch.dtype) -> torch.dtype:
    """How the base is stored: what is trained in fp32 always, frozen weights as asked or computed.

    Errors: UserError for a dtype that the method or the precision does not go with.
    """
    if METHODS[method].in_place:
        if name not in ("auto", "fp32"):
            raise UserError(f"--frozen-dtype {name}: {method} trains the base's own tensors, which "
                            "are kept in fp32; leave it out")  # fmt: skip
        return torch.float32
    frozen = compute if name == "auto" else DTYPES[name]
    if frozen != compute and torch.float32 not in (frozen, compute):
        raise UserError(f"--frozen-dtype {name}: two 16-bit kinds do not mix; use that of "
                        "--precision, or fp32")  # fmt: skip
    return frozen

"""The steps that every fine-tuning script shares, whatever its model: base, data, the checks and
the folder of a run, what is left on disk. What they show is in report.py, their flags in flags.py.
"""

import contextlib
import io
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from minillm.adapt.methods import METHODS, adapt
from minillm.checkpoint import check_text, check_tokenizer, empty_model, materialize
from minillm.config import with_layers
from minillm.data.batches import Batches, Encoded, encode_samples
from minillm.data.tasks import TASKS
from minillm.data.templates import find_template
from minillm.errors import UserError
from minillm.family import Family
from minillm.files import write_json
from minillm.fingerprint import fingerprint
from minillm.hub import find_checkpoint
from minillm.job import Base, BaseOptions, Data, DataOptions, Job, Options, RunOptions
from minillm.memory import check_fits, peak_mib, reset_peak
from minillm.peft_format import save_adapter
from minillm.plots import plot_run
from minillm.precision import DTYPES, choose_device, choose_precision
from minillm.preflight import preflight
from minillm.progress import Progress, load_trainable
from minillm.report import announce, conclude, show_answers
from minillm.runs import Run, check_settings, fresh_folder
from minillm.training import LossFn


def load(family: Family, options: BaseOptions) -> Base:
    """The base that the options ask for; all that starts at random is seeded here.

    Errors: UserError for options that contradict each other or the checkpoint.
    """
    device = choose_device(options.device)
    precision = choose_precision(options.precision, device)
    dtype = frozen_dtype(options.frozen_dtype, options.method, precision.dtype)
    if precision.name == "fp32" and dtype != torch.float32:
        precision = choose_precision(options.frozen_dtype, device)
        asked = ", whatever --precision says" if options.precision == "fp32" else ""
        print(f"warning: --frozen-dtype {precision.name}: such weights are multiplied in "
              f"{precision.name}{asked}", file=sys.stderr)  # fmt: skip
    before = reset_peak(device)
    where = options.checkpoint, options.init, options.layers, options.tokenizer, dtype
    if options.method == "full":
        check_full(family, *where, device)
    torch.manual_seed(options.seed)
    model, tokenizer, name = load_base(family, *where, device)
    model.attention = options.attention
    model.gradient_checkpointing = options.gradient_checkpointing
    check_text(tokenizer, model.config.vocab_size, name)
    size = sum(p.numel() for p in model.parameters())
    return Base(family, model, tokenizer, name, precision, before, size)


def check_full(family: Family, *where) -> None:
    """Errors: UserError if weights that all are trained do not fit with what that takes, four times
    as much: before any is read. `where` are load_base's arguments."""
    *of_model, device = where
    with contextlib.redirect_stderr(io.StringIO()):  # its warnings come with the weights
        model, _, name = load_base(family, *of_model, torch.device("meta"))
    n_bytes = 16 * sum(p.numel() for p in model.parameters())
    what = f"{name}: weights, gradients and AdamW's two moments in fp32"
    check_fits(what, n_bytes, device, "train less of it (--method lora)")


def load_base(
    family: Family, checkpoint: str | None, preset: str | None, layers: int | None,
    tokenizer: str | None, dtype: torch.dtype, device: torch.device,
):  # fmt: skip
    """The model and tokenizer that the flags ask for, and a name for the base."""
    if preset is None:
        path = find_checkpoint(checkpoint or family.bundled)
        model, text = family.load(path, layers, dtype, device, tokenizer)
        return model, text, str(path)
    if checkpoint is not None:
        raise UserError("--init and --checkpoint contradict each other; give one of them")
    config = with_layers(family.config.preset(preset), layers, preset)
    if tokenizer is None:
        raise UserError("--init: random weights come without a tokenizer; add --tokenizer FILE")
    text = family.tokenizer(tokenizer)
    check_tokenizer(text, config.vocab_size, tokenizer)
    model = empty_model(lambda: family.model(config))
    return materialize(model, dtype, device), text, f"{preset} (random weights)"


def prepare(
    family: Family, options: Options, encode: Callable[..., Encoded] = encode_samples,
    kind: type[Batches] = Batches,
) -> tuple[Job, list]:  # fmt: skip
    """The base with the method on it and the data in batches of a `kind`, and the held-out batches.

    Errors: UserError for options that contradict each other, the checkpoint or the data.
    """
    base, data, name = load(family, options.base), options.data, options.base.method
    model, about = adapt(base.model, base.tokenizer, name, options.method)
    context, pad_id = model.config.max_seq_len, base.tokenizer.pad_id
    found = prepare_data(data, base.tokenizer, context, encode)
    size, pack = data.batch_size, data.pack
    batches = kind(found.train.rows, size, pad_id, data.seed, context, pack)
    held_out = list(kind(found.held_out.rows, size, pad_id, None, context, pack))  # in their order
    return Job(base, model, name, about, found, batches, options.training), held_out


def prepare_data(
    options: DataOptions, tokenizer, context: int, encode: Callable[..., Encoded] = encode_samples
) -> Data:
    """Reads a task's data (or makes tinyworld's) and encodes the first so many of each side, for a
    model of this context. `skip_bad` leaves out broken rows, and says how many.

    Errors: UserError naming the file for anything wrong in it, or if no sample is left.
    """
    kind, path = TASKS[options.task], options.data
    template = find_template(options.template or kind.template, kind.field)
    sizes = options.samples, options.held_out
    splits = kind.splits(path, template, *sizes, options.skip_bad, max(sizes))
    sides = splits.train[: options.samples], splits.validation[: options.held_out]
    if not all(sides):
        raise UserError(f"{path or 'tinyworld'}: a split without samples; give more of them")
    length = min(options.max_length, context)
    encoded = [encode(side, tokenizer, length) for side in sides]
    for side in encoded:
        if not side.rows:
            raise UserError(
                f"{path or 'tinyworld'}: no sample fits --max-length {length} (at most the context "
                "without its --virtual-tokens); raise it"
            )
    return Data(*encoded, sides[1], kind.labels, template)


def begin(
    job: Job, loss_fn: LossFn, options: RunOptions, name: str, settings: dict
) -> Run | None:
    """Tells what is about to run and checks that it can; then makes (or takes up) the run's folder,
    by default a fresh one of this name, and shows its first answers. None for a dry run, which ends
    before that. What is measured as training's peak of memory starts here.

    Errors: preflight's and Run's.
    """
    announce(job)
    preflight(job, loss_fn, None if options.no_save else Path(options.out_dir or "runs"))
    if options.dry_run:
        if options.resume:
            check_settings(Path(options.out_dir), settings, options.override)
        return None
    folder = Path(options.out_dir) if options.out_dir else fresh_folder("runs", name)
    base, precision = job.base.model, job.base.precision
    added = {name for name, p in base.named_parameters() if p.requires_grad}
    of_base = fingerprint(base, () if METHODS[job.method].in_place else added)
    run = Run(
        folder, settings, resume=options.resume, overwrite=options.overwrite,
        override=options.override, wandb_project=options.wandb_project,
        keeps_weights=not options.no_save,
        identity={"model": of_base, "data": job.data.hash()},
        made_with={"precision": precision.name, "device": precision.device.type},
    )  # fmt: skip
    show_answers(job, "before")
    reset_peak(precision.device)
    return run


def finish(
    job: Job, run: Run, progress: Progress, optimizer: torch.optim.Optimizer, keep_last: bool
) -> None:
    """Saves what was trained, shows the answers after, and tells memory, speed and losses."""
    peak = peak_mib(job.base.precision.device) - job.base.held_before
    keep(job, run, progress, keep_last)
    conclude(job, run, progress, optimizer, peak)


def keep(job: Job, run: Run, progress: Progress, keep_last: bool) -> None:
    """Saves the weights with the lowest held-out loss as adapter/ (or model/), which are then the
    model's, the last ones as adapter_last/ if asked, and the picture; shows the answers of each. Of
    a run that keeps no weights, the last step's."""
    if run.keeps_weights:
        keep_weights(job, run, progress, keep_last)
    per = job.batches.loss_per
    plot_run(run.rows(), run.folder / "loss.png", before=progress.before, per=per)
    print(f"kept in {run.folder}{'' if run.keeps_weights else ', without weights'}")
    if not run.keeps_weights and progress.best_step != progress.step:
        print(f"answers are those of step {progress.step}; the best was {progress.best_step}")
    show_answers(job, "after")


def keep_weights(job: Job, run: Run, progress: Progress, keep_last: bool) -> None:
    """Of `keep`, what is saved as adapter/ and adapter_last/ (or model/, model_last/)."""
    model, base = job.model, job.base

    def save(suffix: str = "") -> None:
        if job.method == "full":
            folder = run.folder / f"model{suffix}"
            base.family.save(model, base.tokenizer, folder)
            write_json(folder / "template.json", job.data.template.to_dict())
            write_json(folder / "minillm.json", {"settings": run.config})
        else:
            folder = run.folder / f"adapter{suffix}"
            save_adapter(
                model, folder, base.name, job.data.template.to_dict(), job.method,
                base.tokenizer, run.config,
            )  # fmt: skip

    earlier = [run.folder / f"{kind}_last" for kind in ("adapter", "model")]
    for folder in earlier if not keep_last else ():
        if folder.exists():
            print(f"warning: {folder}: of an earlier end of this run; --keep-last writes it anew",
                  file=sys.stderr)  # fmt: skip
    if keep_last:
        save("_last")
        show_answers(job, "last")
    if progress.best_step != progress.step:
        try:
            load_trainable(model, run.load_best(progress.best_step))
            which = f"step {progress.best_step} of {progress.step}"
            print(f"keeping {which}, the best on held-out data")
        except UserError as error:  # at the end of a run, the last step is better than nothing
            print(f"warning: {error}; keeping the last step instead", file=sys.stderr)
    save()


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

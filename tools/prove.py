"""Proves what the engine promises, on your own model.

    python tools/prove.py                                           the bundled tiny LLaMA
    python tools/prove.py --checkpoint gpt2-medium --layers 4
    python tools/prove.py --adapter runs/finetune-llama-001/adapter
    python tools/prove.py --only cache --only merged

Every promise is that two ways to compute the same thing agree. "Logic" is how far apart they are in
float64, where rounding is out of the way: what is left is a fault. "Rounding" is how far apart in
the dtype you work in (--precision). Both are the largest difference over the largest value. Without
--adapter the model gets LoRA with random numbers, so that every promise holds with LoRA too.
Ends with exit code 1 if one is broken.
"""

import contextlib
import io
import math
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from minillm import add_lora, mark_only_lora_as_trainable
from minillm.adapt.lora import lora_layers
from minillm.cli import Parser, add_model_flags, positive
from minillm.errors import NumericError, UserError, friendly_errors
from minillm.memory import MIB, free_mib
from minillm.peft_format import load_adapter, weights_of
from minillm.precision import DTYPES, choose_device, choose_precision
from minillm.weights import open_weights
from tools.models import family_of, find_model
from tools.promises import PROMISES, Promise, Subject

LOGIC = 1e-10
ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}


def parse_args(argv=None):
    parser = Parser(__doc__)
    add = add_model_flags(parser).add_argument
    add("--adapter", help="folder of what a fine-tuning kept, to put on top; it knows its base")
    add("--force", action="store_true", help="accept an adapter trained on another base")
    add("--precision", choices=["auto", *DTYPES],
        help="the dtype you work in (default: fp32 on a CPU, else auto)")  # fmt: skip
    about = "; ".join(f"{name}: {promise.about}" for name, promise in PROMISES.items())
    add = parser.add_argument
    add("--only", action="append", choices=[*PROMISES], help=f"one of them; {about}")
    add("--toggles", type=positive, default=1000, metavar="N",
        help="how often eval() and train() take turns")  # fmt: skip
    return parser.parse_args(argv)


@dataclass(frozen=True)
class Finding:
    """How far apart a promise's two sides are in float64 and in the working dtype, None where it
    was not measured; why it does not apply; whether it holds; seconds."""

    name: str
    logic: float | None
    rounding: float | None
    reason: str | None
    holds: bool
    seconds: float


def make_subject(
    checkpoint: Path, layers: int | None, tokenizer: str | None, adapter: str | None, force: bool,
    attention: str, dtype: torch.dtype, device: torch.device, toggles: int,
) -> Subject:  # fmt: skip
    """The model in one dtype with what is trained on top of it."""
    family = family_of(checkpoint)

    def base(path: Path = checkpoint) -> nn.Module:
        kept = layers if path == checkpoint else None
        plain = family.load(path, kept, dtype, device, tokenizer)[0]
        plain.attention = attention
        return plain

    model, text = family.load(checkpoint, layers, dtype, device, tokenizer)
    model.attention = attention
    if adapter is None:
        add_lora(model.train(), family.targets, rank=4, alpha=8, dropout=0.05)
        stream = torch.Generator().manual_seed(0)
        for layer in lora_layers(model).values():
            noise = torch.randn(layer.lora_B.shape, generator=stream) * 0.02
            layer.lora_B.data.copy_(noise)
        mark_only_lora_as_trainable(model)
    else:
        model = _with_adapter(model, Path(adapter), force)
    return Subject(model, base, family.save, text, checkpoint, layers, toggles)


def _with_adapter(model: nn.Module, folder: Path, force: bool) -> nn.Module:
    own = set(model.parameters())
    named = open_weights([weights_of(folder)])
    model = load_adapter(model, folder, force)
    wide = next(iter(own)).dtype
    for name, p in model.named_parameters():
        p.requires_grad = p not in own or name in named
        p.data = p.data.to(torch.promote_types(p.dtype, wide))  # float64 throughout, or as it was
    return model


def check_memory(checkpoint: Path, layers: int | None, tokenizer, device: torch.device) -> None:
    """Errors: UserError if the model in float64 does not fit."""
    model, _ = family_of(checkpoint).load(checkpoint, layers, torch.float32, "meta", tokenizer)
    needed = 8 * sum(p.numel() for p in model.parameters()) * 2 / MIB  # and a copy, or work
    if needed > (free := free_mib(device)) > 0:
        raise UserError(f"{checkpoint}: needs {needed:,.0f} MiB in float64, {free:,.0f} are free; "
                        "add --layers 1")  # fmt: skip


def prove(promises: dict[str, Promise], subject_in, dtype: torch.dtype) -> list[Finding]:
    """Measures each promise in float64, then in `dtype`; `subject_in(dtype)` makes the model."""
    errors, reasons, failed = {}, {}, {}
    seconds = dict.fromkeys(promises, 0.0)
    bar = tqdm(total=2 * len(promises), desc="prove", unit="promise", leave=False)
    for kind in (torch.float64, dtype):
        subject = subject_in(kind)
        for name, promise in promises.items():
            bar.update()
            bar.set_postfix_str(f"{name} in {str(kind).removeprefix('torch.')}")
            reasons[name] = promise.applies(subject)
            if reasons[name] or (kind == torch.float64 and not promise.in_float64):
                continue
            began = time.perf_counter()
            try:
                with contextlib.redirect_stderr(io.StringIO()):  # progress bars of its own
                    errors[name, kind] = promise.measure(subject)
            except (UserError, NumericError) as error:  # of what it makes itself: nobody's input
                errors[name, kind], failed[name] = math.inf, str(error)
            seconds[name] += time.perf_counter() - began
        del subject
    bar.close()
    findings = []
    for name, promise in promises.items():
        logic, rounding = errors.get((name, torch.float64)), errors.get((name, dtype))
        holds = (logic or 0.0) <= LOGIC and (rounding or 0.0) <= (
            0.0 if promise.exact else ROUNDING[dtype]
        )
        reason = failed.get(name, reasons[name])
        findings.append(Finding(name, logic, rounding, reason, holds, seconds[name]))
    return findings


def show(findings: list[Finding], dtype: str) -> None:
    """Prints the table and the verdict."""
    print(f"{'promise':<14}{'logic, float64':>16}{'rounding, ' + dtype:>20}{'seconds':>9}  verdict")
    for f in findings:
        logic, rounding = ("-" if x is None else f"{x:.1e}" for x in (f.logic, f.rounding))
        verdict = "BROKEN" if not f.holds else "skipped" if f.reason else "holds"
        about = PROMISES[f.name].about + (f" ({f.reason})" if f.reason else "")
        print(f"{f.name:<14}{logic:>16}{rounding:>20}{f.seconds:9.1f}  {verdict:<8} {about}")
    broken = [f.name for f in findings if not f.holds]
    tried = sum(f.reason is None or not f.holds for f in findings)
    if tried == 0:
        why = findings[0].reason
        raise UserError(f"{findings[0].name}: does not apply ({why}); ask for another")
    print(f"BROKEN: {', '.join(broken)}" if broken else f"all {tried} promises hold")


def main(argv=None) -> list[Finding]:
    args = parse_args(argv)
    device = choose_device(args.device)
    default = "fp32" if device.type == "cpu" else "auto"
    dtype = choose_precision(args.precision or default, device).dtype
    checkpoint, layers, _ = find_model(args.checkpoint, args.adapter, args.layers)
    check_memory(checkpoint, layers, args.tokenizer, device)
    subject_in = partial(
        make_subject, checkpoint, layers, args.tokenizer, args.adapter, args.force,
        args.attention, device=device, toggles=args.toggles,
    )  # fmt: skip
    promises = {n: p for n, p in PROMISES.items() if args.only is None or n in args.only}
    findings = prove(promises, lambda kind: subject_in(dtype=kind), dtype)
    print(f"{checkpoint}{f' + {args.adapter}' if args.adapter else ' + random LoRA'}, on {device}")
    show(findings, str(dtype).removeprefix("torch."))
    if not all(finding.holds for finding in findings):
        raise SystemExit(1)
    return findings


if __name__ == "__main__":
    with friendly_errors():
        main()

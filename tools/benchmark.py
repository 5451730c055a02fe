"""Speed and memory, measured beside transformers and PEFT on the same machine, in the same run.

    python tools/benchmark.py                                     GPT-2 124M's size, random weights
    python tools/benchmark.py --init llama-2-7b --layers 1 --parts train \\
        --data alpaca_data.json --tokenizer tokenizer.model
    python tools/benchmark.py --checkpoint gpt2-medium --precision bf16 --out-dir runs/bench

Each engine lives in a process of its own, loads the same folder of weights, shows that its logits
are the same, and then they take turns, A B A B, one at work while the other waits. Figures are
medians over the turns; "ratio" says how many times better minillm is: faster, or smaller.
The machine's own limits are measured in the same run (matrix products per dtype, reading memory),
and every result is given as a share of the one that bounds it. Peak memory is that of a process
from before it loaded the weights. Where transformers and peft are not installed, minillm is
measured alone. Writes report.md, table.csv, decode.png and results.json; the last line is JSON.
"""

import itertools
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from minillm.checkpoint import empty_model, materialize
from minillm.cli import Parser, check_known, positive, settings_of, several, share, whole
from minillm.config import with_layers
from minillm.data.batches import Row, encode_samples
from minillm.data.tasks import TASKS
from minillm.data.templates import find_template
from minillm.errors import UserError, friendly_errors
from minillm.files import write_json
from minillm.hub import find_checkpoint
from minillm.losses import IGNORED
from minillm.plots import plot_decode
from minillm.precision import DTYPES, choose_device, has_native_bf16
from tools.cells import write_report
from tools.engines import Setup
from tools.limits import describe_machine, product_rate, read_rate, startup_seconds
from tools.match import Match
from tools.models import family_of, family_of_preset

PARTS = ("decode", "context", "train", "startup")


def parse_args(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--checkpoint", "--init-from", metavar="NAME|PATH", help="Hugging Face folder of weights")
    add("--init", metavar="PRESET", help="random weights of a published size (default: gpt2)")
    add("--layers", type=positive, help="keep only the first N layers")
    add("--parts", type=several(str), default=list(PARTS),
        help=f"what to measure: {','.join(PARTS)} (default: all)")  # fmt: skip
    add("--precision", type=several(str),
        help="dtypes, with commas between (default: fp32, and bf16 where native)")  # fmt: skip
    add("--decode", type=several(positive), default=[64, 128], metavar="PROMPT,NEW",
        help="tokens of the prompt and to write (default: 64,128)")  # fmt: skip
    add("--contexts", type=several(positive), default=[32, 64, 128, 256, 512, 1000],
        help="lengths at which the cost of one more token is measured")  # fmt: skip
    add("--tokens", type=positive, default=256, help="training: tokens of a row")
    add("--rows", type=positive, default=8, help="training: rows of a step")
    add("--batch-size", type=several(positive), default=[1],
        help="training: rows of a forward, each number measured (default: 1)")  # fmt: skip
    add("--masked", type=several(share), default=[0.0, 0.54],
        help="training: shares of a row that carry no label, each measured (default: 0, and 0.54 "
        "as in Alpaca)")  # fmt: skip
    add("--data", help="training: rows of this Alpaca file instead")
    add("--tokenizer", help="tokenizer file, for --data")
    add("--gradient-checkpointing", action="store_true", help="training: both engines")
    add("--pack", type=positive, metavar="TOKENS",
        help="training: minillm packs its rows into forwards of so many tokens")  # fmt: skip
    add("--repeats", type=positive, default=5, help="turns of each engine (of a context: 2)")
    add("--seed", type=whole, default=0, help="of weights and tokens")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add("--out-dir", default="runs/benchmark", help="where the report goes")
    args = parser.parse_args(argv)
    if args.checkpoint and args.init:
        raise UserError("--init and --checkpoint contradict each other; give one of them")
    if len(args.decode) != 2:
        raise UserError("--decode: give two numbers, tokens of the prompt and to write")
    return args


def random_weights(
    preset: str, layers: int | None, seed: int, dtype: torch.dtype, device: torch.device,
    folder: Path,
) -> None:  # fmt: skip
    """Writes a Hugging Face folder of a published size, drawn on `device`. Errors: UserError for
    an unknown name."""
    family = family_of_preset(preset)
    config = with_layers(family.config.preset(preset), layers, preset)
    torch.manual_seed(seed)
    model = materialize(empty_model(lambda: family.model(config)), dtype, device)
    family.save(model, family.tokenizer(None), folder)


def training_rows(
    data: str | None, tokenizer: str | None, family, masked: float, n_tokens: int, n_rows: int,
    vocab_size: int,
) -> list[list[Row]]:  # fmt: skip
    """The rows of each optimizer step: one group of random tokens, or a file's first 200 samples
    in groups. Errors: UserError."""
    if data is None:
        tokens = torch.randint(vocab_size, (n_rows, n_tokens + 1))
        labels = tokens.clone()
        labels[:, : round(masked * n_tokens) + 1] = IGNORED
        return [[Row(t, y) for t, y in zip(tokens, labels, strict=True)]]
    if tokenizer is None:
        raise UserError("--data: text needs a tokenizer; add --tokenizer FILE")
    task = TASKS["alpaca"]
    splits = task.read(data, find_template(task.template, task.field))
    rows = encode_samples(splits.train[:200], family.tokenizer(tokenizer), 512).rows
    return [rows[i : i + n_rows] for i in range(0, len(rows), n_rows)]


def training_cases(
    masked: list[float], sizes: list[int], data: str | None, n_rows: int, n_tokens: int,
    pack: int | None,
) -> Iterator[tuple[float, int, str]]:  # fmt: skip
    """Each share without labels (a file has its own) with each number of rows of a forward, and
    what the table calls it."""
    for share_masked, size in itertools.product(masked[:1] if data else masked, sizes):
        what = data or f"{n_rows} x {n_tokens}, {1 - share_masked:.0%} labelled"
        what += f", {size} a forward" if size > 1 else ""
        what += f", minillm packed to {pack}" if pack else ""
        yield share_masked, size, what


def compare(
    what: str, dtype: str, unit: str, found: dict, of_limit: float | None, less: bool = False
) -> dict:
    """A line of the table: medians of each engine's figures, of how many times better minillm was
    in the same turn, and its share of the machine's limit. `less`: the smaller is the better."""
    middle = {name: statistics.median(values) for name, values in found.items()}
    row = {"what": what, "dtype": dtype, "unit": unit, **middle}
    if len(middle) == 2:
        pairs = zip(*found.values(), strict=True)  # of the same turn
        row["ratio"] = statistics.median(b / a if less else a / b for a, b in pairs)
    shown = ", ".join(f"{name} {value:,.4g}" for name, value in middle.items())
    print(f"{dtype} {what}: {shown} {unit}", file=sys.stderr, flush=True)
    return row | {"share of limit": of_limit, "samples": found}


def measure_decode(
    match: Match, dtype: str, sizes: list[int], repeats: int, limits: dict
) -> Iterator[dict]:
    """Time to the first token, and tokens per second of a whole answer."""
    n_prompt, n_new = sizes
    if n_prompt + n_new > match.context:
        raise UserError(f"--decode {n_prompt},{n_new}: the model's context is {match.context} "
                        "tokens; lower one of them")  # fmt: skip
    prompt = torch.randint(match.vocab_size, (n_prompt,)).tolist()
    reads = []  # beside every turn: on a shared machine this changes from second to second
    turns = match.turns(
        repeats, "decode", prompt, n_new, True, after=lambda: reads.append(read_rate(match.device))
    )
    limits["read"] = statistics.median(reads)
    speeds = {name: [n_new / sum(steps) for steps in found] for name, found in turns.items()}
    first = {name: [1000 * steps[0] for steps in found] for name, found in turns.items()}
    n_bytes = match.ours("decode_bytes", n_prompt + n_new // 2)
    of_limit = statistics.median(speeds["minillm"]) * n_bytes / limits["read"]
    rate = match.ours("prefill_flops", n_prompt) / limits["matmul"]
    yield compare(f"decode {n_prompt} + {n_new}", dtype, "tokens/s", speeds, of_limit)
    of_limit = 1000 * rate / statistics.median(first["minillm"])
    yield compare(f"first token after {n_prompt}", dtype, "ms", first, of_limit, less=True)


def measure_contexts(
    match: Match, dtype: str, contexts: list[int], repeats: int, limits: dict
) -> Iterator[dict]:
    """Cost of one more token at each length, with and without the cache."""
    for length in contexts:
        if length + 8 > match.context:
            continue
        prompt = torch.randint(match.vocab_size, (length,)).tolist()
        cached = match.turns(repeats, "decode", prompt, 8, True)
        found = {name: [1000 * s for steps in turns for s in steps[1:]]
                 for name, turns in cached.items()}  # fmt: skip
        plain = {name: [1000 * s for steps in turns for s in steps] for name, turns in
                 match.turns(repeats, "decode", prompt, 2, False).items()}  # fmt: skip
        n_bytes = match.ours("decode_bytes", length)
        of_limit = 1000 * n_bytes / statistics.median(found["minillm"]) / limits["read"]
        yield compare(f"a token at {length}, cached", dtype, "ms", found, of_limit, less=True)
        rate = match.ours("prefill_flops", length) / limits["matmul"]
        of_limit = 1000 * rate / statistics.median(plain["minillm"])
        yield compare(f"a token at {length}, no cache", dtype, "ms", plain, of_limit, less=True)


def measure_training(
    match: Match, dtype: str, what: str, steps: list[list[Row]], repeats: int, limits: dict
) -> Iterator[dict]:
    """Tokens per second of optimizer steps, and the peak memory of a process that takes them."""
    match.all("prepare_training")
    match.agree("loss", steps[0])
    match.all("reset_peak")
    for rows in steps if len(steps) > 1 else steps * 2:  # does not count: kernels are made here
        match.all("train_step", rows)
    turns = [steps[turn % len(steps)] for turn in range(max(repeats, len(steps)))]
    speeds, flops = {name: [] for name in match.workers}, []
    for rows in turns:
        n_tokens = sum(len(row.tokens) - 1 for row in rows)
        flops.append(match.ours("training_flops", rows) / n_tokens)
        for name, seconds in match.all("train_step", rows).items():
            speeds[name].append(n_tokens / seconds)
    peaks = {name: [peak] for name, peak in match.all("peak").items()}
    rates = [speed * per_token for speed, per_token in zip(speeds["minillm"], flops, strict=True)]
    of_limit = statistics.median(rates) / limits["matmul"]
    yield compare(f"LoRA step, {what}", dtype, "tokens/s", speeds, of_limit)
    yield compare(f"peak memory, {what}", dtype, "MiB", peaks, None, less=True)


def report(folder: Path, machine: dict, limits: dict, rows: list[dict], settings: dict) -> None:
    """report.md, table.csv, decode.png, results.json; the JSON's last line on stdout."""
    folder.mkdir(parents=True, exist_ok=True)
    result = {"machine": machine, "limits": limits, "settings": settings, "results": rows}
    write_json(folder / "results.json", result)
    curves = decode_curves(rows)
    if curves:
        plot_decode(curves, folder / "decode.png")
    shown = "\n".join(
        f"- {dtype}: matrix products {limit['matmul'] / 1e9:,.1f} GFLOP/s, reading memory "
        f"{limit['read'] / 1e9:,.1f} GB/s" for dtype, limit in limits.items()
    )
    note = f"{', '.join(f'{k} {v}' for k, v in machine.items() if v)}\n\n{shown}"
    lines = [{k: v for k, v in row.items() if k != "samples"} for row in rows]
    pictures = ["decode.png"] if curves else []
    print(write_report(folder, "Benchmark", note, lines, settings, pictures))
    print(json.dumps(result | {"results": lines}))


def decode_curves(rows: list[dict]) -> dict[str, dict[int, float]]:
    """{title: {context length: ms a token}} of the measured contexts."""
    curves: dict[str, dict[int, float]] = {}
    for row in rows:
        if not row["what"].startswith("a token at "):
            continue
        length, kind = row["what"].removeprefix("a token at ").split(", ")
        for name in ("minillm", "transformers"):
            if name in row:
                curves.setdefault(f"{name} {row['dtype']}, {kind}", {})[int(length)] = row[name]
    return curves


def main(argv=None) -> list[dict]:
    args = parse_args(argv)
    device = choose_device(args.device)
    dtypes = args.precision or ["fp32", *(["bf16"] if has_native_bf16(device) else [])]
    check_known("--precision", dtypes, DTYPES)
    check_known("--parts", args.parts, PARTS)
    limits, rows = {}, []
    torch.manual_seed(args.seed)
    Path(args.out_dir).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.out_dir) as temporary:
        weights = Path(temporary)
        if args.checkpoint:
            weights = find_checkpoint(args.checkpoint)
        else:
            wide = "fp32" in dtypes
            dtype = torch.float32 if wide else DTYPES[dtypes[0]]
            random_weights(args.init or "gpt2", args.layers, args.seed, dtype, device, weights)
        family = family_of(weights)
        for dtype in dtypes:
            limit = {"matmul": product_rate(device, dtype), "read": read_rate(device)}
            limits[dtype] = limit
            setup = Setup(
                weights, args.layers, dtype, str(device), family.targets,
                gradient_checkpointing=args.gradient_checkpointing, pack=args.pack,
            )  # fmt: skip
            if {"decode", "context"} & set(args.parts):
                with Match(setup) as match:
                    if "decode" in args.parts:
                        rows += measure_decode(match, dtype, args.decode, args.repeats, limit)
                    if "context" in args.parts:
                        rows += measure_contexts(match, dtype, args.contexts, 2, limit)
            cases = training_cases(
                args.masked, args.batch_size, args.data, args.rows, args.tokens, args.pack
            )
            for masked, size, what in cases if "train" in args.parts else ():
                with Match(replace(setup, batch_size=size)) as match:
                    steps = training_rows(
                        args.data, args.tokenizer, family, masked, args.tokens, args.rows,
                        match.vocab_size,
                    )  # fmt: skip
                    rows += measure_training(match, dtype, what, steps, args.repeats, limit)
    if "startup" in args.parts:
        rows += [compare(*line, None, less=True) for line in startup_seconds()]
    report(Path(args.out_dir), describe_machine(device), limits, rows, settings_of(args))
    return rows


if __name__ == "__main__":
    with friendly_errors():
        main()

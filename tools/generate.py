"""Generates text, with or without the KV cache.

    python tools/generate.py --prompt "One morning, Nora"
    python tools/generate.py --prompt "One morning, Nora" --no-cache       the same text, slower
    python tools/generate.py --adapter runs/finetune-llama-001/adapter --prompt "Where is Tom?"
    python tools/generate.py --prompts file.txt --samples 3 --temperature 0.8 --top-p 0.9
    python tools/generate.py --prompt "One day" --temperature 1 --min-p 0.1 --stop . --explain
    python tools/generate.py --prompt "One day" --beams 4

Sources: top-k: Fan et al. 2018; top-p: Holtzman et al. 2020; min-p: Nguyen et al. 2024; repetition
penalty: Keskar et al. 2019; beam search: Graves 2012.
"""

import argparse
import itertools
import sys

from tqdm import tqdm

from minillm.beam import beam_search
from minillm.cli import Parser, amount, pick, positive
from minillm.errors import UserError, friendly_errors
from minillm.files import read_text
from minillm.generate import generate_steps
from minillm.sampling import Sampling
from minillm.text_stream import StopStrings, TextStream
from tools.explain import explain
from tools.models import (
    ModelOptions,
    Stopwatch,
    add_adapted_model_flags,
    add_sampling_flags,
    add_stop_flag,
    encode_prompt,
    load_model,
    sampling_of,
)


def parse_args(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument_group("prompt").add_argument
    add("--prompt", action="append", help="text to continue or answer; may be repeated")
    add("--input", default="", help="the input that goes with an instruction")
    add("--prompts", metavar="FILE", help="text file with one prompt a line, run as one batch")
    add("--samples", type=positive, default=1, help="texts per prompt")
    add("--cache", action=argparse.BooleanOptionalAction, default=True,
        help="keep keys and values, or compute all tokens anew each step")  # fmt: skip
    add_adapted_model_flags(parser)
    add_sampling_flags(parser)
    add_stop_flag(parser)
    add = parser.add_argument_group("beam search, in place of sampling").add_argument
    add("--beams", type=positive, metavar="N", help="keep the N likeliest beginnings")
    add("--length-penalty", type=amount, default=1.0,
        help="a text's log-probability is divided by its length to this power")  # fmt: skip
    parser.add_argument("--explain", type=positive, nargs="?", const=5, metavar="N",
        help="show at every step the N likeliest tokens (5), what each filter removed, and the "
        "choice")  # fmt: skip
    return parser.parse_args(argv)


def collect_prompts(given: list[str] | None, file: str | None) -> list[str]:
    """--prompt and the non-empty lines of --prompts. Errors: UserError if there are none."""
    prompts = list(given or [])
    if file is not None:
        prompts += [line.removesuffix("\r") for line in read_text(file).split("\n") if line.strip()]
        if not prompts:
            raise UserError(f"{file}: no prompts; write one on each line")
    if not prompts:
        raise UserError("--prompt: none given; add --prompt TEXT or --prompts FILE")
    return prompts


def check_choices(beams: int | None, sampling: Sampling, explained: bool, n_rows: int) -> None:
    """Errors: UserError for flags that do not go together."""
    if explained and n_rows > 1:
        raise UserError("--explain: shows one text; give one --prompt and no --samples")
    if beams and (sampling != Sampling() or explained):
        raise UserError("--beams: looks for the likeliest text and draws none; leave out "
                        "--temperature, the filters, the penalty and --explain")  # fmt: skip


def warn_of_idle(beams: int | None, penalty: float, n_samples: int, sampling: Sampling) -> None:
    """Tells which flags do nothing beside the others."""
    if n_samples > 1 and sampling.is_greedy:
        remedy = "leave it out" if beams else "add --temperature 0.8"
        print(f"warning: --samples: these are all the same; {remedy}", file=sys.stderr)
    if penalty != 1.0 and not beams:
        print("warning: --length-penalty: no effect without --beams", file=sys.stderr)


def show_texts(texts: list[str], prompts: list[str], n_samples: int) -> None:
    """Prints each text under the number of its prompt and sample."""
    for i, text in enumerate(texts):
        prompt, sample = divmod(i, n_samples)
        title = f"=== {prompt + 1}{f'-{sample + 1}' if n_samples > 1 else ''} ==="
        print(f"{title}\n{prompts[prompt]}{text}\n")


def main(argv=None) -> list[str]:
    args = parse_args(argv)
    prompts = collect_prompts(args.prompt, args.prompts)
    plain = pick(Sampling, vars(args))
    check_choices(args.beams, plain, bool(args.explain), len(prompts) * args.samples)
    sampling = sampling_of(vars(args))
    warn_of_idle(args.beams, args.length_penalty, args.samples, sampling)
    model, tokenizer, template = load_model(pick(ModelOptions, vars(args)))
    if args.input and "{input}" not in (template.text if template else ""):
        print("warning: --input: no effect without a template that has a place for it",
              file=sys.stderr)  # fmt: skip
    encoded = [encode_prompt(tokenizer, template, p, args.input) for p in prompts]
    rows = [tokens for tokens in encoded for _ in range(args.samples)]
    begun = prompts if template is None else [""] * len(prompts)  # what a text is shown after
    stop = StopStrings(tokenizer, tuple(args.stop))
    streams = [TextStream(tokenizer, tokens, stop) for tokens in rows]
    watch = Stopwatch(next(model.parameters()).device)
    if args.beams:
        found = beam_search(
            model, rows, args.max_new_tokens, args.beams, args.cache, args.length_penalty,
            tokenizer.eos_id,
        )  # fmt: skip
        steps = ((column, None) for column in itertools.zip_longest(*found))
    else:
        steps = generate_steps(
            model, rows, args.max_new_tokens, sampling, args.cache, tokenizer.eos_id, args.seed,
            stop=stop if args.stop else None,
        )  # fmt: skip
    live = len(rows) == 1 and not args.explain  # then the text is shown as it grows
    print(begun[0] if live else "", end="", flush=True)
    hidden = live or args.explain is not None
    for tokens, logits in tqdm(steps, total=args.max_new_tokens, leave=False, disable=hidden):
        watch.mark(sum(token is not None for token in tokens))
        if args.explain:
            seen = streams[0].tokens
            print(explain(tokenizer, seen, logits[0], sampling, tokens[0], args.explain), "\n")
        for stream, token in zip(streams, tokens, strict=True):
            if token is not None and not stream.at_stop:  # beams go on after one
                new = stream.push(token)
                print(new if live else "", end="", flush=True)
    print(streams[0].finish() if live else "")
    texts = [stream.text() for stream in streams]
    show_texts(texts if not live else [], begun, args.samples)
    full = max(map(len, rows)) + args.max_new_tokens > model.config.max_seq_len
    if full and any(s.tokens[-1] != tokenizer.eos_id and not s.at_stop for s in streams):
        print(f"(stopped at the model's context of {model.config.max_seq_len} tokens)")
    if not (args.beams or args.explain):
        print(f"[{watch.summary(sum(map(len, rows)))}; cache {'on' if args.cache else 'off'}]")
    return texts


if __name__ == "__main__":
    with friendly_errors():
        main()

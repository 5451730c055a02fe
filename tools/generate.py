"""Generates text, with or without the KV cache.

    python tools/generate.py --prompt "One morning, Nora"
    python tools/generate.py --prompt "One morning, Nora" --no-cache       the same text, slower
    python tools/generate.py --adapter runs/finetune-llama-001/adapter --prompt "Where is Tom?"
    python tools/generate.py --prompts file.txt --samples 3 --temperature 0.8 --top-p 0.9
"""

import argparse

from tqdm import tqdm

from minillm.cli import Parser, positive
from minillm.errors import UserError, friendly_errors
from minillm.files import read_text
from minillm.generate import Sampling, generate_steps
from minillm.linear import compile_single_rows
from tools.models import (
    Stopwatch,
    TextStream,
    add_adapted_model_flags,
    add_compile_flag,
    add_sampling_flags,
    encode_prompt,
    load_model,
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
    add_compile_flag(parser)
    return parser.parse_args(argv)


def collect_prompts(given: list[str] | None, file: str | None) -> list[str]:
    """--prompt and the non-empty lines of --prompts. Errors: UserError if there are none."""
    prompts = list(given or [])
    if file is not None:
        prompts += [line for line in read_text(file).split("\n") if line.strip()]
        if not prompts:
            raise UserError(f"{file}: no prompts; write one on each line")
    if not prompts:
        raise UserError("--prompt: none given; add --prompt TEXT or --prompts FILE")
    return prompts


def main(argv=None) -> list[str]:
    args = parse_args(argv)
    prompts = collect_prompts(args.prompt, args.prompts)
    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.repetition_penalty)
    model, tokenizer, template = load_model(
        args.checkpoint, args.adapter, args.layers, args.tokenizer, args.template,
        args.device, args.precision, args.force,
    )  # fmt: skip
    model.attention = args.attention
    if args.compile:
        compile_single_rows(model)
    encoded = [encode_prompt(tokenizer, template, p, args.input) for p in prompts]
    rows = [tokens for tokens in encoded for _ in range(args.samples)]
    steps = generate_steps(
        model, rows, args.max_new_tokens, sampling, args.cache, tokenizer.eos_id, args.seed
    )
    streams = [TextStream(tokenizer, tokens) for tokens in rows]
    watch = Stopwatch(next(model.parameters()).device)
    alone = len(rows) == 1  # then the text is shown as it grows
    if alone and template is None:
        print(prompts[0], end="", flush=True)
    last = [None] * len(rows)
    for tokens in steps if alone else tqdm(steps, total=args.max_new_tokens, leave=False):
        watch.mark(sum(token is not None for token in tokens))
        for i, token in enumerate(tokens):
            if token is not None:
                new, last[i] = streams[i].push(token), token
                print(new if alone else "", end="", flush=True)
    print(streams[0].finish() if alone else "")
    texts = [stream.text() for stream in streams]
    for i, text in enumerate(texts if not alone else []):
        prompt, sample = divmod(i, args.samples)
        title = f"=== {prompt + 1}{f'-{sample + 1}' if args.samples > 1 else ''} ==="
        print(f"{title}\n{prompts[prompt] if template is None else ''}{text}\n")
    full = max(map(len, rows)) + args.max_new_tokens > model.config.max_seq_len
    if full and any(token != tokenizer.eos_id for token in last):
        print(f"(stopped at the model's context of {model.config.max_seq_len} tokens)")
    print(f"[{watch.summary(sum(map(len, rows)))}; cache {'on' if args.cache else 'off'}]")
    return texts


if __name__ == "__main__":
    with friendly_errors():
        main()

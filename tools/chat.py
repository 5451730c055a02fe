"""Talks to a model: each line is an instruction, the answer streams in, whole characters only.

    python tools/chat.py --adapter runs/finetune-llama-001/adapter
    python tools/chat.py                    the bare tiny model continues what you begin

Ctrl-C stops an answer, Ctrl-D (or /quit) ends. Each line stands alone: the model is given no
earlier turns, because instruction tuning on single turns never showed it any.
"""

import itertools
import sys

from minillm.cli import Parser, pick
from minillm.errors import UserError, friendly_errors
from minillm.generate import generate_steps
from minillm.sampling import Sampling
from minillm.text_stream import StopStrings, TextStream
from tools.models import (
    ModelOptions,
    add_adapted_model_flags,
    add_sampling_flags,
    add_stop_flag,
    encode_prompt,
    load_model,
    sampling_of,
)


def parse_args(argv=None):
    parser = Parser(__doc__)
    add_adapted_model_flags(parser)
    add_sampling_flags(parser)
    add_stop_flag(parser)
    return parser.parse_args(argv)


def answer(
    model, tokenizer, tokens, max_new_tokens: int, sampling: Sampling, seed: int, stop: StopStrings
) -> None:
    """Streams one answer to the terminal until EOS, a stop string, the limit or Ctrl-C."""
    stream = TextStream(tokenizer, tokens, stop)
    try:
        for step in generate_steps(
            model, [tokens], max_new_tokens, sampling, eos_id=tokenizer.eos_id, seed=seed, stop=stop
        ):
            print(stream.push(step.tokens[0]), end="", flush=True)
    except KeyboardInterrupt:
        print(stream.finish(), end=" [stopped]")
    print(stream.finish(), end="\n\n", flush=True)


def main(argv=None) -> None:
    args = parse_args(argv)
    options, sampling = pick(ModelOptions, vars(args)), sampling_of(vars(args))
    model, tokenizer, template = load_model(options)
    stop = StopStrings(tokenizer, tuple(args.stop))
    print(f"{options.name}; Ctrl-D or /quit ends")
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")  # bytes that are no text are no reason to end
    for turn in itertools.count():
        try:
            line = input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if line.strip() in ("/quit", "/exit"):
            return
        if not line.strip():
            continue
        try:
            tokens = encode_prompt(tokenizer, template, line)
            answer(model, tokenizer, tokens, args.max_new_tokens, sampling, args.seed + turn, stop)
        except UserError as error:  # a line too long for the context is no reason to end
            print(f"error: {error}")


if __name__ == "__main__":
    with friendly_errors():
        main()

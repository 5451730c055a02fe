"""Three samples for each prefix or post of a file, in the course's own files.

    python tools/samples.py --kind completions --inputs input_shakespeare_prefixes.txt
    python tools/samples.py --kind summaries --inputs input_reddit_posts.txt \\
        --references reference_reddit_summaries.txt --adapter runs/finetune-gpt2-001/adapter

Completions: one prefix per line; by default drawn at temperature 0.5 with repetition penalty 1.2
(which counts the prompt's tokens too), up to 100 tokens, the prompt among them. Summaries: posts
between blank lines; temperature 0.2, up to 180 new tokens, cut off at a second TL;DR:. A model
that was fine-tuned on a task asks in the words of its template, one without any but with sft in
its name in the course's (`... <complete>`).
With references (a line or block per post) the ROUGE-1 file is written as well. How all was drawn,
and the score's interval over posts, is in a .json beside the samples.
"""

import json
import statistics
import sys
from pathlib import Path

from tqdm import tqdm

from minillm.cli import Parser, pick, positive, settings_of, whole
from minillm.data.course_files import (
    LAYOUTS,
    SCORES,
    ask_about_post,
    block,
    read_posts,
    read_references,
    score_file,
    until_next_cue,
)
from minillm.data.samples import Sample, shorten
from minillm.data.templates import find_template
from minillm.errors import UserError, friendly_errors
from minillm.files import read_text, set_aside
from minillm.generate import generate
from minillm.text_metrics import mean_with_interval, rouge
from tools.models import ModelOptions, add_adapted_model_flags, load_model

DEFAULTS = {
    "completions": {"temperature": 0.5, "repetition_penalty": 1.2, "top_k": 50},
    "summaries": {"temperature": 0.2, "repetition_penalty": 1.0, "top_k": 50},
}
NEW_TOKENS, WHOLE_TOKENS = 180, 100


def parse_args(argv=None):
    parser = Parser(__doc__)
    add_adapted_model_flags(parser)
    add = parser.add_argument_group("files").add_argument
    add("--kind", choices=[*LAYOUTS], required=True, help="what is asked for")
    add("--inputs", required=True, help="prefixes, one a line, or posts with blank lines between")
    add("--references", help="summaries to score against, in the posts' order")
    add("--name", help="of the model in the files' names (default: its folder's)")
    add("--out-dir", default=".", help="where the files go")
    add = parser.add_argument_group("sampling").add_argument
    add("--samples", type=positive, default=3, choices=range(1, 27), metavar="N",
        help="for each input, at most 26 (default: 3)")  # fmt: skip
    add("--temperature", type=float, help="0 is greedy (default: the kind's own)")
    add("--repetition-penalty", type=float, help="default: the kind's own")
    add("--top-k", type=int, help="draw from the k likeliest tokens (default: 50)")
    add("--seed", type=whole, default=0)
    return parser.parse_args(argv)


def read_inputs(kind: str, path: Path, template) -> list[Sample]:
    """The prompts of a file, in the template's words. Errors: UserError if there are none."""
    text = read_text(path)
    if kind == "summaries":
        found = [ask_about_post(post, template) for post in read_posts(text)]
        if odd := [number for number, post in enumerate(found, 1) if post.body is None]:
            print(f"warning: {path}: {len(odd)} of {len(found)} posts (the first is number "
                  f"{odd[0]}) are not in the form SUBREDDIT: r/NAME TITLE: ... POST: ... TL;DR: "
                  "and are asked as they are", file=sys.stderr)  # fmt: skip
    else:
        lines = [line.strip() for line in text.split("\n") if line.strip()]
        found = [Sample(template.ask(line) if template else line, "") for line in lines]
    if not found:
        raise UserError(f"{path}: no inputs in this file; write one a line")
    return found


def fit(inputs: list[Sample], tokenizer, context: int) -> tuple[list[Sample], int]:
    """The prompts, a post shortened where it leaves no room for its summaries; tells how many, and
    returns that too."""
    fitting = [shorten(sample, tokenizer, context - NEW_TOKENS) for sample in inputs]
    n_shortened = sum(short is not whole for short, whole in zip(fitting, inputs, strict=True))
    if n_shortened:
        print(f"{n_shortened} of {len(inputs)} posts shortened: the context of {context} tokens "
              f"must hold {NEW_TOKENS} of summary too")  # fmt: skip
    return fitting, n_shortened


def write_samples(model, tokenizer, sample, kind: str, n: int, seed: int, sampling: dict):
    """n texts for one prompt. Errors: UserError for one that fills the context."""
    tokens = tokenizer.encode(sample.prompt, bos=True)
    if kind != "summaries" and len(tokens) > WHOLE_TOKENS:
        print(f"warning: {sample.prompt[:30]!r}...: {len(tokens)} tokens, where text and answer "
              f"have {WHOLE_TOKENS} together; one token is written", file=sys.stderr)  # fmt: skip
    room = NEW_TOKENS if kind == "summaries" else max(1, WHOLE_TOKENS - len(tokens) + 1)
    rows = generate(model, [tokens] * n, room, eos_id=tokenizer.eos_id, seed=seed, **sampling)
    ended = [row[:-1] if row and row[-1] == tokenizer.eos_id else row for row in rows]
    texts = [tokenizer.decode(row).strip() for row in ended]
    return [until_next_cue(text) for text in texts] if kind == "summaries" else texts


def write_all(texts: dict[Path, str], beside: Path) -> None:
    """Writes files; if one of them is there with another text, all are kept, under a number, and
    what lies `beside`, written or not."""
    if any(path.exists() and path.read_bytes() != text.encode() for path, text in texts.items()):
        set_aside(*dict.fromkeys([*texts, beside]))
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")
        print(f"wrote {path}")


def main(argv=None) -> list[list[str]]:
    args = parse_args(argv)
    options = pick(ModelOptions, vars(args))
    model, tokenizer, template = load_model(options)
    source = Path(options.name)
    model_name = source.parent.name if source.name in ("adapter", "model") else source.name
    name = args.name or model_name
    is_bare = template is None and args.template is None and args.kind == "completions"
    if is_bare and ("sft" in name or "sft" in model_name):
        template = find_template("complete")  # the course's own checkpoints carry none
        print(f"{name}: no template beside it; asked as the course asks, with <complete>")
    layout, folder = LAYOUTS[args.kind], Path(args.out_dir)
    inputs = read_inputs(args.kind, Path(args.inputs), template)
    references = []
    if args.references:
        references = read_references(read_text(Path(args.references)), len(inputs))
        if len(references) != len(inputs):
            raise UserError(f"{args.references}: {len(references)} references for {len(inputs)} "
                            "inputs; give one for each")  # fmt: skip
    given = {flag: value for flag, value in vars(args).items() if value is not None}
    sampling = {flag: given.get(flag, own) for flag, own in DEFAULTS[args.kind].items()}
    fitting, n_shortened = fit(inputs, tokenizer, model.config.max_seq_len)
    written = []
    for number, sample in enumerate(tqdm(fitting, desc="samples", unit="input", leave=False)):
        seed = args.seed + number * args.samples
        written.append(
            write_samples(model, tokenizer, sample, args.kind, args.samples, seed, sampling)
        )
    folder.mkdir(parents=True, exist_ok=True)
    pairs = zip(inputs, written, strict=True)
    blocks = [block(layout, i, asked.prompt, texts) for i, (asked, texts) in enumerate(pairs, 1)]
    path = folder / layout.file.format(name)
    texts, score_path = {path: "".join(blocks)}, folder / SCORES.format(name)
    drawn = {name.replace("_", "-"): value for name, value in sampling.items()}
    about = {"settings": settings_of(args) | drawn | {
        "template": template and template.to_dict(), "posts shortened": n_shortened,
        "counted by the repetition penalty": "tokens of the prompt too",
    }}  # fmt: skip
    if references:
        sets = zip(*written, strict=True)
        scores = [rouge(answers, references, stemmer=False)["rouge1"] for answers in sets]
        by_post = [statistics.fmean(of_post) for of_post in zip(*scores, strict=True)]
        about["rouge1"] = mean_with_interval(by_post)
        score = score_file([statistics.fmean(of_set) for of_set in scores])
        texts[score_path] = score
        print(score.splitlines()[-1])
    texts[path.with_suffix(".json")] = json.dumps(about, indent=1) + "\n"
    write_all(texts, score_path if args.kind == "summaries" else path)
    return written


if __name__ == "__main__":
    with friendly_errors():
        main()

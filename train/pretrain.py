"""Trains a tiny model from nothing on tinyworld's texts: tokenizer, weights, Hugging Face folder.

    python train/pretrain.py --save checkpoints/tiny-llama --overwrite     the bundled models anew
    python train/pretrain.py --model gpt2 --save checkpoints/tiny-gpt2 --overwrite
    python train/pretrain.py --model phi --epochs 3 --save checkpoints/tiny-phi --overwrite
    python train/pretrain.py --out-dir runs/pretrain-001 --resume       after an interruption, with
                                                                        the flags it began with

Part of every batch passes only the first few blocks (see prefix_loss), so that the model's first
N layers are a language model by themselves and `--layers N` shows something worth looking at.
"""

import itertools
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import nn

import gpt2
import llama
import phi
from minillm import generate
from minillm.checkpoint import empty_model
from minillm.cli import Parser, amount, positive, settings_of, whole
from minillm.data.batches import Batches, encode_samples
from minillm.data.samples import Sample
from minillm.data.tinyworld import articles, reviews, stories
from minillm.errors import UserError, friendly_errors
from minillm.family import Family
from minillm.files import write_json
from minillm.losses import token_loss
from minillm.plots import plot_run
from minillm.precision import choose_device, choose_precision
from minillm.runs import Run, check_folder, check_settings, fresh_folder
from minillm.training import TrainSettings, evaluate, train

FAMILIES = {family.name: family for family in (llama.FAMILY, gpt2.FAMILY, phi.FAMILY)}
HELD_OUT_SEED = 1  # the training stories come from seed 0
OTHERS_SEED = 2  # reviews and articles to fine-tune on come from seed 0
REVIEWS_A_PAGE = 8  # joined to about a story's length


def parse_args(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--model", choices=[*FAMILIES], default="llama", help="family of the model to train")
    add("--preset", help="sizes of the model (default: tiny-llama, tiny-gpt2 or tiny-phi)")
    add("--stories", type=positive, default=15000, help="stories to train on")
    add("--reviews", type=whole, default=10000, help="film reviews besides, without labels")
    add("--articles", type=whole, default=3000, help="articles besides, without highlights")
    add("--held-out", type=positive, default=400, help="stories to measure the loss on")
    add("--vocab-size", type=positive, default=2048, help="pieces of the tokenizer")
    add("--batch-size", type=positive, default=16, help="stories in a micro-batch")
    add("--accumulation-steps", type=positive, default=1, help="micro-batches in a step")
    add("--epochs", type=positive, default=5, help="passes over all texts")
    add("--max-iters", type=positive, help="stop after this many optimizer steps")
    add("--lr", type=amount, default=2e-3, help="peak learning rate")
    add("--attention", choices=["sdpa", "explicit"], default="explicit",
        help="explicit is the faster one on a CPU for rows as short as these")  # fmt: skip
    add("--weight-decay", type=amount, default=0.1, help="AdamW's, on matrices")
    add("--eval-every", type=positive, default=500, help="steps between held-out losses")
    add("--precision", default="auto", help="auto, fp32, bf16 or fp16")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add("--seed", type=whole, default=0, help="of weights and order")
    add("--out-dir", help="run folder (default: a fresh runs/pretrain-NNN)")
    add("--resume", action="store_true", help="continue the run in --out-dir")
    add("--override", action="store_true",
        help="with --resume: go on with other settings than it began with")  # fmt: skip
    add("--overwrite", action="store_true", help="replace the run in --out-dir, what is in --save")
    add("--save", help="write the finished model here (default: model/ in the run folder)")
    return parser.parse_args(argv)


def first_layers(model: nn.Module, n: int) -> nn.Module:
    """A model of the first n blocks that shares every tensor with `model`."""
    short = empty_model(lambda: type(model)(replace(model.config, n_layers=n)))
    short.attention = model.attention
    for name, child in model.named_children():
        setattr(short, name, child[:n] if isinstance(child, nn.ModuleList) else child)
    return short


def prefix_loss(model: nn.Module, batch):
    """token_loss, but in training the last eighth of the rows passes only the first blocks, 1 to
    n - 1 of them drawn anew each time with a bent for few. Evaluation uses the whole model."""
    tokens, labels = batch[:2]
    n_layers, n_short = model.config.n_layers, len(tokens) // 8
    if not model.training or n_short == 0 or n_layers == 1:
        return token_loss(model, batch)
    depth = 1 + int((n_layers - 1) * float(torch.rand(())) ** 2)
    loss, count = token_loss(model, (tokens[:-n_short], labels[:-n_short]))
    short = first_layers(model, depth)
    short_loss, short_count = token_loss(short, (tokens[-n_short:], labels[-n_short:]))
    return loss + short_loss, count + short_count


def training_texts(
    n_stories: int, n_reviews: int, n_articles: int, unseen: set[str]
) -> list[str]:
    """Stories other than the unseen ones, pages of reviews, articles: one text is one row.

    Whole texts, because cut into windows of equal length half of all tokens would not see how
    their own story begins, and the model would learn to guess who is in it.
    """
    fresh = (story.text for story in stories(0) if story.text not in unseen)
    texts = list(itertools.islice(fresh, n_stories))
    short = [row["text"] for row in reviews(n_reviews, OTHERS_SEED)]
    texts += ["\n".join(short[i : i + REVIEWS_A_PAGE]) for i in range(0, n_reviews, REVIEWS_A_PAGE)]
    return texts + [row["article"] for row in articles(n_articles, OTHERS_SEED)]


def make_data(
    family: Family, n_stories: int, n_reviews: int, n_articles: int, n_held_out: int,
    vocab_size: int,
):  # fmt: skip
    """Tokenizer, encoded training texts and held-out stories, and the generator's own entropy on
    the latter in nats per token: an upper bound, and so what no model can be expected to pass by
    far."""
    held_out = list(itertools.islice(stories(HELD_OUT_SEED), n_held_out))
    unseen = {story.text for story in held_out}
    texts = training_texts(n_stories, n_reviews, n_articles, unseen)
    tokenizer = family.tokenizer.train(texts, vocab_size)
    rows = encode_samples([Sample("", text) for text in texts], tokenizer, 10**6).rows
    tests = encode_samples([Sample("", story.text) for story in held_out], tokenizer, 10**6).rows
    n_predicted = sum(len(row.tokens) - 1 for row in tests)
    return tokenizer, rows, tests, sum(s.nats for s in held_out) / n_predicted


def publish(
    family: Family, model: nn.Module, tokenizer, folder: Path, tests: Batches,
    device: torch.device, facts: dict,
) -> float:  # fmt: skip
    """Saves the model in bf16 and, beside it, its held-out loss as saved, whole and cut short,
    computed in fp32."""
    family.save(model.to(torch.bfloat16), tokenizer, folder)
    exact, model = choose_precision("fp32", device), model.float()
    loss = evaluate(model, token_loss, tests, exact)
    by_layers = {
        n: evaluate(first_layers(model, n), token_loss, tests, exact)
        for n in range(1, model.config.n_layers)
    }
    results = {"held_out_loss": loss, "held_out_loss_by_layers": by_layers}
    write_json(folder / "pretraining.json", results | facts | {"config": asdict(model.config)})
    return loss


def main(argv=None) -> float:
    args = parse_args(argv)
    device = choose_device(args.device)
    precision = choose_precision(args.precision, device)
    family = FAMILIES[args.model]
    if args.save and Path(args.save).exists() and not (args.overwrite or args.resume):
        raise UserError(f"--save {args.save}: exists already; add --overwrite to replace it")
    check_folder(args.out_dir, args.resume, args.overwrite)  # before minutes of work
    if args.resume and not args.override:
        check_settings(Path(args.out_dir), settings_of(args), args.override)
    tokenizer, rows, tests, entropy = make_data(
        family, args.stories, args.reviews, args.articles, args.held_out, args.vocab_size
    )
    config = family.config.preset(args.preset or family.bundled)
    config = replace(config, vocab_size=tokenizer.vocab_size)
    longest = max(len(row.tokens) for row in (*rows, *tests))
    if longest - 1 > config.max_seq_len:
        raise UserError(f"--vocab-size {args.vocab_size}: a text has {longest} tokens, the context "
                        f"is {config.max_seq_len}; raise it")  # fmt: skip
    folder = Path(args.out_dir) if args.out_dir else fresh_folder("runs", "pretrain")
    run = Run(folder, settings_of(args), args.resume, args.overwrite, override=args.override)
    pad_id, context = tokenizer.pad_id, config.max_seq_len
    batches = Batches(rows, args.batch_size, pad_id, args.seed, context)
    held_out = Batches(tests, 16, pad_id, None, context)
    torch.manual_seed(args.seed)
    model = family.model(config).to(device)
    model.attention = args.attention
    n_parameters = sum(p.numel() for p in model.parameters())
    n_tokens = sum(len(row.tokens) for row in rows)
    print(f"{n_parameters:,} parameters; {len(rows)} texts, {n_tokens:,} tokens a pass; "
          f"the generator's own entropy is at most {entropy:.4f} nats per token")  # fmt: skip
    settings = TrainSettings(
        lr=args.lr, schedule="cosine", epochs=args.epochs, max_iters=args.max_iters,
        accumulation_steps=args.accumulation_steps,
        weight_decay=args.weight_decay, betas=(0.9, 0.98), eval_every=args.eval_every,
    )  # fmt: skip
    n_steps = settings.n_steps(batches.groups_per_epoch(args.accumulation_steps))
    settings = replace(settings, warmup=min(100, n_steps // 10))
    progress, _ = train(model, prefix_loss, batches, held_out, settings, precision, run)
    plot_run(run.rows(), folder / "loss.png", floor=entropy)
    saved = Path(args.save) if args.save else folder / "model"
    loss = publish(family, model.eval(), tokenizer, saved, held_out, device, {
        "generator_entropy": entropy, "unit": "nats per token of whole stories, unseen seed",
        "seconds": progress.seconds, "tokens_seen": progress.tokens,
        "parameters": n_parameters, "settings": settings_of(args),
    })  # fmt: skip
    start = tokenizer.encode("One", bos=True)
    (new,) = generate(model, [start], 200, eos_id=tokenizer.eos_id, temperature=0.7, seed=0)
    print(f"\n{tokenizer.decode(start + new)}\n")
    print(f"saved {saved}; {progress.seconds / 60:.1f} minutes of training")
    print(f"held-out loss {progress.before:.4f} -> {loss:.4f}, entropy at most {entropy:.4f}")
    return loss


if __name__ == "__main__":
    with friendly_errors():
        main()

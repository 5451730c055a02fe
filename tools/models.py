"""What the tools share: the flags that name a model and how to sample, and loading it."""

import contextlib
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import gpt2
import llama
import phi
from minillm.adapt.lora import eval_exactly
from minillm.checkpoint import check_text
from minillm.cli import Parser, add_model_flags, pick, whole
from minillm.data.templates import Template, find_template, template_from
from minillm.errors import UserError
from minillm.family import Family
from minillm.files import read_json, write_json
from minillm.fingerprint import tokenizer_fingerprint
from minillm.hub import find_checkpoint
from minillm.peft_format import load_adapter, read_notes
from minillm.precision import DTYPES, choose_device, choose_precision
from minillm.sampling import Sampling

FAMILIES = (llama.FAMILY, gpt2.FAMILY, phi.FAMILY)


def add_adapted_model_flags(parser: Parser) -> None:
    """Which model, and which adapter on top of it."""
    add = add_model_flags(parser).add_argument
    add("--adapter", help="folder of what a fine-tuning kept, to put on top; it knows its base")
    add("--force", action="store_true", help="accept an adapter trained on another base")
    add("--template", help="prompt text (default: the adapter's own; none for a bare model)")
    add("--precision", choices=["auto", *DTYPES],
        help="dtype of the weights (default: fp32 on a CPU, else auto)")  # fmt: skip


def add_sampling_flags(parser: Parser, max_new_tokens: int | None = 200) -> None:
    """How many tokens (None: as many as the task asks for), and how each is chosen."""
    add = parser.add_argument_group("sampling").add_argument
    default = max_new_tokens or "the task's own"
    add("--max-new-tokens", type=whole, default=max_new_tokens,
        help=f"tokens written (default: {default})")  # fmt: skip
    add("--temperature", type=float, default=0.0, help="0 is greedy")
    add("--top-k", type=int, help="draw from the k likeliest tokens")
    add("--top-p", type=float, help="draw from the fewest tokens that reach this probability")
    add("--min-p", type=float,
        help="drop what has less than this share of the likeliest token's probability")  # fmt: skip
    add("--repetition-penalty", type=float, default=1.0,
        help="above 1 makes tokens seen (prompt included) less likely")  # fmt: skip
    add("--seed", type=whole, default=0)


def sampling_of(flags: dict) -> Sampling:
    """How tokens are chosen, of the flags by name; tells which of them do nothing because the
    likeliest is taken. Errors: UserError for a value outside its range."""
    sampling = pick(Sampling, flags)
    given = [name for name in ("top_k", "top_p", "min_p") if flags[name] is not None]
    given += ["seed"] if flags["seed"] else []
    if sampling.is_greedy and given:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        print(f"warning: {names}: no effect at --temperature 0", file=sys.stderr)
    return sampling


def add_stop_flag(parser: Parser) -> None:
    """For tools that write texts to look at."""
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", type=_line_breaks,
        help="end where this is written, and leave it out; \\n is a new line; may be "
        "repeated")  # fmt: skip


def _line_breaks(text: str) -> str:
    return text.replace("\\n", "\n")


def family_of(checkpoint: Path) -> Family:
    """The kind of model that a checkpoint holds, by its config.json; LLaMA if that does not say."""
    config = checkpoint / "config.json"
    content = read_json(config) if config.exists() else {}
    name = content.get("model_type") if isinstance(content, dict) else None
    return next((family for family in FAMILIES if family.name == name), llama.FAMILY)


def family_of_preset(name: str) -> Family:
    """The kind of model that has a published size of this name. Errors: UserError."""
    for family in FAMILIES:
        with contextlib.suppress(UserError):
            family.config.preset(name)
            return family
    raise UserError(f"--init {name}: no published size of that name; try gpt2 or llama-2-7b")


def kept_by(run: Path, suffix: str = "") -> tuple[str, Path]:
    """What a fine-tuning left in its folder, and the flag that takes it: an adapter or a model
    (`suffix` "_last": that of the last step)."""
    model = run / f"model{suffix}"
    if model.exists():
        return "--checkpoint", model
    return "--adapter", run / f"adapter{suffix}"


def save_model(model, tokenizer, folder: Path, template: Template | None) -> None:
    """Writes a model of any kind as a Hugging Face folder, and the prompt text it is used with.

    Errors: UserError for what such a folder cannot hold.
    """
    family = next((family for family in FAMILIES if isinstance(model, family.model)), None)
    if family is None:
        raise UserError(f"{folder}: a soft prompt or prefix is no part of the weights; keep it as "
                        "the adapter it is")  # fmt: skip
    family.save(model, tokenizer, folder)
    if template is not None:
        write_json(folder / "template.json", template.to_dict())


@dataclass(frozen=True)
class ModelOptions:
    """Which model, and which adapter on top of it: flags by their names."""

    checkpoint: str | Path | None
    adapter: str | None
    layers: int | None
    tokenizer: str | None
    template: str | None
    device: str
    precision: str | None
    force: bool
    attention: str

    @property
    def name(self) -> str:
        """What is loaded, as the flags have it."""
        return str(self.adapter or self.checkpoint or llama.FAMILY.bundled)


def load_model(options: ModelOptions):
    """(model, tokenizer, Template or None) as the flags ask, an adapter's base and a template found
    by themselves.

    Errors: UserError naming the file or flag.
    """
    adapter, template = options.adapter, options.template
    device = choose_device(options.device)
    precision = options.precision or ("fp32" if device.type == "cpu" else "auto")
    dtype = choose_precision(precision, device).dtype
    path, layers, notes = find_model(options.checkpoint, adapter, options.layers)
    model, text = family_of(path).load(path, layers, dtype, device, options.tokenizer)
    check_text(text, model.config.vocab_size, path)
    if adapter is not None:
        if not options.force:
            _check_match(adapter, notes, path, text)
        model = load_adapter(model, adapter, options.force)
    model.attention = options.attention
    if template is not None:
        return eval_exactly(model), text, None if template == "none" else find_template(template)
    stored, where = notes.get("template"), f"{adapter}/minillm.json"
    if adapter is None and (path / "template.json").exists():
        where = path / "template.json"
        stored = read_json(where)
    return eval_exactly(model), text, template_from(stored, where) if stored else None


def find_model(
    checkpoint: str | Path | None, adapter: str | None, layers: int | None
) -> tuple[Path, int | None, dict]:
    """Where the model is that the flags mean (an adapter knows its base), how many of its layers,
    and the adapter's notes. Errors: UserError naming the file or flag."""
    notes = read_notes(_check_adapter(Path(adapter))) if adapter is not None else {}
    if checkpoint is None and notes:
        checkpoint, layers = _find_base(adapter, notes.get("base")), layers or notes.get("layers")
    if checkpoint is None and adapter is not None:
        raise UserError(f"{adapter}: made elsewhere, its base is not known; add --checkpoint")
    return _check_model(find_checkpoint(checkpoint or llama.FAMILY.bundled)), layers, notes


def _check_adapter(folder: Path) -> Path:
    """Errors: UserError for what is no adapter's folder, with what was perhaps meant."""
    if (folder / "adapter_config.json").exists():
        return folder
    if (folder / "adapter" / "adapter_config.json").exists():
        raise UserError(f"{folder}: a run's folder; give {folder / 'adapter'}")
    if any((folder / name).exists() for name in ("model", "model.safetensors")):
        raise UserError(f"{folder}: a whole model or its run, no adapter; give it by --checkpoint")
    what = "no adapter_config.json in it" if folder.is_dir() else "no such folder"
    raise UserError(f"{folder}: {what}; give the folder of an adapter")


def _check_model(path: Path) -> Path:
    """Errors: UserError for a folder that is a run's or an adapter's, with what was meant."""
    if (path / "adapter_config.json").exists() and not (path / "config.json").exists():
        raise UserError(f"{path}: an adapter; give it by --adapter")
    if (path / "metrics.jsonl").exists():
        flag, kept = kept_by(path)
        raise UserError(f"{path}: a run's folder; give {flag} {kept}")
    return path


def _find_base(adapter: str, base: object) -> str:
    """Where an adapter's base is: as it was called from there, or under that name among the
    checkpoints beside this code. Errors: UserError."""
    for place in (base, Path(base).name) if isinstance(base, str) else ():
        with contextlib.suppress(UserError):
            return str(find_checkpoint(place))
    raise UserError(f"{adapter}: its base {base!r} is not here; add --checkpoint")


def _check_match(adapter: str, notes: dict, base: Path, tokenizer) -> None:
    """What load_adapter cannot see. Errors: UserError for another tokenizer than the training's,
    and for a merged base where only its fingerprint could tell which adapter is in it already."""
    known = notes.get("tokenizer_fingerprint")
    if known is not None and known != tokenizer_fingerprint(tokenizer):
        raise UserError(f"{adapter}: trained with another tokenizer than that of {base}; name its "
                        "own by --tokenizer, or add --force if you know better")  # fmt: skip
    if "base_fingerprint" not in notes and read_notes(base).get("merged"):
        raise UserError(f"{base}: has an adapter merged into it, perhaps this one; load the plain "
                        "base, or add --force if you know better")  # fmt: skip


def encode_prompt(tokenizer, template: Template | None, prompt: str, input: str = "") -> list[int]:
    """Prompt ids as in training: the template filled in, or the bare text, after BOS."""
    if template is not None:
        prompt = template.ask(prompt, input)
    return tokenizer.encode(prompt, bos=True)


class Stopwatch:
    """Tokens per second of the first step (prefill) and of the others (decode)."""

    def __init__(self, device: torch.device):
        self.device = device
        self.marks = [self._now()]
        self.decoded = 0

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def mark(self, n_tokens: int) -> None:
        """Called after every step with the number of rows that got a token."""
        self.marks.append(self._now())
        self.decoded += n_tokens if len(self.marks) > 2 else 0

    def summary(self, n_prompt: int) -> str:
        """One line, from the prompt tokens of all rows and the steps seen."""
        if len(self.marks) < 2:
            return "nothing generated"
        prefill, decode = self.marks[1] - self.marks[0], self.marks[-1] - self.marks[1]
        line = f"prefill {n_prompt} tokens, {n_prompt / prefill:.0f} tokens/s"
        if self.decoded:
            line += f"; decode {self.decoded} tokens, {self.decoded / decode:.0f} tokens/s"
        return line

"""A look inside: every tensor on a prompt's way through the model, and where attention looked.

    python tools/trace.py --prompt "Nora lost her red kite"
    python tools/trace.py --prompt "Nora lost her red kite" --blocks 0,5 --heads 0,1,2
    python tools/trace.py --prompt "Nora lost her red kite" --cached         one token, cache full
    python tools/trace.py --checkpoint gpt2 --adapter runs/finetune-gpt2-001/adapter --prompt "..."

A debugger, printed: the forward runs line by line, and each variable that holds a new tensor is a
row, under its name in the code and with the line that made it. "x", where a layer is listed, is
what it was given; "->" what came out without a name of its own. Norms are Frobenius norms;
largest is the largest absolute value; -inf is what a mask has hidden, and counts in neither.
Attention maps (the softmax of Vaswani et al. 2017, section 3.2.1) have a row for each token that
looks and a column for each that is seen. In fp32 LoRA is merged, as in generation: its product is
inside the weight.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor, nn

import minillm
from minillm.cli import Parser, pick, several, whole
from minillm.errors import UserError, friendly_errors
from minillm.plots import plot_attention
from minillm.runs import fresh_folder
from tools.models import FAMILIES, ModelOptions, add_adapted_model_flags, encode_prompt, load_model

ROOT = Path(minillm.__file__).parent.parent
ROOMS = {ROOT / family.model.__module__.split(".")[0] for family in FAMILIES}
ROOMS.add(ROOT / "minillm" / "adapt")
FILES = {ROOT / "minillm" / name for name in ("attention.py", "rope.py", "linear.py")}
HEADS = 8  # in the picture at most, unless asked for


@dataclass
class Row:
    """A tensor, the module and function that it belongs to, its name there and its line."""

    module: str
    function: str
    name: str
    tensor: Tensor
    line: str

    @property
    def place(self) -> str:
        """Module and function, the latter where it is not forward."""
        function = "" if self.function == "forward" else self.function
        return ".".join(word for word in (self.module, function) if word)


@dataclass
class Tracer:
    """Collects rows while it is the interpreter's trace function (sys.settrace)."""

    names: dict[nn.Module, str]
    rows: list[Row] = field(default_factory=list)
    seen: set[int] = field(default_factory=set)  # ids; the rows keep their tensors alive
    lines: dict[FrameType, int] = field(default_factory=dict)
    modules: dict[FrameType, str] = field(default_factory=dict)
    returned: list[Row] = field(default_factory=list)  # what no variable holds yet

    def __call__(self, frame: FrameType, event: str, value: object) -> Callable | None:
        file = Path(frame.f_code.co_filename)
        owner = frame.f_locals.get("self")
        if file not in FILES and file.parent not in ROOMS:
            return None
        if file.name == "linear.py" and owner is None or frame.f_code.co_name.startswith("_"):
            return None  # the product itself, whose layer has been named; bookkeeping
        self.modules[frame] = self.names.get(owner, self.modules.get(frame.f_back, ""))
        self.lines[frame] = frame.f_code.co_firstlineno
        self._look(frame)
        return self._step

    def _step(self, frame: FrameType, event: str, value: object) -> Callable:
        self._look(frame)
        self.lines[frame] = frame.f_lineno
        if event == "return":
            for tensor in value if isinstance(value, tuple) else (value,):
                if self._is_new(tensor):
                    self.returned.append(self._row(frame, "->", tensor))
        return self._step

    def _look(self, frame: FrameType) -> None:
        """Rows for the variables of a frame that hold a tensor not seen before; what a call has
        returned comes first, unless one of the variables is its name."""
        found = [(name, t) for name, t in frame.f_locals.items() if self._is_new(t)]
        for row in self.returned:
            if not any(row.tensor is t for _, t in found):
                self._add(row)
        self.returned = []
        for name, tensor in found:
            if self._is_new(tensor):  # two names, one tensor
                self._add(self._row(frame, name, tensor))

    def _row(self, frame: FrameType, name: str, tensor: Tensor) -> Row:
        file = Path(frame.f_code.co_filename).relative_to(ROOT)
        where = f"{file}:{self.lines[frame]}"
        return Row(self.modules[frame], frame.f_code.co_name, name, tensor, where)

    def _is_new(self, value: object) -> bool:
        is_tensor = isinstance(value, Tensor) and not isinstance(value, nn.Parameter)
        return is_tensor and id(value) not in self.seen

    def _add(self, row: Row) -> None:
        self.seen.add(id(row.tensor))
        self.rows.append(row)


@contextmanager
def tracing(model: nn.Module) -> Iterator[list[Row]]:
    """The rows of all that the model computes while it is on, in the order it came about."""
    tracer = Tracer({module: name for name, module in model.named_modules()})
    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        yield tracer.rows
    finally:
        sys.settrace(before)
        for row in tracer.returned:
            tracer._add(row)


@torch.no_grad()
def trace(model: nn.Module, tokens: list[int], cached: bool = False) -> list[Row]:
    """The rows of one forward of a prompt; `cached`: of its last token, the others in the cache."""
    device = next(model.parameters()).device
    ids = torch.tensor([tokens], device=device)  # (1, T)
    if not cached:
        with tracing(model) as rows:
            model(ids)
        return rows
    if len(tokens) < 2:
        raise UserError("--cached: one token has none before it; give a longer --prompt")
    cache = model.new_cache(1, len(tokens))
    model(ids[:, :-1], cache)
    with tracing(model) as rows:
        model(ids[:, -1:], cache)
    return rows


def attention_maps(rows: list[Row]) -> dict[str, Tensor]:
    """{block: its attention weights (H, T, S)}; none where attention is a fused kernel."""
    found = [row for row in rows if row.function == "causal_attention" and row.name == "weights"]
    return {row.module: row.tensor[0] for row in found}


def describe(row: Row) -> str:
    """A row's line: where, name, shape, dtype, norm, largest value, line of code."""
    shape = str(tuple(row.tensor.shape))
    kind = str(row.tensor.dtype).removeprefix("torch.")
    numbers, tensor = "", row.tensor.detach()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if tensor.is_floating_point():
        wide = tensor.double().flatten()
        hidden = int(wide.isneginf().sum())
        wide = wide[~wide.isneginf()]
        largest = float(wide.abs().max()) if len(wide) else 0.0
        numbers = f"{float(wide.norm()):11.4g}{largest:11.4g}"
        numbers += f"  {hidden} x -inf" if hidden else ""
    return f"{row.place:<36} {row.name:<12} {shape:<20} {kind:<10}{numbers:<36}{row.line}".rstrip()


def is_in(row: Row, blocks: list[str]) -> bool:
    """Whether a row is of one of the blocks of these names."""
    return any(row.module == name or row.module.startswith(f"{name}.") for name in blocks)


def check_numbers(flag: str, wanted: list[int], n: int) -> list[int]:
    """The numbers, each below n. Errors: UserError naming the flag."""
    if max(wanted) >= n:
        raise UserError(f"{flag} {max(wanted)}: there are 0 to {n - 1}; choose of these")
    return wanted


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--prompt", required=True, help="text to send through the model")
    parser.add_argument("--input", default="", help="the input that goes with an instruction")
    parser.add_argument("--cached", action="store_true",
        help="the last token alone, the others in the KV cache")  # fmt: skip
    parser.add_argument("--blocks", type=several(whole),
        help="numbers of blocks, from 0 (default: all; of the picture first, middle, "
        "last)")  # fmt: skip
    parser.add_argument("--heads", type=several(whole),
        help=f"numbers of heads in the picture (default: the first {HEADS})")  # fmt: skip
    parser.add_argument("--out-dir", help="folder of attention.png (default: a fresh one in runs/)")
    add_adapted_model_flags(parser)
    parser.set_defaults(attention="explicit")
    return parser.parse_args(argv)


def main(argv=None) -> list[Row]:
    args = parse_args(argv)
    model, tokenizer, template = load_model(pick(ModelOptions, vars(args)))
    tokens = encode_prompt(tokenizer, template, args.prompt, args.input)
    rows = trace(model, tokens, args.cached)
    modules = getattr(model, "model", model).blocks  # of the model inside a soft prompt or prefix
    blocks = [name for name, module in model.named_modules() if module in {*modules}]
    numbers = check_numbers("--blocks", args.blocks or [*range(len(blocks))], len(blocks))
    n_heads = model.config.n_heads
    heads = check_numbers("--heads", args.heads or [*range(min(HEADS, n_heads))], n_heads)
    print(f"{'in':<36} {'tensor':<12} {'shape':<20} {'dtype':<9}{'norm':>11}{'largest':>11}"
          f"{'':14}line")  # fmt: skip
    for row in rows:
        if not is_in(row, blocks) or is_in(row, [blocks[i] for i in numbers]):
            print(describe(row))
    maps = attention_maps(rows)
    if not maps:
        print("no attention maps: a fused kernel keeps no weights (--attention explicit does)")
        return rows
    if args.blocks is None:
        numbers = sorted({0, len(blocks) // 2, len(blocks) - 1})
    folder = Path(args.out_dir) if args.out_dir else fresh_folder("runs", "trace")
    folder.mkdir(parents=True, exist_ok=True)
    words = [tokenizer.decode([token]) or f"<{token}>" for token in tokens]
    chosen = {blocks[i]: maps[blocks[i]] for i in numbers}
    plot_attention(chosen, heads, words, folder / "attention.png")
    print(f"attention of {', '.join(chosen)} in {folder / 'attention.png'}")
    return rows


if __name__ == "__main__":
    with friendly_errors():
        main()

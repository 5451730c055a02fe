"""Fixtures: tiny random models, the real files where they are present, a tiny Meta folder."""

import gc
import json
import os
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from gpt2 import GPT2, GPT2Config, GPT2Tokenizer
from llama import Llama, LlamaConfig, LlamaTokenizer
from minillm import add_lora, mark_only_lora_as_trainable
from minillm.data.batches import Row
from minillm.precision import choose_precision
from phi import Phi, PhiConfig

ROOT = Path(__file__).parent.parent
SHARED = Path(os.environ.get("MINILLM_DATA", ROOT.parent / "shared" / "data"))
FP32 = choose_precision("fp32", "cpu")
TINY_LLAMA = ROOT / "checkpoints" / "tiny-llama"
TINY_GPT2 = ROOT / "checkpoints" / "tiny-gpt2"


def pytest_configure(config) -> None:
    """The normal suite compares a CPU's bits: a GPU is shown only to tests that ask for one."""
    asked = config.option.markexpr.replace("not gpu", "").replace("not reliability", "")
    if "gpu" not in asked and "reliability" not in asked:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def shared(name: str) -> Path:
    """A real file of the test data, or a skip with the reason."""
    if not (SHARED / name).exists():
        pytest.skip(f"real test data {name} is not on this machine (set MINILLM_DATA)")
    return SHARED / name


@pytest.fixture(scope="module", autouse=True)
def frozen():
    """What lives by now stays: the collections that runs begin with need not look through it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded():
    """Every test draws from the same stream, whatever ran before it."""
    if torch.cuda.is_available():
        torch.manual_seed(0)
    else:  # that would note down, in 5 ms, who wished to seed each kind of device that is not here
        torch.default_generator.manual_seed(0)


@pytest.fixture(params=[True, False], ids=["no 16 bits", "as here"])
def emulated(request, monkeypatch):
    """Products in 16 bits of a CPU that has none, or of this one."""
    if request.param:
        monkeypatch.setattr("minillm.linear._EMULATED", {torch.bfloat16, torch.float16})


@pytest.fixture
def native(monkeypatch):
    """Products in 16 bits are PyTorch's own, also on a CPU where fp32 is faster."""
    monkeypatch.setattr("minillm.linear._EMULATED", set())


@pytest.fixture(params=["mha", "gqa"])
def config(request) -> LlamaConfig:
    """A small model with as many key heads as query heads, and one with fewer."""
    return small_config(n_kv_heads=4 if request.param == "mha" else 2)


def small_config(n_kv_heads: int = 2, **changes) -> LlamaConfig:
    sizes = {
        "dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": n_kv_heads, "vocab_size": 2048,
        "hidden_dim": 48, "max_seq_len": 128,
    } | changes  # fmt: skip
    return LlamaConfig(**sizes)


def small_gpt2(**changes) -> GPT2Config:
    sizes = {"dim": 32, "n_layers": 2, "n_heads": 4, "vocab_size": 2048, "max_seq_len": 128}
    return GPT2Config(**(sizes | changes))


def sharp(model: nn.Module) -> nn.Module:
    """Weights large enough that attention is far from uniform and a wrong mask shows."""
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.normal_(0.0, 0.3)
            else:
                weight.uniform_(0.5, 1.5)
    return model


def small_phi(**changes) -> PhiConfig:
    sizes = {
        "dim": 32, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "vocab_size": 2048,
        "hidden_dim": 48, "max_seq_len": 128,
    }  # fmt: skip
    return PhiConfig(**(sizes | changes))


MODELS = {
    "llama-mha": lambda **changes: sharp(Llama(small_config(n_kv_heads=4, **changes))),
    "llama-gqa": lambda **changes: sharp(Llama(small_config(**changes))),
    "gpt2": lambda **changes: sharp(GPT2(small_gpt2(**changes))),
    "phi": lambda **changes: sharp(Phi(small_phi(**changes))),
}


@pytest.fixture
def tokenizer() -> LlamaTokenizer:
    """The bundled tokenizer (2,048 pieces)."""
    return LlamaTokenizer(TINY_LLAMA / "tokenizer.model")


@pytest.fixture(scope="session")
def bpe() -> GPT2Tokenizer:
    """A vocabulary of 300 tokens in GPT-2's form."""
    texts = ["the cat sat on the mat", "a cat and a hat", "it's 12 o'clock", "Label: positive",
             "Label: negative", "Text: whenever somebody listens"]  # fmt: skip
    return GPT2Tokenizer.train(texts, 300)


def write_meta(model: Llama, tokenizer: LlamaTokenizer, folder: Path, n_shards: int = 1) -> Path:
    """The model as Meta publishes one: consolidated.NN.pth per rank, params.json, tokenizer."""
    columns = ("wo", "w2", "tok_embeddings")
    folder.mkdir(parents=True, exist_ok=True)
    for rank in range(n_shards):
        state = {"rope.freqs": torch.ones(model.config.head_dim // 2)}
        for name, weight in model.state_dict().items():
            if weight.dim() == 1:
                state[name] = weight.clone()
            else:
                dim = 1 if name.split(".")[-2] in columns else 0
                state[name] = weight.chunk(n_shards, dim)[rank].clone()
        torch.save(state, folder / f"consolidated.{rank:02d}.pth")
    c = model.config
    multiple = c.hidden_dim
    params = {
        "dim": c.dim, "n_layers": c.n_layers, "n_heads": c.n_heads, "n_kv_heads": c.n_kv_heads,
        "norm_eps": c.norm_eps, "vocab_size": -1, "multiple_of": multiple,
        "ffn_dim_multiplier": c.hidden_dim / int(8 * c.dim / 3), "max_seq_len": c.max_seq_len,
    }  # fmt: skip
    (folder / "params.json").write_text(json.dumps(params))
    tokenizer.save(folder)
    return folder


def ragged_rows(n: int, seed: int = 0) -> list[Row]:
    """Rows of 5 to 40 tokens of which the last 1 to half are supervised."""
    stream = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(n):
        length = int(torch.randint(5, 40, (), generator=stream))
        tokens = torch.randint(0, 2048, (length,), generator=stream)
        labels = tokens.clone()
        labels[: int(torch.randint(length // 2, length - 1, (), generator=stream))] = -100
        rows.append(Row(tokens, labels))
    return rows


def lora_model(dropout: float = 0.0) -> Llama:
    """The same small LLaMA with trainable LoRA in every call."""
    torch.manual_seed(0)
    model = sharp(Llama(small_config()))
    add_lora(model, ("wq", "wv"), rank=4, alpha=8, dropout=dropout)
    return mark_only_lora_as_trainable(model)


def equal_states(a, b) -> bool:
    """Same names, same bits."""
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


class Products(TorchDispatchMode):
    """The shapes and dtypes of the matrices that are multiplied while it is on."""

    def __init__(self):
        super().__init__()
        self.shapes, self.dtypes = set(), set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "mm" in function.__name__:
            self.shapes.add(tuple(x.shape for x in args))
            self.dtypes.update(x.dtype for x in args)
        return function(*args, **(kwargs or {}))

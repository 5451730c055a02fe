"""Sections C to E: merged weights, equal gradients, broken data, numbers that are none."""

import copy
import itertools
import json
import math

import pytest
import torch

from gpt2 import GPT2, GPT2Tokenizer
from llama import Llama, LlamaTokenizer
from minillm import add_lora, mark_only_lora_as_trainable
from minillm.adapt.lora_linear import LoRALinear
from minillm.adapt.methods import MethodOptions, adapt
from minillm.checkpoint import check_text, check_tokenizer
from minillm.data.batches import Batches, Row, encode_samples
from minillm.data.samples import Sample
from minillm.data.tasks import TASKS
from minillm.data.templates import TEMPLATES
from minillm.errors import NumericError
from minillm.losses import token_loss
from minillm.peft_format import load_adapter, save_adapter
from minillm.precision import Precision
from minillm.runs import Run
from minillm.training import TrainSettings, train
from tests.conftest import MODELS, TINY_LLAMA, small_config
from tests.reliability.conftest import refused

pytestmark = pytest.mark.reliability
CPU = torch.device("cpu")
FP32 = Precision("fp32", CPU)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def ragged(n: int = 8) -> list[Row]:
    rows = []
    for i in range(n):
        tokens = torch.randint(2048, (5 + 3 * i,))
        labels = tokens.clone()
        labels[: 1 + i] = -100
        rows.append(Row(tokens, labels))
    return rows


def adapted(kind: str = "llama-gqa", dropout: float = 0.0, dtype=torch.float32):
    model = MODELS[kind]().to(dtype)
    add_lora(model.train(), ("c_attn",) if kind == "gpt2" else ("wq", "wv"), 4, 8, dropout)
    for layer in lora_layers(model):
        torch.nn.init.normal_(layer.lora_B, std=0.02)
    return mark_only_lora_as_trainable(model)


def lora_layers(model) -> list[LoRALinear]:
    return [m for m in model.modules() if isinstance(m, LoRALinear)]


def toggled(dtype) -> bool | str:
    model = adapted(dtype=dtype)
    before = [layer.weight.clone() for layer in lora_layers(model)]
    for _ in range(1000):
        model.eval()
        for layer in lora_layers(model):
            layer.lora_B.data.add_(torch.randn_like(layer.lora_B), alpha=1e-3)
        model.train()
    if not all(map(torch.equal, before, (layer.weight for layer in lora_layers(model)))):
        return "the base drifted"
    twin = copy.deepcopy(model.eval())
    model.load_state_dict(twin.state_dict())
    other = torch.float32 if dtype != torch.float32 else torch.float64
    moved = copy.deepcopy(model).to(other)
    want = [w.to(other) for w in before]
    for m, base in ((model, before), (twin, before), (moved, want)):
        m.train()
        if not all(map(torch.equal, base, (layer.weight for layer in lora_layers(m)))):
            return "a copy, load or move changed the base"
    return True


def test_c1_toggles(tally):
    found = {str(dtype): toggled(dtype) for dtype in DTYPES}
    tally("C1", found, "1,000 toggles each, then deepcopy, load and move while merged")


def test_c2_saved_while_merged(tmp_path, tally):
    found = {}
    for dtype in DTYPES:
        model, files = adapted(dtype=dtype), []
        for mode in (True, False):
            model.train(mode)
            torch.save(model.state_dict(), tmp_path / "x.pt")
            save_adapter(model, tmp_path / "a")
            adapter = (tmp_path / "a" / "adapter_model.safetensors").read_bytes()
            files.append(((tmp_path / "x.pt").read_bytes(), adapter))
        found[str(dtype)] = files[0] == files[1]
    tally("C2", found)


def test_c3_lora_that_cannot_be(tally):
    twice = adapted()
    tally("C3", {
        "twice": refused(lambda: add_lora(twice, ("wq",)), "has LoRA already"),
        "rank 0": refused(lambda: add_lora(MODELS["llama-gqa"](), ("wq",), rank=0), "rank 0"),
        "rank 33": refused(lambda: add_lora(MODELS["llama-gqa"](), ("wq",), rank=33), "rank 33"),
        "no target": refused(lambda: add_lora(MODELS["llama-gqa"](), ("wx",)), "'wx'"),
    }, "the scripts' --rank 0 is full fine-tuning, by design")  # fmt: skip


def test_c4_another_base(tmp_path, tally):
    save_adapter(adapted(), tmp_path / "a")
    wide = Llama(small_config(dim=64))
    tally("C4", {
        "other weights": refused(lambda: load_adapter(MODELS["llama-gqa"](), tmp_path / "a"),
                                 "another base", "--force"),
        "other size": refused(lambda: load_adapter(wide, tmp_path / "a", force=True)),
        "other family": refused(lambda: load_adapter(MODELS["gpt2"](), tmp_path / "a", True)),
    })  # fmt: skip


def gradients(model, rows, batch_size, checkpointing=False) -> list[torch.Tensor]:
    model.zero_grad()
    model.gradient_checkpointing = checkpointing
    torch.manual_seed(3)
    total = 0
    for batch in Batches(rows, batch_size, 0, None).group(0, len(rows)):
        loss, count = token_loss(model.train(), batch)
        loss.backward()
        total += int(count)
    return [p.grad / total for p in model.parameters() if p.grad is not None]


def test_c5_checkpointed_gradients(tally):
    found = {}
    for kind, lora, dropout in itertools.product(("llama-gqa", "gpt2"), (True, False), (0.0, 0.3)):
        model = adapted(kind, dropout) if lora else MODELS[kind]()
        if kind == "gpt2":
            model.dropout = dropout
        rows = ragged(4)
        plain, again = (gradients(model, rows, 2, on) for on in (False, True))
        same = all(map(torch.equal, plain, again))
        moving = all(bool(layer.lora_B.grad.any()) for layer in lora_layers(model))
        found[f"{kind}, LoRA {lora}, dropout {dropout}"] = same and moving
    tally("C5", found)


def test_c6_accumulation(tally):
    found = {}
    for kind, lora in itertools.product(("llama-gqa", "gpt2"), (True, False)):
        model, rows = adapted(kind) if lora else MODELS[kind](), ragged()
        one, eight = (gradients(model, rows, n) for n in (1, 8))
        worst = max(float((a - b).abs().max()) for a, b in zip(one, eight, strict=True))
        largest = max(float(b.abs().max()) for b in eight)
        found[f"{kind}, LoRA {lora}"] = worst <= 1e-6 * max(1.0, largest) or worst
    tally("C6", found, "1e-6 of the largest gradient")


GOOD = {"instruction": "Say hello.", "input": "", "output": "Hello."}


def test_d1_broken_data(tmp_path, tally):
    line = json.dumps(GOOD).encode()
    broken = {
        "empty": b"", "blank lines": b"\n\n\n", "bad JSON": line + b"\n{oops\n",
        "missing field": line + b'\n{"instruction": "x"}\n',
        "no text": line + b'\n{"instruction": 1, "output": "x"}\n',
        "invalid UTF-8": line + b"\n\xff\xfe\n", "one sample": line,
        "lone surrogate": line + b'\n{"instruction": "\\ud800", "output": "x"}\n',
    }  # fmt: skip
    file, template, found = tmp_path / "train.jsonl", TEMPLATES["alpaca"], {}
    for name, data in broken.items():
        file.write_bytes(data)
        place = f"{file}:2" if b"\n" in data and name != "blank lines" else str(file)
        found[name] = refused(lambda: TASKS["alpaca"].read(file, template), place)
    rows = [json.dumps(GOOD | {"instruction": f"Say {i}."}) for i in range(40)]
    huge = json.dumps(GOOD | {"output": "word " * 2_000_000})
    sound = {"CRLF": "\r\n".join(rows), "byte-order mark": "\ufeff" + "\n".join(rows),
             "10 MB line": "\n".join([*rows, huge])}  # fmt: skip
    for name, text in sound.items():
        data = text.encode()
        file.write_bytes(data)
        splits = TASKS["alpaca"].read(file, template)
        n = len(splits.train) + len(splits.validation)
        found[name] = n == 40 + (name == "10 MB line") or f"{n} samples"
    tally("D1", found, "fewer samples than a batch is a batch; one alone cannot be held out")


def test_skipped_rows_are_counted(tmp_path):
    good = [json.dumps(GOOD | {"instruction": f"Say {i}."}) for i in range(40)]
    (tmp_path / "x.jsonl").write_text("\n".join([*good, "{oops", '{"instruction": 1}']))
    bad: list[str] = []
    splits = TASKS["alpaca"].read(tmp_path / "x.jsonl", TEMPLATES["alpaca"], bad)
    assert len(splits.train) + len(splits.validation) == 40 and len(bad) == 2
    assert f"{tmp_path / 'x.jsonl'}:41" in bad[0]


def test_d2_lengths(tally):
    tokenizer = LlamaTokenizer(TINY_LLAMA / "tokenizer.model")
    long = encode_samples([Sample("Say:", " word" * 300)], tokenizer, 64)
    full = encode_samples([Sample("word " * 300, " yes"), Sample("Say:", " yes")], tokenizer, 64)
    empty = encode_samples([Sample("Say:", "")], tokenizer, 64)
    none = encode_samples([Sample("word " * 300, " yes")], tokenizer, 64)
    loss, count = token_loss(MODELS["llama-gqa"](), Batches(empty.rows, 1, 0).group(0, 1)[0])
    tally("D2", {
        "over-long": long.truncated == 1 and len(long.rows[0].tokens) == 64
        and int(long.rows[0].labels[-1]) != tokenizer.eos_id,
        "prompt fills the window": full.dropped == 1 and len(full.rows) == 1,
        "empty answer": int(count) == 1 and math.isfinite(float(loss.detach())),
        "all dropped": none.dropped == 1
        and refused(lambda: Batches(none.rows, 1, 0), "no samples left"),
    }, "a cut answer has no EOS")  # fmt: skip


def test_d3_control_tokens_in_text(bpe, tally):
    llama = LlamaTokenizer(TINY_LLAMA / "tokenizer.model")
    found = {}
    for text in ("<|endoftext|>", "</s>", "[INST]"):
        ids = {"llama": llama.encode(text), "gpt2": bpe.encode(text)}
        plain = llama.eos_id not in ids["llama"] and bpe.eos_id not in ids["gpt2"]
        back = llama.decode(ids["llama"]).strip(), bpe.decode(ids["gpt2"])
        found[text] = (plain and back == (text, text)) or str(back)
    tally("D3", found)


def test_d4_tokens_beyond_the_model(bpe, tally):
    from minillm import generate

    small = Llama(small_config(vocab_size=100))
    tally("D4", {
        "id beyond": refused(lambda: generate(small, [[5, 100]], 3), "0 to 99"),
        "other family's": refused(
            lambda: check_tokenizer(LlamaTokenizer(TINY_LLAMA / "tokenizer.model"), 50257, "x"),
            "the tokenizer has 2048 pieces, the model 50257"),
        "bytes over a small vocabulary": refused(
            lambda: check_text(LlamaTokenizer(None), 100, "x"), "the model, with 100"),
    })  # fmt: skip
    assert isinstance(bpe, GPT2Tokenizer)


def trained(model, loss_fn, folder, precision=FP32, **settings):
    run = Run(folder, {})
    settings = {"accumulation_steps": 1, "lr": 0.01, "save_every": 0.0} | settings
    batches = Batches(ragged(), 2, 0)
    return train(model, loss_fn, batches, None, TrainSettings(**settings), precision, run), run


def test_e1_overflows(tmp_path, capsys, tally):
    found = {}
    for name, at in {"once": {0}, "twice in a row": {1, 2}, "all": set(range(99))}.items():
        calls = itertools.count()

        def loss_fn(model, batch, calls=calls, at=at):
            loss, count = token_loss(model, batch)
            if next(calls) in at:  # the loss stays as it is, its gradient is infinite
                loss = loss + next(p for p in model.parameters() if p.requires_grad).sub(0).mul(
                    0).sum().sqrt()  # fmt: skip
            return loss, count

        def work(name=name, loss_fn=loss_fn):
            half = Precision("fp16", CPU)
            return trained(adapted(), loss_fn, tmp_path / name, half, schedule="linear")

        if name == "all":
            found[name] = refused(work, kind=NumericError)
            continue
        (progress, _), run = work()
        logged = capsys.readouterr().out.count("overflowed")
        steps = [row["step"] for row in run.rows()]
        found[name] = (steps == [1, 2, 3, 4] and logged >= len(at)) or (steps, logged)
        lrs = [row["lr"] for row in run.rows()]
        found[f"{name}: schedule"] = lrs == [0.01, 0.0075, 0.005, 0.0025] or lrs
    tally("E1", found, "taken again with the same samples, logged; 20 in a row end the run")


def test_e2_losses_that_are_no_number(tmp_path, tally):
    found = {}
    for name in ("fp32", "bf16"):
        def poisoned(model, batch, calls=itertools.count()):  # noqa: B008
            if next(calls) == 3:
                next(model.parameters()).data.fill_(math.nan)
            return token_loss(model, batch)

        folder = tmp_path / name
        precision = Precision(name, CPU)
        found[f"poisoned, {name}"] = refused(
            lambda f=folder, p=precision, fn=poisoned: trained(adapted(), fn, f, p),
            "step 4", "training samples", "step_000003.pt", kind=NumericError)  # fmt: skip
        state = Run(folder, {}, resume=True).load_newest()
        sound = all(bool(t.isfinite().all()) for t in state["model"].values())
        found[f"lr 1e30, {name}"] = sound and refused(
            lambda p=precision, f=folder: trained(GPT2(MODELS["gpt2"]().config), token_loss,
                                                  f"{f}-lr", p, lr=1e30, grad_clip=0.0),
            "last good checkpoint", kind=NumericError)  # fmt: skip
    tally("E2", found)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_e3_out_of_gpu_memory(tally):
    from minillm.errors import friendly_errors

    with pytest.raises(SystemExit) as ended, friendly_errors():
        torch.empty(2**50, device="cuda")
    tally("E3", {"allocation": ended.value.code == 2})


def test_a_method_without_anything_to_train_is_named():
    assert refused(lambda: adapt(MODELS["llama-gqa"](), None, "bitfit", MethodOptions()),
                   "no biases") is True  # fmt: skip

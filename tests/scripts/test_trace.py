"""tools/trace.py: the rows are what the model computes, and the model does not notice."""

import math
import re
import sys

import pytest
import torch

from minillm import add_lora
from minillm.adapt.prompts import PrefixTuning, SoftPrompt, prefix_of_text
from minillm.errors import UserError
from minillm.plots import plot_attention
from tests.conftest import MODELS, ROOT
from tools import trace

TOKENS = [5, 900, 17, 33, 17]


@pytest.fixture(params=MODELS)
def model(request):
    model = MODELS[request.param]().eval()
    model.attention = "explicit"
    return model


def test_the_last_row_is_the_logits_and_the_model_computes_as_ever(model):
    with torch.no_grad():
        before, tracer = model(torch.tensor([TOKENS])), sys.gettrace()
    rows = trace.trace(model, TOKENS)
    assert torch.equal(rows[-1].tensor, before) and sys.gettrace() is tracer


def test_every_name_stands_in_the_line_or_the_function_that_a_row_names(model):
    for row in trace.trace(model, TOKENS):
        file, _, number = row.line.partition(":")
        lines = (ROOT / file).read_text().splitlines()
        # the line of a def stands for what the function was given
        text = " ".join(lines[int(number) - 1 : int(number) + 9])
        assert row.name == "->" or row.name in text, row


def test_the_output_of_every_layer_is_there_by_its_module(model):
    outputs = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda _, __, out, name=name: outputs.update({name: out}))
    rows = trace.trace(model, TOKENS)
    found = {id(row.tensor): row.module for row in rows if row.name == "->"}
    inside = {name: out for name, out in outputs.items() if name != model.HEAD}
    assert inside and all(found[id(out)] == name for name, out in inside.items())


def test_attention_maps_are_shares_of_columns_not_after_the_row(model):
    maps = trace.attention_maps(trace.trace(model, TOKENS))
    assert len(maps) == model.config.n_layers
    for weights in maps.values():
        assert weights.shape == (model.config.n_heads, 5, 5)
        assert torch.allclose(weights.sum(-1), torch.ones(()), atol=1e-5)
        assert not weights.triu(1).any()


def test_a_cached_step_looks_as_the_whole_forward_does_in_its_last_row(model):
    whole = trace.attention_maps(trace.trace(model, TOKENS))
    step = trace.attention_maps(trace.trace(model, TOKENS, cached=True))
    for name in whole:
        assert torch.allclose(whole[name][:, -1:], step[name], atol=1e-5)


def test_a_fused_kernel_has_no_maps(model):
    model.attention = "sdpa"
    assert trace.attention_maps(trace.trace(model, TOKENS)) == {}


def test_a_prefix_is_seen_before_the_tokens(model):
    wrapped = PrefixTuning(model, prefix_of_text(model, [3, 4, 5])).eval()
    for weights in trace.attention_maps(trace.trace(wrapped, TOKENS)).values():
        assert weights.shape[1:] == (5, 8) and weights[:, :, :3].any()


def test_a_soft_prompt_is_seen_before_the_tokens(model):
    wrapped = SoftPrompt(model, torch.randn(2, model.config.dim)).eval()
    rows = trace.trace(wrapped, TOKENS)
    assert {weights.shape[1:] for weights in trace.attention_maps(rows).values()} == {(7, 7)}
    assert torch.equal(rows[-1].tensor, wrapped(torch.tensor([TOKENS])))


def test_merged_lora_adds_no_rows(model):
    before = [(row.module, row.tensor.shape) for row in trace.trace(model, TOKENS)]
    target = {"GPT2": "c_attn", "Phi": "q_proj"}.get(type(model).__name__, "wq")
    assert add_lora(model, [target], rank=4, alpha=8, dropout=0.0) == 2
    after = [(row.module, row.tensor.shape) for row in trace.trace(model.eval(), TOKENS)]
    assert after == before


def test_words_are_no_formulas_and_long_texts_fit_the_picture(tmp_path):
    words = ["$$", "$_$", "\\frac"] * 100
    plot_attention({"h.0": torch.rand(2, 300, 300)}, [0, 1], words, tmp_path / "a.png")
    header = (tmp_path / "a.png").read_bytes()[16:24]
    assert int.from_bytes(header[:4], "big") < 3000 > int.from_bytes(header[4:], "big")


def test_the_trace_function_before_is_put_back_after_an_error(model):
    def before(*_):
        return None

    tracer = sys.gettrace()  # a debugger's, or that of coverage
    sys.settrace(before)
    try:
        with pytest.raises(UserError):
            trace.trace(model, [1] * 500)
        assert sys.gettrace() is before
    finally:
        sys.settrace(tracer)


def test_a_norm_leaves_out_what_a_mask_hides(model):
    rows = trace.trace(model, TOKENS)
    masked = [row for row in rows if row.name == "scores"][1]
    values = masked.tensor[masked.tensor > -math.inf].double()
    assert f"{float(values.norm()):.4g}" in trace.describe(masked)
    n_hidden = model.config.n_heads * 10
    assert f"{n_hidden} x -inf" in trace.describe(masked)


def test_it_prints_the_blocks_asked_for_and_draws_their_heads(tmp_path, capsys, monkeypatch):
    drawn = []
    monkeypatch.setattr(trace, "plot_attention", lambda *what: (drawn.append(what),
                                                                plot_attention(*what)))  # fmt: skip
    trace.main(["--prompt", "Nora", "--blocks", "2", "--heads", "1", "--out-dir", str(tmp_path)])
    ((maps, heads, words, _),) = drawn
    assert list(maps) == ["layers.2"] and heads == [1]
    assert maps["layers.2"].shape == (6, len(words), len(words))
    out = capsys.readouterr().out
    (row,) = re.findall(r"layers\.2\.attention\.wq +-> +(.*)", out)
    assert row.startswith(f"(1, {len(words)}, 192)") and "float32" in row
    assert "layers.2.attention.wq" in out and "layers.1." not in out
    assert (tmp_path / "attention.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(("flag", "value"), [("--blocks", "6"), ("--heads", "6")])
def test_a_block_or_head_that_is_not_there_is_an_error(tmp_path, flag, value):
    with pytest.raises(UserError, match=f"{flag} 6: there are 0 to 5"):
        trace.main(["--prompt", "Nora", flag, value, "--out-dir", str(tmp_path)])


def test_complex_rows_have_the_norm_of_their_numbers():
    rows = [r for r in trace.trace(MODELS["llama-gqa"]().eval(), TOKENS) if r.tensor.is_complex()]
    assert rows
    for row in rows:
        shown = trace.describe(row).split("complex64")[1].split()[0]
        assert float(shown) == pytest.approx(float(row.tensor.abs().norm()), rel=1e-3)


def test_a_cached_step_is_of_one_column_and_nothing_before_it(model):
    rows = trace.trace(model, TOKENS, cached=True)
    whole = trace.trace(model, TOKENS)
    assert [(row.module, row.name) for row in rows if row.name == "q"] == [
        (row.module, row.name) for row in whole if row.name == "q"]  # fmt: skip
    assert {row.tensor.size(2) for row in rows if row.name == "q"} == {1}


def test_the_largest_number_is_the_largest_by_size():
    row = trace.Row("m", "f", "x", torch.tensor([-5.0, 1.0]), "file.py:1")
    assert trace.describe(row).split()[4:6] == [f"{26**0.5:.4g}", "5"]

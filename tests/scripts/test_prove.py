"""tools/prove.py holds on sound models, and every promise catches the bug that breaks it."""

import pytest
import torch
from torch import nn

import llama.checkpoint
import llama.model
import minillm.attention
import minillm.cross_entropy
import minillm.progress
import tools.promises
from gpt2 import GPT2, save_gpt2
from llama import Llama, save_llama
from minillm.adapt.lora_linear import LoRALinear
from minillm.errors import UserError
from minillm.text_stream import TextStream
from tests.conftest import TINY_LLAMA, sharp, small_config, small_gpt2
from tools import prove


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random model with fewer key heads than query heads, as a Hugging Face folder."""
    from llama import LlamaTokenizer

    torch.manual_seed(0)
    where = tmp_path_factory.mktemp("model")
    tokenizer = LlamaTokenizer(TINY_LLAMA / "tokenizer.model")
    save_llama(sharp(Llama(small_config())), tokenizer, where)
    return where


def run(folder, *flags):
    return prove.main(["--checkpoint", str(folder), "--toggles", "20", *flags])


def skip_without_peers() -> None:
    """What is not installed cannot be compared with."""
    for name in ("transformers", "peft"):
        pytest.importorskip(name)


def test_every_promise_holds_on_a_llama(folder, capsys):
    skip_without_peers()
    findings = run(folder)
    assert all(f.holds and f.reason is None for f in findings)
    assert {f.name for f in findings} == prove.PROMISES.keys()
    assert "all 14 promises hold" in capsys.readouterr().out


def test_every_promise_holds_on_a_gpt2_in_bf16(bpe, tmp_path):
    save_gpt2(sharp(GPT2(small_gpt2(vocab_size=bpe.vocab_size))), bpe, tmp_path / "model")
    assert all(f.holds for f in run(tmp_path / "model", "--precision", "bf16"))


@pytest.mark.parametrize("method", ["bitfit", "prompt_tuning"])
def test_a_promise_about_lora_does_not_apply_to_another_method(method, bpe, tmp_path):
    from minillm.adapt.methods import MethodOptions, adapt
    from minillm.peft_format import save_adapter

    skip_without_peers()
    plain = sharp(GPT2(small_gpt2(vocab_size=bpe.vocab_size)))
    save_gpt2(plain, bpe, tmp_path / "model")
    adapted, _ = adapt(plain, bpe, method, MethodOptions(virtual_tokens=3, prompt_text="the"))
    save_adapter(adapted, tmp_path / "adapter", str(tmp_path / "model"))
    findings = prove.main(["--adapter", str(tmp_path / "adapter")])
    skipped = {f.name for f in findings if f.reason is not None}
    assert skipped - {"packed"} == {"merged", "toggled", "saved-merged"}
    assert ("packed" in skipped) == (method == "prompt_tuning")


def test_the_attention_that_is_asked_for_is_the_one_that_is_proven(folder, monkeypatch):
    seen = set()
    watched = prove.Promise(lambda subject: seen.add(subject.model.attention) or 0.0, "watched")
    monkeypatch.setattr(prove, "PROMISES", {"cache": watched})
    run(folder, "--attention", "explicit")
    assert seen == {"explicit"}


def positions_from_zero(patch):
    plain = minillm.attention.positions
    patch.setattr(minillm.attention, "positions", lambda start, *rest: plain(0, *rest))


def paddings_are_seen(patch):
    plain = minillm.attention.attention_mask
    patch.setattr(minillm.attention, "attention_mask",
                  lambda start, n, pad, *rest: plain(start, n, pad if pad is None else pad * 0,
                                                     *rest))  # fmt: skip


def wrong_scale_spelled_out(patch):
    plain = llama.model.causal_attention
    patch.setattr(llama.model, "causal_attention",
                  lambda q, k, v, mask, mode, *rest: plain(q * (1.01 if mode == "explicit" else 1),
                                                           k, v, mask, mode, *rest))  # fmt: skip


def wrong_update_is_merged(patch):
    plain = LoRALinear.delta
    patch.setattr(LoRALinear, "delta", lambda self: 1.01 * plain(self))


def unmerging_by_subtraction(patch):
    def unmerge(self):
        if not self.has_weights_merged:
            return
        base = self._set_aside.pop()
        with torch.no_grad():
            base.copy_(self.weight - self.delta())
        self.weight, self.has_weights_merged = base, False

    patch.setattr(LoRALinear, "_unmerge", unmerge)


def merged_weights_are_saved(patch):
    patch.setattr(LoRALinear, "_save_to_state_dict", nn.Linear._save_to_state_dict)


def a_mean_of_means(patch):
    plain = tools.promises.token_loss

    def loss(model, batch):
        total, count = plain(model, batch)
        return total / count, torch.tensor(1)

    patch.setattr(tools.promises, "token_loss", loss)


def segments_see_each_other(patch):
    plain = llama.model.lay_out

    def lay_out(*given):
        x, columns = plain(*given)
        return x, columns._replace(mask=None) if given[-1] else columns

    patch.setattr(llama.model, "lay_out", lay_out)


def values_are_not_the_keys(patch):
    plain = minillm.cross_entropy.matmul
    patch.setattr(minillm.cross_entropy, "matmul", lambda p, w: plain(p, w.flip(0)))


def dropout_is_drawn_again(patch):
    plain = llama.model.checkpoint
    patch.setattr(llama.model, "checkpoint",
                  lambda *given, **how: plain(*given, preserve_rng_state=False, **how))  # fmt: skip


def random_streams_are_not_restored(patch):
    patch.setattr(minillm.progress, "set_rng_state", lambda state: None)


def rows_are_not_permuted(patch):
    patch.setattr(llama.checkpoint, "rope_to_halves", lambda weight, heads: weight)


def half_characters_are_shown(patch):
    def push(self, token):
        self.tokens.append(token)
        return self._show(self.text())

    patch.setattr(TextStream, "push", push)


def another_rope(patch):
    plain = llama.model.rope_table
    patch.setattr(llama.model, "rope_table", lambda p, width, theta: plain(p, width, 2 * theta))


BUGS = {
    "cache": positions_from_zero, "ragged": paddings_are_seen,
    "attention": wrong_scale_spelled_out, "merged": wrong_update_is_merged,
    "toggled": unmerging_by_subtraction, "saved-merged": merged_weights_are_saved,
    "accumulation": a_mean_of_means, "packed": segments_see_each_other,
    "cut": values_are_not_the_keys,
    "checkpointed": dropout_is_drawn_again, "resumed": random_streams_are_not_restored,
    "saved": rows_are_not_permuted, "streamed": half_characters_are_shown, "peers": another_rope,
}  # fmt: skip


def test_there_is_a_bug_for_every_promise():
    assert BUGS.keys() == prove.PROMISES.keys()


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_caught_by_the_promise_it_breaks(name, folder, monkeypatch, capsys):
    if name == "peers":
        skip_without_peers()
    BUGS[name](monkeypatch)
    with pytest.raises(SystemExit) as ended:
        run(folder, "--only", name)
    assert ended.value.code == 1 and f"BROKEN: {name}" in capsys.readouterr().out


def test_a_fault_that_is_refused_elsewhere_is_broken_and_not_the_users(folder, monkeypatch, capsys):
    """A base that unmerging has changed is another base to the adapter that is then saved."""
    unmerging_by_subtraction(monkeypatch)
    with pytest.raises(SystemExit) as ended:
        run(folder)
    assert ended.value.code == 1 and "toggled" in capsys.readouterr().out.split("BROKEN: ")[1]


def test_a_model_too_large_for_float64_is_refused_with_its_size(folder, monkeypatch):
    from minillm.errors import UserError

    monkeypatch.setattr(prove, "free_mib", lambda device: 0.5)
    with pytest.raises(UserError, match=r"needs .* MiB in float64, 0 are free; add --layers 1"):
        run(folder)


def constant(value: float, exact: bool = False) -> prove.Promise:
    return prove.Promise(lambda subject: value, "a constant", exact)


@pytest.mark.parametrize(("value", "exact", "dtype", "holds"), [
    (1e-6, False, torch.float32, False), (1e-11, False, torch.float32, True),
    (1e-11, True, torch.float32, False), (0.0, True, torch.float32, True),
    (float("inf"), False, torch.float32, False),
])  # fmt: skip
def test_a_promise_holds_up_to_its_bound(value, exact, dtype, holds):
    (finding,) = prove.prove({"x": constant(value, exact)}, lambda kind: None, dtype)
    assert finding.holds == holds


def test_a_promise_that_cannot_be_measured_is_broken():
    def fails(subject):
        raise UserError("no")

    promise = prove.Promise(fails, "fails")
    (finding,) = prove.prove({"x": promise}, lambda kind: None, torch.float32)
    assert not finding.holds and finding.reason == "no"


def test_a_distance_is_the_largest_and_of_no_number_infinite():
    one = torch.ones(4)
    assert tools.promises.distance(torch.tensor([1.0, 1, 1, 2]), one) == 1.0
    assert tools.promises.distance(one * float("nan"), one) == float("inf")


def test_only_what_is_asked_for_is_proven_on_the_layers_asked_for(folder):
    (finding,) = run(folder, "--only", "cache", "--layers", "1")
    assert finding.name == "cache" and finding.holds

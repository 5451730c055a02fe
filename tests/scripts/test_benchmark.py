"""tools/benchmark.py: both engines on the same weights, taking turns."""

import contextlib
import json
import statistics

import pytest
import torch

from minillm.data.batches import Row
from minillm.data.tasks import TASKS
from minillm.data.templates import find_template
from minillm.errors import UserError
from minillm.losses import IGNORED
from tests.conftest import TINY_GPT2, TINY_LLAMA
from tools import benchmark, limits
from tools.engines import Setup
from tools.match import Match, Worker
from tools.models import family_of_preset


def test_the_ratio_is_above_one_where_minillm_is_better():
    """The median over turns, each turn's two figures against one another."""
    speeds = {"minillm": [20.0, 30.0, 40.0], "transformers": [10.0, 15.0, 99.0]}
    row = benchmark.compare("decode", "fp32", "tokens/s", speeds, 0.5)
    assert row["minillm"] == 30 and row["transformers"] == 15 and row["ratio"] == 2
    waits = benchmark.compare("wait", "fp32", "ms", speeds, 0.5, less=True)
    assert waits["ratio"] == 0.5


def test_alone_minillm_is_ahead_of_nobody():
    row = benchmark.compare("decode", "fp32", "tokens/s", {"minillm": [1.0]}, None)
    assert "ratio" not in row and row["minillm"] == statistics.median([1.0])


@pytest.mark.parametrize(("masked", "labelled"), [(0.0, 256), (0.5, 128), (0.54, 118)])
def test_rows_carry_the_labels_that_were_asked_for(masked, labelled):
    family = family_of_preset("gpt2")
    (rows,) = benchmark.training_rows(None, None, family, masked, 256, 8, 50257)
    assert len(rows) == 8 and all(isinstance(row, Row) for row in rows)
    for row in rows:  # what is fed is all but the last token
        assert len(row.tokens) == 257 and int((row.labels[1:] != IGNORED).sum()) == labelled


def test_every_share_is_measured_with_every_batch_and_called_what_it_is():
    cases = benchmark.training_cases([0.0, 0.54], [1, 4], None, 8, 256, None)
    assert [*cases] == [
        (0.0, 1, "8 x 256, 100% labelled"), (0.0, 4, "8 x 256, 100% labelled, 4 a forward"),
        (0.54, 1, "8 x 256, 46% labelled"), (0.54, 4, "8 x 256, 46% labelled, 4 a forward"),
    ]  # fmt: skip
    of_a_file = benchmark.training_cases([0.0, 0.54], [1], "a.json", 8, 256, 512)
    assert [*of_a_file] == [(0.0, 1, "a.json, minillm packed to 512")]


def test_an_unknown_part_is_named(tmp_path):
    with pytest.raises(UserError, match="'speed' is unknown; choose from decode, context, train"):
        benchmark.main(["--parts", "speed", "--out-dir", str(tmp_path)])


def test_an_unknown_size_is_named():
    with pytest.raises(UserError, match="gpt-5: no published size of that name"):
        family_of_preset("gpt-5")


@pytest.mark.parametrize(("flags", "message"), [
    (["--init", "gpt2", "--layers", "99"], "12 layers"),
    (["--init", "gpt2", "--checkpoint", "tiny-gpt2"], "contradict"),
])  # fmt: skip
def test_weights_that_are_not_there_to_measure_are_refused(flags, message, tmp_path):
    with pytest.raises(UserError, match=message):
        benchmark.main(["--out-dir", str(tmp_path), *flags])


@pytest.mark.slow
def test_an_engine_that_fails_says_why(tmp_path):
    with pytest.raises(UserError, match="no such file or folder"):
        Match(Setup(tmp_path / "nothing", None, "fp32", "cpu", ("c_attn",))).__enter__()


def test_a_process_that_dies_is_told(tmp_path):
    with pytest.raises(UserError, match="ended"):
        worker = Worker("minillm", Setup(tmp_path, None, "fp32", "cpu", ("c_attn",)))
        worker.process.terminate()
        worker.process.join()
        worker.ask("facts")
    worker.close()


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["tiny-gpt2", "tiny-llama"])
def test_both_engines_are_measured_on_the_same_weights(preset, tmp_path, capsys):
    flags = ["--init", preset, "--parts", "decode,context,train", "--precision", "fp32"]
    small = ["--decode", "8,4", "--contexts", "16,32", "--tokens", "32", "--rows", "2"]
    benchmark.main([*flags, *small, "--repeats", "2", "--out-dir", str(tmp_path)])
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    kept = json.loads((tmp_path / "results.json").read_text())
    assert last["machine"] == kept["machine"] and last["limits"]["fp32"]["read"] > 0
    assert {row["what"].split(",")[0] for row in kept["results"]} >= {"decode 8 + 4", "LoRA step"}
    assert all(row["minillm"] > 0 and len(row["samples"]["minillm"]) for row in kept["results"])
    assert (tmp_path / "decode.png").exists()


class Scripted:
    """An engine whose answers are known, where a process would be; notes what it is asked."""

    def __init__(self, **answers):
        self.answers, self.asked = answers, []

    def ask(self, method: str, *arguments):
        self.asked.append((method, *arguments))
        found = self.answers.get(method)
        return found(*arguments) if callable(found) else found

    def close(self) -> None:
        self.asked.append("close")


def match(ours: Scripted, theirs: Scripted, dtype: str = "fp32") -> Match:
    """The two taking turns, in this process."""
    found = Match.__new__(Match)
    found.dtype, found.device = dtype, torch.device("cpu")
    found.workers = {"minillm": ours, "transformers": theirs}
    found.vocab_size, found.context = 50, 100
    return found


def seconds(first: float, later: float):
    return lambda prompt, n_new, use_cache: [first, *[later] * (n_new - 1)]


def test_the_first_turn_does_not_count():
    times = iter([9.0, 1.0, 2.0, 3.0])
    both = match(Scripted(decode=lambda: next(times)), Scripted(decode=0.0))
    assert both.turns(3, "decode")["minillm"] == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(("dtype", "apart", "is_same"), [
    ("fp32", 5e-4, True), ("fp32", 0.02, False), ("bf16", 0.05, True), ("bf16", 0.2, False),
    ("fp32", float("nan"), False),
])  # fmt: skip
def test_engines_that_say_something_else_are_not_compared(dtype, apart, is_same):
    theirs = Scripted(logits=torch.ones(1))
    both = match(Scripted(logits=torch.tensor([1.0 + apart])), theirs, dtype)
    refused = contextlib.nullcontext() if is_same else pytest.raises(UserError, match="differ")
    with refused:
        both.agree("logits", [1, 2])


def test_models_that_differ_are_not_begun_with_and_both_processes_end():
    facts = {"load": None, "facts": (50, 100)}
    both = match(Scripted(logits=torch.ones(1), **facts), Scripted(logits=torch.zeros(1), **facts))
    with pytest.raises(UserError, match="differ"):
        both.__enter__()
    assert all(worker.asked[-1] == "close" for worker in both.workers.values())


def test_decoding_is_counted_from_the_prompt_on_and_its_first_token_apart(monkeypatch):
    monkeypatch.setattr(benchmark, "read_rate", lambda device: 4000.0)
    ours = Scripted(decode=seconds(1.0, 0.5), decode_bytes=lambda n: 100.0 * n, prefill_flops=50.0)
    both = match(ours, Scripted(decode=seconds(2.0, 1.0)))
    limits = {"matmul": 200.0, "read": 1.0}
    speed, first = benchmark.measure_decode(both, "fp32", [8, 4], 2, limits)
    assert (speed["minillm"], speed["transformers"], speed["ratio"]) == (4 / 2.5, 4 / 5, 2)
    assert (first["minillm"], first["transformers"], first["ratio"]) == (1000, 2000, 2)
    assert ("decode_bytes", 10) in ours.asked and limits["read"] == 4000.0
    assert speed["share of limit"] == pytest.approx(4 / 2.5 * 1000 / 4000)
    assert first["share of limit"] == pytest.approx(50 / 200 / 1.0)


def test_a_token_at_a_length_leaves_the_prompt_out_where_it_is_cached():
    def steps(prompt, n_new, use_cache):
        return [100.0, *range(1, n_new)] if use_cache else [3.0, 1.0]

    ours = Scripted(decode=steps, decode_bytes=10.0, prefill_flops=20.0)
    both = match(ours, Scripted(decode=seconds(4.0, 4.0)))
    limits = {"matmul": 100.0, "read": 100.0}
    cached, plain = benchmark.measure_contexts(both, "fp32", [32, 95], 2, limits)
    assert (cached["minillm"], cached["transformers"], cached["ratio"]) == (4000, 4000, 1)
    assert (plain["minillm"], plain["ratio"]) == (2000, pytest.approx((4 / 3 + 4 / 1) / 2))
    assert {(len(call[1]), call[3]) for call in ours.asked if call[0] == "decode"} == {
        (32, True), (32, False)
    }  # fmt: skip
    assert cached["share of limit"] == pytest.approx(10 / 100 / 4.0)


def test_steps_are_timed_after_those_that_warm_up_and_by_the_tokens_that_are_fed():
    ours = Scripted(train_step=2.0, peak=300.0, loss=1.0, training_flops=60.0)
    both = match(ours, Scripted(train_step=4.0, peak=600.0, loss=1.0))
    (rows,) = benchmark.training_rows(None, None, family_of_preset("gpt2"), 0.0, 10, 3, 50)
    speed, peak = benchmark.measure_training(both, "fp32", "x", [rows], 4, {"matmul": 100.0})
    # 3 x 10 tokens
    assert (speed["minillm"], speed["transformers"], speed["ratio"]) == (15, 7.5, 2)
    assert speed["share of limit"] == pytest.approx(60 / 2 / 100)
    assert (peak["minillm"], peak["ratio"]) == (300, 2)
    asked = [call[0] for call in ours.asked if call[0] != "training_flops"]
    assert asked == ["prepare_training", "loss", "reset_peak", *["train_step"] * 6, "peak"]


def test_the_seed_is_that_of_the_weights(tmp_path):
    kept = []
    for i, seed in enumerate((3, 3, 4)):
        folder = tmp_path / str(i)
        benchmark.random_weights("tiny-gpt2", 1, seed, torch.float32, torch.device("cpu"), folder)
        kept.append((folder / "model.safetensors").read_bytes())
    assert kept[0] == kept[1] != kept[2]


def test_every_sample_of_a_file_is_in_a_step(tmp_path):
    rows = [{"instruction": f"Say {i}.", "input": "", "output": "a"} for i in range(40)]
    (tmp_path / "d.json").write_text(json.dumps(rows))
    tokenizer = str(TINY_LLAMA / "tokenizer.model")
    steps = benchmark.training_rows(
        str(tmp_path / "d.json"), tokenizer, family_of_preset("tiny-llama"), 0.0, 0, 8, 2048
    )
    task = TASKS["alpaca"]
    n = len(task.read(tmp_path / "d.json", find_template(task.template, task.field)).train)
    sizes = [len(step) for step in steps]
    assert sum(sizes) == n > 30 and set(sizes[:-1]) == {8} and 1 <= sizes[-1] <= 8


def test_rates_are_of_the_faster_product_and_of_all_bytes(monkeypatch):
    times = iter([0.5, 0.25])
    monkeypatch.setattr(limits, "median_seconds", lambda work, device: next(times))
    assert limits.product_rate(torch.device("cpu"), "fp32") == 2 * 2048**3 / 0.25
    monkeypatch.setattr(limits, "median_seconds", lambda work, device: 0.5)
    assert limits.read_rate(torch.device("cpu")) == 4 * 2**27 / 0.5


def test_the_first_two_calls_are_not_timed(monkeypatch):
    clock = iter([0.0, 9.0, 9.0, 18.0, 18.0, 19.0])
    monkeypatch.setattr(limits.time, "perf_counter", lambda: next(clock))
    assert limits.median_seconds(lambda: None, torch.device("cpu"), repeats=1) == 1.0


def test_the_peer_does_the_same_work():
    """On the same folder: no dropout but LoRA's, in train mode again after a loss, no early end."""
    pytest.importorskip("transformers"), pytest.importorskip("peft")
    from tools.peers import Peers

    setup = Setup(TINY_GPT2, 2, "bf16", "cpu", family_of_preset("tiny-gpt2").targets)
    peer = Peers(setup)
    assert {p.dtype for p in peer.model.parameters()} == {torch.bfloat16}
    seen = []
    handle = peer.model.get_input_embeddings().register_forward_pre_hook(
        lambda module, args: seen.append(args[0].size(1))
    )
    assert len(peer.decode([5, 6, 7], 40, True)) == 40 and seen == [3, *[1] * 39]
    seen.clear()
    assert len(peer.decode([5, 6, 7], 3, False)) == 3 and seen == [3, 4, 5]
    handle.remove()
    assert peer.model.generation_config.eos_token_id is None  # every answer is as long
    peer.prepare_training()
    (rows,) = benchmark.training_rows(None, None, family_of_preset("gpt2"), 0.0, 10, 2, 2048)
    peer.loss(rows)
    dropouts = {name: m.p for name, m in peer.model.named_modules()
                if isinstance(m, torch.nn.Dropout)}  # fmt: skip
    assert peer.model.training
    assert {p for name, p in dropouts.items() if "lora" in name} == {setup.lora_dropout}
    assert {p for name, p in dropouts.items() if "lora" not in name} <= {0.0}
    layers = [name for name, _ in peer.model.named_modules() if name.endswith(".mlp")]
    assert len(layers) == 2

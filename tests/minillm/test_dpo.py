"""DPO: its start, its gradient, its reference, and pairs that stay together."""

import copy
import json
import math

import pytest
import torch

from minillm import add_lora, generate, mark_only_lora_as_trainable
from minillm.data.batches import Row, collate
from minillm.data.preferences import PairBatches, encode_pairs, read_preferences
from minillm.data.samples import Sample
from minillm.data.templates import TEMPLATES
from minillm.dpo import DPO, kl_to_reference, preference_report
from minillm.errors import UserError
from minillm.losses import sequence_logprobs
from tests.conftest import FP32, MODELS
from train import dpo as script

KINDS = ("llama-gqa", "gpt2", "phi")
TARGETS = {"gpt2": ("c_attn",), "phi": ("q_proj", "v_proj")}


def pairs(n: int = 4):
    rows = []
    for i in range(2 * n):
        tokens = torch.randint(2048, (8 + 3 * i,))
        labels = tokens.clone()
        labels[:5] = -100
        rows.append(Row(tokens, labels))
    return collate(rows, 0)


def adapted(kind, dropout=0.0):
    model = MODELS[kind]().double()
    add_lora(model.train(), TARGETS.get(kind, ("wq", "wv")), 4, 8, dropout)
    return mark_only_lora_as_trainable(model)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lora", [True, False])
def test_it_begins_at_ln_2(kind, lora):
    model = adapted(kind, dropout=0.3) if lora else MODELS[kind]().double()
    loss, count, told = DPO(model, 0.1)(model.train(), pairs())
    assert float(loss) / int(count) == pytest.approx(math.log(2), abs=1e-6)
    assert float(told["margin"]) == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_equation_7(kind):
    model, batch, beta = adapted(kind), pairs(), 0.3
    for name, p in model.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(p, std=0.05)
    dpo = DPO(model, beta)
    dpo(model, batch)[0].backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    got = [p.grad.clone() for p in trained]
    policy = sequence_logprobs(model, batch)
    rewards = beta * (policy.detach() - dpo.reference_logprobs(model, batch))
    weight = torch.sigmoid(rewards[1::2] - rewards[0::2])
    want = torch.autograd.grad(-beta * (weight * (policy[0::2] - policy[1::2])).sum(), trained)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("lora", [True, False])
def test_the_reference_stays_when_the_model_moves(lora):
    model, batch = adapted("gpt2") if lora else MODELS["gpt2"]().double(), pairs()
    dpo = DPO(model, 0.1)
    before = dpo.reference_logprobs(model, batch)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    for mode in (True, False):
        torch.testing.assert_close(dpo.reference_logprobs(model.train(mode), batch), before)
    assert (sequence_logprobs(model, batch) - before).abs().max() > 1e-3


def test_a_layer_that_is_off_stays_off():
    model = adapted("llama-gqa").train()
    layer = model.layers[0].attention.wq
    layer.enabled = False
    DPO(model, 0.1)(model, pairs())
    assert not layer.enabled and model.layers[0].attention.wv.enabled


def test_a_beta_of_0_is_refused():
    """Every gradient would be 0."""
    with pytest.raises(UserError, match="--beta"):
        script.parse_args(["--beta", "0"])


def test_pairs_stay_together_in_every_order(tokenizer, tmp_path):
    rows = [{"prompt": f"Say {i}.", "chosen": f"{i}", "rejected": f"not {i}"} for i in range(30)]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    splits = read_preferences(tmp_path / "p.jsonl", TEMPLATES["alpaca"])
    encoded = encode_pairs(splits.train, tokenizer, 200)
    batches = PairBatches(encoded.rows, 6, tokenizer.pad_id, 5)
    seen = []
    for step in range(batches.groups_per_epoch(1)):
        (batch,) = batches.group(step, 1)
        texts = []
        for tokens, labels in zip(batch.tokens, batch.labels, strict=True):
            texts.append(tokenizer.decode(tokens[labels >= 0].tolist()))
        for chosen, rejected in zip(texts[0::2], texts[1::2], strict=True):
            assert rejected == f"not {chosen.strip()}"
        seen += texts
    assert len(seen) == 2 * len(splits.train)


def test_a_short_run_prefers_the_better_answers(tmp_path):
    found = script.main(["--layers", "1", "--samples", "64", "--held-out", "16", "--epochs", "2",
                         "--lr", "0.003", "--out-dir", str(tmp_path / "run")])  # fmt: skip
    assert found["before"]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert found["after"]["accuracy"] > 0.7 and found["after"]["kl"] > 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert {"margin", "accuracy"} <= rows[0].keys() and rows[-1]["margin"] > rows[0]["margin"]
    assert (tmp_path / "run" / "adapter" / "adapter_config.json").exists()


def test_of_one_held_out_pair_the_kl_has_no_error(tmp_path):
    script.main(["--samples", "2", "--held-out", "1", "--layers", "1", "--max-iters", "1",
                 "--no-save", "--out-dir", str(tmp_path / "run")])  # fmt: skip
    text = (tmp_path / "run" / "preferences.json").read_text()
    assert json.loads(text)["after"]["kl_error"] is None and "NaN" not in text


def test_broken_pairs_are_left_out_where_asked(tmp_path, capsys):
    from minillm.data.tasks import TASKS

    rows = [{"prompt": f"Say {i}.", "chosen": "a", "rejected": "b"} for i in range(20)]
    (tmp_path / "p.jsonl").write_text("\n".join([*map(json.dumps, rows), '{"prompt": 3}']))
    splits = TASKS["preferences"].splits(tmp_path / "p.jsonl", TEMPLATES["alpaca"], 9, 9, True)
    assert len(splits.train) + len(splits.validation) + len(splits.test) == 20
    assert "1 broken rows left out" in capsys.readouterr().err


@pytest.mark.parametrize("lora", [True, False])
def test_the_reference_has_no_dropout(lora):
    model, batch = adapted("gpt2") if lora else MODELS["gpt2"]().double(), pairs()
    model.train().dropout = 0.5
    want = sequence_logprobs(copy.deepcopy(model).eval(), batch)
    torch.testing.assert_close(DPO(model, 0.1).reference_logprobs(model, batch), want)


def test_a_report_on_preferences_has_no_dropout():
    model = adapted("gpt2")
    dpo = DPO(model, 0.1)
    model.train().dropout = 0.5
    found = preference_report(model, dpo, [pairs()], FP32)
    assert found["loss"] == pytest.approx(math.log(2), abs=1e-9) and found["n"] == 4


def test_a_tie_is_half_right():
    model = adapted("llama-gqa")
    assert float(DPO(model, 0.1)(model, pairs(4))[2]["accuracy"]) == 2.0


def test_the_kl_is_the_mean_of_what_drawn_answers_gained(tokenizer):
    class Nothing:  # a reference that gives everything log-probability 0
        def reference_logprobs(self, model, batch):
            return torch.zeros(len(batch.tokens))

    model, samples = MODELS["llama-gqa"](), [Sample(f"Say {i}.", "") for i in range(6)]
    kl, error = kl_to_reference(model.train(), Nothing(), tokenizer, samples, 8, seed=3)
    prompts = [tokenizer.encode(sample.prompt, bos=True) for sample in samples]
    answers = generate(model, prompts, 8, temperature=1.0, eos_id=tokenizer.eos_id, seed=3)
    gaps = []
    for prompt, answer in zip(prompts, answers, strict=True):
        logs = model(torch.tensor([prompt + answer])).log_softmax(-1)[0, len(prompt) - 1 : -1]
        gaps.append(logs.gather(-1, torch.tensor(answer)[:, None]).sum())
    gaps = torch.stack(gaps)
    assert kl == pytest.approx(float(gaps.mean()), rel=1e-4)
    assert error == pytest.approx(float(gaps.std()) / 6**0.5, rel=1e-4)


@pytest.mark.parametrize("long", ["chosen", "rejected"])
def test_a_pair_of_which_one_answer_would_be_cut_is_dropped(long, tokenizer):
    row = {"prompt": "Say it.", "chosen": " yes", "rejected": " no"}
    rows = [row, row | {long: " word" * 50}]
    samples = [Sample(r["prompt"], r["chosen"], row=r) for r in rows]
    encoded = encode_pairs(samples, tokenizer, 30)
    assert (len(encoded.rows), encoded.dropped) == (2, 1)
    assert all(row.tokens[-1] == tokenizer.eos_id for row in encoded.rows)


def test_pairs_come_in_another_order_every_epoch():
    rows = [Row(torch.tensor([1, i]), torch.tensor([-100, i])) for i in range(24)]
    batches = PairBatches(rows, 4, 0, 5)
    orders = [batches.order(epoch) for epoch in range(3)]
    assert all(sorted(order) == [*range(24)] for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    assert batches.rows_of_a_sample == 2  # what an error counts samples by


def test_the_scripts_settings_are_those_of_its_figures(tmp_path):
    flags = ["--layers", "1", "--samples", "16", "--held-out", "6", "--batch-size", "4",
             "--lr", "0.01", "--epochs", "1"]  # fmt: skip
    found = {}
    for beta in ("0.1", "0.8"):
        folder = tmp_path / beta
        found[beta] = script.main([*flags, "--beta", beta, "--out-dir", str(folder)])
        told = json.loads((folder / "preferences.json").read_text())
        assert told["before"] == found[beta]["before"] and told["after"] == found[beta]["after"]
        assert told["before"]["loss"] == pytest.approx(math.log(2)) != told["after"]["loss"]
        assert told["after"]["kl_n"] == 6 and told["after"]["n"] == 6
        assert len((folder / "metrics.jsonl").read_text().splitlines()) == 4  # steps of 4 pairs
    assert found["0.1"]["after"]["loss"] != found["0.8"]["after"]["loss"]


def test_pairs_are_not_packed():
    with pytest.raises(UserError, match="--pack"):
        script.parse_args(["--pack", "512"])

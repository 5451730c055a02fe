"""tools/lora_budget.py: the course's numbers, and counts against real modules."""

from pathlib import Path

import pytest
import torch
from torch import nn

from minillm.data.batches import Row, collate
from minillm.errors import UserError
from minillm.footprint import predict_footprint
from minillm.precision import Precision
from tests.conftest import ROOT
from tools import lora_budget
from tools.models import family_of

GPT3 = ["--init", "gpt-3", "--params", "175e9", "--targets", "q,v", "--rank", "4"]


def test_the_courses_answers():
    found = lora_budget.main(GPT3)
    assert found["full fine-tuning"] == 3.5e13
    assert found["adapted matrices"] == 100 * 57_982_058_496
    assert found["LoRA"] == 100 * 37_748_736
    assert found["LoRA and the shared base"] == pytest.approx(3.54e11, rel=1e-3)
    assert found["adapted matrices and the shared base"] == pytest.approx(6.15e12, rel=1e-3)


def test_half_as_many_matrices_leave_room_for_twice_the_rank():
    budget = str(100 * 37_748_736)
    found = lora_budget.main(["--init", "gpt-3", "--targets", "v", "--budget", budget])
    assert found["rank"] == 8


def test_no_rank_is_larger_than_a_matrix():
    assert lora_budget.main(["--init", "gpt2", "--budget", "1e12"])["rank"] == 768


def test_a_budget_below_rank_1_is_refused():
    with pytest.raises(UserError, match="rank 1 takes"):
        lora_budget.main(["--init", "gpt2", "--budget", "1000"])


@pytest.mark.parametrize(("preset", "targets", "count"), [
    ("llama-2-7b", "wq,wv", 32 * 2 * 4 * (4096 + 4096)), ("gpt2", "c_attn", 12 * 4 * (768 + 2304)),
])  # fmt: skip
def test_any_preset_and_targets(preset, targets, count):
    found = lora_budget.main(["--init", preset, "--targets", targets, "--models", "1"])
    assert found["LoRA"] == 2 * count


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-gpt2", "tiny-phi"])
def test_any_folder_with_a_config(name):
    folder = str(ROOT / "checkpoints" / name)
    found = lora_budget.main(["--init", folder, "--models", "1", "--bytes", "4"])
    model, _ = family_of(Path(folder)).load(folder)
    assert found["full fine-tuning"] == 4 * sum(p.numel() for p in model.parameters())


def test_training_memory_by_category():
    found = lora_budget.main(["--init", "gpt2", "--layers", "2", "--tokens", "64"])["training"]
    assert found["trainable weights"] == 4 * 2 * 4 * (768 + 2304)
    assert found["optimizer state"] == 2 * found["trainable weights"]


def test_the_courses_network(capsys):
    widths = [2 ** (10 - layer) for layer in range(11)]
    found = lora_budget.main(["--mlp", ",".join(map(str, widths)), "--rank", "4"])
    assert found == {
        "hidden units": 1022, "parameters": 700_073, "bitfit": 1023, "adapters": 9247,
    }  # fmt: skip
    out = capsys.readouterr().out
    for told in ("0.15%", "1.30% of the adapted network", "1.32% of the base"):
        assert told in out


def test_a_network_is_counted_as_pytorch_counts_it():
    widths, rank = [7, 5, 3], 2
    layers = [nn.Linear(a, b) for a, b in ((7, 5), (5, 3))]
    bottlenecks = [nn.Sequential(nn.Linear(n, rank), nn.Linear(rank, n)) for n in (5, 3)]
    found = lora_budget.main(["--mlp", ",".join(map(str, widths)), "--rank", str(rank)])
    assert found["parameters"] == sum(p.numel() for m in layers for p in m.parameters())
    assert found["adapters"] == sum(p.numel() for m in bottlenecks for p in m.parameters())


@pytest.mark.parametrize("argv", [[], ["--init", "gpt2", "--mlp", "2,1"], ["--mlp", "3"]])
def test_what_cannot_be_counted_is_refused(argv):
    with pytest.raises(UserError, match="give"):
        lora_budget.main(argv)
    assert torch.is_grad_enabled()


def test_shares_are_of_the_base_and_of_base_and_lora(capsys):
    lora_budget.main(["--init", "gpt2", "--params", "1e6", "--rank", "1", "--models", "90000"])
    out = capsys.readouterr().out
    lora = 12 * (768 + 2304)
    assert f"{lora / 1e6:.4%} of the base's 1,000,000, {lora / (1e6 + lora):.4%} of base" in out
    line = next(line for line in out.splitlines() if line.strip().startswith("LoRA  "))
    assert f"{90_000 * 2 * lora / 2**30:,.2f} GiB" in line and f"{2 * lora:,} each" in line


def test_the_rank_of_all_targets_is_that_of_the_narrowest():
    flags = ["--init", "llama-2-70b", "--layers", "1", "--targets", "wq,wk", "--budget", "1e12"]
    assert lora_budget.main(flags)["rank"] == 1024  # wk: 8 heads of 128


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_memory_is_that_of_the_model_it_would_train(precision, capsys):
    flags = ["--init", "tiny-llama", "--layers", "2", "--tokens", "40", "--precision", precision]
    found = lora_budget.main(flags)["training"]
    how = Precision(precision, torch.device("cpu"))
    model = lora_budget.adapted_model("tiny-llama", 2, None, 4)
    for p in model.parameters():
        p.data = p.data.to(torch.float32 if p.requires_grad else how.dtype)
    row = torch.zeros(41, dtype=torch.int64)  # 40 are fed
    batch = collate([Row(row, row)], 0)
    assert found == predict_footprint(model, batch, how, 8).rows()  # as one of eight forwards
    assert found["gradients"] == found["trainable weights"]
    assert f"{found['total'] / 2**20:,.1f}" in capsys.readouterr().out

"""tools/extract_lora.py: the nearest update of each rank, as an ordinary adapter."""

import contextlib
import copy
import json

import pytest
import torch
from torch.nn.modules.module import register_module_forward_pre_hook

from llama import Llama, load_llama, save_llama
from minillm.adapt.lora import lora_layers
from minillm.data.batches import encode_samples
from minillm.data.tasks import TASKS
from minillm.errors import UserError
from minillm.peft_format import load_adapter
from tests.conftest import MODELS, TINY_LLAMA
from tools import extract_lora
from tools.extract_lora import energy_kept, find_changes

ALL = {"gpt2": ["c_attn", "c_fc", "c_proj"], "phi": ["q_proj", "v_proj", "dense", "fc1"]}


def moved(model, rank: int | None = None):
    """A copy whose linear layers have moved, by matrices of a rank if one is given."""
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        for module in tuned.modules():
            if isinstance(module, torch.nn.Linear):
                rows, columns = module.weight.shape
                k = rank or min(rows, columns)
                module.weight += torch.randn(rows, k) @ torch.randn(k, columns) / 30
    return tuned


@pytest.mark.parametrize("kind", MODELS)
def test_all_ranks_give_the_fine_tuned_weights_back(kind):
    base = MODELS[kind]().eval()
    tuned = moved(base)
    changes = find_changes(base, tuned, ALL.get(kind, ["wq", "wk", "wv", "w2"]), 99)
    after = dict(tuned.named_modules())
    for name, change in changes.items():
        change.cut(99)
        found = change.layer.weight + change.layer.delta()
        assert torch.allclose(found, after[name].weight, atol=1e-5)
        change.exchange()
        assert torch.equal(change.layer.weight, after[name].weight)


def test_a_change_of_rank_3_is_whole_at_rank_3_and_not_before():
    base = MODELS["llama-gqa"]()
    changes = find_changes(base, moved(base, rank=3), ["wq", "w1"], 99)
    values = [s for change in changes.values() for s in change.values]
    assert energy_kept(values, 3) == pytest.approx(1, abs=1e-9)
    assert energy_kept(values, 2) < 0.99


def test_the_error_is_the_root_of_the_cut_values_squared():
    base = MODELS["llama-mha"]()
    tuned = moved(base)
    for name, change in find_changes(base, tuned, ["wq", "w2"], 99).items():
        change.cut(5)
        wanted = tuned.get_submodule(name).weight - change.layer.weight
        error = torch.linalg.matrix_norm(wanted - change.layer.delta())
        assert torch.allclose(error, change.values[0][5:].square().sum().sqrt(), rtol=1e-4)


def test_gradient_descent_finds_no_nearer_update_of_that_rank():
    base = MODELS["llama-mha"]()
    (change,) = find_changes(base, tuned := moved(base), ["layers.0.attention.wq"], 99).values()
    change.cut(4)
    wanted = tuned.layers[0].attention.wq.weight.detach() - change.layer.weight.detach()
    a, b = (p.detach().clone().requires_grad_() for p in change.layer.factors())
    distance = (wanted - b @ a).square().sum()
    assert all(g.abs().max() < 1e-4 * distance for g in torch.autograd.grad(distance, (a, b)))


def test_a_and_b_share_the_singular_values_evenly():
    base = MODELS["llama-mha"]()
    for change in find_changes(base, moved(base), ["wv"], 99).values():
        change.cut(6)
        a, b = change.layer.factors()
        s = torch.diag(change.values[0][:6])
        assert torch.allclose(a @ a.T, s, atol=1e-4) and torch.allclose(b.T @ b, s, atol=1e-4)


def test_slices_of_a_fused_layer_are_cut_each_for_itself():
    base = MODELS["gpt2"]()
    tuned = moved(base)
    for name, change in find_changes(base, tuned, ["q", "v"], 99).items():
        change.cut(99)
        found = (change.layer.weight + change.layer.delta()).chunk(3)
        after, before = tuned.get_submodule(name).weight.chunk(3), change.layer.weight.chunk(3)
        assert torch.allclose(found[0], after[0], atol=1e-5)
        assert torch.equal(found[1], before[1])  # k was not asked for
        assert torch.allclose(found[2], after[2], atol=1e-5)
        change.exchange()
        assert torch.equal(change.layer.weight, torch.cat((after[0], before[1], after[2])))


def test_a_model_that_has_not_changed_is_an_error():
    base = MODELS["llama-mha"]()
    with pytest.raises(UserError, match="equal in every target"):
        find_changes(base, copy.deepcopy(base), ["wq"], 99)


@pytest.fixture(scope="module")
def tuned_folder(tmp_path_factory):
    """The first layer of tiny-llama, as a fine-tuning might have moved it."""
    torch.manual_seed(3)
    model, tokenizer = load_llama(TINY_LLAMA, n_layers=1)
    with torch.no_grad():
        for p in model.parameters():
            p += torch.randn_like(p) * (2e-3 if p.dim() == 2 else 1e-3)
    main_direction = torch.outer(torch.randn(192), torch.randn(192))
    model.layers[0].attention.wq.weight.data += 0.02 * main_direction
    folder = tmp_path_factory.mktemp("tuned")
    save_llama(model, tokenizer, folder)
    return folder


def test_the_script_keeps_an_ordinary_adapter(tuned_folder, tmp_path, capsys):
    flags = ["--checkpoint", str(tuned_folder), "--held-out", "8", "--rank", "4", "--ranks", "1,64"]
    rows = extract_lora.main([*flags, "--out-dir", str(tmp_path), "--template", "alpaca"])
    assert [row["rank"] for row in rows] == [1, 4, 64, 192]
    assert "kept" in capsys.readouterr().out and (tmp_path / "spectrum.png").exists()
    told = json.loads((tmp_path / "extract.json").read_text())
    assert 0.5 < told["share_in_targets"] < 1
    model = load_adapter(load_llama(TINY_LLAMA, n_layers=1)[0], tmp_path / "adapter")
    layers = lora_layers(model)
    assert len(layers) == 7 and {len(m.lora_A) for m in layers.values()} == {4}
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["r"] == settings["lora_alpha"] == 4
    energies = [row["energy"] for row in rows]
    assert energies == sorted(energies) and energies[-1] == pytest.approx(1)


def test_peft_computes_what_the_extracted_adapter_does(tuned_folder, tmp_path):
    peft, transformers = (pytest.importorskip(name) for name in ("peft", "transformers"))
    flags = ["--checkpoint", str(tuned_folder), "--held-out", "4", "--rank", "8", "--ranks", "8"]
    extract_lora.main([*flags, "--targets", "wq,wv", "--out-dir", str(tmp_path / "out")])
    base, tokenizer = load_llama(TINY_LLAMA, n_layers=1)
    save_llama(base, tokenizer, tmp_path / "base")
    ours = load_adapter(base, tmp_path / "out" / "adapter").eval()
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base").float()
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "out" / "adapter").eval()
    tokens = torch.randint(3, 2048, (2, 24))
    with torch.no_grad():
        assert torch.allclose(ours(tokens), theirs(tokens).logits, atol=2e-4)


def test_where_only_targets_changed_all_ranks_have_the_fine_tuned_loss(tmp_path):
    model, tokenizer = load_llama(TINY_LLAMA, n_layers=1)
    with torch.no_grad():
        for layer in (model.layers[0].attention.wq, model.layers[0].feed_forward.w2):
            layer.weight += 0.05 * torch.randn_like(layer.weight)
    save_llama(model, tokenizer, tmp_path / "tuned")
    flags = ["--checkpoint", str(tmp_path / "tuned"), "--targets", "wq,w2", "--held-out", "4"]
    rows = extract_lora.main([*flags, "--ranks", "8", "--out-dir", str(tmp_path / "out")])
    told = json.loads((tmp_path / "out" / "extract.json").read_text())
    assert rows[-1]["loss"] == pytest.approx(told["tuned_loss"], rel=1e-6)
    assert told["share_in_targets"] == pytest.approx(1) and told["tuned_loss"] != told["base_loss"]


def test_a_rank_above_the_smaller_side_is_that_side(tuned_folder, tmp_path, capsys):
    flags = ["--checkpoint", str(tuned_folder), "--held-out", "2", "--rank", "100"]
    extract_lora.main([*flags, "--targets", "wk", "--ranks", "8", "--out-dir", str(tmp_path)])
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["r"] == 64 and "adapter of rank 64" in capsys.readouterr().out


def test_a_base_with_other_tensors_is_an_error(tuned_folder, tokenizer, tmp_path):
    save_llama(MODELS["llama-mha"](n_layers=1), tokenizer, tmp_path / "other")
    flags = ["--checkpoint", str(tuned_folder), "--held-out", "2", "--out-dir", str(tmp_path)]
    with pytest.raises(UserError, match="--base: its tensors are not those"):
        extract_lora.main([*flags, "--base", str(tmp_path / "other")])


def test_without_a_checkpoint_it_says_so():
    with pytest.raises(UserError, match="--checkpoint: none given"):
        extract_lora.main([])


def test_an_adapter_that_is_there_stays(tuned_folder, tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"mine")
    with pytest.raises(UserError, match="another --out-dir"):
        extract_lora.main(["--checkpoint", str(tuned_folder), "--out-dir", str(tmp_path)])
    assert (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes() == b"mine"


def test_the_table_says_how_far_each_rank_is_and_what_it_costs(tuned_folder, tmp_path, capsys):
    flags = ["--checkpoint", str(tuned_folder), "--held-out", "4", "--rank", "4", "--ranks", "2"]
    rows = extract_lora.main([*flags, "--targets", "wq,w2", "--out-dir", str(tmp_path)])
    sides = [(192, 192), (192, 512)]
    sizes = [sum(min(r, a) * (a + b) for a, b in sides) for r in (2, 4, 192)]
    assert [row["parameters"] for row in rows] == sizes
    lines = capsys.readouterr().out.partition("energy kept")[2].splitlines()
    for row in rows:
        line = next(line for line in lines if line.split()[:1] == [str(row["rank"])])
        assert f"{max(0.0, 1 - row['energy']) ** 0.5:.3f}" == line.split()[2]
    base, tuned = (load_llama(folder, n_layers=1)[0].state_dict()
                   for folder in (TINY_LLAMA, tuned_folder))  # fmt: skip
    squares = {name: float((tuned[name] - base[name]).double().square().sum()) for name in base}
    inside = sum(n for name, n in squares.items() if name.endswith(("wq.weight", "w2.weight")))
    told = json.loads((tmp_path / "extract.json").read_text())
    assert told["share_in_targets"] == pytest.approx(inside / sum(squares.values()), rel=1e-4)


def test_the_losses_are_of_what_the_task_holds_out_and_cut_where_asked(tokenizer):
    held_out, template = extract_lora.held_out_rows("alpaca", None, None, tokenizer, 6, 512)
    want = TASKS["alpaca"].splits(None, template, 1, 6).validation[:6]
    rows = encode_samples(want, tokenizer, 512).rows
    assert all(map(torch.equal, (r.tokens for r in held_out.rows), (r.tokens for r in rows)))
    short, _ = extract_lora.held_out_rows("alpaca", None, None, tokenizer, 30, 120)
    assert max(len(row.tokens) for row in short.rows) <= 120 < max(len(r.tokens) for r in rows)


def test_the_base_is_held_in_the_precision_asked_for(tuned_folder, tmp_path):
    seen = []
    handle = register_module_forward_pre_hook(
        lambda module, args: seen.append(next(module.parameters()).dtype)
        if isinstance(module, Llama) else None)  # fmt: skip
    extract_lora.main(["--checkpoint", str(tuned_folder), "--held-out", "2", "--rank", "2",
                       "--ranks", "2", "--targets", "wq", "--precision", "bf16",
                       "--out-dir", str(tmp_path)])  # fmt: skip
    handle.remove()
    assert set(seen) == {torch.bfloat16}


def test_a_long_sample_is_cut_where_asked(tuned_folder, tmp_path, capsys):
    flags = ["--checkpoint", str(tuned_folder), "--held-out", "3", "--rank", "2", "--ranks", "2",
             "--targets", "wq"]  # fmt: skip
    told = []
    for n in ("512", "70"):
        with contextlib.suppress(UserError):
            extract_lora.main([*flags, "--max-length", n, "--out-dir", str(tmp_path / n)])
        told.append([x for x in capsys.readouterr().out.splitlines() if x.startswith("held out")])
    assert told[0] != told[1]

"""Pickled weights: mapped into memory, and still no record taken for its neighbour's numbers."""

import io
import math
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file

from gpt2 import GPT2, load_gpt2, save_gpt2
from llama import Llama, load_llama, save_llama
from minillm.errors import UserError
from minillm.weights import open_weights
from tests.conftest import equal_states, sharp, small_config, small_gpt2

STATE = {"a": torch.randn(30, 5), "b": torch.randn(7), "c": torch.randn(30, 5)}


def write(file, compression: int = zipfile.ZIP_STORED, cut: str = "none"):
    """STATE as torch.save writes it, packed anew: one record cut to eight bytes."""
    torch.save(STATE, plain := io.BytesIO())
    with zipfile.ZipFile(plain) as old, zipfile.ZipFile(file, "w", compression) as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, content[:8] if name.endswith(f"data/{cut}") else content)
    return file


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_file_packed_anew_holds_the_same_numbers(tmp_path, compression):
    found = open_weights([write(tmp_path / "x.bin", compression)])
    for name, want in STATE.items():
        found[name].write_to(got := torch.empty_like(want))
        assert torch.equal(got, want)


@pytest.mark.parametrize("cut", "012")
def test_a_record_shorter_than_its_tensor_is_refused(tmp_path, cut):
    with pytest.raises(UserError, match="x.bin.*record"):
        open_weights([write(tmp_path / "x.bin", cut=cut)])


def test_tensors_that_share_a_record_are_read(tmp_path):
    whole = torch.randn(6, 4)
    torch.save({"whole": whole, "row": whole[2]}, tmp_path / "x.bin")
    found = open_weights([tmp_path / "x.bin"])
    found["row"].write_to(row := torch.empty(4))
    assert torch.equal(row, whole[2])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_weights_that_are_no_numbers_are_refused_with_their_file(tokenizer, tmp_path, bad):
    save_llama(Llama(small_config()), tokenizer, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][3, 5] = bad
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.safetensors: holds NaN or infinite"):
        load_llama(tmp_path)


def test_weights_too_large_for_fp16_are_refused_in_fp16_alone(tokenizer, tmp_path):
    save_llama(Llama(small_config()), tokenizer, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["model.norm.weight"][0] = 1e5
    save_file(state, tmp_path / "model.safetensors")
    load_llama(tmp_path)
    with pytest.raises(UserError, match="too large for torch.float16; use bf16 or fp32"):
        load_llama(tmp_path, dtype=torch.float16)


def test_the_prefix_that_compile_leaves_is_taken_off(bpe, tmp_path):
    save_gpt2(model := sharp(GPT2(small_gpt2(vocab_size=300))), bpe, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    save_file({f"_orig_mod.{k}": v for k, v in state.items()}, tmp_path / "model.safetensors")
    assert equal_states(load_gpt2(tmp_path)[0], model)


def test_of_more_than_ten_layers_the_first_are_kept(bpe, tmp_path):
    model = sharp(GPT2(small_gpt2(vocab_size=300, n_layers=12)))
    save_gpt2(model, bpe, tmp_path)
    for n in (1, 2, 11):
        short, _ = load_gpt2(tmp_path, n_layers=n)
        assert len(short.h) == n and equal_states(short.h[n - 1], model.h[n - 1])


def test_a_vocabulary_with_more_ids_than_the_model_is_refused(bpe, tmp_path):
    save_gpt2(GPT2(small_gpt2(vocab_size=bpe.vocab_size - 1)), bpe, tmp_path)
    with pytest.raises(UserError, match="300 pieces, the model 299"):
        load_gpt2(tmp_path)

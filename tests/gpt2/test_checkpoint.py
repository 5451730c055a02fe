"""Every way in and out of a GPT-2 file gives the same bits, and every damaged one a clear line."""

import base64
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from gpt2 import GPT2, load_gpt2, save_gpt2
from minillm import add_lora
from minillm.errors import UserError
from tests.conftest import equal_states, sharp, small_gpt2


@pytest.fixture
def model() -> GPT2:
    return sharp(GPT2(small_gpt2(vocab_size=300)))


@pytest.fixture
def folder(model, bpe, tmp_path):
    save_gpt2(model, bpe, tmp_path / "hf")
    return tmp_path / "hf"


def rewrite(folder, change) -> None:
    """Passes the folder's tensors through `change`."""
    path = folder / "model.safetensors"
    state = change(load_file(path))
    path.unlink()
    save_file(state, path)


def configure(folder, **fields) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_saved_and_loaded_it_is_the_same_bit_for_bit(model, folder, bpe):
    again, tokenizer = load_gpt2(folder)
    assert equal_states(again, model) and again.config == model.config
    assert tokenizer.ranks == bpe.ranks


def test_names_without_the_prefix_are_the_same_model(model, folder):
    """As on the hub, where the file also holds the causal masks."""

    def bare(state):
        masks = {"h.0.attn.bias": torch.ones(1, 1, 8, 8), "h.1.attn.masked_bias": torch.ones(())}
        return {k.removeprefix("transformer."): v for k, v in state.items()} | masks

    rewrite(folder, bare)
    assert equal_states(load_gpt2(folder)[0], model)


@pytest.mark.parametrize("modern", [True, False])
def test_a_pickled_file_is_the_same_model(model, folder, modern):
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    state |= {"lm_head.weight": state["transformer.wte.weight"]}
    torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=modern)
    assert equal_states(load_gpt2(folder)[0], model)


def test_the_square_matrix_is_transposed_too(model, folder):
    stored = load_file(folder / "model.safetensors")["transformer.h.0.attn.c_proj.weight"]
    assert torch.equal(stored, model.h[0].attn.c_proj.weight.t())


def test_transformers_round_trip_is_bit_identical(model, folder, bpe, tmp_path):
    transformers = pytest.importorskip("transformers")
    peer = transformers.AutoModelForCausalLM.from_pretrained(folder)
    peer.save_pretrained(tmp_path / "again")
    bpe.save(tmp_path / "again")
    assert equal_states(load_gpt2(tmp_path / "again")[0], model)
    text = "the cat's hat"
    ids = transformers.AutoTokenizer.from_pretrained(folder)(text).input_ids
    assert ids == bpe.encode(text)


def test_layers_keeps_the_first_blocks_and_reads_no_others(model, folder):
    rewrite(folder, lambda state: {k: v for k, v in state.items() if ".h.1." not in k})
    short, _ = load_gpt2(folder, n_layers=1)
    assert len(short.h) == 1 and equal_states(short.h[0], model.h[0])
    with pytest.raises(UserError, match="2 layers, not 3"):
        load_gpt2(folder, n_layers=3)


def test_without_a_vocabulary_text_is_bytes_with_a_warning(folder, capsys):
    (folder / "vocab.json").unlink()
    assert load_gpt2(folder)[1].vocab_size == 257
    assert "--tokenizer" in capsys.readouterr().err


def test_a_model_without_a_vocabulary_is_saved_and_loaded_again(model, folder, tmp_path):
    (folder / "vocab.json").unlink()
    save_gpt2(*load_gpt2(folder), tmp_path / "again")
    assert equal_states(load_gpt2(tmp_path / "again")[0], model)


def test_a_model_with_lora_is_not_saved_as_a_plain_one(model, bpe, tmp_path):
    add_lora(model, ("c_attn",), 4)
    with pytest.raises(UserError, match="save_adapter"):
        save_gpt2(model, bpe, tmp_path)


@pytest.mark.parametrize(
    "fields",
    [{"model_type": "llama"}, {"activation_function": "relu"}, {"n_inner": 77},
     {"scale_attn_by_inverse_layer_idx": True},
     {"add_cross_attention": True}, {"n_embd": "wide"}, {"n_head": 5}, {"n_layer": 0},
     {"architectures": ["GPT2ForSequenceClassification"]}],
)  # fmt: skip
def test_what_is_no_gpt2_is_refused_by_its_field(folder, fields):
    configure(folder, **fields)
    with pytest.raises(UserError, match=r"config\.json"):
        load_gpt2(folder)


def test_missing_extra_and_misshapen_tensors_are_named_together(folder):
    def damage(state):
        del state["transformer.ln_f.bias"]
        state["transformer.h.0.attn.c_attn.weight"] = torch.zeros(32, 95)
        return state | {"transformer.h.7.extra": torch.zeros(1)}

    rewrite(folder, damage)
    with pytest.raises(UserError) as error:
        load_gpt2(folder)
    for part in ("missing: ln_f.bias", "unexpected: h.7.extra", "c_attn.weight is (95, 32)"):
        assert part in str(error.value)


def test_one_tensor_without_the_prefix_is_the_only_one_named(folder):
    rewrite(folder, lambda state: state | {"v_head.weight": torch.zeros(1)})
    with pytest.raises(UserError, match=r": unexpected: v_head\.weight; these"):
        load_gpt2(folder)


@pytest.mark.parametrize(("key", "message"), [
    ("h.0.ln_1.weight", "h.0.ln_1.weight lacks the prefix transformer. of the others"),
    ("_orig_mod.transformer.h.0.ln_1.weight", "a second time"),
])  # fmt: skip
def test_a_tensor_that_is_there_twice_is_refused(folder, key, message):
    rewrite(folder, lambda state: state | {key: state["transformer.h.0.ln_1.weight"] + 1})
    with pytest.raises(UserError, match=message):
        load_gpt2(folder)


def test_a_tensor_without_the_prefix_of_the_others_is_named(folder):
    rewrite(folder, lambda s: {k.removeprefix("transformer.") if "ln_f.b" in k else k: v
                               for k, v in s.items()})  # fmt: skip
    with pytest.raises(UserError, match=r"ln_f\.bias lacks the prefix"):
        load_gpt2(folder)


def test_a_tiktoken_file_that_was_cut_is_known_by_its_length(folder, bpe):
    lines = [f"{base64.b64encode(token).decode()} {rank}" for token, rank in bpe.ranks.items()]
    cut = folder / "vocab.tiktoken"
    cut.write_text("\n".join(lines) + "\n")
    assert load_gpt2(folder, tokenizer=cut)[1].ranks == bpe.ranks
    cut.write_text("\n".join(lines[:-5]) + "\n")
    with pytest.raises(UserError, match="the tokenizer has 295 pieces, the model 300"):
        load_gpt2(folder, tokenizer=cut)


def test_a_vocabulary_of_another_model_is_refused(folder, bpe):
    rewrite(folder, lambda s: s | {"transformer.wte.weight": torch.zeros(5000, 32)})
    configure(folder, vocab_size=5000)
    with pytest.raises(UserError, match="300.*5000"):
        load_gpt2(folder)


@pytest.mark.parametrize(("name", "message"), [("", "no config"), ("absent", "no such folder")])
def test_a_folder_that_is_no_model_is_named(tmp_path, name, message):
    with pytest.raises(UserError, match=message):
        load_gpt2(tmp_path / name)


def test_a_head_of_its_own_comes_back_and_transformers_reads_it(bpe, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = sharp(GPT2(small_gpt2(vocab_size=bpe.vocab_size, tied_head=False)))
    save_gpt2(model, bpe, tmp_path)
    assert equal_states(load_gpt2(tmp_path)[0], model)
    peer = transformers.GPT2LMHeadModel.from_pretrained(tmp_path, attn_implementation="eager")
    tokens = torch.randint(bpe.vocab_size, (2, 64))
    assert torch.allclose(model(tokens), peer(tokens).logits, atol=1e-4)


def test_a_head_beside_a_tied_embedding_counts_where_it_differs(model, folder, capsys):
    transformers = pytest.importorskip("transformers")
    state = load_file(folder / "model.safetensors")
    head = state["transformer.wte.weight"].flip(0).contiguous()
    save_file(state | {"lm_head.weight": head}, folder / "model.safetensors", {"format": "pt"})
    peer = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokens = torch.randint(0, 300, (1, 70))
    got = load_gpt2(folder)[0](tokens)
    torch.testing.assert_close(got, peer(tokens).logits, atol=1e-4, rtol=0)
    assert "lm_head.weight is not the embedding" in capsys.readouterr().err

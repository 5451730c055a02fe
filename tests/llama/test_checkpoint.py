"""Every way in and out of a file gives the same bits, and every damaged file one clear line."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from llama import Llama, LlamaTokenizer, load_llama, save_llama
from minillm import generate
from minillm.checkpoint import empty_model
from minillm.errors import UserError
from tests.conftest import equal_states, shared, sharp, small_config, write_meta


@pytest.fixture
def model(config) -> Llama:
    return sharp(Llama(config))


@pytest.fixture
def folder(model, tokenizer, tmp_path) -> Path:
    save_llama(model, tokenizer, tmp_path / "hf")
    return tmp_path / "hf"


def shard(folder: Path, suffix: str) -> None:
    """Rewrites model.safetensors as two shards with an index, in either container."""
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    weight_map = {}
    for number, names in enumerate((sorted(state)[::2], sorted(state)[1::2]), 1):
        name = f"{stem}-{number:05d}-of-00002.{suffix}"
        part = {n: state[n] for n in names}
        (save_file if suffix == "safetensors" else torch.save)(part, folder / name)
        weight_map |= dict.fromkeys(names, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("layout", ["safetensors", "bin", "sharded", "sharded-bin", "legacy-bin"])
def test_hugging_face_layouts_load_bit_for_bit(model, folder, layout):
    if layout.startswith("sharded"):
        shard(folder, "bin" if layout == "sharded-bin" else "safetensors")
    elif layout != "safetensors":
        state = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        modern = layout == "bin"
        torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=modern)
    assert equal_states(load_llama(folder)[0], model)


@pytest.mark.parametrize("n_shards", [1, 2])
def test_meta_to_ours_to_hugging_face_to_ours_is_bit_identical(
    model, tokenizer, tmp_path, n_shards
):
    meta = write_meta(model, tokenizer, tmp_path / "meta", n_shards)
    ours, text = load_llama(meta)
    save_llama(ours, text, tmp_path / "hf")
    assert equal_states(load_llama(tmp_path / "hf")[0], model)


def test_eight_meta_shards_join(tokenizer, tmp_path):
    model = sharp(Llama(small_config(n_kv_heads=8, n_heads=8, dim=64, hidden_dim=96)))
    assert equal_states(load_llama(write_meta(model, tokenizer, tmp_path, 8))[0], model)


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_loads_what_we_write_with_equal_logits(tokenizer, tmp_path, tied):
    transformers = pytest.importorskip("transformers")
    model = sharp(Llama(small_config(tied_head=tied)))
    save_llama(model, tokenizer, tmp_path)
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens = torch.randint(0, 2048, (2, 64))
    torch.testing.assert_close(model(tokens), peer(tokens).logits, atol=1e-4, rtol=0)
    peer.save_pretrained(tmp_path / "again")
    tokenizer.save(tmp_path / "again")
    assert equal_states(load_llama(tmp_path / "again")[0], model)


def test_transformers_reads_our_tokenizer(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("google.protobuf")
    save_llama(Llama(small_config()), tokenizer, tmp_path)
    peer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "Nora went to the harbour."
    assert peer(text).input_ids == tokenizer.encode(text, bos=True)


def test_layers_keeps_the_first_blocks_and_reads_no_others(model, folder):
    """Planted: the second block lies in a damaged shard that must not be opened for --layers 1."""
    state = load_file(folder / "model.safetensors")
    state = {n: t for n, t in state.items() if ".layers.1." not in n}
    save_file(state, folder / "model.safetensors")
    short, _ = load_llama(folder, n_layers=1)
    assert len(short.layers) == 1
    assert equal_states(short.layers[0], model.layers[0])


def test_dtype_is_the_one_asked_for(folder):
    assert {p.dtype for p in load_llama(folder, dtype=torch.bfloat16)[0].parameters()} == {
        torch.bfloat16
    }


def test_a_saved_bf16_model_comes_back_in_the_same_bits(model, tokenizer, tmp_path):
    save_llama(model.bfloat16(), tokenizer, tmp_path)
    assert equal_states(load_llama(tmp_path, dtype=torch.bfloat16)[0], model)


def test_saving_over_the_folder_it_was_loaded_from_loses_nothing(model, folder, tokenizer):
    loaded, text = load_llama(folder)
    save_llama(loaded, text, folder)
    assert equal_states(load_llama(folder)[0], model)


def test_saved_files_follow_the_umask(folder):
    assert (folder / "model.safetensors").stat().st_mode & 0o044


def test_llama2c_file_gives_its_reference_text_with_and_without_cache():
    model, tokenizer = load_llama(shared("stories260K.bin"))
    prompt = tokenizer.encode("Once upon a time", bos=True)
    cached = generate(model, [prompt], 60)[0]
    assert cached == generate(model, [prompt], 60, use_cache=False)[0]
    text = tokenizer.decode(prompt + cached)
    start = "Once upon a time, there was a little girl named Lily. She loved to play outside"
    assert text.startswith(start + " in the park.")


def test_llama2c_tokenizer_encodes_as_llama2c_does():
    tokenizer = LlamaTokenizer(shared("tok512.bin"))
    text = "Once upon a time, there was a little"
    assert tokenizer.encode(text, bos=True)[:5] == [1, 403, 407, 261, 378]
    assert tokenizer.decode(tokenizer.encode("héllo 🙂  two")) == "héllo 🙂  two"


def test_llama2c_model_exports_to_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    model, tokenizer = load_llama(shared("stories260K.bin"))
    save_llama(model, tokenizer, tmp_path)
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens = torch.randint(0, 512, (1, 64))
    torch.testing.assert_close(model(tokens), peer(tokens).logits, atol=1e-4, rtol=0)


def test_every_faulty_name_is_listed_at_once(folder):
    state = load_file(folder / "model.safetensors")
    state["model.norm.weight"] = torch.ones(5)
    state["lm_head.bias"] = torch.ones(5)
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, folder / "model.safetensors")
    with pytest.raises(UserError) as error:
        load_llama(folder)
    for part in ("missing: layers.1.feed_forward.w3.weight", "unexpected: lm_head.bias",
                 "misshapen: norm.weight is (5,)"):  # fmt: skip
        assert part in str(error.value)


DAMAGE = {
    "truncated": lambda raw: raw[: len(raw) // 2],
    "cut in the header": lambda raw: raw[:40],
    "empty": lambda raw: b"",
    "garbage": lambda raw: b"\x93" * 5000,
    "LFS": lambda raw: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
    "HTML": lambda raw: b"<!DOCTYPE html><html>not found</html>",
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("container", ["safetensors", "bin", "pth", "llama2c"])
def test_a_damaged_weight_file_is_named_in_one_line(folder, model, tokenizer, damage, container):
    if container == "safetensors":
        file = folder / "model.safetensors"
    elif container == "bin":
        file = folder / "pytorch_model.bin"
        torch.save(load_file(folder / "model.safetensors"), file)
        (folder / "model.safetensors").unlink()
    elif container == "pth":
        folder = write_meta(model, tokenizer, folder.parent / "meta")
        file = folder / "consolidated.00.pth"
    else:
        file = folder = shutil.copy(shared("stories260K.bin"), folder.parent / "stories.bin")
        shutil.copy(shared("tok512.bin"), Path(file).parent)
    Path(file).write_bytes(DAMAGE[damage](Path(file).read_bytes()))
    with pytest.raises(UserError) as error:
        load_llama(folder)
    assert str(file) in str(error.value) and "\n" not in str(error.value)
    assert "; " in str(error.value)  # what; what to do


def test_no_pickle_is_executed(folder, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Bomb()}, folder / "pytorch_model.bin")
    with pytest.raises(UserError):
        load_llama(folder)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "sub/x.safetensors"])
def test_an_index_cannot_lead_out_of_its_folder(folder, name):
    (folder / "model.safetensors").rename(folder / "elsewhere.safetensors")
    index = {"weight_map": {"model.norm.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="leaves the folder"):
        load_llama(folder)


@pytest.mark.parametrize(
    "change",
    [{"rope_scaling": {"type": "linear", "factor": 2}}, {"attention_bias": True},
     {"model_type": "mistral"}, {"num_attention_heads": 5}, {"hidden_size": -1},
     {"rms_norm_eps": float("nan")}, {"num_hidden_layers": 10**12}, {"head_dim": 5},
     {"num_hidden_layers": 10**8}, {"quantization_config": {"bits": 4}}, {"hidden_size": "32"},
     {"architectures": ["LlamaForSequenceClassification"]}, {"partial_rotary_factor": 0.5},
     {"rope_scaling": {"type": ["x"]}}, {"max_position_embeddings": 0},
     {"rope_scaling": {"rope_type": "default", "rope_theta": 77.0}}, {"rope_scaling": 2},
     {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
     {"rope_parameters": {"type": "linear", "factor": 4}},
     {"rope_parameters": {"rope_type": None, "type": "linear", "factor": 4}}],
)  # fmt: skip
def test_a_config_that_is_not_llama_is_refused(folder, change):
    config = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="config.json"):
        load_llama(folder)


def test_more_layers_than_the_model_has_is_refused_with_both_numbers(folder):
    with pytest.raises(UserError, match="has 2 layers, not 3"):
        load_llama(folder, n_layers=3)


def test_a_tokenizer_of_another_size_is_refused(folder):
    with pytest.raises(UserError, match="tokenizer"):
        load_llama(folder, tokenizer=shared("tok512.bin"))


def test_a_folder_without_a_tokenizer_loads_with_bytes_and_a_warning(folder, capsys):
    (folder / "tokenizer.model").unlink()
    _, tokenizer = load_llama(folder)
    assert "no tokenizer" in capsys.readouterr().err
    text = "any text: 日本 🙂"
    assert tokenizer.decode(tokenizer.encode(text)) == text and tokenizer.vocab_size == 259


def test_integers_in_place_of_weights_are_refused(folder):
    state = load_file(folder / "model.safetensors")
    state["model.norm.weight"] = state["model.norm.weight"].to(torch.int8)
    save_file(state, folder / "model.safetensors")
    with pytest.raises(UserError, match="int8"):
        load_llama(folder)


def test_a_file_that_is_no_tokenizer_is_refused(folder):
    with pytest.raises(UserError, match="config.json"):
        load_llama(folder, tokenizer=folder / "config.json")


def test_differing_copies_of_a_norm_between_shards_are_refused(tokenizer, tmp_path):
    folder = write_meta(sharp(Llama(small_config())), tokenizer, tmp_path, 2)
    state = torch.load(folder / "consolidated.01.pth", weights_only=True)
    state["norm.weight"] += 1
    torch.save(state, folder / "consolidated.01.pth")
    with pytest.raises(UserError, match="norm.weight differs"):
        load_llama(folder)


MEMORY_PROBE = """
import sys, torch
from pathlib import Path
from llama import load_llama
def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) / 1024 for x in lines if x.startswith("RssAnon"))
import threading, time
load_llama(sys.argv[1], n_layers=1)  # what torch imports on its first load is not the model's
before, peak, done = anonymous(), [0.0], []
def watch():
    while not done:
        peak[0] = max(peak[0], anonymous()); time.sleep(0.001)
thread = threading.Thread(target=watch); thread.start()
model, _ = load_llama(sys.argv[1], dtype=getattr(torch, sys.argv[2]))
done.append(1); thread.join()
weights = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
print((max(peak[0], anonymous()) - before) / weights)
"""


DEEP = {"n_layers": 40, "hidden_dim": 1408}
WIDE = {"n_layers": 1, "hidden_dim": 2**15}  # a matrix is a third of the model


@pytest.mark.parametrize(
    "layout", ["hf", *(pytest.param(n, marks=pytest.mark.slow) for n in ("meta-1", "meta-2"))]
)
@pytest.mark.parametrize(("sizes", "dtype"), [
    pytest.param(DEEP, "bfloat16", marks=pytest.mark.slow), (DEEP, "float32"), (WIDE, "bfloat16"),
])  # fmt: skip
def test_loading_takes_no_more_memory_than_the_model(tokenizer, tmp_path, layout, sizes, dtype):
    """Private memory at the peak of loading, over the weights: the target is 1.1."""
    import subprocess
    import sys

    if not Path("/proc/self/status").exists():
        pytest.skip("private memory is read from /proc")
    config = small_config(dim=512, n_heads=8, n_kv_heads=8, **sizes)
    model = empty_model(lambda: Llama(config)).bfloat16().to_empty(device="cpu")
    for weight in model.parameters():
        nn.init.zeros_(weight)
    if layout == "hf":
        save_llama(model, tokenizer, tmp_path)
    else:
        write_meta(model, tokenizer, tmp_path, n_shards=int(layout[-1]))
    command = [sys.executable, "-c", MEMORY_PROBE, str(tmp_path), dtype]
    ratio = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert ratio <= 1.1


def test_shards_in_the_hubs_own_cache_load(folder, model):
    """There every file of a snapshot is a link to ../../blobs."""
    cache = folder.parent / "models--x--y"
    snapshot, blobs = cache / "snapshots" / "abc", cache / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    state = load_file(folder / "model.safetensors")
    save_file(state, blobs / "f00d")
    (snapshot / "model-00001-of-00001.safetensors").symlink_to("../../blobs/f00d")
    index = {"weight_map": dict.fromkeys(state, "model-00001-of-00001.safetensors")}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    for file in folder.glob("*"):
        if file.suffix != ".safetensors":
            shutil.copy(file, snapshot)
    again, _ = load_llama(snapshot)
    assert equal_states(again, model)


def test_a_head_beside_a_tied_embedding_counts_where_it_differs(tokenizer, tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    save_llama(sharp(Llama(small_config(tied_head=True))), tokenizer, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    for change in (0.0, 0.5):  # twice the same, then another
        state["lm_head.weight"] = state["model.embed_tokens.weight"] + change
        save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
        model, tokens = load_llama(tmp_path)[0], torch.randint(0, 2048, (1, 70))
        peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        torch.testing.assert_close(model(tokens), peer(tokens).logits, atol=1e-4, rtol=0)
        assert model.config.tied_head is (change == 0)
    assert "lm_head.weight is not the embedding" in capsys.readouterr().err


def test_ids_too_few_for_bytes_are_told_and_the_model_computes(tmp_path, tokenizer, capsys):
    save_llama(Llama(small_config(vocab_size=128)), LlamaTokenizer(None), tmp_path)
    model, _ = load_llama(tmp_path)
    assert "128 ids, too few for text taken as bytes" in capsys.readouterr().err
    assert len(generate(model, [[5, 127]], 4)[0]) == 4


@pytest.mark.parametrize("fields", [
    {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 0}},
])  # fmt: skip
def test_what_rope_parameters_say_is_read(folder, fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises(UserError, match="llama3|rope_theta is 0"):
        load_llama(folder)


def test_beside_a_tokenizer_of_another_kind_text_is_bytes_with_a_warning(folder, capsys):
    (folder / "tokenizer.model").unlink()
    (folder / "tokenizer.json").write_text('{"model": {"type": "BPE"}}')
    assert load_llama(folder)[1].is_bytes
    warned = capsys.readouterr().err
    assert "tokenizer.json: no tokenizer of Llama's kind" in warned and "bytes" in warned


def test_a_head_that_metas_file_lost_is_missed(tokenizer, tmp_path):
    write_meta(sharp(Llama(small_config(tied_head=True))), tokenizer, tmp_path)
    with pytest.raises(UserError, match=r"missing: output\.weight"):
        load_llama(tmp_path)


def test_metas_rope_theta_counts(tokenizer, tmp_path):
    model = sharp(Llama(small_config(rope_theta=77.0)))
    write_meta(model, tokenizer, tmp_path)
    path = tmp_path / "params.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rope_theta": 77.0}))
    again, _ = load_llama(tmp_path)
    tokens = torch.randint(2048, (1, 40))
    assert again.config == model.config and torch.equal(again(tokens), model(tokens))


@pytest.mark.parametrize("field", ["sliding_window", "moe", "use_scaled_rope", "head_dim"])
def test_what_meta_folders_of_other_models_say_is_refused(field, tokenizer, tmp_path):
    write_meta(sharp(Llama(small_config())), tokenizer, tmp_path)
    path = tmp_path / "params.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: 4096}))
    with pytest.raises(UserError, match=rf"params\.json: {field} 4096"):
        load_llama(tmp_path)


@pytest.mark.parametrize(("key", "more", "message"), [
    ("model.layers.0.self_attn.q_proj.weight", "layers.0.attention.wq.weight", "is Meta's name"),
    (None, "layers.0.attention.wq.weight", "is Meta's name"),
    (None, "_orig_mod.model.norm.weight", "is model.norm.weight a second time"),
    (None, "model.layers.0.self_attn.q_proj", "unexpected: model.layers.0.self_attn.q_proj;"),
])  # fmt: skip
def test_a_tensor_under_another_name_is_refused_beside_its_own_or_in_its_place(
    folder, key, more, message
):
    state = load_file(folder / "model.safetensors")
    like = state["model.norm.weight"] if "norm" in more else state[
        "model.layers.0.self_attn.q_proj.weight"]  # fmt: skip
    (folder / "model.safetensors").unlink()
    state = {name: value for name, value in state.items() if name != key}
    save_file(state | {more: like.clone()}, folder / "model.safetensors")
    with pytest.raises(UserError, match=message):
        load_llama(folder)


def test_hugging_faces_weights_count_where_params_json_lies_beside_them(folder, model):
    (folder / "params.json").write_text("{}")
    assert equal_states(load_llama(folder)[0], model)


def test_texts_that_begin_otherwise_are_refused(folder):
    (folder / "tokenizer_config.json").write_text('{"add_prefix_space": false}')
    with pytest.raises(UserError, match=r"tokenizer_config\.json: add_prefix_space False"):
        load_llama(folder)


def test_an_end_that_the_tokenizer_does_not_know_is_told(folder, capsys):
    path = folder / "config.json"
    for end, is_told in ((2, False), ([2, 5], False), (7, True), ([7, 8], True)):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": end}))
        load_llama(folder)
        assert ("is not the tokenizer's 2" in capsys.readouterr().err) is is_told


def test_added_tokens_that_are_not_read_are_told(folder, capsys):
    (folder / "added_tokens.json").write_text('{"<s>": 1, "<|im_start|>": 2048}')
    load_llama(folder)
    told = capsys.readouterr().err
    assert "added later (<|im_start|>) are taken as plain text" in told


def test_an_adapter_in_the_models_folder_is_told_not_to_count(folder, capsys):
    (folder / "adapter_config.json").write_text("{}")
    load_llama(folder)
    assert f"add --adapter {folder}" in capsys.readouterr().err


def test_a_missing_shard_of_metas_is_named(tokenizer, tmp_path):
    model = sharp(Llama(small_config(n_kv_heads=4, n_heads=4, dim=64, hidden_dim=96)))
    write_meta(model, tokenizer, tmp_path, 4)
    (tmp_path / "consolidated.01.pth").unlink()
    with pytest.raises(UserError, match=r"no consolidated\.01\.pth"):
        load_llama(tmp_path)

"""Section B: model files that are cut, forged, swapped or malicious."""

import hashlib
import io
import json
import os
import pickle
import struct
import time
import warnings
import zipfile
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import load_file, save_file

from gpt2 import GPT2, load_gpt2, save_gpt2
from llama import Llama, LlamaTokenizer, load_llama, save_llama
from minillm import hub
from minillm.errors import UserError
from minillm.weights import open_weights
from tests.conftest import TINY_LLAMA, small_config, small_gpt2
from tests.reliability.conftest import refused

pytestmark = pytest.mark.reliability
HTML = b"<!DOCTYPE html><html><body>Sign in</body></html>" * 5
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"


def safetensors(header, data: bytes = b"", length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def entry(dtype="F32", shape=(2, 2), offsets=(0, 16)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


SOUND = safetensors({"a": entry()}, bytes(16))
HEADER = len(SOUND) - 16
FORGED = {
    "empty": b"", "cut at 4": SOUND[:4], "cut at 8": SOUND[:8], "mid-header": SOUND[:30],
    "end of header": SOUND[:HEADER], "mid-data": SOUND[:-7], "one byte less": SOUND[:-1],
    "one byte more": SOUND + b"x", "length 2^40": safetensors({"a": entry()}, bytes(16), 2**40),
    "overlap": safetensors({"a": entry(), "b": entry(offsets=(8, 24))}, bytes(24)),
    "hole": safetensors({"a": entry(), "b": entry(offsets=(24, 40))}, bytes(40)),
    "shape is not bytes": safetensors({"a": entry(shape=(2, 3))}, bytes(16)),
    "shape overflows": safetensors({"a": entry(shape=(2**62, 8))}, bytes(16)),
    "unknown dtype": safetensors({"a": entry("F33")}, bytes(16)),
    "list header": safetensors(b"[1, 2]"), "deep header": safetensors(b"[" * 100_000),
    "entry is no object": safetensors({"a": 3}, bytes(16)),
    "shape is text": safetensors({"a": entry() | {"shape": "2x2"}}, bytes(16)),
    "offset is text": safetensors({"a": entry(offsets=("0", "16"))}, bytes(16)),
    "HTML": HTML, "LFS": LFS,
}  # fmt: skip


@pytest.fixture
def llama(tmp_path):
    """A small model as a Hugging Face folder."""
    tokenizer = LlamaTokenizer(TINY_LLAMA / "tokenizer.model")
    save_llama(Llama(small_config()), tokenizer, tmp_path / "llama")
    return tmp_path / "llama"


def test_b1_safetensors(tmp_path, llama, tally):
    file, found = tmp_path / "x.safetensors", {}
    for name, data in FORGED.items():
        file.write_bytes(data)
        found[name] = refused(lambda: open_weights([file])["a"], str(file))
    (llama / "model.safetensors").write_bytes(safetensors({}))
    found["no tensors"] = refused(lambda: load_llama(llama), "missing")
    twice = f'{{"a": {json.dumps(entry())}, "a": {json.dumps(entry())}}}'
    file.write_bytes(safetensors(twice.encode(), bytes(16)))
    found["same key, same bytes"] = list(open_weights([file])) == ["a"]
    tally("B1", found, "a key twice over the same bytes is accepted: the last wins")


def test_b2_pickled_files(tmp_path, tally):
    file, buffer = tmp_path / "x.bin", io.BytesIO()
    torch.save({"a": torch.ones(50, 50)}, buffer)
    raw = buffer.getvalue()
    cuts = {"empty": 0, "cut at 4": 4, "cut at 8": 8, "mid-header": 40, "end of header": 200,
            "mid-data": len(raw) // 2, "one byte less": len(raw) - 1}  # fmt: skip
    forged = {name: raw[:n] for name, n in cuts.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        script = io.BytesIO()
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), script)
    forged |= {"HTML": HTML, "LFS": LFS, "TorchScript": script.getvalue(),
               "plain pickle": pickle.dumps({"a": 1})}  # fmt: skip
    found = {}
    for name, data in forged.items():
        file.write_bytes(data)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a second line on stderr would be one too many
            found[name] = refused(lambda: open_weights([file]), str(file))
    torch.save({"a": torch.ones(2)}, file, _use_new_zipfile_serialization=False)
    found["legacy, sound"] = list(open_weights([file])) == ["a"]
    tally("B2", found)


class Lie:
    """A tensor of 10^9 numbers over a storage of 4."""

    def __reduce__(self):
        rebuild = (Storage(), 0, (10**9,), (1,), False, OrderedDict())
        return torch._utils._rebuild_tensor_v2, rebuild


class Storage:
    """Stands for the storage in a forged file."""


def forged_zip(file, payload: bytes) -> None:
    """A file of torch.save with another pickle in it."""
    plain = io.BytesIO()
    torch.save({"a": torch.ones(4)}, plain)
    with zipfile.ZipFile(plain) as old, zipfile.ZipFile(file, "w") as new:
        for name in old.namelist():
            new.writestr(name, payload if name.endswith("data.pkl") else old.read(name))


def test_b3_no_pickle_is_executed(tmp_path, tally):
    sentinel, file, found = tmp_path / "executed", tmp_path / "x.bin", {}

    class Nested:
        def __reduce__(self):
            return (getattr, (Inner(), "x"))

    class Inner:
        def __reduce__(self):
            return (os.system, (f"touch {sentinel}",))

    lie = io.BytesIO()
    pickler = pickle.Pickler(lie, 2)
    pickler.persistent_id = lambda x: (
        ("storage", torch.FloatStorage, "0", "cpu", 4) if isinstance(x, Storage) else None
    )
    pickler.dump({"a": Lie()})
    payloads = {
        "os.system": b"cposix\nsystem\n(S'touch %s'\ntR." % str(sentinel).encode(),
        "eval": b"cbuiltins\neval\n(S'open(\"%s\", \"w\")'\ntR." % str(sentinel).encode(),
        "nested reduce": _pickled(Nested),
        "SETITEM on a list": b"]S'a'\nS'b'\ns.", "storage lie": lie.getvalue(),
        "huge LONG": b"\x8b" + struct.pack("<i", 2**31 - 1) + b".",
    }  # fmt: skip
    for name, payload in payloads.items():
        forged_zip(file, payload)
        zipped = refused(lambda: open_weights([file])["a"].write_to(torch.ones(4)), str(file))
        file.write_bytes(payload)
        plain = refused(lambda: open_weights([file]), str(file))
        executed = "executed!" if sentinel.exists() else True
        found[name] = next((x for x in (executed, zipped, plain) if x is not True), True)
    tally("B3", found, "each in a zip and as a plain pickle; 0 executions")


def _pickled(kind) -> bytes:
    out = io.BytesIO()
    pickle._Pickler(out, 2).dump(kind())
    return out.getvalue()


def test_b4_bit_flips(tmp_path, tally):
    data, found = bytes(range(256)) * 20, {}
    sha = hashlib.sha256(data).hexdigest()
    known = hub.Official("a/b", ("model.safetensors",), {"model.safetensors": sha})
    file = tmp_path / "model.safetensors"
    for i in range(100):
        flipped = bytearray(data)
        place = int(torch.randint(len(data) * 8, ()))
        flipped[place // 8] ^= 1 << place % 8
        file.write_bytes(flipped)
        found[i] = refused(lambda: hub.fetch(known, tmp_path, offline=True), "SHA-256")
    tally("B4", found, "by its known SHA-256; without one, numbers that are not finite are caught")


def test_b5_keys(tmp_path, bpe, tally):
    folder, found = tmp_path / "gpt2", {}
    model = GPT2(small_gpt2(vocab_size=bpe.vocab_size))
    tokens = torch.arange(12)[None]
    file, square = folder / "model.safetensors", "transformer.h.0.attn.c_proj.weight"

    def saved(change) -> None:
        save_gpt2(model, bpe, folder)
        state = load_file(file)
        state = change(state) or state
        save_file(state, file)

    def drop(state):
        del state["transformer.ln_f.bias"]

    changes = {
        "missing": (drop, "missing: ln_f.bias"),
        "extra": (lambda s: s | {"extra.weight": torch.ones(2)}, "unexpected: "),
        "wrong shape": (lambda s: s | {"transformer.ln_f.bias": torch.ones(3)}, "misshapen: "),
        "wrong dtype": (lambda s: s | {"transformer.ln_f.bias": torch.ones(32).to(torch.int8)},
                        "int8"),
    }  # fmt: skip
    for name, (change, part) in changes.items():
        saved(change)
        found[name] = refused(lambda: load_gpt2(folder), part)
    with torch.no_grad():
        want = model(tokens)
        saved(lambda s: s | {square: s[square].T.contiguous()})
        found["transposed square c_proj"] = not torch.allclose(load_gpt2(folder)[0](tokens), want)
        saved(lambda s: {k: v for k, v in s.items() if k != "lm_head.weight"})
        found["tied head absent"] = torch.equal(load_gpt2(folder)[0](tokens), want)
        saved(lambda s: {k.removeprefix("transformer."): v for k, v in s.items()})
        found["bare names"] = torch.equal(load_gpt2(folder)[0](tokens), want)
        saved(lambda s: s)
        found["names with transformer."] = torch.equal(load_gpt2(folder)[0](tokens), want)
    tally("B5", found, "the transpose has every shape right: only parity of logits shows it")


def test_b6_index(llama, tmp_path, tally):
    state, index = load_file(llama / "model.safetensors"), llama / "model.safetensors.index.json"
    (llama / "model.safetensors").unlink()
    names, found = sorted(state), {}

    def shards(where: dict, twice: bool = False) -> None:
        first = {k: v for k, v in state.items() if k in names[: len(names) // 2]}
        rest = {k: v for k, v in state.items() if k not in first or (twice and k == names[0])}
        save_file(first, llama / "one.safetensors")
        save_file(rest, llama / "two.safetensors")
        mapped = {k: "one.safetensors" if k in first else "two.safetensors" for k in names}
        index.write_text(json.dumps({"weight_map": mapped | where}))

    for name in ("../x.safetensors", "/etc/x.safetensors"):
        shards({names[0]: name})
        found[name] = refused(lambda: load_llama(llama), "leaves the folder")
    save_file({"x": torch.ones(1)}, tmp_path / "outside.safetensors")
    (llama / "link.safetensors").symlink_to(tmp_path / "outside.safetensors")
    shards({names[0]: "link.safetensors"})
    found["link out"] = refused(lambda: load_llama(llama), "leaves the folder")
    shards({names[0]: "three.safetensors"})
    found["missing shard"] = refused(lambda: load_llama(llama), "three.safetensors")
    shards({names[0]: "two.safetensors"})
    found["wrong shard"] = refused(lambda: load_llama(llama), "the index says")
    shards({}, twice=True)
    found["same key twice"] = refused(lambda: load_llama(llama), "is also in")
    tally("B6", found)


def test_b7_config(llama, tally):
    file = llama / "config.json"
    plain, found = json.loads(file.read_text()), {}

    def tried(name: str, text: str, *parts: str) -> None:
        file.write_text(text, "utf-8")
        began = time.monotonic()
        result = refused(lambda: load_llama(llama), *parts)
        found[name] = result if time.monotonic() - began < 1 else "took over a second"

    def changed(**changes) -> str:
        return json.dumps(plain | changes)

    tried("10^9 layers", changed(num_hidden_layers=10**9), "config.json")
    tried("vocab -1", changed(vocab_size=-1), "vocab_size")
    tried("heads do not divide", changed(num_attention_heads=5), "config.json")
    tried("NaN", changed(rms_norm_eps=float("nan")), "rms_norm_eps")
    tried("5000 digits", '{"hidden_size": ' + "9" * 5000 + "}", "config.json")
    tried("100k deep", "[" * 100_000, "config.json")
    tried("another family", changed(model_type="mistral"), "mistral")
    file.write_text("\ufeff" + json.dumps(plain | {"unheard_of": 1}), "utf-8")
    found["byte-order mark"] = found["unknown keys"] = load_llama(llama)[0].config.dim == 32
    tally("B7", found, "a byte-order mark and unknown keys are harmless, and accepted")


def test_an_impossible_model_is_refused_before_it_is_made(tally):
    from minillm.memory import check_fits

    with pytest.raises(UserError, match="needs .* MiB on cpu"):
        check_fits("a model", 2**50, "cpu")

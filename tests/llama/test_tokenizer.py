"""The tokenizer: exact on any text, streamed text equal to the whole, no half characters."""

import json
import struct

import pytest

from llama import Llama, LlamaTokenizer, load_llama, save_llama
from minillm.data.batches import encode_samples
from minillm.data.samples import Sample
from minillm.errors import UserError
from minillm.losses import IGNORED
from minillm.predict import label_row
from minillm.text_stream import TextStream
from tests.conftest import TINY_LLAMA, shared, small_config

TEXTS = [
    "Nora went to the harbour.", " leading space", "two  spaces\tand a tab\nand a line",
    "héllo wörld", "日本語のテキスト", "한국어", "🙂🙃👩‍👩‍👧‍👦🏳️‍🌈", "a🙂b日c", "ﬁ ﷽ ẞ", "",
    "<s> </s> <unk> <0x41>", "zero\x00byte",
]  # fmt: skip


@pytest.fixture(params=["bundled", "llama-2", "llama2c"])
def any_tokenizer(request, tokenizer) -> LlamaTokenizer:
    if request.param == "bundled":
        return tokenizer
    return LlamaTokenizer(
        shared("llama2_tokenizer.model" if request.param == "llama-2" else "tok512.bin")
    )


@pytest.mark.parametrize("text", TEXTS)
def test_decode_undoes_encode(any_tokenizer, text):
    assert any_tokenizer.decode(any_tokenizer.encode(text)) == text


@pytest.mark.parametrize("text", TEXTS)
def test_streamed_text_equals_the_whole_and_shows_no_half_character(any_tokenizer, text):
    prompt = any_tokenizer.encode("Once", bos=True)
    stream = TextStream(any_tokenizer, prompt)
    tokens = any_tokenizer.encode("x" + text, eos=True)
    shown = [stream.push(token) for token in tokens]
    assert not any("\ufffd" in part for part in shown)
    whole = any_tokenizer.decode(prompt + tokens)
    assert any_tokenizer.decode(prompt) + "".join(shown) + stream.finish() == whole
    assert stream.finish() == "" and stream.text() == "".join(shown)


def test_bytes_that_never_become_a_character_are_shown_at_the_end(tokenizer):
    stream = TextStream(tokenizer, [tokenizer.bos_id])
    broken = tokenizer.pieces.piece_to_id("<0xF0>")
    assert stream.push(broken) == "" and stream.finish() == "\ufffd"


def test_bos_and_eos_only_where_asked(any_tokenizer):
    t = any_tokenizer
    plain = t.encode("Nora")
    assert t.encode("Nora", bos=True, eos=True) == [t.bos_id, *plain, t.eos_id]
    assert 0 <= t.pad_id < t.vocab_size


def test_a_lone_surrogate_is_a_user_error(tokenizer):
    with pytest.raises(UserError, match="surrogate"):
        tokenizer.encode("a\ud800b")


def test_offsets_count_a_written_space_sign_as_the_space_it_becomes(tokenizer):
    signs, spaces = "Text: \u2581\u2581 fine\nLabel: negative", "Text:    fine\nLabel: negative"
    assert tokenizer.encode_with_offsets(signs) == tokenizer.encode_with_offsets(spaces)


@pytest.mark.parametrize("path", [TINY_LLAMA / "tokenizer.model", None], ids=["pieces", "bytes"])
@pytest.mark.parametrize("text", ["Label: positive", "é 🎉 a", " two  spaces ", "x", "\nnew"])
def test_offsets_say_where_each_token_begins(path, text):
    tokenizer = LlamaTokenizer(path)
    ids, starts = tokenizer.encode_with_offsets(text)
    assert ids == tokenizer.encode(text) and starts == sorted(starts) and starts[0] == 0
    whole = [i for i, start in enumerate(starts) if i and start != starts[i - 1]]
    for i in whole:  # cut where a character begins, both halves are the text's
        assert tokenizer.decode(ids[:i]) == text[: starts[i]]


def test_where_no_space_is_put_before_a_text_a_response_keeps_its_own():
    tokenizer = LlamaTokenizer(None)
    (row,) = encode_samples([Sample("Label:", " positive")], tokenizer, 100).rows
    assert tokenizer.decode(row.tokens[1:-1].tolist()) == "Label: positive"
    assert int((row.labels != IGNORED).sum()) == len(" positive") + 1  # and the end of the text
    assert int((label_row(tokenizer, "Label:", "good").labels != IGNORED).sum()) == len(" good")


def write_json(tokenizer, folder):
    """tokenizer.json as transformers 5 writes it."""
    transformers = pytest.importorskip("transformers")
    tokenizer.save(folder)
    transformers.LlamaTokenizer.from_pretrained(folder).save_pretrained(folder / "json")
    return folder / "json" / "tokenizer.json"


@pytest.mark.parametrize("text", TEXTS)
def test_tokenizer_json_encodes_as_transformers_reads_it(tokenizer, tmp_path, text):
    transformers = pytest.importorskip("transformers")
    path = write_json(tokenizer, tmp_path)
    ours = LlamaTokenizer(path)
    peer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(path))
    text = text.lstrip()  # to a text that begins with a space transformers adds none
    written = {"add_special_tokens": False, "split_special_tokens": True}
    assert ours.encode(text) == peer.encode(text, **written)
    assert ours.decode(ours.encode(text)) == text
    assert (ours.bos_id, ours.eos_id, ours.vocab_size) == (1, 2, tokenizer.vocab_size)


@pytest.mark.parametrize("change", [
    {"model": {"byte_fallback": False}}, {"model": {"merges": [["a"]]}}, {"model": {"vocab": {}}},
    {"pre_tokenizer": {"type": "ByteLevel"}}, {"model": {"type": "Unigram"}},
    {"added_tokens": [{"id": 2048, "content": "\ud800"}]},
    {"added_tokens": [{"id": 2048, "content": 7}]},
    {"normalizer": {"type": "Sequence", "normalizers": [
        {"type": "Lowercase"}, {"type": "Prepend", "prepend": "\u2581"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}]},
     "pre_tokenizer": None},
    {"pre_tokenizer": {"type": "Metaspace", "replacement": "_", "prepend_scheme": "first"}},
    {"model": {"end_of_word_suffix": "</w>"}},
])  # fmt: skip
def test_a_tokenizer_json_of_another_kind_is_refused(tokenizer, tmp_path, change):
    path = write_json(tokenizer, tmp_path)
    content = json.loads(path.read_text())
    for field, values in change.items():
        content[field] = {**content[field], **values} if field == "model" else values
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="tokenizer.json"):
        LlamaTokenizer(path)


def test_the_normalizers_of_llama_2s_own_tokenizer_json_are_the_same(tokenizer, tmp_path):
    path = write_json(tokenizer, tmp_path)
    content = json.loads(path.read_text())
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    prepend = {"type": "Prepend", "prepend": "\u2581"}
    content["normalizer"] = {"type": "Sequence", "normalizers": [prepend, replace]}
    path.write_text(json.dumps(content | {"pre_tokenizer": None}))
    assert all(LlamaTokenizer(path).encode(text) == tokenizer.encode(text) for text in TEXTS)


def test_tokens_added_to_tokenizer_json_are_told_to_be_plain_text(tokenizer, tmp_path, capsys):
    path = write_json(tokenizer, tmp_path)
    content = json.loads(path.read_text())
    content["added_tokens"].append({"id": tokenizer.vocab_size, "content": "<|im_start|>"})
    path.write_text(json.dumps(content))
    assert LlamaTokenizer(path).encode("<|im_start|>") == tokenizer.encode("<|im_start|>")
    assert "tokens added later (<|im_start|>) are taken as plain text" in capsys.readouterr().err


def test_a_folder_names_the_tokenizer_in_it(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    assert LlamaTokenizer(tmp_path).encode("the cat") == tokenizer.encode("the cat")


def test_a_tokenizer_model_that_ends_before_its_settings_is_refused(tokenizer, tmp_path):
    """SentencePiece reads it all the same, and joins the spaces of a text."""
    raw, cuts, at = tokenizer.model_proto, [], 0
    while at < len(raw):  # where each field ends
        size, shift = 0, 0
        at += 1
        while True:
            size |= (raw[at] & 0x7F) << shift
            at, shift = at + 1, shift + 7
            if raw[at - 1] < 0x80:
                break
        cuts.append(at := at + size)
    for cut in (cuts[300], cuts[-3], cuts[-2]):
        (tmp_path / "tokenizer.model").write_bytes(raw[:cut])
        with pytest.raises(UserError, match="ends before its settings"):
            LlamaTokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(raw)
    assert LlamaTokenizer(tmp_path).encode("a  b") == tokenizer.encode("a  b")


def test_a_tokenizer_of_llama2c_that_was_cut_is_known_by_its_length(tmp_path, tokenizer, capsys):


    pieces = [tokenizer.pieces.id_to_piece(i).replace("\u2581", " ").encode() for i in range(2048)]
    entries = [struct.pack("<fi", -float(i), len(text)) + text for i, text in enumerate(pieces)]
    save_llama(Llama(small_config()), tokenizer, tmp_path / "hf")
    for n in (2048, 2040, 1900):
        (tmp_path / "t.bin").write_bytes(struct.pack("<i", 20) + b"".join(entries[:n]))
        if n == 2048:
            assert load_llama(tmp_path / "hf", tokenizer=tmp_path / "t.bin")[1].vocab_size == n
        elif n == 2040:  # as if the model's rows had been filled up to a multiple of 64
            load_llama(tmp_path / "hf", tokenizer=tmp_path / "t.bin")
            assert "2040 pieces for the 2048 of the model: cut, unless" in capsys.readouterr().err
        else:
            with pytest.raises(UserError, match="the tokenizer has 1900 pieces, the model 2048"):
                load_llama(tmp_path / "hf", tokenizer=tmp_path / "t.bin")

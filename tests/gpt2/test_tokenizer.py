"""GPT-2's tokenizer: transformers' ids, files that make themselves again, damage named."""

import json
import random
import shutil

import pytest

from gpt2 import GPT2Tokenizer
from minillm.bpe import merges
from minillm.errors import UserError
from tests.conftest import TINY_GPT2, shared

SCRAPS = [
    "def f(x):\n\treturn x**2  # ", "🎉🇫🇷👩\u200d👩\u200d👧", "漢字かな交じり文", "  \n\n \t ",
    "\u00a0\u2003", "don't WE'LL i'm ", "naïve café ", "12345.678e-9", "<|endoftext|>", "العربية",
    "<|im_start|>", "z\u0308\u0301algo", "\r\n", " leading", "trailing ", "ß", "\x00\x07", "𝔘𝔫𝔦",
    "a" * 40, "x'S y'Ve", "----====", "€£¥",
]  # fmt: skip


def varied(n: int) -> list[str]:
    draw = random.Random(0)
    return ["".join(draw.choices(SCRAPS, k=draw.randint(1, 6))) for _ in range(n)]


def test_real_ids_equal_transformers_on_a_thousand_strings():
    transformers = pytest.importorskip("transformers")
    folder = shared("gpt2_vocab")
    tokenizer, peer = GPT2Tokenizer(folder), transformers.GPT2Tokenizer.from_pretrained(folder)
    for text in varied(1000):
        assert tokenizer.encode(text) == peer.encode(text, split_special_tokens=True), text
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_real_merges_are_found_again_in_the_real_vocabulary(tmp_path):
    folder = shared("gpt2_vocab")
    GPT2Tokenizer(folder).save(tmp_path)
    assert (tmp_path / "merges.txt").read_bytes() == (folder / "merges.txt").read_bytes()
    again, before = (json.loads((f / "vocab.json").read_text()) for f in (tmp_path, folder))
    assert again == before


def test_a_new_vocabulary_gives_transformers_ids_too(bpe, tmp_path):
    transformers = pytest.importorskip("transformers")
    bpe.save(tmp_path)
    peer = transformers.GPT2Tokenizer.from_pretrained(tmp_path)
    for text in [*varied(100), "the cat sat on a hat; it's 12 o'clock"]:
        assert bpe.encode(text) == peer.encode(text, split_special_tokens=True)


def test_training_merges_the_most_frequent_pair_first():
    tokenizer = GPT2Tokenizer.train(["aab aab aab xyz"], 260)
    assert merges(tokenizer.ranks)[0] == (b"a", b"b") or merges(tokenizer.ranks)[0] == (b"a", b"a")
    assert tokenizer.vocab_size == 260 and len(tokenizer.encode(" aab")) == 1


def test_a_tiktoken_file_is_the_same_vocabulary(bpe, tmp_path):
    import base64

    lines = [f"{base64.b64encode(t).decode()} {r}\n" for t, r in bpe.ranks.items()]
    (tmp_path / "small.tiktoken").write_text("".join(lines))
    again = GPT2Tokenizer(tmp_path / "small.tiktoken")
    assert again.ranks == bpe.ranks and again.eos_id == bpe.eos_id == 299


@pytest.mark.parametrize("text", ["<|endoftext|>", "a<|endoftext|>b"])
def test_text_that_looks_like_the_control_token_is_text(bpe, text):
    assert bpe.eos_id not in bpe.encode(text) and bpe.decode(bpe.encode(text)) == text


def test_the_control_token_begins_and_ends_a_text_and_vanishes(bpe):
    ids = bpe.encode("the cat", bos=True, eos=True)
    assert ids[0] == ids[-1] == bpe.bos_id == bpe.eos_id and bpe.decode(ids) == "the cat"


@pytest.mark.parametrize("text", ["the cat", "", "🎉 a 漢", "  x"])
def test_offsets_say_where_each_token_begins(bpe, text):
    ids, starts = bpe.encode_with_offsets(text)
    assert ids == bpe.encode(text) and len(starts) == len(ids)
    assert starts == sorted(starts) and (not ids or starts[0] == 0)


def test_without_files_every_byte_is_a_token():
    tokenizer = GPT2Tokenizer(None)
    assert tokenizer.vocab_size == 257 and len(tokenizer.encode("é")) == 2
    assert tokenizer.decode(tokenizer.encode("naïve 🎉")) == "naïve 🎉"


def test_a_lone_surrogate_is_refused(bpe):
    with pytest.raises(UserError, match="surrogate"):
        bpe.encode("\ud800")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("vocab.json", None, "no such file"),
        ("merges.txt", None, "no such file"),
        ("vocab.json", "[]", "its own id"),
        ("vocab.json", '{"a": 0}', "endoftext"),
        ("vocab.json", '{"a": 0, "<|endoftext|>": 5}', "its own id"),
        ("vocab.json", '{"a b": 0, "<|endoftext|>": 1}', "no token in bytes"),
        ("merges.txt", "#version: 0.2\na b\n", "does not make"),
        ("merges.txt", "", "empty"),
    ],
)
def test_damaged_files_are_named(bpe, tmp_path, file, content, message):
    bpe.save(tmp_path)
    (tmp_path / file).unlink()
    if content is not None:
        (tmp_path / file).write_text(content)
    with pytest.raises(UserError, match=message) as error:
        GPT2Tokenizer(tmp_path)
    assert file in str(error.value)


def test_merges_in_another_order_are_refused(bpe, tmp_path):
    bpe.save(tmp_path)
    lines = (tmp_path / "merges.txt").read_text().splitlines()
    lines[1], lines[2] = lines[2], lines[1]
    (tmp_path / "merges.txt").write_text("\n".join(lines))
    with pytest.raises(UserError, match="in their order"):
        GPT2Tokenizer(tmp_path)


@pytest.mark.parametrize("content", ["nonsense\n", "YQ== 0\n", "YQ== 5\nYg== 6\n", "? ?\n"])
def test_a_damaged_tiktoken_file_is_named(tmp_path, content):
    (tmp_path / "x.tiktoken").write_text(content)
    with pytest.raises(UserError, match="x.tiktoken"):
        GPT2Tokenizer(tmp_path / "x.tiktoken")


def test_any_one_of_the_files_names_the_vocabulary(bpe, tmp_path):
    bpe.save(tmp_path)
    shutil.copy(tmp_path / "vocab.json", tmp_path / "copy.json")
    assert GPT2Tokenizer(tmp_path / "merges.txt").ranks == GPT2Tokenizer(tmp_path).ranks


def test_the_bundled_vocabulary_gives_transformers_ids():
    transformers = pytest.importorskip("transformers")
    tokenizer = GPT2Tokenizer(TINY_GPT2)
    peer = transformers.AutoTokenizer.from_pretrained(TINY_GPT2)
    for text in [*varied(100), "Nora went to the harbour.\nLabel: positive"]:
        assert tokenizer.encode(text) == peer.encode(text, split_special_tokens=True)


def test_the_one_file_that_transformers_writes_is_the_same_vocabulary(bpe, tmp_path):
    transformers = pytest.importorskip("transformers")
    bpe.save(tmp_path)
    transformers.GPT2Tokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
    again = GPT2Tokenizer(tmp_path / "again" / "tokenizer.json")
    assert again.ranks == bpe.ranks and again.eos_id == bpe.eos_id


@pytest.mark.parametrize("change", [
    {"normalizer": {"type": "Lowercase"}}, {"pre_tokenizer": {"type": "Whitespace"}},
    {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}},
    {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}},
    {"model": {"end_of_word_suffix": "</w>"}}, {"added_tokens": [{"content": ["x"], "id": 9}]},
    {"added_tokens": [None]},
])  # fmt: skip
@pytest.mark.parametrize("beside", [True, False])
def test_a_tokenizer_json_that_takes_texts_otherwise_is_refused(bpe, tmp_path, change, beside):
    bpe.save(tmp_path)
    vocab = json.loads((tmp_path / "vocab.json").read_text())
    merges = (tmp_path / "merges.txt").read_text().split("\n")[1:-1]
    model = {"vocab": vocab, "merges": merges} | change.get("model", {})
    content = change | {"model": model}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    if not beside:
        (tmp_path / "vocab.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        GPT2Tokenizer(tmp_path)


def test_a_million_spaces_are_refused_in_one_line(bpe):
    with pytest.raises(UserError, match="white space without end"):
        bpe.encode("x" + " " * 10**6 + "x")


def test_ids_that_only_pad_the_models_vocabulary_vanish(bpe):
    assert bpe.decode([*bpe.encode("the cat"), 300, 5000]) == "the cat"


def test_a_file_that_is_no_vocabulary_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"tokenizer\.model: no GPT-2 vocabulary"):
        GPT2Tokenizer(tmp_path / "tokenizer.model")


RUNS = {" " * n: 0 for n in range(31, 1, -1)} | {"\t" * n: 0 for n in range(9, 1, -1)}
SPACED = ["a  b", "def f(x):\n    return x", " " * 70 + "x", "\t\t\tif", "a \t  b\t", "one two", ""]


def with_runs(bpe, folder):
    """The vocabulary with runs of spaces and tabs added, as Phi-1.5's has them."""
    bpe.save(folder)
    added = {text: bpe.vocab_size + i for i, text in enumerate(RUNS)}
    (folder / "added_tokens.json").write_text(json.dumps(added))
    return GPT2Tokenizer(folder)


@pytest.mark.parametrize("text", SPACED)
def test_added_tokens_are_those_of_transformers(bpe, tmp_path, text):
    transformers = pytest.importorskip("transformers")
    ours = with_runs(bpe, tmp_path)
    theirs = transformers.GPT2Tokenizer.from_pretrained(tmp_path)
    if len(theirs) < ours.vocab_size:
        plain = [transformers.AddedToken(run, normalized=False) for run in RUNS]
        theirs.add_tokens(plain)
    assert ours.encode(text) == theirs.encode(text)
    assert ours.decode(ours.encode(text)) == text


def test_added_tokens_have_offsets_and_are_saved(bpe, tmp_path):
    ours = with_runs(bpe, tmp_path)
    assert ours.vocab_size == bpe.vocab_size + len(RUNS)
    ids, starts = ours.encode_with_offsets("the" + " " * 40 + "cat")
    assert [starts[ids.index(ours.added[" " * 31])], ids.count(ours.added[" " * 9])] == [3, 1]
    (tmp_path / "again").mkdir()
    ours.save(tmp_path / "again")
    assert GPT2Tokenizer(tmp_path / "again").encode(SPACED[1]) == ours.encode(SPACED[1])


def test_tokens_added_in_tokenizer_json_alone_are_read_beside_the_vocabulary(bpe, tmp_path):
    bpe.save(tmp_path)
    added = [{"content": "Pebble", "id": bpe.vocab_size, "special": False}]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    assert GPT2Tokenizer(tmp_path).encode("aPebble") == [*bpe.encode("a"), bpe.vocab_size]


@pytest.mark.parametrize("text", ["", "\ud800"])
def test_an_added_token_that_is_no_text_is_refused(bpe, tmp_path, text):
    bpe.save(tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps({text: bpe.vocab_size}))
    with pytest.raises(UserError, match=r"added_tokens\.json"):
        GPT2Tokenizer(tmp_path)


def test_added_tokens_that_leave_a_gap_are_refused(bpe, tmp_path):
    bpe.save(tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"  ": bpe.vocab_size + 1}))
    with pytest.raises(UserError, match=r"added_tokens\.json"):
        GPT2Tokenizer(tmp_path)

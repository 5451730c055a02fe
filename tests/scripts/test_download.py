"""tools/download.py against a hub on this machine: what is fetched, resumed, refused."""

import hashlib
import http.server
import json
import threading

import pytest

from minillm import hub
from minillm.errors import UserError
from tools import download

FILES = {
    "config.json": b"{}", "vocab.json": b'{"a": 0}', "merges.txt": b"#version\n",
    "model.safetensors": b"weights" * 1000, "tokenizer.model": b"pieces",
    "model-1.safetensors": b"one", "model-2.safetensors": b"two",
    "model.safetensors.index.json": json.dumps(
        {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    ).encode(),
}  # fmt: skip


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers as the hub does: a file's hash and commit in the headers, then its bytes."""

    files, status, asked = FILES, 200, []

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body: bool):
        type(self).asked.append((self.command, self.path, self.headers.get("Range")))
        name = self.path.rsplit("/", 1)[-1]
        content = self.files.get(name)
        status = self.status if content is not None else 404
        start = 0
        if status == 200 and (asked := self.headers.get("Range")):
            start, status = int(asked.removeprefix("bytes=").rstrip("-").split("-")[0]), 206
        self.send_response(status)
        if status == 403:
            self.send_header("X-Error-Code", "GatedRepo")
        if status == 404:
            self.send_header("X-Error-Code", "EntryNotFound")
        if status in (200, 206):
            self.send_header("ETag", f'"{self.etag(content)}"')
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("Content-Length", str(len(content) - start))
        else:
            self.send_header("Content-Length", "0")
        self.end_headers()
        if body and status in (200, 206):
            self.wfile.write(content[start:])

    def etag(self, content: bytes) -> str:
        return hashlib.sha1(content).hexdigest()

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    Hub.files, Hub.status, Hub.asked = dict(FILES), 200, []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture
def known(monkeypatch):
    """The published hashes as those of the files above."""
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in FILES.items()}
    for name, official in download.OFFICIAL.items():
        ours = {file: hashes[file] for file in official.sha256}
        patched = hub.Official(official.repo, official.files, ours, official.gated)
        monkeypatch.setitem(download.OFFICIAL, name, patched)


def test_a_model_is_fetched_checked_and_found_by_its_name(server, known, tmp_path, monkeypatch):
    download.main(["gpt2", "--out", str(tmp_path), "--endpoint", server])
    for name in ("config.json", "vocab.json", "merges.txt", "model.safetensors"):
        assert (tmp_path / "gpt2" / name).read_bytes() == FILES[name]
    monkeypatch.setattr(hub, "CHECKPOINTS", tmp_path)
    assert hub.find_checkpoint("gpt2") == tmp_path / "gpt2"


def test_a_sharded_model_is_fetched_by_its_index(server, known, tmp_path):
    files = hub.fetch(download.OFFICIAL["llama-2-7b"], tmp_path, server)
    assert {"model-1.safetensors", "model-2.safetensors"} <= {path.name for path in files}


def test_what_is_there_is_not_fetched_again(server, known, tmp_path):
    hub.fetch(download.OFFICIAL["gpt2"], tmp_path, server)
    Hub.asked.clear()
    hub.fetch(download.OFFICIAL["gpt2"], tmp_path, server)
    assert not [path for method, path, _ in Hub.asked if method == "GET" and "resolve" in path]


def test_a_file_with_another_hash_is_removed_and_refused(server, known, tmp_path):
    Hub.files["vocab.json"] = b'{"a": 1}'
    with pytest.raises(UserError, match=r"vocab\.json: SHA-256"):
        hub.fetch(download.OFFICIAL["gpt2"], tmp_path, server)
    assert not (tmp_path / "vocab.json").exists()


def test_a_gated_model_says_what_to_do(server, tmp_path):
    Hub.status = 403
    with pytest.raises(UserError, match="licence.*--token"):
        hub.fetch(download.OFFICIAL["llama-2-7b"], tmp_path, server)


def test_without_a_network_it_says_so_and_how_to_go_on(tmp_path):
    with pytest.raises(UserError, match="cannot be reached.*by hand"):
        hub.fetch(download.OFFICIAL["gpt2"], tmp_path, "http://127.0.0.1:9")


def test_an_index_that_leaves_the_folder_is_not_followed(server, known, tmp_path):
    Hub.files["model.safetensors.index.json"] = b'{"weight_map": {"a": "../evil.safetensors"}}'
    with pytest.raises(UserError, match="do not trust"):
        hub.fetch(download.OFFICIAL["llama-2-7b"], tmp_path, server)


def test_a_weight_file_that_is_not_what_the_hub_tells_is_refused(server, tmp_path, monkeypatch):
    """gpt2-xl has no pinned hash: the hub's own, 64 digits for a large file, must hold."""
    monkeypatch.setattr(Hub, "etag", lambda self, content: "0" * 64)
    monkeypatch.setitem(download.OFFICIAL, "gpt2-xl", hub.Official("x/y", ("model.safetensors",)))
    with pytest.raises(UserError, match="SHA-256"):
        hub.fetch(download.OFFICIAL["gpt2-xl"], tmp_path, server)


def test_a_page_in_place_of_a_file_is_refused_and_removed(server, tmp_path, monkeypatch):
    """A network that wants a login first answers every address with its own page."""
    Hub.files["config.json"] = b"<!DOCTYPE html><html>log in</html>"
    monkeypatch.setitem(download.OFFICIAL, "gpt2-xl", hub.Official("x/y", ("config.json",)))
    with pytest.raises(UserError, match="HTML"):
        hub.fetch(download.OFFICIAL["gpt2-xl"], tmp_path, server)
    assert not (tmp_path / "config.json").exists()


def test_a_hub_in_trouble_is_quoted(server, tmp_path):
    Hub.status = 500
    with pytest.raises(UserError, match="500"):
        hub.fetch(download.OFFICIAL["gpt2"], tmp_path, server)


def test_a_relative_folder_gets_its_shards_too(server, known, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(hub.fetch(download.OFFICIAL["llama-2-7b"], hub.Path("here"), server)) == 5


def test_a_model_that_is_not_here_names_the_command_that_fetches_it():
    with pytest.raises(UserError, match=r"tools/download\.py gpt2-xl"):
        hub.find_checkpoint("gpt2-xl")
    with pytest.raises(UserError, match=r"tools/download\.py gpt2$"):
        hub.find_checkpoint("gpt2")  # the folder of that name here is code
    with pytest.raises(UserError, match="check the path"):
        hub.find_checkpoint("no/such/folder")


def test_offline_asks_nobody_and_a_token_goes_with_every_question(
    server, known, tmp_path, monkeypatch
):
    plain, seen = Hub.answer, []

    def answer(self, body: bool):
        seen.append(self.headers.get("Authorization"))
        plain(self, body)

    monkeypatch.setattr(Hub, "answer", answer)
    flags = ["gpt2", "--out", str(tmp_path), "--endpoint", server, "--token", "hf_secret"]
    with pytest.raises(UserError):
        download.main([*flags, "--offline"])
    assert not seen
    download.main(flags)
    assert seen and set(seen) == {"Bearer hf_secret"}
    seen.clear()
    download.main([*flags, "--offline"])  # all is there
    assert not seen


def test_megabytes_are_of_a_million_bytes(server, known, tmp_path, capsys):
    download.main(["gpt2", "--out", str(tmp_path), "--endpoint", server])
    n = sum(path.stat().st_size for path in (tmp_path / "gpt2").iterdir() if path.is_file())
    with (tmp_path / "gpt2" / "config.json").open("ab") as file:
        file.write(b" " * (20_000_000 - n))
    capsys.readouterr()
    download.main(["gpt2", "--out", str(tmp_path), "--endpoint", server, "--offline"])
    assert "4 files, 20 MB" in capsys.readouterr().out

"""Section G: a hub that cuts, lies, loops and falls silent; names that lead astray."""

import hashlib
import http.server
import json
import threading
import time

import pytest

from minillm import hub
from tests.reliability.conftest import refused

pytestmark = pytest.mark.reliability
CONTENT = bytes(range(256)) * 4000  # a megabyte
NAME = "model.safetensors"


class BadHub(http.server.BaseHTTPRequestHandler):
    """Answers as the hub does, with one fault."""

    fault, cuts = "", 0
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body: bool):
        fault, asked = self.fault, self.headers.get("Range")
        if fault == "404 page":
            return self.reply(404, b"<!DOCTYPE html>not here", body)
        if fault == "redirects":
            self.send_response(302)
            self.send_header("Location", self.path)
            self.send_header("Content-Length", "0")
            return self.end_headers()
        if fault == "silence" and body:
            time.sleep(40)
            return None
        content = CONTENT
        if fault == "flipped byte":
            content = CONTENT[:1000] + b"!" + CONTENT[1001:]
        start = 0
        if asked and fault not in ("no ranges", "200 for 206"):
            start = int(asked.removeprefix("bytes=").split("-")[0])
        part = content[start:]
        if body and fault.startswith(("cut", "no ranges", "200")) and type(self).cuts > 0:
            type(self).cuts -= 1
            return self.reply(206 if start else 200, part, body, part[: len(part) // 2])
        if body and fault == "wrong length":
            return self.reply(200, part + b"more", body, part)
        return self.reply(206 if start else 200, part, body)

    def reply(self, status: int, content: bytes, body: bool, sent: bytes | None = None):
        self.send_response(status)
        self.send_header("ETag", f'"{hashlib.sha256(CONTENT).hexdigest()}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content if sent is None else sent)
        if sent is not None:
            self.close_connection = True
        return None

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), BadHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture
def official():
    return hub.Official("a/b", (NAME,), {NAME: hashlib.sha256(CONTENT).hexdigest()})


def test_g1_transfers(server, official, tmp_path, tally, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 2**16)  # so that half a file is kept
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 4)
    found = {}
    for fault, cuts in {"cut, resumed by range": 1, "cut twice": 2, "no ranges": 1,
                        "200 for 206": 1, "wrong length": 0, "404 page": 0, "redirects": 0,
                        "flipped byte": 0, "silence": 0}.items():  # fmt: skip
        BadHub.fault, BadHub.cuts = fault, cuts
        folder, began = tmp_path / fault.replace(" ", "_"), time.monotonic()
        try:
            (path,) = hub.fetch(official, folder, server)
            found[fault] = path.read_bytes() == CONTENT
        except hub.UserError as error:
            left, curable = (folder / NAME).exists(), cuts > 0
            sound = "\n" not in str(error) and not left and not curable
            found[fault] = sound or f"{error}, left: {left}"
        if (seconds := time.monotonic() - began) > 35:
            found[fault] = f"{seconds:.0f} s"
    tally("G1", found, "the right file, or one line and no file; silence is given up in 30 s")


def test_g2_names(server, tmp_path, tally):
    official = hub.Official("a/b", ("model.safetensors.index.json",))
    index, found = tmp_path / "model.safetensors.index.json", {}
    for name in ("../x.safetensors", "/tmp/x.safetensors", "%2e%2e%2fx.safetensors",
                 "..\\x.safetensors"):  # fmt: skip
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        found[name] = refused(lambda: hub.fetch(official, tmp_path, offline=True), "do not trust")
    tally("G2", found)


def test_g3_offline(official, tmp_path, tally):
    began = time.monotonic()
    sha = hashlib.sha256(CONTENT).hexdigest()
    result = refused(lambda: hub.fetch(official, tmp_path, offline=True), NAME, sha, "resolve/main",
                     str(tmp_path))  # fmt: skip
    seconds = time.monotonic() - began
    tally("G3", {"empty folder": result if seconds < 2 else f"{seconds:.1f} s"})

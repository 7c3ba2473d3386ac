"""The Hugging Face hub's own client, and a hub of ours on this machine that gives what it should, or not."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from support import ROOT
from transformers import GPT2Config, GPT2LMHeadModel

COMMIT = "c" * 40
# One process for all tests: the cache that it is to use comes by a line, and its result goes by one.
LOAD = """
import sys
from huggingface_hub import constants
from fradique.pretrained import loader
for line in sys.stdin:
    constants.HF_HUB_CACHE = line.strip()
    try:
        found = loader.load_weights("someone/some-gpt2")
        total = sum(x.sum().item() for x in found.tensors.values())
        print(f"loaded: {found.config['n_layer']} layers, {total:.6f}", flush=True)
    except ValueError as error:
        print(f"refused: {error}", flush=True)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    there = tmp_path_factory.mktemp("gpt2")
    config = GPT2Config(n_positions=16, vocab_size=31, n_embd=16, n_layer=2, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(there)
    return there


def sum_of(path):
    """As the hub gives it: of a large file its own, of a small one git's."""
    content = path.read_bytes()
    if path.suffix == ".safetensors":
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Hub(http.server.BaseHTTPRequestHandler):
    """What huggingface_hub asks of the hub: what a model has, the head of a file, and the file."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.answer(with_body=False)

    def do_GET(self):
        self.answer(with_body=True)

    def answer(self, with_body):
        server, path = self.server, self.path.partition("?")[0]
        if path.startswith("/api/models/someone/some-gpt2") and not (server.gone or server.silent):
            described = [server.describe(p) for p in server.files]
            body = json.dumps({"id": "someone/some-gpt2", "sha": COMMIT, "siblings": described}).encode()
            if "/tree/" in path:
                tree = [{"type": "file", "path": p.name, "size": 1, "oid": "0"} for p in server.files]
                body = json.dumps(tree).encode()
            return self.send(body, with_body, {"Content-Type": "application/json"})
        resolved = f"/someone/some-gpt2/resolve/{COMMIT}/"
        file = next((p for p in server.files if path == resolved + p.name), None)
        if file is None or server.gone:
            self.send_response(503 if server.gone or server.silent else 404)
            self.send_header("Content-Length", "0")
            return self.end_headers()
        server.asked.append((self.command, file.name))
        content, tag, large = file.read_bytes(), sum_of(file), file.suffix == ".safetensors"
        if server.damaged == file.name:
            content = content[:-1] + bytes([content[-1] ^ 1])
        named = "X-Linked-ETag" if large else "ETag"
        return self.send(content, with_body, {named: f'"{tag}"', "X-Repo-Commit": COMMIT})

    def send(self, body, with_body, headers):
        self.send_response(200)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Hub)
        self.files = sorted(folder.iterdir())
        self.asked, self.damaged, self.claimed, self.gone, self.silent = [], None, {}, False, False

    def describe(self, path):
        size = self.claimed.get(path.name, path.stat().st_size)
        found = {"rfilename": path.name, "size": size, "blobId": sum_of(path)}
        if path.suffix == ".safetensors":
            found["lfs"] = {"sha256": sum_of(path), "size": size, "pointerSize": 130}
        return found


@pytest.fixture(scope="module")
def hub(folder):
    with Server(folder) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        mine = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        environment = mine | {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
        }
        pipe = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        command = [sys.executable, "-c", LOAD]
        with subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **pipe) as server.client:
            yield server
            server.client.stdin.close()
        server.shutdown()
        thread.join()


@pytest.fixture
def load(hub, tmp_path):
    """`pretrained.load` with a hub's cache of its own: its result in a line."""
    hub.asked.clear()
    hub.damaged, hub.claimed, hub.gone, hub.silent = None, {}, False, False

    def once():
        hub.client.stdin.write(f"{tmp_path}\n")
        hub.client.stdin.flush()
        return hub.client.stdout.readline()

    return once


def test_weights_come_by_name_and_are_then_found_without_a_network(hub, load):
    first = load()
    assert first.startswith("loaded: 2 layers"), first
    assert ("GET", "model.safetensors") in hub.asked
    hub.gone = True
    assert load() == first


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_that_is_not_the_one_whose_sum_the_hub_gave_is_refused(hub, load, name):
    hub.damaged = name
    said = load()
    assert said.startswith("refused:") and f"{name} is damaged: its sum is" in said, said
    hub.damaged = None
    assert load() == said  # it is in the cache
    Path(said.partition("delete ")[2].partition(" and run")[0]).unlink()  # as the message says
    assert load().startswith("loaded: 2 layers")


def test_weights_larger_than_their_config_says_are_not_downloaded(hub, load):
    hub.claimed["model.safetensors"] = 10**12
    said = load()
    assert "is not what its config.json describes" in said and "1,000,000,000,000 bytes" in said, said
    assert "model.safetensors" not in [name for _, name in hub.asked]


def test_files_of_unknown_size_are_not_downloaded(hub, load):
    hub.silent = True  # of what there is: the files themselves it would give
    said = load()
    assert said.startswith("refused:") and "503" in said and "into a folder" in said, said
    assert not hub.asked

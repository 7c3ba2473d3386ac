"""huggingface_hub's client with a local hub server, which can also send wrong answers."""

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
# One process for all tests: it reads a cache folder from each line of stdin, and prints a line per result.
LOAD = """
import sys
from huggingface_hub import constants
from fradique.pretrained import loader
for line in sys.stdin:
    constants.HF_HUB_CACHE = line.strip()
    try:
        weights = loader.load_weights("someone/some-gpt2")
        total = sum(x.sum().item() for x in weights.tensors.values())
        print(f"loaded: {weights.config.n_layer} layers, {total:.6f}", flush=True)
    except ValueError as error:
        print(f"error: {error}", flush=True)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The files of the hub: a tiny GPT-2."""
    folder = tmp_path_factory.mktemp("gpt2")
    config = GPT2Config(n_positions=16, vocab_size=31, n_embd=16, n_layer=2, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def hub_checksum(path):
    """SHA-256 of large files, git's SHA-1 of small files."""
    content = path.read_bytes()
    if path.suffix == ".safetensors":
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class HubHandler(http.server.BaseHTTPRequestHandler):
    """Answers the requests of huggingface_hub: the list of a model's files, the headers of a file, a file."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.answer(with_body=False)

    def do_GET(self):
        self.answer(with_body=True)

    def answer(self, with_body):
        server, path = self.server, self.path.partition("?")[0]
        if path.startswith("/api/models/someone/some-gpt2") and not (server.offline or server.unlisted):
            listed = [server.describe(p) for p in server.files]
            body = json.dumps({"id": "someone/some-gpt2", "sha": COMMIT, "siblings": listed}).encode()
            if "/tree/" in path:
                tree = [{"type": "file", "path": p.name, "size": 1, "oid": "0"} for p in server.files]
                body = json.dumps(tree).encode()
            return self.send(body, with_body, {"Content-Type": "application/json"})
        prefix = f"/someone/some-gpt2/resolve/{COMMIT}/"
        file = next((p for p in server.files if path == prefix + p.name), None)
        if file is None or server.offline:
            self.send_response(503 if server.offline or server.unlisted else 404)
            self.send_header("Content-Length", "0")
            return self.end_headers()
        server.requests.append((self.command, file.name))
        content = file.read_bytes()
        if server.damaged == file.name:
            content = content[:-1] + bytes([content[-1] ^ 1])
        header = "X-Linked-ETag" if file.suffix == ".safetensors" else "ETag"
        return self.send(content, with_body, {header: f'"{hub_checksum(file)}"', "X-Repo-Commit": COMMIT})

    def send(self, body, with_body, headers):
        self.send_response(200)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)


class Hub(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.files = sorted(folder.iterdir())
        self.reset()

    def reset(self):
        """Answer correctly from now on."""
        self.requests = []  # (method, file name)
        self.damaged = None  # the name of a file that is sent with its last byte changed
        self.false_sizes = {}  # file name -> the size that the list of files gives
        self.offline = False  # every request fails
        self.unlisted = False  # files can be downloaded, but not listed

    def describe(self, path):
        size = self.false_sizes.get(path.name, path.stat().st_size)
        description = {"rfilename": path.name, "size": size, "blobId": hub_checksum(path)}
        if path.suffix == ".safetensors":
            description["lfs"] = {"sha256": hub_checksum(path), "size": size, "pointerSize": 130}
        return description


@pytest.fixture(scope="module")
def hub(folder):
    with Hub(folder) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        environment |= {
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
    """A function that loads the weights with a new cache, and returns the line with the result."""
    hub.reset()

    def load_once():
        hub.client.stdin.write(f"{tmp_path}\n")
        hub.client.stdin.flush()
        return hub.client.stdout.readline()

    return load_once


def test_downloaded_weights_are_later_loaded_offline(hub, load):
    first = load()
    assert first.startswith("loaded: 2 layers"), first
    assert ("GET", "model.safetensors") in hub.requests
    hub.offline = True
    assert load() == first


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_with_a_wrong_checksum_is_rejected(hub, load, name):
    hub.damaged = name
    message = load()
    assert message.startswith("error:") and f"{name} is damaged: its checksum is" in message, message
    hub.damaged = None
    assert load() == message  # from the cache
    Path(message.partition("delete ")[2].partition(" and run")[0]).unlink()  # as the message advises
    assert load().startswith("loaded: 2 layers")


def test_weights_larger_than_the_config_are_not_downloaded(hub, load):
    hub.false_sizes["model.safetensors"] = 10**12
    message = load()
    assert "is not what its config.json describes" in message, message
    assert "1,000,000,000,000 bytes" in message, message
    assert "model.safetensors" not in [name for _, name in hub.requests]


def test_files_of_unknown_size_are_not_downloaded(hub, load):
    hub.unlisted = True
    message = load()
    assert message.startswith("error:") and "503" in message and "into a folder" in message, message
    assert not hub.requests

"""Servers that answer wrongly, slowly or with redirects: files are verified, and downloads time out."""

import gzip
import hashlib
import http.server
import threading
import urllib.request

import pytest

from fradique.io import download
from fradique.io.download import fetch

PAGE = b"Era uma vez. " * 20
PAGE_SHA256 = hashlib.sha256(PAGE).hexdigest()


class HostileHandler(http.server.BaseHTTPRequestHandler):
    """Each method is one wrong answer; the path of the request selects it."""

    def do_GET(self):
        getattr(self, self.path.strip("/").partition("?")[0])()

    def send(self, status=200, **headers):
        self.send_response(status, headers.pop("reason", None))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def huge_length(self):
        self.send(Content_Length="9" * 18)
        self.wfile.write(PAGE)

    def invalid_length(self):
        self.send(Content_Length="9" * 5000)
        self.wfile.write(PAGE)

    def short_length(self):  # shorter than the body
        self.send(Content_Length=str(len(PAGE) - 1))
        self.wfile.write(PAGE)

    def endless(self):
        self.protocol_version = "HTTP/1.1"
        self.send(Transfer_Encoding="chunked")
        for _ in range(1000):
            self.wfile.write(b"1000\r\n" + bytes(0x1000) + b"\r\n")

    def negative_chunk(self):
        self.protocol_version = "HTTP/1.1"
        self.send(Transfer_Encoding="chunked")
        self.wfile.write(b"-5\r\nabc\r\n")

    def compressed(self):
        self.send(Content_Encoding="gzip")
        self.wfile.write(gzip.compress(bytes(1 << 24)))

    def loop(self):
        self.send(302, Location="/loop")

    def redirect(self):
        self.send(302, Location=self.path.partition("?")[2])

    def slow_body(self):
        self.send()
        self._send_slowly()

    def slow_headers(self):
        self.wfile.write(b"HTTP/1.0 200 OK\r\nX: ")
        self._send_slowly()

    def _send_slowly(self):
        while not self.server.closing.wait(0.05):
            self.wfile.write(b"x")

    def reason(self):
        self.send(418, reason="x" * 5000)

    def log_message(self, *args):
        pass


class HostileServer(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        """Ignore that the client closes the connection."""


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with HostileServer(("127.0.0.1", 0), HostileHandler) as httpd:
        httpd.closing = threading.Event()
        httpd.url = lambda name: f"http://127.0.0.1:{httpd.server_port}/{name}"
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield httpd
        httpd.closing.set()
        httpd.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("huge_length", "is larger than"),
        ("invalid_length", "its sha256|cannot be reached|is larger than"),
        ("short_length", "its sha256 is"),
        ("endless", "is larger than"),
        ("negative_chunk", "cannot be reached|is incomplete"),
        ("compressed", "its sha256 is"),  # never decompressed
        ("loop", "the server answered 302|redirect"),
        ("reason", "the server answered 418"),
    ],
)
def test_a_wrong_answer_is_reported_and_not_saved(server, tmp_path, name, message):
    path = tmp_path / "a.txt"
    path.write_bytes(b"old")
    with pytest.raises(ValueError, match=message) as caught:
        fetch(
            server.url(name), "0" * 64 if name == "invalid_length" else PAGE_SHA256, path, max_bytes=1 << 20
        )
    assert type(caught.value) is ValueError and len(str(caught.value)) < 1000
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("name", ["slow_body", "slow_headers"])
def test_a_slow_server_reaches_the_total_timeout(server, tmp_path, name):
    with pytest.raises(ValueError, match=r"did not finish downloading within 0\.5 seconds"):
        fetch(server.url(name), PAGE_SHA256, tmp_path / "a.txt", timeout=20, total_timeout=0.5)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "target", ["file:///etc/passwd", "ftp://127.0.0.1/x", "data:text/plain,x", "http://example.invalid/x"]
)
def test_a_redirect_to_a_non_https_url_is_refused(server, tmp_path, target):
    with pytest.raises(ValueError, match=r"is not an https URL|cannot be reached|not allowed|answers 302"):
        fetch(server.url(f"redirect?{target}"), PAGE_SHA256, tmp_path / "a.txt")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "target", ["http://127.0.0.1/x", "http://localhost:80/x", "http://example.invalid/", "file:///x"]
)
def test_a_redirect_from_https_to_http_is_refused(target):
    request = urllib.request.Request("https://example.invalid/a.txt")
    with pytest.raises(ValueError, match="is not an https URL"):
        download._CheckedRedirects().redirect_request(request, open("/dev/null"), 302, "Found", {}, target)  # noqa: PTH123, SIM115


@pytest.mark.parametrize(
    "url",
    [
        "https://ana:segredo@example.invalid/a.txt",
        "http://ana:segredo@127.0.0.1/a.txt",
        "https://segredo@127.0.0.1/",
        "https://ana:segredo@[x/",
    ],
)
def test_a_password_in_a_url_is_refused_and_not_printed(tmp_path, url):
    with pytest.raises(ValueError, match=r"contains a user name or password|is not a URL") as caught:
        fetch(url, PAGE_SHA256, tmp_path / "a.txt")
    assert "segredo" not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "ftp://x/y", "data:,x", "//x/y", "x", "", "https://[x/", "HTTP://x/"]
)
def test_only_https_is_downloaded(tmp_path, url):
    with pytest.raises(ValueError, match=r"is not an https URL|is not a URL"):
        fetch(url, PAGE_SHA256, tmp_path / "a.txt")


def test_a_finished_download_leaves_no_timer_thread(server, tmp_path):
    HostileHandler.good = lambda self: (self.send(), self.wfile.write(PAGE))
    before = set(threading.enumerate())
    assert fetch(server.url("good"), PAGE_SHA256, tmp_path / "a.txt").read_bytes() == PAGE
    for thread in set(threading.enumerate()) - before:
        thread.join(timeout=60)
        assert not thread.is_alive(), thread

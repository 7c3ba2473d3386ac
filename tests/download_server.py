"""A web server on this machine that serves one page, correctly and with faults."""

import hashlib
import http.server
import threading

import pytest

PAGE = "O mar é grande.\n".encode() * 100
PAGE_SHA256 = hashlib.sha256(PAGE).hexdigest()


class PageHandler(http.server.BaseHTTPRequestHandler):
    """Serves PAGE; the file name asks for a redirect, an error or a wrong length."""

    def do_GET(self):
        self.server.requests.append(self.path)
        kind = self.path.rsplit("/", 1)[-1]
        if kind in ("moved.txt", "gone_away.txt"):
            self.send_response(302)
            host = "http://example.invalid/" if kind == "gone_away.txt" else ""
            self.send_header("Location", f"{host}good.txt")
            self.end_headers()
            return
        self.send_response(404 if kind == "gone.txt" else 200)
        if kind != "endless.txt":
            self.send_header("Content-Length", str(len(PAGE) + 10 * (kind == "short.txt")))
        self.end_headers()
        self.wfile.write(PAGE)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    """A server on this machine; `.url(name)` is the URL of a page, `.requests` are the paths requested."""
    monkeypatch.setenv("no_proxy", "*")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), PageHandler) as httpd:
        httpd.requests = []
        httpd.url = lambda name: f"http://127.0.0.1:{httpd.server_port}/a%C3%A7/{name}"
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield httpd
        httpd.shutdown()
        thread.join()

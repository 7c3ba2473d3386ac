"""Download one file from the web, with limits on size and time, and verify its SHA-256 before it is used."""

from __future__ import annotations

import glob
import hashlib
import http.client
import re
import socket
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from fradique.io import files

MAX_BYTES = 64 << 20
TIMEOUT = 30.0  # seconds without an answer
TOTAL_TIMEOUT = 900.0  # seconds for the whole file: 64 MB at 75 kB/s
_BLOCK_BYTES = 1 << 16
_ALTERNATIVE = "You can also use a text file of your own: --input FILE"


class Download(NamedTuple):
    """The URL of a file, and the SHA-256 that it must have."""

    url: str
    sha256: str  # 64 hexadecimal digits

    @property
    def name(self) -> str:
        """The file name: the last part of the URL."""
        return urllib.parse.unquote(self.url.rsplit("/", 1)[-1])


def fetch(
    url: str,
    sha256: str,
    path: Path,
    max_bytes: int = MAX_BYTES,
    timeout: float = TIMEOUT,
    total_timeout: float = TOTAL_TIMEOUT,
) -> Path:
    """Download `url` to `path` and return `path`. Does nothing if `path` already has this SHA-256.

    Raises ValueError, with the URL and an alternative, for a scheme other than https (http is allowed for
    this machine only), a password in the URL, no network, an HTTP error, another SHA-256, more than
    `max_bytes`, or more than `total_timeout` seconds. Raises OSError if `path` cannot be written. After an
    error no temporary file is left, and an existing file at `path` is unchanged.
    """
    _check_url(url)
    if path.is_file() and files.checksum(path) == sha256:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale_files(path, min_age=2 * max(total_timeout, TOTAL_TIMEOUT))
    digest = hashlib.sha256()
    # a random token: processes on several machines that share the disk may have the same id
    with files.atomic_path(path, token=uuid.uuid4().hex) as temporary:
        with temporary.open("wb") as file:
            for block in _blocks(url, max_bytes, timeout, total_timeout):
                digest.update(block)
                file.write(block)
        if digest.hexdigest() != sha256:
            raise ValueError(
                f"{url} is not the expected file: its sha256 is {digest.hexdigest()}, not {sha256}. "
                f"It was not used. {_ALTERNATIVE}"
            )
    return path


def _remove_stale_files(path: Path, min_age: float) -> None:
    """Remove temporary files of killed processes: those that are too old for anybody to be writing them."""
    for temporary in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with suppress(OSError):
            if time.time() - temporary.stat().st_mtime > min_age:
                temporary.unlink()


def _check_url(url: str) -> None:
    try:
        parts = urllib.parse.urlsplit(url)
    except ValueError as error:  # for example a bracket that is not closed
        raise ValueError(f"{url[:200]!r} is not a URL ({error}). {_ALTERNATIVE}") from error
    if "@" in parts.netloc:  # messages and logs would show it
        raise ValueError(f"the URL of {parts.hostname} has a name or password in it. {_ALTERNATIVE}")
    local = {("http", "127.0.0.1"), ("http", "localhost")}
    if parts.scheme != "https" and (parts.scheme, parts.hostname) not in local:
        raise ValueError(f"{url[:200]} is not an https URL, so it was not downloaded. {_ALTERNATIVE}")


class _CheckedRedirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to allowed URLs, and from https to https only."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        fp.close()
        _check_url(newurl)
        if req.type == "https" and not newurl.lower().startswith("https:"):  # not even to this machine
            raise ValueError(f"{newurl[:200]} is not an https URL, so it was not downloaded. {_ALTERNATIVE}")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


class _Deadline(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    """Closes all connections after `total_timeout` seconds.

    A socket timeout is not enough: a server that sends a byte now and then never reaches it.
    """

    def __init__(self, total_timeout: float) -> None:
        urllib.request.HTTPSHandler.__init__(self)
        self.sockets: list[socket.socket] = []
        self.passed = False
        self.timer = threading.Timer(total_timeout, self.close_connections)
        self.timer.daemon = True

    def close_connections(self) -> None:
        self.passed = True
        for connection in self.sockets:
            with suppress(OSError):  # already closed
                connection.shutdown(socket.SHUT_RDWR)

    def do_open(self, http_class: Any, req: Any, **options: Any) -> Any:
        sockets = self.sockets

        class Connection(http_class):
            def connect(self) -> None:
                super().connect()
                sockets.append(self.sock)

        return super().do_open(Connection, req, **options)


def _blocks(url: str, max_bytes: int, timeout: float, total_timeout: float) -> Iterator[bytes]:
    """Yield the content of `url` in blocks. Raises ValueError for every error of the download."""
    deadline = _Deadline(total_timeout)
    deadline.timer.start()
    try:
        yield from _read_blocks(url, max_bytes, timeout, deadline)
    except ValueError as error:
        if deadline.passed:
            raise ValueError(
                f"{url} was not complete after {total_timeout:g} seconds. {_ALTERNATIVE}"
            ) from error
        raise
    finally:
        deadline.timer.cancel()


def _read_blocks(url: str, max_bytes: int, timeout: float, deadline: _Deadline) -> Iterator[bytes]:
    request = urllib.request.Request(url, headers={"User-Agent": "fradique"})
    received = 0
    try:
        opener = urllib.request.build_opener(_CheckedRedirects, deadline)
        with opener.open(request, timeout=timeout) as response:
            length = response.headers.get("Content-Length", "")
            expected = int(length) if re.fullmatch("[0-9]{1,18}", length) else None
            while block := _read(response):
                received += len(block)
                if max(received, expected or 0) > max_bytes:
                    raise ValueError(f"{url} is not the expected file: it is too large. {_ALTERNATIVE}")
                yield block
        if deadline.passed:  # without a Content-Length, a closed connection looks like the end of the file
            raise ValueError("deadline passed")
    except urllib.error.HTTPError as error:
        error.close()
        raise ValueError(
            f"{url}: the server answers {error.code} {str(error.reason)[:200]}. {_ALTERNATIVE}"
        ) from error
    except (OSError, http.client.HTTPException) as error:  # URLError and timeouts are OSErrors
        reason = str(getattr(error, "reason", None) or error)[:200]
        raise ValueError(
            f"{url} cannot be reached ({type(error).__name__}: {reason}). Is there a network? {_ALTERNATIVE}"
        ) from error
    if expected is not None and received != expected:
        raise ValueError(
            f"{url} is incomplete: {received:,} of {expected:,} bytes were received. {_ALTERNATIVE}"
        )


def _read(response: http.client.HTTPResponse) -> bytes:
    try:
        return response.read(_BLOCK_BYTES)
    except ValueError as error:  # a chunk of negative size
        raise http.client.HTTPException(str(error)) from error

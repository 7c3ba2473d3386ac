"""Fetch one file from the web: bounded in size and time, checked by its sum, and only then under its name."""

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
TOTAL_TIMEOUT = 900.0  # seconds for the whole of a file: 64 MB at 75 kB a second
_BLOCK = 1 << 16
_WAY_OUT = "The text can also come from a file of yours: --input FILE"


class Download(NamedTuple):
    """A file on the web and the sum that it must have."""

    url: str
    sha256: str  # 64 hexadecimal digits

    @property
    def name(self) -> str:
        """The file's own name, the last part of the URL."""
        return urllib.parse.unquote(self.url.rsplit("/", 1)[-1])


def fetch(
    url: str,
    sha256: str,
    path: Path,
    max_bytes: int = MAX_BYTES,
    timeout: float = TIMEOUT,
    patience: float = TOTAL_TIMEOUT,
) -> Path:
    """Have the file of `url` at `path`, which is fetched only where it is not there yet with the right sum.

    Raises ValueError, which names the URL and the way out, for a scheme other than https (http is for this
    machine alone), a password in the URL, no network, an HTTP error, a wrong sum, more than `max_bytes`, or
    more than `patience` seconds; and OSError where `path` cannot be written. In each case nothing is left,
    and what was at `path` before stays.
    """
    _check_scheme(url)
    if path.is_file() and files.checksum(path) == sha256:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path, older=2 * max(patience, TOTAL_TIMEOUT))
    digest = hashlib.sha256()
    # a random name: machines that share the disk may have processes with the same id
    with files.atomic_path(path, token=uuid.uuid4().hex) as temporary:
        with temporary.open("wb") as file:
            for block in _blocks(url, max_bytes, timeout, patience):
                digest.update(block)
                file.write(block)
        if digest.hexdigest() != sha256:
            raise ValueError(
                f"{url} is not the file that was expected: its sha256 is {digest.hexdigest()}, not {sha256}. "
                f"It was not used. {_WAY_OUT}"
            )
    return path


def _sweep(path: Path, older: float) -> None:
    """Remove what processes that were killed have left: parts that nobody can still be writing."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > older:
                left.unlink()


def _check_scheme(url: str) -> None:
    try:
        parts = urllib.parse.urlsplit(url)
    except ValueError as error:  # a bracket that is not closed
        raise ValueError(f"{url[:200]!r} is no address ({error}). {_WAY_OUT}") from error
    if "@" in parts.netloc:  # which messages and logs would show
        raise ValueError(f"the address at {parts.hostname} has a name or password in it. {_WAY_OUT}")
    if parts.scheme != "https" and (parts.scheme, parts.hostname) not in {
        ("http", "127.0.0.1"),
        ("http", "localhost"),
    }:
        raise ValueError(f"{url[:200]} is not an https address, so nothing was fetched. {_WAY_OUT}")


class _CheckedRedirects(urllib.request.HTTPRedirectHandler):
    """Goes where a server points, except from https to anything less."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        fp.close()
        _check_scheme(newurl)
        if req.type == "https" and not newurl.lower().startswith("https:"):  # not even to this machine
            raise ValueError(f"{newurl[:200]} is not an https address, so nothing was fetched. {_WAY_OUT}")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


class _Deadline(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    """Ends every connection that is still open after `patience` seconds: a server that sends a byte now and
    then never times out."""

    def __init__(self, patience: float) -> None:
        urllib.request.HTTPSHandler.__init__(self)
        self.sockets: list[socket.socket] = []
        self.passed = False
        self.timer = threading.Timer(patience, self.end)
        self.timer.daemon = True

    def end(self) -> None:
        self.passed = True
        for one in self.sockets:
            with suppress(OSError):  # closed already
                one.shutdown(socket.SHUT_RDWR)

    def do_open(self, http_class: Any, req: Any, **options: Any) -> Any:
        sockets = self.sockets

        class Connection(http_class):
            def connect(self) -> None:
                super().connect()
                sockets.append(self.sock)

        return super().do_open(Connection, req, **options)


def _blocks(url: str, max_bytes: int, timeout: float, patience: float) -> Iterator[bytes]:
    """The bytes of `url`, block by block; everything that goes wrong on the way is a ValueError."""
    deadline = _Deadline(patience)
    deadline.timer.start()
    try:
        yield from _unhurried_blocks(url, max_bytes, timeout, deadline)
    except ValueError as error:
        if deadline.passed:
            raise ValueError(f"{url} did not come whole in {patience:g} seconds. {_WAY_OUT}") from error
        raise
    finally:
        deadline.timer.cancel()


def _read(response: http.client.HTTPResponse) -> bytes:
    try:
        return response.read(_BLOCK)
    except ValueError as error:  # a chunk of less than nothing
        raise http.client.HTTPException(str(error)) from error


def _unhurried_blocks(url: str, max_bytes: int, timeout: float, deadline: _Deadline) -> Iterator[bytes]:
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
                    raise ValueError(f"{url} is not the file that was expected: too large. {_WAY_OUT}")
                yield block
        if deadline.passed:  # without a length, the end of the connection looks like that of the file
            raise ValueError("too late")
    except urllib.error.HTTPError as error:
        error.close()
        raise ValueError(
            f"{url}: the server answers {error.code} {str(error.reason)[:200]}. {_WAY_OUT}"
        ) from error
    except (OSError, http.client.HTTPException) as error:  # URLError and timeouts are OSErrors
        reason = str(getattr(error, "reason", None) or error)[:200]
        raise ValueError(
            f"{url} cannot be reached ({type(error).__name__}: {reason}). Is there a network? {_WAY_OUT}"
        ) from error
    if expected is not None and received != expected:
        raise ValueError(f"{url} was cut short: {received:,} of {expected:,} bytes came. {_WAY_OUT}")

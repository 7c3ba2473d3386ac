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
TIMEOUT = 30.0  # seconds that one connect or read may take
TOTAL_TIMEOUT = 900.0  # seconds for the whole file: MAX_BYTES at 75 kB/s
_CHUNK_BYTES = 1 << 16
_INPUT_HINT = "You can also use a text file of your own: --input FILE"


class RemoteFile(NamedTuple):
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

    Raises ValueError if the URL is not https (http is allowed for localhost) or contains a user name, if
    there is no network, and for an HTTP error, another SHA-256, more than `max_bytes`, or more than
    `total_timeout` seconds. Its message names the URL and says how to use a local file instead. Raises
    OSError if `path` cannot be written. After an error no temporary file is left, and an existing file at
    `path` is unchanged.
    """
    _check_url(url)
    if path.is_file() and files.checksum(path) == sha256:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    # no download can still be running after twice the limit
    _remove_stale_files(path, min_age=2 * max(total_timeout, TOTAL_TIMEOUT))
    digest = hashlib.sha256()
    # a random name: on a shared disk, processes of two machines may have the same process id
    with files.atomic_path(path, writer_id=uuid.uuid4().hex) as temporary:
        with temporary.open("wb") as file:
            for chunk in _download(url, max_bytes, timeout, total_timeout):
                digest.update(chunk)
                file.write(chunk)
        if digest.hexdigest() != sha256:
            raise ValueError(
                f"{url} is not the expected file: its sha256 is {digest.hexdigest()}, not {sha256}. "
                f"It was not used. {_INPUT_HINT}"
            )
    return path


def _remove_stale_files(path: Path, min_age: float) -> None:
    """Remove temporary files that killed processes left: those older than `min_age` seconds."""
    for temporary in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with suppress(OSError):
            if time.time() - temporary.stat().st_mtime > min_age:
                temporary.unlink()


def _check_url(url: str) -> None:
    try:
        parts = urllib.parse.urlsplit(url)
    except ValueError as error:  # for example a bracket that is not closed
        shown = url[:200].rsplit("@", 1)[-1]  # without a password
        raise ValueError(f"{shown!r} is not a URL ({error}). {_INPUT_HINT}") from None
    if "@" in parts.netloc:  # a password would end up in messages and logs
        raise ValueError(f"the URL for {parts.hostname} contains a user name or password. {_INPUT_HINT}")
    is_local_http = parts.scheme == "http" and parts.hostname in ("localhost", "127.0.0.1")
    if parts.scheme != "https" and not is_local_http:
        raise ValueError(f"{url[:200]} is not an https URL, so it was not downloaded. {_INPUT_HINT}")


class _CheckedRedirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to allowed URLs, and from https to https only."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        fp.close()  # the body of a redirect is not needed
        _check_url(newurl)
        if req.type == "https" and not newurl.lower().startswith("https:"):  # also not to http on localhost
            raise ValueError(f"{newurl[:200]} is not an https URL, so it was not downloaded. {_INPUT_HINT}")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


class _DeadlineHandler(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    """Opens http and https connections, and closes all of them after `total_timeout` seconds.

    A socket timeout alone is not enough: it starts again with every byte that arrives, so a slow server could
    keep a download running forever.
    """

    def __init__(self, total_timeout: float) -> None:
        urllib.request.HTTPSHandler.__init__(self)  # HTTPHandler has no __init__ of its own
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
        deadline = self

        class Connection(http_class):
            def connect(self) -> None:
                super().connect()
                deadline.sockets.append(self.sock)
                if deadline.passed:  # close_connections may have missed this socket
                    raise TimeoutError("the deadline has passed")

        return super().do_open(Connection, req, **options)


def _download(url: str, max_bytes: int, timeout: float, total_timeout: float) -> Iterator[bytes]:
    """Yield the content of `url` in chunks. Raises ValueError for every error of the download."""
    deadline = _DeadlineHandler(total_timeout)
    deadline.timer.start()
    try:
        yield from _read_response(url, max_bytes, timeout, deadline)
    except ValueError as error:
        if not deadline.passed:
            raise
        reason = f"did not finish downloading within {total_timeout:g} seconds"
        raise ValueError(f"{url} {reason}. {_INPUT_HINT}") from error
    finally:
        deadline.timer.cancel()


def _read_response(url: str, max_bytes: int, timeout: float, deadline: _DeadlineHandler) -> Iterator[bytes]:
    request = urllib.request.Request(url, headers={"User-Agent": "fradique"})
    received = 0
    try:
        opener = urllib.request.build_opener(_CheckedRedirects, deadline)
        with opener.open(request, timeout=timeout) as response:
            length = response.headers.get("Content-Length", "")
            expected = int(length) if re.fullmatch("[0-9]{1,18}", length) else None
            while chunk := _read_chunk(response):
                received += len(chunk)
                if max(received, expected or 0) > max_bytes:
                    raise ValueError(f"{url} is larger than {max_bytes:,} bytes, the limit. {_INPUT_HINT}")
                yield chunk
        if deadline.passed:  # without a Content-Length, a closed connection looks like the end of the file
            raise ValueError("deadline passed")  # _download replaces this message
    except urllib.error.HTTPError as error:
        error.close()
        raise ValueError(
            f"{url}: the server answered {error.code} {str(error.reason)[:200]}. {_INPUT_HINT}"
        ) from error
    except (OSError, http.client.HTTPException) as error:  # URLError and timeouts are OSErrors
        reason = str(getattr(error, "reason", None) or error)[:200]
        raise ValueError(
            f"{url} cannot be reached ({type(error).__name__}: {reason}). Check the network connection. "
            f"{_INPUT_HINT}"
        ) from error
    if expected is not None and received != expected:
        raise ValueError(
            f"{url} is incomplete: {received:,} of {expected:,} bytes were received. {_INPUT_HINT}"
        )


def _read_chunk(response: http.client.HTTPResponse) -> bytes:
    try:
        return response.read(_CHUNK_BYTES)
    except ValueError as error:  # raised by http.client if the size of a chunk is negative
        raise http.client.HTTPException(str(error)) from error

"""Fetch one file from the web: into a temporary file, bounded, checked by its sum, then renamed."""

from __future__ import annotations

import hashlib
import http.client
import os
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

MAX_BYTES = 64 << 20
TIMEOUT = 30.0  # seconds without an answer
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


def fetch(url: str, sha256: str, path: Path, max_bytes: int = MAX_BYTES, timeout: float = TIMEOUT) -> Path:
    """Have the file of `url` at `path`, which is fetched only where it is not there yet with the right sum.

    Raises ValueError, which names the URL and the way out, for a scheme other than https (http is for this
    machine alone), no network, an HTTP error, a wrong sum, or more than `max_bytes`; and OSError where `path`
    cannot be written. In each case nothing is left, and what was at `path` before stays.
    """
    _check_scheme(url)
    if path.is_file() and sum_of(path) == sha256:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    digest = hashlib.sha256()
    try:
        with part.open("wb") as file:
            for block in _blocks(url, max_bytes, timeout):
                digest.update(block)
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        if digest.hexdigest() != sha256:
            raise ValueError(
                f"{url} is not the file that was expected: its sha256 is {digest.hexdigest()}, not {sha256}. "
                f"It was not used. {_WAY_OUT}"
            )
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path


def sum_of(path: Path) -> str:
    """The sha256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _check_scheme(url: str) -> None:
    parts = urllib.parse.urlsplit(url)
    if parts.scheme != "https" and (parts.scheme, parts.hostname) not in {
        ("http", "127.0.0.1"),
        ("http", "localhost"),
    }:
        raise ValueError(f"{url} is not an https address, so nothing was fetched. {_WAY_OUT}")


class _CheckedRedirects(urllib.request.HTTPRedirectHandler):
    """Goes where a server points, except from https to anything less."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        fp.close()
        _check_scheme(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _blocks(url: str, max_bytes: int, timeout: float) -> Iterator[bytes]:
    """The bytes of `url`, block by block; everything that goes wrong on the way is a ValueError."""
    request = urllib.request.Request(url, headers={"User-Agent": "fradique"})
    received = 0
    try:
        opener = urllib.request.build_opener(_CheckedRedirects)
        with opener.open(request, timeout=timeout) as response:
            length = response.headers.get("Content-Length", "")
            expected = int(length) if length.isdecimal() else None
            while block := response.read(_BLOCK):
                received += len(block)
                if max(received, expected or 0) > max_bytes:
                    raise ValueError(f"{url} is not the file that was expected: too large. {_WAY_OUT}")
                yield block
    except urllib.error.HTTPError as error:
        error.close()
        raise ValueError(f"{url}: the server answers {error.code} {error.reason}. {_WAY_OUT}") from error
    except (OSError, http.client.HTTPException) as error:  # URLError and timeouts are OSErrors
        reason = getattr(error, "reason", None) or error
        raise ValueError(
            f"{url} cannot be reached ({type(error).__name__}: {reason}). Is there a network? {_WAY_OUT}"
        ) from error
    if expected is not None and received != expected:
        raise ValueError(f"{url} was cut short: {received:,} of {expected:,} bytes came. {_WAY_OUT}")

"""Downloads of one file from a server on this machine: verification, limits, errors."""

import errno
import os
import socket

import pytest
from corpus_helpers import file_names
from download_server import PAGE, PAGE_SHA256

from fradique.io import download, files
from fradique.io.download import fetch


def test_a_file_is_fetched_once_and_verified(server, tmp_path):
    path = tmp_path / "raw" / "good.txt"
    assert fetch(server.url("good.txt"), PAGE_SHA256, path).read_bytes() == PAGE
    assert fetch(server.url("good.txt"), PAGE_SHA256, path).read_bytes() == PAGE
    assert server.requests == ["/a%C3%A7/good.txt"]
    assert file_names(path.parent) == ["good.txt"]


def test_a_damaged_file_is_fetched_again(server, tmp_path):
    path = tmp_path / "good.txt"
    path.write_bytes(PAGE[:-1])
    assert fetch(server.url("good.txt"), PAGE_SHA256, path).read_bytes() == PAGE


@pytest.mark.parametrize(
    ("name", "sha256", "message"),
    [
        ("good.txt", "0" * 64, f"its sha256 is {PAGE_SHA256}, not 000"),
        ("short.txt", PAGE_SHA256, "is incomplete"),
        ("gone.txt", PAGE_SHA256, "the server answered 404"),
    ],
)
def test_a_failed_download_names_url_and_alternative(server, tmp_path, name, sha256, message):
    path = tmp_path / name
    path.write_bytes(b"old")
    with pytest.raises(ValueError, match=message) as caught:
        fetch(server.url(name), sha256, path)
    assert server.url(name) in str(caught.value) and "--input" in str(caught.value)
    assert file_names(tmp_path) == [name] and path.read_bytes() == b"old"


def test_a_redirect_is_followed_but_not_to_http(server, tmp_path):
    assert fetch(server.url("moved.txt"), PAGE_SHA256, tmp_path / "moved.txt").read_bytes() == PAGE
    with pytest.raises(ValueError, match=r"http://example.invalid/good.txt is not an https URL"):
        fetch(server.url("gone_away.txt"), PAGE_SHA256, tmp_path / "gone_away.txt")
    assert file_names(tmp_path) == ["moved.txt"]


@pytest.mark.parametrize("name", ["good.txt", "endless.txt"])
def test_the_size_is_limited_with_and_without_content_length(server, tmp_path, name):
    with pytest.raises(ValueError, match="is larger than"):
        fetch(server.url(name), PAGE_SHA256, tmp_path / name, max_bytes=len(PAGE) - 1)
    assert file_names(tmp_path) == []
    assert fetch(server.url(name), PAGE_SHA256, tmp_path / name, max_bytes=len(PAGE)).read_bytes() == PAGE


def test_a_refused_connection_names_url_and_alternative(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound but not listening
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/a.txt"
        with pytest.raises(ValueError, match=r"a\.txt cannot be reached .*refused.*--input"):
            fetch(url, PAGE_SHA256, tmp_path / "a.txt")
    assert file_names(tmp_path) == []


def test_a_silent_server_times_out(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/a.txt"
        with pytest.raises(ValueError, match=r"cannot be reached .*timed out"):
            fetch(url, PAGE_SHA256, tmp_path / "a.txt", timeout=0.2)


@pytest.mark.parametrize(
    "url", ["http://example.org/a", "ftp://127.0.0.1/a", "file:///etc/hosts", "a.txt", ""]
)
def test_only_https_is_allowed_for_other_machines(tmp_path, url):
    with pytest.raises(ValueError, match=r"is not an https URL"):
        fetch(url, PAGE_SHA256, tmp_path / "a")
    assert file_names(tmp_path) == []


def test_processes_with_equal_ids_can_fetch_the_same_file(server, tmp_path, monkeypatch):
    """Containers that share a disk may have equal process ids; each download has its own temporary file."""
    monkeypatch.setattr(files.os, "getpid", lambda: 7)
    real_download, temporary_files = download._download, []

    def observed_download(*args):
        yield from real_download(*args)
        temporary_files.append([path.name for path in tmp_path.glob(".*.tmp")])
        if len(temporary_files) == 1:
            fetch(server.url("good.txt"), PAGE_SHA256, tmp_path / "good.txt")

    monkeypatch.setattr(download, "_download", observed_download)
    fetch(server.url("good.txt"), PAGE_SHA256, tmp_path / "good.txt")
    assert [len(names) for names in temporary_files] == [1, 2] and file_names(tmp_path) == ["good.txt"]


def test_a_connection_after_the_deadline_is_closed(server):
    """The timer may fire while a redirect opens the next connection, which it cannot see yet."""
    deadline = download._DeadlineHandler(total_timeout=9.0)
    deadline.close_connections()
    with pytest.raises(ValueError, match="the deadline has passed"):
        list(download._read_response(server.url("good.txt"), 1000, 5.0, deadline))


def test_old_temporary_files_are_removed(server, tmp_path):
    old, new = (tmp_path / f".good.txt.{name}.tmp" for name in ("old", "new"))
    for path in (old, new):
        path.write_text("half")
    os.utime(old, (1e9, 1e9))
    fetch(server.url("good.txt"), PAGE_SHA256, tmp_path / "good.txt")
    assert file_names(tmp_path) == [new.name, "good.txt"]


def test_a_disk_error_is_not_reported_as_a_network_error(server, tmp_path, monkeypatch):
    def raise_disk_full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", raise_disk_full)
    with pytest.raises(OSError, match=r"No space left"):
        fetch(server.url("good.txt"), PAGE_SHA256, tmp_path / "good.txt")
    assert file_names(tmp_path) == []

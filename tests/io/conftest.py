"""Fixtures for the tests of downloads."""

from download_server import server  # noqa: F401

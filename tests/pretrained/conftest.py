"""Fixtures for all tests of fradique/pretrained."""

import huggingface_hub
import pytest


@pytest.fixture(autouse=True)
def empty_folder_without_network(tmp_path, monkeypatch):
    """Each test runs in an empty folder, and the Hugging Face hub cannot be reached."""

    def offline(name, **options):
        raise ConnectionError("no route to the hub\nand much more")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    monkeypatch.setattr(huggingface_hub, "model_info", offline)

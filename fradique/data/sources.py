"""The texts of the corpora: files on the web with their SHA-256, and Python's standard library."""

from __future__ import annotations

import hashlib
import os
import platform
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

from fradique.data.console import progress_bar
from fradique.data.text import Text, files_text
from fradique.io.download import RemoteFile, fetch

_RAW = "https://raw.githubusercontent.com"
_ECA = f"{_RAW}/jptn-ufal/MyNanoGPT/b6328667ad1f7b3dbefadcd73f79e49b65e97c7e/E%C3%A7a/archive"
_GPTLAB = f"{_RAW}/wmelo52/GPTLab/dd6ccfb62b64eb00e4963f725cc9d4045a6aa39d/corpus"
_CHAR_RNN = f"{_RAW}/karpathy/char-rnn/6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e/data/tinyshakespeare"
_NANO_TRANSFORMER = f"{_RAW}/Arthurml97/nano-transformer/5533f752e86641536ac848a69add82fa3e20727e"

OPENWEBTEXT = "Skylion007/openwebtext"  # a data set on the Hugging Face hub

_ECA_CHECKSUMS = """\
5b0416d355113573546b6276bfb9f522e57de7add045020e51279af54e02c3a4 a_capital.txt
4cf2025fa847afcd41cdc59e2c5ffd5e14820a8856e396ab843f4929540452c5 a_cidade_e_as_serras.txt
b5bf9f8feb0eb49a9115f86243b950d49c1fe112d5dfdbe096122fe300325cce a_ilustre_casa_de_ramires.txt
a5ae7ae9f84e82bf4b5aadd7ff930c99d7ddc1ef0d4f03d465e901dd1f627d43 a_reliquia.txt
64ae09384eaac8d5bcb8e74f9bd8531b44e8b94b0c20b38d33de66bb3a1c869a alves_e_ca.txt
df638e2982baa1c96837d87f82c41159e8aa4a3ee4a6c6f33c31d3465bc50085 as_minas_de_salomao.txt
7fefad2f71a9b3a65afa7a27da5fd11673efb55d7911c769c729fd42f355b4e2 cartas_de_inglaterra.txt
8d81474bb2558264f23e000538e4f29d0fcf0ac02e26f6e7c5d7949fc28efc4d cartas_familiares.txt
47d0cbe8b2cda7e8dd6dc7ee7206ce39a102f7d7220f55625fef7223dbfed8c3 contos.txt
e8d900d8abad5a5844c1fe495ad502260e63214114b57c50e8c335807b835c5c cronicas_de_londres.txt
4a855df8e463f0831d881650bb1a5b4cbae347684901c4795e723b64a1cc7244 ecos_de_paris.txt
3d69b62f40464835a34aa8a7655a22e2a71fde1573ae929f109eed4814927e70 o_conde_de_abranhos.txt
35f973e1e737a52429cd04e6e27859db9c0a31bdee99e6344ea8d8f9679cf963 o_crime_do_padre_amaro.txt
2b78b500d53b5fc8f5769e229872b1b330cb8884762ff51051716af631dbbda0 o_mandarim.txt
b0f5880aa79aba8d503e4d5a92eb800461ee1d8f88b50bb41f69564004dd9472 o_misterio_da_estrada_de_sintra.txt
2e868e690d4c31c21bdeeda6b1818ebca855c7a4098c85a0f40e7968e0c35f66 o_primo_basilio.txt
e2110ddf18d1c894cecb3e9fd3d1d296cb28ead13c2e5ee0296e778eac3f4925 os_maias.txt
648b22213ef6c3820d9fd2db43c5783a66e768b4d3f5b28b0821c5c3ac3c63f9 prosas_barbaras.txt
7c6e6267a3db84849f5728ba074f6b1f970270c2feb78700cfa0568a76f7d4cb ultimas_paginas.txt
551443c53d74c80a42c0fd5c45eaae88ae5133a48b1edf855a6cc5c9c713db9a uma_campanha_alegre_I.txt
5bba1b4aab6b0f242e302d35175b35cca899cfa6d13852904269342eb6fb8e30 uma_campanha_alegre_II.txt
"""
_ECA_FILES = [line.split() for line in _ECA_CHECKSUMS.splitlines()]
ECA = tuple(RemoteFile(f"{_ECA}/{name}", sha256) for sha256, name in _ECA_FILES)
MACHADO_TALES = (
    RemoteFile(
        f"{_GPTLAB}/machado_de_assis_conto.txt",
        "f7eaaccb575b68bdd7995bd688a4c52deb7f611678a429ec9ffcf2a2b4940720",
    ),
)
MACHADO_NOVELS = (
    RemoteFile(
        f"{_GPTLAB}/machado_de_assis_romance.txt",
        "17c13db708dfea68ff2ed14a8c7b6faf4277703a8ea57756d4b6b2890c84dad7",
    ),
)
SHAKESPEARE = (
    RemoteFile(f"{_CHAR_RNN}/input.txt", "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"),
)
GOLDEN_AGE = (
    RemoteFile(
        f"{_NANO_TRANSFORMER}/input.txt", "3ac86d8392f5cd28b5d3860a6d37f23974182b6219fbfe2fb3bda28e5e5faec9"
    ),
)


def download_text(remote_files: tuple[RemoteFile, ...]) -> Callable[[Path], Text]:
    """A function that downloads files and returns their concatenated text, sorted by file name.

    Its argument is the folder of the corpus. The files are kept in the subfolder raw/, so that later calls
    need no network.
    """

    def download(folder: Path) -> Text:
        ordered = sorted(remote_files, key=lambda file: file.name)
        paths = []
        with progress_bar(len(ordered), "downloading", "file") as bar:
            for file in ordered:
                paths.append(fetch(file.url, file.sha256, folder / "raw" / file.name))
                bar.update()
        return files_text(paths, ", ".join(file.url for file in ordered))

    return download


# The corpus of Python's standard library leaves out packages that are not part of the library or that some
# installations lack (tests, IDLE, demos), and tables of data (encodings, the help texts of pydoc).
_EXCLUDED_FOLDERS = {"site-packages", "dist-packages", "ensurepip", "__pycache__", "test", "tests", "idlelib"}
_EXCLUDED_FOLDERS |= {"lib2to3", "turtledemo", "encodings", "pydoc_data"}
_EXCLUDED_PREFIXES = ("_sysconfigdata", "python-config", "sitecustomize")  # settings of one installation
_MAX_LIBRARY_BYTES = 8_000_000  # enough to train on for an hour, and prepared in a second
_PLAIN_ASCII = b"\n" + bytes(range(ord(" "), ord("~") + 1))  # newline and printable ASCII: 96 characters


def python_library(folder: Path) -> Text:
    """The source code of the standard library of the running Python, up to 8 MB. `folder` is not used.

    Files are ordered by a hash of their names, so that the end of the text, which is the validation split,
    has files from all parts of the library. Files with characters other than newline and printable ASCII are
    left out. The text depends only on the Python version and the installed modules. Raises ValueError if
    there is no source code.
    """
    library = Path(sysconfig.get_path("stdlib"))
    names = sorted(_library_files(library), key=lambda name: hashlib.sha256(name.encode()).digest())
    paths, size = [], 0  # bytes, which are characters in ASCII
    for name in names:
        code = _read_plain_ascii(library / name)
        if code and size + len(code) <= _MAX_LIBRARY_BYTES:
            paths.append(library / name)
            size += len(code)
    if not paths:
        raise ValueError(f"there is no source code in {library}: use a text of your own with --input FILE")
    source = f"the standard library of Python {platform.python_version()}, {len(paths)} files"
    return Text(source, size, lambda: map(_read_plain_ascii, paths))


def _library_files(library: Path) -> Iterator[str]:
    """The paths of the library's source files relative to `library`, with forward slashes."""
    for parent, folders, names in os.walk(library):
        folders[:] = [name for name in folders if name not in _EXCLUDED_FOLDERS]  # os.walk skips the others
        for name in names:
            if name.endswith(".py") and not name.startswith(_EXCLUDED_PREFIXES):
                yield (Path(parent) / name).relative_to(library).as_posix()


def _read_plain_ascii(path: Path) -> str:
    """The text of a file with "\\n" newlines; "" if it has characters that are not in _PLAIN_ASCII."""
    if not path.is_file():  # for example a broken link
        return ""
    data = path.read_bytes().replace(b"\r\n", b"\n")
    other_characters = data.translate(None, delete=_PLAIN_ASCII)
    return "" if other_characters else data.decode("ascii")

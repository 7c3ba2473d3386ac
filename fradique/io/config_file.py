"""Config files: Python that assigns settings, and the settings.json of a run.

A config file runs in a namespace that contains the settings so far.
"""

from __future__ import annotations

import ast
import codecs
import json
import sys
import traceback
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from fradique.io.config_check import did_you_mean, ineffective_statements, shorten
from fradique.io.files import PROJECT_FOLDER, describe_search
from fradique.io.terminal import quote

if TYPE_CHECKING:
    from configurator import SettingSpec

MAX_CONFIG_BYTES = 1 << 20
NOT_PYTHON = {".yaml": "YAML", ".yml": "YAML", ".json": "JSON", ".toml": "TOML", ".ini": "INI"}
# Settings that apply to one command only: the settings.json of an earlier run does not set them.
SETTINGS_OF_ONE_COMMAND = ("overwrite", "eval_only", "debug")


class NotAConfigFileError(ValueError):
    """The file is no Python; the message says what to do."""


class ConfigFile(dict[str, Any]):
    """Runs a config file with itself as the globals, and records the line that last assigned each name."""

    def __init__(self, values: Mapping[str, Any], path: str, specs: Mapping[str, SettingSpec]) -> None:
        super().__init__({"reset": self.reset, **values}, __file__=path, __name__="__config__")
        self.initial, self.path, self.specs = dict(self), path, specs
        self.line_numbers: dict[str, int] = {}  # name -> line that last assigned it
        self.imported: set[str] = set()
        self.ineffective: list[str] = []  # problems: statements that look like settings but set nothing

    def __setitem__(self, name: str, value: Any) -> None:
        self.line_numbers[name] = sys._getframe(1).f_lineno  # frame 1 runs the config file
        super().__setitem__(name, value)

    def reset(self, group: str) -> None:
        """Set every setting of a group to its default. The config file calls this."""
        keys = [key for key, spec in self.specs.items() if group is not None and spec.group == group]
        if not keys:
            groups = {spec.group: repr(spec.group) for spec in self.specs.values() if spec.group}
            hint = did_you_mean(str(group), groups) or f" (the groups are {', '.join(groups.values())})"
            raise ValueError(f"reset({shorten(repr(group))}): unknown group of settings{hint}")
        for key in keys:
            super().__setitem__(key, self.specs[key].default)
            self.line_numbers[key] = sys._getframe(1).f_lineno

    def run(self) -> None:
        """Run the file, or read it if it is the settings.json of a run."""
        with Path(self.path).open("rb") as file:
            source = file.read(MAX_CONFIG_BYTES + 1)
        if len(source) > MAX_CONFIG_BYTES:
            raise NotAConfigFileError("not a config file: it is larger than 1 MB")
        kind = NOT_PYTHON.get(Path(self.path).suffix.lower())
        if kind == "JSON":
            self._read_settings_json(source)
            return
        if kind:
            raise NotAConfigFileError(
                f"{kind}, but a config file is Python: write n_layer = 12, in a file x.py"
            )
        if source.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in source:
            raise NotAConfigFileError(
                "not UTF-8 text but UTF-16 or binary: save it as UTF-8 (in an editor: Save as, encoding "
                "UTF-8; in PowerShell: ... | Out-File -Encoding utf8 x.py instead of >)"
            )
        tree = ast.parse(source, self.path)
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                self.imported |= {alias.asname or alias.name.split(".")[0] for alias in node.names}
        self.ineffective = list(ineffective_statements(tree, self.specs))
        # exec is deliberate: a config file is code, and the README says so. It may compute one setting from
        # another (lr_decay_iters = max_iters) and import what it needs. Run it as you would run a script.
        exec(compile(tree, self.path, "exec", dont_inherit=True), self)

    def _read_settings_json(self, source: bytes) -> None:
        try:
            saved = json.loads(source)["settings"].items()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise NotAConfigFileError(
                "JSON that is not the settings.json of a run, but a config file is Python: write n_layer = "
                "12, in a file x.py"
            ) from None
        keys = self.specs.keys() - SETTINGS_OF_ONE_COMMAND
        if "init_from" in keys and self.specs["init_from"].default != "scratch":
            keys -= {
                "init_from"
            }  # the one of train.py: where its weights came from. This command loads out_dir
        self.update({key: value for key, value in saved if key in keys})

    def assigned(self) -> list[str]:
        """Names that the file assigned, even to the same value; not names that it only read or deleted."""
        # Python does not call __setitem__ for an assignment to a `global` name in a function
        changed = [name for name in self if name not in self.initial or self[name] is not self.initial[name]]
        return [name for name in dict.fromkeys([*self.line_numbers, *changed]) if name in self]

    def is_helper(self, name: str) -> bool:
        """Whether a name is not meant as a setting: a _name, an import, a function or a class."""
        is_code = isinstance(self[name], ModuleType) or callable(self[name])
        return is_code or name.startswith("_") or name in self.imported


def describe_failure(path: str, error: BaseException, specs: Mapping[str, SettingSpec]) -> str:
    """The message for an error that a config file raised, or for a config file that cannot be read."""
    frames = traceback.extract_tb(error.__traceback__)
    line_numbers = [frame.lineno for frame in frames if frame.filename == path]  # [] if no line was run
    message = f"{type(error).__name__}: {error}"
    if isinstance(error, SyntaxError) and error.filename == path:
        line_numbers, message = [error.lineno], f"SyntaxError: {error.msg}"
    elif isinstance(error, NotAConfigFileError):
        return f"{path}: {error}"
    elif isinstance(error, FileNotFoundError) and not line_numbers:
        message = f"no such config file{suggest_flag(path, specs) or suggest_file(path)}"
    elif not path:
        message = "an empty argument: name a config file (is a variable of the shell unset?)"
    # PermissionError: on Windows
    elif isinstance(error, IsADirectoryError | PermissionError) and Path(path).is_dir() and not line_numbers:
        flag = f", or write --out_dir={quote(path)}" if "out_dir" in specs else ""
        message = f"a folder, not a config file: name a file, such as config/x.py{flag}"
    elif isinstance(error, OSError) and not line_numbers:
        message = error.strerror or message
    line = f" line {line_numbers[-1]}" if line_numbers and line_numbers[-1] else ""
    return f"{path or repr('')}{line}: {message}"


def suggest_flag(argument: str, specs: Mapping[str, SettingSpec]) -> str:
    """A hint for an argument that is no file: the flag that was probably meant, or ""."""
    flag = argument.lstrip("-")
    name = flag.partition("=")[0].replace("-", "_")
    return f" (did you mean --{flag}?)" if name in specs or ("=" in flag and name.isidentifier()) else ""


def suggest_file(path: str) -> str:
    """A hint for a missing config file: the one with the most similar name, and where the file could be."""
    files: dict[str, str] = {}  # name -> what to type
    config = Path("config")
    for folder, typed in ((PROJECT_FOLDER / config, config), (config, config), (Path(path).parent,) * 2):
        with suppress(OSError):
            names = [file.name for file in folder.iterdir() if file.suffix == ".py"]
            files |= {name: (typed / name).as_posix() for name in names}
    searched = "" if Path(path).is_absolute() else f"; looked for {describe_search(Path(path))}"
    return did_you_mean(Path(path).name, files) + searched

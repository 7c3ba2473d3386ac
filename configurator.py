"""Settings of a script: the defaults of a frozen dataclass, config files, and --key=value flags.

    @dataclass(frozen=True)
    class TrainSettings:
        '''python train.py [config/file.py ...] [--key=value ...]'''
        n_layer: int = setting(12, "number of transformer blocks", lo=1, group="model", common=True)

    if __name__ == "__main__":
        sys.exit(command(main, TrainSettings))  # calls main(resolved: Resolved[TrainSettings])

Later sources override earlier ones: defaults, the settings of a resumed run, config files from left to right,
flags in any position. All problems are found before `main` starts, and raised as one ValueError. A config
file is Python code: it assigns settings, can read the current ones, and can reset("a group") to the defaults.
"""

import inspect
import math
import re
import reprlib
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from numbers import Real
from pathlib import Path
from types import NoneType
from typing import Any, Generic, TypeVar, get_args, get_type_hints

from fradique.io.config_check import did_you_mean, shorten
from fradique.io.config_file import ConfigFile, describe_failure
from fradique.io.files import expand_home, find_beside_project
from fradique.io.terminal import command_output, flush_stdout, help_width, is_closed_pipe, wrap

T = TypeVar("T")
Values = Mapping[str, Any]
Flag = tuple[str, str | None, str]  # key, text of the value (None after a bare --key), flag as typed
BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
TYPE_NAMES = {int: "a whole number", float: "a number", bool: "True or False", str: "text", NoneType: "None"}
MAX_SHOWN_PROBLEMS = 20  # in a message
LIBRARY_FOLDERS = tuple(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib"))


@dataclass(frozen=True)
class Resolved(Generic[T]):
    """The settings of a script, and where the value of each comes from."""

    settings: T
    sources: dict[str, str]  # key -> "default", "config/x.py", "--key" or the file of a resumed run
    explicit: frozenset[str] = frozenset()  # keys set by config files and flags


def setting(
    default: Any,
    help: str,
    *,
    lo: float = -math.inf,
    hi: float = math.inf,
    choices: Sequence[Any] | None = None,
    group: str | None = None,  # heading in --help; the next fields are under it too
    above: float = -math.inf,
    common: bool = False,  # whether --help without =all shows the field
    path: bool = False,  # ~ is expanded; must not be empty, unless the default is
    escapes: bool = False,  # in a flag, \n, \t and \\ mean a newline, a tab and a backslash
) -> Any:
    """A dataclass field with a help text and limits: lo <= value <= hi, and value > above."""
    values = {"lo": lo, "hi": hi, "above": above, "choices": choices, "path": path, "escapes": escapes}
    return field(default=default, metadata={"help": help, "group": group, "common": common, **values})


@dataclass(frozen=True)
class SettingSpec:
    """The types, limits and help of one setting: its annotation and the arguments of `setting`."""

    types: tuple[type, ...]  # keys of TYPE_NAMES: (int,), (bool, str), (int, NoneType), ...
    default: Any = None
    help: str = ""
    lo: float = -math.inf
    hi: float = math.inf
    above: float = -math.inf
    choices: Sequence[Any] | None = None
    group: str | None = None
    common: bool = False
    path: bool = False
    escapes: bool = False

    def describe_limits(self) -> str:
        if math.isfinite(self.lo) and math.isfinite(self.hi):
            return f"between {self.lo} and {self.hi}"
        limits = {"at least": self.lo, "above": self.above, "at most": self.hi}
        return " and ".join(f"{words} {limit}" for words, limit in limits.items() if math.isfinite(limit))

    def describe_values(self) -> str:
        if self.choices:
            return "one of " + ", ".join(map(repr, self.choices))
        names, limits = " or ".join(TYPE_NAMES[kind] for kind in self.types), self.describe_limits()
        return f"{names}, {limits}" if limits else names

    def convert(self, value: Any) -> Any:
        """`value` in the setting's type (1e5 -> 100000, 1 -> 1.0). Raises ValueError if it does not fit."""
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError("must be finite")
        results = [result for kind in self.types for result in _try_convert(kind, value)]
        if not results or (self.choices and results[0] not in self.choices):
            hint = did_you_mean(str(value), {str(choice): repr(choice) for choice in self.choices or ()})
            raise ValueError(f"must be {self.describe_values()}{hint}")
        result = results[0]
        if isinstance(result, str) and re.search("[\ud800-\udfff]", result):
            raise ValueError("must be text (it contains half a surrogate pair, or bytes that are not UTF-8)")
        if isinstance(result, int | float) and not (self.lo <= result <= self.hi and result > self.above):
            raise ValueError(f"must be {self.describe_limits()}")
        return self._expand_path(result) if self.path else result

    def _expand_path(self, paths: str) -> str:
        """Comma-separated paths with ~ expanded. Raises ValueError if they are empty, but not by default."""
        if not paths.strip() and self.default:
            raise ValueError("is empty: name a folder (is a variable of the shell unset?)")
        return ",".join(expand_home(path) for path in paths.split(","))

    def parse(self, text: str) -> Any:
        """The None, boolean or number that `text` means for this setting, or else `text`. Not checked."""
        if NoneType in self.types and text.lower() == "none":
            return None
        if bool in self.types and text.lower() in BOOLEANS:
            return BOOLEANS[text.lower()]
        if int in self.types or float in self.types:
            for kind in (int, float):  # float also for an int setting, which accepts 1e5
                with suppress(ValueError):
                    return kind(text)
        return _unescape(text) if self.escapes else text

    def takes_word(self, word: str) -> bool:
        """Whether the word after a bare --key of this setting is its value, and not a config file or flag."""
        if self.types == (bool,):
            return word.lower() in BOOLEANS
        return not word.startswith("--") and not (bool in self.types and word.endswith(".py"))


SWITCHES = {  # flags that every command has, and that are not settings
    "help": SettingSpec(
        (bool, str), False, "show help and exit", choices=("all", True, False), group="general"
    ),
    "print_settings": SettingSpec((bool,), False, "show the value and the source of each setting and exit"),
    "debug": SettingSpec((bool,), False, "show the traceback of an error"),
}


def _unescape(text: str) -> str:
    """`text` with its \\n, \\t and \\\\ replaced, which most shells pass on as they are typed.

    FILE:path is not changed: the path may be one of Windows, such as FILE:C:\\new.txt.
    """
    characters = {"n": "\n", "t": "\t", "\\": "\\"}
    if text.startswith("FILE:"):
        return text
    return re.sub(r"\\([nt\\])", lambda match: characters[match[1]], text)


def _specs(cls: type) -> dict[str, SettingSpec]:
    hints, group, specs = get_type_hints(cls), None, {}
    for field_ in fields(cls):
        types = get_args(hints[field_.name]) or (hints[field_.name],)
        assert {*types} <= {*TYPE_NAMES}, f"{cls.__name__}.{field_.name}: a setting cannot be of type {types}"
        group = field_.metadata.get("group") or group
        spec = SettingSpec(types, field_.default, **{**field_.metadata, "group": group})
        specs[field_.name] = replace(spec, default=spec.convert(field_.default))
    return specs


def _try_convert(kind: type, value: Any) -> list[Any]:
    """[`value` as a `kind`], or [] if that would change it. For int: 2.0 -> [2], 2.5 -> [], True -> []."""
    if kind not in (int, float):
        return [value] if isinstance(value, kind) else []
    if isinstance(value, Real) and not isinstance(value, bool):
        with suppress(OverflowError, ValueError):  # of float(10**400) and int(np.float32("nan"))
            number = kind(value)
            return [number] if math.isfinite(number) and (kind is float or number == value) else []
    return []


def _parse_argv(argv: Sequence[str], specs: Mapping[str, SettingSpec]) -> tuple[list[str], list[Flag]]:
    """The config files and the flags of a command line. A flag is --key=value, --key value or --key."""
    files, flags = [], []
    words = ["--help" if word == "-h" else word for word in reversed(argv)]  # the next word is the last
    while words:
        word = words.pop()
        if not word.startswith("--"):
            files.append(word)
            continue
        name, equals, value = word.partition("=")
        key = name[2:].replace("-", "_")
        spec = specs.get(key, SettingSpec((bool, str)))  # an unknown flag may be with or without a value
        if not equals and words and spec.takes_word(words[-1]):
            equals, value = "=", words.pop()
        flags.append((key, value if equals else None, shorten(name + equals + value)))
    return files, flags


class _Resolver:
    """Applies all sources of settings in order, and collects the problems."""

    def __init__(self, cls: type, argv: Sequence[str], base: Values, base_name: str) -> None:
        self.cls, self.base_name, self.specs = cls, base_name, _specs(cls)
        self.values = {key: spec.default for key, spec in self.specs.items()}
        self.sources = dict.fromkeys(self.specs, "default")
        self.invalid: dict[str, str] = {}  # key -> problem with its value; a later value removes the problem
        self.other_problems: list[str] = []
        self.config_error: BaseException | None = None  # the first error that a config file raised
        for key in [key for key in self.specs if key in base]:  # an older run may have other settings
            self.set(key, base[key], base_name, f"{base_name}, {key} = {reprlib.repr(base[key])}")
        files, flags = _parse_argv(argv, SWITCHES | self.specs)
        for path in files:
            self.read_file(path)
        for flag in flags:
            self.read_flag(*flag)

    def set(self, key: str, value: Any, source: str, location: str) -> None:
        self.invalid.pop(key, None)
        self.values[key], self.sources[key] = value, source
        try:
            self.values[key] = self.specs[key].convert(value)
        except ValueError as error:
            self.invalid[key] = f"{location}: {error}"

    def read_file(self, path: str) -> None:
        found = find_beside_project(Path(path))
        path = path if found == Path(path) else str(found)
        namespace = ConfigFile(self.values, path, self.specs)
        try:
            namespace.run()
        except (Exception, SystemExit) as error:
            self.config_error = self.config_error or error
            self.other_problems.append(describe_failure(path, error, self.specs))
        self.other_problems += [f"{path} {problem}" for problem in namespace.ineffective]
        for key in namespace.assigned():
            location = f"{path} line {namespace.line_numbers[key]}" if key in namespace.line_numbers else path
            if key in self.specs:
                self.set(key, namespace[key], path, f"{location}, {key} = {reprlib.repr(namespace[key])}")
            elif not namespace.is_helper(key):
                self.report_unknown(location, key, self.specs, f"start names of your own with _: _{key}")

    def read_flag(self, key: str, text: str | None, typed: str) -> None:
        spec = self.specs.get(key)
        if spec is not None:
            self.set(key, True if text is None else spec.parse(text), f"--{key}", typed)
            if text is None and bool not in spec.types:
                self.invalid[key] = f"{typed}: needs a value, for example {typed}={spec.default!r}"
        elif key not in SWITCHES:
            self.report_unknown(typed, key, SWITCHES | self.specs, "--help=all shows all settings")
        elif text is not None:
            try:
                SWITCHES[key].convert(SWITCHES[key].parse(text))
            except ValueError as error:
                self.other_problems.append(f"{typed}: {error}")

    def report_unknown(self, location: str, key: str, candidates: Iterable[str], advice: str) -> None:
        hint = did_you_mean(key, {name: repr(name) for name in candidates}) or f" ({advice})"
        self.other_problems.append(f"{location}: unknown setting {shorten(key)!r}{hint}")

    def make_settings(self) -> Any:
        """The settings, or None if a value is invalid or a config file failed. Contradictions are allowed."""
        return None if self.invalid or self.config_error else self.cls(**self.values)

    def finish(self) -> Resolved[Any]:
        """The checked settings. Raises one ValueError with all problems."""
        settings = self.make_settings()
        problems = [*self.other_problems, *self.invalid.values()]
        if settings is not None and hasattr(settings, "problems"):
            problems += settings.problems()  # values that contradict each other
        if len(problems) > 1:
            lines = [f"{len(problems)} problems with the settings:", *problems[:MAX_SHOWN_PROBLEMS]]
            n_hidden = len(problems) - MAX_SHOWN_PROBLEMS
            problems = ["\n  - ".join(lines) + (f"\nand {n_hidden} more" if n_hidden > 0 else "")]
        if problems:
            raise ValueError(problems[0]) from self.config_error
        explicit = {key for key, source in self.sources.items() if source not in ("default", self.base_name)}
        return Resolved(settings, self.sources, frozenset(explicit))


def resolve(
    cls: type[T], argv: Sequence[str], base: Values | None = None, base_name: str = ""
) -> Resolved[T]:
    """The settings of a command line. Raises one ValueError with all problems.

    base: saved settings that replace the defaults. Keys that `cls` does not have, and SWITCHES, are ignored.
    """
    return _Resolver(cls, argv, base or {}, base_name or "resumed run").finish()


def format_settings(resolved: Resolved[Any]) -> str:
    """One line per setting, with its source as a comment; the text is a valid config file."""
    lines = {key: f"{key} = {value!r}" for key, value in asdict(resolved.settings).items()}
    width = min(48, max(map(len, lines.values()), default=0))  # one long line must not widen all
    return "\n".join(f"{line:<{width}}  # {resolved.sources[key]}" for key, line in lines.items())


def format_help(cls: type, show_all: bool = False) -> str:
    """The docstring of a settings class, and its settings: the common ones, or all if none is common."""
    width, specs = help_width(), _specs(cls)
    shown = {key: spec for key, spec in specs.items() if spec.common and not show_all} or specs
    usage, *paragraphs = inspect.cleandoc(cls.__doc__ or "").split("\n\n")
    paragraphs.append("Set values by `--key=value`, or by `key = value` in a config file; flags win.")
    if len(shown) < len(specs):
        paragraphs.append(f"The {len(shown)} most used of {len(specs)} settings; `--help=all` shows all:")
    lines = [usage]
    for text in paragraphs:
        lines += ["", text if re.search("^ ", text, re.M) else wrap(text, width)]  # examples are indented
    flags = shown | {key: spec for key, spec in SWITCHES.items() if key not in shown}
    column, heading = len("  --") + max(map(len, flags)) + 2, None
    for key, spec in flags.items():
        if spec.group not in (None, heading):
            heading = spec.group
            lines += ["", f"{heading}:"]
        text = f"{spec.help} ({spec.describe_values()}; default `{spec.default!r}`)"
        lines.append(f"  --{key}".ljust(column) + wrap(text, width, column).lstrip())
    return "\n".join(lines)


def command(
    main: Callable[[Resolved[T]], int | None],
    cls: type[T],
    argv: Sequence[str] | None = None,
    *,
    base: Callable[[T], tuple[Values, str] | None] | None = None,
    report_error: Callable[[str], None] = lambda text: print(text, file=sys.stderr),
) -> int:
    """Run `main` as a shell command and return its exit status: sys.exit(command(main, Settings)).

    ValueError, OSError and MemoryError get one message and status 2. Other errors are bugs and propagate.
    base: a function of the settings. If they resume a run, it returns the saved settings of the run and the
    name of their file, and the command line is resolved again with the saved settings as defaults.
    report_error: prints the message of an error, or its traceback.
    """
    with command_output():
        return _run(main, cls, sys.argv[1:] if argv is None else argv, base, report_error)


def _run(
    main: Callable[[Resolved[T]], int | None],
    cls: type[T],
    argv: Sequence[str],
    base: Callable[[T], tuple[Values, str] | None] | None,
    report_error: Callable[[str], None],
) -> int:
    """`command`, after the encoding of the output is set."""
    _, flags = _parse_argv(argv, SWITCHES | _specs(cls))
    switches = {key: SWITCHES[key].parse(text or "true") for key, text, _ in flags if key in SWITCHES}
    debug, status = switches.get("debug") is True, None
    try:
        if switches.get("help"):
            print(format_help(cls, show_all=switches["help"] == "all"))
        else:
            resolver = _Resolver(cls, argv, {}, "")
            settings = resolver.make_settings()
            saved = base(settings) if base and settings is not None else None
            resolved = resolve(cls, argv, *saved) if saved else resolver.finish()
            debug = getattr(resolved.settings, "debug", debug)  # `cls` may have a `debug` of its own
            if switches.get("print_settings"):
                print(format_settings(resolved))
            else:
                status = main(resolved)
    except KeyboardInterrupt:
        return 130  # the exit status of a program that Ctrl-C ended
    except (ValueError, OSError, MemoryError) as error:
        # a line more, because a closed pipe is noticed only when something is written to it
        probe = "\n" if is_closed_pipe(error) else ""
        if isinstance(error, OSError) and (output_status := flush_stdout(probe)):
            return output_status
        report_error(traceback.format_exc().rstrip() if debug else _format_error(error))
        return 2
    return flush_stdout() or status or 0


def _format_error(error: ValueError | OSError | MemoryError) -> str:
    message = str(error) or ("not enough memory" if isinstance(error, MemoryError) else type(error).__name__)
    if isinstance(error, OSError) and error.strerror and error.filename and not error.filename2:
        message = f"{error.filename}: {error.strerror}"
    # file names may contain terminal control sequences, and flags may contain surrogates
    text = (c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in message)
    # the message needs no traceback if a `raise` of this project wrote it, or if it is about a file
    frame = traceback.extract_tb(error.__traceback__)[-1]
    raised_here = (frame.line or "").startswith("raise") and not frame.filename.startswith(LIBRARY_FOLDERS)
    is_clear = str(error) and (raised_here or getattr(error, "filename", None))
    return f"error: {''.join(text)}" + ("" if is_clear else "\n(--debug=True shows where it was raised)")

"""Settings of a script: a frozen dataclass <- config files <- --key=value.

    @dataclass(frozen=True)
    class TrainSettings:
        '''python train.py [config/file.py ...] [--key=value ...]'''

        n_layer: int = setting(12, "blocks of the transformer", lo=1, group="model")
        dropout: float = setting(0.0, "0 for pretraining, 0.1 and more for finetuning", lo=0, hi=1)

    if __name__ == "__main__":
        sys.exit(command(main, TrainSettings))  # main(resolved: Resolved[TrainSettings])

Later wins: defaults, the saved settings of a run that is resumed, config files from left to right, then flags
wherever they stand. All problems are found before `main` starts, and told in one ValueError.
"""

import ast
import dataclasses
import difflib
import inspect
import math
import os
import re
import reprlib
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from types import ModuleType, NoneType
from typing import Any, Generic, TypeVar, get_args, get_type_hints

T = TypeVar("T")
Flag = tuple[str, str | None, str]  # key, text (None after a bare --key), the flag as it was typed
Base = tuple[Mapping[str, Any], str]  # the saved settings of a run that is resumed, and their name
BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
HALVES = re.compile("[\ud800-\udfff]")  # of characters: what no UTF-8 file can hold
MOST_BYTES = 1 << 20  # of a config file
NO_MEMORY = re.compile("out of memory|can't allocate memory|not enough memory")  # in torch's RuntimeErrors
TOO_LARGE = "there is not enough memory for this: make the model, batch_size or block_size smaller"
SHOWN = 200  # characters of a flag in a message
PROBLEMS_TOLD = 20  # in one message
KINDS = {int: "a whole number", float: "a number", bool: "True or False", str: "text", NoneType: "None"}


@dataclass(frozen=True)
class Resolved(Generic[T]):
    """Settings, and what each key came from: "default", "config/x.py", "--key" or the name of the base."""

    settings: T
    sources: dict[str, str]
    explicit: frozenset[str] = frozenset()  # the keys that config files and flags set


def setting(
    default: Any,
    help: str,
    *,
    lo: float | None = None,
    hi: float | None = None,
    choices: Sequence[Any] | None = None,
    group: str | None = None,
    above: float | None = None,
) -> Any:
    """A dataclass field. `lo` and `hi` are allowed, `above` is not; `group` is the heading from here on."""
    about = {"help": help, "lo": lo, "hi": hi, "above": above, "choices": choices, "group": group}
    return field(default=default, metadata=about)


@dataclass(frozen=True)
class _Spec:
    """What a field's annotation and its `setting` say."""

    types: tuple[type, ...]  # of KINDS: (int,), (bool, str), (int, NoneType), ...
    default: Any = None
    help: str = ""
    lo: float | None = None
    hi: float | None = None
    above: float | None = None
    choices: Sequence[Any] | None = None
    group: str | None = None

    def range(self) -> str:
        if self.lo is not None and self.hi is not None:
            return f"between {self.lo} and {self.hi}"
        ends = {"at least": self.lo, "above": self.above, "at most": self.hi}
        return " and ".join(f"{words} {end}" for words, end in ends.items() if end is not None)

    def expected(self) -> str:
        if self.choices:
            return "one of " + ", ".join(map(repr, self.choices))
        kinds = " or ".join(KINDS[kind] for kind in self.types)
        return f"{kinds}, {self.range()}" if self.range() else kinds

    def fit(self, value: Any) -> Any:
        """`value` in the field's type (1e5 -> 100000, 1 -> 1.0). ValueError says what it must be instead."""
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError("must be finite")
        fits = [fitted for kind in self.types for fitted in _lossless(kind, value)]
        if not fits or (self.choices and fits[0] not in self.choices):
            near = _did_you_mean(str(value), {str(choice): repr(choice) for choice in self.choices or ()})
            raise ValueError(f"must be {self.expected()}{near}")
        if isinstance(fits[0], str) and HALVES.search(fits[0]):
            raise ValueError("must be text: it holds half of a surrogate pair, or bytes that are not UTF-8")
        if isinstance(fits[0], int | float) and not self._in_range(fits[0]):
            raise ValueError(f"must be {self.range()}")
        return fits[0]

    def parse(self, text: str) -> Any:
        """What `text` means for this field; `text` itself where that is nothing: then `fit` refuses it."""
        if NoneType in self.types and text.lower() == "none":
            return None
        if bool in self.types and text.lower() in BOOLEANS:
            return BOOLEANS[text.lower()]
        for kind in (int, float) if {int, float} & {*self.types} else ():
            with suppress(ValueError):
                return kind(text)
        return text

    def takes(self, word: str) -> bool:
        """Whether `word`, next after a flag without "=", is that flag's value."""
        if self.types == (bool,):
            return word.lower() in BOOLEANS
        return not word.startswith("--") and not (bool in self.types and word.endswith(".py"))

    def _in_range(self, number: float) -> bool:
        low = self.lo is None or number >= self.lo
        return low and (self.hi is None or number <= self.hi) and (self.above is None or number > self.above)


SWITCHES = {
    "help": _Spec((bool,), False, "show this and stop (-h does too)", group="every command"),
    "print_settings": _Spec((bool,), False, "show the settings and what each came from, and stop"),
    "debug": _Spec((bool,), False, "show where an error was raised"),
}


def _specs(cls: type) -> dict[str, _Spec]:
    hints, group, specs = get_type_hints(cls), None, {}
    for part in dataclasses.fields(cls):
        types = get_args(hints[part.name]) or (hints[part.name],)
        assert {*types} <= {*KINDS}, f"{cls.__name__}.{part.name} has a type that no setting has: {types}"
        group = part.metadata.get("group") or group
        spec = _Spec(types, part.default, **{**part.metadata, "group": group})
        specs[part.name] = dataclasses.replace(spec, default=spec.fit(part.default))
    return specs


def _lossless(kind: type, value: Any) -> list[Any]:
    """`value` as a `kind`, in a list, or no value where something would be lost. A bool is no number."""
    if kind not in (int, float):
        return [value] if isinstance(value, kind) else []
    if isinstance(value, Real) and not isinstance(value, bool):
        with suppress(OverflowError, ValueError):  # float(10**400), or an int of a foreign float's nan
            number = kind(value)
            return [number] if math.isfinite(number) and (kind is float or number == value) else []
    return []


def _did_you_mean(name: str, candidates: Mapping[str, str]) -> str:
    """The candidate whose name is nearest, as its value shows it; nothing where none is near."""
    shown = {candidate.lower(): value for candidate, value in candidates.items()}
    near = difflib.get_close_matches(name.lower(), shown, n=1)
    return f" (did you mean {shown[near[0]]}?)" if near else ""


class _Namespace(dict[str, Any]):
    """The globals of a config file. They note the line that last assigned each name."""

    def __init__(self, start: Mapping[str, Any], path: str) -> None:
        super().__init__(start, __file__=path, __name__="__config__")
        self.start, self.path = dict(self), path
        self.lines: dict[str, int] = {}
        self.imported: set[str] = set()

    def __setitem__(self, name: str, value: Any) -> None:
        self.lines[name] = sys._getframe(1).f_lineno
        super().__setitem__(name, value)

    def run(self) -> None:
        with Path(self.path).open("rb") as file:
            source = file.read(MOST_BYTES + 1)
        if len(source) > MOST_BYTES:
            raise ValueError("this is no config file: it is larger than 1 MB")
        tree = ast.parse(source, self.path)
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                self.imported |= {alias.asname or alias.name.split(".")[0] for alias in node.names}
        # exec is deliberate: a config file is code, and the README says so. It may compute one setting from
        # another (lr_decay_iters = max_iters) and import what it needs. Run it as you would run a script.
        exec(compile(tree, self.path, "exec", dont_inherit=True), self)

    def assigned(self) -> list[str]:
        """The names that the file gave a value, even the value they had; not those that it only read."""
        unnoted = (name for name in self if self[name] is not self.start.get(name, self))  # by `global`
        return [name for name in dict.fromkeys([*self.lines, *unnoted]) if name in self]

    def is_helper(self, name: str) -> bool:
        """Whether a name that is no setting was meant as none: _names, imports, functions, classes."""
        helper = isinstance(self[name], ModuleType) or callable(self[name])
        return helper or name.startswith("_") or name in self.imported


def _failure(path: str, error: BaseException, specs: Mapping[str, _Spec]) -> str:
    """What a config file raised, and in which of its lines; or why it cannot be read."""
    lines = [at.lineno for at in traceback.extract_tb(error.__traceback__) if at.filename == path]
    message = f"{type(error).__name__}: {error}"
    if isinstance(error, SyntaxError) and error.filename == path:
        lines, message = [error.lineno], f"SyntaxError: {error.msg}"
    elif isinstance(error, FileNotFoundError) and not lines:
        message = f"no such config file{_meant(path, specs)}"
    elif isinstance(error, OSError) and not lines:
        message = error.strerror or message
    place = f"{path} line {lines[-1]}" if lines and lines[-1] else path or "''"
    return f"{place}: {message}"


def _meant(path: str, specs: Mapping[str, _Spec]) -> str:
    """What may have been meant by an argument that is neither a flag nor a file."""
    flag = path.lstrip("-")
    name = flag.partition("=")[0].replace("-", "_")
    if name in specs or ("=" in flag and name.isidentifier()):
        return f" (did you mean --{flag}?)"
    files: dict[str, str] = {}
    for folder in (Path("config"), Path(path).parent):
        with suppress(OSError):
            files |= {file.name: file.as_posix() for file in folder.iterdir() if file.suffix == ".py"}
    return _did_you_mean(Path(path).name, files)


def _shown(text: str) -> str:
    """What a message repeats of the user's words: the beginning, where they go on and on."""
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


def _split(argv: Sequence[str], specs: Mapping[str, _Spec]) -> tuple[list[str], list[Flag]]:
    """The config files and the flags of a command line."""
    files, flags, words = [], [], ["--help" if word == "-h" else word for word in reversed(argv)]
    while words:
        word = words.pop()
        if not word.startswith("--"):
            files.append(word)
            continue
        name, equals, text = word.partition("=")
        key = name[2:].replace("-", "_")
        if not equals and words and specs.get(key, _Spec((bool, str))).takes(words[-1]):
            equals, text = "=", words.pop()
        flags.append((key, text if equals else None, _shown(name + equals + text)))
    return files, flags


class _Draft:
    """Settings that are being put together, and the problems met so far."""

    def __init__(self, cls: type, argv: Sequence[str], base: Mapping[str, Any], base_name: str) -> None:
        self.cls, self.base_name, self.specs = cls, base_name, _specs(cls)
        self.values = {key: spec.default for key, spec in self.specs.items()}
        self.sources = dict.fromkeys(self.specs, "default")
        self.wrong: dict[str, str] = {}  # key -> what is wrong with its value; a later, sound value mends it
        self.problems: list[str] = []  # those that nothing mends
        self.failed: BaseException | None = None  # what a config file raised
        for key in [key for key in self.specs if key in base]:  # an older run may have keys that are gone
            self.put(key, base[key], base_name, f"{base_name}, {key} = {reprlib.repr(base[key])}")
        files, flags = _split(argv, SWITCHES | self.specs)
        for path in files:
            self.read_file(path)
        for flag in flags:
            self.read_flag(*flag)

    def put(self, key: str, value: Any, source: str, where: str) -> None:
        self.wrong.pop(key, None)
        self.values[key], self.sources[key] = value, source
        try:
            self.values[key] = self.specs[key].fit(value)
        except ValueError as error:
            self.wrong[key] = f"{where}: {error}"

    def read_file(self, path: str) -> None:
        names = _Namespace(self.values, path)
        try:
            names.run()
        except (Exception, SystemExit) as error:
            self.failed = self.failed or error
            self.problems.append(_failure(path, error, self.specs))
        for key in names.assigned():
            place = f"{path} line {names.lines[key]}" if key in names.lines else path
            if key in self.specs:
                self.put(key, names[key], path, f"{place}, {key} = {reprlib.repr(names[key])}")
            elif not names.is_helper(key):
                self.unknown(place, key, self.specs, f"begin a name of your own with _, as in _{key}")

    def read_flag(self, key: str, text: str | None, where: str) -> None:
        spec = self.specs.get(key)
        if spec is not None:
            self.put(key, True if text is None else spec.parse(text), f"--{key}", where)
            if text is None and bool not in spec.types:
                self.wrong[key] = f"{where}: needs a value, as in {where}={spec.default!r}"
        elif key not in SWITCHES:
            self.unknown(where, key, SWITCHES | self.specs, "--help lists them")

    def unknown(self, where: str, key: str, candidates: Iterable[str], otherwise: str) -> None:
        hint = _did_you_mean(key, {name: repr(name) for name in candidates}) or f" ({otherwise})"
        self.problems.append(f"{where}: unknown setting {_shown(key)!r}{hint}")

    def settings(self) -> Any:
        """The settings, contradictions and all; None where a value is wrong or a config file failed."""
        return None if self.wrong or self.failed else self.cls(**self.values)

    def finish(self) -> Resolved[Any]:
        """The settings, or one ValueError with all problems."""
        settings = self.settings()
        problems = [*self.problems, *self.wrong.values()]
        if settings is not None and hasattr(settings, "problems"):
            problems += settings.problems()
        if len(problems) > 1:
            told = [f"{len(problems)} problems with the settings:", *problems[:PROBLEMS_TOLD]]
            more = len(problems) - PROBLEMS_TOLD
            problems = ["\n  - ".join(told) + (f"\nand {more} more" if more > 0 else "")]
        if problems:
            raise ValueError(problems[0]) from self.failed
        explicit = {key for key, source in self.sources.items() if source not in ("default", self.base_name)}
        return Resolved(settings, self.sources, frozenset(explicit))


def resolve(
    cls: type[T], argv: Sequence[str], base: Mapping[str, Any] | None = None, base_name: str = ""
) -> Resolved[T]:
    """The settings that a command line asks for. ValueError tells all problems with them.

    base: saved settings that stand in for the defaults; keys that `cls` does not have are passed over, as are
    the SWITCHES in argv, which are for `command`.
    """
    return _Draft(cls, argv, base or {}, base_name or "resumed run").finish()


def format_settings(resolved: Resolved[Any]) -> str:
    """The settings, one a line, with what each came from; the text is itself a config file."""
    lines = {key: f"{key} = {value!r}" for key, value in dataclasses.asdict(resolved.settings).items()}
    width = min(48, max(map(len, lines.values()), default=0))
    return "\n".join(f"{line:<{width}}  # {resolved.sources[key]}" for key, line in lines.items())


def format_help(cls: type) -> str:
    """The docstring of a settings class, and each key with its meaning, range and default."""
    how = "A key is set by --key=value, --key value, or key = value in a config file; flags win over files."
    lines, specs, heading = [inspect.cleandoc(cls.__doc__ or ""), "", how], _specs(cls), None
    for key, spec in (specs | SWITCHES | specs).items():  # a class with a `debug` of its own keeps that
        if spec.group not in (None, heading):
            heading = spec.group
            lines += ["", f"{heading}:"]
        text = f"{spec.help} ({spec.expected()}; default {spec.default!r})"
        lines.append(textwrap.fill(text, 110, initial_indent=f"  --{key:<28} ", subsequent_indent=" " * 33))
    return "\n".join(lines)


def command(
    main: Callable[[Resolved[T]], int | None],
    cls: type[T],
    argv: Sequence[str] | None = None,
    *,
    base: Callable[[T], Base | None] | None = None,
) -> int:
    """Runs `main` as a shell command and gives its exit status: sys.exit(command(main, Settings)).

    ValueError, OSError and a lack of memory are the user's to mend: one message, status 2. Others are our
    bugs and pass.
    base: sees the settings, contradictions and all. Where they resume a run, it gives that run's settings and
    their name; the command line is then resolved again on top of those.
    """
    argv = sys.argv[1:] if argv is None else argv
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a letter is no reason to stop
    flags = _split(argv, SWITCHES | _specs(cls))[1]
    asked = {key: SWITCHES[key].parse(text or "true") for key, text, _ in flags if key in SWITCHES}
    debug, status = asked.get("debug"), None
    try:
        if asked.get("help"):
            print(format_help(cls))
        else:
            resolved = _resolve_on(base, cls, argv)
            debug = getattr(resolved.settings, "debug", debug)
            if asked.get("print_settings"):
                print(format_settings(resolved))
            else:
                status = main(resolved)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError) and _stdout_is_closed():
            return 141  # what a shell says of a program that SIGPIPE ended
        traceback.print_exception(error) if debug else print(_message(error), file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if debug or not (isinstance(error, MemoryError) or NO_MEMORY.search(str(error))):
            raise
        print(_message(ValueError(TOO_LARGE)), file=sys.stderr)
        return 2
    return status or 0


def _resolve_on(base: Callable[[T], Base | None] | None, cls: type[T], argv: Sequence[str]) -> Resolved[T]:
    draft = _Draft(cls, argv, {}, "")
    settings = draft.settings()
    saved = base(settings) if base and settings is not None else None
    return resolve(cls, argv, *saved) if saved else draft.finish()


def _message(error: ValueError | OSError) -> str:
    message = str(error) or type(error).__name__
    if isinstance(error, OSError) and error.strerror and error.filename and not error.filename2:
        message = f"{error.filename}: {error.strerror}"
    # names in files may hold what moves a terminal's cursor, and flags what no stream can write
    plain = (c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in message)
    return f"error: {''.join(plain)}\n(--debug=True shows where it was raised)"


def _stdout_is_closed() -> bool:
    """Whether it is our own output that nobody reads (python train.py | head), not some other pipe."""
    try:
        print(flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains as it exits
        return True
    return False

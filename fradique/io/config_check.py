"""Find the statements of a config file that look like settings but set nothing, such as `n_layer: 2`."""

from __future__ import annotations

import ast
import builtins
import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from configurator import SettingSpec

MAX_SHOWN_CHARS = 200  # of a flag or statement that a message repeats
YAML_CONSTANTS = {"true": "True", "false": "False", "null": "None"}
Mention = tuple[str, str]  # a setting, and the Python of the value that was probably meant for it
UNKNOWN_VALUE = "<value>"


def did_you_mean(name: str, candidates: Mapping[str, str]) -> str:
    """A hint for a misspelt name: the value of the most similar key of `candidates`, or "" if none is."""
    by_lower_name = {candidate.lower(): shown for candidate, shown in candidates.items()}
    matches = difflib.get_close_matches(name.lower(), by_lower_name, n=1)
    return f" (did you mean {by_lower_name[matches[0]]}?)" if matches else ""


def shorten(text: str) -> str:
    return text if len(text) <= MAX_SHOWN_CHARS else f"{text[:MAX_SHOWN_CHARS]}…"


def ineffective_statements(tree: ast.Module, specs: Mapping[str, SettingSpec]) -> Iterator[str]:
    """Problems with statements that look like settings but set nothing, with what to write instead."""
    nodes = list(ast.walk(tree))
    called = _called(tree.body)
    attributes = {
        node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }
    statements: list[ast.AST] = list(tree.body)
    while statements:
        node = statements.pop(0)
        advice = ""
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            if node.name in called:
                yield from _local_settings(node, specs)
        elif isinstance(node, ast.ClassDef):
            mentions = [m for m in _assigned_settings(node.body, specs) if m[0] not in attributes]
            advice = f"write {_assignments(mentions)} outside of the class" if mentions else ""
        elif isinstance(node, ast.AnnAssign) and node.value is None:
            advice = _advise_annotation(node, specs)
        elif isinstance(node, ast.Expr):
            mentions = _mentions(node.value, specs)
            advice = f"write {_assignments(mentions)}" if mentions else ""
        elif isinstance(node, ast.If) and _is_main_check(node.test):
            functions = [f for f in nodes if isinstance(f, ast.FunctionDef) and f.name in _called(node.body)]
            mentions = _assigned_settings([*node.body, *(line for f in functions for line in f.body)], specs)
            if mentions:
                advice = (
                    f"its block does not run in a config file. Write {_assignments(mentions)} outside of it"
                )
            statements += node.orelse
        else:
            for field in ("body", "orelse", "handlers", "finalbody", "cases"):
                statements += getattr(node, field, [])
        if advice:
            yield _problem(node, advice)


def _called(body: Iterable[ast.AST]) -> set[str]:
    """The names of the functions that statements call."""
    nodes = [node for statement in body for node in ast.walk(statement) if isinstance(node, ast.Call)]
    return {node.func.id for node in nodes if isinstance(node.func, ast.Name)}


def _problem(node: ast.AST, advice: str) -> str:
    line = shorten(ast.unparse(node).splitlines()[0])
    return f"line {node.lineno}: {line!r} sets nothing: {shorten(advice)}"


def _assignments(mentions: Iterable[Mention]) -> str:
    return "; ".join(f"{name} = {value}" for name, value in mentions)


def _advise_annotation(node: ast.AnnAssign, specs: Mapping[str, SettingSpec]) -> str:
    """What to write instead of `name: annotation`; "" if that is no mistake, as in `_width: int`."""
    name = ast.unparse(node.target)
    if name not in specs and not isinstance(node.annotation, ast.Constant):
        return ""
    if name not in specs and not name.startswith("_"):
        hint = did_you_mean(name, {key: key for key in specs}) or " (--help=all shows all settings)"
        return f"{name!r} is an unknown setting{hint}"
    names = [n.id for n in ast.walk(node.annotation) if isinstance(n, ast.Name)]
    is_type = any(isinstance(getattr(builtins, name, None), type) for name in names)
    is_type = is_type or any(isinstance(n, ast.Subscript | ast.Attribute) for n in ast.walk(node.annotation))
    value = UNKNOWN_VALUE if is_type else ast.unparse(node.annotation)
    return f"write {name} = {YAML_CONSTANTS.get(value, value)}"


def _mentions(node: ast.expr | None, specs: Mapping[str, SettingSpec]) -> list[Mention]:
    """The settings for which an expression looks like an assignment; none for a call with an effect."""
    if (name := _setting_name(node, specs)) and isinstance(node, ast.Name):
        return [(name, UNKNOWN_VALUE)]
    if isinstance(node, ast.Compare):
        return _pair(node.left, node.comparators, specs)
    if isinstance(node, ast.BinOp):
        if isinstance(node.op, ast.Sub) or not _setting_name(node.left, specs):  # `-` is beside `=`
            return _pair(node.left, [node.right], specs)
        return [(_setting_name(node.left, specs), ast.unparse(node))]
    if isinstance(node, ast.Tuple | ast.List | ast.Set) and node.elts:
        return _pair(node.elts[0], node.elts[1:], specs, strings=True)
    if isinstance(node, ast.Dict):
        pairs = [(_setting_name(k, specs), v) for k, v in zip(node.keys, node.values, strict=True)]
        return [m for name, v in pairs for m in ([(name, ast.unparse(v))] if name else _mentions(v, specs))]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict":
        return [(k.arg, ast.unparse(k.value)) for k in node.keywords if k.arg in specs]
    if isinstance(node, ast.BoolOp | ast.IfExp):
        if any(isinstance(n, ast.Call | ast.NamedExpr) for n in ast.walk(node)):
            return []  # `n_layer > 2 or print("a small model")`
        operands = node.values if isinstance(node, ast.BoolOp) else [node.body, node.orelse]
        return [mention for operand in operands for mention in _mentions(operand, specs)]
    if isinstance(node, ast.UnaryOp):
        return _mentions(node.operand, specs)
    return _mentions(node.value, specs) if isinstance(node, ast.Subscript | ast.Attribute) else []


def _pair(
    first: ast.expr, others: Sequence[ast.expr], specs: Mapping[str, SettingSpec], strings: bool = False
) -> list[Mention]:
    """The mentions in `first == others[0]`, or `first, others[0]`; strings: "n_layer" is a setting too."""
    name = _setting_name(first, specs)
    if name and (strings or isinstance(first, ast.Name)):
        return [(name, ast.unparse(others[0]) if others else UNKNOWN_VALUE)]
    return [mention for operand in (first, *others) for mention in _mentions(operand, specs)]


def _setting_name(node: ast.expr | None, specs: Mapping[str, SettingSpec]) -> str:
    """The setting that a name or a string names, or ""."""
    name = node.id if isinstance(node, ast.Name) else node.value if isinstance(node, ast.Constant) else ""
    return name if isinstance(name, str) and name in specs else ""


def _is_main_check(test: ast.expr) -> bool:
    """Whether an expression is `__name__ == "__main__"`. The __name__ of a config file is "__config__"."""
    sides = (
        {ast.unparse(node) for node in [test.left, *test.comparators]}
        if isinstance(test, ast.Compare)
        else {}
    )
    return sides == {"__name__", "'__main__'"} and isinstance(test.ops[0], ast.Eq)


def _assigned_settings(body: Sequence[ast.AST], specs: Mapping[str, SettingSpec]) -> list[Mention]:
    """The settings that statements assign, not those in functions and classes."""
    mentions: dict[str, str] = {}
    nodes = list(body)
    while nodes:
        node = nodes.pop(0)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda):
            continue
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id in specs:
            mentions.setdefault(node.id, UNKNOWN_VALUE)
        if (
            isinstance(node, ast.Assign)
            and isinstance(target := node.targets[0], ast.Name)
            and target.id in specs
        ):
            mentions[target.id] = ast.unparse(node.value)
        nodes += ast.iter_child_nodes(node)
    return list(mentions.items())


def _local_settings(
    function: ast.FunctionDef | ast.AsyncFunctionDef, specs: Mapping[str, SettingSpec]
) -> Iterator[str]:
    """Problems with the assignments to a setting in a function that set a local variable and nothing else.

    A local variable that the function also reads is no problem.
    """
    nodes = list(ast.walk(function))
    loaded = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    scoped = {name for node in nodes if isinstance(node, ast.Global | ast.Nonlocal) for name in node.names}
    scoped |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    if {"locals", "vars"} & loaded:
        return
    for node in nodes:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [n.id for n in ast.walk(ast.Tuple(targets)) if isinstance(n, ast.Name)]
            names = [name for name in names if name in specs]
            if names and not {*names} & (loaded | scoped):
                where = f"in the function {function.name}, before it"
                yield _problem(node, f"it is a local variable. Write global {', '.join(names)} {where}")

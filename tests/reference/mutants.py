"""Mutants of Python source with one wrong sign each: the tests of the backward pass must detect every one."""

import ast
from collections.abc import Iterator

SIGNED = ("matmul", "dot", "sum", "einsum")  # calls whose result can be negated
HELPERS = """
from operator import sub
def negative(x):
    if isinstance(x, dict):
        return {name: -value for name, value in x.items()}
    return [negative(item) for item in x] if isinstance(x, list | tuple) else -x
"""
OPPOSITE = {ast.Add: ast.Sub, ast.Sub: ast.Add}


class SignFlip(ast.NodeTransformer):
    """Put a wrong sign at the n-th possible site in functions named *backward*.

    A wrong sign is + instead of -, - instead of +, or a negated product, sum or result.
    """

    def __init__(self, n: int) -> None:
        self.n, self.site, self.in_backward, self.description = n, -1, False, ""

    def is_target(self, node: ast.AST, description: str) -> bool:
        """Count a possible site, and return whether it is the n-th."""
        self.site += self.in_backward
        if self.in_backward and self.site == self.n:
            self.description = f"line {node.lineno}: {description}"
            return True
        return False

    def visit_FunctionDef(self, node):
        outer, self.in_backward = self.in_backward, self.in_backward or "backward" in node.name
        self.generic_visit(node)
        self.in_backward = outer
        return node

    def visit_Slice(self, node):
        return node  # the sign in `row[: t + 1]` belongs to an index, not to a gradient

    def visit_BinOp(self, node):
        self.generic_visit(node)
        if (
            type(node.op) in OPPOSITE
            and not joins_strings(node)
            and self.is_target(node, "+ and - exchanged")
        ):
            node.op = OPPOSITE[type(node.op)]()
        elif isinstance(node.op, ast.MatMult) and self.is_target(node, "-(a @ b)"):
            return negative(node)
        return node

    def visit_AugAssign(self, node):
        self.generic_visit(node)
        if type(node.op) in OPPOSITE and self.is_target(node, "+= and -= exchanged"):
            node.op = OPPOSITE[type(node.op)]()
        return node

    def visit_Call(self, node):
        self.generic_visit(node)
        name = ast.unparse(node.func).split(".")[-1]
        if name in SIGNED and self.is_target(node, f"-{name}"):
            return negative(node)
        if name in ("plus", "at", "subtract") and self.is_target(node, f"{name}(…, -last)"):
            node.args[-1] = negative(node.args[-1])
        return node

    def visit_Name(self, node):
        if node.id == "add" and self.is_target(node, "sub instead of add"):
            return ast.copy_location(ast.Name("sub", ast.Load()), node)
        return node

    def visit_Return(self, node):
        self.generic_visit(node)
        if isinstance(node.value, ast.Tuple):
            for i, result in enumerate(node.value.elts):
                if self.is_target(node, f"result {i} is negated"):
                    node.value.elts[i] = negative(result)
        elif node.value is not None and self.is_target(node, "the result is negated"):
            node.value = negative(node.value)
        return node


def joins_strings(node: ast.BinOp) -> bool:
    """Whether + joins strings, as in `prefix + "ln_1"`."""
    return any(
        isinstance(child, ast.Constant) and isinstance(child.value, str) for child in ast.walk(node)
    ) or (isinstance(node.left, ast.Name) and node.left.id in ("prefix", "name"))


def negative(node: ast.expr) -> ast.expr:
    return ast.copy_location(ast.Call(ast.Name("negative", ast.Load()), [node], []), node)


def mutants(source: str) -> Iterator[tuple[str, str]]:
    """For each possible site: a description of the wrong sign, and the source with it."""
    n = 0
    while True:
        transformer = SignFlip(n)
        tree = ast.fix_missing_locations(transformer.visit(ast.parse(source)))
        if not transformer.description:
            return
        yield transformer.description, ast.unparse(tree) + HELPERS
        n += 1

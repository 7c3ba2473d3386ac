"""Wrong signs, planted one by one into Python source: the tests of a backward pass must notice every one."""

import ast
from collections.abc import Iterator

SIGNED = ("matmul", "dot", "sum", "einsum")  # calls whose result may be the negative of itself
HELPERS = """
from operator import sub
def negative(x):
    if isinstance(x, dict):
        return {name: -part for name, part in x.items()}
    return [negative(part) for part in x] if isinstance(x, list | tuple) else -x
"""
OTHER = {ast.Add: ast.Sub, ast.Sub: ast.Add}


class Flip(ast.NodeTransformer):
    """Plant the n-th wrong sign that there can be in functions named *backward*: + for -, - for +, or a
    product, sum or result that is the negative of itself."""

    def __init__(self, n: int) -> None:
        self.n, self.found, self.inside, self.what = n, -1, False, ""

    def planted(self, node: ast.AST, what: str) -> bool:
        self.found += self.inside
        if self.inside and self.found == self.n:
            self.what = f"line {node.lineno}: {what}"
            return True
        return False

    def visit_FunctionDef(self, node):
        outer, self.inside = self.inside, self.inside or "backward" in node.name
        self.generic_visit(node)
        self.inside = outer
        return node

    def visit_Slice(self, node):
        return node  # `row[: t + 1]` has no sign that a gradient could have

    def visit_BinOp(self, node):
        self.generic_visit(node)
        if type(node.op) in OTHER and not names_text(node) and self.planted(node, "the other of + and -"):
            node.op = OTHER[type(node.op)]()
        elif isinstance(node.op, ast.MatMult) and self.planted(node, "-(a @ b)"):
            return negative(node)
        return node

    def visit_AugAssign(self, node):
        self.generic_visit(node)
        if type(node.op) in OTHER and self.planted(node, "the other of += and -="):
            node.op = OTHER[type(node.op)]()
        return node

    def visit_Call(self, node):
        self.generic_visit(node)
        name = ast.unparse(node.func).split(".")[-1]
        if name in SIGNED and self.planted(node, f"-{name}"):
            return negative(node)
        if name in ("plus", "at", "subtract") and self.planted(node, f"{name}(…, -last)"):
            node.args[-1] = negative(node.args[-1])
        return node

    def visit_Name(self, node):
        if node.id == "add" and self.planted(node, "sub for add"):
            return ast.copy_location(ast.Name("sub", ast.Load()), node)
        return node

    def visit_Return(self, node):
        self.generic_visit(node)
        if isinstance(node.value, ast.Tuple):
            for i, result in enumerate(node.value.elts):
                if self.planted(node, f"result {i} is negative"):
                    node.value.elts[i] = negative(result)
        elif node.value is not None and self.planted(node, "the result is negative"):
            node.value = negative(node.value)
        return node


def names_text(node: ast.BinOp) -> bool:
    """`at + "ln_1"` is no sum."""
    return any(isinstance(part, ast.Constant) and isinstance(part.value, str) for part in ast.walk(node)) or (
        isinstance(node.left, ast.Name) and node.left.id in ("at", "name")
    )


def negative(node: ast.expr) -> ast.expr:
    return ast.copy_location(ast.Call(ast.Name("negative", ast.Load()), [node], []), node)


def mutants(source: str) -> Iterator[tuple[str, str]]:
    """What was planted where, and the source with it: each once."""
    n = 0
    while True:
        flip = Flip(n)
        tree = ast.fix_missing_locations(flip.visit(ast.parse(source)))
        if not flip.what:
            return
        yield flip.what, ast.unparse(tree) + HELPERS
        n += 1

"""Python files that are tables: how much of a source is data written down as literals."""

import ast
import warnings

_LITERAL = (
    ast.Constant, ast.Dict, ast.List, ast.Tuple, ast.Set, ast.BinOp, ast.UnaryOp,
    ast.operator, ast.unaryop, ast.expr_context,
)  # fmt: skip


def literal_share(source: str) -> float:
    """Share of the characters inside literals that go over several lines, 0 to 1.

    A literal is an expression without a name in it: strings, numbers, and collections and sums of
    these. Docstrings do not count. 0 for what this Python cannot parse.
    """
    try:
        with warnings.catch_warnings(action="ignore"):
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return 0.0
    length = [len(line) for line in source.encode().splitlines(keepends=True)]
    inside = 0
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.expr) and _is_literal(node):
            inside += _bytes_of(node, length)
        elif not _is_docstring(node):
            waiting.extend(ast.iter_child_nodes(node))
    return inside / max(1, sum(length))


def _is_literal(node: ast.AST) -> bool:
    return isinstance(node, _LITERAL) and all(map(_is_literal, ast.iter_child_nodes(node)))


def _is_docstring(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _bytes_of(node: ast.expr, length: list[int]) -> int:
    """UTF-8 bytes of an expression over several lines; 0 for one on one line."""
    first, last = node.lineno, node.end_lineno or node.lineno
    if first == last:
        return 0
    return sum(length[first - 1 : last - 1]) - node.col_offset + (node.end_col_offset or 0)

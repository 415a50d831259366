"""Which way of telling tokens apart fits a domain's text: Python's, numbers, English, or none."""

import ast
import re
import warnings
from collections.abc import Sequence

from moe_emergence.config import TokenClass

DOCUMENTS = 20
"""Documents that are looked at, and of each the first characters, except of code."""
CHARACTERS = 20_000
_WORD = re.compile(r"[^\W\d_]+")
_NUMBER_OR_OPERATOR = re.compile(r"\d+(?:[.,]\d+)*|[-+*/=<>^%×÷±≤≥≈√]")
COMMON = frozenset("the of and to in a is that it for was on are as with by".split())  # noqa: SIM905
LEAST_COMMON = 0.1
"""Share of its words that English has of the most common ones; other languages have fewer."""
LEAST_NUMBERS = 0.2
"""Share of numbers and operators, of these and words, from which text is mathematics."""
_STATEMENT = re.compile(
    r"(?:[;{}]|\*/)[ \t]*$|^[ \t]*#[ \t]*(?:include|define|if|else|endif|undef)", re.MULTILINE
)
MOST_STATEMENTS = 0.2
"""Share of lines as in C or JavaScript from which text is a program."""


def guess_token_class(documents: Sequence[str]) -> TokenClass:
    """python where most documents can be parsed as such, none for other programs, math for text
    with many numbers, words for English, none for anything else."""
    if not documents:
        return "none"
    step = -(-len(documents) // DOCUMENTS)
    seen = documents[::step]
    if 2 * sum(
        _is_python(document) or _is_python(_without_last(document)) for document in seen
    ) > len(seen):
        return "python"
    text = "\n".join(document[:CHARACTERS] for document in seen)
    if len(_STATEMENT.findall(text)) > MOST_STATEMENTS * len(text.splitlines()):
        return "none"
    words = _WORD.findall(text.lower())
    numbers = len(_NUMBER_OR_OPERATOR.findall(text))
    if numbers >= LEAST_NUMBERS * max(1, numbers + len(words)):
        return "math"
    return "words" if sum(w in COMMON for w in words) >= LEAST_COMMON * len(words) > 0 else "none"


def _without_last(text: str) -> str:
    """A text up to its last line that is not indented: a program may be cut within a statement."""
    lines = text.splitlines(keepends=True)
    while lines and not lines.pop()[:1].strip():
        pass
    return "".join(lines)


def _is_python(text: str) -> bool:
    """Whether a text is a program: a sentence, or a list of names and numbers, is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return any(not isinstance(node, ast.Expr | ast.AnnAssign) for node in tree.body)

"""Folders of mixtures that load where this package is not installed: their code lies in them.

The code is put together from this package's own sources, one definition after another, as far as
the model needs them: its family, and of the paths through the experts the sequential one, which is
plain PyTorch.
"""

import ast
import importlib.util
import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from moe_emergence import __version__
from moe_emergence.disk import write_text
from moe_emergence.models.mixture import MixtureModel
from moe_emergence.run_folder import read_json, write_json

_OURS = ("moe_emergence", "emergence_kernels")
_TWINS = MappingProxyType(
    {("emergence_kernels.routing", "route"): ("emergence_kernels.reference", "route")}
)
"""Definitions for which another one is taken, which needs no kernels."""
_WRITTEN = MappingProxyType(
    {
        ("moe_emergence.moe.tuning", "TuningTable"): "TuningTable = object  # of the kernels",
        ("moe_emergence.moe.dispatch", "get_dispatcher"): (
            "def get_dispatcher(name: str, table: object = None) -> SequentialDispatcher:\n"
            '    """The one path that is here: all of them compute the same."""\n'
            "    return SequentialDispatcher()"
        ),
    }
)
"""Definitions for which this is written, since they need kernels."""
_FOR_TOOLS = re.compile(r" *# (noqa|type: ignore|fmt:).*")
_INNER_IMPORT = re.compile(rf"^ +from (\.|{'|'.join(_OURS)})", re.MULTILINE)
_HEADER = '''\
"""{name}, a mixture of experts, and what it needs of moe_emergence {version}.

It runs with torch and transformers alone, on the path that is easiest to read. Where moe_emergence
is installed, import moe_emergence.models: its faster paths are taken then.
SPDX-License-Identifier: MIT
"""
'''


def save_self_contained(model: MixtureModel, folder: str | Path) -> None:
    """As `model.save_pretrained(folder)`, and beside the weights the code that runs them.

    `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` then loads it with torch
    and transformers alone, to generate, to train and to save again, and computes what the path
    "sequential" does. The tokenizer is saved as ever.
    """
    folder = Path(folder)
    model.save_pretrained(folder)
    module = f"modeling_{model.config.model_type}"
    classes = {
        "AutoConfig": type(model.config),
        "AutoModel": type(model.base_model),
        "AutoModelForCausalLM": type(model),
    }
    write_text(folder / f"{module}.py", code_of(*classes.values()))
    names = {auto: f"{module}.{found.__name__}" for auto, found in classes.items()}
    write_json(folder / "config.json", {**read_json(folder / "config.json"), "auto_map": names})


def code_of(*classes: type[Any]) -> str:
    """One module of source with `classes` and whatever of this package they need."""
    bundle = _Bundle()
    for one in classes:
        bundle.add(one.__module__, one.__name__)
    return bundle.text(_HEADER.format(name=classes[-1].__name__, version=__version__))


@dataclass(frozen=True)
class _Statement:
    """One at the top of a module, with the comments above it and the docstring below."""

    text: str
    binds: tuple[str, ...]
    uses: tuple[str, ...]


@dataclass(frozen=True)
class _Module:
    statements: tuple[_Statement, ...]
    imports: dict[str, tuple[str, str]]
    """By the name here, module and name there; the latter is empty for the module itself."""

    def binding(self, name: str) -> _Statement | None:
        return next((one for one in self.statements if name in one.binds), None)


class _Bundle:
    """Statements in an order in which they can be executed, and imports of other packages."""

    def __init__(self) -> None:
        self.pieces: list[str] = []
        self.imports: set[tuple[str, str, str]] = set()
        self.added: dict[tuple[str, str], str] = {}
        self.modules: dict[str, _Module] = {}

    def add(self, module: str, name: str) -> None:
        """Add what `name` is in `module`, behind what that uses; nothing for a name that is not of
        the module."""
        module, name = _TWINS.get((module, name), (module, name))
        read = self.modules.setdefault(module, _read(module))
        if (module, name) in self.added:
            return
        if name in read.imports:
            self._add_import(name, *read.imports[name])
            return
        found = read.binding(name)
        if (module, name) in _WRITTEN:
            (found,) = _statements(_WRITTEN[module, name])
        if found is None:
            return
        if _INNER_IMPORT.search(found.text):
            raise ValueError(f"{module}: {name} imports within, which cannot be taken along")
        self.added |= {(module, bound): found.text for bound in found.binds}
        for used in found.uses:
            self.add(module, used)
        if found.text not in self.pieces:
            self.pieces.append(found.text)

    def _add_import(self, name: str, module: str, there: str) -> None:
        if module.partition(".")[0] not in _OURS:
            self.imports.add((name, module, there))
            return
        origin = _read(module)
        if name != there or not (origin.binding(there) or there in origin.imports):
            raise ValueError(f"{module}: {there} cannot be taken out of it under the name {name}")
        self.add(module, there)

    def text(self, header: str) -> str:
        """The whole source.

        Raises:
            ValueError: for one name with two meanings in it.
        """
        for module, read in self.modules.items():
            for done in (one for one in read.statements if not one.binds):
                own = [(module, used) for used in done.uses if read.binding(used)]
                if own and all(one in self.added for one in own):
                    for used in done.uses:
                        self.add(module, used)
                    self.pieces.append(done.text)
        meanings: dict[str, set[object]] = {}
        for (_, name), text in self.added.items():
            meanings.setdefault(name, set()).add(text)
        for name, *origin in self.imports:
            meanings.setdefault(name, set()).add(tuple(origin))
        if twice := sorted(name for name, found in meanings.items() if len(found) > 1):
            raise ValueError(f"{', '.join(twice)}: defined twice among what a model needs")
        plain = [f"import {_named(*one)}" for one in self.imports if not one[2]]
        by_module: dict[str, list[str]] = {}
        for name, module, there in sorted(one for one in self.imports if one[2]):
            by_module.setdefault(module, []).append(_named(name, there))
        imports = "\n".join([*sorted(plain), *(_import(*one) for one in sorted(by_module.items()))])
        return "\n\n\n".join([f"{header}\n{imports}", *self.pieces]) + "\n"


def _named(name: str, there: str, *_: str) -> str:
    return there if name == there else f"{there} as {name}"


def _import(module: str, names: Sequence[str]) -> str:
    line = f"from {module} import {', '.join(names)}"
    if len(line) <= 100:
        return line
    return "\n".join([f"from {module} import (", *(f"    {one}," for one in names), ")"])


@cache
def _read(module: str) -> _Module:
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    source = Path(spec.origin).read_text(encoding="utf-8")
    imports: dict[str, tuple[str, str]] = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.Import):
            imports |= {one.asname or one.name: (one.name, "") for one in node.names}
        elif isinstance(node, ast.ImportFrom):
            place = "." * node.level + (node.module or "")
            origin = importlib.util.resolve_name(place, spec.parent) if node.level else place
            imports |= {one.asname or one.name: (origin, one.name) for one in node.names}
    return _Module(_statements(source), imports)


def _statements(source: str) -> tuple[_Statement, ...]:
    """All but imports; of what differs for type checkers, what is executed."""
    lines, body = source.splitlines(), list(_executed(ast.parse(source).body))
    found: list[_Statement] = []
    for node, following in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.Import | ast.ImportFrom) or _is_docstring(node):
            continue
        first = min(one.lineno for one in [node, *getattr(node, "decorator_list", [])]) - 1
        while lines[first - 1].startswith("#"):
            first -= 1
        last = following if following is not None and _is_docstring(following) else node
        text = textwrap.dedent("\n".join(lines[first : last.end_lineno]))
        names = (n for n in ast.walk(node) if isinstance(n, ast.Name))
        uses = dict.fromkeys(n.id for n in names if isinstance(n.ctx, ast.Load))
        new = _Statement(_FOR_TOOLS.sub("", text), tuple(_bound(node)), tuple(uses))
        if found and new.binds and found[-1].binds == new.binds:  # the overloads of a function
            before = found.pop()
            new = _Statement(f"{before.text}\n{new.text}", new.binds, before.uses + new.uses)
        found.append(new)
    return tuple(found)


def _executed(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    for node in body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            yield from node.orelse
        else:
            yield node


def _is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _bound(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        yield from (n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name))

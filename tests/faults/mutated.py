"""Wrong input for everything that is read: values, command lines, JSON and bytes.

The short form runs with the tests; the long one, with new examples every time, with
`--hypothesis-profile long`, which `tests/conftest.py` registers.
"""

import json
import typing
from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from moe_emergence.flags import flags_of

_SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]


def often(short: int, long: int) -> Callable[[Any], Any]:
    """How many examples a test takes: `short` and the same every time, or `long` and new ones."""
    is_long = settings.get_current_profile_name() == "long"
    return settings(
        max_examples=long if is_long else short,
        derandomize=not is_long,
        deadline=None,
        suppress_health_check=_SLOW,
        database=None,
    )


TEXTS = st.one_of(
    st.sampled_from(
        ["", " ", ".", "..", "none", "auto", "-1", "--help", "a\nb", "a\0b", "\x1b[2J", "\ud800",
         "e\u0301", "中", "/dev/null", "/dev/full", "/", "a/b", "x" * 5000, "=", "a=b", "0:0",
         "{}", "[1]", "'", '"', "\\", "%s", "{0}", "nan", "code=main", "code=python", "0:1=inf"]
    ),
    st.text(st.characters(), max_size=12),
)  # fmt: skip
NUMBERS = st.sampled_from(
    ["0", "-0", "1", "-1", "2", "3", "7", "1e400", "-1e400", "nan", "inf", "-inf", "1e-400", "0.5",
     "1.5", "1e3", str(2**31), str(2**63), str(2**64), str(10**30), "9" * 5000, "1_000", "0x10",
     "١", "1,2", ",", "1,,2", "", "true", "1 2", "+1"]
)  # fmt: skip
"""As flags are written."""
JSON = st.one_of(
    st.sampled_from(
        [
            None,
            True,
            False,
            0,
            -1,
            1,
            2,
            7,
            10**30,
            -(10**30),
            2**31,
            2**63,
            0.5,
            1e308,
            "",
            "x",
            "1",
            "\0",
            "a\nb",
            "x" * 3000,
            [],
            [0],
            [0, 0],
            ["x"],
            [None],
            {},
            {"x": 1},
            [[1]],
        ]
    ),
    st.sampled_from([float("nan"), float("inf"), -float("inf")]),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
        max_leaves=4,
    ),
)
"""Anything that a JSON file may hold."""


def words(hint: Any) -> st.SearchStrategy[str]:
    """What may follow a flag of that type, of which most is wrong."""
    choices = [one for one in _leaves(hint) if isinstance(one, str)]
    known = [st.sampled_from(choices)] if choices else []
    return st.one_of(NUMBERS, TEXTS, st.sampled_from(["yes", "no", "none"]), *known)


def _leaves(hint: Any) -> list[Any]:
    inner = typing.get_args(hint)
    return [leaf for one in inner for leaf in _leaves(one)] if inner else [hint]


@st.composite
def command_lines(draw: st.DrawFn, cls: type[Any], few: int = 4) -> list[str]:
    """Flags of a configuration with right and wrong values, in any order, twice or cut short."""
    hints = flags_of(cls)
    argv: list[str] = []
    few = draw(st.integers(1, few))
    for name in draw(st.lists(st.sampled_from(sorted(hints)), max_size=few)):
        values = draw(st.lists(words(hints[name]), min_size=0, max_size=2) | st.just(["1"]))
        joined = draw(st.booleans()) and len(values) == 1
        argv += [f"{name}={values[0]}"] if joined else [name, *values]
    return argv


@st.composite
def changed(draw: st.DrawFn, values: Any, most: int = 2) -> Any:
    """JSON-ready `values` with some entries gone, of another type or size, doubled or renamed."""
    found = deepcopy(values)
    for _ in range(draw(st.integers(1, most))):
        places = list(_places(found))
        if not places:
            return draw(JSON)
        holder, key = draw(st.sampled_from(places))
        what = draw(st.sampled_from(["delete", "replace", "replace", "replace", "double", "wrap"]))
        if what == "delete":
            del holder[key]
        elif what == "replace":
            holder[key] = deepcopy(draw(JSON))
        elif what == "wrap":
            holder[key] = [holder[key]]
        elif isinstance(holder, list):
            holder.insert(key, deepcopy(holder[key]))
        else:
            holder[f"{key}2"] = holder[key]
    return found


def _places(values: Any) -> typing.Iterator[tuple[Any, Any]]:
    """Every holder and key in nested lists and objects."""
    keys = list(values) if isinstance(values, dict) else range(len(values))
    for key in keys:
        yield values, key
        if isinstance(values[key], (dict, list)):
            yield from _places(values[key])


@st.composite
def spoilt(draw: st.DrawFn, content: bytes) -> bytes:
    """The bytes of a file cut short, overwritten, doubled, or others altogether."""
    place = draw(st.integers(0, max(0, len(content) - 1)))
    what = draw(st.sampled_from(["cut", "overwrite", "insert", "double", "other", "deep", "bom"]))
    garbage = draw(st.binary(min_size=1, max_size=40))
    if what == "cut":
        return content[:place]
    if what == "overwrite":
        return content[:place] + garbage + content[place + len(garbage) :]
    if what == "insert":
        return content[:place] + garbage + content[place:]
    if what == "double":
        return content + content[place:]
    if what == "deep":
        return b"[" * 200_000
    if what == "bom":
        return draw(st.sampled_from([b"\xef\xbb\xbf", b"\xff\xfe", b"\0\0\xfe\xff"])) + content
    return garbage


@st.composite
def json_files(draw: st.DrawFn, values: Mapping[str, Any] | list[Any]) -> bytes:
    """A JSON file with other values than `values`, or with bytes that are wrong."""
    if draw(st.integers(0, 3)) == 0:
        return draw(spoilt(json.dumps(values).encode()))
    return json.dumps(draw(changed(values))).encode("utf-8", "surrogatepass")


def is_sentence(message: str) -> bool:
    """Whether an error is short, and names a flag or a file."""
    line = " ".join(message.split())
    return 10 < len(line) < 1500 and ("--" in line or "/" in line or "SOURCE" in line)

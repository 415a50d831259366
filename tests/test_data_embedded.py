import sysconfig
from pathlib import Path, PurePath

import pytest

from moe_emergence.data.embedded import (
    ANSWER_SENTENCE,
    EXCLUDED_FOLDERS,
    is_library_code,
    read_embedded,
    read_math,
)

LIMIT = 200_000


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def found(cache: str):
    return read_embedded(LIMIT, 3, cache)


@pytest.mark.parametrize("domain", ["code", "math", "prose"])
def test_every_domain_fills_the_size_and_keeps_it(found, domain: str) -> None:
    size = sum(len(text.encode()) for text in found[domain].texts)
    assert LIMIT / 3 < size <= LIMIT
    assert len(found[domain].texts) >= 2
    assert set(found[domain].source) == {"source", "text", "version"}


def test_the_seed_alone_decides_what_is_read(found, cache: str) -> None:
    again, other = read_embedded(LIMIT, 3, cache), read_embedded(LIMIT, 4, cache)
    for domain in found:
        assert again[domain].texts == found[domain].texts
        assert other[domain].texts != found[domain].texts


def test_more_size_reads_on_where_less_ended(found, cache: str) -> None:
    more = read_math(2 * LIMIT, 3, cache).texts
    assert more[: len(found["math"].texts)] == found["math"].texts
    assert len(more) > len(found["math"].texts)


def test_code_is_the_standard_library_without_tests(found) -> None:
    library = Path(sysconfig.get_paths()["stdlib"])
    used = {}
    for path in library.rglob("*.py"):
        if is_library_code(path.relative_to(library)):
            used[path.read_text(encoding="utf-8")] = path
    assert all(text in used for text in found["code"].texts)
    assert library / "json" / "decoder.py" in used.values()
    for path in used.values():
        parts = path.relative_to(library).parts
        assert not EXCLUDED_FOLDERS.intersection(parts)
        assert not parts[-1].startswith("test_")
    assert all(100 <= len(text) <= 100_000 for text in found["code"].texts)


@pytest.mark.parametrize(
    "path",
    [
        "test/test_json.py",
        "unittest/test/dummy.py",
        "lib2to3/tests/data/bom.py",
        "idlelib/idle_test/htest.py",
        "site-packages/numpy/core.py",
        "dist-packages/apt.py",
        "ensurepip/_bundled/x.py",
        "ctypes/test_arrays.py",
        "distutils/build_test.py",
        "_sysconfigdata__linux_x86_64-linux-gnu.py",
        "config-3.11-x86_64-linux-gnu/python-config.py",
    ],
)
def test_tests_bundles_and_build_settings_are_left_out(path: str) -> None:
    assert not is_library_code(PurePath(path))


def test_doctest_and_unittest_are_library_code() -> None:
    assert is_library_code(PurePath("doctest.py"))
    assert is_library_code(PurePath("unittest/case.py"))


def test_math_is_question_blank_line_solution_without_the_fixed_sentence(found) -> None:
    import reasoning_gym

    first = reasoning_gym.create_dataset("gsm_symbolic", size=5, seed=3)[0]
    question = first["question"].removesuffix(ANSWER_SENTENCE).rstrip()
    assert found["math"].texts[0] == f"{question}\n\n{first['metadata']['answer_cot']}"
    assert question != first["question"]
    assert not any(ANSWER_SENTENCE in text for text in found["math"].texts)


def test_prose_is_speeches(found) -> None:
    assert sum(" the " in text for text in found["prose"].texts) == len(found["prose"].texts)
    assert any("Congress" in text for text in found["prose"].texts)

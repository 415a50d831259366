import dataclasses
import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moe_emergence.config import SHIPPED
from moe_emergence.data.hub import HUB_SOURCES, hub_root, read_hub
from moe_emergence.hub_access import http_error_type

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CODE = ["x" * 99, "def f():\n" + "y" * 100, "z" * 10_001, "w" * 10_000, "v" * 100]
PROSE = ["short", "p" * 200, "q" * 10_001, "r" * 500]
MATH = [("How many?", "Two."), ("Why?", "Because."), ("", "")]


def write_gz(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    """Folders with the files and schemas of the three hub datasets."""
    path = tmp_path / "hub"
    code = [{"repo_name": "r", "path": "p", "content": text, "line_max": 9} for text in CODE]
    write_gz(path / "codeparrot/codeparrot-clean/file-000000000001.json.gz", code[:2])
    write_gz(path / "codeparrot/codeparrot-clean/file-000000000002.json.gz", code[2:])
    prose = [{"text": text, "timestamp": "2019", "url": "u"} for text in PROSE]
    write_gz(path / "allenai/c4/en/c4-train.00000-of-01024.json.gz", prose[:2])
    write_gz(path / "allenai/c4/en/c4-train.00001-of-01024.json.gz", prose[2:])
    write_gz(path / "allenai/c4/en/c4-validation.00000-of-00008.json.gz", [{"text": "n" * 300}])
    write_gz(path / "allenai/c4/realnewslike/c4-train.0.json.gz", [{"text": "o" * 300}])
    for split, rows in (("train", MATH), ("test", [("Not this", "no")])):
        folder = path / "allenai/math_qa/default" / split
        folder.mkdir(parents=True)
        table = {"Problem": [p for p, _ in rows], "Rationale": [r for _, r in rows]}
        pq.write_table(pa.table(table | {"options": ["a"] * len(rows)}), folder / "0000.parquet")
    return path


def read(hub: Path, limit: int = 10**6, revisions=None, **options):
    options.setdefault("resolve", lambda repo, revision: COMMIT)
    options.setdefault("root", lambda repo, commit: str(hub / repo))
    cache = str(hub.parent / "cache")
    return read_hub(
        SHIPPED, limit_bytes=limit, cache_dir=cache, revisions=revisions or {}, **options
    )


def test_texts_come_in_stream_order_with_their_filters(hub: Path) -> None:
    found = read(hub)
    assert list(found) == list(SHIPPED)
    assert found["code"].texts == [CODE[1], CODE[3], CODE[4]]
    assert found["prose"].texts == [PROSE[1], PROSE[3]]
    assert found["math"].texts == ["How many?\n\nTwo.", "Why?\n\nBecause."]


def test_reading_ends_at_the_size(hub: Path) -> None:
    assert read(hub, limit=900)["prose"].texts == [PROSE[1]]


def test_revisions_are_resolved_pinned_and_recorded(hub: Path) -> None:
    asked, loaded = [], []

    def resolve(repo: str, revision: str) -> str:
        asked.append((repo, revision))
        return f"{COMMIT[:-1]}{len(asked)}"

    def root(repo: str, commit: str) -> str:
        loaded.append(hub_root(repo, commit))
        return str(hub / repo)

    found = read(hub, revisions={"prose": "v2"}, resolve=resolve, root=root)
    assert asked == [
        ("codeparrot/codeparrot-clean", "main"),
        ("allenai/math_qa", "refs/convert/parquet"),
        ("allenai/c4", "v2"),
    ]
    assert loaded[2] == f"hf://datasets/allenai/c4@{COMMIT[:-1]}3"
    assert found["prose"].source == {
        "source": "hub",
        "repo": "allenai/c4",
        "revision": "v2",
        "commit": f"{COMMIT[:-1]}3",
    }


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("[Errno -2] Name or service not known"),
        TimeoutError("timed out"),
        http_error_type()("Network is unreachable\nand more lines"),
    ],
)
def test_a_hub_out_of_reach_says_why_and_what_to_use(hub: Path, error: Exception) -> None:
    def fail(repo: str, revision: str) -> str:
        raise error

    with pytest.raises(ValueError, match="could not be reached") as raised:
        read(hub, resolve=fail)
    message = str(raised.value)
    assert message.startswith("--data hub: code from codeparrot/codeparrot-clean: ")
    assert str(error).splitlines()[0] in message
    assert "--data embedded or --data PATH (a folder)" in message
    assert "\n" not in message


def test_offline_mode_counts_as_out_of_reach(hub: Path) -> None:
    from huggingface_hub.errors import OfflineModeIsEnabled

    def fail(repo: str, revision: str) -> str:
        raise OfflineModeIsEnabled("offline mode is enabled")

    with pytest.raises(ValueError, match=r"could not be reached \(OfflineModeIsEnabled"):
        read(hub, resolve=fail)


def test_an_unknown_revision_names_the_flag(hub: Path) -> None:
    from huggingface_hub.errors import RevisionNotFoundError

    def fail(repo: str, revision: str) -> str:
        raise RevisionNotFoundError.__new__(RevisionNotFoundError)

    message = r"^--hub-revision math=nope: allenai/math_qa has no such revision; "
    with pytest.raises(ValueError, match=message):
        read(
            hub,
            revisions={"math": "nope"},
            resolve=lambda repo, rev: fail(repo, rev) if rev == "nope" else COMMIT,
        )


def test_a_schema_that_changed_names_field_and_dataset(hub: Path) -> None:
    sources = dict(HUB_SOURCES)
    sources["math"] = dataclasses.replace(sources["math"], fields=("Problem", "Solution"))
    message = r"math from allenai/math_qa: no field 'Solution', only Problem, Rationale, options"
    with pytest.raises(ValueError, match=message):
        read(hub, sources=sources)


def test_missing_files_name_pattern_and_revision(hub: Path) -> None:
    for file in (hub / "allenai/c4/en").glob("c4-train*"):
        file.unlink()
    with pytest.raises(ValueError, match=r"no files en/c4-train.\*.json.gz at revision main"):
        read(hub)


def test_a_damaged_file_is_one_line(hub: Path) -> None:
    file = hub / "allenai/c4/en/c4-train.00000-of-01024.json.gz"
    file.write_bytes(file.read_bytes()[:-9])
    message = (
        r"^--data hub: prose from allenai/c4 could not be read to the end \(EOFError: .*--data"
    )
    with pytest.raises(ValueError, match=message):
        read(hub)

"""Streamed text from the Hugging Face hub, pinned to the commit that the revision names now."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from moe_emergence.data.streams import (
    Format,
    Row,
    matching_files,
    open_stream,
    stream_rows,
    text_of,
)
from moe_emergence.data.texts import DomainTexts, take_texts
from moe_emergence.hub_access import http_error_type, reason

RESOLVE_TIMEOUT_S = 10.0
ELSEWHERE = (
    "check the network, or use text from elsewhere with --data embedded or --data PATH (a folder)"
)


@dataclass(frozen=True)
class HubSource:
    """Where a domain's text is on the hub and how a row becomes a text.

    `files` is a pattern inside the repository. The text is the `fields` with a blank line between
    them; texts shorter than `min_chars` or longer than `max_chars` (None: no limit) are left out.
    """

    repo: str
    files: str
    form: Format
    fields: tuple[str, ...]
    revision: str = "main"
    min_chars: int = 1
    max_chars: int | None = None


HUB_SOURCES: Mapping[str, HubSource] = MappingProxyType(
    {
        "code": HubSource(
            "codeparrot/codeparrot-clean", "*.json.gz", "json", ("content",), "main", 100, 10_000
        ),
        # The repository itself holds a loading script, which `datasets` no longer runs.
        "math": HubSource(
            "allenai/math_qa",
            "*/train/*.parquet",
            "parquet",
            ("Problem", "Rationale"),
            "refs/convert/parquet",
        ),
        "prose": HubSource(
            "allenai/c4", "en/c4-train.*.json.gz", "json", ("text",), "main", 200, 10_000
        ),
    }
)


def resolve_commit(repo: str, revision: str) -> str:
    """The commit sha that `revision` of a hub dataset names now; one request, no retries."""
    from huggingface_hub import HfApi

    sha = HfApi().dataset_info(repo, revision=revision, timeout=RESOLVE_TIMEOUT_S).sha
    assert sha is not None
    return sha


def hub_root(repo: str, commit: str) -> str:
    """Address of a hub dataset at one commit, as `datasets` reads it."""
    return f"hf://datasets/{repo}@{commit}"


def pin(domain: str, repo: str, revision: str, resolve: Callable[[str, str], str]) -> str:
    """The commit to load; `ValueError` if the revision or the hub is not there."""
    from huggingface_hub.errors import RevisionNotFoundError

    try:
        return resolve(repo, revision)
    except RevisionNotFoundError as error:
        raise ValueError(
            f"--hub-revision {domain}={revision}: {repo} has no such revision; give a branch, "
            "a tag or a commit of it"
        ) from error
    except (OSError, http_error_type()) as error:
        raise ValueError(
            f"--data hub: {domain} from {repo}: the Hugging Face hub could not be reached "
            f"({reason(error)}); {ELSEWHERE}"
        ) from error


def texts_of(rows: Iterable[Row], source: HubSource, where: str) -> Iterator[str]:
    """Texts of the rows that are neither too short nor too long."""
    change = "give a revision with these fields with --hub-revision, or use --data PATH"
    for row in rows:
        text = "\n\n".join(text_of(row, field, where, change) for field in source.fields)
        if len(text) >= source.min_chars and (
            source.max_chars is None or len(text) <= source.max_chars
        ):
            yield text


def read_hub(
    domains: Sequence[str],
    *,
    limit_bytes: int,
    cache_dir: str,
    revisions: Mapping[str, str],
    sources: Mapping[str, HubSource] = HUB_SOURCES,
    resolve: Callable[[str, str], str] = resolve_commit,
    root: Callable[[str, str], str] = hub_root,
) -> dict[str, DomainTexts]:
    """Texts of `domains` in stream order, up to `limit_bytes` bytes of UTF-8 each.

    `revisions` overrides the default revision of a domain. Every revision is resolved to a commit
    with `resolve` before anything is read; `root` makes the address of a repository at a commit.
    Raises `ValueError` in one line if the hub, a revision, the files or a field is not there.
    """
    wanted = {domain: revisions.get(domain, sources[domain].revision) for domain in domains}
    commits = {d: pin(d, sources[d].repo, wanted[d], resolve) for d in domains}
    return {
        domain: read_source(
            domain,
            sources[domain],
            address=root(sources[domain].repo, commits[domain]),
            limit_bytes=limit_bytes,
            cache_dir=cache_dir,
            provenance={"revision": wanted[domain], "commit": commits[domain]},
        )
        for domain in domains
    }


def read_source(
    domain: str,
    source: HubSource,
    *,
    address: str,
    limit_bytes: int,
    cache_dir: str,
    provenance: Mapping[str, str],
) -> DomainTexts:
    """Texts of one domain from the repository at `address`."""
    where = f"--data hub: {domain} from {source.repo}"

    def rows() -> Iterable[Row]:
        files = matching_files(f"{address}/{source.files}")
        stream: Iterable[Row] = open_stream(source.form, files, cache_dir)
        return stream

    def explain(error: Exception) -> str:
        if isinstance(error, FileNotFoundError):
            return (
                f"{where}: no files {source.files} at revision {provenance['revision']}; give "
                f"--hub-revision {domain}=REVISION, or use --data PATH"
            )
        return f"{where} could not be read to the end ({reason(error)}); {ELSEWHERE}"

    stream = stream_rows(rows, explain)
    texts = take_texts(domain, texts_of(stream, source, where), limit_bytes)
    return DomainTexts(texts, {"source": "hub", "repo": source.repo, **provenance})

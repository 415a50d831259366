"""From the setting `--data` to the texts of the domains."""

from pathlib import Path

from moe_emergence.config import SHIPPED, DataConfig
from moe_emergence.data.embedded import read_embedded
from moe_emergence.data.folder import read_folder
from moe_emergence.data.hub import read_hub
from moe_emergence.data.texts import DomainTexts

BYTES_PER_MB = 1_000_000


def read_sources(config: DataConfig, seed: int) -> dict[str, DomainTexts]:
    """Texts of `--domains`, or of every domain of the source, up to `size_mb` each.

    Raises `ValueError` naming the flag for whatever cannot be read.
    """
    limit_bytes = round(config.size_mb * BYTES_PER_MB)
    shipped = config.domains or SHIPPED
    if config.data == "embedded":
        return read_embedded(limit_bytes, seed, config.cache_dir, shipped)
    if config.data == "hub":
        revisions = dict(pair.split("=", 1) for pair in config.hub_revision)
        cache_dir = str(Path(config.cache_dir, "datasets"))
        return read_hub(shipped, limit_bytes=limit_bytes, cache_dir=cache_dir, revisions=revisions)
    return read_folder(
        config.data,
        limit_bytes=limit_bytes,
        seed=seed,
        text_field=config.text_field,
        domains=config.domains,
        domain_field=config.domain_field,
    )

"""What limits the conclusions of a suite, read from its runs."""

from typing import Any

from moe_emergence.data.samples import unlike
from moe_emergence.experiments.collect import ENDED, Records


def caveats(records: Records) -> list[str]:
    """One sentence each: seeds, scale, data, evaluation, machine."""
    found = [_seeds(records)]
    manifests = list(records.manifests.values())
    configs = [c for key, c in records.configs.items() if key in records.manifests]
    if manifests:
        found.append(_data(manifests[0], configs[0]))
        found.extend(_unlike(manifests))
        hashes = {_evaluation_hash(manifest) for manifest in manifests}
        if len(hashes) > 1:
            found.append(
                f"The runs were evaluated on {len(hashes)} different sets of blocks, so that "
                "spreads over seeds include the difference of the texts; paired differences do not."
            )
    found.append(
        "The loss intervals are over seeds (initialisation, data order, noise) and say nothing "
        "about other data, sizes or learning rates. p-values are adjusted (Holm) over the "
        "comparisons of the same domain; intervals are not adjusted."
    )
    found.append(
        "Neighbouring blocks can come from one document, so permuting blocks still makes the null "
        "of the domains somewhat too narrow; the null models do not have this weakness."
    )
    found.extend(_machines(records))
    return found


def _seeds(records: Records) -> str:
    ended = records.runs[records.runs["status"].isin(ENDED)]
    counts = ended.groupby("variant")["seed"].nunique()
    least = int(counts.min()) if len(counts) else 0
    return (
        f"Seeds planned: {len(records.suite.seeds)}; the variant with the fewest finished runs "
        f"has {least}."
    )


def _data(manifest: dict[str, Any], config: dict[str, Any]) -> str:
    domains = manifest.get("domains", {})
    sizes = [
        f"{name}: {entry.get('train', {}).get('blocks', '?')} training and "
        f"{entry.get('eval', {}).get('blocks', '?')} evaluation blocks"
        for name, entry in domains.items()
    ]
    data = config.get("data", {})
    per_domain = config.get("monitor", {}).get("eval_blocks") or "all"
    return (
        f"Data `{data.get('data')}`, blocks of {manifest.get('block_size')} tokens ("
        f"{'; '.join(sizes)}); {per_domain} evaluation blocks a domain are used."
    )


def _unlike(manifests: list[dict[str, Any]]) -> list[str]:
    """Domains whose evaluation blocks are unlike each other in a run, the worst run of each."""
    worst: dict[str, float] = {}
    for manifest in manifests:
        for name, entry in manifest.get("domains", {}).items():
            share = entry.get("eval", {}).get("poor_blocks", 0.0)
            worst[name] = max(share, worst.get(name, 0.0))
    return list(unlike(worst).values())


def _evaluation_hash(manifest: dict[str, Any]) -> tuple[Any, ...]:
    domains = manifest.get("domains", {})
    return tuple((name, of.get("eval", {}).get("sha256")) for name, of in domains.items())


def _machines(records: Records) -> list[str]:
    """Device, precision and commit; more than one of any is said."""
    names = {"device_name": "device", "device": "device", "precision": "precision",
             "commit": "commit"}  # fmt: skip
    found: dict[str, list[str]] = {}
    for environment in records.environments.values():
        for key, name in names.items():
            value = environment.get(key)
            if value is not None and str(value) not in found.setdefault(name, []):
                found[name].append(str(value))
    return [
        f"{name.capitalize()}: {', '.join(values)}." for name, values in found.items() if values
    ]

"""Make the folder that is published on the Hugging Face kernel hub.

    python kernels/make_hub_package.py --repo-id OWNER/emergence-kernels --out FOLDER

`build.toml` has the kernel's name, version and backends. Every backend gets the package's files as
they are, where the `kernels` library looks for them, and a `metadata.json`. The library imports the
package under the id in there, so that copies of other contents can be used side by side.
"""

import argparse
import base64
import hashlib
import json
import re
import shutil
import sys
import tomllib
from pathlib import Path
from typing import Any

KERNELS = Path(__file__).resolve().parent


def make(out: Path, repo_id: str, kernels: Path = KERNELS) -> None:
    """Write `README.md` and `build/torch-BACKEND/` for every backend into `out`.

    Args:
        out: a folder that is empty or does not exist.
        repo_id: OWNER/NAME of the repository on the hub, for the usage example.
        kernels: folder of `build.toml`, `card.md` and the package; beside it is the licence.

    Raises:
        ValueError: for an `out` that has something in it, or a `repo_id` of another form.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id):
        raise ValueError(f"--repo-id: got {repo_id!r}, give OWNER/NAME")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"--out: {out} is not an empty folder, give another or empty it")
    general = tomllib.loads((kernels / "build.toml").read_text("utf-8"))["general"]
    for backend in general["backends"]:
        _write_variant(out / "build" / f"torch-{backend}", backend, general, kernels)
    card = (kernels / "card.md").read_text("utf-8")
    (out / "README.md").write_text(card.format(repo_id=repo_id, **general), "utf-8")


def _write_variant(folder: Path, backend: str, general: dict[str, Any], kernels: Path) -> None:
    package = general["name"].replace("-", "_")
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(kernels / package, folder, ignore=ignore)
    shutil.copy(kernels.parent / "LICENSE", folder)
    files = {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).digest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    digests = {name: base64.b64encode(digest).decode() for name, digest in files.items()}
    contents = hashlib.sha256(json.dumps([general, digests]).encode()).hexdigest()
    metadata = {
        "name": general["name"],
        "id": f"_{package}_{backend}_{contents[:12]}",
        "version": general["version"],
        "license": general["license"],
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": digests},
    }
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", "utf-8")


def main(argv: list[str]) -> int:
    """Run the command; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repo-id", required=True, help="OWNER/NAME on the hub")
    parser.add_argument("--out", required=True, type=Path, help="folder to make")
    flags = parser.parse_args(argv)
    make(flags.out, flags.repo_id)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (ValueError, OSError) as failure:
        sys.stderr.write(f"error: {failure}\n")
        sys.exit(2)

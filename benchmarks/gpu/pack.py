"""What the program needs on a machine that reaches no package index, in one folder.

The folder lies in the repository and is ignored by git: `.gpu/wheels`; `.gpu/data`, blocks of
tokens to train on; and `.gpu/commit`, since a copy of the working tree need not have its history.
"""

import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.gpu.program import REPOSITORY
from moe_emergence.config import DataConfig

FOLDER = REPOSITORY / ".gpu"
LOCAL = REPOSITORY / ".gpu-local"
"""What does not travel: run folders, caches and the environment of a rehearsal."""
WHEELS = (
    "transformers==5.24.0",
    "tyro==1.0.17",
    "docstring-parser==0.18.0",
    "typeguard==4.6.1",
    "torchdata==0.11.0",
    "datasets==5.2.0",
    "dill==0.4.1",
    "multiprocess==0.70.19",
)
"""Pure Python, or built for CPython 3.12, so that they run beside any torch."""
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


MOST_BYTES = 60 * 2**20


def pack(data: DataConfig | None = None, seed: int = 42) -> Path:
    """Fill `.gpu`; what pip says goes to stderr.

    Args:
        data: what to make blocks of; None leaves those that are there.
        seed: of the runs that are to train on them.

    Raises:
        subprocess.CalledProcessError: when git or pip fails.
        ValueError: for data that cannot be used, or too much of it.
    """
    if data is not None:
        # where there is a GPU nothing of this is needed, and torchdata may be missing
        from moe_emergence.data import prepare_data, save_prepared

        shutil.rmtree(FOLDER / "data", ignore_errors=True)
        save_prepared(prepare_data(data, seed), FOLDER / "data")
    wheels = FOLDER / "wheels"
    wheels.mkdir(parents=True, exist_ok=True)
    for old in wheels.glob("*.whl"):
        old.unlink()
    platforms = [word for name in PLATFORMS for word in ("--platform", name)]
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:",
         "--python-version", "3.12", "--implementation", "cp", *platforms,
         "--dest", str(wheels), *WHEELS],
        check=True,
    )  # fmt: skip
    head = subprocess.run(
        ["git", "-C", str(REPOSITORY), "rev-parse", "HEAD"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    (FOLDER / "commit").write_text(head.stdout, encoding="utf-8")
    size = sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file())
    if size > MOST_BYTES:
        raise ValueError(f"{FOLDER}: {size / 2**20:.0f} MiB, more than 60; give a lower --size-mb")
    return FOLDER


def packed_data() -> Path | None:
    """The folder of packed blocks, if any."""
    path = FOLDER / "data"
    return path if path.is_dir() else None


def packed_commit() -> str | None:
    """The commit that was packed, if any."""
    path = FOLDER / "commit"
    return path.read_text(encoding="utf-8").strip() if path.exists() else None

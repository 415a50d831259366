"""The package imports from anywhere, lightly, and stays out of transformers' way."""

import pkgutil
import subprocess
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
from conftest import REPOSITORY

import emergence_kernels
import moe_emergence

pytestmark = pytest.mark.slow

Command = Callable[..., "subprocess.CompletedProcess[str]"]


def modules() -> list[str]:
    found = []
    for package in (moe_emergence, emergence_kernels):
        walked = pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
        found += [package.__name__, *(module.name for module in walked)]
    return [name for name in found if not name.startswith("emergence_kernels.gpu.")]


def test_kernels_is_a_source_root_and_no_package() -> None:
    assert not (REPOSITORY / "kernels" / "__init__.py").exists()
    assert not any((REPOSITORY / name / "__init__.py").exists() for name in ("tests", "benchmarks"))


def test_every_module_imports_without_triton_and_the_optional_packages(command: Command) -> None:
    """None in sys.modules makes an import fail, as on a machine without the package.

    From the repository's root, where `kernels` must not be taken for the package of that name which
    transformers looks for, nor hide it.
    """
    installed = any(found.name == "kernels" for found in metadata.distributions())
    script = f"""
import importlib, sys
import emergence_kernels
assert "triton" not in sys.modules, "importing emergence_kernels imported triton"
sys.modules.update(dict.fromkeys(("triton", "wandb", "megablocks", "stk")))
for name in {modules()!r}:
    importlib.import_module(name)
if {installed}:
    import kernels
    kernels.get_local_kernel
print("all of them")
"""
    done = command("-c", script, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == "all of them\n"


AS_MODULES = """
import runpy, sys

for verb in ("train", "generate", "verify", "suite", "analyze"):
    sys.argv = ["-m", "--help"]
    try:
        runpy.run_module(f"moe_emergence.{verb}", run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        assert stop.code == 0, (verb, stop.code)
"""


def test_entry_points_run_as_modules_from_another_folder(command: Command) -> None:
    done = command("-c", AS_MODULES)
    assert done.returncode == 0, done.stderr
    for verb in ("train", "generate", "verify", "suite", "analyze"):
        assert f"python -m moe_emergence.{verb}" in done.stdout


def test_typed_packages_ship_their_marker() -> None:
    for package in (moe_emergence, emergence_kernels):
        assert (Path(package.__path__[0]) / "py.typed").is_file()

"""The kernels as a package of the Hugging Face kernel hub, loaded by the real `kernels` library."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import REPOSITORY
from warm_commands import alone

import make_hub_package

pytest.importorskip("kernels.load", reason="the kernels library is not installed")

SOURCES = REPOSITORY / "kernels"
BACKENDS = tomllib.loads((SOURCES / "build.toml").read_text("utf-8"))["general"]["backends"]

BESIDE_THE_INSTALLED = """
import sys
from pathlib import Path

import torch
from kernels import get_local_kernel

import emergence_kernels


def pass_of(moe, activation):
    draw = torch.Generator().manual_seed(3)
    width = 24 if activation == "swiglu" else 12
    shapes = (10, 4), (10, 8), (4, 8, width), (4, width), (4, 12, 8), (4, 8)
    leaves = [torch.randn(shape, generator=draw, requires_grad=True) for shape in shapes]
    logits, x, *weights = leaves
    routing = moe.route(logits, 2)
    rows = moe.sort_by_expert(routing.experts_TK, 4)
    y = moe.expert_mlp(x, routing.weights_TK, *weights, rows, activation)
    return y, *torch.autograd.grad(y, leaves, torch.randn(y.shape, generator=draw))


copies = [get_local_kernel(Path(folder)) for folder in sys.argv[1:]]
for activation in ("gelu_tanh", "swiglu"):
    expected = pass_of(emergence_kernels, activation)
    assert all(tensor.abs().sum() > 0 for tensor in expected)
    for copy in copies:
        found = pass_of(copy, activation)
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))

modules = [emergence_kernels, *copies]
assert len({module.__name__ for module in modules}) == len(modules)
assert len({module.expert_mlp for module in modules}) == len(modules)
for module in modules:
    assert hasattr(getattr(torch.ops, module.__name__), "expert_mlp_backward"), module
"""

WITHOUT_THE_INSTALLED = """
import importlib.util
import pkgutil
import sys
from pathlib import Path

sys.modules["emergence_kernels"] = None
from kernels import get_local_kernel

hub = get_local_kernel(Path(sys.argv[1]))
for module in pkgutil.walk_packages(hub.__path__, f"{hub.__name__}."):
    if importlib.util.find_spec("triton") or ".gpu." not in module.name:
        importlib.import_module(module.name)
"""

COMPILES_IN_OTHER_PROCESSES = """
import sys
from importlib import import_module
from pathlib import Path

import torch

sys.modules["emergence_kernels"] = None
from kernels import get_local_kernel

hub = get_local_kernel(Path(sys.argv[1]))
combine, compiling, defaults, launch = (
    import_module(f"{hub.__name__}.gpu.{name}")
    for name in ("combine", "compiling", "defaults", "launch")
)
x, rows = torch.empty(16, 32, device="meta"), torch.empty(16, dtype=torch.int64, device="meta")
with launch.recorded_launches() as launches:
    combine.gather(x, rows)
jobs = [compiling.CompileJob.of(started, defaults.TARGETS["sm_90"]) for started in launches]
(found,) = compiling.compile_in_parallel(jobs, 1)
assert not isinstance(found, str), found
assert found.registers > 0
"""

CARD_EXAMPLE = """
import sys
from pathlib import Path

import kernels

folder = Path(sys.argv[1])
kernels.get_kernel = lambda repo_id, version, **_: kernels.get_local_kernel(folder)
example = (folder / "README.md").read_text("utf-8").split("```python")[1].split("```")[0]
names = {}
exec(example, names)
assert names["y"].shape == names["x"].shape
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "package"
    make_hub_package.make(folder, "owner/emergence-kernels")
    return folder


@pytest.fixture
def python(tmp_path: Path) -> Callable[..., None]:
    """Run a script that must succeed, with `folders` on its path and none of this process's."""

    def run(script: str, *arguments: Path, folders: tuple[Path, ...] = ()) -> None:
        cache = {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
        environment = {**alone(), **cache, "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(map(str, folders))
        environment.pop("TRITON_INTERPRET", None)
        command = [sys.executable, "-c", script, *map(str, arguments)]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-3000:]

    return run


def changed_sources(where: Path) -> Path:
    """Sources with another line."""
    shutil.copytree(SOURCES, where / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / "LICENSE", where)
    with (where / "kernels/emergence_kernels/reference.py").open("a", encoding="utf-8") as file:
        file.write("\n_ANOTHER = 1\n")
    return where / "kernels"


@pytest.mark.slow
def test_copies_compute_what_the_installed_package_does(
    package: Path, tmp_path: Path, python: Callable[..., None]
) -> None:
    another = tmp_path / "another"
    make_hub_package.make(another, "owner/another", changed_sources(tmp_path))
    python(BESIDE_THE_INSTALLED, package, another, folders=(SOURCES,))


@pytest.mark.slow
def test_a_copy_and_its_card_need_nothing_of_ours(
    package: Path, python: Callable[..., None]
) -> None:
    python(WITHOUT_THE_INSTALLED + CARD_EXAMPLE, package)


@pytest.mark.slow
def test_a_copy_compiles_in_other_processes(package: Path, python: Callable[..., None]) -> None:
    pytest.importorskip("triton", reason="the kernels are compiled by Triton, not installed")
    python(COMPILES_IN_OTHER_PROCESSES, package)


def test_modules_import_each_other_relatively_and_else_only_what_the_hub_allows() -> None:
    allowed = sys.stdlib_module_names | {"torch", "triton"}
    for path in (SOURCES / "emergence_kernels").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names.append(node.module)
            for name in names:
                assert name.partition(".")[0] in allowed, (path, name)


def test_the_library_reads_what_was_made(package: Path) -> None:
    from kernels._rust import Build, Digest, DigestAlgorithm

    from kernels import Metadata

    assert [str(backend) for backend in Build.open(SOURCES).general.backends] == BACKENDS
    folders = {folder.name: folder for folder in (package / "build").iterdir()}
    assert set(folders) == {f"torch-{backend}" for backend in BACKENDS}
    identifiers = set()
    for backend in BACKENDS:
        folder = folders[f"torch-{backend}"]
        metadata = Metadata.read_from_file(folder / "metadata.json")
        assert str(metadata.backend.backend_type) == backend
        assert metadata.name.python_name == "emergence_kernels"
        assert metadata.id.isidentifier()
        identifiers.add(metadata.id)
        metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, folder))
        assert (folder / "LICENSE").read_bytes() == (REPOSITORY / "LICENSE").read_bytes()
    assert len(identifiers) == len(BACKENDS)


def test_the_card_names_the_repository_and_has_no_blanks(package: Path) -> None:
    card = (package / "README.md").read_text("utf-8")
    version = json.loads((package / "build/torch-cpu/metadata.json").read_text("utf-8"))["version"]
    assert f'get_kernel("owner/emergence-kernels", version={version}, ' in card
    assert not re.search(r"[{}]", card)


@pytest.mark.parametrize("occupied", ["a file in it", "a file of that name"])
def test_what_is_there_is_not_overwritten(occupied: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    kept = out / "kept" if occupied == "a file in it" else out
    kept.parent.mkdir(exist_ok=True)
    kept.write_text("mine", "utf-8")
    with pytest.raises(ValueError, match=r"^--out: .*out is not an empty folder, give another.*$"):
        make_hub_package.make(out, "owner/emergence-kernels")
    assert [path.read_text("utf-8") for path in tmp_path.rglob("*") if path.is_file()] == ["mine"]


@pytest.mark.parametrize("repo_id", ["emergence-kernels", "a/b/c", "owner/"])
def test_a_repository_has_an_owner_and_a_name(repo_id: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"^--repo-id: got '{repo_id}', give OWNER/NAME$"):
        make_hub_package.make(tmp_path / "out", repo_id)
    assert not (tmp_path / "out").exists()


def test_the_command_takes_an_empty_folder_and_refuses_in_one_line(tmp_path: Path) -> None:
    command = [sys.executable, SOURCES / "make_hub_package.py", "--repo-id", "a/b", "--out", "."]
    first, second = (
        subprocess.run(command, cwd=tmp_path, capture_output=True, text=True) for _ in range(2)
    )
    assert (first.returncode, first.stderr) == (0, "")
    assert second.returncode == 2
    assert re.fullmatch(r"error: --out: .*\n", second.stderr)

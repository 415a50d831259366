"""The mutants of `mutations.py` still fit the sources; running them is its own command."""

import shutil
from pathlib import Path

import pytest
from conftest import REPOSITORY
from mutants import MUTATIONS, PACKAGE


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_it_still_applies(mutation, tmp_path: Path) -> None:
    copy = tmp_path / mutation.path
    copy.parent.mkdir(parents=True)
    shutil.copy(REPOSITORY / mutation.path, copy)
    before = copy.read_text(encoding="utf-8")
    mutation.apply(tmp_path)
    changed = copy.read_text(encoding="utf-8")
    assert changed != before
    compile(changed, mutation.path, "exec")
    for test in mutation.tests:
        assert (REPOSITORY / test).exists()


def test_names_are_unique() -> None:
    names = [mutation.name for mutation in MUTATIONS]
    assert len(set(names)) == len(names)


def test_every_file_of_kernels_that_the_expert_mlp_takes_has_mutants() -> None:
    sources = {path.stem: path.read_text() for path in (REPOSITORY / PACKAGE / "gpu").glob("*.py")}
    taken, found = set(), {"expert_mlp"}
    while taken != found:
        taken = set(found)
        found |= {n for n in sources if any(f"from .{n} import" in sources[t] for t in taken)}
    with_kernels = {name for name in taken if "@triton.jit" in sources[name]}
    assert {"tiles", "combine", "activation_functions"} <= with_kernels
    assert with_kernels <= {Path(mutation.file).stem for mutation in MUTATIONS}

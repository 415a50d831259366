"""The mutants of `mutations.py` still fit the sources; running them is its own command."""

import shutil
from pathlib import Path

import pytest
from mutations import MUTATIONS, PACKAGE, REPOSITORY


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


def test_every_kernel_file_of_the_expert_mlp_has_mutants() -> None:
    with_kernels = {
        path.name
        for path in (REPOSITORY / PACKAGE / "gpu").glob("*.py")
        if "@triton.jit" in path.read_text(encoding="utf-8")
    }
    assert with_kernels <= {Path(mutation.file).name for mutation in MUTATIONS}

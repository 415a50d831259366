"""The Triton kernels compile for GPUs that are not there, without spilling, within their limits."""

import csv
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, compile_process

pytest.importorskip("triton", reason="the kernels are compiled by Triton, which is not installed")

from emergence_kernels.gpu import recording, resource_tables, resources
from emergence_kernels.gpu.defaults import TARGETS

pytestmark = pytest.mark.slow

DOCUMENT = REPOSITORY / "docs" / "kernels.md"
CONFIGURATIONS = REPOSITORY / "docs" / "kernels_configurations.csv"

INSTRUCTIONS = {
    "sm_80": {"mma.sync"},
    "sm_89": {"mma.sync"},
    "sm_90": {"wgmma"},
    "sm_100": {"tcgen05", "mma.sync"},
    "gfx942": {"mfma"},
}


def compiled_rows(folder: Path, *flags: str) -> list[dict[str, Any]]:
    """What the command reports with `flags`; its exit code must be that of no problem."""
    jobs = str(min(os.cpu_count() or 1, 8))
    module = ("-m", "emergence_kernels.gpu.resources", "--jobs", jobs)
    done = compile_process(folder, *module, *flags, "--json", "rows.json")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows: list[dict[str, Any]] = json.loads((folder / "rows.json").read_text("utf-8"))
    return rows


@pytest.fixture(scope="module", params=["sample", pytest.param("all", marks=pytest.mark.grid)])
def rows(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """Every kernel on one target; or on all, with the other dtypes and activation on some."""
    folder = tmp_path_factory.mktemp("compile")
    few = ("--bucket", "128")
    plain = (*few, "--dtype", "bf16", "--activation", "gelu_tanh")
    if request.param == "sample":
        return compiled_rows(folder, *plain, "--target", "sm_90")
    found = compiled_rows(folder, *plain)
    assert {row["target"] for row in found} == set(TARGETS)
    for target, dtype in (("sm_90", "bf16"), ("sm_80", "fp32")):
        gated = ("--activation", "swiglu", "--target", target, "--dtype", dtype)
        found += compiled_rows(folder, *few, *gated)
    return found


def kernels_in_source() -> set[str]:
    text = "".join(path.read_text("utf-8") for path in Path(resources.__file__).parent.glob("*.py"))
    return set(re.findall(r"^def _(\w+)_kernel\(", text, re.M))


def test_every_kernel_is_compiled(rows: list[dict[str, Any]]) -> None:
    """A kernel that is missing here needs a line in `recording.LAUNCHERS`."""
    for target in {row["target"] for row in rows}:
        names = {row["kernel"].split()[0] for row in rows if row["target"] == target}
        assert names == kernels_in_source(), target


def test_nothing_spills_and_everything_fits(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        assert not row["problem"], row
        assert row["resources"]["spilled_bytes"] == 0, row
        assert row["resources"]["shared_bytes"] <= TARGETS[row["target"]].shared_bytes, row


def test_products_use_the_matrix_units_of_their_target(rows: list[dict[str, Any]]) -> None:
    products = [r for r in rows if r["dtype"] == "bf16" and "x" in r["config"].split()[0]]
    products = [r for r in products if " s" in r["config"]]
    assert {row["target"] for row in products} == {row["target"] for row in rows}
    for row in products:
        assert row["resources"]["instruction"] in INSTRUCTIONS[row["target"]], row


def test_factors_are_copied_asynchronously_sixteen_bytes_at_a_time(
    rows: list[dict[str, Any]],
) -> None:
    for row in rows:
        if row["dtype"] == "bf16" and " s" in row["config"] and row["target"] != "gfx942":
            resources = row["resources"]
            assert resources["wide_copies"] + resources["bulk_copies"] > 0, row
            assert row["resources"]["narrow_copies"] == 0, row


WITH_OTHER_INTEGERS = """
import dataclasses
from emergence_kernels.gpu import recording
from emergence_kernels.gpu.compiling import CompileJob
from emergence_kernels.gpu.defaults import TARGETS

case = recording.Case(TARGETS["sm_90"], "bf16", "gelu_tanh", 16)
for integer in (1, 7):
    for launch in recording.launches(case, case.default_plan()):
        arguments = tuple(integer if type(a) is int else a for a in launch.arguments)
        if arguments != launch.arguments:
            CompileJob.of(dataclasses.replace(launch, arguments=arguments), case.target).run()
            print(launch.kernel.fn.__name__, integer)
"""


def test_kernels_compile_for_every_kind_of_integer(tmp_path: Path) -> None:
    """An argument of 1 is a constant, without a tensor's methods; 7 is no multiple of 16.

    The other compilations are of multiples of 16.
    """
    done = compile_process(tmp_path, "-c", WITH_OTHER_INTEGERS)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "_sums_bwd_kernel 1" in done.stdout.splitlines()


STORED_THE_OTHER_WAY = """
from emergence_kernels.gpu import recording, resources
from emergence_kernels.gpu.compiling import CompileJob
from emergence_kernels.gpu.defaults import TARGETS

for target, dtype in (("sm_90", "bf16"), ("sm_80", "bf16"), ("sm_90", "tf32")):
    case = recording.Case(TARGETS[target], dtype, "swiglu", 128)
    for launch in recording.transposed_launches(case):
        if recording.product_of(launch) == "up":
            job = CompileJob.of(launch, case.target)
            row = resources.Compilation(case, launch, job).row(job.run())
            assert not row.problem, row
            print(target, dtype, row.resources.instruction)
"""


def test_products_of_weights_stored_the_other_way_compile(tmp_path: Path) -> None:
    """As transformers' models store them: the same matrix instructions, nothing spilled.

    Other products read weights both ways anyhow.
    """
    done = compile_process(tmp_path, "-c", STORED_THE_OTHER_WAY)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    expected = ["sm_90 bf16 wgmma", "sm_80 bf16 mma.sync", "sm_90 tf32 wgmma"]
    assert done.stdout.splitlines() == expected


def test_a_configuration_that_cannot_be_used_is_reported() -> None:
    case = recording.Case(TARGETS["sm_80"], "bf16", "gelu_tanh", 128)
    compilation = resources.compilations([case], "default")[0]
    found = resources.Resources(registers=255, spilled_bytes=8, instruction="mma.sync")
    assert "spills 8 bytes" in compilation.row(found).problem
    found = resources.Resources(255, 0, "mma.sync", shared_bytes=10**6)
    assert "of 166912 bytes of shared memory" in compilation.row(found).problem
    assert compilation.row("does not compile: why").problem == "does not compile: why"


def test_wrong_flags_are_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit) as done:
        resources.main(["--target", "sm_1"])
    assert done.value.code == 2
    assert "--target" in capsys.readouterr().err
    monkeypatch.setattr("triton.knobs.runtime.interpret", False)
    with pytest.raises(ValueError, match="--jobs: got 0"):
        resources.main(["--jobs", "0"])


def test_document_without_the_comments_is_refused(tmp_path: Path) -> None:
    document = tmp_path / "some.md"
    document.write_text("text", "utf-8")
    with pytest.raises(ValueError, match="--markdown"):
        resource_tables.replace_table(document, "table")


def test_document_has_every_kernel_on_every_target() -> None:
    text = DOCUMENT.read_text("utf-8")
    table = text.split(resource_tables.BEGIN)[1].split(resource_tables.END)[0]
    cells = [[cell.strip() for cell in line.split("|")] for line in table.splitlines()]
    found = {(cell[1].split()[0], cell[2]) for cell in cells if len(cell) > 3 and cell[1]}
    for target in TARGETS:
        assert {(kernel, target) for kernel in kernels_in_source()} <= found


def test_every_candidate_of_tuning_has_been_compiled() -> None:
    """fp16 counts as bf16: as wide, and on the same matrix units."""
    with CONFIGURATIONS.open(encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    columns = ("kernel", "target", "dtype", "activation", "config")
    compiled = {tuple(row[name] for name in columns) for row in table if not row["problem"]}
    dtypes = [name for name in recording.DTYPES if name != "fp16"]
    cases = resources.selected_cases([*TARGETS], dtypes, ("gelu_tanh", "swiglu"), recording.BUCKETS)
    for compilation in resources.compilations(cases, "all"):
        row = compilation.row("")
        assert tuple(getattr(row, name) for name in columns) in compiled, row

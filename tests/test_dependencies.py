"""Versions that were not tested are named in one line, and so is a dependency that fails."""

import json
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pandas
import pytest
from conftest import REPOSITORY, Command, command_environment
from packaging.requirements import Requirement
from packaging.version import Version

from moe_emergence import dependencies
from moe_emergence.dependencies import CONSTRAINTS, raised_in, untested, untested_here
from moe_emergence.errors import exit_code
from moe_emergence.extras import EXTRAS

CONSTRAINTS_TEXT = """# made by hand
of-an-extra==2.0
other==1.0
some-package==5.24.1
windows-only==1.0 ; sys_platform == 'never'
"""
REQUIREMENTS = [
    "some_package>=5.20,<6",
    "windows-only>=1",
    "absent>=1",
    'other>=0.5; extra == "test"',
    'of-an-extra>=1; extra == "train"',
]


def check(version: str) -> list[str]:
    installed = {"some-package": version, "windows-only": "9.0", "other": "9.0"}
    return [str(found) for found in untested(REQUIREMENTS, CONSTRAINTS_TEXT, installed)]


@pytest.mark.parametrize("version", ["5.20", "5.24.1", "5.24.9", "5.24.1+cpu", "5.24.0rc1"])
def test_what_was_tested_is_not_worth_a_word(version: str) -> None:
    assert check(version) == []


@pytest.mark.parametrize("version", ["5.19.9", "5.25.0", "6.0", "4.57", "5.25.0.dev0"])
def test_what_was_not_is_named_with_its_range(version: str) -> None:
    (line,) = check(version)
    assert line.startswith(f"some-package {version} is untested (tested: >=5.20,<6, up to 5.24.1)")
    assert "\n" not in line


def test_what_an_extra_installed_is_judged_too() -> None:
    installed = {"of-an-extra": "3.0", "other": "9.0"}
    (found,) = untested(REQUIREMENTS, CONSTRAINTS_TEXT, installed)
    assert found.name == "of-an-extra"


def test_every_requirement_has_a_tested_version_that_it_allows() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *(r for extra in extras.values() for r in extra)]
    wanted = [r for r in wanted if not r.startswith(("moe-emergence[", "trackio", "wandb"))]
    pins: dict[str, list[Version]] = {}
    for line in CONSTRAINTS.read_text("utf-8").splitlines()[1:]:
        pin = Requirement(line)
        (specifier,) = pin.specifier
        assert specifier.operator == "=="
        pins.setdefault(pin.name, []).append(Version(specifier.version))
    for requirement in map(Requirement, wanted):
        found = pins[requirement.name.replace("_", "-")]
        assert all(requirement.specifier.contains(version) for version in found), requirement
    assert not [name for name in pins if name.startswith(("nvidia", "cuda"))]


def test_the_startup_check_reads_this_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        metadata.distribution("moe-emergence")
    except metadata.PackageNotFoundError:
        pytest.skip("moe-emergence is not installed here, so there is no metadata to read")
    real = metadata.version
    newer = {"transformers": "5.999.0"}
    monkeypatch.setattr(dependencies.metadata, "version", lambda n: newer.get(n) or real(n))
    (line,) = [str(found) for found in untested_here() if found.name == "transformers"]
    assert line.startswith("transformers 5.999.0 is untested (tested: >=5.24,<6, up to 5.")


def test_sources_that_were_never_installed_are_not_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> list[str]:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(dependencies.metadata, "requires", absent)
    assert untested_here() == []


def test_extras_are_those_of_the_project() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))["project"]
    extras = {
        name: [Requirement(r) for r in rs] for name, rs in project["optional-dependencies"].items()
    }
    named = {"sklearn": "scikit-learn", "reasoning_gym": "reasoning-gym"}
    for extra, packages in EXTRAS.items():
        wanted = {r.name for r in extras[extra] if r.name != "moe-emergence"}
        assert wanted == {named.get(package, package) for package in packages}
    # each includes the one before
    for extra, included in (("analysis", "train"), ("test", "analysis")):
        assert extras[extra][0].name == "moe-emergence"
        assert extras[extra][0].extras == {included}


def of_pandas(_: list[str]) -> int:
    pandas.DataFrame({"a": [1]})["b"]
    return 0


def of_pandas_through_the_standard_library(_: list[str]) -> int:
    json.dumps({}, default=None)
    sorted([1], key=lambda _: pandas.Series([1]).loc["missing"])
    return 0


def of_an_import(_: list[str]) -> int:
    from pandas import no_such_name  # noqa: F401

    return 0


def of_ours(_: list[str]) -> int:
    raise KeyError("ours")


def of_ours_in_the_standard_library(_: list[str]) -> int:
    json.dumps(object())
    return 0


@pytest.mark.parametrize("main", [of_pandas, of_pandas_through_the_standard_library, of_an_import])
def test_a_dependency_that_fails_is_one_line(main, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(main, []) == 1
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    kind = "ImportError" if main is of_an_import else "KeyError"
    assert printed.startswith(f"error: {kind} in pandas {metadata.version('pandas')}: ")
    assert "--debug" in printed
    with pytest.raises((KeyError, ImportError)):
        exit_code(main, ["--debug"])


def of_a_missing_package(_: list[str]) -> int:
    from sklearn.cluster import KMeans  # noqa: F401

    return 0


def test_a_package_of_an_extra_is_asked_for_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "sklearn"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert exit_code(of_a_missing_package, []) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert "sklearn is not installed; run pip install 'moe-emergence[train]'" in printed
    with pytest.raises(ModuleNotFoundError):
        exit_code(of_a_missing_package, ["--debug"])


@pytest.mark.parametrize("packages", ["site-packages", "dist-packages"])
def test_a_package_of_the_user_or_of_the_system_counts(packages: str, tmp_path: Path) -> None:
    source = tmp_path / "lib" / packages / "pandas" / "io.py"
    raising = compile("raise KeyError('theirs')", str(source), "exec")
    with pytest.raises(KeyError) as caught:
        exec(raising)
    assert raised_in(caught.value) == f"pandas {metadata.version('pandas')}"


@pytest.mark.parametrize("main", [of_ours, of_ours_in_the_standard_library])
def test_an_error_of_our_own_keeps_its_traceback(main) -> None:
    with pytest.raises((KeyError, TypeError)) as caught:
        exit_code(main, [])
    assert raised_in(caught.value) is None


def test_the_certificate_needs_no_packaging(command: Command) -> None:
    done = command(
        "-c", "import sys; sys.modules['packaging'] = None; import moe_emergence.verify.work"
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("rank", "warnings"), [("0", 1), ("1", 0)])
def test_train_warns_once_and_goes_on(
    command: Command, tmp_path: Path, rank: str, warnings: int
) -> None:
    """A newer release, as an installed package of that name and version says it."""
    folder = tmp_path / "newer" / "tyro-1.999.0.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: tyro\nVersion: 1.999.0\n")
    script = (
        f"import sys; sys.path.insert(0, {str(folder.parent)!r}); "
        "from moe_emergence.begin import begin; begin(); print('went on')"
    )
    done = command("-c", script, env={**command_environment(), "RANK": rank})
    assert done.returncode == 0
    assert done.stdout == "went on\n"
    assert done.stderr.count("tyro 1.999.0 is untested") == warnings

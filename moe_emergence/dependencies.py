"""Which versions of the dependencies were tested, and whose code an exception comes from."""

import sysconfig
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from moe_emergence.extras import EXTRAS

if TYPE_CHECKING:
    from packaging.version import Version

OURS = ("moe_emergence", "emergence_kernels")
CONSTRAINTS = Path(__file__).with_name("constraints.txt")
PACKAGES = frozenset({"site-packages", "dist-packages"})
"""Folders of installed packages: the interpreter's, the user's, Debian's."""


@dataclass(frozen=True)
class Untested:
    """A dependency outside the versions that were tested."""

    name: str
    installed: "Version"
    allowed: str
    """What pyproject.toml allows, as ">=5.24,<6"."""
    tested: "Version"
    """The version in constraints.txt."""

    def __str__(self) -> str:
        return (
            f"{self.name} {self.installed} is untested (tested: {self.allowed}, up to "
            f"{self.tested}); if something fails, pip install with -c {CONSTRAINTS.name}"
        )


def untested(
    requirements: Iterable[str], constraints: str, installed: Mapping[str, str]
) -> list[Untested]:
    """The installed packages that their requirement does not allow, or that are newer than tested.

    Newer is another major or minor version: a patch is not worth a word.

    Args:
        requirements: as a distribution's metadata has them; of extras, those in `EXTRAS` count.
        constraints: text of a pip constraints file of exact versions.
        installed: version by canonical name; what is not there is not judged.
    """
    # here and not above: `verify` runs where torch and Triton alone are installed
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name
    from packaging.version import Version

    tested = {}
    for line in constraints.splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            if pin.marker is None or pin.marker.evaluate():
                tested[canonicalize_name(pin.name)] = Version(str(pin.specifier).lstrip("="))
    found = []
    for requirement in map(Requirement, requirements):
        name = canonicalize_name(requirement.name)
        marker = requirement.marker
        if marker and not any(marker.evaluate({"extra": extra}) for extra in ("", *EXTRAS)):
            continue
        if name not in installed or name not in tested:
            continue
        version = Version(installed[name])
        allowed = requirement.specifier.contains(version, prereleases=True)
        if not allowed or version.release[:2] > tested[name].release[:2]:
            bounds = ",".join(sorted(map(str, requirement.specifier), reverse=True))
            found.append(Untested(name, version, bounds, tested[name]))
    return found


def untested_here() -> list[Untested]:
    """`untested` of this installation; nothing for sources that were never installed."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    try:
        requirements = metadata.requires("moe-emergence") or []
    except metadata.PackageNotFoundError:
        return []
    installed = {}
    for name in {canonicalize_name(Requirement(text).name) for text in requirements}:
        try:
            installed[str(name)] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return untested(requirements, CONSTRAINTS.read_text("utf-8"), installed)


def raised_in(error: BaseException) -> str | None:
    """Name and version of the dependency in whose code `error` was raised, else None.

    Python's own frames count for who called them. An import that fails counts for the package
    that lacks the name.
    """
    if isinstance(error, ImportError) and error.name:
        return _distribution(error.name.partition(".")[0])
    frames = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)]
    library = Path(sysconfig.get_path("stdlib"))
    for path in map(Path, reversed(frames)):
        if installed := PACKAGES.intersection(path.parts):
            module = path.parts[path.parts.index(max(installed)) + 1]
            return _distribution(module.removesuffix(".py"))
        if not path.is_relative_to(library) and not str(path).startswith("<"):
            return None
    return None


def _distribution(module: str) -> str | None:
    names = metadata.packages_distributions().get(module, [])
    if module in OURS or not names:
        return None
    return f"{names[0]} {metadata.version(names[0])}"

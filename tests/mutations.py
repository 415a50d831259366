"""Break the expert MLP in one place at a time and see whether a test notices.

    python tests/mutations.py [--list] [--only NAME ...] [--jobs N]

Every mutant is an exact replacement of a text that occurs once in its file, applied to a copy of
the sources. The tests run against the copy until the first fails. Prints a Markdown table and exits
with 1 if a mutant survives or the sources themselves fail.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mutants import MUTATIONS, Mutation

REPOSITORY = Path(__file__).resolve().parent.parent
TIME_LIMIT = 900
# unbuffered: the name of a test that crashes the process is printed before it runs
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
NO_SHRINKING = """
from hypothesis import Phase, settings

settings.register_profile("mutants", phases=[Phase.explicit, Phase.generate], derandomize=True)
settings.load_profile("mutants")
"""


def copy_sources(root: Path) -> None:
    """What the tests need, without builds and caches."""
    ignore = shutil.ignore_patterns("__pycache__", ".hypothesis", "*.pyc")
    for name in ("kernels", "moe_emergence", "benchmarks", "tests"):
        shutil.copytree(REPOSITORY / name, root / name, ignore=ignore)
    shutil.copy(REPOSITORY / "pyproject.toml", root)
    with (root / "tests/conftest.py").open("a", encoding="utf-8") as conftest:
        conftest.write(NO_SHRINKING)


def run_tests(mutation: Mutation | None, tests: tuple[str, ...]) -> str | None:
    """The first test that fails in a copy with that mutation, or None."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        copy_sources(root)
        if mutation is not None:
            mutation.apply(root)
        path = os.pathsep.join([str(root), str(root / "kernels")])
        command = [sys.executable, "-m", "pytest", "-n0", "-x", "-v", "-p", "no:cacheprovider"]
        try:
            done = subprocess.run(
                [*command, *tests],
                cwd=root,
                env={**os.environ, **ENVIRONMENT, "PYTHONPATH": path},
                capture_output=True,
                text=True,
                timeout=TIME_LIMIT,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return f"did not end within {TIME_LIMIT} s"
    if done.returncode == 0:
        return None
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    if failed:
        return failed[1]
    started = re.findall(r"^(tests/\S+::\S+)", done.stdout, re.MULTILINE)
    return f"{started[-1]} (crashed)" if started else f"exit code {done.returncode}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these mutants only")
    parser.add_argument("--jobs", type=int, default=2, help="mutants at a time (default: 2)")
    arguments = parser.parse_args()
    if arguments.list:
        print(*(mutation.name for mutation in MUTATIONS), sep="\n")
        return 0
    unknown = set(arguments.only or ()) - {mutation.name for mutation in MUTATIONS}
    if unknown:
        parser.error(f"--only: no such mutant: {', '.join(sorted(unknown))}; see --list")
    chosen = [m for m in MUTATIONS if not arguments.only or m.name in arguments.only]

    every_test = tuple(dict.fromkeys(test for mutation in chosen for test in mutation.tests))
    print("| mutant | file | caught by |\n|---|---|---|", flush=True)
    survivors = 0
    with ThreadPoolExecutor(arguments.jobs) as pool:
        unmutated = pool.submit(run_tests, None, every_test)
        results = pool.map(lambda mutation: run_tests(mutation, mutation.tests), chosen)
        for mutation, caught in zip(chosen, results, strict=True):
            survivors += caught is None
            verdict = "**SURVIVED**" if caught is None else f"`{caught.removeprefix('tests/')}`"
            print(f"| {mutation.name} | `{mutation.file}` | {verdict} |", flush=True)
    failed = unmutated.result()
    if failed is not None:
        print(f"the sources as they are fail {failed}", file=sys.stderr)
        return 1
    print(f"\n{len(chosen) - survivors} of {len(chosen)} mutants caught.")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())

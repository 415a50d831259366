"""The measurements on a GPU as one program; docs/gpu.md says how to use it.

`run` writes `gpu.json`, whole on disk after every row. Called again on the same commit and device
it goes on with the stages that are missing.
"""

import argparse
import logging
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.command import common_environment, device_of, start_logging
from benchmarks.gpu.pack import pack, packed_commit
from benchmarks.gpu.predictions import fit, predict
from benchmarks.gpu.program import Journal, Setting, read_journal, run_stages
from benchmarks.gpu.rehearsal import install_wheels, make_environment, rehearse
from benchmarks.gpu.report import write_report
from benchmarks.gpu.stages import STAGES
from moe_emergence.config import DataConfig

logger = logging.getLogger(__name__)


def _run(options: argparse.Namespace) -> None:
    device = device_of(options.device)
    options.out.mkdir(parents=True, exist_ok=True)
    setting = Setting(
        device,
        options.tiny,
        str(options.out.resolve()),
        workers=max(1, (os.cpu_count() or 1) - 1),
        deadline=time.time() + 60 * options.minutes,
    )
    environment = common_environment(device)
    environment["commit"] = packed_commit() or environment["commit"]
    journal = Journal.open(options.out / "gpu.json", environment)
    chosen = [s for s in STAGES if options.stages is None or s.name in options.stages]
    if not run_stages(chosen, journal, setting):
        sys.exit("a stage is missing, see the log above and gpu.json")


def _pack(options: argparse.Namespace) -> None:
    try:
        data = None
        if options.data is not None:
            data = DataConfig(
                data=options.data, tokenizer=options.tokenizer, size_mb=options.size_mb
            )
        logger.info("packed %s", pack(data))
    except subprocess.CalledProcessError as error:
        sys.exit(f"{error.cmd[0]} failed with exit code {error.returncode}, see above")
    except ValueError as error:
        sys.exit(str(error))


def _rehearse(options: argparse.Namespace) -> None:
    try:
        python, site = options.environment, None
        if python is None:
            python = make_environment(options.python)
            site = install_wheels(python)
        code = rehearse(python, site, options.out.resolve(), options.stages)
    except (subprocess.CalledProcessError, FileNotFoundError) as error:
        sys.exit(f"no rehearsal: {error}")
    if code:
        sys.exit(code)
    for name, stage in read_journal(options.out / "gpu.json")["stages"].items():
        if any(row.get("exit", 0) != 0 for row in stage["rows"]):
            sys.exit(f"{name}: a command failed, see its log in {options.out}")


def _report(options: argparse.Namespace) -> None:
    try:
        logger.info("wrote %s", write_report(options.source, options.out))
    except ValueError as error:
        sys.exit(str(error))


def _predict(options: argparse.Namespace) -> None:
    try:
        sys.stdout.write(predict(options.source))
        if options.fit:
            fitted = fit(options.source)
            names = ("cache_bytes_per_s", "tile_s", "start_s")
            values = ", ".join(f"{name} {getattr(fitted, name):g}" for name in names)
            sys.stdout.write(f"\nfitted: {values}\n")
    except (ValueError, KeyError) as error:
        sys.exit(str(error))


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    commands = parser.add_subparsers(required=True)
    run = commands.add_parser("run", help="measure, stage after stage")
    run.set_defaults(command=_run)
    run.add_argument("--out", required=True, type=Path, help="folder for the results")
    run.add_argument("--minutes", type=float, default=9.0, help="no stage goes on after that")
    run.add_argument("--stages", nargs="+", choices=[s.name for s in STAGES], help="only these")
    run.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    run.add_argument("--tiny", action="store_true", help="toy sizes, which measure nothing")
    rehearsing = commands.add_parser("rehearse", help="run on a CPU in toy sizes")
    rehearsing.set_defaults(command=_rehearse)
    rehearsing.add_argument("--out", required=True, type=Path, help="folder for the results")
    rehearsing.add_argument("--stages", nargs="+", choices=[s.name for s in STAGES])
    rehearsing.add_argument("--python", default="python3.12", help="makes the environment")
    rehearsing.add_argument("--environment", help="or the interpreter of one that has all it needs")
    packing = commands.add_parser("pack", help="wheels, blocks of tokens and the commit, to carry")
    packing.set_defaults(command=_pack)
    packing.add_argument("--data", help="text for the runs: embedded, hub or a folder")
    packing.add_argument("--tokenizer", default="gpt2", help="gpt2, a folder or train")
    packing.add_argument("--size-mb", type=float, default=10.0, help="text per domain")
    report = commands.add_parser("report", help="tables and a figure of what was measured")
    report.set_defaults(command=_report)
    report.add_argument("source", type=Path, metavar="JSON", help="what run wrote")
    report.add_argument("--out", required=True, type=Path, help="folder for the report")
    predicting = commands.add_parser("predict", help="the time model beside what was measured")
    predicting.set_defaults(command=_predict)
    predicting.add_argument("source", type=Path, metavar="JSON", help="what run wrote")
    predicting.add_argument("--fit", action="store_true", help="also the fitted constants anew")
    options = parser.parse_args(arguments)
    start_logging()
    options.command(options)


if __name__ == "__main__":
    main()

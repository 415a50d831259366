"""The measurements on a GPU as one command: `python -m benchmarks.gpu run --out DIR --minutes N`.

`gpu.json` is whole on disk after every row. Called again on the same commit and device it goes on
with the stages that are missing.
"""

import argparse
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.command import common_environment, device_of, start_logging
from benchmarks.gpu.program import Journal, Setting, run_stages
from benchmarks.gpu.stages import STAGES

logger = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    commands = parser.add_subparsers(required=True)
    run = commands.add_parser("run", help="measure, stage after stage")
    run.add_argument("--out", required=True, type=Path, help="folder for the results")
    run.add_argument("--minutes", type=float, default=9.0, help="no stage goes on after that")
    run.add_argument("--stages", nargs="+", choices=[s.name for s in STAGES], help="only these")
    run.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    run.add_argument("--tiny", action="store_true", help="toy sizes, which measure nothing")
    options = parser.parse_args(arguments)
    start_logging()
    device = device_of(options.device)
    options.out.mkdir(parents=True, exist_ok=True)
    setting = Setting(
        device,
        options.tiny,
        str(options.out.resolve()),
        workers=max(1, (os.cpu_count() or 1) - 1),
        deadline=time.time() + 60 * options.minutes,
    )
    journal = Journal.open(options.out / "gpu.json", common_environment(device))
    chosen = [s for s in STAGES if options.stages is None or s.name in options.stages]
    if not run_stages(chosen, journal, setting):
        sys.exit("a stage is missing, see the log above and gpu.json")


if __name__ == "__main__":
    main()

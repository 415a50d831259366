"""Whether a long run grows: `python tests/faults/long_run.py --steps 20000 --out FOLDER`.

Trains a tiny mixture with the real command, with logging, evaluations and checkpoints as a user
has them, and looks at the process from outside: resident memory, open files, threads; the time of a
step is what the run itself wrote into `metrics.jsonl`.

The run passes where, over its second half, memory rises by less than `BYTES_PER_STEP` (Theil-Sen
slope, 95% interval below it), its last quarter has no more files and threads than its second one,
and a step takes no more than `SLOWER` times as long in the last quarter as in the second (medians).
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import psutil
from scipy.stats import theilslopes

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from conftest import command_environment
from small_texts import write_texts

from moe_emergence.experiments.live import read_progress
from moe_emergence.run_folder import read_metrics

BYTES_PER_STEP = 64.0
SLOWER = 1.10
EVERY_SECONDS = 0.5
SIZE = (
    *("--n-layer", "2", "--n-embd", "16", "--n-head", "2", "--moe-layers", "1"),
    *("--num-experts", "4", "--block-size", "16", "--vocab-size", "300", "--size-mb", "1"),
    *("--pretrain-steps", "4", "--batch-size", "4", "--device", "cpu", "--no-live"),
    *("--no-compare-dense", "--no-compare-null", "--eval-blocks", "4"),
)


def run(steps: int, folder: Path) -> list[dict[str, float]]:
    """Train `steps` steps in `folder`; what was seen of the process, sample by sample."""
    write_texts(folder / "texts")
    flags = [*SIZE, "--data", str(folder / "texts"), "--cache-dir", str(folder / "cache")]
    flags += ["--output-dir", str(folder / "runs"), "--run-name", "long", "--max-steps", str(steps)]
    every = str(max(steps // 80, 1))
    flags += ["--eval-every", every, "--save-every", every, "--keep-last-k", "2"]
    metrics = folder / "runs" / "long" / "metrics.jsonl"
    samples: list[dict[str, float]] = []
    with (folder / "log.txt").open("w") as log:
        process = psutil.Popen(
            [sys.executable, "-m", "moe_emergence.train", *flags],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=command_environment(),
        )  # fmt: skip
        while process.poll() is None:
            try:
                with process.oneshot():
                    sample = {
                        "step": read_progress(metrics).step,
                        "resident_bytes": process.memory_info().rss,
                        "open_files": process.num_fds(),
                        "threads": process.num_threads(),
                    }
            except psutil.NoSuchProcess:
                break
            if 0 < sample["step"] < steps:
                samples.append(sample)
            time.sleep(EVERY_SECONDS)
        if process.wait() != 0:
            raise RuntimeError((folder / "log.txt").read_text())
    return samples


def seconds_per_step(metrics: Path, tokens_per_step: int = 64) -> list[tuple[int, float]]:
    """Step and seconds of a step, as the run measured them, over `--log-every` steps each."""
    rows = read_metrics(metrics)
    key = "perf/tokens_per_sec"
    return [(row["step"], tokens_per_step / row[key]) for row in rows if key in row]


def judge(
    samples: Sequence[dict[str, float]], times: Sequence[tuple[int, float]], steps: int
) -> dict[str, object]:
    """What was measured in each quarter, and whether the run passes."""
    at = np.array([s["step"] for s in samples])
    quarter = np.minimum(4 * (at - 1) // steps, 3)
    seen = {k: np.array([s[k] for s in samples]) for k in samples[0] if k != "step"}
    medians = {k: [float(np.median(v[quarter == q])) for q in range(4)] for k, v in seen.items()}
    most = {k: [int(v[quarter == q].max()) for q in range(4)] for k, v in seen.items()}
    step, seconds = np.array(times).T
    part = np.minimum(4 * (step - 1) // steps, 3)
    per_step = [float(np.median(seconds[part == q])) for q in range(4)]
    half = quarter >= 2
    slope, _, low, high = theilslopes(seen["resident_bytes"][half], at[half])
    verdicts = {
        "memory": bool(high < BYTES_PER_STEP),
        "open_files": most["open_files"][3] <= most["open_files"][1],
        "threads": most["threads"][3] <= most["threads"][1],
        "time": per_step[3] <= SLOWER * per_step[1],
    }
    return {
        "steps": steps,
        "samples": len(samples),
        "resident_mb": [round(value / 1e6, 1) for value in medians["resident_bytes"]],
        "bytes_per_step": {"slope": float(slope), "low": float(low), "high": float(high)},
        "open_files": most["open_files"],
        "threads": most["threads"],
        "ms_per_step": [round(1000 * value, 3) for value in per_step],
        "verdicts": verdicts,
        "passes": all(verdicts.values()),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--out", type=Path, required=True, help="an empty folder")
    options = parser.parse_args()
    started = time.monotonic()
    samples = run(options.steps, options.out)
    times = seconds_per_step(options.out / "runs" / "long" / "metrics.jsonl")
    found = judge(samples, times, options.steps) | {"seconds": round(time.monotonic() - started, 1)}
    (options.out / "samples.json").write_text(json.dumps(samples))
    (options.out / "long_run.json").write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))
    return 0 if found["passes"] else 1


if __name__ == "__main__":
    sys.exit(main())

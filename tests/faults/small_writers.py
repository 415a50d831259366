"""`python -m small_writers NAME FOLDER`: what writes and is no command of its own, each as one."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from routing_models import tiny_mixture
from suite_folders import write_suite
from test_routing_callback import trainer_of
from test_suite_execute import STAND_IN, TINY

from moe_emergence.analysis.gallery import write_gallery
from moe_emergence.analysis.routing_record import RoutingRecord, save_routing
from moe_emergence.data.prepared import PreparedData, save_prepared
from moe_emergence.data.tokenizer import train_bpe
from moe_emergence.disk import clear_unfinished, remove_folder, whole_folder
from moe_emergence.errors import RunError, exit_code
from moe_emergence.experiments import execute as executing
from moe_emergence.experiments.execute import Execution, execute
from moe_emergence.experiments.plan import plan_runs
from moe_emergence.experiments.report import build_report
from moe_emergence.experiments.specialisation import Resampling
from moe_emergence.experiments.suite_file import load_suite
from moe_emergence.integrations.callback import MoERoutingCallback
from moe_emergence.moe.tuning import TuningEntry, TuningKey, TuningTable, save_table
from moe_emergence.run_folder import RunFolder
from moe_emergence.training.checkpoint import recover_folders


def tuning(folder: Path) -> None:
    key = TuningKey("float32", 16, 64, 4, 1, "gelu", 16)
    save_table(
        TuningTable({key: TuningEntry("fused", "", {"fused": 1.0})}), folder / "cache/t.json"
    )


def prepared(folder: Path) -> None:
    blocks = {"code": torch.arange(64, dtype=torch.int32).reshape(4, 16)}
    tokenizer = train_bpe(["some text " * 50], 270)
    save_prepared(PreparedData(tokenizer, blocks, blocks, {"domains": {}}), folder / "data")


def routing(folder: Path) -> None:
    ids = np.zeros((2, 8), np.int32)
    layers, domains = np.array([1], np.int16), np.zeros(2, np.int8)
    experts = np.zeros((1, 2, 8, 1), np.int16)
    record = RoutingRecord(ids, domains, layers, experts, experts.astype(np.float16))
    recover_folders(RunFolder(folder / "run"))
    save_routing(record, folder / "run" / "routing.npz")


def callback(folder: Path) -> None:
    torch.manual_seed(0)
    trainer = trainer_of(tiny_mixture("mixtral"), folder / "trainer")
    trainer.add_callback(MoERoutingCallback(trainer))
    trainer.train()


def suite(folder: Path) -> None:
    """Plans, logs and states; what the runs write themselves is not on this disk."""
    script = folder.parent / "worker.py"
    script.write_text(STAND_IN, encoding="utf-8")
    for suffix in (".fail", ".hang", ".deaf"):
        script.with_suffix(suffix).write_text("")
    clear_unfinished(folder / "suite" / "plans")
    runs = plan_runs(load_suite(str(TINY)), folder / "suite")[:2]
    executing._POLL_SECONDS = 0.02
    done, _ = execute(
        runs, Execution(folder / "suite", command=(sys.executable, "-S", str(script)))
    )
    if {state.state for state in done} != {"complete"}:
        raise RunError(f"{folder}: {[(state.state, state.note) for state in done]}")


def suite_report(folder: Path) -> None:
    source = folder.parent / "written"
    if not source.exists():
        write_suite(source, seeds=(0, 1))
    root = folder / "suite"
    root.mkdir(exist_ok=True)
    for path in source.iterdir():
        if not (root / path.name).exists():
            (root / path.name).symlink_to(path)
    build_report(root, resampling=Resampling(19, 20))


def tidied(folder: Path) -> None:
    run = RunFolder(folder / "run")
    recover_folders(run)
    for path in filter(Path.is_dir, (run.checkpoints, run.best_model, run.final_model)):
        remove_folder(path)


def gallery(folder: Path) -> None:
    analysis = folder.parent / "analysis"
    (analysis / "figures").mkdir(parents=True, exist_ok=True)
    about = {"runs": [{"name": "a", "made_by": ""}], "tokens": 1, "data": "x", "command": "y"}
    (analysis / "analysis.json").write_text(json.dumps(about))
    write_gallery(analysis, folder / "docs" / "gallery.md")


def nested(folder: Path) -> None:
    clear_unfinished(folder)
    with whole_folder(folder / "new") as new:
        (new / "below").mkdir()
        (new / "below" / "file").write_text("text")


WRITERS: dict[str, Callable[[Path], None]] = {
    one.__name__: one
    for one in (tuning, prepared, routing, callback, suite, suite_report, tidied, gallery, nested)
}


def main(argv: list[str]) -> int:
    WRITERS[argv[0]](Path(argv[1]))
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))

"""One planned run in a process of its own: `python -m moe_emergence.experiments.worker PLAN.json`.

A process that dies, of memory for instance, takes no other run with it.
"""

import argparse
import logging
import os
import signal
import threading
import time
from pathlib import Path

import torch

from moe_emergence.analysis.documents import spread
from moe_emergence.analysis.modules import halves, module_tables, name_on
from moe_emergence.analysis.routing_record import record_routing, save_routing
from moe_emergence.begin import begin
from moe_emergence.config import RunConfig
from moe_emergence.csv_cells import csv_of
from moe_emergence.data import prepare_data
from moe_emergence.device import find_device
from moe_emergence.disk import write_text
from moe_emergence.entry import enter
from moe_emergence.interrupt import interrupted_code
from moe_emergence.models import MixtureModel
from moe_emergence.models.loading import load_trained_model
from moe_emergence.run_folder import RunFolder, read_config
from moe_emergence.training.experiment import run_experiment

logger = logging.getLogger(__name__)

NAMED_ON, TESTED_ON = 16, 12


def main(argv: list[str]) -> int:
    """Train what the file says, or go on with it; record the final model's routing."""
    parser = argparse.ArgumentParser(prog="python -m moe_emergence.experiments.worker")
    parser.add_argument("config", type=Path, help="a RunConfig as JSON")
    parser.add_argument("--threads", type=int, default=0, help="of this process on a CPU")
    parser.add_argument("--test-modules", action="store_true", help="by ablation, at the end")
    parser.add_argument("--parent", type=int, help="stop when this process, which began it, ends")
    options = parser.parse_args(argv)
    begin()
    if options.parent is not None:
        stop_with(options.parent)
    if options.threads:
        torch.set_num_threads(options.threads)
    config = read_config(options.config)
    result = run_experiment(config)
    if result.stopped_by_signal:
        return interrupted_code(result.stopped_by_signal)
    folder = RunFolder(Path(config.output_dir) / config.run_name)
    if config.model.moe_layers and not folder.routing.exists():
        record_final_routing(config, folder)
    if options.test_modules and not folder.modules.exists():
        test_final_modules(config, folder)
    return 0


def stop_with(parent: int) -> None:
    """Stop with a checkpoint, as at SIGTERM, a second after the parent process has ended.

    Killed, the parent can tell nobody, and who gives its command again would find the runs taken.
    Windows never says that a parent has ended; the runs then go on to their end.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        logger.warning("the process that began this one has ended")
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="watch-parent", daemon=True).start()


def record_final_routing(config: RunConfig, folder: RunFolder) -> None:
    """Write `routing.npz`: where the final model sends the blocks it was evaluated on."""
    blocks = prepare_data(config.data, config.seed).eval_blocks
    record = record_routing(
        final_mixture(config, folder), blocks, max_blocks=config.monitor.eval_blocks
    )
    save_routing(record, folder.routing)


def test_final_modules(config: RunConfig, folder: RunFolder) -> None:
    """Write `modules.csv`: the test of the final model's modules, on evaluation blocks.

    They are named on 16 blocks of each domain's first half and taken away on 12 of the second.
    """
    model = final_mixture(config, folder)
    data = prepare_data(config.data, config.seed)
    first, second = halves(data.eval_blocks)
    naming = name_on(model, {d: part[spread(len(part), NAMED_ON)] for d, part in first.items()})
    tables = module_tables(
        model, naming, {"second half": second}, eos_id=data.tokenizer.eos_token_id,
        most=TESTED_ON, seed=config.seed,
    )  # fmt: skip
    write_text(folder.modules, csv_of(tables["modules"]))


def final_mixture(config: RunConfig, folder: RunFolder) -> MixtureModel:
    """The final model, on the device of the run; `ValueError` where it is no mixture."""
    model = load_trained_model(folder.final_model)
    if not isinstance(model, MixtureModel):
        raise ValueError(f"{folder.final_model}: holds no mixture of experts")
    torch.nn.Module.to(model, find_device(config.device))
    return model


if __name__ == "__main__":
    enter(main)

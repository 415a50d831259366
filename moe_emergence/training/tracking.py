"""Metric trackers: local first, and never a reason for training to stop."""

import importlib
import logging
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from accelerate.tracking import (
    GeneralTracker,
    TensorBoardTracker,
    TrackioTracker,
    WandBTracker,
)

logger = logging.getLogger(__name__)


class Tracking:
    """Sends metrics to one of Accelerate's trackers; the first failure warns and ends it.

    `metrics.jsonl` is written elsewhere and is complete whatever happens here.

    Args:
        name: "none", "tensorboard" (event files in `folder`/tensorboard), "trackio" (where it keeps
            its databases, on this machine) or "wandb".
        folder: the run folder.
        run_name: how the run is called there.
        config: nested settings to record.
    """

    def __init__(self, name: str, folder: Path, run_name: str, config: Mapping[str, Any]) -> None:
        self._name = name
        self._tracker: GeneralTracker | None = None
        self._failed = False
        self._hook = threading.excepthook
        if name != "none":
            threading.excepthook = self._thread_failed
            self._guarded(lambda: self._start(folder, run_name, _flat(config)))

    def _start(self, folder: Path, run_name: str, config: dict[str, Any]) -> None:
        if self._name == "tensorboard":
            tracker = TensorBoardTracker("tensorboard", logging_dir=folder)
            tracker.start()
            # add_hparams would open a second event file: plain text keeps one run one curve
            lines = "\n".join(f"    {key}: {value}" for key, value in config.items())
            tracker.writer.add_text("config", lines)
        else:
            if self._name == "trackio":
                # a run that is resumed goes on there too
                tracker = TrackioTracker("moe_emergence", name=run_name, resume="allow")
            else:
                tracker = WandBTracker("moe_emergence", name=run_name, dir=str(folder))
            tracker.start()
            tracker.store_init_configuration(config)
        self._tracker = tracker

    def log(self, row: Mapping[str, Any]) -> None:
        """Record one metrics row at its `step`."""
        tracker = self._tracker
        if tracker is not None:
            values = {k: v for k, v in row.items() if k != "step"}
            self._guarded(lambda: tracker.log(values, step=row["step"]))

    def finish(self) -> None:
        """Flush and close the tracker."""
        if self._tracker is not None:
            self._guarded(self._tracker.finish)
        threading.excepthook = self._hook

    def _guarded(self, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception as error:  # noqa: BLE001 - trackers fail in ways only they know
            self._failure(error)

    def _thread_failed(self, failed: threading.ExceptHookArgs) -> None:
        # TensorBoard writes in a thread of its own
        if type(failed.thread).__module__.partition(".")[0] != self._name:
            self._hook(failed)
        elif failed.exc_value is not None:
            self._failure(failed.exc_value)

    def _failure(self, error: BaseException) -> None:
        self._tracker = None
        if not self._failed:
            self._failed = True
            logger.warning(
                "--track %s failed and is off from here on (%s: %s); training goes on and "
                "metrics.jsonl stays complete",
                self._name,
                type(error).__name__,
                error,
            )


def check_tracker(name: str) -> None:
    """Refuse a tracker that is not installed, saying what to install."""
    if name in ("trackio", "wandb"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ValueError(
                f"--track {name}: {name} cannot be imported ({error}); "
                f"pip install 'moe-emergence[{name}]', or use --track tensorboard"
            ) from error


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, (int, float, str)) else str(value)
    return flat

"""What a command does between reading its settings and its work."""

import logging
import os
import warnings

import transformers
from rich.logging import RichHandler

from moe_emergence.dependencies import untested_here
from moe_emergence.terminal import Console

logger = logging.getLogger(__name__)


def begin() -> None:
    """Set up logging, quieten what would bury it, and warn of dependencies that are untested."""
    logging.basicConfig(
        level=logging.WARNING,
        format="%(message)s",
        handlers=[RichHandler(console=Console(stderr=True), show_path=False, show_time=False)],
    )
    logging.getLogger("moe_emergence").setLevel(logging.INFO)
    # a run has its own progress bar; those of every saved and loaded file would bury it
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message="'set_vital' is deprecated", category=UserWarning)
    if os.environ.get("RANK", "0") == "0":
        for dependency in untested_here():
            logger.warning("%s", dependency)

"""The analysis as one page that opens from disk, and in a few lines for the terminal."""

from moe_emergence.analysis.report.page import write_report
from moe_emergence.analysis.report.terminal import print_findings

__all__ = ["print_findings", "write_report"]

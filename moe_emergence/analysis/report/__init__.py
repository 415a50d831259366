"""The analysis as one page that opens from disk."""

from moe_emergence.analysis.report.page import write_report

__all__ = ["write_report"]

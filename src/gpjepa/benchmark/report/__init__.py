"""The report of a benchmark: one page, and the same as text."""

from ._page import write_report

__all__ = ["write_report"]

"""The report of a run: one page that opens anywhere, offline, with its figures in it."""

from search.report.page import render

__all__ = ["render"]

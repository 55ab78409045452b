"""The reports: pages that open anywhere, offline, with their figures in them."""

from search.report.page import render
from search.report.run_report import rewrite_report, write_report
from search.report.trace_page import render_eigenvalues, render_traces

__all__ = [
    "render",
    "render_eigenvalues",
    "render_traces",
    "rewrite_report",
    "write_report",
]

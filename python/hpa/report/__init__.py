"""The report of a run: tables for the terminal and one self-contained page, made from the event lines alone.

``events`` reads the lines, ``summary`` turns them into numbers, ``terminal`` and ``page`` show these; ``story`` puts
the computed sentences, ``tables`` and ``figures`` the parts of the page, ``markup`` and ``plot`` are their tools.
"""

from __future__ import annotations

from hpa.report.events import read_events
from hpa.report.page import build_report, figure_for_readme
from hpa.report.terminal import SummaryTables, summary_table

__all__ = ["SummaryTables", "build_report", "figure_for_readme", "read_events", "summary_table"]

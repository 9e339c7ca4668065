# SPDX-License-Identifier: Apache-2.0
"""A self-contained HTML page on a run: what happened, when, where in the model, and what chance would have done."""

from __future__ import annotations

from lightning_safety.report.masks import mask_entry
from lightning_safety.report.page import REPORT_FILE, check_libraries, render_page, write_report
from lightning_safety.report.run import RunRecord, read_run
from lightning_safety.report.settings import RUN_FILE, describe_run

__all__ = [
    "REPORT_FILE",
    "RUN_FILE",
    "RunRecord",
    "check_libraries",
    "describe_run",
    "mask_entry",
    "read_run",
    "render_page",
    "write_report",
]

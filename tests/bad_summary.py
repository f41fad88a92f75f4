"""One line at the end of a run: how many bad days were tried, and what was lost in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def bad_days(stats: Mapping[str, Sequence[Any]]) -> str:
    """From pytest's reports, of all workers; nothing where no such test ran.

    Every test of `test_bad_days*` is a case, and so is every moment at which one of them killed a writer.
    """
    tried, lost, failed = 0, 0, 0
    for outcome in ("passed", "failed", "xfailed"):
        for report in stats.get(outcome, ()):
            if "test_bad_days" not in getattr(report, "nodeid", "") or report.when != "call":
                continue
            told = dict(report.user_properties)
            tried += 1 + told.get("faults", 0)
            lost += told.get("half-written", 0)
            failed += outcome == "failed"
    return f"bad days: cases tried {tried}, failed {failed}, lost or half-written files {lost}" if tried else ""

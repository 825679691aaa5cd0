"""What the benchmarks have in common: how a figure is written, and when there is none."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


class BenchmarkError(Exception):
    """There is nothing to measure; the message names the cause and the fix."""


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Return the median of values, with the least and the greatest."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"
